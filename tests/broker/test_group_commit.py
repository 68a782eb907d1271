"""Group commit: many changes, one write to disk, and nothing that rests on them leaves the broker before it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import sqlalchemy as sa

from tenure import wire
from tenure.errors import Refused
from tenure.jobs import Command
from tenure.leases import LeaseState
from tenure.resources import Envelope

from .conftest import MIB, World, node

LARGE = node("a", cpus=64.0, memory_bytes=8192 * MIB)


def asked(gang_id: str) -> wire.RequestGang:
    member = wire.GangMember(worker=0, envelope=Envelope(cpus=0.5, memory_bytes=64 * MIB), command=Command(argv=("work",)))
    return wire.RequestGang(gang_id=gang_id, run_id="r", stage=gang_id, members=(member,))


async def request(world: World, gang_id: str) -> Any:
    return await world.broker.handlers.table()["request_gang"](asked(gang_id), None)


def fill_disk(world: World, *, full: bool) -> None:
    with world.ledger.reading() as connection:
        connection.execute(sa.text(f"PRAGMA max_page_count = {1 if full else 1_000_000}"))


def test_requests_that_come_together_are_granted_and_started_with_a_few_commits(play) -> None:
    async def scene(world: World) -> None:
        before = world.ledger.commits
        answers = await asyncio.gather(*(request(world, f"g{number}") for number in range(30)))
        assert {lease.state for leases in answers for lease in leases} <= {LeaseState.GRANTING, LeaseState.ACTIVE}
        await world.settle()
        assert {lease.state for lease in world.broker.book.live.values()} == {LeaseState.ACTIVE}
        assert world.ledger.commits - before <= 4

    play(scene, LARGE)


def test_one_request_is_granted_with_one_commit_and_runs_with_a_second(play) -> None:
    async def scene(world: World) -> None:
        before = world.ledger.commits
        (lease,) = await request(world, "g")
        await world.settle()
        assert (world.lease(lease.id).state, world.ledger.commits - before) == (LeaseState.ACTIVE, 2)

    play(scene)


def test_neither_an_answer_nor_an_order_leaves_before_it_is_on_disk(play) -> None:
    async def scene(world: World) -> None:
        orders: list[tuple[str, int]] = []
        call = world.fleet.call

        async def watched(name: str, op: str, args: Any, *, timeout_s: float = 10.0) -> Any:
            if op not in ("term", "attempts", "describe"):
                orders.append((op, world.ledger.uncommitted))
            return await call(name, op, args, timeout_s=timeout_s)

        world.fleet.call = watched
        (lease,) = await request(world, "g")
        assert world.ledger.uncommitted == 0
        await world.settle()
        await world.ask("renew", lease_id=lease.id, for_s=50.0)
        await world.ask("resize", lease_id=lease.id, envelope=Envelope(cpus=0.25, memory_bytes=32 * MIB))
        await world.ask("release", lease_ids=(lease.id,))
        assert [op for op, _ in orders] == ["start", "renew", "resize", "stop", "forget"]
        assert {uncommitted for _, uncommitted in orders} == {0}

    play(scene)


def test_when_the_disk_refuses_a_batch_everybody_in_it_is_told_and_nothing_of_it_happened(play) -> None:
    async def scene(world: World) -> None:
        (kept,) = await world.gang("kept")
        before = world.broker.book.placement.snapshot()
        fill_disk(world, full=True)
        answers = await asyncio.gather(*(request(world, f"g{number}") for number in range(30)), return_exceptions=True)
        assert all(isinstance(answer, Refused) for answer in answers), answers
        await world.settle()
        assert set(world.broker.book.live) == {kept.id}
        assert world.broker.book.placement.snapshot() == before
        assert [spec.lease_id for spec in world.fleet.started] == [kept.id]
        fill_disk(world, full=False)
        await world.after(10.0)
        (lease,) = await request(world, "g0")
        await world.settle()
        assert world.lease(lease.id).state is LeaseState.ACTIVE

    play(scene, LARGE)


def test_a_batch_that_was_lost_leaves_the_same_state_as_a_restart(play) -> None:
    async def scene(world: World) -> None:
        await world.gang("one", members=2)
        await world.gang("events", on_event=True)
        fill_disk(world, full=True)
        for number in range(40):
            with contextlib.suppress(Refused):  # small ones may still have room
                await request(world, f"g{number}")
        fill_disk(world, full=False)
        await world.after(10.0)
        live, busy = dict(world.broker.book.live), set(world.broker.book.busy)
        await world.restart()
        assert (world.broker.book.live, world.broker.book.busy) == (live, busy)

    play(scene, LARGE)
