"""Intervals hold the truth as often as they say, whatever the noise; what pairs is kept paired, and nothing vanishes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.intervals import Interval, paired_ratio, typical, unpaired_ratio
from tenure.errors import SpecError

POSITIVE = st.floats(0.01, 100.0)


def pairs(least=2, most=25):
    return st.lists(st.tuples(POSITIVE, POSITIVE), min_size=least, max_size=most)


def split(both):
    return [a for a, _ in both], [b for _, b in both]


@given(pairs())
@settings(deadline=None)
def test_the_ratio_turned_round_is_the_interval_turned_round(both):
    values, base = split(both)
    there, back = paired_ratio(values, base), paired_ratio(base, values)
    assert there.low <= there.value <= there.high
    assert back.value == pytest.approx(1 / there.value)
    assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low), rel=1e-6)
    assert back.standard_error == pytest.approx(there.standard_error)


@given(pairs(), POSITIVE, POSITIVE)
@settings(deadline=None)
def test_units_do_not_matter(both, up, down):
    values, base = split(both)
    found, scaled = paired_ratio(values, base), paired_ratio([v * up for v in values], [b * down for b in base])
    assert scaled.value == pytest.approx(found.value * up / down, rel=1e-6)
    assert scaled.high / scaled.low == pytest.approx(found.high / found.low, rel=1e-5)


@given(pairs(least=5), st.floats(0.5, 0.99), st.floats(0.5, 0.99))
@settings(deadline=None)
def test_more_certainty_is_never_narrower_above_the_repeats_that_ranks_need(both, one, other):
    values, base = split(both)
    less, more = sorted((one, other))
    needed = 2.0 ** (1 - len(both)) <= 1.5 * (1 - more)  # both by ranks, none by Student's t
    narrow, wide = paired_ratio(values, base, level=less), paired_ratio(values, base, level=more)
    if needed:
        assert wide.low <= narrow.low * (1 + 1e-9)
        assert wide.high >= narrow.high * (1 - 1e-9)


@given(st.lists(POSITIVE, min_size=2, max_size=25), POSITIVE)
def test_without_noise_the_planted_ratio_comes_back(base, planted):
    found = paired_ratio([planted * value for value in base], base)
    assert (found.low, found.value, found.high, found.mean) == pytest.approx((planted,) * 4)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


@given(pairs(least=4, most=12), st.data())
@settings(deadline=None)
def test_a_repeat_that_was_not_measured_is_left_out_on_both_sides_and_counted(both, data):
    place = data.draw(st.integers(0, len(both) - 1))
    values, base = split(both)
    values[place] = math.nan
    found = paired_ratio(values, base)
    assert (found.repeats, found.dropped) == (len(both) - 1, 1)
    rest = paired_ratio(values[:place] + values[place + 1 :], base[:place] + base[place + 1 :])
    assert (found.low, found.value, found.high) == (rest.low, rest.value, rest.high)


def noise(rng, kind, repeats, settings_=6):
    """Return the logarithms of two settings that ran interleaved among others, and pair by repeat."""
    slots = repeats * settings_
    state, own = np.zeros(slots), rng.normal(0, 0.05, slots)
    if kind == "drift":
        state = rng.uniform(-0.3, 0.3) * np.linspace(0, 1, slots)
    if kind == "autocorrelated":
        shocks = rng.normal(0, 0.15 * math.sqrt(1 - 0.81), slots)
        for slot in range(1, slots):
            state[slot] = 0.9 * state[slot - 1] + shocks[slot]
    if kind == "outliers":
        own += np.where(rng.random(slots) < 0.08, np.log1p(rng.exponential(0.5, slots)), 0)
    places = [rng.permutation(settings_)[:2] + repeat * settings_ for repeat in range(repeats)]
    both = np.array([state[place] + own[place] for place in places])
    return both[:, 0], both[:, 1]


@pytest.mark.parametrize("kind", ["log_normal", "drift", "autocorrelated", "outliers"])
def test_95_percent_intervals_hold_the_planted_ratio_in_about_95_percent_of_runs(kind):
    rng = np.random.default_rng(7)
    held = 0
    for run in range(600):
        one, other = noise(rng, kind, 5 + run % 16)
        found = paired_ratio(np.exp(one + math.log(1.3)), np.exp(other))
        held += found.low <= 1.3 <= found.high
    assert 0.93 <= held / 600 <= 0.99


def test_pairs_tell_more_than_two_heaps_where_the_machine_drifts():
    rng = np.random.default_rng(3)
    widths = []
    for _ in range(40):
        one, other = noise(rng, "autocorrelated", 20)
        found = [how(np.exp(one + 0.3), np.exp(other)) for how in (paired_ratio, unpaired_ratio)]
        assert found[0].differs
        widths.append([math.log(interval.high / interval.low) for interval in found])
    paired, heaps = np.median(widths, axis=0)
    assert paired < 0.8 * heaps
    assert not Interval(value=1, low=0.9, high=1.1, level=0.95, mean=1, standard_error=0.1, repeats=5).differs


def test_an_outlier_in_20_does_not_widen_the_interval_as_it_does_students():
    rng = np.random.default_rng(5)
    base = np.exp(rng.normal(0, 0.02, 20))
    values = np.exp(rng.normal(0, 0.02, 20))
    before = paired_ratio(values, base)
    values[7] *= 3
    after = paired_ratio(values, base)
    assert after.high / after.low < (before.high / before.low) ** 1.5
    assert unpaired_ratio(values, base).high > unpaired_ratio(values, base).low * 1.2


def test_repeats_that_hang_together_widen_the_interval():
    wave = 0.05 * np.sin(np.arange(20) / 3)
    shuffled = wave[np.random.default_rng(1).permutation(20)]
    together, apart = typical(np.exp(wave)), typical(np.exp(shuffled))
    assert together.correlation > 0.5 > apart.correlation
    assert together.high / together.low > apart.high / apart.low


def test_few_repeats_fall_back_on_students_t():
    found = paired_ratio([1.0, 1.2, 1.1], [1.0, 1.0, 1.0])
    logs = np.log([1.0, 1.2, 1.1])
    half = 4.302652729911275 * logs.std(ddof=1) / math.sqrt(3) * math.sqrt((1 + found.correlation) / (1 - found.correlation))
    assert found.high == pytest.approx(math.exp(logs.mean() + half))


def test_many_repeats_are_no_different_from_few():
    rng = np.random.default_rng(2)
    values = np.exp(rng.normal(0.2, 0.1, 61))
    base = np.ones(61)
    counted, normal = paired_ratio(values[:60], base[:60]), paired_ratio(values, base)
    assert normal.low == pytest.approx(counted.low, rel=0.02)
    assert normal.high == pytest.approx(counted.high, rel=0.02)


@pytest.mark.parametrize(
    ("values", "base", "level", "message"),
    [
        ([1.0, 2.0], [1.0], 0.95, "found 2 and 1"),
        ([1.0], [1.0], 0.95, "2 to 1000 measured repeats; found 1"),
        ([1.0, math.nan], [1.0, 1.0], 0.95, "found 1"),
        ([1.0] * 1001, [1.0] * 1001, 0.95, "found 1001"),
        ([1.0, 0.0], [1.0, 1.0], 0.95, "values must be above 0 and finite .* repeat 1 has 0.0"),
        ([1.0, 1.0], [math.inf, 1.0], 0.95, "base must be above 0"),
        ([1.0, 1.0], [1.0, 1.0], 1.0, "level lies between"),
        ([[1.0], [1.0]], [1.0, 1.0], 0.95, "one number per repeat"),
    ],
)
def test_what_makes_no_interval_is_refused(values, base, level, message):
    with pytest.raises(SpecError, match=message):
        paired_ratio(values, base, level=level)
    if level == 0.95 and "found 2 and 1" not in message and "shape" not in message and "1001" not in message:
        with pytest.raises(SpecError):
            unpaired_ratio(values, base)
