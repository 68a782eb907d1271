"""What a leased process of this room reads from and writes for whoever started it. Files only; nothing of leases' rules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def leased_threads(environ: Mapping[str, str]) -> int:
    """Return the threads a model may use: what the lease file says, else OMP_NUM_THREADS, else the usable cores."""
    lease = _lease(environ)
    threads = lease.get("threads") or _envelope(lease).get("cpus", 0)
    if isinstance(threads, (int, float)) and threads > 0:
        return max(1, int(threads))
    named = environ.get("OMP_NUM_THREADS", "")
    return max(1, int(named)) if named.isdigit() else len(os.sched_getaffinity(0))


def leased_memory_bytes(environ: Mapping[str, str]) -> int:
    """Return the memory that the lease grants; 0 outside of a lease."""
    found = _envelope(_lease(environ)).get("memory_bytes", 0)
    return found if isinstance(found, int) and found > 0 else 0


def _lease(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the lease file's content; nothing when it is being set up or of another form: the environment says the same."""
    path = environ.get("TENURE_LEASE_FILE")
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _envelope(lease: Mapping[str, Any]) -> Mapping[str, Any]:
    found = lease.get("envelope")
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file so that readers see all of it or nothing (temporary name, then rename)."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content))
    os.replace(scratch, path)


def worker_dir(environ: Mapping[str, str]) -> Path | None:
    """Return the attempt's folder, or None outside of a lease."""
    found = environ.get("TENURE_WORKER_DIR")
    return Path(found) if found else None
