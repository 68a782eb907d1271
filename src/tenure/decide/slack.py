"""What is free while one plan is made: leases are placed in it, and taken out of it, and all is undone at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tenure.leases import Lease
from tenure.resources import DeviceShare, Envelope

from .packing import TOLERANCE, Packing, Room, fits_beside_devices, pack
from .queueing import Amounts

if TYPE_CHECKING:
    from .rooms import Rooms


class Slack:
    """Room on the nodes that are up. Made from the fold's own state, which is as it was again after `undo`."""

    def __init__(self, fast: Rooms | None, rooms: Callable[[], dict[str, Room]]) -> None:
        """fast: the state that knows which node suits a GPU lease, if there is one; rooms: makes copies of the nodes' rooms."""
        self._fast, self._make_rooms = fast, rooms
        self._rooms: dict[str, Room] = {}
        self._log: list[tuple[str, Envelope, tuple[DeviceShare, ...], int]] = []

    @property
    def rooms(self) -> dict[str, Room]:
        """The nodes' rooms with all that was done to them."""
        if not self._rooms:
            self._rooms = self._make_rooms()
            for node, envelope, devices, sign in self._log:
                (self._rooms[node].take if sign > 0 else self._rooms[node].give)(envelope, devices)
        return self._rooms

    def pack(self, envelopes: Sequence[Envelope]) -> Packing | None:
        """Return where a gang would go, or None. Changes nothing."""
        packing = None if self._fast is None else self._fast.choose_all(envelopes)
        return pack(envelopes, self.rooms)[0] if packing is None else packing

    def take(self, node: str, envelope: Envelope, devices: tuple[DeviceShare, ...]) -> None:
        """Count an envelope as held on a node."""
        self._change(node, envelope, devices, 1)

    def give(self, node: str, envelope: Envelope, devices: tuple[DeviceShare, ...]) -> None:
        """Count an envelope that is held as held no longer."""
        self._change(node, envelope, devices, -1)

    def take_again(self, leases: Sequence[Lease]) -> bool:
        """Count a gang that was given back as held where it is, on the devices it has; return False when that is not free."""
        for number, lease in enumerate(leases):
            if not self._is_free(lease):
                for taken in leases[:number]:
                    self.give(taken.node, taken.envelope, taken.devices)
                return False
            self.take(lease.node, lease.envelope, lease.devices)
        return True

    def _is_free(self, lease: Lease) -> bool:
        room = self.rooms[lease.node]
        memory = {gpu.index: gpu.memory_bytes for gpu in room.capacity.gpus}
        for share in lease.devices:
            fraction, memory_bytes = room.devices.get(share.index, (0.0, 0))
            if fraction + share.fraction > 1 + TOLERANCE or memory_bytes + share.memory_bytes > memory.get(share.index, 0):
                return False
        return fits_beside_devices(room, lease.envelope)

    def left(self) -> Amounts:
        """Return what is free on all nodes together."""
        free = [0, 0, 0]
        for room in self.rooms.values():
            shares = sum(fraction for fraction, _ in room.devices.values())
            free[0] += round((room.capacity.cpus - room.cpus) * 1e6)
            free[1] += room.capacity.memory_bytes - room.memory_bytes
            free[2] += round((len(room.capacity.gpus) - shares) * 1e6)
        return free[0], free[1], free[2]

    def undo(self) -> None:
        """Leave the fold's own state as it was."""
        if self._fast is not None:
            for node, envelope, devices, sign in reversed(self._log):
                (self._fast.give if sign > 0 else self._fast.take)(node, envelope, devices)

    def _change(self, node: str, envelope: Envelope, devices: tuple[DeviceShare, ...], sign: int) -> None:
        if self._fast is not None:
            (self._fast.take if sign > 0 else self._fast.give)(node, envelope, devices)
        self._log.append((node, envelope, devices, sign))
        if self._rooms:
            (self._rooms[node].take if sign > 0 else self._rooms[node].give)(envelope, devices)
