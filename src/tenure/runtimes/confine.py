"""How a lease's bounds are held on this machine: cgroup v1, cgroup v2, or rlimits with polling.

For: choosing the means once (`find_confinement`), and for each attempt making, joining, changing, reading and removing
them. A `Confinement` is plain data (`to_plan` / `from_plan`), so that a shim can rebuild it from a file.
Not for: starting or ending processes (`shim`).

v1 groups lie below this process's own group of each controller; one process joins through `tasks`, because a thread
moving itself needs no grace period of the kernel (0.6 ms instead of 12 ms through `cgroup.procs`). v2 groups lie in our
delegated subtree; its rule that inner groups hold no processes is met by moving ourselves into a leaf, and only when the
group holds nobody else. Swap is off for the lease where the kernel can account for it, so that the bound is one of memory.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from typing import Any, Literal

from tenure.errors import Refused, Unavailable, Unsupported
from tenure.resources import Bound, Envelope, format_bytes, show_bytes
from tenure.runtimes import procfs

Confine = Literal["auto", "cgroup", "rlimit"]
_V1 = ("memory", "cpu", "cpuacct", "pids")
_V2 = ("memory", "cpu", "pids")
CPU_PERIOD_US = 100_000
"""Period of the CPU quota; the kernel's own default."""
_MIN_QUOTA_US = 1000
UNTOUCHED_BYTES = 256 << 20
UNTOUCHED_PER_CPU_BYTES = 64 << 20
"""What libraries may reserve beyond the bound without touching it, a process and a cpu of its share (threads follow it).
Seen with NumPy, scikit-learn and ONNX Runtime together: 100 MiB with one thread each, 180 MiB with two."""


def _write(path: str, value: int | str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


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
    """The bounds of one attempt. `kind` is ``v1``, ``v2`` or ``rlimit``; `groups` maps controller -> folder."""

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
        """Whether the kernel holds memory and CPU; otherwise the shim polls."""
        return self.kind != "rlimit"

    def make(self, envelope: Envelope, pids_max: int) -> None:
        """Make the groups and write their limits. Raises OSError."""
        for folder in dict.fromkeys(self.groups.values()):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
        if self.enforced:
            _write(f"{self.groups['pids']}/pids.max", max(1, pids_max))
            self._write_memory(envelope.memory_bytes)
            self._write_cpu(envelope.cpus)

    def join(self) -> None:
        """Move the calling single-threaded process into the groups. Raises OSError."""
        for folder in dict.fromkeys(self.groups.values()):
            _write(f"{folder}/{'tasks' if self.kind == 'v1' else 'cgroup.procs'}", 0)

    def _write_memory(self, size_bytes: int) -> None:
        folder = self.groups["memory"]
        if self.kind == "v2":
            _write(f"{folder}/memory.max", size_bytes)
            if os.path.exists(f"{folder}/memory.swap.max"):
                _write(f"{folder}/memory.swap.max", 0)
            return
        # The kernel refuses a memory+swap limit below the memory limit: grow it first, shrink it last.
        with_swap = f"{folder}/memory.memsw.limit_in_bytes"
        has_swap = os.path.exists(with_swap)
        if has_swap and _number(with_swap) < size_bytes:
            _write(with_swap, size_bytes)
        _write(f"{folder}/memory.limit_in_bytes", size_bytes)
        if has_swap:
            _write(with_swap, size_bytes)

    def _write_cpu(self, cpus: float) -> None:
        quota_us = max(_MIN_QUOTA_US, round(cpus * CPU_PERIOD_US))
        folder = self.groups["cpu"]
        if self.kind == "v2":
            _write(f"{folder}/cpu.max", f"{quota_us} {CPU_PERIOD_US}")
        else:
            _write(f"{folder}/cpu.cfs_period_us", CPU_PERIOD_US)
            _write(f"{folder}/cpu.cfs_quota_us", quota_us)

    def resize(self, envelope: Envelope, shim_pid: int) -> None:
        """Change CPU and memory of what runs. Raises Refused when more memory is in use than the new bound."""
        used = self.memory_bytes(shim_pid)
        if used > envelope.memory_bytes:
            raise Refused(
                f"resize refused: the lease uses {show_bytes(used)} of memory, above the {show_bytes(envelope.memory_bytes)} "
                "asked for. Have the job free memory first, or ask for more."
            )
        if self.enforced:
            try:
                self._write_memory(envelope.memory_bytes)
                self._write_cpu(envelope.cpus)
            except OSError as error:
                raise Refused(f"resize to {envelope.describe()} refused by the kernel: {error}; ask for more memory") from error
            return
        mask = cpu_mask(envelope.cpus)
        for pid in procfs.descendants(shim_pid):
            with contextlib.suppress(OSError):
                limit_memory(envelope, pid)
                os.sched_setaffinity(pid, mask)

    def members(self) -> list[int]:
        """Return the pids in the groups; none for rlimit."""
        found: set[int] = set()
        for folder in dict.fromkeys(self.groups.values()):
            with contextlib.suppress(OSError):
                found.update(int(word) for word in procfs.read_text(f"{folder}/cgroup.procs").split())
        return sorted(found)

    def oom_kills(self) -> int:
        """Return the kernel's own count of processes it killed here for want of memory."""
        if not self.enforced:
            return 0
        name = "memory.oom_control" if self.kind == "v1" else "memory.events"
        return _keyed(f"{self.groups['memory']}/{name}").get("oom_kill", 0)

    def oom_witness(self) -> str:
        """Return the counter and the limit that stand behind an out-of-memory end, in words."""
        folder = self.groups["memory"]
        if self.kind == "v1":
            limit, peak = _number(f"{folder}/memory.limit_in_bytes"), _number(f"{folder}/memory.max_usage_in_bytes")
            name = "cgroup v1 memory.oom_control"
        else:
            limit, peak = _number(f"{folder}/memory.max"), _number(f"{folder}/memory.peak")
            name = "cgroup v2 memory.events"
        return f"{name}: oom_kill {self.oom_kills()}; limit {format_bytes(limit)}, highest charge {show_bytes(peak)}"

    def highest_charge_bytes(self) -> int:
        """Return the kernel's height of all memory charged, page cache included; 0 when it does not say."""
        name = "memory.max_usage_in_bytes" if self.kind == "v1" else "memory.peak"
        return _number(f"{self.groups['memory']}/{name}") if self.enforced else 0

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
            return _keyed(f"{self.groups['cpu']}/cpu.stat").get("usage_usec", 0) / 1e6
        return procfs.waited_cpu_s(shim_pid) + procfs.tree_use(procfs.descendants(shim_pid)).cpu_s

    def stop_forks(self) -> None:
        """Let nothing in the groups start a further process or thread."""
        if self.enforced:
            with contextlib.suppress(OSError):
                _write(f"{self.groups['pids']}/pids.max", 0)

    def kill_members(self, *, timeout_s: float = 10.0) -> int:
        """Kill what is in the groups and wait until nothing is; return how many are left after `timeout_s`."""
        self.stop_forks()
        deadline = time.monotonic() + timeout_s
        while members := self.members():
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return len(members)
            time.sleep(0.002)
        return 0

    def remove(self) -> None:
        """Remove the groups; one that is still busy stays for a later call."""
        for folder in dict.fromkeys(self.groups.values()):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


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


class Confiner:
    """The means of this machine: makes the confinement of each attempt, and says how bounds are held."""

    def __init__(self, kind: str, parents: dict[str, str] | None = None, why: str = "") -> None:
        self.kind = kind
        self._parents = dict(parents or {})
        self._why = why

    def for_attempt(self, name: str) -> Confinement:
        """Return the (not yet made) confinement of one attempt. `name` is a file name."""
        return Confinement(self.kind, {controller: f"{folder}/{name}" for controller, folder in self._parents.items()})

    def bounds(self) -> dict[str, Bound]:
        """Return how each envelope field is held."""
        held: Bound = "advisory" if self.kind == "rlimit" else "exact"
        return {
            "cpus": held,
            "memory_bytes": held,
            "gpus": "advisory",
            "gpu_memory_bytes": "advisory",
            "disk_bytes": "upper",
            "slot_s": "exact",
            "total_s": "exact",
        }

    def describe(self) -> str:
        """Return one sentence on the means."""
        if self.kind == "rlimit":
            why = f" ({self._why})" if self._why else ""
            return f"rlimits and polling{why}: memory per process and by the tree's sum, cpus by affinity; both advisory"
        return f"cgroup {self.kind}: memory, cpu, pids; disk by polling"


def find_confiner(confine: Confine = "auto", *, name: str = "tenure") -> Confiner:
    """Return the strongest means that works here; `confine` may demand one.

    Raises Unsupported when cgroups are demanded and cannot be had.
    """
    if confine == "rlimit":
        return Confiner("rlimit", why="as asked")
    reasons = []
    for find in (_find_v1, _find_v2):
        try:
            return find(name)
        except (OSError, Unavailable) as error:
            reasons.append(_in_words(error))
    why = "; ".join(reasons)
    if confine == "cgroup":
        raise Unsupported("confine", f"no cgroup can be made here ({why})", "Run as root or in a delegated scope.")
    return Confiner("rlimit", why=why)


def _in_words(error: OSError | Unavailable) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{os.path.dirname(str(error.filename))}: {error.strerror}"
    return str(error)


def own_groups(mountinfo: str, membership: str) -> dict[str, str]:
    """Return controller -> our own group's folder, from /proc/self/mountinfo and /proc/self/cgroup (cgroups(7)).

    The unified hierarchy's key is the empty string. Controllers that are not mounted here are left out.
    """
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    found: dict[str, str] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        root, point = fields[3], fields[4]
        names = [""] if kind[0] == "cgroup2" else [word for word in kind[2].split(",") if word in paths]
        for controller in names:
            if controller not in paths:
                continue
            path = paths[controller]
            inner = os.path.relpath(path, root) if path == root or path.startswith(root.rstrip("/") + "/") else "."
            found.setdefault(controller, os.path.normpath(os.path.join(point, inner)))
    return found


def _own() -> dict[str, str]:
    return own_groups(procfs.read_text("/proc/self/mountinfo"), procfs.read_text("/proc/self/cgroup"))


def _find_v1(name: str) -> Confiner:
    own = _own()
    missing = [controller for controller in _V1 if controller not in own]
    if missing:
        raise Unavailable(f"cgroup v1 lacks {', '.join(missing)}")
    _try(Confinement("v1", {controller: f"{own[controller]}/{name}.probe.{os.getpid()}" for controller in _V1}))
    return Confiner("v1", {controller: own[controller] for controller in _V1})


def _find_v2(name: str) -> Confiner:
    own = _own().get("")
    if own is None:
        raise Unavailable("no cgroup v2 is mounted")
    if os.path.basename(own).endswith(f"{name}.agent"):
        own = os.path.dirname(own)  # we are in the leaf that an earlier call made
    available = procfs.read_text(f"{own}/cgroup.controllers").split()
    missing = [controller for controller in _V2 if controller not in available]
    if missing:
        raise Unavailable(f"cgroup v2 {own} lacks {', '.join(missing)}")
    _delegate(own, name)
    _try(Confinement("v2", {controller: f"{own}/{name}.probe.{os.getpid()}" for controller in _V2}))
    return Confiner("v2", dict.fromkeys(_V2, own))


def _delegate(own: str, name: str) -> None:
    """Switch the controllers on for groups below ours, moving ourselves into a leaf when we are alone in it.

    Raises OSError (busy) where others share our group and it is not the root: start in a scope of its own then.
    """
    if set(_V2) <= set(procfs.read_text(f"{own}/cgroup.subtree_control").split()):
        return
    others = [int(word) for word in procfs.read_text(f"{own}/cgroup.procs").split() if int(word) != os.getpid()]
    leaf = f"{own}/{name}.agent"
    if not others:
        os.makedirs(leaf, exist_ok=True)
        _write(f"{leaf}/cgroup.procs", os.getpid())
    _write(f"{own}/cgroup.subtree_control", " ".join(f"+{controller}" for controller in _V2))


def _try(probe: Confinement) -> None:
    """Make a group with limits and remove it, and those of processes that died over theirs. Raises OSError where we may not."""
    for folder in dict.fromkeys(probe.groups.values()):
        parent, name = os.path.split(folder)
        stem = name.rpartition(".")[0]
        for other in os.listdir(parent):
            left, _, pid = other.rpartition(".")
            if left == stem and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{parent}/{other}")
    try:
        probe.make(Envelope(), 16)
    finally:
        probe.remove()
