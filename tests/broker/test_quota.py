"""What a run may occupy: its leases end past it, and it gets none until it is below."""

from __future__ import annotations

import itertools

import pytest

from tenure import codec
from tenure.errors import Refused
from tenure.leases import EndReason, LeaseState
from tenure.protocols import Exit, ExitKind
from tenure.runs import Run

from .conftest import MIB, World


async def submit(world: World, *, disk_bytes: int) -> None:
    run = Run(id="r", name="n", tenant="t", job_file="", source="", created_at_s=1.0, disk_bytes=disk_bytes)
    await world.ask("submit_run", run=run)


def fill(world: World, name: str, size_bytes: int) -> None:
    folder = world.home / "runs" / "r" / "s" / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x" * size_bytes)


def test_past_its_bound_a_runs_leases_end_with_the_figures_and_it_gets_no_more(play) -> None:
    async def scene(world: World) -> None:
        await submit(world, disk_bytes=3 * MIB)
        (first,) = await world.gang("g1")
        (second,) = await world.gang("g2", memory_bytes=1000 * MIB)
        assert second.state is LeaseState.QUEUED
        fill(world, "one", 2 * MIB)
        await world.after(10)
        assert world.lease(first.id).state is LeaseState.ACTIVE
        fill(world, "two", 2 * MIB)
        await world.after(3)
        ended = [world.lease(lease.id) for lease in (first, second)]
        assert {(lease.state, lease.end_reason) for lease in ended} == {(LeaseState.ENDED, EndReason.OUT_OF_DISK)}
        assert all("occupies 4.0 MiB" in lease.end_detail and "bound is 3MiB" in lease.end_detail for lease in ended)
        with pytest.raises(Refused, match=r"run r gets no lease: .*bound is 3MiB \(\[run\] disk\)"):
            await world.gang("g3")
        (world.home / "runs/r/s/workers/one").unlink()
        await world.after(3)
        assert (await world.gang("g4"))[0].state is LeaseState.ACTIVE

    play(scene)


@pytest.mark.parametrize("known", [True, False])
def test_without_a_bound_nothing_is_looked_at(play, known, monkeypatch) -> None:
    async def scene(world: World) -> None:
        monkeypatch.setattr("tenure.broker.quota.procfs", None)
        if known:
            await submit(world, disk_bytes=0)
        (lease,) = await world.gang()
        await world.after(10)
        assert world.lease(lease.id).state is LeaseState.ACTIVE

    play(scene)


def test_a_folder_that_takes_long_to_look_at_is_looked_at_seldom(play, monkeypatch) -> None:
    async def scene(world: World) -> None:
        looks = []

        def slow(folder: str, *, max_entries: int) -> int:
            looks.append(world.clock.now_s)
            world.clock.now_s += 1.0
            return 0

        monkeypatch.setattr("tenure.broker.quota.procfs.disk_use", slow)
        await submit(world, disk_bytes=1)
        await world.gang(total_s=1000.0, slot_s=1000.0)
        await world.after(100)
        assert 3 <= len(looks) <= 6
        assert min(later - earlier for earlier, later in itertools.pairwise(looks)) >= 20.0

    play(scene)


def test_an_ended_run_is_forgotten_by_the_looks(play) -> None:
    async def scene(world: World) -> None:
        await submit(world, disk_bytes=10 * MIB)
        (lease,) = await world.gang()
        await world.after(3)
        assert world.broker.quotas._seen
        world.fleet.finish(lease.id, Exit(kind=ExitKind.COMPLETED, ended_at_s=1.0))
        await world.after(3)
        assert not world.broker.quotas._seen

    play(scene)


def test_a_run_written_before_there_were_bounds_has_the_default() -> None:
    text = b'{"id":"r","name":"n","tenant":"t","job_file":"","source":""}'
    assert codec.from_json(text, Run).disk_bytes == 10 << 30
