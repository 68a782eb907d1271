"""Nodes that come and go while the broker runs: over imagined nodes, on a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from tenure import wire
from tenure.errors import Conflict, Refused
from tenure.leases import EndReason, LeaseState
from tenure.nodes import NodeState
from tenure.protocols import Exit, ExitKind

from .conftest import MIB, World, node


def names(status) -> list[str]:
    return [known.name for known in status.nodes]


def test_a_node_added_to_a_broker_that_answers_is_granted_on(play) -> None:
    async def scene(world: World) -> None:
        before = await world.gang("big", memory_bytes=900 * MIB)
        waits = await world.gang("second", memory_bytes=900 * MIB)
        assert waits[0].state is LeaseState.QUEUED
        added = await world.ask("add_node", name="b", cpus=2.0, memory_bytes=1000 * MIB)
        assert (added.name, added.state, added.capacity.cpus) == ("b", NodeState.UP, 2.0)
        assert world.lease(waits[0].id).node == "b"
        assert before[0].node == "a"
        seen = {known.name: known.held_memory_bytes for known in (await world.ask("status")).nodes}
        assert seen == {"a": 900 * MIB, "b": 900 * MIB}

    play(scene)


def test_adding_a_node_makes_the_broker_stay_and_lengthens_every_term(play) -> None:
    async def scene(world: World) -> None:
        assert not (await world.ask("status")).persistent
        await world.ask("add_node", name="b")
        assert (await world.ask("status")).persistent
        terms = {name: [args.term_s for who, op, args in world.fleet.calls if (who, op) == (name, "term")][-1] for name in "ab"}
        assert terms == {"a": 600.0, "b": 600.0}
        await world.after(30)
        assert not world.broker.leaving

    play(scene)


def test_adding_a_node_again_changes_nothing_and_another_part_is_refused_with_what_to_do(play) -> None:
    async def scene(world: World) -> None:
        first = await world.ask("add_node", name="b", cpus=1.0)
        assert await world.ask("add_node", name="b", cpus=1.0) == first
        assert await world.ask("add_node", name="b") == first
        with pytest.raises(Conflict, match=r"node b exists and offers 1 cpus; asked for 2 cpus.*tenure down --node b"):
            await world.ask("add_node", name="b", cpus=2.0)

    play(scene)


def test_a_node_that_the_machine_has_no_room_for_is_refused_and_not_kept(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.refuse_reach = lambda name: Refused("node a of /home/x holds 4 cpus") if name == "b" else None
        with pytest.raises(Refused, match="holds 4 cpus"):
            await world.ask("add_node", name="b", cpus=1.0)
        await world.after(20)
        status = await world.ask("status")
        assert names(status) == ["a"]
        assert "b" not in status.unreached
        assert not status.persistent

    play(scene)


def test_a_node_taken_out_releases_whole_gangs_and_is_gone(play) -> None:
    async def scene(world: World) -> None:
        gang = await world.gang(members=2, memory_bytes=60 * MIB)
        assert {lease.node for lease in gang} == {"a", "b"}
        await world.ask("remove_node", name="b")
        ended = [world.lease(lease.id) for lease in gang]
        assert {(lease.state, lease.end_reason) for lease in ended} == {(LeaseState.ENDED, EndReason.RELEASED)}
        assert "node b is taken out" in ended[0].end_detail
        assert names(await world.ask("status")) == ["a"]
        assert world.fleet.names() == ("a",)
        await world.ask("remove_node", name="b")
        assert world.events("node.")[-2:] == ["node.draining", "node.removed"]
        await world.after(10)
        assert names(await world.ask("status")) == ["a"]

    play(scene, node("a", memory_bytes=100 * MIB), node("b", memory_bytes=100 * MIB))


def test_a_node_whose_leases_take_long_to_end_is_granted_nothing_meanwhile(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(memory_bytes=500 * MIB)
        world.fleet.stops_at_once = False
        leaving = asyncio.ensure_future(world.broker.handlers.op_remove_node(wire.RemoveNode(name="a"), None))
        await asyncio.sleep(0)
        await world.settle()
        assert [known.state for known in world.broker.nodes.known()] == [NodeState.DRAINING]
        (waits,) = await world.gang("second")
        assert (waits.state, waits.node) == (LeaseState.QUEUED, "")
        world.fleet.finish(lease.id, Exit(kind=ExitKind.STOPPED))
        await leaving
        assert world.broker.nodes.known() == ()

    play(scene)


def test_a_name_that_was_taken_out_can_be_used_again_for_another_part(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("add_node", name="b", cpus=1.0)
        await world.ask("remove_node", name="b")
        assert (await world.ask("add_node", name="b", cpus=2.0)).capacity.cpus == 2.0

    play(scene)
