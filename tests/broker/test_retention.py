"""What goes when it is old, what never does, and what a broker that dies in the middle leaves."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tenure import wire
from tenure.broker import retention
from tenure.errors import NotFound, Refused
from tenure.leases import LeaseState
from tenure.ledger import queries
from tenure.protocols import Exit, ExitKind
from tenure.resources import parse_duration
from tenure.retention import CollectGarbage, Freed
from tenure.runs import Run, RunState, Stage
from tenure.tenants import check_name

from .conftest import World

DAY_S = 86400.0
KINDS = ["whole runs", "stores, worker folders and logs of runs", "folders of nodes that are gone", "events", "usage points"]


async def a_run(world: World, name: str, *, state: RunState = RunState.DONE, live: bool = False) -> Path:
    """Have a run with one stage, one lease and files; return its folder."""
    check_name("run", name)
    stage = Stage(name="s", kind="task")
    run = Run(id=name, name=name, tenant="t", job_file="", source="", stages=(stage,), created_at_s=world.clock.now_s)
    await world.ask("submit_run", run=run)
    envelope = wire.Envelope(memory_bytes=1 << 20, cpus=0.1, slot_s=900 * DAY_S, total_s=900 * DAY_S)
    member = wire.GangMember(worker=0, envelope=envelope, command=wire.Command(argv=("x",)))
    (lease,) = await world.ask("request_gang", gang_id=f"g-{name}", run_id=name, stage="s", members=(member,))
    if not live:
        world.fleet.finish(lease.id, Exit(kind=ExitKind.COMPLETED, ended_at_s=world.clock.now_s))
        await world.settle()
    await world.ask("set_run", run_id=name, state=state)
    folder = world.home / "runs" / name
    for part in ("s/store/a", "s/workers/0/1/a", "s/logs/0.1.log", "s/artefacts/model", "report/report.html"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_bytes(b"x" * 10_000)
    world.clock.now_s += 1.0
    return folder


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


KEPT = {"s/artefacts/model", "report/report.html"}
ALL = KEPT | {"s/store/a", "s/workers/0/1/a", "s/logs/0.1.log"}


async def collect(world: World, **asked) -> dict[str, Freed]:
    return {part.kind: part for part in await world.ask("collect_garbage", **{"keep_runs": 0} | asked)}


def test_the_bulk_of_an_old_run_goes_and_its_report_and_rows_stay(play) -> None:
    async def scene(world: World) -> None:
        old = await a_run(world, "old")
        await world.after(31 * DAY_S, step_s=31 * DAY_S)
        young = await a_run(world, "young")
        told = await collect(world, dry_run=True)
        assert left(old) == ALL
        freed = await collect(world)
        assert list(freed) == KINDS
        assert freed == told
        assert freed[KINDS[1]].names == ("old",)
        assert freed[KINDS[1]].size_bytes >= 30_000
        assert (left(old), left(young)) == (KEPT, ALL)
        assert not left(world.home / "trash")
        assert (await world.ask("lease", lease_id="l1")).lease.run_id == "old"
        assert (await collect(world))[KINDS[1]].count == 0

    play(scene)


def test_the_newest_runs_stay_however_old(play) -> None:
    async def scene(world: World) -> None:
        folders = []
        for number in range(4):
            folders.append(await a_run(world, f"r{number}"))
        await world.after(40 * DAY_S, step_s=40 * DAY_S)
        freed = await collect(world, keep_runs=3)
        assert freed[KINDS[1]].names == ("r0",)
        assert [left(folder) == ALL for folder in folders] == [False, True, True, True]

    play(scene)


def test_nothing_of_a_live_run_goes_nor_of_one_that_a_command_is_at(play) -> None:
    async def scene(world: World) -> None:
        live = await a_run(world, "live", live=True)
        running = await a_run(world, "running", state=RunState.RUNNING)
        resumed = await a_run(world, "resumed", state=RunState.FAILED)
        await world.after(20 * DAY_S, step_s=20 * DAY_S)
        assert world.lease("l1").state is LeaseState.ACTIVE
        with (resumed / "run.lock").open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            freed = await collect(world, older_than_s=0.0, forget_after_s=0.0, events_older_than_s=0.0)
        assert freed[KINDS[0]].count == freed[KINDS[1]].count == 0
        assert left(live) == left(running) == ALL
        assert left(resumed) == ALL | {"run.lock"}
        kept = {event.lease_id for event in await world.ask("events", run_id="live")}
        assert kept == {"", "l1"}
        assert await world.ask("events", run_id="running")
        freed = await collect(world, older_than_s=0.0, forget_after_s=0.0)
        assert freed[KINDS[0]].names == ("resumed",)

    play(scene)


def test_a_run_that_nobody_ended_counts_as_over_after_a_month_of_silence(play) -> None:
    async def scene(world: World) -> None:
        folder = await a_run(world, "left", state=RunState.RUNNING)
        await world.after(29 * DAY_S, step_s=29 * DAY_S)
        assert (await collect(world, older_than_s=DAY_S))[KINDS[1]].count == 0
        await world.after(2 * DAY_S, step_s=2 * DAY_S)
        assert (await collect(world, older_than_s=DAY_S))[KINDS[1]].names == ("left",)
        assert left(folder) == KEPT

    play(scene)


def test_a_run_that_goes_whole_leaves_its_trials_only(play) -> None:
    async def scene(world: World) -> None:
        folder = await a_run(world, "old")
        await world.after(366 * DAY_S, step_s=366 * DAY_S)
        freed = await collect(world)
        assert freed[KINDS[0]].names == ("old",)
        assert not folder.exists()
        assert await world.ask("runs") == ()
        assert await world.ask("leases") == ()
        with pytest.raises(NotFound):
            await world.ask("lease", lease_id="l1")
        assert "run.removed" in world.events()
        assert not left(world.home / "trash")

    play(scene)


def test_a_broker_that_died_between_files_and_rows_lists_the_run_no_more(play) -> None:
    async def scene(world: World) -> None:
        folder = await a_run(world, "old")
        other = await a_run(world, "other")
        target = world.home / "trash" / "runs" / "old"
        target.parent.mkdir(parents=True)
        folder.rename(target)  # what a broker does first, and this one was killed then
        await world.restart()
        assert [run.id for run in await world.ask("runs")] == ["other"]
        assert await world.ask("leases", run_id="old") == ()
        await collect(world)
        assert not left(world.home / "trash")
        assert left(other) == ALL

    play(scene)


class Killed(BaseException):
    """Stands for kill -9: nothing that catches errors catches it."""


STEPS = 14
"""More than there are renames, commits and deletes in the scene below: the last kills nothing."""


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_kill_after_any_step_leaves_a_run_or_nothing_listed_and_the_next_pass_finishes(play, monkeypatch, step) -> None:
    async def scene(world: World) -> None:
        whole = await a_run(world, "whole")
        await world.after(340 * DAY_S, step_s=340 * DAY_S)
        bulk = await a_run(world, "bulk")
        live = await a_run(world, "live", live=True)
        world.clock.now_s += 40 * DAY_S
        steps = 0

        def stepped(function):
            def run(*args, **more):
                nonlocal steps
                if steps >= step:
                    raise Killed
                result = function(*args, **more)
                steps += 1
                if steps == step:
                    raise Killed
                return result

            return run

        with monkeypatch.context() as patch:
            patch.setattr(retention.os, "rename", stepped(os.rename))
            patch.setattr(retention, "delete_tree", stepped(retention.delete_tree))
            patch.setattr(world.ledger, "commit", stepped(world.ledger.commit))
            task = asyncio.ensure_future(world.broker.retention.collect(CollectGarbage(keep_runs=0)))
            while not task.done() and steps < step:
                await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert steps < STEPS, "there are more steps than are tried"
        world.ledger._let_go()  # what was not committed dies with the broker
        await world.restart()
        listed = {run.id for run in await world.ask("runs")}
        assert ("whole" in listed) == whole.exists()
        assert left(live) == ALL
        assert KEPT <= left(bulk) <= ALL
        await collect(world)
        assert {run.id for run in await world.ask("runs")} == {"bulk", "live"}
        assert not whole.exists()
        assert (left(bulk), left(live)) == (KEPT, ALL)
        assert not left(world.home / "trash")

    play(scene)


def test_a_run_that_the_ledger_cannot_be_rid_of_keeps_its_files(play, monkeypatch) -> None:
    async def scene(world: World) -> None:
        folder = await a_run(world, "old")
        await world.after(400 * DAY_S, step_s=400 * DAY_S)

        def refuse(*_: object) -> None:
            raise NotFound("the disk is full")

        monkeypatch.setattr(retention.rows, "forget_run", refuse)
        with pytest.raises(NotFound):
            await collect(world, older_than_s=400 * DAY_S)
        assert left(folder) == ALL
        assert [run.id for run in await world.ask("runs")] == ["old"]

    play(scene)


def test_a_removal_that_the_disk_refused_is_finished_by_the_next_pass(play) -> None:
    async def scene(world: World) -> None:
        folder = await a_run(world, "old")
        await world.after(300 * DAY_S, step_s=300 * DAY_S)
        world.clock.now_s += 100 * DAY_S
        commit, world.ledger.commit = world.ledger.commit, lambda: refuse(world.ledger)
        with pytest.raises(Refused):
            await world.broker.retention.collect(CollectGarbage(keep_runs=0))
        world.ledger.commit = commit
        assert not folder.exists()
        await collect(world)
        assert await world.ask("runs") == ()
        assert not left(world.home / "trash")

    def refuse(ledger) -> None:
        ledger._let_go()
        error = Refused("the disk is full")
        ledger.on_lost(error)
        raise error

    play(scene)


def test_it_happens_by_itself_soon_after_the_start_and_then_every_hour(play) -> None:
    async def scene(world: World) -> None:
        folder = await a_run(world, "old")
        for number in range(20):
            await a_run(world, f"r{number}")
        await world.after(31 * DAY_S, step_s=31 * DAY_S)
        assert left(folder) == KEPT
        await a_run(world, "one-more")
        assert left(world.home / "runs" / "r0") == ALL
        await world.after(3601, step_s=3601)
        assert left(world.home / "runs" / "r0") == KEPT

    play(scene)


def test_the_folder_of_a_node_that_is_gone_goes_and_no_other(play) -> None:
    async def scene(world: World) -> None:
        for name in ("a", "gone"):
            (world.home / "nodes" / name).mkdir(parents=True)
            (world.home / "nodes" / name / "agent.log").write_text("x")
            os.utime(world.home / "nodes" / name / "agent.log", (1.0, 1.0))
        freed = await collect(world, older_than_s=DAY_S)
        assert freed[KINDS[2]].names == ("gone",)
        assert [path.name for path in (world.home / "nodes").iterdir()] == ["a"]

    play(scene)


def test_trials_go_only_when_asked(play) -> None:
    async def scene(world: World) -> None:
        assert "trials" not in await collect(world, older_than_s=0.0, forget_after_s=0.0, events_older_than_s=0.0)
        assert (await collect(world, trials_older_than_s=0.0))["trials"].count == 0

    play(scene)


def test_a_log_that_grew_too_large_is_set_aside_and_goes_on(tmp_path) -> None:
    (tmp_path / "nodes" / "a").mkdir(parents=True)
    logs = [tmp_path / "broker.log", tmp_path / "nodes" / "a" / "agent.log", tmp_path / "nodes" / "a" / "shims.log"]
    for log in logs:
        with log.open("ab", buffering=0) as stream:
            stream.write(b"x" * 2000)
            retention.bound_logs(tmp_path, max_bytes=1000)
            stream.write(b"more")
        assert log.read_bytes() == b"more"
        assert log.with_name(f"{log.name}.1").read_bytes() == b"x" * 2000
    retention.bound_logs(tmp_path, max_bytes=1000)
    assert logs[0].read_bytes() == b"more"


def test_a_folder_that_a_job_locked_or_linked_elsewhere_is_deleted_and_nothing_else(tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    (tree / "closed").mkdir(parents=True)
    (tree / "closed" / "file").write_text("x")
    (tree / "link").symlink_to(outside)
    (tree / "closed").chmod(0o500)
    retention.delete_tree(tree)
    (tmp_path / "link").symlink_to(outside)
    retention.delete_tree(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert (outside / "kept").exists()
    shutil.rmtree(outside)


def test_the_commands_defaults_are_what_happens_by_itself() -> None:
    import inspect

    from tenure.cli.commands import gc

    defaults = {name: parameter.default for name, parameter in inspect.signature(gc).parameters.items()}
    asked = CollectGarbage()
    assert parse_duration(defaults["older_than"]) == asked.older_than_s
    assert parse_duration(defaults["forget_after"]) == asked.forget_after_s
    assert parse_duration(defaults["events_older_than"]) == asked.events_older_than_s
    assert (defaults["keep_runs"], defaults["trials_older_than"], asked.trials_older_than_s) == (asked.keep_runs, "", None)


def test_events_are_still_counted_on_after_old_ones_went(play) -> None:
    async def scene(world: World) -> None:
        await a_run(world, "old")
        before = await world.ask("events", run_id="old")
        await world.after(91 * DAY_S, step_s=91 * DAY_S)  # by itself
        await a_run(world, "young")
        young = await world.ask("events", run_id="young")
        assert await world.ask("events", run_id="old") == ()
        assert await world.ask("events", run_id="young") == young
        with world.ledger.reading() as connection:
            assert before[-1].seq <= queries.events_floor(connection) < young[0].seq

    play(scene)
