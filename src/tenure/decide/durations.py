"""How long a job will run by those like it that ended, and how long an idle lease is kept. Pure folds over what was seen.

Run times are spread over many powers of ten, so intervals are quantiles of what similar jobs took, not a mean and a deviation.
Few of the same kind are filled up by coarser groups: all gangs of the program, all programs of the tenant, everyone. Jobs come
in batches that resemble each other more than those before, so intervals widen until they hold as many run times as they say.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError

Array = NDArray[np.float64]
PER_GROUP = 256
"""Run times kept per group, the latest."""
MAX_GROUPS = 4096
"""Groups kept, those last seen."""
_COARSER_COUNTS = 8.0
"""How many run times of its own outweigh what a group inherits from the next coarser one."""
_STEERED_LEVEL = 0.8
_STEERING = 0.01


class Kind(NamedTuple):
    """What makes jobs similar."""

    tenant: str
    program: str
    gang_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """A run time foretold, in seconds."""

    value_s: float
    """Median: as likely exceeded as not."""
    low_s: float
    high_s: float
    level: float
    """The chance of ending between low and high."""
    similar: int
    """Run times seen of exactly this kind."""


class RunTimes:
    """Folds ended jobs into the run times of those to come. Memory: at most MAX_GROUPS groups of PER_GROUP values."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[object, ...], deque[float]] = OrderedDict()
        self._tails = 1.0
        """What the chances beside an interval are multiplied by, steered so that as many run times lie in it as it says."""

    def observe(self, kind: Kind, run_s: float) -> None:
        """Learn that a job of this kind ended after run_s seconds. Raises SpecError unless it is finite and >= 0."""
        if not (math.isfinite(run_s) and run_s >= 0):
            raise SpecError(f"a run time must be finite and at least 0 s; found {run_s!r}")
        foretold = self.foretell(kind, level=_STEERED_LEVEL)
        if foretold is not None:
            missed = not foretold.low_s <= run_s <= foretold.high_s
            self._tails += _STEERING * (1 - missed / (1 - _STEERED_LEVEL))
            self._tails = min(max(self._tails, 0.05), 1.5)
        for group in _groups(kind):
            self._groups.setdefault(group, deque(maxlen=PER_GROUP)).append(run_s)
            self._groups.move_to_end(group)
        while len(self._groups) > MAX_GROUPS:
            self._groups.popitem(last=False)

    def foretell(self, kind: Kind, *, level: float = 0.8) -> RunTime | None:
        """Return the run time of a job of this kind; None before any job ended.

        level: chance that the run time lies in the interval, 0 < level < 1.
        """
        if not 0 < level < 1:
            raise SpecError(f"the level of an interval lies between 0 and 1; found {level!r}")
        values, weights = self._mixture(kind)
        if not len(values):
            return None
        tail = min((1 - level) / 2 * self._tails, 0.5)
        shares = np.array([tail, 0.5, 1 - tail])
        low, middle, high = _quantiles(values, weights, shares).tolist()
        own = self._groups.get(_groups(kind)[0], ())
        return RunTime(value_s=middle, low_s=low, high_s=high, level=level, similar=len(own))

    def _mixture(self, kind: Kind) -> tuple[Array, Array]:
        """Return run times and their weights: each group's own, and the rest of the weight from the next coarser."""
        values: list[Array] = []
        weights: list[Array] = []
        left = 1.0
        groups = [self._groups[g] for g in _groups(kind) if g in self._groups]
        for i, group in enumerate(groups):
            n, last = len(group), i == len(groups) - 1
            share = left if last else left * n / (n + _COARSER_COUNTS)
            values.append(np.array(group))
            weights.append(np.full(n, share / n))
            left -= share
        return (np.concatenate(values), np.concatenate(weights)) if values else (np.empty(0), np.empty(0))


def keep_alive_s(idle_gaps_s: Sequence[float], *, restart_s: float, at_most: float = 3.0) -> float:
    """Return after how many idle seconds to give a lease back: the best of those seen, within a bound for any to come.

    idle_gaps_s: how long holders were idle before they came back, any order; infinite: they never did.
    restart_s: what coming back after that costs, in seconds of holding, > 0. at_most: holding and restarts together never cost
    more than this multiple of what one pays who knew each gap before, whatever comes; >= 2.
    With a timeout t the worst gap ends just after it: (t + r) / min(t, r) (ski rental, Karlin et al. 1988), so t lies between
    r / (at_most - 1) and r x (at_most - 1); with 2 it is r. In there, the least mean cost of the gaps seen.
    """
    if restart_s <= 0 or at_most < 2 or any(not gap >= 0 for gap in idle_gaps_s):
        raise SpecError(f"a keep-alive needs restart_s > 0, at_most >= 2 and gaps >= 0; found {restart_s!r}, {at_most!r}")
    low, high = restart_s / (at_most - 1), restart_s * (at_most - 1)
    gaps = np.sort(np.asarray(idle_gaps_s, dtype=np.float64))
    candidates = np.unique(np.concatenate([[restart_s, low, high], gaps[(gaps >= low) & (gaps <= high)]]))
    within = np.searchsorted(gaps, candidates, side="right")
    held = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(gaps), gaps, 0.0))])[within]
    costs = held + (len(gaps) - within) * (candidates + restart_s)
    best = costs <= costs.min() * (1 + 1e-12)
    # Among equals the one nearest to the restart: it has the best bound.
    return float(candidates[best][np.argmin(np.abs(np.log(candidates[best] / restart_s)))])


def _groups(kind: Kind) -> tuple[tuple[object, ...], ...]:
    """Return the groups a kind belongs to, the finest first."""
    return (tuple(kind), (kind.tenant, kind.program), (kind.tenant,), ())


def _quantiles(values: Array, weights: Array, shares: Array) -> Array:
    """Return weighted quantiles: the least value with at least this share of the weight at or below it."""
    order = np.argsort(values, kind="stable")
    heaped = np.cumsum(weights[order])
    found = np.searchsorted(heaped, shares * heaped[-1] * (1 - 1e-12))
    return np.asarray(values[order][np.minimum(found, len(values) - 1)], dtype=np.float64)
