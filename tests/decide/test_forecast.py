import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.forecast import EXPERTS, Forecaster, nodes_needed, rehearse, upper
from tenure.errors import SpecError

demands = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=60)


def folded(values, *, step_s=60.0, lead_s=300.0, **options):
    forecaster = Forecaster(step_s=step_s, lead_s=lead_s, **options)
    for i, value in enumerate(values):
        forecaster.observe(i * step_s, float(value))
    return forecaster


@given(demands, st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_quantiles_are_ordered_and_never_negative(values, shares):
    forecaster = folded(values)
    found = [forecaster.quantile(share) for share in sorted(shares)]
    assert found[0] >= 0
    assert all(a <= b * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(found))
    made = forecaster.forecast()
    assert 0 <= made.low <= made.center * (1 + 1e-9)
    assert made.center <= made.high * (1 + 1e-9)
    assert made.capacity >= 0


@given(demands)
@settings(max_examples=30, deadline=None)
def test_the_same_observations_give_the_same_forecast(values):
    assert folded(values).forecast() == folded(values).forecast()


@given(demands, st.sampled_from([0.25, 4.0, 1024.0]))
@settings(max_examples=30, deadline=None)
def test_another_unit_of_demand_gives_the_same_forecast_in_that_unit(values, scale):
    plain, scaled = folded(values).forecast(), folded([v * scale for v in values]).forecast()
    assert scaled.capacity == pytest.approx(plain.capacity * scale, rel=1e-6, abs=1e-9)
    assert scaled.center == pytest.approx(plain.center * scale, rel=1e-6, abs=1e-9)


@given(st.one_of(st.just(0.0), st.floats(1e-6, 1e9)), st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_a_constant_demand_is_foretold_exactly_and_never_missed(value, n):
    forecaster = folded([value] * n)
    made = forecaster.forecast()
    assert made.center == pytest.approx(value, rel=1e-6)
    assert value <= made.capacity <= value * (1 + 1e-6)
    assert forecaster.misses == 0


def test_misses_keep_to_the_risk_while_demand_drifts_and_jumps():
    rng = np.random.default_rng(1)
    level = np.concatenate([np.linspace(20, 60, 1500), np.full(1500, 15), np.linspace(15, 90, 1500)])
    demand = rng.poisson(level)
    forecaster = folded(demand, risk=0.05)
    assert forecaster.judged == len(demand) - forecaster.lead
    assert 0.02 <= forecaster.misses / forecaster.judged <= 0.065


def test_less_is_held_than_the_peak_where_demand_falls_for_good():
    rng = np.random.default_rng(2)
    forecaster = folded(rng.poisson(np.concatenate([np.full(300, 100), np.full(900, 10)])))
    assert forecaster.capacity() < 40


def test_memory_does_not_grow_with_the_observations():
    rng = np.random.default_rng(3)
    forecaster, sizes = Forecaster(step_s=3600, lead_s=3600), []
    for i, value in enumerate(rng.poisson(10, 6000).tolist()):
        forecaster.observe(i * 3600.0, value)
        if i in (3000, 5999):
            sizes.append(len(pickle.dumps(forecaster)))
    assert sizes[1] <= sizes[0] * 1.05


def test_a_forecast_can_be_kept_and_taken_up_again():
    values = np.random.default_rng(4).poisson(9, 80)
    half = pickle.loads(pickle.dumps(folded(values[:40])))
    for i, value in enumerate(values[40:].tolist(), start=40):
        half.observe(i * 60.0, value)
    assert half.forecast() == folded(values).forecast()


def test_a_rehearsal_gives_each_step_what_was_foretold_a_lead_before():
    series = [(i * 60.0, float(i % 7)) for i in range(100)]
    steps = rehearse(Forecaster(step_s=60, lead_s=300), series)
    assert [(s.t_s, s.demand) for s in steps] == series[5:]
    assert steps[40].foretold == folded([d for _, d in series[:41]]).forecast()


def planted(period, seed, n=480):
    return np.random.default_rng(seed).poisson(10 * (1 + 0.6 * np.sin(2 * np.pi * np.arange(n) / period)))


def test_a_planted_day_is_found_and_makes_the_forecast_better():
    values = planted(24, 5)
    forecaster = folded(values, step_s=3600, lead_s=6 * 3600)
    assert forecaster.season_s == 86_400
    assert any(name.startswith("season") and weight > 0.2 for name, weight in forecaster.weights.items())
    without = folded(values, step_s=3600, lead_s=6 * 3600, periods_s=(604_800.0,))
    assert sum(without.weights.values()) == pytest.approx(1)


def test_a_period_nobody_named_is_found():
    assert folded(planted(17, 6, n=600), step_s=3600, lead_s=3600).season_s == pytest.approx(17 * 3600, rel=0.06)


def test_a_season_that_ends_is_no_longer_used():
    rng = np.random.default_rng(7)
    values = np.concatenate([planted(24, 7), rng.poisson(10, 24 * 200)])
    assert folded(values, step_s=3600, lead_s=3600).season_s is None


def test_no_season_is_found_in_noise():
    rng = np.random.default_rng(8)
    series = [
        *(rng.poisson(10, 480) for _ in range(8)),
        *(np.abs(100 + np.cumsum(rng.normal(0, 3, 480))) for _ in range(8)),
        *(rng.poisson(3, 480) + (rng.random(480) < 0.05) * rng.poisson(60, 480) for _ in range(8)),
    ]
    found = [folded(values, step_s=3600, lead_s=3600).season_s is not None for values in series]
    assert sum(found) <= 1


def test_a_series_shorter_than_two_days_uses_no_day():
    assert folded(planted(24, 9, n=40), step_s=3600, lead_s=3600).season_s is None


def test_steps_left_out_are_not_judged():
    forecaster = Forecaster(step_s=60, lead_s=60)
    for i in (0, 1, 2, 10, 11):
        forecaster.observe(i * 60.0, 5.0)
    assert forecaster.judged == 3
    assert forecaster.forecast().observations == 5


def test_capacity_lies_on_whole_units():
    forecaster = folded(np.random.default_rng(10).poisson(4, 200) * 0.5, unit=0.5)
    assert (forecaster.capacity() / 0.5) % 1 == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("step_s", "lead_s", "risk"), [(0, 60, 0.01), (60, 0, 0.01), (1, 5000, 0.01), (60, 60, 0), (60, 60, 0.6)]
)
def test_a_forecast_that_makes_no_sense_is_refused(step_s, lead_s, risk):
    with pytest.raises(SpecError, match="a forecast needs"):
        Forecaster(step_s=step_s, lead_s=lead_s, risk=risk)


def test_wrong_observations_are_refused_and_change_nothing():
    forecaster = folded([1.0, 2.0, 3.0])
    before = forecaster.forecast()
    for t_s, demand in [(60.0, 1.0), (600.0, -1.0), (600.0, math.nan), (600.0, math.inf)]:
        with pytest.raises(SpecError):
            forecaster.observe(t_s, demand)
    assert forecaster.forecast() == before
    with pytest.raises(SpecError, match="nothing observed"):
        Forecaster(step_s=1, lead_s=1).forecast()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.floats(0.001, 0.5))
@settings(max_examples=100, deadline=None)
def test_the_upper_bound_grows_as_the_risk_falls_and_ignores_the_order(errors, risk):
    x = np.array(errors)
    assert upper(x, risk) <= upper(x, risk / 2) + 1e-9
    assert upper(x, risk) == upper(x[::-1].copy(), risk)


def test_the_upper_bound_is_exceeded_as_often_as_the_risk_says():
    rng = np.random.default_rng(11)
    missed = [rng.exponential() > upper(rng.exponential(size=60), 0.01) for _ in range(4000)]
    assert 0.004 <= np.mean(missed) <= 0.018


def test_nodes_cover_the_capacity_and_some_may_go():
    made = folded([95.0] * 50).forecast()
    assert nodes_needed(made, node_capacity=10, held=7) == 3
    assert nodes_needed(made, node_capacity=10, held=12) == -2
    assert nodes_needed(made, node_capacity=95) == 1
    assert nodes_needed(made, node_capacity=1000, held=3, keep=2) == -1
    with pytest.raises(SpecError, match="node_capacity"):
        nodes_needed(made, node_capacity=0)


def test_every_forecast_has_a_name():
    weights = folded([1.0] * 20).weights
    assert list(weights)[: len(EXPERTS)] == list(EXPERTS)
