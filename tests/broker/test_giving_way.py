"""Who gives way to whose turn it is: at a renewal, within a slot past what is guaranteed, whole gangs, one round at a time."""

from __future__ import annotations

import pytest

from tenure import wire
from tenure.errors import Refused
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.tenants import Policy

from .conftest import MIB, World, node

SMALL = (node("a", memory_bytes=512 * MIB),)


async def ask(world: World, name: str, *, mib=400, slot_s=2000.0, total_s=20_000.0, on_event=False, members=1):
    envelope = Envelope(cpus=0.5, memory_bytes=mib * MIB, slot_s=slot_s, total_s=total_s)
    command = Command(argv=("work",), on_event=on_event, grace_s=7.0)
    wanted = tuple(wire.GangMember(worker=number, envelope=envelope, command=command) for number in range(members))
    asked = {"gang_id": name, "run_id": name, "stage": "s", "tenant": "t", "members": wanted, "queue_s": 50_000.0}
    leases = await world.ask("request_gang", **asked)
    return world.lease(leases[0].id)


async def order(world: World, name: str) -> None:
    await world.ask("add_node", name="a", order=name)


def test_a_renewal_is_refused_for_whose_turn_it_is_and_the_lease_ends_preempted_with_its_slot(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        first = await ask(world, "first")
        await world.after(700, step_s=50)
        second = await ask(world, "second")
        with pytest.raises(Refused, match="gives way to second, whose turn it is by the order las"):
            await world.ask("renew", lease_id=first.id, for_s=2000.0)
        with pytest.raises(Refused):
            await world.ask("renew", lease_id=first.id, for_s=2000.0)
        assert world.lease(first.id).state is LeaseState.ACTIVE
        assert world.events("lease.gives_way") == ["lease.gives_way"]
        await world.restart()
        world.fleet.finish(first.id, Exit(kind=ExitKind.OUT_OF_TIME, ended_at_s=world.clock.now_s))
        await world.after(2)
        ended = world.lease(first.id)
        assert (ended.end_reason, ended.end_detail.split(",")[0]) == (EndReason.PREEMPTED, "gives way to second")
        assert world.lease(second.id).state is LeaseState.ACTIVE

    play(scene, *SMALL)


def test_once_nobody_waits_any_more_it_is_renewed_after_all(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        first = await ask(world, "first")
        await world.after(700, step_s=50)
        second = await ask(world, "second")
        with pytest.raises(Refused):
            await world.ask("renew", lease_id=first.id, for_s=2000.0)
        await world.ask("release", lease_ids=(second.id,))
        renewed = await world.ask("renew", lease_id=first.id, for_s=2000.0)
        assert (renewed.end_reason, renewed.end_detail) == (None, "")
        world.fleet.finish(first.id, Exit(kind=ExitKind.OUT_OF_TIME, ended_at_s=world.clock.now_s))
        await world.settle()
        assert world.lease(first.id).end_reason is EndReason.EXPIRED

    play(scene, *SMALL)


@pytest.mark.parametrize(("name", "asked_after_s"), [("fifo", 700), ("backfill", 700), ("las", 100)])
def test_who_does_not_have_to_give_way_is_renewed(play, name, asked_after_s) -> None:
    """First come orders never have anybody leave; by service only who has had more than twice as much."""

    async def scene(world: World) -> None:
        await order(world, name)
        first = await ask(world, "first")
        await world.after(asked_after_s, step_s=50)
        await ask(world, "second")
        assert (await world.ask("renew", lease_id=first.id, for_s=3000.0)).ends_at_s == world.clock.now_s + 3000.0

    play(scene, *SMALL)


def test_within_a_slot_nobody_is_preempted_unless_its_policy_says_so(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        first = await ask(world, "first")
        await world.after(1500, step_s=50)
        await ask(world, "second")
        await world.after(400, step_s=20)
        assert world.lease(first.id).state is LeaseState.ACTIVE

    play(scene, *SMALL)


def test_past_its_guaranteed_time_a_lease_is_asked_to_save_and_leave_and_the_other_has_its_room(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        await world.ask("set_policy", tenant="t", policy=Policy(guaranteed_s=1000.0))
        first = await ask(world, "first")
        await world.after(800, step_s=50)
        second = await ask(world, "second")
        await world.after(195, step_s=5)
        assert world.lease(first.id).state is LeaseState.ACTIVE
        await world.after(10)
        ended = world.lease(first.id)
        assert (ended.end_reason, ended.end_detail.split(",")[0]) == (EndReason.PREEMPTED, "gives way to second")
        (stop,) = [args for _, op, args in world.fleet.calls if op == "stop"]
        assert (stop.kind, stop.grace_s) == (ExitKind.STOPPED, 7.0)
        assert world.lease(second.id).state is LeaseState.ACTIVE
        assert world.events("lease.draining") == ["lease.draining"]

    play(scene, *SMALL)


def test_while_one_leaves_nobody_else_is_asked_to(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        await world.ask("set_policy", tenant="*", policy=Policy(guaranteed_s=100.0))
        world.fleet.stops_at_once = False
        held = [await ask(world, name, mib=400) for name in ("one", "two")]
        await world.after(1000, step_s=50)
        await ask(world, "third", mib=400)
        await world.after(60, step_s=2)
        states = sorted(world.lease(lease.id).state for lease in held)
        assert states == [LeaseState.ACTIVE, LeaseState.DRAINING]

    play(scene, node("a", memory_bytes=1000 * MIB))


def test_a_gang_that_trains_gives_way_whole_after_its_first_slot(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        await ask(world, "trains", mib=200, slot_s=700.0, on_event=True, members=2)
        waits = await ask(world, "waits", mib=60)
        await world.after(690, step_s=10)
        assert world.lease(waits.id).state is LeaseState.ACTIVE, "there was room"
        second = await ask(world, "second", mib=300)
        await world.after(30)
        ended = await world.ask("leases", run_id="trains")
        assert {lease.end_reason for lease in ended} == {EndReason.PREEMPTED}
        assert len(ended) == 2
        assert world.lease(second.id).state is LeaseState.ACTIVE

    play(scene, *SMALL)


def test_a_preempted_job_that_asks_again_waits_for_its_turn_and_gets_it(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        await world.ask("set_policy", tenant="t", policy=Policy(guaranteed_s=100.0))
        first = await ask(world, "first")
        await world.after(800, step_s=50)
        second = await ask(world, "second")
        await world.after(5)
        assert world.lease(first.id).end_reason is EndReason.PREEMPTED
        envelope = Envelope(cpus=0.5, memory_bytes=400 * MIB, slot_s=2000.0, total_s=20_000.0)
        member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("work",)))
        (again,) = await world.ask(
            "request_gang", gang_id="first-2", run_id="first", stage="s", tenant="t", members=(member,), queue_s=50_000.0
        )
        await world.after(600, step_s=20)
        assert world.lease(again.id).state is LeaseState.QUEUED
        assert world.lease(second.id).state is LeaseState.ACTIVE
        world.fleet.finish(second.id, Exit(kind=ExitKind.COMPLETED, ended_at_s=world.clock.now_s))
        await world.after(2)
        assert world.lease(again.id).state is LeaseState.ACTIVE
        assert world.lease(again.id).attempt == 2, "a folder of its own"

    play(scene, *SMALL)


def test_an_active_lease_that_is_to_give_way_and_whose_node_is_lost_ends_for_that(play) -> None:
    async def scene(world: World) -> None:
        await order(world, "las")
        first = await ask(world, "first", slot_s=5000.0)
        await world.after(700, step_s=50)
        await ask(world, "second")
        with pytest.raises(Refused):
            await world.ask("renew", lease_id=first.id, for_s=9000.0)
        world.fleet.cut("a")
        await world.after(800, step_s=10)
        assert world.lease(first.id).end_reason is EndReason.NODE_LOST

    play(scene, *SMALL)
