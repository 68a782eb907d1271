"""The choice: nothing cheaper qualifies, every loser says why, and misses are said plainly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tenure.recommend.choose import Limit, broken_limits, capacity_broken, choose, show
from tenure.recommend.observe import compare
from tenure.resources import Capacity, Envelope
from tenure.trials import Candidate, Prediction
from tenure.usage import summarize

GIB = 1 << 30


def predicted(value, spread=0.1):
    return Prediction(value=value, low=value * (1 - spread), high=value * (1 + spread))


def a_candidate(number, cost, time_s, **more):
    return Candidate(
        configuration={"workers": number}, predictions={"cost_usd": predicted(cost), "time_s": predicted(time_s)}, **more
    )


def decide(candidates, limits=()):
    return choose(candidates, limits, id="rec", run_id="r", stage="train", goal="g", now_s=5.0)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(1, 100)), min_size=1, max_size=12), st.floats(1, 100))
def test_nothing_cheaper_in_the_candidate_set_also_qualifies(world, most_s):
    candidates = [a_candidate(i, cost, time_s) for i, (cost, time_s) in enumerate(world)]
    limits = [Limit(metric="time_s", value=most_s)]
    found = decide(candidates, limits)
    qualified = [c for c in candidates if not broken_limits(c.predictions, limits)]
    assert (found.chosen is None) == (not qualified)
    assert len(found.ruled_out) + (found.chosen is not None) == len(candidates)
    assert all(candidate.broken for candidate in found.ruled_out)
    if found.chosen:
        assert found.chosen.predictions["cost_usd"].value == min(c.predictions["cost_usd"].value for c in qualified)
        assert not found.chosen.broken


def test_a_limit_must_be_met_by_the_unfavourable_end_of_the_interval():
    found = decide([a_candidate(1, 1.0, 95.0), a_candidate(2, 2.0, 50.0)], [Limit(metric="time_s", value=100.0)])
    assert found.chosen.configuration == {"workers": 2}
    (broken,) = found.ruled_out[0].broken
    assert (broken.constraint, broken.limit) == ("time_s", 100.0)
    assert broken.reason == "time_s must be at most 100 s; predicted 95 s, and it may be 104.5 s"


def test_those_that_qualify_but_cost_more_name_their_cost():
    found = decide([a_candidate(1, 1.0, 1.0), a_candidate(2, 2.0, 1.0)])
    (broken,) = found.ruled_out[0].broken
    assert (broken.constraint, broken.limit, broken.found) == ("cost_usd", 1.0, 2.0)
    assert "workers 1 costs 1 USD" in broken.reason


def test_when_nothing_qualifies_the_nearest_is_named():
    found = decide([a_candidate(1, 1.0, 300.0), a_candidate(2, 2.0, 120.0)], [Limit(metric="time_s", value=100.0)])
    assert found.chosen is None
    assert "None of 2 meets the goal. Nearest is workers 2: time_s must be at most 100 s" in found.why
    assert decide([]).chosen is None


def test_an_unmeasured_metric_meets_nothing():
    found = decide([a_candidate(1, 1.0, 1.0)], [Limit(metric="p99_s", value=0.01)])
    assert found.chosen is None
    assert "p99_s was not measured" in found.why


def test_a_gang_must_fit_the_node():
    capacity = Capacity(cpus=2, memory_bytes=4 * GIB)
    assert capacity_broken([(2, Envelope(cpus=1, memory_bytes=2 * GIB))], capacity) == ()
    cpus, memory = capacity_broken([(3, Envelope(cpus=1, memory_bytes=2 * GIB))], capacity)
    assert cpus.reason == "needs 3 cpus together; the node has 2"
    assert memory.reason == "needs 6.0 GiB of memory together; the node has 4.0 GiB"


def test_values_are_shown_with_the_unit_in_their_name():
    assert show("p99_s", 0.0123) == "12.3 ms"
    assert show("images_per_s", 1234.5) == "1234 images/s"
    assert show("memory_bytes", 3 * GIB) == "3.0 GiB"


def test_a_miss_above_a_quarter_is_said_plainly():
    rows = compare(
        {"time_s": predicted(10), "rounds": predicted(40), "unseen": predicted(1)}, {"time_s": summarize([20.0]), "rounds": 42}
    )
    assert [(row.metric, row.missed, row.inside) for row in rows] == [("time_s", True, False), ("rounds", False, True)]
    assert rows[0].miss == 0.5
    assert rows[0].sentence == "time_s missed by more than 25 %: predicted 10 s, observed 20 s (+50%), outside the interval."
    assert rows[1].sentence == "rounds: predicted 40, observed 42 (+5%)."


def test_a_high_rate_is_shown_as_people_write_it():
    assert show("images_per_s", 186_612.3) == "186,612 images/s"
    assert show("images_per_s", 212.34) == "212.3 images/s"
