"""A gang that had to give way is asked for again by the broker itself, with what is left of its total."""

from __future__ import annotations

import pytest

from tenure import wire
from tenure.broker.launch import next_of
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.tenants import Policy

from .conftest import MIB, World, node

SMALL = (node("a", memory_bytes=500 * MIB),)


async def ask(world: World, name: str, *, mib: int = 400, resumes: int = 1, members: int = 1, on_event: bool = False):
    envelope = Envelope(cpus=0.5, memory_bytes=mib * MIB, slot_s=2000.0, total_s=20_000.0)
    command = Command(argv=("work",), on_event=on_event)
    wanted = tuple(wire.GangMember(worker=number, envelope=envelope, command=command) for number in range(members))
    asked = {"gang_id": name, "run_id": name, "stage": "s", "tenant": "t", "members": wanted, "queue_s": 50_000.0}
    return await world.ask("request_gang", **asked, resumes=resumes)


async def by_las(world: World) -> None:
    await world.ask("add_node", name="a", order="las")
    await world.ask("set_policy", tenant="t", policy=Policy(guaranteed_s=1000.0))


async def next_leases(world: World, name: str):
    return [lease for lease in await world.ask("leases", run_id=name) if lease.goes_on]


def test_a_preempted_lease_is_asked_for_again_with_what_is_left_and_runs_when_its_turn_comes(play) -> None:
    async def scene(world: World) -> None:
        await by_las(world)
        (first,) = await ask(world, "first")
        await world.after(800, step_s=50)
        (second,) = await ask(world, "second", resumes=0)
        await world.after(205, step_s=5)
        held = world.lease(first.id)
        assert held.end_reason is EndReason.PREEMPTED
        (again,) = await next_leases(world, "first")
        assert (again.goes_on, again.gang_id, again.worker, again.resumes) == (first.id, "first+1", 0, 0)
        assert again.envelope.total_s == pytest.approx(20_000.0 - held.held_s)
        assert (again.envelope.slot_s, again.envelope.memory_bytes) == (2000.0, 400 * MIB)
        assert again.state in (LeaseState.REQUESTED, LeaseState.QUEUED)
        (said,) = [event for event in await world.ask("events") if event.kind == "lease.resumed"]
        assert (said.lease_id, said.data["as"]) == (first.id, again.id)
        assert "left of its total" in said.why
        world.fleet.finish(second.id, Exit(kind=ExitKind.COMPLETED, ended_at_s=world.clock.now_s))
        await world.after(2)
        assert world.lease(again.id).state is LeaseState.ACTIVE
        assert world.lease(again.id).attempt == 2  # its folder is its own

    play(scene, *SMALL)


def test_it_is_asked_for_again_as_often_as_it_says_and_never_when_it_says_never(play) -> None:
    async def scene(world: World) -> None:
        await by_las(world)
        await ask(world, "first", resumes=0)
        await world.after(800, step_s=50)
        await ask(world, "second")
        await world.after(205, step_s=5)
        assert not await next_leases(world, "first")
        assert not world.events("lease.resumed")

    play(scene, *SMALL)


def test_a_broker_that_dies_right_after_has_asked_once(play) -> None:
    async def scene(world: World) -> None:
        await by_las(world)
        await ask(world, "first", resumes=3)
        await world.after(800, step_s=50)
        await ask(world, "second", resumes=0)
        await world.after(205, step_s=5)
        await world.restart()
        await world.after(5)
        assert [lease.gang_id for lease in await next_leases(world, "first")] == ["first+1"]

    play(scene, *SMALL)


def test_a_gang_goes_on_whole_with_the_events_its_workers_left(play) -> None:
    async def scene(world: World) -> None:
        await by_las(world)
        leases = await ask(world, "r", mib=200, members=2, on_event=True)
        world.publish("e0", 0)
        world.publish("e1", 1)
        await world.after(900, step_s=50)
        await ask(world, "second", resumes=0)
        world.fleet.stops_at_once = False
        await world.after(200, step_s=5)
        for number, lease in enumerate(leases):
            world.publish(f"next{number}", number)
            stopped = Exit(kind=ExitKind.STOPPED, result={"state": "continue"}, ended_at_s=world.clock.now_s)
            world.fleet.finish(lease.id, stopped)
            await world.settle()
            assert len(await next_leases(world, "r")) == (0 if number == 0 else 2)
        world.fleet.stops_at_once = True
        (second,) = await world.ask("leases", run_id="second")
        await world.ask("release", lease_ids=(second.id,))
        await world.after(5)
        again = sorted(await next_leases(world, "r"), key=lambda lease: lease.worker)
        assert [lease.goes_on for lease in again] == [lease.id for lease in leases]
        assert [world.lease(lease.id).state for lease in again] == [LeaseState.ACTIVE] * 2
        started = [spec.env["TENURE_EVENT_FILE"].rpartition("/")[2] for spec in world.fleet.started if spec.lease_id in
                   {lease.id for lease in again}]  # fmt: skip
        assert sorted(started) == ["next0.json", "next1.json"]

    play(scene, *SMALL)


def test_one_that_is_released_while_it_gives_way_is_left_alone(play) -> None:
    async def scene(world: World) -> None:
        (first,) = await ask(world, "first")
        await world.ask("release", lease_ids=(first.id,))
        assert not await next_leases(world, "first")

    play(scene, *SMALL)


def test_who_follows_a_preempted_lease_finds_the_one_it_goes_on_with(play) -> None:
    async def scene(world: World) -> None:
        await by_las(world)
        (first,) = await ask(world, "first")
        await world.after(800, step_s=50)
        await ask(world, "second", resumes=0)
        await world.after(205, step_s=5)
        (again,) = known = await next_leases(world, "first")

        class Client:
            def leases(self, **_select):
                return known

        assert next_of(Client(), [world.lease(first.id)]) == (again.id,)
        assert next_of(Client(), [world.lease(again.id)]) == ()
        assert next_of(Client(), []) == ()

    play(scene, *SMALL)
