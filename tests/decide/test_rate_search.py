"""The search for the highest rate under a latency goal: seldom wrong, near the truth, bounded, not misled by a bad run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.rate_search import MAX_INVALID, Probe, RateSearch, evidence, next_step
from tenure.decide.verdicts import LatencyGoal, clustering_of
from tenure.errors import SpecError

GOAL = LatencyGoal(percent=99, limit_s=0.05)


def one_server(rng, rate, requests, serves_per_s):
    """Return the latencies of Poisson arrivals at one server with exponential service, its queue in its steady state."""
    warm = 4_000
    arrivals = np.cumsum(rng.exponential(1 / rate, warm + requests))
    service = rng.exponential(1 / serves_per_s, warm + requests)
    ends = np.cumsum(service) + np.maximum.accumulate(arrivals - np.concatenate([[0], np.cumsum(service)[:-1]]))
    return (ends - arrivals)[warm:]


def search_server(search, rng, serves_per_s=500.0, most=200):
    """Return the last step of a search on such a server, and the requests it cost."""
    probes, cost = [], 0
    for _ in range(most):
        step = next_step(search, probes)
        if step.done:
            return step, cost
        latencies_s = one_server(rng, step.rate_per_s, step.requests, serves_per_s)
        probes.append(
            Probe(
                rate_per_s=step.rate_per_s,
                requests=step.requests,
                over=int((latencies_s > GOAL.limit_s).sum()),
                clustering=clustering_of(latencies_s, GOAL.limit_s),
            )
        )
        cost += step.requests
    raise AssertionError("the search did not end")


def test_the_highest_rate_of_a_queue_is_found_and_seldom_overstated():
    # p99 of an M/M/1 queue is ln(100) / (service rate - rate), so the truth is known.
    truth = 500.0 - math.log(100) / GOAL.limit_s
    search = RateSearch(goal=GOAL, start_per_s=20.0, least_s=5.0)
    overstated, found, costs = 0, [], []
    for seed in range(12):
        step, cost = search_server(search, np.random.default_rng(seed))
        overstated += step.met_per_s > truth
        assert step.missed_per_s > truth * 0.99
        found.append(step.met_per_s / truth)
        costs.append(cost)
    assert overstated <= 1
    assert np.median(found) > 0.85
    assert np.median(costs) < 150_000


@given(
    st.floats(0.5, 5_000),
    st.floats(1, 1_000),
    st.floats(0.01, 0.3),
    st.integers(0, 2**32),
    st.sampled_from([90.0, 99.0]),
)
@settings(deadline=None, max_examples=60)
def test_a_search_ends_within_its_bounds_and_brackets_a_sharp_edge(edge, start, resolution, seed, percent):
    rng = np.random.default_rng(seed)
    goal = LatencyGoal(percent=percent, limit_s=0.05)
    search = RateSearch(goal=goal, start_per_s=start, max_per_s=2_000, min_per_s=1, resolution=resolution)
    probes = []
    for _ in range(search.max_rates * 12):
        step = next_step(search, probes)
        if step.done:
            break
        assert search.min_per_s <= step.rate_per_s <= search.max_per_s
        assert 1 <= step.requests <= search.most_requests(step.rate_per_s)
        chance = goal.over_share * (0.2 if step.rate_per_s <= edge else 5)
        over = int(rng.binomial(step.requests, min(1, chance)))
        probes.append(Probe(rate_per_s=step.rate_per_s, requests=step.requests, over=over))
    assert step.done
    assert len({probe.rate_per_s for probe in probes}) <= search.max_rates
    if edge >= 2_000:
        assert step.met_per_s == 2_000
    elif edge < 1:
        assert step.met_per_s == 0
    else:
        assert step.met_per_s <= edge < step.missed_per_s
        above = min(step.missed_per_s, *step.open_per_s, math.inf)
        assert above <= step.met_per_s * (1 + resolution) or "rates were tried" in step.why


def test_probes_add_up_whatever_their_order():
    search = RateSearch(goal=GOAL, start_per_s=100)
    probes = [
        Probe(rate_per_s=100, requests=2_000, over=3),
        Probe(rate_per_s=200, requests=2_000, over=90),
        Probe(rate_per_s=100, requests=1_000, over=0),
    ]
    assert next_step(search, probes) == next_step(search, probes[::-1])
    assert next_step(search, probes).met_per_s == 100
    assert next_step(search, probes).missed_per_s == 200


def test_the_way_up_is_short_glances_and_only_a_rate_next_to_the_edge_is_proven():
    search = RateSearch(goal=GOAL, start_per_s=100, least_s=0)
    first = next_step(search, [])
    assert (first.rate_per_s, first.requests) == (100, 200)
    good = Probe(rate_per_s=100, requests=200, over=0)
    assert (next_step(search, [good]).rate_per_s, next_step(search, [good]).requests) == (200, 200)
    bad = Probe(rate_per_s=110, requests=200, over=5)
    near = next_step(search, [good, bad])
    assert (near.rate_per_s, near.requests) == (100, search.least_requests - 200)
    assert not near.done
    again = next_step(search, [good, bad, Probe(rate_per_s=100, requests=near.requests, over=3)])
    assert (again.rate_per_s, again.requests) == (100, search.least_requests)


def test_a_rate_that_stays_open_is_left_at_its_bound_and_told():
    search = RateSearch(goal=GOAL, start_per_s=100, most_s=100)
    probes = [Probe(rate_per_s=100, requests=10_000, over=100)]
    step = next_step(search, probes)
    assert step.open_per_s == (100,)
    assert step.rate_per_s == 50
    probes += [Probe(rate_per_s=97, requests=5_000, over=5)]
    last = next_step(search, probes)
    assert last.done
    assert "97/s meets p99<50ms and 100/s stays open" in last.why


def test_a_rate_without_hope_of_a_proof_is_left_before_its_bound():
    search = RateSearch(goal=GOAL, start_per_s=100, most_s=600)
    edge = [Probe(rate_per_s=100, requests=5_000, over=50)]
    assert next_step(search, edge).open_per_s == (100,)
    promising = [Probe(rate_per_s=100, requests=1_500, over=7), Probe(rate_per_s=110, requests=1_500, over=30)]
    assert next_step(search, promising).rate_per_s == 100
    assert next_step(search, promising).open_per_s == (110,)


def test_invalid_runs_count_for_nothing_and_end_at_what_the_generator_can_offer():
    search = RateSearch(goal=GOAL, start_per_s=100)
    bad = Probe(rate_per_s=100, requests=5_000, over=5_000, invalid="the generator was late")
    assert next_step(search, [bad]).rate_per_s == 100
    assert next_step(search, [bad] * MAX_INVALID).rate_per_s == 50
    probes = [bad] * MAX_INVALID + [Probe(rate_per_s=98, requests=5_000, over=0)]
    assert "100/s is more than the generator can offer" in next_step(search, probes).why


def test_looking_after_every_request_does_not_make_a_wrong_proof_likely():
    rng, bound = np.random.default_rng(4), math.log(20)
    wrong = 0
    for _ in range(100):
        over = np.cumsum(rng.random(4_000) < 0.01)  # the goal is just met: neither side may be proven
        looks = [evidence(n, int(over[n - 1]), 0.01) for n in range(50, 4_001, 25)]
        wrong += max(max(pair) for pair in looks) >= bound
    assert wrong <= 15  # 5 % on either side at most, and luck


def test_evidence_grows_with_what_is_seen():
    assert evidence(0, 0, 0.01) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert evidence(2_000, 0, 0.01)[0] > evidence(1_000, 0, 0.01)[0] > 5
    assert evidence(1_000, 40, 0.01)[1] > 20
    assert evidence(100_000, 90_000, 0.01)[0] == -math.inf


@pytest.mark.parametrize(
    "fields",
    [
        {"start_per_s": 0.01, "min_per_s": 1},
        {"start_per_s": 10, "max_per_s": 5},
        {"start_per_s": 10, "max_per_s": math.inf},
        {"start_per_s": 10, "resolution": 0},
        {"start_per_s": 10, "confidence": 1},
        {"start_per_s": 10, "max_rates": 1},
        {"start_per_s": 10, "least_s": 5, "most_s": 4},
    ],
)
def test_a_search_without_sense_is_refused(fields):
    with pytest.raises(SpecError):
        RateSearch(goal=GOAL, **fields)
    with pytest.raises(SpecError):
        Probe(rate_per_s=1, requests=1, over=2)
