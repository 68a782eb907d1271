"""How envelopes fit on nodes: free room of a node, and the packing of a gang over many. Not here: whose turn it is.

Best fit: a lease goes to the node that it leaves with the least memory, then the fewest CPUs, ties by name. A gang that
best fit cannot pack is searched for within a stated number of steps, so that "does not fit" is seldom a false word and
never costs more than the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tenure.resources import Capacity, DeviceShare, Envelope, show_bytes

TOLERANCE = 1e-9
"""Cores, and shares of a device, that rounding may overshoot."""
MAX_SEARCH_STEPS = 2_000
MAX_SEARCH_MEMBERS = 64


@dataclass(slots=True)
class Room:
    """What is taken of one node's capacity."""

    capacity: Capacity
    cpus: float
    memory_bytes: int
    disk_bytes: int
    devices: dict[int, tuple[float, int]]
    """Device index -> share taken, device memory taken."""

    def copy(self) -> Room:
        """Return a room that can be filled without touching this one."""
        return Room(self.capacity, self.cpus, self.memory_bytes, self.disk_bytes, dict(self.devices))

    def take(self, envelope: Envelope, devices: Iterable[DeviceShare]) -> None:
        """Count an envelope as held here, without checking."""
        self.cpus += envelope.cpus
        self.memory_bytes += envelope.memory_bytes
        self.disk_bytes += envelope.disk_bytes
        for share in devices:
            fraction, memory_bytes = self.devices.get(share.index, (0.0, 0))
            self.devices[share.index] = (fraction + share.fraction, memory_bytes + share.memory_bytes)

    def give(self, envelope: Envelope, devices: Iterable[DeviceShare]) -> None:
        """Count an envelope that is held here as held no longer."""
        self.cpus -= envelope.cpus
        self.memory_bytes -= envelope.memory_bytes
        self.disk_bytes -= envelope.disk_bytes
        for share in devices:
            fraction, memory_bytes = self.devices[share.index]
            fraction, memory_bytes = fraction - share.fraction, memory_bytes - share.memory_bytes
            self.devices[share.index] = (fraction, memory_bytes) if fraction > TOLERANCE else (0.0, memory_bytes)


def room_with(capacity: Capacity, held: Iterable[tuple[Envelope, tuple[DeviceShare, ...]]]) -> Room:
    """Return a node's room with these leases in it. The sums do not depend on the order of `held`."""
    held = list(held)
    devices: dict[int, tuple[float, int]] = {}
    shares = [share for _, part in held for share in part]
    for index in sorted({share.index for share in shares}):
        here = [share for share in shares if share.index == index]
        devices[index] = (math.fsum(s.fraction for s in here), sum(s.memory_bytes for s in here))
    return Room(
        capacity=capacity,
        cpus=math.fsum(envelope.cpus for envelope, _ in held),
        memory_bytes=sum(envelope.memory_bytes for envelope, _ in held),
        disk_bytes=sum(envelope.disk_bytes for envelope, _ in held),
        devices=devices,
    )


def shortage(room: Room, envelope: Envelope, *, word: str = "free") -> str:
    """Return "" when the envelope fits, else what is short: ``needs 24.0 GiB of memory; node has 16.0 GiB free``.

    A capacity with `disk_bytes` 0 states no disk, and bounds none.
    """
    if fits_beside_devices(room, envelope) and (not envelope.gpus or choose_devices(room, envelope) is not None):
        return ""
    capacity, found = room.capacity, f" {word}" if word else ""
    free_cpus = max(0.0, capacity.cpus - room.cpus)
    if envelope.cpus > capacity.cpus - room.cpus + TOLERANCE:
        return f"needs {envelope.cpus:g} cpus; node has {free_cpus:.4g}{found}"
    free_bytes = capacity.memory_bytes - room.memory_bytes
    if envelope.memory_bytes > free_bytes:
        return f"needs {show_bytes(envelope.memory_bytes)} of memory; node has {show_bytes(max(0, free_bytes))}{found}"
    free_disk_bytes = capacity.disk_bytes - room.disk_bytes
    if capacity.disk_bytes and envelope.disk_bytes > free_disk_bytes:
        return f"needs {show_bytes(envelope.disk_bytes)} of disk; node has {show_bytes(max(0, free_disk_bytes))}{found}"
    return _gpu_shortage(room, envelope, found)


def fits_beside_devices(room: Room, envelope: Envelope) -> bool:
    """Return whether CPUs, memory and disk are there; devices are not looked at."""
    capacity = room.capacity
    return (
        envelope.cpus <= capacity.cpus - room.cpus + TOLERANCE
        and envelope.memory_bytes <= capacity.memory_bytes - room.memory_bytes
        and (not capacity.disk_bytes or envelope.disk_bytes <= capacity.disk_bytes - room.disk_bytes)
    )


def choose_devices(room: Room, envelope: Envelope) -> tuple[DeviceShare, ...] | None:
    """Return the device shares that the envelope would get, () without GPUs, None when no device will do.

    A fraction goes to the one device it leaves fullest, and to no instance of a divided device; whole devices, and instances,
    must be entirely free and are taken with all their memory. Shares on different devices are never added up.
    """
    if not envelope.gpus:
        return ()
    if envelope.gpus < 1:
        return _choose_fraction(room, envelope)
    count = round(envelope.gpus)
    free = [
        gpu
        for gpu in sorted(room.capacity.gpus, key=lambda gpu: (gpu.memory_bytes, gpu.index))
        if gpu.memory_bytes >= envelope.gpu_memory_bytes and room.devices.get(gpu.index, (0.0, 0)) == (0.0, 0)
    ]
    if len(free) < count:
        return None
    return tuple(DeviceShare(index=gpu.index, fraction=1.0, memory_bytes=gpu.memory_bytes) for gpu in free[:count])


def _choose_fraction(room: Room, envelope: Envelope) -> tuple[DeviceShare, ...] | None:
    fitting = []
    for gpu in room.capacity.gpus:
        fraction, memory_bytes = room.devices.get(gpu.index, (0.0, 0))
        left_bytes = gpu.memory_bytes - memory_bytes - envelope.gpu_memory_bytes
        if fraction + envelope.gpus <= 1 + TOLERANCE and left_bytes >= 0 and not gpu.instance:
            fitting.append((-fraction, left_bytes, gpu.index))
    if not fitting:
        return None
    return (DeviceShare(index=min(fitting)[2], fraction=envelope.gpus, memory_bytes=envelope.gpu_memory_bytes),)


def _gpu_shortage(room: Room, envelope: Envelope, found: str) -> str:
    need = f"needs {envelope.gpus:g} of one gpu" if envelope.gpus < 1 else f"needs {envelope.gpus:g} whole gpus"
    if envelope.gpu_memory_bytes:
        need += f" with {show_bytes(envelope.gpu_memory_bytes)}" + (" each" if envelope.gpus > 1 else "")
    if not room.capacity.gpus:
        return f"{need}; node has none"
    devices = []
    for gpu in room.capacity.gpus:
        fraction, memory_bytes = room.devices.get(gpu.index, (0.0, 0))
        whole = ", an instance, leased whole" if gpu.instance else ""
        devices.append(
            f"gpu {gpu.index}: {max(0.0, 1 - fraction):.3g} with {show_bytes(gpu.memory_bytes - memory_bytes)}{found}{whole}"
        )
    return f"{need}; node has {', '.join(devices)}"


Packing = tuple[tuple[str, tuple[DeviceShare, ...]], ...]
"""Node and device shares, one per envelope, in the order of the envelopes."""


def pack(envelopes: Sequence[Envelope], rooms: Mapping[str, Room]) -> tuple[Packing | None, bool]:
    """Return where each envelope goes, or None; and whether None is certain (else only not found within the search bound).

    rooms: by node; left as they were. Largest memory first; equal envelopes need no search, since how many of them a
    node takes does not depend on the others.
    """
    order = sorted(range(len(envelopes)), key=lambda i: (-envelopes[i].gpus, -envelopes[i].memory_bytes, -envelopes[i].cpus, i))
    scratch = {name: room.copy() for name, room in rooms.items()}
    placed: dict[int, tuple[str, tuple[DeviceShare, ...]]] = {}
    for i in order:
        choices = _choices(envelopes[i], scratch)
        if not choices:
            break
        placed[i] = choices[0]
        scratch[choices[0][0]].take(envelopes[i], choices[0][1])
    if len(placed) == len(envelopes):
        return tuple(placed[i] for i in range(len(envelopes))), True
    if len({size(envelope) for envelope in envelopes}) == 1:
        return None, True
    if len(envelopes) > MAX_SEARCH_MEMBERS:
        return None, False
    found: dict[int, tuple[str, tuple[DeviceShare, ...]]] = {}
    steps = _search(envelopes, order, 0, {name: room.copy() for name, room in rooms.items()}, found, MAX_SEARCH_STEPS)
    if len(found) == len(envelopes):
        return tuple(found[i] for i in range(len(envelopes))), True
    return None, steps > 0


def size(envelope: Envelope) -> tuple[float, ...]:
    """Return what of an envelope a node must have room for: two of the same size fit in the same places."""
    return (envelope.cpus, envelope.memory_bytes, envelope.gpus, envelope.gpu_memory_bytes, envelope.disk_bytes)


def _choices(envelope: Envelope, rooms: Mapping[str, Room]) -> list[tuple[str, tuple[DeviceShare, ...]]]:
    fitting = []
    for name, room in rooms.items():
        if not fits_beside_devices(room, envelope) or (devices := choose_devices(room, envelope)) is None:
            continue
        left_bytes = room.capacity.memory_bytes - room.memory_bytes - envelope.memory_bytes
        left_cpus = room.capacity.cpus - room.cpus - envelope.cpus
        fitting.append((left_bytes, left_cpus, name, devices))
    return [(name, devices) for _, _, name, devices in sorted(fitting, key=lambda choice: choice[:3])]


def _search(
    envelopes: Sequence[Envelope],
    order: Sequence[int],
    depth: int,
    rooms: dict[str, Room],
    found: dict[int, tuple[str, tuple[DeviceShare, ...]]],
    steps: int,
) -> int:
    """Fill `found` depth first; return the steps left (0: the bound was hit)."""
    if depth == len(order):
        return steps
    i = order[depth]
    for name, devices in _choices(envelopes[i], rooms):
        if steps <= 0:
            return 0
        before = rooms[name]
        rooms[name] = before.copy()
        rooms[name].take(envelopes[i], devices)
        found[i] = (name, devices)
        steps = _search(envelopes, order, depth + 1, rooms, found, steps - 1)
        rooms[name] = before
        if len(found) == len(order):
            return steps
        del found[i]
    return steps
