import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.experiments.replay_outlook import demand_steps, outlook
from tenure.experiments.simulator import TraceJob
from tenure.resources import Envelope


def job(number, submit_s, duration_s, *, gpus=1.0, members=1, tenant="ana"):
    envelope = Envelope(cpus=2.0, memory_bytes=1 << 30, gpus=gpus, slot_s=3600.0, total_s=36000.0)
    return TraceJob(
        id=f"j{number}", tenant=tenant, submit_s=submit_s, envelope=envelope, members=members, duration_s=duration_s
    )


def looked(jobs, **options):
    return outlook(jobs, **{"gpus": True, "node_units": 8.0, "restart_s": 60.0, **options})


def daily(days=12, *, tenants=("ana", "ben")):
    """Jobs of 30 minutes, many by day, few by night."""
    rng, jobs = np.random.default_rng(1), []
    for hour in range(24 * days):
        for _ in range(rng.poisson(12 if 8 <= hour % 24 < 18 else 1)):
            jobs.append((hour * 3600 + rng.uniform(0, 3600), rng.lognormal(7.5, 0.5), str(rng.choice(tenants))))
    return [job(i, at_s, run_s, tenant=tenant) for i, (at_s, run_s, tenant) in enumerate(sorted(jobs))]


def test_demand_is_what_runs_if_nobody_waits():
    jobs = [job(0, 0.0, 90.0, gpus=2.0), job(1, 30.0, 60.0, members=3), job(2, 150.0, 500.0)]
    assert demand_steps(jobs, 60.0, 4, gpus=True).tolist() == [2 + 1.5, 1 + 1.5, 0.5, 1.0]
    assert demand_steps(jobs, 60.0, 4, gpus=False)[0] == 2 + 3


@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0.1, 3000)), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_no_demand_is_lost_between_steps(spans):
    jobs = [job(i, at_s, run_s) for i, (at_s, run_s) in enumerate(sorted(spans))]
    assert demand_steps(jobs, 100.0, 81, gpus=True).sum() * 100 == pytest.approx(sum(run for _, run in spans), rel=1e-6)


def test_a_daily_pattern_is_held_below_its_peak_with_few_misses():
    found = looked(daily())
    everyone, *tenants = found.demands
    assert everyone.tenant is None
    assert {one.tenant for one in tenants} == {"ana", "ben"}
    assert everyone.misses <= 0.015
    assert everyone.held < everyone.peak
    assert everyone.season_s == 86_400
    assert everyone.nodes >= everyone.held / 8
    assert all(30 <= one.keep_alive_s <= 120 for one in found.demands)


def test_run_times_are_foretold_with_the_chance_they_say():
    found = looked(daily()).run_times
    assert found.jobs > 500
    assert 0.75 <= found.inside <= 0.85
    assert found.off < found.off_last


def test_a_short_trace_says_nothing_instead_of_something_wrong():
    found = looked([job(i, i * 60.0, 100.0) for i in range(20)])
    assert found.demands == ()
    assert found.run_times is None


def test_the_same_jobs_give_the_same_outlook():
    assert looked(daily(3)) == looked(daily(3))


def test_one_tenant_is_not_shown_twice():
    assert len(looked(daily(3, tenants=("ana",))).demands) == 1
