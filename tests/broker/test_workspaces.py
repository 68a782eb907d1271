"""A workspace's run: it ends as its lease did, also when no broker was there to see that."""

from __future__ import annotations

import pytest

from tenure.leases import LeaseState
from tenure.protocols import Exit, ExitKind
from tenure.runs import Run, RunState, Stage

from .conftest import World


async def open_workspace(world: World):
    stage = Stage(name="s", kind="workspace", state=RunState.RUNNING)
    run = Run(id="r", name="n", tenant="default", job_file="", source="", state=RunState.RUNNING, stages=(stage,))
    await world.ask("submit_run", run=run)
    (lease,) = await world.gang("r")
    return lease


async def state_of_run(world: World) -> tuple[RunState, RunState]:
    (run,) = await world.ask("runs", run_id="r")
    return run.state, run.stages[0].state


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (Exit(kind=ExitKind.COMPLETED, ended_at_s=1.0), RunState.DONE),
        (Exit(kind=ExitKind.FAILED, code=3, ended_at_s=1.0), RunState.FAILED),
        (Exit(kind=ExitKind.OUT_OF_TIME, ended_at_s=1.0), RunState.DONE),
        (Exit(kind=ExitKind.OUT_OF_MEMORY, ended_at_s=1.0), RunState.FAILED),
    ],
    ids=lambda value: str(getattr(value, "kind", value)),
)
def test_a_workspaces_run_ends_as_its_lease_does(play, end, state) -> None:
    async def scene(world: World) -> None:
        lease = await open_workspace(world)
        assert await state_of_run(world) == (RunState.RUNNING, RunState.RUNNING)
        world.fleet.finish(lease.id, end)
        await world.after(1)
        assert await state_of_run(world) == (state, state)

    play(scene)


def test_one_that_ended_while_the_broker_was_away_is_closed_by_the_next(play) -> None:
    async def scene(world: World) -> None:
        lease = await open_workspace(world)
        world.broker.workspaces.tick = lambda: None  # it dies between the lease's end and the run's
        world.fleet.finish(lease.id, Exit(kind=ExitKind.COMPLETED, ended_at_s=1.0))
        await world.settle()
        assert world.lease(lease.id).state is LeaseState.ENDED
        await world.restart()
        assert await state_of_run(world) == (RunState.DONE, RunState.DONE)

    play(scene)


def test_the_run_of_a_job_file_is_left_to_who_runs_it(play) -> None:
    async def scene(world: World) -> None:
        stage = Stage(name="s", kind="task", state=RunState.RUNNING)
        run = Run(id="r", name="n", tenant="default", job_file="", source="", state=RunState.RUNNING, stages=(stage,))
        await world.ask("submit_run", run=run)
        (lease,) = await world.gang("r")
        world.fleet.finish(lease.id, Exit(kind=ExitKind.COMPLETED, ended_at_s=1.0))
        await world.after(1)
        assert await state_of_run(world) == (RunState.RUNNING, RunState.RUNNING)

    play(scene)
