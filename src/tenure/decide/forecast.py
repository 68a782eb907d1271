"""Demand some time ahead, with the capacity that keeps the risk of a miss bounded: one `Forecaster` per tenant or node.

Pure: a fold over (time, demand). Several simple forecasts run side by side, each with its own recent errors at the lead; the
quantile of those errors makes its capacity, and those that held little and missed little lately weigh most. What is held is
steered: each miss lowers the risk aimed at, each step without one raises it a little, so the misses keep to the bound while
demand drifts (adaptive conformal inference, Gibbs & Candès 2021, with a tail beyond the largest error seen).

Weighed and left out, unmeasured: neural and ARIMA models. Each needs a training run per tenant, and a short bursty series
gives them little to learn from. How far the bound is met, and where it is not, `benchmarks/forecast.py` says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError

from .season import LeastSquares, Made, Recent, Season, find_period

Array = NDArray[np.float64]
DAY_S, WEEK_S = 86_400.0, 604_800.0
EXPERTS = ("any time", "last value", "fast level", "level", "slow level", "moving maximum", "fitted", "highest so far")
LEAD_STEPS_MAX = 4096
_PLAIN = np.array([1, 2, 3, 4, 6])
"""Those of the experts that foretell a value rather than a bound: what a season has to beat."""
_HIGHEST = EXPERTS.index("highest so far")
"""Held as it is, without a margin: what others have to beat."""
_ERRORS = (512, 4096)
"""Errors kept per expert: 8 leads of them, in these bounds."""
_RECENT = 2048
_STEERING = 1.0
_STEERING_MAX = 0.01
"""What a miss takes off the risk aimed at: the first over the steps of a lead, as misses are known a lead late and come
together, and at most the second."""
_RISK_SPAN = (0.05, 5.0)
"""How far the steered risk may go, as shares of the risk asked for."""
_FADES_LEADS, _FADES_STEPS = 9, 100
"""How far back losses count: the larger of the two."""
_NEAR = np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
"""What the fitted forecast starts from: the level. Features: mean, last value, fast, middle and slow level, maximum."""
_SHARPNESS = 40.0
_CEILING = 1.1
"""Held at most, as a share of the highest demand so far: few errors say little about how far their tail goes."""
_ABOVE = 1 + 1e-9
"""Against rounding: a constant demand must not count as above itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What demand will be `lead_s` after the last observation, in the unit of the observations."""

    center: float
    low: float
    """Below it with a chance of 10 %."""
    high: float
    """Above it with a chance of 10 %."""
    capacity: float
    """What to hold, so that demand is above it with the risk asked for."""
    season_s: float | None
    """The period that is being used, None where none pays."""
    observations: int


@dataclass(slots=True)
class _Open:
    """Forecasts made for one step that has not come yet."""

    points: Array
    capacities: Array
    capacity: float
    features: Array
    seasons: list[tuple[Season, Made]]


class Forecaster:
    """Folds a series of demand into forecasts at a fixed lead. Memory does not grow with the number of observations."""

    def __init__(
        self,
        *,
        step_s: float,
        lead_s: float,
        risk: float = 0.01,
        periods_s: Sequence[float] = (DAY_S, WEEK_S),
        unit: float = 0.0,
    ) -> None:
        """step_s: time between observations. lead_s: how far ahead. risk: accepted share of steps with demand above capacity.

        periods_s: periods to try beside what the series itself shows. unit: what demand comes in whole multiples of, so that
        capacity between two of them is not held; 0: any demand.
        Raises SpecError unless step_s > 0, lead_s > 0, at most 4,096 steps, 0 < risk <= 0.5 and unit >= 0.
        """
        if not (step_s > 0 and 0 < lead_s <= LEAD_STEPS_MAX * step_s and 0 < risk <= 0.5 and unit >= 0):
            raise SpecError(
                f"a forecast needs step_s > 0, 0 < lead_s <= {LEAD_STEPS_MAX} steps, 0 < risk <= 0.5, unit >= 0; "
                f"found step_s {step_s!r}, lead_s {lead_s!r}, risk {risk!r}, unit {unit!r}"
            )
        self.step_s, self.risk, self.unit = step_s, risk, unit
        self.lead = max(1, math.ceil(lead_s / step_s - 1e-9))
        steps = {p / step_s for p in periods_s}
        self._seasons = [Season(p, self.lead, _NEAR) for p in sorted(steps) if p >= max(4, self.lead + 1)]
        self._found: Season | None = None
        self._slots = len(EXPERTS) + len(self._seasons) + 1
        self._keep = min(max(8 * self.lead, _ERRORS[0]), _ERRORS[1])
        self._fades = 1 - 1 / max(_FADES_STEPS, _FADES_LEADS * self.lead)
        self._steering = min(_STEERING_MAX, _STEERING / self.lead)
        self._errors = np.full((self._slots, self._keep), np.nan)
        self._count = np.zeros(self._slots, dtype=np.int64)
        self._loss, self._seen = np.zeros(self._slots), np.zeros(self._slots)
        self._squares = np.zeros(len(_PLAIN))
        taus = np.array([max(1.0, self.lead / 2), 2.0 * self.lead, 8.0 * self.lead])
        self._gains = 1 - np.exp(-1 / taus)
        self._levels = np.zeros(3)
        self._mean = 0.0
        self._window: deque[tuple[int, float]] = deque(maxlen=2 * self.lead)
        self._fit = LeastSquares(_NEAR)
        self._open: dict[int, _Open] = {}
        self._recent = Recent(_RECENT)
        self._look_at = 48
        self._aim = risk
        self._highest = 0.0
        self._at: int | None = None
        self._now: _Open | None = None
        self.observations = 0
        self.misses = 0
        """Steps whose demand was above the capacity foretold for them, of `judged`."""
        self.judged = 0

    def observe(self, t_s: float, demand: float) -> None:
        """Learn the demand of the step that ends at t_s. Steps may be left out; those are neither learnt nor judged.

        Raises SpecError for a demand that is negative or not finite, or a time not after the last one.
        """
        if not (math.isfinite(demand) and demand >= 0 and math.isfinite(t_s)):
            raise SpecError(f"demand must be finite and at least 0; found {demand!r} at {t_s!r} s")
        at = round(t_s / self.step_s)
        if self._at is not None and at <= self._at:
            raise SpecError(f"observations must be a step ({self.step_s} s) apart, in order; found step {at} after {self._at}")
        root = math.sqrt(demand)
        self._judge(at, demand, root)
        self._learn(at, root)
        self._highest = max(self._highest, demand)
        self._at, self.observations = at, self.observations + 1
        self._now = self._open[at + self.lead] = self._look_ahead(at, root)

    def forecast(self) -> Forecast:
        """Return the forecast for one lead after the last observation. Raises SpecError before the first."""
        now = self._current()
        return Forecast(
            center=self.quantile(0.5),
            low=self.quantile(0.1),
            high=self.quantile(0.9),
            capacity=now.capacity,
            season_s=self.season_s,
            observations=self.observations,
        )

    def quantile(self, share: float) -> float:
        """Return the demand that is not exceeded with this chance one lead ahead; grows with share, 0 < share < 1."""
        now = self._current()
        return self._mix(_capacities(now.points, self._errors, self._count, 1 - share, self._highest))

    def capacity(self) -> float:
        """Return what to hold one lead ahead so that demand is above it in at most `risk` of the steps."""
        return self._current().capacity

    @property
    def season_s(self) -> float | None:
        """The period of the season in use, the shortest of those that pay most; None where none pays."""
        used = [s for s in self._seasons if s.used]
        if self._found and self._found.used and not any(abs(s.period / self._found.period - 1) < 0.05 for s in used):
            used.append(self._found)
        most = max((s.score() for s in used), default=0.0)
        # A day shows as two days as well: the shortest that pays about as much.
        return min((s.period * self.step_s for s in used if s.score() >= 0.5 * most), default=None)

    @property
    def season_errors(self) -> dict[float, tuple[float, float]]:
        """Mean squared error (of square roots, at the lead) with and without each season tried so far, by period in seconds."""
        return {s.period * self.step_s: (s.error, s.error_without) for s in self._candidates() if s.error_without > 0}

    @property
    def weights(self) -> dict[str, float]:
        """How much each forecast counts now, by name; they sum up to 1."""
        names = [*EXPERTS, *(f"season of {s.period * self.step_s:g} s" for s in self._candidates())]
        return dict(zip(names, self._weights().tolist(), strict=False))

    def _current(self) -> _Open:
        if self._now is None:
            raise SpecError("nothing observed yet: a forecast needs at least one observation")
        return self._now

    def _candidates(self) -> list[Season]:
        return [*self._seasons, *([self._found] if self._found else [])]

    def _judge(self, at: int, demand: float, root: float) -> None:
        """Compare what was foretold for this step with what came; forget what was foretold for steps left out."""
        for step in [s for s in self._open if s < at]:
            del self._open[step]
        made = self._open.pop(at, None)
        if made is None:
            return
        missed = demand > made.capacity
        self.misses, self.judged = self.misses + missed, self.judged + 1
        low, high = _RISK_SPAN
        self._aim = min(max(self._aim + self._steering * (self.risk - missed), low * self.risk), min(high * self.risk, 0.5))
        known = np.flatnonzero(np.isfinite(made.points))
        self._errors[known, self._count[known] % self._keep] = root - made.points[known]
        over = made.capacities[known] - demand
        self._loss[known] = self._loss[known] * self._fades + np.where(over >= 0, self.risk * over, (self.risk - 1) * over)
        self._seen[known] = self._seen[known] * self._fades + 1
        self._count[known] += 1
        plain = float(made.points[_PLAIN[np.argmin(self._squares)]])
        self._squares = self._squares * 0.999 + (root - made.points[_PLAIN]) ** 2
        self._fit.learn(made.features, root)
        for season, forecasts in made.seasons:
            season.compare(root, forecasts, plain)

    def _learn(self, at: int, root: float) -> None:
        if self._at is None:
            self._levels[:] = root
        self._levels += self._gains * (root - self._levels)
        self._mean += (root - self._mean) / min(self.observations + 1, 4 * self._keep)
        self._window.append((at, root))
        for season in self._candidates():
            season.observe(at, root)
        self._recent.append(at, root)
        if len(self._recent) >= self._look_at:
            self._look_for_period(at)

    def _look_for_period(self, at: int) -> None:
        """Look whether the series shows a period of its own, each time it has grown by a quarter."""
        self._look_at = self.observations + max(48, len(self._recent) // 4)
        values = self._recent.array()
        if self._found is not None and self._found.used:
            return
        period = find_period(values, shortest=max(4, self.lead + 1))
        if period is None or any(_same(s.period, period, len(values)) for s in self._candidates()):
            return
        self._found = Season(period, self.lead, _NEAR)
        for i, value in enumerate(values.tolist()):
            self._found.observe(at - len(values) + 1 + i, value)
        slot = self._slots - 1
        self._errors[slot], self._count[slot], self._loss[slot], self._seen[slot] = np.nan, 0, 0.0, 0.0
        for made in self._open.values():
            made.points[slot] = np.nan

    def _look_ahead(self, at: int, root: float) -> _Open:
        oldest = at - 2 * self.lead
        highest = max(v for step, v in self._window if step > oldest)
        features = np.array([self._mean, root, *self._levels, highest])
        points = np.full(self._slots, np.nan)
        points[: len(EXPERTS)] = [0.0, root, *self._levels, highest, self._fitted(features), math.sqrt(self._highest)]
        seasons: list[tuple[Season, Made]] = []
        for slot, season in enumerate(self._seasons, start=len(EXPERTS)):
            self._with_season(season, slot, at, features, points, seasons)
        if self._found is not None:
            self._with_season(self._found, self._slots - 1, at, features, points, seasons)
        capacities = self._whole(_capacities(points, self._errors, self._count, self._aim, self._highest))
        capacities[_HIGHEST] = self._highest
        made = _Open(points=points, capacities=capacities, capacity=0.0, features=features, seasons=seasons)
        made.capacity = float(self._whole(np.array([self._mix(capacities)]))[0]) * _ABOVE
        return made

    def _with_season(
        self,
        season: Season,
        slot: int,
        at: int,
        features: Array,
        points: Array,
        seasons: list[tuple[Season, Made]],
    ) -> None:
        made = season.ahead(at, features)
        if made is not None:
            points[slot] = made.forecasts[made.best]
            seasons.append((season, made))

    def _fitted(self, features: Array) -> float:
        """Return the least-squares forecast from levels and maximum, within what such demand can be."""
        return float(min(max(self._fit.ahead(features), 0.0), 2 * math.sqrt(self._highest)))

    def _weights(self) -> Array:
        """Return the weight of each expert: by its mean pinball loss to a power; seasons that do not pay have none."""
        loss = np.full(self._slots, np.inf)
        known = self._count >= 1
        loss[known] = self._loss[known] / self._seen[known]
        for slot, season in enumerate(self._seasons, start=len(EXPERTS)):
            if not season.used:
                loss[slot] = np.inf
        if self._found is None or not self._found.used:
            loss[-1] = np.inf
        if not np.isfinite(loss).any():
            return np.asarray(np.eye(self._slots)[1], dtype=np.float64)
        least = float(loss.min())
        weights = np.power(loss / least, -_SHARPNESS) if least > 0.0 else (loss <= 0.0).astype(np.float64)
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def _mix(self, capacities: Array) -> float:
        """Return the weighted mean of the experts' bounds, below the ceiling."""
        weights = np.where(np.isfinite(capacities), self._weights(), 0.0)
        total = float(weights.sum())
        if total <= 0.0:
            return self._highest
        mean = float(np.nansum(weights * np.nan_to_num(capacities)) / total)
        return min(mean, _CEILING * self._highest)

    def _whole(self, capacities: Array) -> Array:
        """Return them without what lies between two multiples of the unit, of no use to anybody."""
        if not self.unit:
            return capacities
        return np.asarray(np.floor(capacities / self.unit + 1e-6) * self.unit, dtype=np.float64)


def _same(period: float, other: float, steps: int) -> bool:
    """Tell whether two periods stay within an eighth of each other over so many steps."""
    return abs(period - other) * steps / period <= max(1.0, period / 8)


def _capacities(points: Array, errors: Array, count: NDArray[np.int64], risk: float, highest: float) -> Array:
    """Return per expert the demand that is above its forecast's calibrated bound with this risk; NaN without a forecast."""
    found = np.full(len(points), np.nan)
    for k in np.flatnonzero(np.isfinite(points)):
        n = min(int(count[k]), errors.shape[1])
        bound = points[k] + upper(errors[k, :n], risk) if n else math.sqrt(highest)
        found[k] = max(bound, 0.0) ** 2
    return found


def upper(errors: Array, risk: float) -> float:
    """Return the value that one more error of the same kind exceeds with this chance: a conformal quantile.

    errors: shape (n,), n >= 1, any order. Beyond what n errors can show (risk < 1 / (n + 1)) an exponential tail goes on from
    the highest tenth (peaks over threshold, Balkema & de Haan 1974), never below the highest error.
    """
    n = len(errors)
    rank = math.ceil((n + 1) * (1 - risk) - 1e-9)
    if rank <= n:
        return float(np.partition(errors, max(rank, 1) - 1)[max(rank, 1) - 1])
    ordered = np.sort(errors)
    top = ordered[-max(2, n // 10) :]
    share = len(top) / (n + 1)
    return float(max(ordered[-1], top[0] + float(np.mean(top - top[0])) * math.log(share / risk)))


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One step of a series, and what had been foretold for it a lead before."""

    t_s: float
    demand: float
    foretold: Forecast


def rehearse(forecaster: Forecaster, series: Iterable[tuple[float, float]]) -> list[Rehearsed]:
    """Return how a forecaster would have done on a series of (time, demand): rolling origin, nothing known beforehand.

    The first steps, for which nothing had been foretold, are not among them.
    """
    made: dict[int, Forecast] = {}
    found = []
    for t_s, demand in series:
        at = round(t_s / forecaster.step_s)
        if at in made:
            found.append(Rehearsed(t_s, demand, made[at]))
        forecaster.observe(t_s, demand)
        made[at + forecaster.lead] = forecaster.forecast()
        made.pop(at - 1, None)
    return found


def nodes_needed(forecast: Forecast, *, node_capacity: float, held: int = 0, keep: int = 0) -> int:
    """Return how many nodes to add (or, negative, may go) so that the forecast's capacity is there when its lead is over.

    node_capacity: demand that one node serves, > 0. held: nodes there then already. keep: fewer than that never remain.
    The forecast's lead must be at least the time a node takes to start.
    """
    if node_capacity <= 0 or held < 0 or keep < 0:
        raise SpecError(f"nodes need node_capacity > 0, held >= 0, keep >= 0; found {node_capacity!r}, {held!r}, {keep!r}")
    return max(keep, math.ceil(forecast.capacity / _ABOVE / node_capacity - 1e-9)) - held
