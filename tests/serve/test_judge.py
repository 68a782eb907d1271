"""A run is VALID unless its generator was in the way, planted in each way it can be; a goal is met by what is proven."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.verdicts import LatencyGoal, parse_goal
from tenure.serve.load.judge import Verdict, judge, probe_of
from tenure.serve.load.records import Outcome, OwnUse, Record

TIMEOUT_S = 10.0
IDLE = OwnUse(wall_s=10.0, cpu_s=2.0, max_in_flight=4096)


def run(*, count=2_000, rate=200.0, delay_s=0.0, service_s=0.01, bad=None):
    """Return the record of a run; delay_s and service_s may be columns. bad: outcome to rows."""
    due = np.arange(count) / rate
    issued = due + delay_s
    ended = issued + service_s
    outcome = np.zeros(count, dtype=np.uint8)
    for kind, rows in (bad or {}).items():
        outcome[rows] = kind
        if kind == Outcome.DROPPED:
            issued[rows] = ended[rows] = np.nan
    return Record(due, issued, ended, outcome)


def test_a_healthy_run_is_valid_and_no_false_alarm_comes_in_50():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(100, 3_000))
        record = run(
            count=count,
            delay_s=rng.exponential(0.0004, count) + (rng.random(count) < 0.003) * 0.02,  # 20 ms off the CPU now and then
            service_s=rng.lognormal(-5, 0.6, count),
        )
        verdict = judge(record, timeout_s=TIMEOUT_S, own=IDLE)
        assert verdict.valid, verdict.reasons
        assert verdict.word == "VALID"


@pytest.mark.parametrize(
    ("record", "own", "reason"),
    [
        (
            run(delay_s=np.where(np.arange(2_000) % 50, 0.0, 0.02)),
            IDLE,
            "40 of 2,000 requests were issued more than 5 ms after",
        ),
        (run(delay_s=0.3, service_s=1.0), IDLE, "more than 65 ms after"),
        (
            run(delay_s=np.where(np.arange(2_000) == 7, -0.05, 0.0)),
            IDLE,
            "1 of 2,000 requests were issued more than 1 ms before",
        ),
        (run(bad={Outcome.DROPPED: [3]}), IDLE, "left out 1 of 2,000 due requests"),
        (run(), OwnUse(wall_s=10.0, cpu_s=9.5), "used 95% of the 1 core"),
        (run(), OwnUse(wall_s=10.0, cpu_s=1.0, max_in_flight=2, full_s=2.5), "for 2.5 s of 10 s .* 2 were in flight"),
    ],
)
def test_a_generator_in_the_way_makes_a_run_invalid_and_is_told_why(record, own, reason):
    verdict = judge(record, timeout_s=TIMEOUT_S, own=own)
    assert verdict.word == "INVALID"
    assert len(verdict.reasons) == 1
    assert re.search(reason, verdict.reasons[0]), verdict.reasons


def test_delays_that_no_percentile_feels_are_no_reason():
    slow = run(delay_s=0.02, service_s=0.5)  # 4 % of every latency
    assert judge(slow, timeout_s=TIMEOUT_S, own=IDLE).valid
    assert not judge(run(delay_s=0.02, service_s=0.01), timeout_s=TIMEOUT_S, own=IDLE).valid
    frozen = np.where(np.arange(2_000) % 200 < 50, 0.9, 0.001)
    stalled = run(delay_s=np.where(frozen > 0.1, 0.03, 0.0), service_s=frozen)  # late only where it hardly counts
    assert judge(stalled, timeout_s=TIMEOUT_S, own=IDLE).valid


def test_a_server_that_fails_quickly_does_not_meet_a_goal():
    goal = parse_goal("p99<50ms")
    failing = judge(run(service_s=0.001, bad={Outcome.FAILED: slice(0, 100)}), timeout_s=TIMEOUT_S, own=IDLE, goal=goal)
    assert failing.valid
    assert failing.answer.answer == "missed"
    assert failing.answer.over == 100
    assert failing.percentiles["p99"].value_s == TIMEOUT_S
    assert any("100 failed" in note for note in failing.notes)
    assert judge(run(service_s=0.001), timeout_s=TIMEOUT_S, own=IDLE, goal=goal).answer.answer == "met"


def test_wrong_timed_out_and_late_answers_all_count_against_the_goal():
    bad = {Outcome.WRONG: [1], Outcome.TIMED_OUT: [2, 3]}
    record = run(service_s=np.where(np.arange(2_000) < 10, 0.06, 0.01), bad=bad)
    verdict = judge(record, timeout_s=TIMEOUT_S, own=IDLE, goal=parse_goal("p99<50ms"))
    assert verdict.answer.over == 10
    assert any("1 wrong, 2 timed out" in note for note in verdict.notes)


def test_a_short_run_leaves_a_goal_open_and_says_how_much_is_missing():
    verdict = judge(run(count=300), timeout_s=TIMEOUT_S, own=IDLE, goal=parse_goal("p99<50ms"))
    assert (verdict.answer.answer, verdict.answer.missing) == ("open", 159)
    assert any("p99 is not bounded from above by 300 requests" in note for note in verdict.notes)


def test_latencies_that_hang_together_are_told_where_they_change_the_answer():
    slow = np.zeros(2_000)
    slow[500:508] = 0.1
    verdict = judge(run(service_s=0.01 + slow), timeout_s=TIMEOUT_S, own=IDLE, goal=parse_goal("p99<50ms"))
    assert verdict.answer.answer == "met"
    assert verdict.cautious.answer == "open"
    assert any("the goal is open, not met" in note for note in verdict.notes)
    probe = probe_of(verdict, 200.0)
    assert (probe.requests, probe.over, probe.invalid) == (2_000, 8, "")
    assert probe.clustering > 4


def test_an_invalid_run_counts_for_nothing_in_a_search():
    verdict = judge(run(delay_s=1.0), timeout_s=TIMEOUT_S, own=IDLE, goal=parse_goal("p99<50ms"))
    assert "late" in probe_of(verdict, 100.0).invalid
    assert probe_of(judge(run(), timeout_s=TIMEOUT_S, own=IDLE), 100.0).invalid


def test_an_empty_run_is_invalid():
    verdict = judge(Record([], [], [], []), timeout_s=TIMEOUT_S, own=IDLE, goal=parse_goal("p99<50ms"))
    assert verdict.word == "INVALID"
    assert "run for longer" in verdict.reasons[0]
    assert probe_of(verdict, 1.0).invalid


def test_a_server_that_is_down_is_no_fault_of_the_generator():
    verdict = judge(run(service_s=0.0, bad={Outcome.FAILED: slice(None)}), timeout_s=TIMEOUT_S, own=IDLE)
    assert verdict.valid
    assert any("no request was answered" in note for note in verdict.notes)


def test_what_is_not_known_of_the_generator_is_said():
    assert any("not known" in note for note in judge(run(), timeout_s=TIMEOUT_S).notes)


def test_a_goal_beyond_the_timeout_counts_what_was_given_up_as_over_and_says_so():
    goal = LatencyGoal(percent=99, limit_s=TIMEOUT_S)
    verdict = judge(run(bad={Outcome.TIMED_OUT: slice(0, 60)}), timeout_s=TIMEOUT_S, own=IDLE, goal=goal)
    assert (verdict.answer.answer, verdict.answer.over) == ("missed", 60)
    assert any("given up after 10 s" in note for note in verdict.notes)
    assert judge(run(), timeout_s=TIMEOUT_S, own=IDLE, goal=goal).answer.answer == "met"


@given(st.integers(1, 400), st.integers(0, 2**32), st.floats(0.001, 9.0))
@settings(deadline=None)
def test_a_verdict_comes_of_any_record_and_survives_json(count, seed, limit_s):
    rng = np.random.default_rng(seed)
    due = np.sort(rng.random(count))
    issued = due + rng.exponential(0.01, count)
    ended = issued + rng.exponential(0.05, count)
    outcome = rng.choice(5, count, p=[0.8, 0.05, 0.05, 0.05, 0.05]).astype(np.uint8)
    issued[outcome == Outcome.DROPPED] = np.nan
    ended[outcome >= Outcome.TIMED_OUT] = np.nan
    record = Record(due, issued, ended, outcome)
    verdict = judge(record, timeout_s=TIMEOUT_S, own=IDLE, goal=LatencyGoal(percent=99, limit_s=limit_s))
    assert verdict.valid == (not verdict.reasons)
    assert verdict.valid or Outcome.DROPPED in outcome or "late" in verdict.reasons[0]
    assert verdict.answer.over >= int((outcome != Outcome.OK).sum())
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict
