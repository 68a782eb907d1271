"""How much one setting differs from another, and how sure that is: intervals from few repeats on a machine that drifts.

Settings that ran interleaved, each once per repeat in a random order, pair by repeat: what the machine did to a repeat it did
to both, and what it did in between hit either as likely. So the logarithms of the ratios scatter symmetrically, and
signed-rank intervals (Wilcoxon; Hodges & Lehmann 1963) hold whatever the shape of the noise, outliers included, which
Student's t does not: one outlier in 20 makes it up to three times as wide. Weighed and rejected: bootstrap intervals (at 5
repeats they hold the truth in less than 85 % of cases), dropping outliers (by whose rule?).

Ratios wander by themselves when two settings feel the machine's state unequally; neighbouring repeats then tell less than two
independent ones. `correlation` is guessed from the ranks, pulled to a small prior where repeats are few, and widens it.
Measured by `benchmarks/interval_coverage`. Not here: verdicts about latency (`verdicts`), curves (`fits`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from tenure.errors import SpecError

LEVEL = 0.95
MAX_REPEATS = 1_000
"""Pairs of repeats are all averaged with each other: half a million values."""
PRIOR_CORRELATION = 0.05
"""Between neighbouring repeats, before anything was seen: machines remember."""
PRIOR_REPEATS = 6
"""The prior weighs as much as so many repeats beyond the first five, from which no correlation is read."""
MAX_CORRELATION = 0.8
"""Nine repeats are worth one there; from 20 nothing beyond could be told from chance."""
_FEWEST = 5
"""Repeats that signed ranks need at least."""
_EXACT = 60
"""Repeats up to which the signed-rank distribution is counted; beyond, the normal one is as good."""
_STRETCH = 1.5

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A typical value or ratio, with what it was taken from."""

    value: float
    """The typical one: median of the means of all pairs of repeats (Hodges-Lehmann), taken of logarithms."""
    low: float
    high: float
    level: float
    """Share of cases in which the truth should lie within [low, high]."""
    mean: float
    """Geometric mean over the repeats."""
    standard_error: float
    """Of the mean's logarithm, so 0.01 is 1 % of the mean; sd / sqrt(repeats), nothing corrected."""
    repeats: int
    dropped: int = 0
    """Repeats left out because a value was missing (NaN)."""
    correlation: float = 0.0
    """Between neighbouring repeats, as assumed for the interval."""

    @property
    def differs(self) -> bool:
        """Return, for a ratio, whether 1 lies outside."""
        return not self.low <= 1.0 <= self.high


def paired_ratio(values: Sequence[float], base: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return how many times `base` the values are, from repeats that pair by index in the order they ran.

    values, base: one per repeat, both above 0, NaN where a repeat has none (both sides are then left out, and counted).
    level: share of cases in which the interval should hold the truth, 0.5 to 0.999.
    The truth is the ratio of the typical values (medians, or geometric means, for noise of one shape on both).
    Below the repeats that signed ranks need (5 for 95 %, 8 for 99 %) Student's t is taken, which trusts in normal noise.
    Raises SpecError for unequal lengths, fewer than 2 or more than 1,000 pairs, or values not above 0.
    """
    top, bottom = _logarithms("values", values), _logarithms("base", base)
    if len(top) != len(bottom):
        raise SpecError(f"repeats pair by index: as many values as in the base are needed; found {len(top)} and {len(bottom)}")
    differences = top - bottom
    return _interval(differences[np.isfinite(differences)], level, dropped=int(np.isnan(differences).sum()))


def typical(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the typical one of a setting's repeats, in the order they ran.

    Drift that lasts longer than the run can't be seen from within it: compare settings by `paired_ratio`, not by these.
    """
    logarithms = _logarithms("values", values)
    return _interval(logarithms[np.isfinite(logarithms)], level, dropped=int(np.isnan(logarithms).sum()))


def unpaired_ratio(values: Sequence[float], base: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the ratio as if repeats had nothing to do with each other: Welch's t on logarithms, the naive interval.

    For settings that did not run interleaved there is nothing better, and on a machine that drifts this is too wide or,
    one after the other, wrong. Raises as `paired_ratio`, but lengths may differ.
    """
    _check_level(level)
    sides = [side[np.isfinite(side)] for side in (_logarithms("values", values), _logarithms("base", base))]
    dropped = len(values) + len(base) - sum(map(len, sides))
    for side in sides:
        _check_repeats(len(side))
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, sides, strict=True)) if error else 1.0
    centre = float(sides[0].mean() - sides[1].mean())
    half = float(stdtrit(freedom, 0.5 + level / 2)) * error
    return Interval(
        value=math.exp(centre),
        low=math.exp(centre - half),
        high=math.exp(centre + half),
        level=level,
        mean=math.exp(centre),
        standard_error=error,
        repeats=min(map(len, sides)),
        dropped=dropped,
    )


def _interval(x: Floats, level: float, *, dropped: int) -> Interval:
    _check_level(level)
    _check_repeats(len(x))
    n = len(x)
    correlation = _correlation(x)
    # An AR(1) of this correlation makes the variance of a mean so much larger.
    wider = math.sqrt((1 + correlation) / (1 - correlation))
    mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(n)
    means = _means_of_pairs(x)
    value = float(np.median(means))
    if n < _FEWEST or 2.0 ** (1 - n) > 1.5 * (1 - level):  # the hull of so few holds the truth too seldom
        half = float(stdtrit(n - 1, 0.5 + level / 2)) * error * wider
        low, high, value = mean - half, mean + half, mean
    else:
        low, high = _signed_rank(x, means, float(ndtri(0.5 + level / 2)) * wider)
    low, value, high = (float(np.exp(v)) for v in (low, value, high))
    return Interval(
        value=value,
        low=min(low, value),
        high=max(high, value),
        level=level,
        mean=math.exp(mean),
        standard_error=error,
        repeats=n,
        dropped=dropped,
        correlation=correlation,
    )


def _signed_rank(x: Floats, means: Floats, z: float) -> tuple[float, float]:
    """Return the interval that covers as a normal one of +-z does, between and beyond the levels that ranks can reach.

    Between two levels: linear in z (Hettmansperger & Sheather 1986 interpolate alike). Beyond the hull of the values: by
    a multiple of the spread without the extreme two, so that an outlier does not stretch the interval once more.
    """
    reached = _reached(len(x))
    place = float(np.interp(-z, -reached, np.arange(len(reached))))
    whole, part = int(place), place - int(place)
    last = len(means) - 1
    low = means[whole] * (1 - part) + means[min(whole + 1, last)] * part
    high = means[last - whole] * (1 - part) + means[max(last - whole - 1, 0)] * part
    ordered = np.sort(x)
    beyond = max(0.0, z / float(reached[0]) - 1) * _STRETCH * (ordered[-2] - ordered[1])
    return float(low - beyond), float(high + beyond)


def _means_of_pairs(x: Floats) -> Floats:
    """Return the mean of each pair of values, each with itself too, ascending: n (n + 1) / 2 Walsh averages."""
    rows, columns = np.triu_indices(len(x))
    return np.sort((x[rows] + x[columns]) / 2)


@lru_cache(maxsize=64)
def _reached(n: int) -> Floats:
    """Return the z whose normal interval covers as much as [k-th smallest, k-th largest] mean of a pair does, k = 0, 1 ...

    From the signed-rank distribution: the coverage is 1 - 2 P(W <= k), descending; up to the last one above 0.
    """
    total = n * (n + 1) // 2
    if n > _EXACT:
        k = np.arange(total // 2)
        sd = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        below = ndtr((k + 0.5 - total / 2) / sd)
    else:
        chance = np.ones(1)
        for rank in range(1, n + 1):
            grown = np.zeros(len(chance) + rank)
            grown[: len(chance)] += chance / 2
            grown[rank:] += chance / 2
            chance = grown
        below = np.cumsum(chance)[: total // 2]
    kept: Floats = below[(below < 0.5) & (below > 0)]
    return -ndtri(kept)


def _correlation(x: Floats) -> float:
    """Return the correlation to reckon with between neighbouring repeats, 0 to `MAX_CORRELATION`.

    Lag 1 of the ranks (outliers count once), its bias by the mean's removal mended (Marriott & Pope 1954), then weighed
    with the prior. Negative ones count as 0: an interval is not narrowed by what may be chance.
    """
    n = len(x)
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[place]
    centred = ranks - ranks.mean()
    squares = float(centred @ centred)
    if squares == 0:
        return 0.0
    weight = max(0, n - 5) / (max(0, n - 5) + PRIOR_REPEATS)
    seen = (n * float(centred[1:] @ centred[:-1]) / squares + 1) / max(1, n - 3)
    return min(MAX_CORRELATION, max(0.0, weight * seen + (1 - weight) * PRIOR_CORRELATION))


def _logarithms(name: str, values: Sequence[float]) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise SpecError(f"{name} must be one number per repeat; found shape {column.shape}")
    wrong = ~np.isnan(column) & ~(np.isfinite(column) & (column > 0))
    if wrong.any():
        place = int(np.argmax(wrong))
        raise SpecError(f"{name} must be above 0 and finite (NaN: not measured); repeat {place} has {column[place]}")
    logarithms: Floats = np.log(column)
    return logarithms


def _check_level(level: float) -> None:
    if not 0.5 <= level <= 0.999:
        raise SpecError(f"an interval's level lies between 0.5 and 0.999; found {level!r}")


def _check_repeats(n: int) -> None:
    if not 2 <= n <= MAX_REPEATS:
        raise SpecError(f"an interval needs 2 to {MAX_REPEATS} measured repeats; found {n}")
