"""Every cell of an experiment as a line of JSON, written as it ends: for people and their own programs, and to go on with.

A line has the setting, its place in the order, all metrics, every latency that was kept; under `asked` what they came of, so
that an experiment that was broken off goes on with the repeats that are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tenure.experiments.sweep import Setting
from tenure.experiments.sweep_nodes import Asked
from tenure.experiments.sweep_trials import row_of


def raw_line(asked: Asked) -> bytes:
    """Return one cell as a line."""
    return (
        msgspec.json.encode(
            {
                **asked.setting.configuration(),
                "repeat": asked.repeat,
                "order": asked.order,
                "at_s": asked.at_s,
                **row_of(asked),
                "latencies_dropped": asked.cell.latencies_dropped,
                "latencies_s": [round(latency, 7) for latency in asked.latencies_s.tolist()],
                "asked": asked,
            },
            enc_hook=_without_arrays,
        )
        + b"\n"
    )


def kept(path: Path, expected: Sequence[tuple[int, Setting]], *, cells: int) -> list[Asked]:
    """Return the cells of whole repeats that a file holds, and leave no others in it.

    A file of another experiment, or of one that is done, is set aside, and nothing is returned.

    expected: the order that the experiment has now. cells: of one repeat.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found: list[Asked] = []
    for line, (repeat, setting) in zip(lines, expected, strict=False):
        asked = _read(line)
        if asked is None or (asked.repeat, asked.setting) != (repeat, setting):
            break
        found.append(asked)
    found = found[: len(found) // cells * cells]
    if not found or len(found) == len(expected):
        path.rename(path.with_name(f"{path.stem}-{path.stat().st_mtime_ns}{path.suffix}"))
        return []
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(b"".join(lines[: len(found)]))
    scratch.replace(path)
    return found


def _read(line: bytes) -> Asked | None:
    """Return one cell; None for a line that is torn."""
    try:
        content = msgspec.json.decode(line)
        latencies_s = np.array(content["latencies_s"], np.float32)
        return msgspec.convert({**content["asked"], "latencies_s": latencies_s}, Asked, dec_hook=_as_it_is)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError, ValueError):
        return None


def _without_arrays(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return None  # beside it in the line
    raise TypeError(f"cannot write {type(value).__name__}")


def _as_it_is(kind: type, value: Any) -> Any:
    return value
