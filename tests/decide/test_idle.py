"""What is idle, what is due for it, and how soon it will be needed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.idle import HORIZON_MIN, MAX_AGE_MIN, MAX_ROWS, MIN_GAPS, Chances, Past, Step, due, is_busy
from tenure.errors import SpecError
from tenure.tenants import Policy
from tenure.usage import Usage


@pytest.mark.parametrize(
    ("cpu_s", "gpu_busy", "busy"),
    [(10.0, 0.0, True), (0.6, 0.0, True), (0.1, 0.0, False), (0.0, 0.0, False), (0.0, 0.5, True), (0.0, 0.005, False)],
)
def test_what_computes_is_busy_on_the_cpu_or_on_the_gpu(cpu_s, gpu_busy, busy):
    assert is_busy(Usage(at_s=100.0, cpu_s=5.0), Usage(at_s=110.0, cpu_s=5.0 + cpu_s, gpu_busy=gpu_busy)) is busy


def test_many_processes_that_sleep_are_idle_and_so_is_memory_that_is_held():
    before = Usage(at_s=0.0, processes=50, memory_bytes=8 << 30, gpu_memory_bytes=23 << 30)
    assert not is_busy(before, Usage(at_s=10.0, processes=50, memory_bytes=9 << 30, gpu_memory_bytes=23 << 30))


def test_two_samples_of_the_same_moment_say_nothing_of_the_cpu():
    assert not is_busy(Usage(at_s=1.0, cpu_s=1.0), Usage(at_s=1.0, cpu_s=2.0))


def test_first_it_is_shrunk_then_warned_of_then_reclaimed():
    policy = Policy(idle_shrink_s=60, idle_warn_s=120, idle_reclaim_s=180)
    steps = [due(policy, idle_s) for idle_s in (0, 59, 60, 119, 120, 179, 180, 1e6)]
    assert steps == [Step.NONE] * 2 + [Step.SHRINK] * 2 + [Step.WARN] * 2 + [Step.RECLAIM] * 2


def test_without_a_policy_nothing_is_ever_done():
    assert due(Policy(), 1e9, 0.0) is Step.NONE


def test_what_will_hardly_be_needed_goes_before_its_time_and_what_will_be_does_not():
    policy = Policy(idle_reclaim_s=3600, idle_chance=0.2)
    assert due(policy, 300, 0.1) is Step.RECLAIM
    assert due(policy, 300, 0.3) is Step.NONE
    assert due(policy, 30, 0.1) is Step.NONE, "not before it was idle for a minute"
    assert due(policy, 300, None) is Step.NONE
    assert due(Policy(idle_reclaim_s=3600), 300, 0.0) is Step.NONE


def minutes(text):
    """Return what a lease teaches over minutes: # busy, . idle."""
    past, taught = Past(), []
    for sign in text:
        taught += past.observe(sign == "#", 0.5)
    return past, taught


def test_a_gap_teaches_in_which_of_its_minutes_demand_was_near():
    _, taught = minutes("#" + "." * 15 + "#")
    assert [needed for _, needed in taught] == [False] * 4 + [True] * 11


def test_a_gap_that_nobody_ended_teaches_only_what_is_certain():
    past, taught = minutes("#" + "." * 15)
    assert not taught
    assert [needed for _, needed in past.left()] == [False] * (15 - HORIZON_MIN)


def test_a_long_gap_teaches_no_more_than_its_first_hours():
    _, taught = minutes("#" + "." * 500 + "#")
    assert len(taught) == MAX_AGE_MIN
    assert not any(needed for _, needed in taught)


@given(st.text(alphabet="#.", max_size=200))
def test_what_is_known_is_finite_and_every_idle_minute_of_an_ended_gap_is_taught(text):
    past, taught = minutes(text)
    assert all(abs(value) < 1e6 for known, _ in taught for value in known)
    assert past.idle_min == len(text) - len(text.rstrip("."))
    if len(text) < MAX_AGE_MIN:
        assert len(taught) == text.rstrip(".").count(".")


def planted(seed, kinds=(3, 60)):
    """Two kinds of leases: some come back after a few minutes, some after about an hour."""
    rng = random.Random(seed)
    for number in range(40):
        past, mean = Past(), kinds[number % 2]
        for _ in range(20):
            length = max(1, round(rng.expovariate(1 / mean)))
            yield number % 2, past, "." * length + "#" * 3


def test_nothing_is_foretold_before_enough_was_seen_and_then_the_kinds_are_told_apart():
    chances, last = Chances(), {}
    assert chances.chance(Past().known(0.5)) is None
    gaps = 0
    for kind, past, text in planted(1):
        for sign in text:
            taught = past.observe(sign == "#", 0.5)
            chances.learn(taught)
            gaps += bool(taught)
            if sign == "." and past.idle_min == 1:
                assert (chances.chance(past.known(0.5)) is None) is (gaps < MIN_GAPS)
                last.setdefault(kind, []).append(chances.chance(past.known(0.5)))
    quick, slow = (sum(values[-100:]) / 100 for values in (last[0], last[1]))
    assert quick > 0.8
    assert slow < 0.4


def test_outcomes_that_are_all_alike_give_a_certain_answer_and_no_error():
    chances = Chances()
    known = Past(idle_min=1).known(0.5)
    for _ in range(MIN_GAPS):
        chances.learn([(known, True)])
    assert chances.chance(known) > 0.95


def test_memory_is_bounded_and_what_was_learnt_last_counts():
    chances = Chances()
    known = Past(idle_min=1).known(0.5)
    for needed in (True, False):
        for _ in range(60):
            chances.learn([(known, needed)] * 1000)
            chances.chance(known)
    assert len(chances._rows) <= MAX_ROWS
    for _ in range(MIN_GAPS):
        chances.learn([(known, False)])
    assert chances.chance(known) < 0.05


def test_a_policy_whose_steps_are_out_of_order_is_refused():
    with pytest.raises(SpecError):
        Policy(idle_shrink_s=100, idle_warn_s=50)
