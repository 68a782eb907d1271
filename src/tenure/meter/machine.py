"""What this machine is and how much of it can be leased: facts that trials are compared by.

Quick to import and to call: it reads /proc, and loads NVML only where an NVIDIA device file exists.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

from tenure.meter import cgroups, nvml
from tenure.meter.cpu import cpu
from tenure.nodes import Machine
from tenure.resources import Capacity


def machine() -> Machine:
    """Return what a measurement made here runs on."""
    model, features = cpu()
    gpus = nvml.gpus()
    return Machine(
        cpu_model=model,
        cpu_features=features,
        cores=max(1, int(_cpus())),
        memory_bytes=_memory_bytes(),
        gpu_model=gpus[0].model if gpus else "",
        gpus=len(gpus),
        kernel=platform.release(),
        python=platform.python_version(),
    )


def capacity(path: Path | None = None) -> Capacity:
    """Return what this process may use of the machine, as a node offers it.

    cpus: cores of the CPU affinity, cut by the cgroup CPU quota. memory_bytes: RAM, cut by the cgroup limit.
    disk_bytes: free for us on the file system of `path` (default: the home directory), 0 when it can't be read.
    """
    return Capacity(cpus=_cpus(), memory_bytes=_memory_bytes(), disk_bytes=_disk_free_bytes(path), gpus=nvml.gpus())


def versions(*names: str) -> dict[str, str]:
    """Return distribution name -> installed version. Names that are not installed are left out."""
    from importlib import metadata  # late: 20 ms that a worker need not pay

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpus() -> float:
    cores = float(len(os.sched_getaffinity(0)))
    quota = cgroups.cpu_quota()
    return cores if quota is None else min(cores, quota)


def _memory_bytes() -> int:
    match = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    total = int(match[1]) << 10 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroups.memory_limit_bytes()
    return total if limit is None else min(total, limit)


def _disk_free_bytes(path: Path | None) -> int:
    place = path or Path.home()
    for candidate in (place, *place.parents):
        try:
            return shutil.disk_usage(candidate).free
        except OSError:
            continue
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
