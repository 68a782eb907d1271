"""Answers to goals among trials of a planted world (`test_bottleneck.planted`)."""

from dataclasses import replace

import numpy as np
import pytest

from tenure.decide.goal_answer import answer, percentile_at_most
from tenure.jobs import ServeGoal
from tenure.usage import summarize

from .test_bottleneck import WORK, planted

GOAL = ServeGoal(name="g", p99_s=0.05)


def test_the_answer_is_the_fastest_that_surely_meets_the_goal():
    slow, fast = planted(1), planted(2, in_flight=16)
    late = planted(3, in_flight=16, batch=8)
    late = replace(late, metrics={**late.metrics, "p99_s": summarize([0.06, 0.07])})
    barely = planted(4, in_flight=64, batch=4)
    barely = replace(barely, metrics={**barely.metrics, "p99_s": summarize([0.03, 0.065]), "images_per_s": summarize([1e4])})
    found = answer(GOAL, [slow, fast, late, barely])
    assert (found.best, found.sure, found.ties) == ("t-2", True, ())
    assert {one.trial: one.meets for one in found.standings} == {"t-1": "surely", "t-2": "surely", "t-3": "no", "t-4": "barely"}
    misses = [miss for one in found.standings for miss in one.misses]
    assert [(miss.metric, miss.found, miss.bound) for miss in misses] == [("p99_s", pytest.approx(0.065), 0.05)]


def test_settings_that_cannot_be_told_apart_are_ties_and_the_thriftiest_is_named():
    one, two = planted(1, noise=0.01), planted(2, noise=0.01, transport="http")
    cheaper = replace(two, metrics={**two.metrics, "app_cpu_s_per_image": summarize([1e-5])})
    found = answer(ServeGoal(name="rate"), [one, cheaper])
    assert {found.best, *found.ties} == {"t-1", "t-2"}
    assert found.thriftiest == "t-2"


def test_pictures_in_memory_answer_nobody_who_has_files():
    files, memory = planted(1), planted(2, data="memory", work={**WORK, "load_data": 0.0})
    assert answer(GOAL, [files, memory]).best == "t-1"
    assert answer(GOAL, [memory]).best == "t-2"


def test_where_nothing_meets_the_goal_the_nearest_is_named():
    found = answer(ServeGoal(name="g", p99_s=1e-4), [planted(1), planted(2, batch=8)])
    assert (found.best, found.nearest) == (None, "t-1")
    assert answer(GOAL, []).nearest is None


def test_a_percentiles_upper_end_is_above_the_truth_in_95_of_100_runs():
    rng, above, runs = np.random.default_rng(5), 0, 400
    truth = -np.log(0.01)  # of the exponential distribution
    for _ in range(runs):
        pool = np.sort(rng.exponential(size=2000))
        trial = planted()
        curve = tuple(float(pool[round(place / 1000 * 1999)]) for place in range(1001))
        trial = replace(trial, curves={"latency_s": curve}, metrics={"requests": summarize([500.0] * 4)})
        above += percentile_at_most(trial, 99.0) >= truth
    assert 0.93 * runs <= above <= 0.995 * runs


def test_too_few_requests_never_surely_meet_a_percentile():
    trial = planted(repeats=2)
    few = {**trial.metrics, "requests": summarize([50.0] * 2), "p99_s": summarize([0.01])}
    trial = replace(trial, metrics=few, curves={**trial.curves, "latency_s": tuple(np.linspace(0.001, 0.011, 1001))})
    assert percentile_at_most(trial, 99.0) == float("inf")
    found = answer(GOAL, [trial])
    assert (found.best, found.sure) == (trial.id, False)
