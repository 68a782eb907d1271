"""How often a search for the highest rate under a latency goal overstates it, how near it comes, and what load it costs.

World: one server in order of arrival, Poisson arrivals, exponential service of 2 ms on average (an M/M/1 queue), in virtual
time and in its steady state; the latency from arrival to answer is then exponential too, so the highest rate at which a
percentile stays below a limit is known: 500 - ln(100 / (100 - percentile)) / limit. Goals: p99<50ms (truth 407.9/s), p99<20ms
(269.7/s) and p90<10ms (269.7/s). Neighbouring latencies hang together over some ten to hundred requests, as behind any queue.
Searches: 100 of each goal (--quick: 15), seeded; each begins at 20/s with the defaults of `tenure.decide.rate_search`, which is
told the requests, those over the limit, and their clustering (`tenure.decide.verdicts`), and no more.
Counts: the share of searches that call a rate met which misses the goal (the search's error, 5 % by its defaults), the same of
rates called missed, and the rate found ÷ the truth.
Bar: at most 5 % of all searches overstate, at most 5 % call a rate missed that meets the goal, and the median search finds at
least 85 % of the truth. Value: the share that overstates. Spread: interquartile range of found ÷ truth.
Checked: a queue at the true rate has the goal's share of latencies over the limit (10 % of it either way, a million requests);
each search ends, and sends no more than it says.
Control: bisection by one run per rate, its percentile compared with the limit, as other tools search (doubling from 20/s, then
halving the gap to 5 %), with as long a load: 20 s per rate. It must overstate in more than 5 %. Details: the same with 5 s.
Details: seconds of load per search (its requests ÷ their rates), median and 90th percentile, by goal; shares by goal.
Left out: servers whose latency does not rise with the rate; the length of warm-ups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Control, Options, Result, judge, median, spread
from tenure.decide.rate_search import Probe, RateSearch, next_step
from tenure.decide.verdicts import LatencyGoal, clustering_of, parse_goal

NAME = "rate_search"
BAR = "at most 5 % of searches overstate the highest rate under a latency goal; the median finds 85 % of it"
GOALS = ("p99<50ms", "p99<20ms", "p90<10ms")
SERVES_PER_S = 500.0
START_PER_S = 20.0
WRONG_BAR = 0.05
FOUND_BAR = 0.85
MAX_PROBES = 400
_WARM = 4_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One search, as shares of the truth."""

    met: float
    missed: float
    load_s: float


def run(options: Options) -> Result:
    """Search, count, judge."""
    searches = 15 if options.quick else 100
    found: dict[str, dict[str, list[Found]]] = {}
    for place, text in enumerate(GOALS):
        goal = parse_goal(text)
        check_truth(goal, options.seed)
        ways: dict[str, Callable[[LatencyGoal, np.random.Generator], Found]] = {
            "ours": ours,
            "bisection_20s": lambda goal, rng: bisection(goal, rng, 20.0),
            "bisection_5s": lambda goal, rng: bisection(goal, rng, 5.0),
        }
        seeds = [[options.seed, place, number] for number in range(searches)]
        found[text] = {way: [call(goal, np.random.default_rng(seed)) for seed in seeds] for way, call in ways.items()}
    return judged(found)


def truth(goal: LatencyGoal) -> float:
    """Return the highest rate that meets a goal."""
    return SERVES_PER_S + math.log(goal.over_share) / goal.limit_s


def latencies(rng: np.random.Generator, rate_per_s: float, requests: int) -> Floats:
    """Return latencies of consecutive requests at a rate, from an empty queue and 4,000 requests later on."""
    arrivals = np.cumsum(rng.exponential(1 / rate_per_s, _WARM + requests))
    worked = np.cumsum(rng.exponential(1 / SERVES_PER_S, _WARM + requests))
    before = np.concatenate([[0.0], worked[:-1]])
    return (worked + np.maximum.accumulate(arrivals - before) - arrivals)[_WARM:]


def check_truth(goal: LatencyGoal, seed: int) -> None:
    """Assert that the queue is the one the truth is of."""
    over = latencies(np.random.default_rng(seed), truth(goal), 1_000_000) > goal.limit_s
    assert abs(float(over.mean()) / goal.over_share - 1) < 0.1, f"{goal}: {over.mean():.2%} are over the limit at the truth"


def ours(goal: LatencyGoal, rng: np.random.Generator) -> Found:
    """Search as the package does."""
    search, probes, load_s = RateSearch(goal=goal, start_per_s=START_PER_S), [], 0.0
    while not (step := next_step(search, probes)).done:
        assert len(probes) < MAX_PROBES, f"{goal}: no end after {MAX_PROBES} probes"
        seen = latencies(rng, step.rate_per_s, step.requests)
        over = int((seen > goal.limit_s).sum())
        clustering = clustering_of(seen, goal.limit_s)
        probes.append(Probe(rate_per_s=step.rate_per_s, requests=step.requests, over=over, clustering=clustering))
        load_s += step.requests / step.rate_per_s
    return Found(met=step.met_per_s / truth(goal), missed=step.missed_per_s / truth(goal), load_s=load_s)


def bisection(goal: LatencyGoal, rng: np.random.Generator, seconds: float) -> Found:
    """Search as others do: one run per rate, which is taken at its word."""
    met, missed, rate, load_s = 0.0, math.inf, START_PER_S, 0.0
    while missed > met * 1.05:
        seen = latencies(rng, rate, max(1, round(rate * seconds)))
        load_s += seconds
        if np.quantile(seen, goal.percent / 100) <= goal.limit_s:
            met = rate
        else:
            missed = rate
        rate = met * 2 if math.isinf(missed) else (max(met, missed / 4) * missed) ** 0.5
        assert load_s < 1e4 * seconds, f"{goal}: bisection does not end"
    return Found(met=met / truth(goal), missed=missed / truth(goal), load_s=load_s)


def judged(found: dict[str, dict[str, list[Found]]]) -> Result:
    """Turn the searches into a verdict."""
    pooled = {way: [each for goal in found.values() for each in goal[way]] for way in next(iter(found.values()))}
    over = {way: float(np.mean([each.met > 1 for each in searches])) for way, searches in pooled.items()}
    under = float(np.mean([each.missed < 1 for each in pooled["ours"]]))
    near = [each.met for each in pooled["ours"]]
    control = Control(
        name="bisection by one run of 20 s per rate",
        value=over["bisection_20s"],
        failed=over["bisection_20s"] > WRONG_BAR,
        how=f"overstates in {over['bisection_20s']:.0%} of searches",
    )
    missed = []
    if over["ours"] > WRONG_BAR:
        missed.append(f"{over['ours']:.1%} of searches overstate")
    if under > WRONG_BAR:
        missed.append(f"{under:.1%} of searches call a rate missed that meets the goal")
    if median(near) < FOUND_BAR:
        missed.append(f"the median search finds {median(near):.0%} of the truth")
    holds, why = judge(not missed, control)
    details: dict[str, object] = {
        "searches": len(near),
        "missed_wrongly": under,
        "found_over_truth_median": round(median(near), 4),
    }
    for goal, ways in found.items():
        for way, searches in ways.items():
            loads = [each.load_s for each in searches]
            details[f"{goal} {way}"] = {
                "overstated": round(float(np.mean([each.met > 1 for each in searches])), 4),
                "found_over_truth_median": round(median([each.met for each in searches]), 4),
                "load_s_median": round(median(loads), 1),
                "load_s_p90": round(float(np.quantile(loads, 0.9)), 1),
            }
    return Result(
        value=over["ours"],
        spread=spread(near),
        unit="of searches overstate the highest rate",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": control.name, "value": over["bisection_20s"], "unit": "of searches overstate"},
        control=control,
        details=details,
    )
