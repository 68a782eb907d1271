"""Leases whose use speaks for another envelope: told, or resized where their holder agreed."""

from __future__ import annotations

import pytest

from tenure import wire
from tenure.broker.right_sizing import WINDOW_S
from tenure.jobs import Command
from tenure.leases import RightSize
from tenure.resources import Envelope
from tenure.usage import Usage

from .conftest import MIB, World
from .test_metrics import figures

ENOUGH = 21


async def ask(world: World, right_size: RightSize, *, mib: int = 512, cpus: float = 2.0):
    envelope = Envelope(cpus=cpus, memory_bytes=mib * MIB, slot_s=50_000.0, total_s=50_000.0)
    member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("work",)))
    asked = {"gang_id": "g", "run_id": "r", "stage": "s", "tenant": "ada", "members": (member,), "queue_s": 60.0}
    (lease,) = await world.ask("request_gang", **asked, right_size=right_size)
    return world.lease(lease.id)


async def use(world: World, lease_id: str, *, windows: int, mib: int, cpus: float) -> None:
    """Have a lease use so much for so many windows."""
    before = world.broker.book.usage.get(lease_id, Usage(at_s=world.clock.utc_s()))
    for number in range(1, windows + 1):
        await world.after(WINDOW_S, step_s=WINDOW_S / 2)
        world.fleet.use(
            lease_id,
            Usage(
                at_s=world.clock.utc_s(),
                cpu_s=before.cpu_s + number * WINDOW_S * cpus,
                memory_bytes=mib * MIB,
                peak_memory_bytes=max(before.peak_memory_bytes, mib * MIB),
            ),
        )
        await world.after(1.0)


@pytest.mark.parametrize("wanted", [RightSize.PROPOSE, RightSize.APPLY])
def test_use_far_below_the_envelope_is_told_once_and_applied_only_where_agreed(play, wanted) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, wanted)
        await use(world, lease.id, windows=ENOUGH + 9, mib=100, cpus=0.5)
        assert world.events("lease.right_size") == ["lease.right_size"]
        now, labels = world.lease(lease.id).envelope, (lease.id, "ada", "r", "s", "0", "a")
        found = figures(world)
        if wanted is RightSize.PROPOSE:
            assert now == lease.envelope
            assert found["tenure_lease_proposed_memory_bytes", *labels] == 113 * MIB
            assert found["tenure_lease_proposed_cpus", *labels] == pytest.approx(0.6)
        else:
            assert now.memory_bytes == 113 * MIB
            assert now.cpus == pytest.approx(0.6)
            assert (now.slot_s, now.disk_bytes) == (lease.envelope.slot_s, lease.envelope.disk_bytes)
            assert ("tenure_lease_proposed_memory_bytes", *labels) not in found, "what fits needs no proposal"

    play(scene)


def test_a_lease_close_to_its_memory_grows_before_it_dies_of_it(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, RightSize.APPLY, mib=128)
        await use(world, lease.id, windows=ENOUGH, mib=100, cpus=1.75)
        assert world.lease(lease.id).envelope.memory_bytes == 113 * MIB
        await use(world, lease.id, windows=2, mib=108, cpus=1.75)
        assert world.lease(lease.id).envelope.memory_bytes == 170 * MIB
        await use(world, lease.id, windows=ENOUGH - 5, mib=108, cpus=1.75)
        assert world.lease(lease.id).envelope.memory_bytes == 170 * MIB, "what was seen below the old bound is no reason"

    play(scene)


def test_what_the_node_has_no_room_for_is_refused_and_the_lease_goes_on_as_it_was(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, RightSize.APPLY, mib=900)
        await use(world, lease.id, windows=3, mib=890, cpus=1.0)
        assert world.lease(lease.id).envelope == lease.envelope
        assert world.events("lease.right_size") == ["lease.right_size"]

    play(scene)


def test_leases_are_left_alone_unless_their_holder_wants_it(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, RightSize.OFF)
        await use(world, lease.id, windows=ENOUGH, mib=100, cpus=0.5)
        assert world.events("lease.right_size") == []
        assert world.lease(lease.id).envelope == lease.envelope

    play(scene)
