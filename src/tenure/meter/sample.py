"""One reading of what a party uses: the host, a process tree, a cgroup, a GPU. Repeating and summing up is `watch`'s work.

Every sampler has `sample()`, which gives a `Usage`, or None once its party is gone; `lost` then says why. None of them raises
for a party that ends while it is read. A sampler belongs to one thread. The process tree's lies in `tree`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tenure.meter import cgroups
from tenure.meter.tree import TICKS_PER_S, ProcessTreeSampler
from tenure.usage import Usage

__all__ = ["CgroupSampler", "HostSampler", "NvmlSampler", "ProcessTreeSampler", "Sampler"]


class Sampler(Protocol):
    """Reads one party's usage."""

    lost: str
    """Why nothing more will come; empty while the party is there."""

    def sample(self) -> Usage | None:
        """Return the usage now, or None when the party is gone."""
        ...

    def close(self) -> None:
        """Let go of open files. Idempotent."""
        ...


class HostSampler:
    """The whole machine: busy CPU seconds since boot (all but idle and I/O wait), memory in use (total minus available)."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.lost = ""
        self._proc = proc
        self._peak_bytes = 0

    def sample(self) -> Usage | None:
        """Return busy CPU and memory in use; `processes` and disk counters are not counted for a host."""
        try:
            first = (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:9]
            fields = [line.split() for line in (self._proc / "meminfo").read_text().splitlines()[:16]]
        except OSError as error:
            self.lost = f"{self._proc} can't be read: {error}"
            return None
        ticks = [int(value) for value in first]
        memory = {field[0]: int(field[1]) << 10 for field in fields}
        used = memory["MemTotal:"] - memory.get("MemAvailable:", memory.get("MemFree:", 0))
        self._peak_bytes = max(self._peak_bytes, used)
        busy_s = (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S
        return Usage(at_s=time.time(), cpu_s=busy_s, memory_bytes=used, peak_memory_bytes=self._peak_bytes)

    def close(self) -> None:
        """Nothing to let go of."""


class CgroupSampler:
    """A control group, v1 or v2. `paths` is what `cgroups.own_paths` gives: controller -> directory, ``unified`` for v2.

    memory_bytes is anonymous + shared + kernel memory (no page cache); the peak is the highest of these that was read.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)
        self.lost = ""
        self._peak_bytes = 0

    @classmethod
    def of(cls, pid: int) -> CgroupSampler:
        """Return the sampler of the group that a process is in."""
        return cls(cgroups.own_paths(pid))

    def sample(self) -> Usage | None:
        """Return the group's usage; None once the group is removed."""
        if not self.paths or not any((path / "cgroup.procs").exists() for path in self.paths.values()):
            self.lost = f"the control group {next(iter(self.paths.values()), '(none mounted)')} is gone"
            return None
        memory = self._memory_bytes()
        self._peak_bytes = max(self._peak_bytes, memory)
        read, written = self._io()
        at = self.paths.get("pids") or self.paths.get("unified") or next(iter(self.paths.values()))
        return Usage(
            at_s=time.time(),
            cpu_s=self._cpu_s(),
            memory_bytes=memory,
            peak_memory_bytes=self._peak_bytes,
            read_bytes=read,
            write_bytes=written,
            processes=_bytes(str(at / "cgroup.procs")).count(b"\n"),
        )

    def close(self) -> None:
        """Nothing to let go of."""

    def _cpu_s(self) -> float:
        if "cpuacct" in self.paths:
            return int(_bytes(str(self.paths["cpuacct"] / "cpuacct.usage")) or 0) / 1e9
        return _table(self.paths.get("unified"), "cpu.stat").get(b"usage_usec", 0) / 1e6

    def _memory_bytes(self) -> int:
        if "memory" in self.paths:
            stat = _table(self.paths["memory"], "memory.stat")
            kernel = int(_bytes(str(self.paths["memory"] / "memory.kmem.usage_in_bytes")) or 0)
            return stat.get(b"total_rss", 0) + stat.get(b"total_shmem", 0) + kernel
        stat = _table(self.paths.get("unified"), "memory.stat")
        return stat.get(b"anon", 0) + stat.get(b"shmem", 0) + stat.get(b"kernel", 0)

    def _io(self) -> tuple[int, int]:
        if "blkio" in self.paths:
            lines = _bytes(str(self.paths["blkio"] / "blkio.throttle.io_service_bytes_recursive")).split(b"\n")
            fields = [line.split() for line in lines]
            totals = {kind: sum(int(f[2]) for f in fields if len(f) == 3 and f[1] == kind) for kind in (b"Read", b"Write")}
            return totals[b"Read"], totals[b"Write"]
        words = _bytes(str(self.paths["unified"] / "io.stat")).split() if "unified" in self.paths else []
        pairs = [word.split(b"=") for word in words if b"=" in word]
        return (
            sum(int(value) for key, value in pairs if key == b"rbytes"),
            sum(int(value) for key, value in pairs if key == b"wbytes"),
        )


class NvmlSampler:
    """One NVIDIA device: share of time busy and device memory in use, of everybody who uses it."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.lost = ""
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml  # late: only who watches a GPU pays for it

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        except ImportError:
            self.lost = "the package nvidia-ml-py is not installed"
        except pynvml.NVMLError as error:
            self.lost = f"no NVIDIA device {index}: {error}"

    def sample(self) -> Usage | None:
        """Return the device's usage; None without device, driver or right."""
        if self._handle is None:
            return None
        try:
            busy = float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100.0
            memory = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError as error:
            self.lost = f"NVIDIA device {self.index} stopped answering: {error}"
            return None
        return Usage(at_s=time.time(), gpu_busy=busy, gpu_memory_bytes=memory)

    def close(self) -> None:
        """Let go of the library."""
        if self._nvml is not None:
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                pass
        self._nvml = self._handle = None
        self.lost = self.lost or "closed"


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _table(directory: Path | None, name: str) -> dict[bytes, int]:
    if directory is None:
        return {}
    pairs = (line.split() for line in _bytes(str(directory / name)).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
