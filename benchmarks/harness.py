"""What every benchmark shares: options, interleaved repeats, median and spread, the result.

Not here: what is measured. A benchmark is a module of this folder with a docstring (its definition), NAME, BAR and
`run(options: Options) -> Result`.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


class Skip(Exception):
    """A part that a benchmark needs is missing here: `holds` becomes null, the text becomes `why`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a benchmark is run."""

    quick: bool = False
    """End within a minute with a smaller sample; every check stays."""
    seed: int = 0
    data: Path | None = None
    """The folder handed in by --data, else $TENURE_DATA, else ../shared/data, else None."""

    def need_data(self, *parts: str) -> Path:
        """Return a path below the data folder. Raises Skip, saying what is missing, when it isn't there."""
        if self.data is None:
            raise Skip("no data folder: hand one in with --data DIR or TENURE_DATA")
        path = self.data.joinpath(*parts)
        if not path.exists():
            raise Skip(f"the data folder {self.data} has no {'/'.join(parts)}")
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A broken or naive variant that must fail the bar or the correctness check."""

    name: str
    value: float | None
    failed: bool
    """True: it failed, as it must."""
    how: str = ""
    """What it failed, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark found. `details` holds further figures by name, unit in the name."""

    value: float | None
    spread: float | None
    """Interquartile range of the repeats."""
    unit: str
    holds: bool | None
    why: str = ""
    """Needed when holds is None or False."""
    reference: Mapping[str, Any] = field(default_factory=dict)
    control: Control | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def data_folder(given: str | None) -> Path | None:
    """Return the data folder by the order of `Options.data`. Raises Skip when one was named that does not exist."""
    named = given or os.environ.get("TENURE_DATA")
    if named:
        path = Path(named)
        if not path.is_dir():
            raise Skip(f"the data folder {path} does not exist")
        return path
    shared = ROOT.parent / "shared" / "data"
    return shared if shared.is_dir() else None


def interleaved(
    contenders: Mapping[str, Callable[[], T]], repeats: int, *, seed: int = 0, warm_up: int = 0
) -> dict[str, list[T]]:
    """Call every contender `repeats` times, in rounds whose order is shuffled by the seed; give what each returned, in order.

    Garbage is collected before each call. `warm_up` rounds come first and are thrown away.
    """
    order, rng = list(contenders), random.Random(seed)
    values: dict[str, list[T]] = {name: [] for name in order}
    for number in range(-warm_up, repeats):
        rng.shuffle(order)
        for name in order:
            gc.collect()
            value = contenders[name]()
            if number >= 0:
                values[name].append(value)
    return values


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range (inclusive method); 0 for one value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def judge(holds: bool, control: Control | None) -> tuple[bool, str]:
    """Return whether a bar holds and why not: a control that did not fail voids the measurement."""
    if control is not None and not control.failed:
        return False, f"the control {control.name!r} did not fail, so the measurement shows nothing"
    return holds, "" if holds else "the bar was missed"
