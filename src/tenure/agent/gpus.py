"""A node's GPUs at its agent: which of its leases uses which device, how much, and who takes more than theirs.

The fallback where nothing else holds a part of a device, and the guard where something does: a lease is ended when its
programs hold more device memory than theirs, use a device that is not theirs, or go around MPS where they are to go through.
Twice in a row, since a list of processes and a list of clients are not of the same moment. A process is of a lease when the
lease's runtime says so; the driver's numbers are the machine's, so an agent in a pid namespace of its own sees nobody.
Not for: the devices' whole (`meter.sample`), how a lease is ended (its runtime).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tenure.errors import Refused, TenureError, Unavailable
from tenure.meter.nvml import GpuProcess, Nvml, find_mps_control
from tenure.protocols import ExitKind, RuntimeHandle
from tenure.resources import Gpu, show_bytes
from tenure.runtimes import procfs
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.mps import Mps
from tenure.runtimes.several import Runtimes
from tenure.usage import Usage

LOOKS = 2
"""So many looks in a row must find the same before a lease is ended for it."""
CONTEXT_BYTES = 256 << 20
"""How far the driver's count may lie above MPS's, which holds the bound: only more than that is an overrun. Seen on an H200
with driver 580: allocations up to a bound of 2048 MiB ended where the driver counted 2002 MiB, the context among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A lease that runs: which processes are its own, and what it may use."""

    handle: RuntimeHandle
    pids: frozenset[int]
    uuids: tuple[str, ...] = ()
    memory_bytes: int = 0
    """Of each device."""
    mps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One device at one moment."""

    uuid: str
    processes: tuple[GpuProcess, ...] = ()
    clients: frozenset[int] | None = None
    """Pids that go through MPS; None when nobody can say."""
    busy: float | None = None
    busy_by_process: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """What one lease uses of its devices."""

    busy: float = 0.0
    """0..1, mean over its devices. Where the driver does not tell programs apart, what all of them together are."""
    memory_bytes: int = 0
    """Of all its devices together."""

    def added_to(self, usage: Usage) -> Usage:
        """Return a usage with this in it."""
        return replace(usage, gpu_busy=self.busy, gpu_memory_bytes=self.memory_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrun:
    """A lease that took more than its own."""

    handle: RuntimeHandle
    kind: ExitKind
    witness: str


def used(holder: Holder, readings: Sequence[Reading], strangers: Mapping[str, float] | None = None) -> GpuUse:
    """Return what a lease uses. strangers: by device, how busy processes of no lease keep it, such as a server of MPS."""
    mine = [reading for reading in readings if reading.uuid in holder.uuids]
    memory = sum(each.memory_bytes for reading in mine for each in reading.processes if each.pid in holder.pids)
    shares = [_busy(holder, reading, (strangers or {}).get(reading.uuid, 0.0)) for reading in mine]
    return GpuUse(busy=sum(shares) / len(shares) if shares else 0.0, memory_bytes=memory)


def _busy(holder: Holder, reading: Reading, strangers: float) -> float:
    if not any(each.pid in holder.pids for each in reading.processes):
        return 0.0
    if reading.busy_by_process is None or (reading.busy and not reading.busy_by_process):
        return 1.0 if reading.busy is None else reading.busy  # who may be at work is never called idle
    own = sum(share for pid, share in reading.busy_by_process.items() if pid in holder.pids)
    return min(1.0, own + (strangers if holder.mps else 0.0))


def overrun(holder: Holder, readings: Sequence[Reading]) -> Overrun | None:
    """Return what a lease takes that is not its own, None when it keeps to it."""
    for reading in readings:
        own = [each for each in reading.processes if each.pid in holder.pids]
        if not own:
            continue
        pids = ", ".join(str(each.pid) for each in own)
        if reading.uuid not in holder.uuids:
            what = f"device {reading.uuid} is not its own, but its process {pids} uses it"
            return Overrun(handle=holder.handle, kind=ExitKind.FAILED, witness=f"NVML: {what}")
        held = sum(each.memory_bytes for each in own)
        if held > holder.memory_bytes + (CONTEXT_BYTES if holder.mps else 0):
            what = f"its processes ({pids}) hold {held} bytes of device {reading.uuid}; bound {holder.memory_bytes} bytes"
            why = f"NVML: {what} ({show_bytes(held)} of {show_bytes(holder.memory_bytes)})"
            return Overrun(handle=holder.handle, kind=ExitKind.OUT_OF_MEMORY, witness=why)
        around = [each.pid for each in own if not each.through_mps and each.pid not in (reading.clients or ())]
        if holder.mps and around and reading.clients is not None:
            what = f"its process {around[0]} uses device {reading.uuid} around MPS, which holds its part of it"
            return Overrun(handle=holder.handle, kind=ExitKind.FAILED, witness=f"NVML and MPS: {what}")
    return None


@dataclass(slots=True)
class GpuWatch:
    """Looks at a node's devices. One at a time."""

    nvml: Nvml
    uuids: tuple[str, ...]
    mps: Mps | None = None
    _suspects: dict[tuple[str, int, ExitKind], int] = field(default_factory=dict)

    def processes(self) -> dict[str, tuple[GpuProcess, ...]]:
        """Return device -> who has a context there, of those where somebody has and that answer."""
        found = {}
        for uuid in self.uuids:
            with contextlib.suppress(Unavailable):  # one that does not answer now is asked again
                if processes := self.nvml.processes(uuid):
                    found[uuid] = processes
        return found

    def look(
        self, holders: Sequence[Holder], processes: Mapping[str, tuple[GpuProcess, ...]] | None = None
    ) -> tuple[dict[str, GpuUse], list[Overrun]]:
        """Return lease -> what it uses, of all that have devices, and those that are to be ended.

        processes: as just looked at; None: looked at now.
        """
        through_mps = frozenset[int]().union(*(holder.pids for holder in holders if holder.mps))
        readings = self._read(self.processes() if processes is None else processes, through_mps)
        everybody = frozenset[int]().union(*(holder.pids for holder in holders))
        strangers = {
            reading.uuid: sum(share for pid, share in (reading.busy_by_process or {}).items() if pid not in everybody)
            for reading in readings
        }
        uses = {holder.handle.lease_id: used(holder, readings, strangers) for holder in holders if holder.uuids}
        found = [over for holder in holders if (over := overrun(holder, readings)) is not None]
        now = {(over.handle.lease_id, over.handle.attempt, over.kind): over for over in found}
        self._suspects = {key: self._suspects.get(key, 0) + 1 for key in now}
        return uses, [over for key, over in now.items() if self._suspects[key] >= LOOKS]

    def _read(self, processes: Mapping[str, tuple[GpuProcess, ...]], through_mps: frozenset[int]) -> list[Reading]:
        """through_mps: who is to go through it. Its daemon is asked only where the driver does not say that they do."""
        found = []
        for uuid, seen in processes.items():
            unsure = any(each.pid in through_mps and not each.through_mps for each in seen)
            found.append(
                Reading(
                    uuid=uuid,
                    processes=seen,
                    clients=self.mps.clients(uuid) if self.mps is not None and unsure else None,
                    busy=self.nvml.busy(uuid),
                    busy_by_process=self.nvml.busy_by_process(uuid),
                )
            )
        return found


def declare(real: Sequence[Gpu], count: int | None, *, model: str, memory_bytes: int) -> tuple[Gpu, ...]:
    """Return the devices that a machine without any is said to have; none where it has some, or nothing was said.

    Raises Refused where a machine's own devices are given another model or memory than they have.
    """
    if real:
        if model or memory_bytes:
            names = ", ".join(sorted({gpu.model for gpu in real}))
            raise Refused(
                f"a model and memory can only be declared for a machine without GPUs; this one has {len(real)} ({names}). "
                "Say how many of them to offer, no more."
            )
        return ()
    return tuple(Gpu(index=i, model=model, memory_bytes=memory_bytes, parts="declared") for i in range(count or 0))


def node_gpus(gpus: Sequence[Gpu], state_dir: Path) -> tuple[Gpus, GpuWatch | None]:
    """Return a node's devices as its runtimes hand them out, and who looks at them; nobody where there is nothing to see."""
    if not any(gpu.uuid for gpu in gpus):
        return Gpus(gpus), None
    try:
        nvml = Nvml()
    except Unavailable:  # it answered when the devices were listed
        return Gpus(gpus, watched=False), None
    program = find_mps_control()
    mps = Mps(mps_folder(state_dir), program=program) if program else None
    return Gpus(gpus, mps=mps), GpuWatch(nvml, tuple(gpu.uuid for gpu in gpus), mps=mps)


def mps_folder(state_dir: Path) -> Path:
    """Return where the sockets of a node's MPS daemons lie: short, the same each time, open to other users' jobs for root's."""
    name = f"tenure-mps-{hashlib.sha256(str(state_dir).encode()).hexdigest()[:10]}"
    return (Path("/run") if os.geteuid() == 0 and os.access("/run", os.W_OK) else Path(tempfile.gettempdir())) / name


class GpuGuard:
    """Has a node's leases looked at about once a second, and ended when they take more than theirs.

    In a thread of its own: a driver that hangs keeps nobody else waiting, and the agent's end neither.
    """

    def __init__(self, runtimes: Runtimes, watch: GpuWatch, *, every_s: float = 1.0) -> None:
        self._runtimes, self._watch, self._every_s = runtimes, watch, every_s
        self._handles: tuple[RuntimeHandle, ...] = ()
        self._uses: dict[str, GpuUse] = {}
        self._strangers: dict[int, int] = {}
        """Processes on the devices that are of none of the attempts looked at, with their start ticks."""
        self._looked_at: tuple[RuntimeHandle, ...] = ()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more. A look that hangs is left behind."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def watch(self, handles: Sequence[RuntimeHandle]) -> None:
        """Say which attempts run."""
        self._handles = tuple(handles)

    def with_use(self, handle: RuntimeHandle, usage: Usage | None) -> Usage | None:
        """Return an attempt's usage with what its devices were last seen to do for it."""
        use = self._uses.get(handle.lease_id)
        return usage if use is None or usage is None else use.added_to(usage)

    def look(self) -> None:
        """Look once."""
        processes = self._watch.processes()
        holders = self._holders({each.pid for seen in processes.values() for each in seen})
        self._uses, overruns = self._watch.look(holders, processes)
        for over in overruns:
            with contextlib.suppress(TenureError):  # it has just ended by itself
                fence = self._runtimes.newest_fence(over.handle.lease_id)
                self._runtimes.stop(over.handle, grace_s=0.0, fence=fence, kind=over.kind, why=over.witness)

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            with contextlib.suppress(TenureError, OSError):
                self.look()

    def _holders(self, pids: set[int]) -> list[Holder]:
        """Return the leases with devices, and, when a process there is of none of them, all others too. pids: on the devices.

        Which processes a lease has costs a walk through them: not made for leases that nothing points to.
        """
        if not pids:
            return []
        if self._handles != self._looked_at:  # who was nobody's may be a newcomer's
            self._looked_at, self._strangers = self._handles, {}
        gpus = {handle: self._gpu(handle) for handle in self._looked_at}
        holders = [self._holder(handle, gpu) for handle, gpu in gpus.items() if gpu.get("uuids")]
        known = {pid for pid in pids if pid in self._strangers and procfs.start_ticks(pid) == self._strangers[pid]}
        unknown = pids.difference(known, *(holder.pids for holder in holders))
        if unknown:
            holders += [self._holder(handle, gpu) for handle, gpu in gpus.items() if not gpu.get("uuids")]
            known |= unknown.difference(*(holder.pids for holder in holders))
        self._strangers = {pid: procfs.start_ticks(pid) for pid in known}
        return holders

    def _gpu(self, handle: RuntimeHandle) -> Mapping[str, Any]:
        try:
            return self._runtimes.gpu(handle.lease_id)
        except TenureError:
            return {}  # forgotten meanwhile

    def _holder(self, handle: RuntimeHandle, gpu: Mapping[str, Any]) -> Holder:
        try:
            pids = self._runtimes.pids(handle)
        except TenureError:
            pids = frozenset()
        return Holder(
            handle=handle,
            pids=pids,
            uuids=tuple(gpu.get("uuids", ())),
            memory_bytes=int(gpu.get("memory_bytes", 0)),
            mps=bool(gpu.get("mps")),
        )
