"""What an attempt leaves behind: its result file and the end of its output. Nothing here trusts the job's files."""

from __future__ import annotations

import json
import os
from typing import Any

from tenure.runtimes.acting import open_regular

_MAX_RESULT_BYTES = 1 << 20
_TAIL_BYTES = 4096
_TAIL_LINES = 20


def read_result(worker_dir: str) -> dict[str, Any] | None:
    """Return the object in `result.json`; None when it is missing, larger than 1 MiB, a link, or no JSON object."""
    try:
        with os.fdopen(open_regular(f"{worker_dir}/result.json", os.O_RDONLY), "rb") as stream:
            data = stream.read(_MAX_RESULT_BYTES + 1)
        found = json.loads(data) if len(data) <= _MAX_RESULT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_tail(log_path: str, max_bytes: int = _TAIL_BYTES) -> str:
    """Return the last lines of a log, at most 20 and `max_bytes`; empty when there is none, or something else in its place."""
    try:
        with os.fdopen(open_regular(log_path, os.O_RDONLY), "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - max_bytes))
            text = stream.read(max_bytes).decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
