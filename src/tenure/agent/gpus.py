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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tenure.errors import Refused, TenureError, Unavailable
from tenure.meter.nvml import GpuProcess, Nvml, find_mps_control
from tenure.protocols import ExitKind, RuntimeHandle
from tenure.resources import Gpu, show_bytes
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

    def look(self, holders: Sequence[Holder]) -> tuple[dict[str, GpuUse], list[Overrun]]:
        """Return lease -> what it uses, of all that have devices, and those that are to be ended."""
        through_mps = frozenset[int]().union(*(holder.pids for holder in holders if holder.mps))
        readings = self._read(through_mps)
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

    def _read(self, through_mps: frozenset[int]) -> list[Reading]:
        """through_mps: who is to go through it. Its daemon is asked only where the driver does not say that they do."""
        found = []
        for uuid in self.uuids:
            try:
                processes = self.nvml.processes(uuid)
            except Unavailable:
                continue  # one that does not answer now is asked again
            if not processes:
                continue
            unsure = any(each.pid in through_mps and not each.through_mps for each in processes)
            found.append(
                Reading(
                    uuid=uuid,
                    processes=processes,
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


@contextlib.contextmanager
def node_gpus(gpus: Sequence[Gpu], state_dir: Path) -> Iterator[tuple[Gpus, GpuWatch | None]]:
    """Give a node's devices as its runtimes hand them out, and who looks at them; nobody where there is nothing to look at."""
    if not any(gpu.uuid for gpu in gpus):
        yield Gpus(gpus), None
        return
    try:
        nvml = Nvml()
    except Unavailable:  # it answered when the devices were listed
        yield Gpus(gpus, watched=False), None
        return
    try:
        program = find_mps_control()
        mps = Mps(mps_folder(state_dir), program=program) if program else None
        yield Gpus(gpus, mps=mps), GpuWatch(nvml, tuple(gpu.uuid for gpu in gpus), mps=mps)
    finally:
        nvml.close()


def mps_folder(state_dir: Path) -> Path:
    """Return where the sockets of a node's MPS daemons lie: short, the same each time, open to other users' jobs for root's."""
    name = f"tenure-mps-{hashlib.sha256(str(state_dir).encode()).hexdigest()[:10]}"
    return (Path("/run") if os.geteuid() == 0 and os.access("/run", os.W_OK) else Path(tempfile.gettempdir())) / name


class GpuGuard:
    """Has a node's leases looked at, and ended when they take more than theirs. One call at a time."""

    def __init__(self, runtimes: Runtimes, watch: GpuWatch) -> None:
        self._runtimes, self._watch = runtimes, watch
        self._uses: dict[str, GpuUse] = {}

    def look(self, handles: Sequence[RuntimeHandle]) -> None:
        """Look once at attempts that run."""
        holders = [found for handle in handles if (found := self._holder(handle)) is not None]
        self._uses, overruns = self._watch.look(holders)
        for over in overruns:
            with contextlib.suppress(TenureError):  # it has just ended by itself
                fence = self._runtimes.newest_fence(over.handle.lease_id)
                self._runtimes.stop(over.handle, grace_s=0.0, fence=fence, kind=over.kind, why=over.witness)

    def with_use(self, handle: RuntimeHandle, usage: Usage | None) -> Usage | None:
        """Return an attempt's usage with what its devices were last seen to do for it."""
        use = self._uses.get(handle.lease_id)
        return usage if use is None or usage is None else use.added_to(usage)

    def _holder(self, handle: RuntimeHandle) -> Holder | None:
        try:
            gpu, pids = self._runtimes.gpu(handle.lease_id), self._runtimes.pids(handle)
        except TenureError:
            return None  # forgotten meanwhile
        return Holder(
            handle=handle,
            pids=pids,
            uuids=tuple(gpu.get("uuids", ())),
            memory_bytes=int(gpu.get("memory_bytes", 0)),
            mps=bool(gpu.get("mps")),
        )
