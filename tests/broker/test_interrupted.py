"""A broker that loses a node, a client or itself in the middle of something, over imagined nodes."""

from __future__ import annotations

import asyncio

import pytest
from tests.broker.conftest import MIB, World, node

from tenure import orders, wire
from tenure.errors import Unavailable
from tenure.leases import EndReason, LeaseState
from tenure.resources import Envelope

LARGER, SMALLER = Envelope(memory_bytes=128 * MIB), Envelope(memory_bytes=32 * MIB)


def resizes(world: World) -> list[int]:
    """Return the memory of each resize that a node was ordered."""
    return [args.envelope.memory_bytes for _, op, args in world.fleet.calls if op == "resize"]


def test_a_gang_is_not_refused_while_a_node_has_never_been_reached(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.cut("b")
        await world.restart()
        (first, second) = await world.gang(members=2, memory_bytes=700 * MIB)
        assert {first.state, second.state} <= {LeaseState.REQUESTED, LeaseState.QUEUED}
        world.fleet.mend("b")
        await world.after(6.0)
        assert {world.lease(lease.id).state for lease in (first, second)} == {LeaseState.ACTIVE}

    play(scene, node("a"), node("b"))


def test_a_gang_that_needs_a_node_which_never_comes_ends_when_its_queueing_does(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.cut("b")
        await world.restart()
        leases = await world.gang(members=2, memory_bytes=700 * MIB, queue_s=10.0)
        await world.after(12.0)
        ends = [world.lease(lease.id) for lease in leases]
        assert {lease.end_reason for lease in ends} == {EndReason.CANCELLED}
        assert all("memory" in lease.end_detail for lease in ends)

    play(scene, node("a"), node("b"))


def test_a_broker_killed_in_the_middle_of_a_resize_leaves_a_lease_that_holds_the_larger_size(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(memory_bytes=64 * MIB)

        def die(_node: str, _args: orders.AgentResize) -> wire.Nothing:
            raise asyncio.CancelledError

        world.fleet._resize, heal = die, world.fleet._resize
        with pytest.raises(asyncio.CancelledError):
            await world.ask("resize", lease_id=lease.id, envelope=LARGER)
        world.fleet._resize = heal
        await world.restart()
        after = world.lease(lease.id)
        assert (after.state, after.envelope.memory_bytes) == (LeaseState.ACTIVE, 128 * MIB)
        assert resizes(world)[-1] == 128 * MIB

    play(scene)


def test_a_resize_that_the_node_never_answered_is_settled_when_it_is_back(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(memory_bytes=64 * MIB)
        world.fleet.cut("a")
        with pytest.raises(Unavailable):
            await world.ask("resize", lease_id=lease.id, envelope=SMALLER)
        assert world.lease(lease.id).envelope.memory_bytes == 64 * MIB
        world.fleet.mend("a")
        await world.after(2.0)
        assert (world.lease(lease.id).state, resizes(world)) == (LeaseState.ACTIVE, [64 * MIB])

    play(scene)


def test_a_resize_that_the_node_never_answered_can_be_asked_for_again(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(memory_bytes=64 * MIB)

        def silent(_node: str, _args: orders.AgentResize) -> wire.Nothing:
            raise Unavailable("it did not answer")

        world.fleet._resize, heal = silent, world.fleet._resize
        with pytest.raises(Unavailable):
            await world.ask("resize", lease_id=lease.id, envelope=LARGER)
        world.fleet._resize = heal
        again = await world.ask("resize", lease_id=lease.id, envelope=SMALLER)
        assert (again.state, again.envelope.memory_bytes) == (LeaseState.ACTIVE, 32 * MIB)

    play(scene)


def test_a_broker_that_leaves_waits_for_the_agent_it_is_starting_and_tells_it_too(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.cut("a")
        world.fleet.mend("a")
        up, reach = asyncio.Event(), world.fleet.reach

        async def slowly(name: str, **fields):
            await up.wait()
            return await reach(name, **fields)

        world.broker.fleet.reach = slowly
        world.broker.tick()
        leaving = asyncio.ensure_future(world.broker.stop_agents())
        await asyncio.sleep(0)
        assert not leaving.done()
        up.set()
        await leaving
        assert ("a", "shutdown") in [(name, op) for name, op, _ in world.fleet.calls]

    play(scene)


def test_a_broker_whose_nodes_came_up_slowly_still_waits_for_its_first_client(play) -> None:
    async def scene(world: World) -> None:
        world.clock.now_s += 60.0
        world.broker.begin()
        world.broker.tick()
        assert not world.broker.leaving
        await world.after(6.0)
        assert world.broker.leaving

    play(scene)


def test_a_lease_whose_resize_a_client_left_half_done_can_be_renewed_at_once(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=100.0, total_s=1000.0)
        answers = asyncio.Event()

        async def slow(*_args: object, **_more: object) -> wire.Nothing:
            await answers.wait()
            return wire.Nothing()

        call = world.fleet.call
        world.fleet.call = lambda name, op, args, **more: slow() if op == "resize" else call(name, op, args, **more)
        asked = asyncio.ensure_future(world.ask("resize", lease_id=lease.id, envelope=LARGER))
        await asyncio.sleep(0.01)
        asked.cancel()  # the client was killed
        await asyncio.gather(asked, return_exceptions=True)
        assert world.lease(lease.id).state is LeaseState.RESIZING
        await world.ask("renew", lease_id=lease.id, for_s=500.0)
        world.fleet.call = call
        await world.after(10.0)
        after = world.lease(lease.id)
        assert (after.state, after.ends_at_s) == (LeaseState.ACTIVE, lease.starts_at_s + 500.0)

    play(scene)
