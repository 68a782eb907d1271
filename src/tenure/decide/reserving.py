"""Reservations: room that is promised from a later moment on, and what may be granted or renewed beside it.

    time ─►   now        20:00            23:00
    node a    [── held ──]
              [─ asked? ─────]                      runs into the reservation: not here, or not for so long
                         [═══ reserved ═══]

A reservation is placed when it is asked for, on the node that it will begin on, beside what is held past its beginning and what
else is reserved. From then on nothing is granted or renewed there for so long that it would take that room. Pure, and nothing
here is kept: all follows from the leases. Not here: whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tenure.jobs import Command
from tenure.leases import Lease, LeaseState
from tenure.resources import Capacity, DeviceShare, Envelope

from .packing import TOLERANCE, Packing, Room, pack, room_with


@dataclass(frozen=True, slots=True)
class Span:
    """Room of a node that is taken from one moment (UTC seconds) until another."""

    begin_s: float
    end_s: float
    envelope: Envelope
    devices: tuple[DeviceShare, ...] = ()


class Asked(Protocol):
    """A lease, or the wish for one."""

    @property
    def envelope(self) -> Envelope:
        """What it takes."""
        ...

    @property
    def command(self) -> Command:
        """What runs inside."""
        ...


def reach_s(asked: Asked) -> float:
    """Return how long a lease that begins may hold without anybody's leave: a slot; one that waits for events, all it has."""
    return asked.envelope.total_s if asked.command.on_event else asked.envelope.slot_s


def held_span(lease: Lease, now_s: float) -> Span:
    """Return what a lease that holds takes. One whose time is over holds until it has left: counted for another second."""
    end_s = lease.total_ends_at_s if lease.command.on_event else lease.ends_at_s
    return Span(float("-inf"), max(end_s, now_s + 1.0), lease.envelope, lease.devices)


def reserved_span(lease: Lease, now_s: float) -> Span:
    """Return what a reservation takes, on the node that it names; the whole time from now on when it is to begin now."""
    begin_s = max(lease.starts_at_s, now_s)
    return Span(begin_s, begin_s + reach_s(lease), lease.envelope, lease.devices)


def peak_room(capacity: Capacity, spans: Iterable[Span], begin_s: float, end_s: float) -> Room:
    """Return a node's room at its fullest between two moments, each quantity for itself: what fits beside it always fits."""
    over = [span for span in spans if span.begin_s < end_s and span.end_s > begin_s]
    moments = {begin_s, *(span.begin_s for span in over if span.begin_s > begin_s)}
    rooms = [
        room_with(capacity, [(span.envelope, span.devices) for span in over if span.begin_s <= moment < span.end_s])
        for moment in sorted(moments)
    ]
    devices: dict[int, tuple[float, int]] = {}
    for room in rooms:
        for index, (fraction, memory_bytes) in room.devices.items():
            known = devices.get(index, (0.0, 0))
            devices[index] = (max(known[0], fraction), max(known[1], memory_bytes))
    return Room(
        capacity=capacity,
        cpus=max(room.cpus for room in rooms),
        memory_bytes=max(room.memory_bytes for room in rooms),
        disk_bytes=max(room.disk_bytes for room in rooms),
        devices=devices,
    )


def is_over(room: Room) -> bool:
    """Return whether more is taken of a node than there is."""
    capacity, memory = room.capacity, {gpu.index: gpu.memory_bytes for gpu in room.capacity.gpus}
    return (
        room.cpus > capacity.cpus + TOLERANCE
        or room.memory_bytes > capacity.memory_bytes
        or bool(capacity.disk_bytes and room.disk_bytes > capacity.disk_bytes)
        or any(fraction > 1 + TOLERANCE or used > memory.get(index, 0) for index, (fraction, used) in room.devices.items())
    )


class Ahead:
    """The nodes that are up, as they will be. Made for one decision."""

    def __init__(
        self,
        capacities: Mapping[str, Capacity],
        held: Mapping[str, Mapping[str, Lease]],
        waiting: Iterable[Lease],
        now_s: float,
    ) -> None:
        """held: node -> lease id -> lease. waiting: of it reservations are taken in, also one whose time has come."""
        self._capacities, self._held, self._now_s = capacities, held, now_s
        self._reserved: dict[str, list[Lease]] = {}
        for lease in waiting:
            if lease.state is LeaseState.RESERVED and lease.node in capacities:
                self._reserved.setdefault(lease.node, []).append(lease)
        self._granted: dict[str, list[Span]] = {}

    def first_s(self) -> float:
        """Return when the first reservation begins; infinite without one."""
        return min((lease.starts_at_s for leases in self._reserved.values() for lease in leases), default=float("inf"))

    def place(self, envelopes: Sequence[Envelope], begin_s: float, for_s: float) -> Packing | None:
        """Return where these have room from a moment on for so long, beside all that is held and reserved; None: nowhere."""
        return pack(envelopes, self.rooms(begin_s, for_s))[0]

    def rooms(self, begin_s: float, for_s: float) -> dict[str, Room]:
        """Return each node at its fullest from a moment on."""
        return {
            name: peak_room(capacity, self._spans(name), begin_s, begin_s + for_s)
            for name, capacity in self._capacities.items()
        }

    def take(self, node: str, envelope: Envelope, devices: tuple[DeviceShare, ...], for_s: float) -> None:
        """Count something as granted now."""
        self._granted.setdefault(node, []).append(Span(self._now_s, self._now_s + for_s, envelope, devices))

    def limit(self, lease: Lease) -> tuple[float, Lease | None]:
        """Return until when a lease that holds may go on where it is, and the reservation that needs the room then.

        (infinite, None) when none does.
        """
        capacity = self._capacities.get(lease.node)
        if capacity is None:
            return float("inf"), None
        spans = self._spans(lease.node, but=lease.id)
        for reserved in sorted(self._reserved.get(lease.node, ()), key=lambda other: (other.starts_at_s, other.id)):
            room = peak_room(capacity, spans, reserved.starts_at_s, reserved.starts_at_s + TOLERANCE)
            room.take(lease.envelope, lease.devices)
            if is_over(room):
                return reserved.starts_at_s, reserved
        return float("inf"), None

    def _spans(self, node: str, *, but: str = "") -> list[Span]:
        held = [held_span(lease, self._now_s) for key, lease in self._held.get(node, {}).items() if key != but]
        reserved = [reserved_span(lease, self._now_s) for lease in self._reserved.get(node, ()) if lease.id != but]
        return [*held, *reserved, *self._granted.get(node, ())]


def is_ahead(lease: Lease, now_s: float) -> bool:
    """Return whether a lease is a reservation whose time has not come."""
    return lease.state is LeaseState.RESERVED and lease.starts_at_s > now_s
