"""The queue's order: told to a broker that is up, kept when its disk fails, remembered for the next broker."""

from __future__ import annotations

import pytest

from tenure import wire
from tenure.errors import SpecError
from tenure.jobs import Command
from tenure.leases import LeaseState
from tenure.resources import Envelope

from .conftest import MIB, World, node


async def request(world: World, name: str, memory_bytes: int) -> None:
    envelope = Envelope(memory_bytes=memory_bytes, slot_s=100.0, total_s=1000.0, cpus=0.5)
    member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("work",)))
    await world.ask("request_gang", gang_id=name, run_id=name, stage="s", members=(member,), queue_s=600.0)


def states(world: World) -> list[LeaseState]:
    return [world.lease(f"l{number}").state for number in (2, 3)]


@pytest.mark.parametrize(("order", "granted"), [("", 0), ("fair", 1)])
def test_a_broker_that_is_up_grants_by_the_order_it_is_told(play, order, granted) -> None:
    async def scene(world: World) -> None:
        await request(world, "all", 500 * MIB)
        await request(world, "wide", 450 * MIB)
        await world.after(1)
        await request(world, "narrow", 100 * MIB)
        await world.ask("add_node", name="a", order=order)
        assert (await world.ask("status")).order == (order or "fifo")
        await world.ask("release", lease_ids=("l1",))
        await world.after(10)
        assert [state is LeaseState.ACTIVE for state in states(world)] == [granted == 0, granted == 1]

    play(scene, node("a", memory_bytes=512 * MIB))


def test_an_order_that_does_not_exist_is_refused_with_those_that_do(play) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(SpecError, match="fifo, backfill, las, fair"):
            await world.ask("add_node", name="a", order="random")
        assert (await world.ask("status")).order == "fifo"

    play(scene)


def test_what_is_held_and_waits_stays_when_the_order_changes(play) -> None:
    async def scene(world: World) -> None:
        await request(world, "all", 500 * MIB)
        await request(world, "wide", 450 * MIB)
        before = world.broker.book.placement.snapshot()
        world.broker.book.queue_by("fair")
        assert world.broker.book.placement.snapshot() == before

    play(scene, node("a", memory_bytes=512 * MIB))
