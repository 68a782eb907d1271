import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.durations import MAX_GROUPS, PER_GROUP, Kind, RunTimes, keep_alive_s
from tenure.errors import SpecError

KIND = Kind("ana", "resnet", 4)
seconds = st.floats(0, 1e7, allow_nan=False)


def seen(runs):
    times = RunTimes()
    for kind, run_s in runs:
        times.observe(kind, run_s)
    return times


def test_nothing_is_foretold_before_a_job_ended():
    assert RunTimes().foretell(KIND) is None


def test_equal_run_times_are_foretold_exactly():
    found = seen([(KIND, 300.0)] * 5).foretell(KIND)
    assert (found.low_s, found.value_s, found.high_s, found.similar) == (300, 300, 300, 5)


@given(st.lists(seconds, min_size=1, max_size=40), st.floats(0.1, 0.9))
def test_an_interval_holds_its_median_and_grows_with_its_level(runs, level):
    times = seen([(KIND, run_s) for run_s in runs])
    narrow, wide = times.foretell(KIND, level=level), times.foretell(KIND, level=(1 + level) / 2)
    assert min(runs) <= wide.low_s <= narrow.low_s <= narrow.value_s <= narrow.high_s <= wide.high_s <= max(runs)


def test_an_unknown_gang_size_is_foretold_from_the_same_program_then_the_tenant_then_everyone():
    times = seen(
        [(Kind("ana", "resnet", 1), 100.0)] * 30 + [(Kind("ana", "bert", 1), 9000.0)] * 30 + [(Kind("ben", "x", 1), 5.0)] * 90
    )
    assert times.foretell(Kind("ana", "resnet", 8)).value_s == 100
    assert times.foretell(Kind("ana", "new", 1)).value_s in (100, 9000)
    assert times.foretell(Kind("new", "new", 1)).value_s == 5


def test_a_few_of_its_own_move_a_forecast_and_many_decide_it():
    crowd = [(Kind("ana", "bert", 1), 1000.0)] * 100
    assert seen([*crowd, (KIND, 10.0)]).foretell(KIND).value_s == 1000
    assert seen([*crowd, *[(KIND, 10.0)] * 40]).foretell(KIND).value_s == 10


def test_an_interval_keeps_its_chance_when_jobs_come_in_batches_of_a_kind():
    rng = np.random.default_rng(1)
    times, inside = RunTimes(), []
    for _ in range(150):
        level = rng.normal(7, 2)
        for run_s in np.exp(level + rng.normal(0, 0.3, 20)).tolist():
            found = times.foretell(KIND)
            if found is not None:
                inside.append(found.low_s <= run_s <= found.high_s)
            times.observe(KIND, run_s)
    assert 0.75 <= np.mean(inside[500:]) <= 0.85


def test_memory_is_bounded():
    times = RunTimes()
    for i in range(MAX_GROUPS + 50):
        times.observe(Kind("ana", f"p{i}", 1), 1.0)
    for _ in range(PER_GROUP + 50):
        times.observe(KIND, 1.0)
    assert len(times._groups) == MAX_GROUPS
    assert max(len(group) for group in times._groups.values()) == PER_GROUP


@pytest.mark.parametrize("run_s", [-1.0, math.nan, math.inf])
def test_a_run_time_that_is_none_is_refused(run_s):
    with pytest.raises(SpecError, match="run time"):
        RunTimes().observe(KIND, run_s)


@given(
    st.lists(st.one_of(seconds, st.just(math.inf)), max_size=30),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    st.floats(1, 1e4),
    st.floats(2, 10),
)
def test_a_keep_alive_never_costs_more_than_its_bound_whatever_gaps_come(past, future, restart_s, at_most):
    timeout = keep_alive_s(past, restart_s=restart_s, at_most=at_most)
    paid = sum(gap if gap <= timeout else timeout + restart_s for gap in future)
    knowing = sum(min(gap, restart_s) for gap in future)
    assert paid <= at_most * knowing * (1 + 1e-9)


def test_gaps_just_longer_than_a_restart_are_waited_for_and_hopeless_ones_are_not():
    assert keep_alive_s([70.0] * 50, restart_s=60) == 70
    assert keep_alive_s([math.inf] * 50, restart_s=60) == 30
    assert keep_alive_s([], restart_s=60) == 60


def test_a_keep_alive_without_a_bound_is_refused():
    with pytest.raises(SpecError, match="at_most"):
        keep_alive_s([1.0], restart_s=60, at_most=1.5)
