"""One process by its exact CPU clock: for spans of a few ms, which the clock ticks of /proc cannot resolve.

The kernel keeps a clock of CPU time per process, in nanoseconds, that others may read by the process id; a reading takes about
a microsecond. Memory comes from an open file of /proc. Not here: children (`tree`), repeating and summing up (`watch`).
"""

from __future__ import annotations

import os
import time

from tenure.usage import Usage

_READ = 4096


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used, all threads, ended children not. Raises OSError when it is gone.

    Source: the Linux encoding of a process's CPU clock, (~pid << 3) | CPUCLOCK_SCHED (include/linux/posix-timers.h).
    """
    return time.clock_gettime(~pid << 3 | 2)


def children(pid: int) -> tuple[int, ...]:
    """Return the processes that a process's threads have started and that still live; none when it is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += [int(each) for each in file.read().split()]
    except OSError:
        return tuple(found)
    return tuple(found)


def shared_memory_bytes(pid: int) -> tuple[int, int]:
    """Return the shared memory of a process as `memory_bytes` counts it, and its part of it where others map it too.

    Reads the page tables (about a ms per 100 MB): not for a loop. (0, 0) where it may not be read.
    """
    found: dict[bytes, int] = {}
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            found |= _kib(file.read(), (b"RssShmem",))
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            found |= _kib(file.read(), (b"Pss_Shmem",))
    except OSError:
        return 0, 0
    return found.get(b"RssShmem", 0), found.get(b"Pss_Shmem", found.get(b"RssShmem", 0))


class ProcessSampler:
    """See Sampler. cpu_s: exact, without ended children; memory_bytes: anonymous + shared."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.lost = ""
        self._peak_bytes = 0
        self._fd = -1
        try:
            self._fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.lost = f"process {pid} can't be read: {error.strerror}"

    def sample(self) -> Usage | None:
        """Return the process's usage now; None once it is gone."""
        if self._fd < 0:
            return None
        try:
            # The file first: it fails once the process is reaped, so a clock of another with its number is never read.
            status = os.pread(self._fd, _READ, 0)
            used_s = cpu_s(self.pid)
        except OSError:
            self.lost = f"process {self.pid} is gone"
            return None
        memory = sum(_kib(status, (b"RssAnon", b"RssShmem")).values())
        self._peak_bytes = max(self._peak_bytes, memory)
        return Usage(at_s=time.time(), cpu_s=used_s, memory_bytes=memory, peak_memory_bytes=self._peak_bytes, processes=1)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.lost = self.lost or "closed"


def _kib(text: bytes, names: tuple[bytes, ...]) -> dict[bytes, int]:
    """Return lines ``Name: n kB`` as bytes by name."""
    found = {}
    for name in names:
        at = text.find(name + b":")
        if at >= 0:
            found[name] = int(text[at + len(name) + 1 : text.index(b"\n", at)].split()[0]) << 10
    return found
