"""Properties of the whole broker: random play under an independent oracle, and what asking twice must give."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from benchmarks.lease_trust import play as play_world
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide import packing
from tenure.decide.placement import Placement
from tenure.jobs import Command
from tenure.leases import HOLDING, LeaseState
from tenure.ledger import queries
from tenure.resources import Envelope
from tenure.wire import GangMember

from .conftest import MIB, World, node


@pytest.mark.parametrize("seed", [20260, 20261])
def test_random_play_finds_no_over_grant_and_no_other_violation(seed: int) -> None:
    found = play_world(seed, 800)
    assert found["counts"]["grants"] > 50
    assert (found["violations"], found["first"]) == ({}, {})


def test_the_oracle_finds_fractions_that_are_summed_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_choose_fraction", packing._choose_fraction)  # to be undone
    assert play_world(1, 200, summed=True)["violations"]["over_grant"] > 0


SIZES = st.sampled_from([64, 200, 400, 500])
"""MiB: any three find room on the two idle nodes, so that no gang is refused for good."""
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.lists(SIZES, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["again", "release", "wait"]), st.integers(0, 20)),
        st.tuples(st.just("kill"), st.just(0)),
    ),
    max_size=10,
)


@settings(max_examples=12, deadline=None)
@given(STEPS)
def test_asking_twice_gives_the_same_leases_gangs_are_whole_and_events_rebuild_the_fold(steps: list) -> None:
    async def scene(world: World) -> None:
        asked: dict[str, tuple[tuple[GangMember, ...], list[str]]] = {}

        async def ask(gang: str, members: tuple[GangMember, ...]) -> list[str]:
            given_ = {"gang_id": gang, "run_id": "r", "stage": gang, "members": members, "queue_s": 1000.0}
            return [lease.id for lease in await world.ask("request_gang", **given_)]

        for number, (what, argument) in enumerate(steps):
            if what == "ask":
                members = tuple(_member(worker, size) for worker, size in enumerate(argument))
                asked[f"g{number}"] = (members, await ask(f"g{number}", members))
            elif what == "kill":
                await world.restart()
            elif what == "wait":
                await world.after(float(argument))
            elif asked:
                gang = sorted(asked)[argument % len(asked)]
                members, ids = asked[gang]
                if what == "again":
                    assert await ask(gang, members) == ids
                else:
                    await world.ask("release", lease_ids=tuple(ids))
            for _, ids in asked.values():
                states = {world.lease(lease_id).state for lease_id in ids}
                assert not (states & HOLDING and states & {LeaseState.REQUESTED, LeaseState.QUEUED})
            assert _rebuilt(world) == world.broker.book.placement

    with tempfile.TemporaryDirectory() as folder:

        async def all_of_it() -> None:
            world = World(Path(folder), node("a"), node("b"))
            try:
                await world.up()
                await scene(world)
            finally:
                await world.close()

        asyncio.run(all_of_it())


def _member(worker: int, size_mib: int) -> GangMember:
    envelope = Envelope(cpus=0.5, memory_bytes=size_mib * MIB, slot_s=500.0, total_s=500.0)
    return GangMember(worker=worker, envelope=envelope, command=Command(argv=("work",)))


def _rebuilt(world: World) -> Placement:
    """Return the fold of the ledger's events from the first to the last."""
    fold = Placement()
    with world.ledger.reading() as connection:
        for event in queries.events_after(connection, 0, run_id="", max_events=100_000):
            fold.apply(event)
    return fold
