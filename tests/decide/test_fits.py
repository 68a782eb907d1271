"""Fits: planted truths are found inside the intervals, and thin data is called thin."""

from __future__ import annotations

import numpy as np
import pytest

from tenure.decide.fits import fit_line, half_width, pool, predict_mean, rounds_to_goal
from tenure.errors import SpecError
from tenure.usage import summarize


def planted(rng, noise):
    """A curve with known parameters, and the first round at which its noiseless form is at 0.95."""
    a, c, r0 = rng.uniform(0.0, 0.03), rng.uniform(0.5, 1.5), rng.uniform(0.5, 5.0)
    b = rng.uniform(0.5, 0.9) * (r0 + 1) ** c
    truth = (b / (0.05 - a)) ** (1 / c) - r0
    seen = max(8, int(truth * rng.uniform(0.45, 0.9)))
    rounds = np.arange(1, seen + 1)
    accuracy = 1 - a - b * (rounds + r0) ** -c + rng.normal(0, noise, seen)
    return rounds, accuracy, truth


@pytest.mark.parametrize("noise", [0.0005, 0.003])
def test_the_interval_of_rounds_holds_the_planted_truth_in_four_of_five_cases(noise):
    rng = np.random.default_rng(7)
    inside = cases = 0
    for _ in range(60):
        rounds, accuracy, truth = planted(rng, noise)
        if truth < 9 or truth > 3000 or accuracy.max() >= 0.95:
            continue
        found = rounds_to_goal(rounds, accuracy, 0.95, max_rounds=1000)
        cases += 1
        inside += found.rounds.low <= np.ceil(truth) <= found.rounds.high
    assert cases >= 20
    assert inside / cases >= 0.8


def test_a_curve_that_reached_the_goal_is_read_off_exactly():
    found = rounds_to_goal([1, 2, 3, 4], [0.5, 0.9, 0.96, 0.94], 0.95, max_rounds=100)
    assert found.reached
    assert (found.rounds.low, found.rounds.value, found.rounds.high) == (3, 3, 3)
    assert found.thin == ""


def test_few_evaluations_are_called_thin_and_ask_for_more_rounds():
    found = rounds_to_goal([1, 2, 3], [0.5, 0.6, 0.7], 0.95, max_rounds=100)
    assert "3 evaluations" in found.thin
    assert found.more_rounds > 3


def test_a_far_extrapolation_is_called_thin():
    rounds = np.arange(1, 11)
    found = rounds_to_goal(rounds, 1 - 0.8 * rounds**-0.5, 0.95, max_rounds=1000)
    assert "more than 3 times" in found.thin
    assert 10 < found.more_rounds <= 40


def test_a_flat_curve_does_not_promise_the_goal():
    rounds = np.arange(1, 41)
    accuracy = 0.8 - 0.5 * np.exp(-rounds / 3)
    found = rounds_to_goal(rounds, accuracy, 0.95, max_rounds=1000)
    assert found.thin
    assert found.rounds.high >= 1000


def test_curves_of_unequal_length_are_refused():
    with pytest.raises(SpecError, match="as many rounds"):
        rounds_to_goal([1, 2], [0.1], 0.9, max_rounds=10)


def test_pooled_groups_equal_one_group():
    rng = np.random.default_rng(1)
    values = rng.normal(5, 1, 12)
    whole, parts = summarize(list(values)), pool([summarize(list(values[:5])), summarize(list(values[5:]))])
    assert (parts.n, parts.minimum, parts.maximum) == (whole.n, whole.minimum, whole.maximum)
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.sd == pytest.approx(whole.sd)


def test_a_new_mean_falls_into_the_interval_as_often_as_promised():
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(300):
        prediction = predict_mean([summarize(list(rng.normal(10, 2, 6)))])
        inside += prediction.low <= rng.normal(10, 2, 6).mean() <= prediction.high
    assert 0.8 <= inside / 300 <= 0.97


def test_one_repeat_gives_a_wide_interval_instead_of_none():
    assert half_width([summarize([4.0])]) == pytest.approx(1.0)


def test_a_line_finds_cost_per_call_and_per_image():
    line = fit_line([1, 8, 32], [0.0021, 0.0091, 0.0331])
    assert line.intercept == pytest.approx(0.0011)
    assert line.slope == pytest.approx(0.001)
    assert line.predict(16).value == pytest.approx(0.0171)
    with pytest.raises(SpecError, match="two points"):
        fit_line([1, 1], [1, 2])
