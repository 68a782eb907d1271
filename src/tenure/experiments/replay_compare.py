"""Which policy is best, by how much, on what evidence: the figures that policies are compared by, and what is said of them.

Runs of one seed are compared pairwise: what chance brings to one, it brings to all. Not here: tables, plots (`replay_report`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenure.experiments.replay_figures import mean, show_time

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Policy -> one result per seed."""
SURE_SEEDS = 5
"""So many seeds that all say the same would be 1 in 32 by chance alone."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure by which policies are compared."""

    key: str
    name: str
    show: Callable[[float], str]
    more_is_better: bool = False

    def of(self, results: Results, label: str) -> list[float]:
        """Return the figure of each seed."""
        return [float(result[self.key]) for result in results[label]]

    def better(self, ours: float, theirs: float) -> bool:
        """Return whether the first value is the better one."""
        return ours > theirs if self.more_is_better else ours < theirs


def percent(share: float) -> str:
    """Return a share as percent."""
    return f"{100 * share:.2f} %"


def count(value: float) -> str:
    """Return a number without decimals."""
    return f"{value:,.0f}"


def _index(value: float) -> str:
    return f"{value:.3f}"


TIMED = (
    Measure("mean_completion_s", "mean completion", show_time),
    Measure("median_completion_s", "median", show_time),
    Measure("p95_completion_s", "95th percentile", show_time),
    Measure("mean_wait_s", "mean first wait", show_time),
    Measure("max_wait_s", "longest first wait", show_time),
    Measure("allocated", "allocation", percent, more_is_better=True),
    Measure("fairness", "fairness", _index, more_is_better=True),
    Measure("restarts", "restarts", count),
    Measure("dropped", "dropped", count),
    Measure("unfinished", "never done", count),
)
FILLED = (
    Measure("allocated", "allocation", percent, more_is_better=True),
    Measure("fragmentation", "idle and unusable", percent),
    Measure("fairness", "fairness", _index, more_is_better=True),
    Measure("dropped", "dropped", count),
)
"""The first of each decides which policy is best."""


def ranked(results: Results, measure: Measure) -> list[str]:
    """Return the policies, best first; of equals the one that was named first."""
    sign = -1.0 if measure.more_is_better else 1.0
    return sorted(results, key=lambda label: sign * mean(measure.of(results, label)))


def with_spread(values: Sequence[float], measure: Measure) -> str:
    """Return the mean, and the standard deviation when there are several."""
    text = measure.show(mean(values))
    if len(values) < 2:
        return text
    deviation = math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))
    return f"{text} ± {measure.show(deviation)}"


def answer(results: Results, measure: Measure) -> str:
    """Return which policy is best, by how much over each other one, on what evidence."""
    best, *others = ranked(results, measure)
    figure = measure.show(mean(measure.of(results, best)))
    if not others:
        return f"{best}: {measure.name} {figure}. Only one policy was tried, so there is nothing to compare it with."
    ours = measure.of(results, best)
    if all(measure.of(results, other) == ours for other in others):
        return f"No difference: {measure.name} is {figure} under every policy tried."
    won = [sum(measure.better(a, b) for a, b in zip(ours, measure.of(results, other), strict=True)) for other in others]
    texts = [_over(other, ours, measure.of(results, other), measure, n) for other, n in zip(others, won, strict=True)]
    sure = len(ours) >= SURE_SEEDS and min(won) == len(ours)
    verb = "is best" if sure else "comes first"
    return f"{best} {verb}: {measure.name} {figure}, {', '.join(texts)}.{'' if sure else _doubt(len(ours))}"


def _over(other: str, ours: Sequence[float], theirs: Sequence[float], measure: Measure, won: int) -> str:
    if mean(ours) == mean(theirs):
        return f"as {other}"
    word = "above" if mean(ours) > mean(theirs) else "below"
    gap = abs(mean(ours) - mean(theirs))
    size = f"{100 * gap:.2f} points" if measure.show is percent else _ratio(gap, mean(theirs))
    text = f"{size} {word} {other}"
    return text if len(ours) == 1 else f"{text} (better with {won} of {len(ours)} seeds)"


def _ratio(gap: float, theirs: float) -> str:
    if not theirs:
        return "infinitely"
    share = 100 * gap / theirs
    return f"{share:.0f} %" if share >= 1 else f"{share:.1f} %"


def _doubt(seeds: int) -> str:
    if seeds == 1:
        return " That is one run each: what chance does is not known; --seeds 5 would tell."
    return f" That is no proof: it takes {SURE_SEEDS} seeds or more, all saying the same."
