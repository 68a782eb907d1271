"""A lease moves at its renewal when that makes stranded room usable, and seldom enough."""

from __future__ import annotations

from tenure.decide.mix import Mix
from tenure.decide.moves import MAX_SHARE, moved
from tenure.decide.rooms import Rooms
from tenure.decide.shapes import Shape
from tenure.resources import Capacity, DeviceShare, Envelope, Gpu

GIB = 1 << 30
NODE = Capacity(cpus=8.0, memory_bytes=16 * GIB, gpus=(Gpu(index=0, model="A"),))
HALF = Envelope(cpus=1.0, memory_bytes=GIB, gpus=0.5, disk_bytes=0)
ON_DEVICE = (DeviceShare(index=0, fraction=0.5),)
ENOUGH = round(1 / MAX_SHARE) + 1


def two_halves():
    """Each of two nodes has half a device held, and only whole devices are asked for."""
    rooms = Rooms({"a": NODE, "b": NODE}, Mix({Shape(1.0, GIB, 1.0): 1}))
    for node in "ab":
        rooms.take(node, HALF, ON_DEVICE)
    return rooms


def test_two_half_used_devices_become_one_whole_free_one():
    rooms = two_halves()
    before = rooms.snapshot()
    assert moved(rooms, "b", HALF, ON_DEVICE, moves=0, admitted=ENOUGH) == ("a", ON_DEVICE)
    assert rooms.snapshot() == before


def test_a_lease_stays_where_nothing_is_gained_or_the_gain_is_below_the_least():
    rooms = two_halves()
    rooms.give("b", HALF, ON_DEVICE)
    assert moved(rooms, "a", HALF, ON_DEVICE, moves=0, admitted=ENOUGH) is None
    assert moved(two_halves(), "b", HALF, ON_DEVICE, moves=0, admitted=ENOUGH, least_gain=9.0) is None


def test_moves_never_pass_their_share_of_the_leases():
    assert moved(two_halves(), "b", HALF, ON_DEVICE, moves=0, admitted=ENOUGH - 2) is None
    assert moved(two_halves(), "b", HALF, ON_DEVICE, moves=1, admitted=ENOUGH) is None
    assert moved(two_halves(), "b", HALF, ON_DEVICE, moves=1, admitted=2 * ENOUGH) is not None
