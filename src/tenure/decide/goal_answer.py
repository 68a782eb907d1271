"""Which measured way to serve answers a goal: the fastest that surely meets it, and which others cannot be told from it.

Only among what was measured; predictions and costs are `recommend.serving`'s. Where files were measured, settings that find
their pictures in memory are no candidates: they say what files cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import bdtr

from tenure.decide.bottleneck import is_closed, is_twin, rate_ratio, repeat_margin
from tenure.decide.stations import APART
from tenure.jobs import ServeGoal
from tenure.trials import Trial

SURE = 2.0
"""Standard errors by which a mean must keep to its bound."""
CONFIDENCE = 0.95
"""That a percentile's upper end is above the true percentile."""
Meets = Literal["surely", "barely", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A bound that a trial does not keep to."""

    metric: str
    found: float | None
    """None: it was not measured."""
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one trial stands to the goal."""

    trial: str
    meets: Meets
    """``barely``: what was found does, but not by two standard errors, or not the upper end of a percentile."""
    misses: tuple[Miss, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to take for a goal."""

    best: str | None
    """Id of the trial; None when none meets the goal."""
    sure: bool
    """Whether `best` meets it surely."""
    ties: tuple[str, ...]
    """Others that meet it as well and are not surely slower, the machine's own repeat error counted."""
    thriftiest: str | None
    """Of `best` and `ties`, that with the least CPU per image; None where CPU was not metered."""
    nearest: str | None
    """Where none meets the goal, the one that misses by the least."""
    standings: tuple[Standing, ...]


def answer(goal: ServeGoal, trials: Sequence[Trial]) -> Answer:
    """Return the answer of trials of one stage to a goal; a goal without bounds asks for the highest rate."""
    candidates = [trial for trial in trials if is_closed(trial) and not is_twin(trial) and _asked(goal, trial)]
    if any(trial.configuration.get("data") == "files" for trial in candidates):
        candidates = [trial for trial in candidates if trial.configuration.get("data", "files") == "files"]
    standings = {trial.id: standing(goal, trial) for trial in candidates}
    margin = repeat_margin(trials)
    level: Meets
    for level in ("surely", "barely"):
        meeting = [trial for trial in candidates if standings[trial.id].meets == level]
        if not meeting:
            continue
        best = max(meeting, key=_rate)
        ties = [trial for trial in meeting if trial is not best and not _slower(trial, best, 1 / margin)]
        metered = [trial for trial in (best, *ties) if cpu_s_per_image(trial) is not None]
        return Answer(
            best=best.id,
            sure=level == "surely",
            ties=tuple(trial.id for trial in ties),
            thriftiest=min(metered, key=lambda trial: cpu_s_per_image(trial) or 0.0).id if metered else None,
            nearest=None,
            standings=tuple(standings.values()),
        )
    nearest = min(candidates, key=lambda trial: _excess(standings[trial.id]), default=None)
    return Answer(
        best=None,
        sure=False,
        ties=(),
        thriftiest=None,
        nearest=nearest.id if nearest is not None else None,
        standings=tuple(standings.values()),
    )


def standing(goal: ServeGoal, trial: Trial) -> Standing:
    """Return how a trial stands to a goal; a bound on what it did not measure is missed."""
    bounds = [("p99_s", goal.p99_s, 1.0), ("images_per_s", goal.images_per_s, -1.0)]
    level: Meets = "surely"
    misses = []
    for metric, bound, sign in bounds:
        if not bound:
            continue
        summary = trial.metrics.get(metric)
        if summary is None or sign * (summary.mean - bound) > 0:
            misses.append(Miss(metric=metric, found=summary.mean if summary else None, bound=bound))
        elif sign * (_far_end(trial, metric, sign) - bound) > 0:
            level = "barely"
    if goal.memory_bytes and (held := memory_bytes(trial)) > goal.memory_bytes:
        misses.append(Miss(metric="memory_bytes", found=held, bound=float(goal.memory_bytes)))
    return Standing(trial=trial.id, meets="no" if misses else level, misses=tuple(misses))


def percentile_at_most(trial: Trial, percent: float) -> float | None:
    """Return a latency that is above the true percentile with 95 % confidence; infinity where there are too few requests.

    By the binomial distribution of how many of the requests lie below the true one (David & Nagaraja, Order Statistics, 7.1),
    read off the trial's curve ``latency_s`` of equidistant quantiles; None without that or without their number.
    """
    curve, requests = trial.curves.get("latency_s", ()), trial.metrics.get("requests")
    if len(curve) < 2 or requests is None:
        return None
    count = round(requests.mean * requests.n)
    rank = next((k for k in range(int(count * percent / 100), count) if bdtr(k, count, percent / 100) >= CONFIDENCE), count)
    return math.inf if rank >= count else curve[math.ceil(rank / max(1, count - 1) * (len(curve) - 1))]


def memory_bytes(trial: Trial) -> float:
    """Return the memory of all parties that were metered; 0 when none was."""
    return sum(trial.metrics[name].mean for party in APART if (name := f"{party}_memory_bytes") in trial.metrics)


def cpu_s_per_image(trial: Trial) -> float | None:
    """Return the CPU seconds that all parties spend on an image; None when none was metered."""
    found = [trial.metrics[name].mean for party in APART if (name := f"{party}_cpu_s_per_image") in trial.metrics]
    return sum(found) if found else None


def _far_end(trial: Trial, metric: str, sign: float) -> float:
    """Return the end of what was found that lies nearer to the bound."""
    summary = trial.metrics[metric]
    if metric == "p99_s" and (upper := percentile_at_most(trial, 99.0)) is not None:
        return max(upper, summary.mean)
    return summary.mean + sign * SURE * summary.standard_error


def _asked(goal: ServeGoal, trial: Trial) -> bool:
    return int(trial.configuration.get("clients", 1)) == goal.clients


def _rate(trial: Trial) -> float:
    return trial.metrics["images_per_s"].mean


def _slower(trial: Trial, best: Trial, beyond: float) -> bool:
    ratio = rate_ratio(trial, best)
    if ratio is None:
        return _rate(trial) < _rate(best)
    return ratio.high < beyond


def _excess(standing: Standing) -> float:
    """Return by which factor the worst bound is missed."""
    found = [(miss.found, miss.bound) for miss in standing.misses]
    return max((max(value / bound, bound / value) if value else math.inf for value, bound in found), default=1.0)
