"""How a lease's bounds are held: by cgroup v1, cgroup v2, or rlimits with polling.

For: making, joining, changing, reading and removing what holds one attempt. A `Confinement` is plain data (`to_plan` /
`from_plan`), so that a shim can rebuild it from a file.
Not for: choosing the means (`confiner`), starting or ending processes (`shim`).

v1 groups lie below this process's own group of each controller; one process joins through `tasks`, because a thread
moving itself needs no grace period of the kernel (0.6 ms instead of 12 ms through `cgroup.procs`). v2 groups lie in a home
that `groups` finds; where it has memory but no cpu controller, affinity holds the CPUs. Swap is off for the lease where the
kernel can account for it, so that the bound is one of memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from typing import Any

from tenure.errors import Refused
from tenure.resources import Envelope, format_bytes, show_bytes
from tenure.runtimes import procfs
from tenure.runtimes.groups import leaf_of, pids_in, subtree, write

NAME = "tenure"
"""First part of the names of all groups made here."""
REMOVE_MAX_S = 2.0
"""Bound of waiting for the kernel to let go of a group whose processes are gone: a few ms, while it frees their memory."""
CPU_PERIOD_US = 100_000
"""Period of the CPU quota; the kernel's own default."""
_MIN_QUOTA_US = 1000
UNTOUCHED_BYTES = 256 << 20
UNTOUCHED_PER_CPU_BYTES = 64 << 20
"""What libraries may reserve beyond the bound without touching it, a process and a cpu of its share (threads follow it).
Seen with NumPy, scikit-learn and ONNX Runtime together: 100 MiB with one thread each, 180 MiB with two."""


def _keyed(path: str) -> dict[str, int]:
    """Return a file of ``name number`` lines; empty when it cannot be read."""
    try:
        return {line.split()[0]: int(line.split()[1]) for line in procfs.read_text(path).splitlines() if len(line.split()) == 2}
    except (OSError, ValueError):
        return {}


def _number(path: str) -> int:
    try:
        return int(procfs.read_text(path).strip())
    except (OSError, ValueError):
        return 0


class Confinement:
    """The bounds of one attempt. `kind` is ``v1``, ``v2`` or ``rlimit``; `groups` maps controller -> folder.

    A v2 group always has memory; cpu and pids only where they are delegated.
    """

    def __init__(self, kind: str, groups: dict[str, str] | None = None) -> None:
        self.kind = kind
        self.groups = dict(groups or {})

    def to_plan(self) -> dict[str, Any]:
        """Return the confinement as plain data."""
        return {"kind": self.kind, "groups": self.groups}

    @staticmethod
    def from_plan(plan: dict[str, Any]) -> Confinement:
        """Return the confinement that `to_plan` described."""
        return Confinement(str(plan["kind"]), {str(k): str(v) for k, v in plan["groups"].items()})

    @property
    def enforced(self) -> bool:
        """Whether the kernel holds memory; otherwise the shim polls."""
        return self.kind != "rlimit"

    @property
    def holds_cpus(self) -> bool:
        """Whether the kernel holds the CPU share; otherwise affinity does, as far as it goes."""
        return "cpu" in self.groups

    def _folders(self) -> list[str]:
        return list(dict.fromkeys(self.groups.values()))

    def make(self, envelope: Envelope, pids_max: int) -> None:
        """Make the groups and write their limits. Raises OSError."""
        for folder in self._folders():
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
        if "pids" in self.groups:
            write(f"{self.groups['pids']}/pids.max", max(1, pids_max))
        if self.enforced:
            self._write_memory(envelope.memory_bytes)
        if self.holds_cpus:
            self._write_cpu(envelope.cpus)

    def join(self, pid: int = 0) -> None:
        """Move a single-threaded process into the groups, the calling one for 0. Raises OSError."""
        for folder in self._folders():
            if self.kind == "v1":
                write(f"{folder}/tasks", pid)
                continue
            try:
                write(f"{folder}/cgroup.procs", pid)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                write(f"{leaf_of(folder, NAME)}/cgroup.procs", pid)  # Tenure runs again in this lease and has divided its group

    def _write_memory(self, size_bytes: int) -> None:
        folder = self.groups["memory"]
        if self.kind == "v2":
            write(f"{folder}/memory.max", size_bytes)
            for name, value in (("memory.swap.max", 0), ("memory.oom.group", 1)):  # a lease out of memory ends as a whole
                if os.path.exists(f"{folder}/{name}"):
                    write(f"{folder}/{name}", value)
            return
        # The kernel refuses a memory+swap limit below the memory limit: grow it first, shrink it last.
        with_swap = f"{folder}/memory.memsw.limit_in_bytes"
        has_swap = os.path.exists(with_swap)
        if has_swap and _number(with_swap) < size_bytes:
            write(with_swap, size_bytes)
        write(f"{folder}/memory.limit_in_bytes", size_bytes)
        if has_swap:
            write(with_swap, size_bytes)

    def _write_cpu(self, cpus: float) -> None:
        quota_us = max(_MIN_QUOTA_US, round(cpus * CPU_PERIOD_US))
        folder = self.groups["cpu"]
        if self.kind == "v2":
            write(f"{folder}/cpu.max", f"{quota_us} {CPU_PERIOD_US}")
        else:
            write(f"{folder}/cpu.cfs_period_us", CPU_PERIOD_US)
            write(f"{folder}/cpu.cfs_quota_us", quota_us)

    def resize(self, envelope: Envelope, shim_pid: int) -> None:
        """Change CPU and memory of what runs. Raises Refused when more memory is in use than the new bound."""
        self.check_use(envelope.memory_bytes, shim_pid)
        try:
            if self.kind == "v2":
                self.make_fit(envelope.memory_bytes)
            if self.enforced:
                self._write_memory(envelope.memory_bytes)
            if self.holds_cpus:
                self._write_cpu(envelope.cpus)
        except OSError as error:
            raise Refused(f"resize to {envelope.describe()} refused by the kernel: {error}; ask for more memory") from error
        for pid in self._tasks_of(shim_pid):
            with contextlib.suppress(OSError):
                if not self.enforced:
                    limit_memory(envelope, pid)
                if not self.holds_cpus:
                    os.sched_setaffinity(pid, cpu_mask(envelope.cpus))

    def check_use(self, size_bytes: int, shim_pid: int) -> None:
        """Raise Refused when more memory is in use than a new bound."""
        if (used := self.memory_bytes(shim_pid)) > size_bytes:
            raise Refused(
                f"resize refused: the lease uses {show_bytes(used)} of memory, above the {show_bytes(size_bytes)} "
                "asked for. Have the job free memory first, or ask for more."
            )

    def _tasks_of(self, shim_pid: int) -> Iterator[int]:
        """Yield the threads below a shim: affinity is each one's own."""
        for pid in procfs.descendants(shim_pid):
            with contextlib.suppress(OSError):
                yield from (int(task) for task in os.listdir(f"/proc/{pid}/task"))

    def make_fit(self, size_bytes: int) -> None:
        """Have the kernel take back page cache above a coming v2 bound: the bound itself would kill where memory.high waits.

        Raises Refused when what is left is still above it, OSError where the group is not ours to write.
        """
        folder = self.groups["memory"]
        if _number(f"{folder}/memory.current") <= size_bytes:
            return
        write(f"{folder}/memory.high", size_bytes)
        try:
            if (left := _number(f"{folder}/memory.current")) > size_bytes:
                raise Refused(
                    f"resize refused: the lease holds {show_bytes(left)} of memory that cannot be taken back, above the "
                    f"{show_bytes(size_bytes)} asked for. Have the job free memory first, or ask for more."
                )
            write(f"{folder}/memory.max", size_bytes)
        finally:
            write(f"{folder}/memory.high", "max")

    def members(self) -> list[int]:
        """Return the pids in the groups and those below them; none for rlimit."""
        found: set[int] = set()
        for folder in self._folders():
            for group in subtree(folder):
                with contextlib.suppress(OSError):
                    found.update(pids_in(group))
        return sorted(found)

    def oom_kills(self) -> int:
        """Return the kernel's own count of processes it killed here because this group's limit was met.

        v2 counts in one number what was killed in groups below for their own limits, and by a machine out of memory: such a
        kill is not the lease's unless its own limit was met too, which the local counter says (since Linux 5.2).
        """
        if not self.enforced:
            return 0
        folder = self.groups["memory"]
        if self.kind == "v1":
            return _keyed(f"{folder}/memory.oom_control").get("oom_kill", 0)
        kills = _keyed(f"{folder}/memory.events").get("oom_kill", 0)
        return kills if kills and _keyed(f"{folder}/memory.events.local").get("oom", 1) else 0

    def oom_witness(self) -> str:
        """Return the counter and the limit that stand behind an out-of-memory end, in words."""
        name = "cgroup v1 memory.oom_control" if self.kind == "v1" else "cgroup v2 memory.events"
        peak = f"highest charge {show_bytes(self.highest_charge_bytes())}"
        return f"{name}: oom_kill {self.oom_kills()}; limit {format_bytes(self.limit_bytes())}, {peak}"

    def limit_bytes(self) -> int:
        """Return the bound of memory that the kernel holds; 0 when it does not say."""
        return _number(f"{self.groups['memory']}/{'memory.limit_in_bytes' if self.kind == 'v1' else 'memory.max'}")

    def highest_charge_bytes(self) -> int:
        """Return the kernel's height of all memory charged, page cache included; 0 when it does not say.

        Linux before 5.19 keeps no height for v2: one that has killed for want of memory had reached the limit.
        """
        if not self.enforced:
            return 0
        name = "memory.max_usage_in_bytes" if self.kind == "v1" else "memory.peak"
        return _number(f"{self.groups['memory']}/{name}") or (self.limit_bytes() if self.oom_kills() else 0)

    def charge_bytes(self) -> int:
        """Return all memory charged now, page cache and the kernel's own included; 0 when the kernel does not say."""
        if not self.enforced:
            return 0
        return _number(f"{self.groups['memory']}/{'memory.usage_in_bytes' if self.kind == 'v1' else 'memory.current'}")

    def memory_bytes(self, shim_pid: int) -> int:
        """Return anonymous + shared memory now: the cgroup's statistics, else the sum over the tree."""
        if not self.enforced:
            return sum(procfs.resident_bytes(pid) for pid in procfs.descendants(shim_pid))
        stat = _keyed(f"{self.groups['memory']}/memory.stat")
        if self.kind == "v1":
            return stat.get("total_rss", stat.get("rss", 0)) + stat.get("total_shmem", stat.get("shmem", 0))
        return stat.get("anon", 0) + stat.get("shmem", 0)

    def cpu_s(self, shim_pid: int) -> float:
        """Return the CPU seconds so far, ended processes included."""
        if self.kind == "v1":
            return _number(f"{self.groups['cpuacct']}/cpuacct.usage") / 1e9
        if self.kind == "v2":
            return _keyed(f"{self.groups['memory']}/cpu.stat").get("usage_usec", 0) / 1e6  # there without the controller too
        return procfs.waited_cpu_s(shim_pid) + procfs.tree_use(procfs.descendants(shim_pid)).cpu_s

    def stop_forks(self) -> None:
        """Let nothing in the groups start a further process or thread."""
        if "pids" in self.groups:
            with contextlib.suppress(OSError):
                write(f"{self.groups['pids']}/pids.max", 0)

    def kill(self) -> None:
        """Kill all in the groups at one blow where the kernel can (v2, since 5.14), whatever user it runs as or forks."""
        if self.kind == "v2":
            with contextlib.suppress(OSError):
                write(f"{self.groups['memory']}/cgroup.kill", 1)

    def kill_members(self, *, timeout_s: float = 10.0) -> int:
        """Kill what is in the groups and wait until nothing is; return how many are left after `timeout_s`."""
        self.stop_forks()
        deadline = time.monotonic() + timeout_s
        while members := self.members():
            self.kill()
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return len(members)
            time.sleep(0.002)
        return 0

    def remove(self, *, timeout_s: float = REMOVE_MAX_S) -> None:
        """Remove the groups and those that the job made below them; one still busy after `timeout_s` stays for a later call."""
        deadline = time.monotonic() + timeout_s
        for folder in self._folders():
            while not _removed(folder) and time.monotonic() < deadline:
                time.sleep(0.002)


def _removed(folder: str) -> bool:
    for group in subtree(folder):
        with contextlib.suppress(OSError):
            os.rmdir(group)
    return not os.path.exists(folder)


def data_limit_bytes(envelope: Envelope) -> int:
    """Return what one process under rlimits may reserve: the bound, and room for what libraries reserve and never touch.

    RLIMIT_DATA counts reserved pages, the bound touched ones: OpenBLAS reserves 40 MiB a thread, the C library 8 MiB of
    stack. Polling holds the bound; this limit stops what would grow past it by more than that before the next look.
    """
    return envelope.memory_bytes + UNTOUCHED_BYTES + UNTOUCHED_PER_CPU_BYTES * max(1, -int(-envelope.cpus // 1))


def limit_memory(envelope: Envelope, pid: int = 0) -> None:
    """Bound the private writable memory of one process (RLIMIT_DATA, soft) to `data_limit_bytes`. Raises OSError."""
    hard = resource.prlimit(pid, resource.RLIMIT_DATA)[1]
    soft = data_limit_bytes(envelope)
    resource.prlimit(pid, resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def cpu_mask(cpus: float) -> set[int]:
    """Return as many of our processors as the share needs, rounded up."""
    ours = sorted(os.sched_getaffinity(0))
    return set(ours[: max(1, min(len(ours), -int(-cpus // 1)))])
