"""What measured values foretell: intervals of a mean, rounds to an accuracy, time against batch. No thresholds of taste
beyond the constants named here; nothing random, so that the same trials always give the same prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from tenure.errors import SpecError
from tenure.trials import Prediction
from tenure.usage import Summary

LEVEL = 0.9
"""Share of cases that an interval should hold the truth in."""
SINGLE_SPREAD = 0.25
"""Relative half width assumed of a quantity measured once."""
MIN_POINTS = 6
"""Evaluations below which a learning curve is not extrapolated: the curve has four parameters."""
MAX_STRETCH = 3.0
"""Rounds predicted beyond this multiple of the rounds seen are called thin."""
MAX_WIDTH = 0.5
"""Half width of an interval, relative to its value, above which it is called thin."""

MODEL_ERROR = 0.1
"""Share of the rounds still to come by which real learning leaves a fitted power law."""
CURVE_ERROR = 0.02
"""Share of the error by which a learning curve bends away from any power law (plateaus and steps), at least."""
MAX_FREEDOM = 16.0
"""Bends are long, so that more evaluations of one curve are not more independent points for ever."""
_PASSES = 4

Floats = NDArray[np.float64]


def pool(summaries: Sequence[Summary]) -> Summary:
    """Return one summary of repeats that were measured in groups; `sd` holds the spread within and between groups.

    The median is the median of the groups' medians. Raises SpecError for no group.
    """
    if not summaries:
        raise SpecError("nothing to pool: at least one summary is needed")
    n = sum(s.n for s in summaries)
    mean = math.fsum(s.n * s.mean for s in summaries) / n
    squares = math.fsum((s.n - 1) * s.sd**2 + s.n * (s.mean - mean) ** 2 for s in summaries)
    return Summary(
        n=n,
        mean=mean,
        sd=math.sqrt(squares / (n - 1)) if n > 1 else 0.0,
        minimum=min(s.minimum for s in summaries),
        median=float(np.median([s.median for s in summaries])),
        maximum=max(s.maximum for s in summaries),
    )


def half_width(summaries: Sequence[Summary], *, level: float = LEVEL) -> float:
    """Return the half width of the interval in which a new mean of as many repeats should fall.

    From the spread within groups (Student's t, both means being uncertain) or between groups' means, whichever is
    wider; `SINGLE_SPREAD` of the value when there is only one repeat.
    """
    whole = pool(summaries)
    if whole.n < 2:
        return SINGLE_SPREAD * abs(whole.mean)
    half = float(stdtrit(whole.n - 1, 0.5 + level / 2)) * whole.sd * math.sqrt(2 / whole.n)
    if len(summaries) > 1:
        means = [s.mean for s in summaries]
        between = float(np.std(means, ddof=1)) * math.sqrt(1 + 1 / len(means))
        half = max(half, float(stdtrit(len(means) - 1, 0.5 + level / 2)) * between if len(means) > 2 else 2 * between)
    return half


def predict_mean(summaries: Sequence[Summary], *, model_error: float = 0.0, scale: float = 1.0) -> Prediction:
    """Return `scale` x the mean of these repeats with its interval, never below 0.

    model_error: relative half width added for what the repeats can't show (another hour, another configuration).
    """
    mean = pool(summaries).mean * scale
    half = half_width(summaries) * abs(scale) + model_error * abs(mean)
    return Prediction(value=mean, low=max(min(0.0, mean), mean - half), high=mean + half, level=LEVEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsToGoal:
    """How many rounds an accuracy takes."""

    rounds: Prediction
    reached: bool = False
    """The curve itself reached the goal: the number is read off, not extrapolated."""
    thin: str = ""
    """Empty, or what is missing for a trustworthy number."""
    more_rounds: int = 0
    """When thin: how long a curve would tell more."""


def rounds_to_goal(rounds: Sequence[float], accuracy: Sequence[float], goal: float, *, max_rounds: int) -> RoundsToGoal:
    """Return the rounds until `accuracy` first reaches `goal`.

    rounds, accuracy: one entry per evaluation, rounds ascending. max_rounds: nothing beyond ten times this is told apart.
    Raises SpecError for curves of unequal length or a round below 0.

    Model: 1 - accuracy = a + b (r + r0)^-c with a, b, r0 >= 0 and 0 < c <= 4, the power law with offset used for
    learning curves by Domhan, Springenberg & Hutter (2015, "pow3"/"pow4"). Least squares, later rounds weighing more;
    the interval is the profile over all parameters whose residuals are plausible beside the best (F test with one
    degree of freedom, effective number of points after lag-1 autocorrelation); the value is the median of those that
    reach the goal at all, weighed by likelihood.
    """
    if len(rounds) != len(accuracy) or any(r < 0 for r in rounds):
        raise SpecError(f"a curve needs as many rounds as accuracies, none below 0; found {len(rounds)} and {len(accuracy)}")
    for r, reached in zip(rounds, accuracy, strict=True):
        if reached >= goal:
            exact = float(math.ceil(r))
            return RoundsToGoal(rounds=Prediction(value=exact, low=exact, high=exact, level=LEVEL), reached=True)
    seen = max(rounds, default=0.0)
    top = 10.0 * max_rounds
    if len(rounds) < MIN_POINTS:
        more = max(2 * MIN_POINTS, int(2 * seen))
        guess = min(top, max(2.0 * seen + 1, float(more)))
        return RoundsToGoal(
            rounds=Prediction(value=guess, low=min(seen + 1, guess), high=max(top, guess), level=LEVEL),
            thin=f"the learning curve has {len(rounds)} evaluations; at least {MIN_POINTS} are needed to extrapolate",
            more_rounds=more,
        )
    prediction = _extrapolate(np.asarray(rounds, float), np.asarray(accuracy, float), goal, top)
    thin = _why_thin(prediction, seen, top, goal)
    if not thin:
        return RoundsToGoal(rounds=prediction)
    # far out the fit's own lower end says little: a plateau may end with the next round
    prediction = replace(prediction, low=min(prediction.value, seen + 1))
    return RoundsToGoal(rounds=prediction, thin=thin, more_rounds=math.ceil(min(prediction.value * 1.1, 4 * seen)))


def _why_thin(prediction: Prediction, seen: float, top: float, goal: float) -> str:
    if prediction.value >= top:
        return f"after {seen:g} rounds the learning curve flattens below {goal:.3g}"
    if prediction.value > MAX_STRETCH * seen:
        return f"{prediction.value:.0f} rounds are extrapolated from {seen:g}, more than {MAX_STRETCH:g} times as many"
    widest = max(prediction.high - prediction.value, prediction.value - prediction.low)
    if widest > MAX_WIDTH * prediction.value:
        return f"the rounds to {goal:.3g} lie anywhere between {prediction.low:.0f} and {prediction.high:.0f}"
    return ""


def _extrapolate(rounds: Floats, accuracy: Floats, goal: float, top: float) -> Prediction:
    error, limit, seen = 1.0 - accuracy, 1.0 - goal, float(rounds.max())
    weights = np.clip(rounds / seen, 0.1, 1.0)
    steps = np.diff(np.unique(accuracy))
    resolution = float(steps.min()) / 2 if steps.size else 1e-3
    least = max(resolution**2 / 3 * float(weights.sum()), float(np.sum(weights * (CURVE_ERROR * error) ** 2)), 1e-15)
    # offset, power and floor; each pass looks closer at the box that the plausible parameters of the last one span
    box = [(0.0 if rounds.min() > 0 else 0.25, 3 * seen), (0.1, 4.0), (0.0, float(error.min()))]
    low = high = value = top
    for _ in range(_PASSES):
        grid = _surface(rounds, error, weights, box)
        floors, offsets, powers, scales, squares = grid
        best = np.unravel_index(int(np.argmin(squares)), squares.shape)
        fitted = floors[best] + scales[best] * (rounds + offsets[best]) ** -powers[best]
        freedom = min(MAX_FREEDOM, max(1.0, _effective_points((error - fitted) * np.sqrt(weights)) - 4))
        noise_squares = max(float(squares[best]), least)
        f_ratio = float(stdtrit(freedom, 0.5 + LEVEL / 2)) ** 2
        plausible = squares <= float(squares[best]) + noise_squares * f_ratio / freedom
        noise = math.sqrt(noise_squares / float(weights.sum()))
        needed = _needed(floors, offsets, powers, scales, limit, top)
        early = _needed(floors, offsets, powers, scales, limit + noise, top)
        low, high = float(early[plausible].min()), float(needed[plausible].max())
        likely = np.exp((float(squares[best]) - squares) * freedom / (2 * noise_squares))
        value = _median(needed[plausible & (needed < top)], likely[plausible & (needed < top)], otherwise=top)
        box = [_closer(axis, plausible, sides) for axis, sides in zip((offsets, powers, floors), box, strict=True)]
    value = min(top, max(seen + 1, math.ceil(value)))
    beyond = MODEL_ERROR * (value - seen)
    low = min(value, max(seen + 1, math.floor(low - beyond)))
    high = max(value, min(top, math.ceil(high + beyond)))
    return Prediction(value=value, low=low, high=high, level=LEVEL)


def _closer(axis: Floats, plausible: NDArray[np.bool_], sides: tuple[float, float]) -> tuple[float, float]:
    """Return the span of the plausible values of one parameter, a grid step wider on both sides."""
    values = axis[plausible]
    known = np.unique(axis)
    first = int(np.searchsorted(known, values.min())) - 1
    last = int(np.searchsorted(known, values.max())) + 1
    return (float(known[first]) if first >= 0 else sides[0], float(known[last]) if last < known.size else sides[1])


def _surface(
    rounds: Floats, error: Floats, weights: Floats, box: Sequence[tuple[float, float]]
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Return a, r0, c, the best b and the weighted squares, each over a grid of (r0, c, a) in the box."""
    (offset_low, offset_high), (power_low, power_high), (floor_low, floor_high) = box
    offset_axis = offset_low + np.geomspace(1, 1 + offset_high - offset_low, 24) - 1
    power_axis = np.geomspace(power_low, max(power_high, power_low * (1 + 1e-9)), 32)
    floor_axis = np.linspace(floor_low, floor_high, 24)
    shape = (rounds[None, None, :] + offset_axis[:, None, None]) ** -power_axis[None, :, None]
    xx = np.einsum("rcn,n->rc", shape**2, weights)[:, :, None]
    xe = np.einsum("rcn,n->rc", shape, weights * error)[:, :, None]
    x = np.einsum("rcn,n->rc", shape, weights)[:, :, None]
    floors, offsets, powers = np.broadcast_arrays(
        floor_axis[None, None, :], offset_axis[:, None, None], power_axis[None, :, None]
    )
    scales = np.maximum(0.0, (xe - floors * x) / xx)
    ee = float(np.sum(weights * error**2))
    e, w = float(np.sum(weights * error)), float(np.sum(weights))
    squares = ee - 2 * floors * e + floors**2 * w - 2 * scales * (xe - floors * x) + scales**2 * xx
    return floors, offsets, powers, scales, np.maximum(squares, 0.0)


def _needed(floors: Floats, offsets: Floats, powers: Floats, scales: Floats, limit: float, top: float) -> Floats:
    gap = limit - floors
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rounds = np.where(gap > 0, (scales / np.maximum(gap, 1e-300)) ** (1 / powers) - offsets, top)
    clipped: Floats = np.clip(np.nan_to_num(rounds, nan=top, posinf=top), 0.0, top)
    return clipped


def _median(values: Floats, weights: Floats, *, otherwise: float) -> float:
    """Return the weighted median: who sets a goal holds it to be reachable, so that only such parameters are asked."""
    if not values.size:
        return otherwise
    order = np.argsort(values)
    return float(values[order][int(np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2))])


def _effective_points(residuals: Floats) -> float:
    """Return how many independent points these residuals are worth (lag-1 autocorrelation)."""
    n, total = residuals.size, float(np.sum(residuals**2))
    if total <= 0:
        return float(n)
    lag = max(0.0, float(np.sum(residuals[1:] * residuals[:-1])) / total)
    return max(5.0, n * (1 - lag) / (1 + lag))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """y = intercept + slope x, fitted by least squares."""

    intercept: float
    slope: float
    n: int
    x_mean: float
    x_squares: float
    """Sum of (x - mean)^2."""
    residual_sd: float
    """0 when the fit has no freedom left (two points)."""

    def predict(self, x: float) -> Prediction:
        """Return y at x with the interval of a new observation; without freedom, `SINGLE_SPREAD` of y."""
        y = self.intercept + self.slope * x
        if self.n < 3:
            half = SINGLE_SPREAD * abs(y)
        else:
            spread = math.sqrt(1 + 1 / self.n + (x - self.x_mean) ** 2 / self.x_squares)
            half = float(stdtrit(self.n - 2, 0.5 + LEVEL / 2)) * self.residual_sd * spread
        return Prediction(value=y, low=y - half, high=y + half, level=LEVEL)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Return the least-squares line, e.g. request time against batch. Raises SpecError without two different x."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if xs.size != ys.size or np.unique(xs).size < 2:
        raise SpecError(f"a line needs at least two points with different x; found {list(x)[:5]!r}")
    centred: Any = xs - xs.mean()
    x_squares = float(centred @ centred)
    slope = float(centred @ ys) / x_squares
    intercept = float(ys.mean()) - slope * float(xs.mean())
    residuals = ys - intercept - slope * xs
    sd = math.sqrt(float(residuals @ residuals) / (xs.size - 2)) if xs.size > 2 else 0.0
    return Line(
        intercept=intercept, slope=slope, n=xs.size, x_mean=float(xs.mean()), x_squares=x_squares, residual_sd=sd
    )  # fmt: skip
