"""The broker over imagined nodes, on a virtual clock: every change is seen through the ledger."""

from __future__ import annotations

import sys

import pytest
import sqlalchemy as sa

from tenure import orders, wire
from tenure.errors import Conflict, IllegalChange, NoPlacement, Refused, SpecError, Unavailable
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.protocols import MACHINE_RESTARTED, Exit, ExitKind
from tenure.resources import Envelope
from tenure.usage import Usage

from .conftest import MIB, World, node

DONE = Exit(kind=ExitKind.COMPLETED, ended_at_s=1.0)


def said(state: str, kind: ExitKind = ExitKind.COMPLETED) -> Exit:
    return Exit(kind=kind, result={"state": state}, ended_at_s=1.0)


def test_a_command_runs_and_its_lease_completes(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        assert (lease.state, lease.node, lease.attempt) == (LeaseState.ACTIVE, "a", 1)
        assert lease.ends_at_s == world.clock.now_s + 100.0
        (spec,) = world.fleet.started
        assert spec.deadline_boot_s == world.clock.boot_s() + 100.0
        assert spec.env["TENURE_WORKER_DIR"] == str(world.home / "runs/r/s/workers/0/1")
        assert spec.env["OMP_NUM_THREADS"] == "1"
        assert spec.log_path.endswith("logs/0.1.log")
        world.fleet.finish(lease.id, DONE)
        await world.settle()
        ended = world.lease(lease.id)
        assert (ended.state, ended.end_reason) == (LeaseState.ENDED, EndReason.COMPLETED)
        assert world.events("lease.") == [
            f"lease.{kind}" for kind in ("requested", "granting", "active", "started", "exited", "ended")
        ]
        assert world.fleet.attempts["a"] == {}

    play(scene)


@pytest.mark.parametrize(
    ("end", "reason", "detail"),
    [
        (Exit(kind=ExitKind.FAILED, code=3, log_tail="a\nboom"), EndReason.FAILED, "code 3; last words: boom"),
        (Exit(kind=ExitKind.OUT_OF_MEMORY, witness="oom_kill 1"), EndReason.OUT_OF_MEMORY, "oom_kill 1"),
        (Exit(kind=ExitKind.OUT_OF_DISK), EndReason.OUT_OF_DISK, "out_of_disk"),
        (Exit(kind=ExitKind.SIGNALLED, signal=9), EndReason.FAILED, "signal 9"),
        (Exit(kind=ExitKind.OUT_OF_TIME), EndReason.EXPIRED, "nobody had renewed"),
        (Exit(kind=ExitKind.STOPPED), EndReason.NODE_LOST, "had not heard of the broker"),
        (Exit(kind=ExitKind.STOPPED, witness=MACHINE_RESTARTED), EndReason.NODE_LOST, f"stopped; {MACHINE_RESTARTED}"),
    ],
)
def test_a_lease_ends_with_the_reason_its_attempt_gives(play, end: Exit, reason: EndReason, detail: str) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        world.fleet.finish(lease.id, end)
        await world.settle()
        view = await world.ask("lease", lease_id=lease.id)
        assert view.lease.end_reason is reason
        assert detail in view.lease.end_detail
        assert view.exits == (end,)

    play(scene)


def test_a_lease_whose_total_is_one_slot_ends_out_of_time(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=50.0, total_s=50.0)
        world.fleet.finish(lease.id, Exit(kind=ExitKind.OUT_OF_TIME))
        await world.settle()
        assert world.lease(lease.id).end_reason is EndReason.OUT_OF_TIME

    play(scene)


def test_exit_zero_without_the_promised_result_is_a_failure(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(expects_result=True)
        world.fleet.finish(lease.id, DONE)
        await world.settle()
        assert world.lease(lease.id).end_reason is EndReason.FAILED
        assert "no result.json" in world.lease(lease.id).end_detail

    play(scene)


def test_asking_again_with_the_same_gang_gives_the_same_leases(play) -> None:
    async def scene(world: World) -> None:
        first = await world.gang(members=2)
        again = await world.gang(members=2)
        assert [lease.id for lease in first] == [lease.id for lease in again]
        assert len(world.fleet.started) == 2
        with pytest.raises(Conflict, match="exists with 2 leases"):
            await world.gang(members=3)

    play(scene)


def test_a_gang_is_granted_whole_under_one_fence_or_waits_whole(play) -> None:
    async def scene(world: World) -> None:
        (first,) = await world.gang("first", memory_bytes=600 * MIB)
        pair = await world.gang("pair", members=2, memory_bytes=400 * MIB, stage="t")
        assert [lease.state for lease in pair] == [LeaseState.QUEUED] * 2
        world.fleet.finish(first.id, DONE)
        await world.settle()
        pair = [world.lease(lease.id) for lease in pair]
        assert [lease.state for lease in pair] == [LeaseState.ACTIVE] * 2
        assert pair[0].fence == pair[1].fence > first.fence

    play(scene)


def test_what_no_node_could_ever_hold_is_refused_with_the_reason_of_each(play) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(NoPlacement) as caught:
            await world.gang(memory_bytes=4096 * MIB)
        assert set(caught.value.reasons) == {"a", "b"}
        assert all("memory" in why for why in caught.value.reasons.values())
        assert world.events("lease.") == []

    play(scene, node("a"), node("b", memory_bytes=2048 * MIB))


def test_a_request_that_queued_too_long_is_cancelled_with_what_it_waited_for(play) -> None:
    async def scene(world: World) -> None:
        await world.gang("first", memory_bytes=900 * MIB, slot_s=900.0)
        (late,) = await world.gang("late", memory_bytes=900 * MIB, queue_s=10.0, stage="t")
        await world.after(11.0)
        ended = world.lease(late.id)
        assert (ended.end_reason, ended.held_s) == (EndReason.CANCELLED, 0.0)
        assert "memory" in ended.end_detail

    play(scene)


def test_names_that_would_leave_the_runs_folder_are_refused(play) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(SpecError, match="names a folder"):
            await world.gang(stage="../x")

    play(scene)


def test_a_released_lease_is_stopped_and_ends_released(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.stops_at_once = False
        (lease,) = await world.gang()
        await world.ask("release", lease_ids=(lease.id,), why="enough")
        assert world.lease(lease.id).state is LeaseState.DRAINING
        world.fleet.finish(lease.id, Exit(kind=ExitKind.STOPPED))
        await world.settle()
        ended = world.lease(lease.id)
        assert (ended.state, ended.end_reason, ended.end_detail) == (LeaseState.ENDED, EndReason.RELEASED, "enough")

    play(scene)


def test_waiting_answers_when_all_have_ended_and_not_before(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        import asyncio

        waiter = asyncio.ensure_future(
            world.broker.handlers.op_wait_leases(wire.WaitLeases(lease_ids=(lease.id,), timeout_s=60.0), None)
        )
        await world.settle()
        assert not waiter.done()
        world.fleet.finish(lease.id, DONE)
        (view,) = await waiter
        assert view.lease.state is LeaseState.ENDED

    play(scene)


def test_renewal_moves_the_slot_but_never_past_the_total(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=100.0, total_s=150.0)
        renewed = await world.ask("renew", lease_id=lease.id, for_s=1000.0)
        assert renewed.ends_at_s == lease.starts_at_s + 150.0
        order = next(args for _, op, args in world.fleet.calls if op == "renew")
        assert order.deadline_boot_s == world.clock.boot_s() + 150.0
        world.fleet.finish(lease.id, DONE)
        await world.settle()
        with pytest.raises(IllegalChange):
            await world.ask("renew", lease_id=lease.id, for_s=1.0)

    play(scene)


def test_a_resize_is_refused_when_the_node_lacks_room_and_else_counts_at_once(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(memory_bytes=600 * MIB)
        with pytest.raises(Refused, match="memory"):
            await world.ask("resize", lease_id=lease.id, envelope=Envelope(memory_bytes=2000 * MIB))
        smaller = await world.ask("resize", lease_id=lease.id, envelope=Envelope(memory_bytes=100 * MIB))
        assert (smaller.state, smaller.envelope.memory_bytes) == (LeaseState.ACTIVE, 100 * MIB)
        (other,) = await world.gang("other", memory_bytes=900 * MIB, stage="t")
        assert other.state is LeaseState.ACTIVE

    play(scene)


def test_two_attempts_of_one_worker_never_share_a_folder(play) -> None:
    async def scene(world: World) -> None:
        await world.gang("one")
        await world.gang("two")
        assert len({spec.worker_dir for spec in world.fleet.started}) == 2

    play(scene)


def test_usage_is_known_live_and_rolled_up_sparsely(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        for second in range(10):
            world.fleet.use(lease.id, Usage(at_s=float(second), cpu_s=second))
            await world.after(1.0)
        assert (await world.ask("lease", lease_id=lease.id)).usage.cpu_s == 9
        points = await world.ask("usage", lease_id=lease.id)
        assert [point.at_s for point in points][:5] == [0.0, 2.0, 4.0, 6.0, 8.0]

    play(scene)


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_start_the_named_member_one_at_a_time_in_order(play) -> None:
    async def scene(world: World) -> None:
        world.publish("start", 0)
        pair = await world.gang(members=2, on_event=True, expects_result=True)
        await world.after(2.0)
        assert [spec.attempt for spec in world.fleet.started] == [1]
        assert world.fleet.started[0].env["TENURE_EVENT_FILE"].endswith("store/events/start.json")
        world.publish("x-1", 1)
        world.publish("x-2", 1)
        await world.after(2.0)
        assert [spec.lease_id for spec in world.fleet.started] == [pair[0].id, pair[1].id]
        before = world.lease(pair[1].id).ends_at_s
        world.fleet.finish(pair[1].id, said("continue"))
        await world.settle()
        last = world.fleet.started[-1]
        assert (last.lease_id, last.attempt) == (pair[1].id, 2)
        assert last.env["TENURE_EVENT_FILE"].endswith("x-2.json")
        assert world.lease(pair[1].id).ends_at_s >= before
        for lease in pair:
            world.fleet.finish(lease.id, said("done"))
            await world.settle()
        assert {world.lease(lease.id).end_reason for lease in pair} == {EndReason.COMPLETED}
        assert len(world.fleet.started) == 3

    play(scene)


def test_a_failed_event_is_started_again_and_the_third_failure_ends_the_gang(play) -> None:
    async def scene(world: World) -> None:
        pair = await world.gang(members=2, on_event=True)
        world.publish("e", 0)
        world.publish("f", 1)
        for failures in range(3):
            await world.after(2.0)
            assert world.lease(pair[0].id).attempt == failures + 1
            world.fleet.finish(pair[0].id, Exit(kind=ExitKind.SIGNALLED, signal=9))
        await world.settle()
        first, second = (world.lease(lease.id) for lease in pair)
        assert first.end_reason is EndReason.FAILED
        assert "failed 3 times" in first.end_detail
        assert second.end_reason is EndReason.FAILED
        assert "worker 0 of its gang" in second.end_detail

    play(scene)


def test_events_of_an_ended_gang_do_not_start_the_next(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang("one", on_event=True)
        world.publish("a", 0)
        await world.after(2.0)
        world.publish("never-started", 0)
        await world.ask("release", lease_ids=(lease.id,))
        await world.after(2.0)
        world.publish("fresh", 0)
        await world.gang("two", on_event=True)
        await world.after(2.0)
        assert world.fleet.started[-1].env["TENURE_EVENT_FILE"].endswith("fresh.json")

    play(scene)


def test_an_idle_lease_that_waits_for_events_ends_with_its_total(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(on_event=True, slot_s=10.0, total_s=30.0)
        await world.after(31.0)
        assert world.lease(lease.id).end_reason is EndReason.OUT_OF_TIME

    play(scene)


# --- repair -----------------------------------------------------------------------------------------------------------


def test_a_new_broker_takes_over_what_runs_and_records_what_ended(play) -> None:
    async def scene(world: World) -> None:
        (runs,) = await world.gang("runs")
        (ended,) = await world.gang("ended", stage="t")
        world.fleet.finish(ended.id, DONE, told=False)
        fence = world.broker.fence
        await world.restart()
        assert world.broker.fence > fence
        assert world.lease(runs.id).state is LeaseState.ACTIVE
        assert world.lease(ended.id).end_reason is EndReason.COMPLETED
        assert len(world.fleet.started) == 2
        world.fleet.finish(runs.id, DONE)
        await world.settle()
        assert world.lease(runs.id).end_reason is EndReason.COMPLETED

    play(scene)


def test_a_grant_whose_order_was_lost_is_started_again_by_the_next_broker(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.refuse_start = lambda spec: Unavailable("the broker died here")
        (lease,) = await world.gang()
        assert lease.state is LeaseState.GRANTING
        world.fleet.refuse_start = lambda spec: None
        await world.restart()
        again = world.lease(lease.id)
        assert (again.state, again.attempt) == (LeaseState.ACTIVE, 2)
        assert len(world.fleet.started) == 1

    play(scene)


def test_an_attempt_of_no_live_lease_is_stopped(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        world.fleet.cut("a")
        await world.after(75.0)
        assert world.lease(lease.id).end_reason is EndReason.NODE_LOST
        world.fleet.mend("a")
        await world.after(6.0)
        assert ("a", "stop", lease.id) in [(n, op, getattr(args, "lease_id", "")) for n, op, args in world.fleet.calls]

    play(scene)


def test_a_cut_shorter_than_the_term_changes_nothing(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=900.0)
        world.fleet.cut("a")
        await world.after(40.0)
        assert world.lease(lease.id).state is LeaseState.ACTIVE
        assert world.events("node.") == ["node.up", "node.unreachable"]
        world.fleet.mend("a")
        await world.after(3.0)
        assert world.events("node.") == ["node.up", "node.unreachable", "node.up"]
        assert world.lease(lease.id) == lease
        assert len(world.fleet.started) == 1

    play(scene)


def test_an_event_that_ran_when_the_broker_died_is_finished_once(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(on_event=True)
        world.publish("e", 0)
        await world.after(2.0)
        await world.restart()
        await world.after(2.0)
        assert len(world.fleet.started) == 1
        world.fleet.finish(lease.id, said("continue"))
        await world.after(3.0)
        assert len(world.fleet.started) == 1
        world.publish("f", 0)
        await world.after(2.0)
        assert len(world.fleet.started) == 2

    play(scene)


def test_placement_after_a_restart_equals_the_one_before(play) -> None:
    async def scene(world: World) -> None:
        await world.gang("one", members=2)
        await world.gang("two", memory_bytes=900 * MIB, stage="t", queue_s=500.0)
        before = world.broker.book.placement
        await world.restart()
        assert world.broker.book.placement == before

    play(scene)


def test_a_command_that_cannot_be_started_fails_with_the_reason(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.refuse_start = lambda spec: SpecError("no such program: work")
        (lease,) = await world.gang()
        await world.settle()
        assert world.lease(lease.id).end_reason is EndReason.FAILED
        assert "no such program" in world.lease(lease.id).end_detail

    play(scene)


def test_a_broker_without_clients_and_leases_leaves_after_a_while(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        await world.after(10.0)
        assert not world.broker.leaving
        world.fleet.finish(lease.id, DONE)
        await world.after(4.0)
        assert not world.broker.leaving
        await world.after(3.0)
        assert world.broker.leaving

    play(scene)


def test_a_full_disk_refuses_requests_and_grants_go_on_once_there_is_room(play) -> None:
    async def scene(world: World) -> None:
        def pages(limit: int) -> None:
            with world.ledger.reading() as connection:
                connection.execute(sa.text(f"PRAGMA max_page_count = {limit}"))

        (lease,) = await world.gang("one")
        pages(1)  # SQLite takes the present size when that is larger

        async def ask_on() -> None:
            for number in range(200):
                await world.gang(f"more-{number}", memory_bytes=900 * MIB, stage="t")

        with pytest.raises(Refused, match="disk is full"):
            await ask_on()
        world.fleet.finish(lease.id, DONE)
        await world.settle()
        await world.after(10.0)
        with pytest.raises(Refused, match=r"cannot be waited for: .* the disk is full"):
            await world.ask("wait_leases", lease_ids=(lease.id,), timeout_s=600.0)
        pages(1_000_000)
        await world.after(10.0)
        assert world.lease(lease.id).end_reason is EndReason.COMPLETED
        (view,) = await world.ask("wait_leases", lease_ids=(lease.id,), timeout_s=600.0)
        assert view.lease.state is LeaseState.ENDED
        assert {state.state for state in world.broker.book.live.values()} <= {LeaseState.ACTIVE, LeaseState.QUEUED}

    play(scene)


def test_a_resize_that_the_runtime_refuses_leaves_the_lease_as_it_was(play) -> None:
    async def scene(world: World) -> None:
        def refuse(node: str, args: orders.AgentResize) -> wire.Nothing:
            raise Refused("the lease uses more than that")

        world.fleet._resize = refuse
        (lease,) = await world.gang()
        with pytest.raises(Refused, match="uses more"):
            await world.ask("resize", lease_id=lease.id, envelope=Envelope(memory_bytes=32 * MIB))
        assert world.lease(lease.id) == lease

    play(scene)


def test_shutting_down_ends_every_lease_first(play) -> None:
    async def scene(world: World) -> None:
        leases = await world.gang(members=2)
        await world.ask("shutdown")
        assert {world.lease(lease.id).end_reason for lease in leases} == {EndReason.RELEASED}
        assert world.broker.leaving

    play(scene)


def test_a_release_during_the_start_is_not_lost(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.refuse_start = lambda spec: Unavailable("slow")
        (lease,) = await world.gang()
        await world.ask("release", lease_ids=(lease.id,))
        await world.after(6.0)
        ended = world.lease(lease.id)
        assert (ended.state, ended.end_reason) == (LeaseState.ENDED, EndReason.RELEASED)

    play(scene)


def test_python_means_the_interpreter_tenure_runs_under_unless_the_job_has_a_path_of_its_own(play) -> None:
    async def scene(world: World) -> None:
        envelope = Envelope(memory_bytes=64 * MIB, slot_s=100.0, total_s=100.0, cpus=0.5)
        for stage, env in (("ours", {}), ("theirs", {"PATH": "/opt/bin"})):
            command = Command(argv=("python", "x.py"), env=env)
            member = wire.GangMember(worker=0, envelope=envelope, command=command)
            await world.ask("request_gang", gang_id=stage, run_id="r", stage=stage, members=(member,), queue_s=1.0)
        ours, theirs = world.fleet.started
        assert ours.argv == (sys.executable, "x.py")
        assert (theirs.argv, theirs.env["PATH"]) == (("python", "x.py"), "/opt/bin")

    play(scene)


@pytest.mark.parametrize("jump_s", [-86400.0, 86400.0])
def test_setting_the_wall_clock_moves_no_deadline_also_across_a_restart(play, jump_s: float) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=100.0, total_s=150.0)
        began_s = world.clock.boot_s()

        async def renewed_to(for_s: float) -> float:
            world.fleet.calls.clear()
            await world.ask("renew", lease_id=lease.id, for_s=for_s)
            return next(args.deadline_boot_s for _, op, args in world.fleet.calls if op == "renew") - began_s

        world.clock.jump_s = jump_s
        await world.after(10.0)
        assert await renewed_to(110.0) == pytest.approx(120.0)
        await world.restart()
        assert await renewed_to(1000.0) == pytest.approx(150.0)
        world.fleet.finish(lease.id, DONE)
        await world.settle()
        assert world.lease(lease.id).held_s == pytest.approx(10.0)
        (after,) = await world.gang("after", stage="t")
        assert after.starts_at_s == pytest.approx(world.clock.utc_s())

    play(scene)


def test_a_term_whose_answer_was_lost_is_waited_out_before_the_node_is_lost(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=900.0)
        taken_s = 0.0

        def take_and_say_nothing(node: str, args: orders.NodeTerm) -> orders.BootTime:
            nonlocal taken_s
            taken_s = world.clock.boot_s()
            assert args.ends_boot_s == taken_s + 60.0
            world.fleet.cut("a")
            raise Unavailable("the answer was lost")

        world.fleet._term = take_and_say_nothing
        await world.after(25.0)
        assert taken_s
        await world.after(taken_s + 69.0 - world.clock.boot_s())
        assert world.lease(lease.id).state is LeaseState.ACTIVE
        await world.after(2.0)
        assert world.lease(lease.id).end_reason is EndReason.NODE_LOST

    play(scene)


def test_a_node_that_only_takes_connections_is_lost_all_the_same(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(slot_s=900.0)
        world.fleet.cut("a")
        await world.after(40.0)
        assert world.fleet.cut_off  # tried all the while; no term was sent, so none is waited for
        await world.after(32.0)
        assert world.lease(lease.id).end_reason is EndReason.NODE_LOST

    play(scene)


def test_an_attempt_that_was_started_after_all_is_stopped_before_the_next_begins(play) -> None:
    async def scene(world: World) -> None:
        held = []

        def hold(spec) -> Unavailable | None:
            held.append(spec)
            return Unavailable("no answer")

        world.fleet.refuse_start = hold
        (lease,) = await world.gang()
        await world.after(6.0)
        first, again = held[0], held[-1]
        assert (first.attempt, again.attempt) == (1, 2)
        world.fleet.refuse_start = lambda spec: None
        world.fleet._start("a", orders.AgentStart(spec=first))
        await world.after(12.0)
        stops = [args.lease_id for _, op, args in world.fleet.calls if op == "stop"]
        assert stops == [lease.id]
        assert world.lease(lease.id).state is LeaseState.ACTIVE
        assert [spec.attempt for spec in world.fleet.started][-1] == world.lease(lease.id).attempt > 1

    play(scene)


def test_a_resize_that_was_not_answered_holds_the_larger_of_both_until_the_node_is_heard(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(memory_bytes=100 * MIB)
        told = []

        def lose(node: str, args: orders.AgentResize) -> wire.Nothing:
            told.append(args.envelope.memory_bytes)
            if len(told) == 1:
                raise Unavailable("the answer was lost")
            return wire.Nothing()

        world.fleet._resize = lose
        with pytest.raises(Unavailable):
            await world.ask("resize", lease_id=lease.id, envelope=Envelope(cpus=0.5, memory_bytes=300 * MIB))
        assert (world.lease(lease.id).state, world.lease(lease.id).envelope.memory_bytes) == (LeaseState.RESIZING, 300 * MIB)
        await world.restart()
        assert (world.lease(lease.id).state, world.lease(lease.id).envelope.memory_bytes) == (LeaseState.ACTIVE, 300 * MIB)
        assert told == [300 * MIB, 300 * MIB]
        await world.ask("renew", lease_id=lease.id, for_s=200.0)

    play(scene)


def test_a_renewal_that_the_node_did_not_hear_is_told_again(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        world.fleet.cut("a")
        with pytest.raises(Unavailable):
            await world.ask("renew", lease_id=lease.id, for_s=500.0)
        world.fleet.mend("a")
        await world.after(3.0)
        (order,) = [args for _, op, args in world.fleet.calls if op == "renew"]
        assert order.deadline_boot_s == pytest.approx(world.clock.boot_s() + 497.0)
        await world.after(10.0)
        assert len([op for _, op, _ in world.fleet.calls if op == "renew"]) == 1

    play(scene)


def test_a_renewal_told_again_by_a_new_broker_does_not_undo_a_later_one(play) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang()
        await world.restart()  # which tells the node the slot again
        world.broker.attempts._told_s.clear()
        world.broker.attempts._tell_slot(lease.id)
        world.fleet.calls.clear()
        await world.ask("renew", lease_id=lease.id, for_s=500.0)
        renewed = [args.deadline_boot_s - world.clock.boot_s() for _, op, args in world.fleet.calls if op == "renew"]
        assert renewed == pytest.approx([500.0] * len(renewed))

    play(scene)


def test_what_could_not_be_started_before_its_slot_was_over_is_not_started(play) -> None:
    async def scene(world: World) -> None:
        member = wire.GangMember(worker=0, envelope=Envelope(slot_s=10.0, total_s=10.0), command=Command(argv=("work",)))
        asked = wire.RequestGang(gang_id="g", run_id="r", stage="s", members=(member,))
        grant = world.broker.book.before_commit

        def grant_on_a_slow_disk() -> None:
            world.broker.book.before_commit = grant
            grant()
            world.clock.now_s += 11.0  # before the order went out

        world.broker.book.before_commit = grant_on_a_slow_disk
        (lease,) = await world.broker.handlers.op_request_gang(asked, None)
        await world.settle()
        assert world.fleet.started == []
        ended = world.lease(lease.id)
        assert (ended.state, ended.end_reason) == (LeaseState.ENDED, EndReason.OUT_OF_TIME)

    play(scene)
