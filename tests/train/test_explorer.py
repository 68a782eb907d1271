from __future__ import annotations

import dataclasses
import hashlib

import pytest

from .explorer import Process, Run, Schedule
from .floats import Floats
from .mutants import MUTANTS
from .oracle import Oracle
from .replacement import MAX_PERIODS, idle_periods


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def digest(run: Run) -> str:
    told = repr([(p.name, p.at_s, p.worker, p.fence, p.content) for p in run.publications])
    return hashlib.sha256(told.encode()).hexdigest()


def test_a_schedule_replays_to_the_last_operation() -> None:
    for seed in range(5):
        schedule = Schedule.draw(seed)
        first, second = (Run(schedule, Floats(schedule.nan_round)).go() for _ in range(2))
        assert (first.steps, digest(first)) == (second.steps, digest(second))


@pytest.mark.parametrize("first", range(0, 250, 50))
def test_no_interleaving_has_a_double_effect_or_a_missing_one(oracle: Oracle, first: int) -> None:
    for seed in range(first, first + 50):
        schedule = Schedule.draw(seed)
        _, wrong = oracle.explore(schedule)
        assert not wrong, f"{wrong[0]}\nreplay with Oracle().explore({schedule})"


FOUND = {
    17814: "a slow start of a generation moved the failure of the next one away",
    26206: "the same, with files that rot",
    15191: "a power cut took the last round's record, after the result was there",
    17922: "a torn slice of an earlier round kept the last one from its result",
}
"""Schedules that did harm once; what they find depends on the protocol, so that a change may make them harmless."""


@pytest.mark.parametrize("seed", FOUND)
def test_what_exploring_once_found_stays_mended(oracle: Oracle, seed: int) -> None:
    assert not oracle.explore(Schedule.draw(seed))[1], FOUND[seed]


@pytest.mark.parametrize("seed", [1, 2])
def test_no_single_preemption_of_a_small_training_does_harm(oracle: Oracle, seed: int) -> None:
    """All of them: whoever goes on falls behind the other, after each operation in turn."""
    small = Schedule(seed=seed, shards=3, rounds=1, policy="pct", preempt_at=(-1,))
    runs = {}
    slow = {"operation_s": 0.02}  # two processes seldom sleep at the same time
    for at in range(oracle.explore(small, **slow)[0].steps):
        schedule = dataclasses.replace(small, preempt_at=(at,))
        run, wrong = oracle.explore(schedule, **slow)
        assert not wrong, f"{wrong[0]}\nreplay with Oracle().explore({schedule}, **{slow})"
        runs[digest(run)] = at
    assert len(runs) > 10, "hardly any preemption changed the run"


@pytest.mark.parametrize("how", ["before", "after", "torn"])
def test_no_single_death_in_a_small_training_does_harm(oracle: Oracle, how: str) -> None:
    """All of them: whoever goes on dies at each operation in turn."""
    small = Schedule(seed=1, shards=3, rounds=1)

    for at in range(1, oracle.explore(small)[0].steps + 1):

        def die(run: Run, process: Process, at: int = at) -> str:
            return how if run.steps == at else ""

        run, wrong = oracle.explore(small, on_point=die)
        assert run.deaths == 1
        assert not wrong, f"{wrong[0]}, after a death {how} operation {at} of {small}"


def test_interleavings_hold_all_that_may_happen(oracle: Oracle) -> None:
    """The control of the explorer itself: deaths, zombies, refused grants, double starts, rot and blackouts do occur."""
    runs = [oracle.explore(Schedule.draw(seed))[0] for seed in range(40)]
    assert sum(run.deaths for run in runs) > 100
    assert sum(run.zombies for run in runs) > 10
    assert sum(run.double_starts for run in runs) > 10
    assert any("StaleFence" in text for run in runs for text in run.failures)
    assert any("superseded" in outcome.why for run in runs for outcome in run.outcomes)
    assert any(run.rotten for run in runs)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_protocol_without_one_of_its_protections_is_noticed(oracle: Oracle, mutant: str) -> None:
    for seed in range(200):
        schedule = Schedule.draw(seed)
        oracle.expected(schedule)
        with MUTANTS[mutant]():
            _, wrong = oracle.explore(schedule)
        if wrong:
            return
    raise AssertionError(f"{mutant}: 200 schedules, and nothing was noticed")


def test_a_dead_turn_holder_or_claimer_is_replaced_within_a_claim_period() -> None:
    idle = [idle_periods(seed) for seed in range(15)]
    found = [periods for periods in idle if periods is not None]
    assert len(found) > 10
    assert max(found) <= MAX_PERIODS
