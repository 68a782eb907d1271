"""What a leased process of this room reads from and writes for whoever started it. Files only; nothing of leases' rules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def leased_threads(environ: Mapping[str, str]) -> int:
    """Return the threads a model may use: what the lease file says, else OMP_NUM_THREADS, else the usable cores."""
    path = environ.get("TENURE_LEASE_FILE")
    if path:
        try:
            lease = json.loads(Path(path).read_text())
            threads = lease.get("threads") or lease.get("envelope", {}).get("cpus", 0)
            if isinstance(threads, (int, float)) and threads > 0:
                return max(1, int(threads))
        except (OSError, ValueError, AttributeError):
            pass  # a lease file that is being set up or of another form: the environment below says the same
    named = environ.get("OMP_NUM_THREADS", "")
    return max(1, int(named)) if named.isdigit() else len(os.sched_getaffinity(0))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file so that readers see all of it or nothing (temporary name, then rename)."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content))
    os.replace(scratch, path)


def worker_dir(environ: Mapping[str, str]) -> Path | None:
    """Return the attempt's folder, or None outside of a lease."""
    found = environ.get("TENURE_WORKER_DIR")
    return Path(found) if found else None
