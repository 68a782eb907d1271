"""What a sample of latencies proves: a percentile with its interval, and whether a goal is met, missed or still open.

A goal such as p99 < 50 ms says that at most 1 % of all requests take longer. A run sees some of them; the binomial bound says
how many more than 99 % must have been within the limit before "met" is wrong in at most 1 % of such runs. It is MLPerf's early
stopping (inference rules, appendix "Early Stopping Criterion", tolerance 0), so verdicts compare with LoadGen's. It takes
requests as independent; behind a full queue they come late in clusters, and `clustering_of` says how many count as one.
Not here: whether the run itself can be trusted (`serve.load.judge`), which rate to try next (`rate_search`).
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from tenure.errors import SpecError

CONFIDENCE = 0.99
"""MLPerf's: a met goal is wrong in at most 1 % of runs."""
LEVEL = 0.95
MAX_REQUESTS = 1 << 40
_BLOCK = 1 << 16
_GOAL = re.compile(r"p(\d+(?:\.\d+)?)\s*<=?\s*(\d+(?:\.\d+)?)\s*(us|ms|s)")
_PER_S = {"us": 1e6, "ms": 1e3, "s": 1.0}

Floats = NDArray[np.float64]
Answer = Literal["met", "missed", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyGoal:
    """At least `percent` of all requests take at most `limit_s`."""

    percent: float
    limit_s: float

    def __post_init__(self) -> None:
        if not 0 < self.percent < 100:
            raise SpecError(f"a latency goal's percentile lies between 0 and 100; found {self.percent!r}")
        if not (self.limit_s > 0 and math.isfinite(self.limit_s)):
            raise SpecError(f"a latency goal's limit must be above 0 and finite; found {self.limit_s!r} s")

    def __str__(self) -> str:
        value, unit = (self.limit_s, "s") if self.limit_s >= 1 else (self.limit_s * 1e3, "ms")
        return f"p{self.percent:.6g}<{value:.6g}{unit}"

    @property
    def over_share(self) -> float:
        """Share of requests that may take longer."""
        return 1 - self.percent / 100


def parse_goal(text: str) -> LatencyGoal:
    """Return the goal of a text such as ``p99<50ms``; units us, ms and s. Raises SpecError, saying what is understood."""
    match = _GOAL.fullmatch(text.strip().lower())
    if match is None:
        raise SpecError(f"a latency goal reads like p99<50ms (units us, ms, s); found {text!r}")
    percent, limit, unit = match.groups()
    return LatencyGoal(percent=float(percent), limit_s=float(limit) / _PER_S[unit])


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """A percentile of a sample, and where that of all requests lies."""

    percent: float
    value_s: float
    """Nearest rank: always one of the sample."""
    low_s: float
    high_s: float | None
    """None when the sample is too small to bound it from above."""
    level: float
    """Share of cases in which the truth should lie within [low_s, high_s]."""


def percentile(latencies_s: Floats, percent: float, *, level: float = LEVEL, clustering: float = 1.0) -> Percentile:
    """Return a percentile with an interval from order statistics, which hold for any shape of latency.

    latencies_s: at least one, any order. clustering: see `clustering_of`; the interval is taken as of so many times fewer.
    Raises SpecError for an empty sample, NaN, or a percent or level out of range.
    """
    return _percentile(_ordered(latencies_s), percent, level, _at_least_one(clustering))


def percentiles(latencies_s: Floats, percents: Sequence[float], *, level: float = LEVEL) -> dict[str, Percentile]:
    """Return percentiles of a run under names such as ``p99``, their intervals reckoning with clusters.

    latencies_s: in order of the due times. Raises as `percentile`.
    """
    ordered = _ordered(latencies_s)
    usual = _memory(latencies_s > ordered[len(ordered) // 2])
    return {
        f"p{percent:g}": _percentile(
            ordered, percent, level, max(usual, _memory(latencies_s > ordered[_rank(len(ordered), percent)]))
        )
        for percent in percents
    }


def clustering_of(latencies_s: Floats, limit_s: float) -> float:
    """Return how many requests count as one independent one, at least 1. latencies_s: in order of the due times.

    The larger of two: how long being over the limit lasts, and how long being over the median does. The second one is needed
    because a short run whose queue happened never to fill has nothing over the limit to learn from.
    """
    if not len(latencies_s):
        return 1.0
    return max(_memory(latencies_s > limit_s), _memory(latencies_s > np.median(latencies_s)))


def _ordered(latencies_s: Floats) -> Floats:
    if len(latencies_s) < 1 or bool(np.isnan(latencies_s).any()):
        raise SpecError(f"a percentile needs at least one latency and no NaN; found {len(latencies_s)} latencies")
    return np.sort(latencies_s)


def _rank(n: int, percent: float) -> int:
    """Return the place of the nearest rank among n in order, from 0."""
    return max(0, math.ceil(round(percent / 100 * n, 9)) - 1)


def _percentile(ordered: Floats, percent: float, level: float, effect: float) -> Percentile:
    if not (0 < percent < 100 and 0 < level < 1):
        raise SpecError(f"percent lies between 0 and 100, level between 0 and 1; found {percent!r} and {level!r}")
    n, tail = len(ordered), (1 - level) / 2

    def lies_above(rank: int) -> float:
        # The share of all requests below the k-th smallest of n is Beta(k, n - k + 1).
        return 1 - float(betainc(rank / effect, (n - rank + 1) / effect, percent / 100))

    low = bisect.bisect_right(range(1, n + 1), tail, key=lies_above)
    high = bisect.bisect_left(range(1, n + 1), 1 - tail, key=lies_above)
    return Percentile(
        percent=percent,
        value_s=float(ordered[_rank(n, percent)]),
        low_s=float(ordered[low - 1]) if low else 0.0,
        high_s=float(ordered[high]) if high < n else None,
        level=level,
    )


def _memory(over: NDArray[np.bool_]) -> float:
    """Return 1 + 2 x the sum of autocorrelations while their pairs are above 0 (initial positive sequence, Geyer 1992).

    Autocorrelations are looked for up to `_BLOCK` requests apart, and averaged over blocks: memory stays bounded.
    """
    n = len(over)
    if n < 4 or over.all() or not over.any():
        return 1.0
    mean, length = float(over.mean()), n // math.ceil(n / _BLOCK)
    size = 1 << (2 * length - 1).bit_length()
    covariance = np.zeros(length)
    for start in range(0, n - length + 1, length):
        spectrum = np.fft.rfft(over[start : start + length] - mean, size)
        covariance += np.fft.irfft(spectrum * spectrum.conj(), size)[:length]
    correlation = covariance / covariance[0]
    pairs = correlation[0 : length - 1 : 2] + correlation[1:length:2]
    ends = np.flatnonzero(pairs <= 0)
    return float(min(n, max(1.0, 2 * pairs[: ends[0] if len(ends) else len(pairs)].sum() - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GoalAnswer:
    """What a run says about a goal."""

    answer: Answer
    """`met` and `missed` with the confidence; `open`: so few requests prove neither."""
    requests: int
    over: int
    """Requests that took longer than the limit, or were not answered rightly."""
    confidence: float
    missing: int
    """Open: requests that would prove "met" if every further one were within the limit. Else 0."""
    clustering: float = 1.0


def answer_goal(
    requests: int, over: int, percent: float, *, confidence: float = CONFIDENCE, clustering: float = 1.0
) -> GoalAnswer:
    """Return whether a run with so many requests, so many of them over the limit, proves that a goal is met or missed.

    clustering: see `clustering_of`; 1 takes requests as independent, as LoadGen does.
    Raises SpecError for counts that can't be.
    """
    if not 0 <= over <= requests <= MAX_REQUESTS:
        raise SpecError(f"0 <= over <= requests is needed; found over {over!r} of {requests!r} requests")
    if not (0 < percent < 100 and 0.5 <= confidence < 1):
        raise SpecError(f"percent lies between 0 and 100, confidence is 0.5 to below 1; found {percent!r} and {confidence!r}")
    effect = _at_least_one(clustering)
    n, k, share = requests / effect, over / effect, 1 - percent / 100
    met = k < n and float(betainc(n - k, k + 1, 1 - share)) < 1 - confidence
    # P(at least k of n are over), were the goal just met
    missed = k > 0 and float(betainc(k, n - k + 1, share)) < 1 - confidence
    answer: Answer = "met" if met else "missed" if missed else "open"
    missing = 0 if answer != "open" else max(1, least_requests(over, percent, confidence, clustering=effect) - requests)
    return GoalAnswer(answer=answer, requests=requests, over=over, confidence=confidence, missing=missing, clustering=effect)


def least_requests(over: int, percent: float, confidence: float = CONFIDENCE, *, clustering: float = 1.0) -> int:
    """Return the requests that a run needs at least to prove a goal met when `over` of them are over its limit.

    p99 at 99 %: 459 with none over, 662 with one, 838 with two. O(log n) steps.
    """
    share, effect = 1 - percent / 100, _at_least_one(clustering)
    k = over / effect

    def proves(n: int) -> bool:
        return n / effect > k and float(betainc(n / effect - k, k + 1, 1 - share)) < 1 - confidence

    high = max(over + 1, math.ceil((k + 1) / share * effect))
    while not proves(high):
        high *= 2
    low = over
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def _at_least_one(clustering: float) -> float:
    if not clustering >= 1:
        raise SpecError(f"clustering is at least 1; found {clustering!r}")
    return float(clustering)
