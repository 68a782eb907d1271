"""Whether a lease is idle, for how long, and what to do about it: shrink, then warn, then reclaim.

Idle is CPU and GPU idle, never "browser closed": a kernel that computes with nobody connected is busy, and a connection that is
open, or a process that sleeps, keeps nothing alive. Connections are not even looked at.

How soon an idle lease will be needed shows in its own past and in how busy the others are: `Chances` learns from the gaps of
all leases (logistic regression), as soon as it has seen enough of them. Weighed and rejected: hazards by age from own and
others' gaps (worse than a fixed timeout), boosted trees (no better). Pure: minutes and samples are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from tenure.tenants import Policy
from tenure.usage import Usage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BUSY_CPUS = 0.02
"""Cores in use from which a lease is busy: low enough for what computes a tenth of the time where it gets a fifth of
a core; what only keeps a connection open takes about 0.0001."""
BUSY_GPU = 0.01
"""Share of the time in which a device ran something."""
HORIZON_MIN = 10
"""An idle lease that is needed again within so many minutes had better be left alone."""
MEMORIES_MIN = (5.0, 15.0, 60.0, 240.0)
"""Spans over which it is remembered how busy a lease was; each fades by half in about 0.7 of it."""
GAP_WEIGHT = 0.15
"""Of the latest gap in what is remembered of a lease's gaps."""
MAX_AGE_MIN = 120
"""Minutes of a gap that are learnt from; later ones look alike."""
MIN_GAPS = 200
"""Gaps seen before anything is foretold."""
MAX_ROWS = 50_000
"""Minutes learnt from; the oldest are forgotten first."""
REFIT_ROWS = 1.25
"""The model is made anew when there are so many times as many minutes."""
RIDGE = 1.0


class Step(StrEnum):
    """What is due for an idle lease."""

    NONE = "none"
    SHRINK = "shrink"
    WARN = "warn"
    RECLAIM = "reclaim"


def is_busy(before: Usage, now: Usage) -> bool:
    """Return whether a lease computed between two samples, the later one second. Two of the same moment say it did not."""
    took_s = now.at_s - before.at_s
    cpus = (now.cpu_s - before.cpu_s) / took_s if took_s > 0 else 0.0
    return cpus >= BUSY_CPUS or now.gpu_busy >= BUSY_GPU


def due(policy: Policy, idle_s: float, chance: float | None = None) -> Step:
    """Return the furthest step that a tenant's policy has for a lease that has been idle for so long.

    chance: of demand within HORIZON_MIN, where it can be told.
    """
    foretold = chance is not None and policy.idle_chance is not None and chance <= policy.idle_chance
    if (policy.idle_reclaim_s is not None and idle_s >= policy.idle_reclaim_s) or (foretold and idle_s >= 60.0):
        return Step.RECLAIM
    if policy.idle_warn_s is not None and idle_s >= policy.idle_warn_s:
        return Step.WARN
    if policy.idle_shrink_s is not None and idle_s >= policy.idle_shrink_s:
        return Step.SHRINK
    return Step.NONE


Row = tuple[tuple[float, ...], bool]
"""What was known of an idle lease in one minute, and whether it was needed within HORIZON_MIN."""


@dataclass(slots=True)
class Past:
    """One lease, minute by minute: what of its past tells how soon it will be needed."""

    idle_min: int = 0
    """Of the present gap; 0 while it is busy."""
    busy_min: int = 0
    """Of the busy time before it, or of the present one."""
    shares: list[float] = field(default_factory=lambda: [0.5] * len(MEMORIES_MIN))
    """How busy it was, over MEMORIES_MIN."""
    long_gaps: float = 0.5
    """Share of its gaps that were longer than HORIZON_MIN."""
    log_gap: float = math.log(HORIZON_MIN)
    _rows: list[tuple[float, ...]] = field(default_factory=list)

    def observe(self, busy: bool, others_busy: float) -> list[Row]:
        """Take one minute in; return what a gap that has just ended teaches. others_busy: share of all leases busy now."""
        taught: list[Row] = []
        if busy:
            taught = self._ended(needed=True)
            self.busy_min = 1 if self.idle_min else self.busy_min + 1
            self.idle_min = 0
        else:
            self.idle_min += 1
        for number, memory_min in enumerate(MEMORIES_MIN):
            self.shares[number] += (busy - self.shares[number]) / memory_min
        if not busy and self.idle_min <= MAX_AGE_MIN:
            self._rows.append(self.known(others_busy))
        return taught

    def left(self) -> list[Row]:
        """Return what the present gap teaches when nobody came back: minutes after which it went on past the horizon."""
        return self._ended(needed=False)

    def _ended(self, *, needed: bool) -> list[Row]:
        rows, self._rows = self._rows, []
        if not self.idle_min:
            return []
        last = self.idle_min
        taught = [(row, needed and last - age <= HORIZON_MIN) for age, row in enumerate(rows, 1)]
        if needed:
            self.long_gaps += GAP_WEIGHT * ((last > HORIZON_MIN) - self.long_gaps)
            self.log_gap += GAP_WEIGHT * (math.log(last) - self.log_gap)
            return taught
        return [(row, False) for age, (row, _) in enumerate(taught, 1) if last - age >= HORIZON_MIN]

    def known(self, others_busy: float) -> tuple[float, ...]:
        """Return what is known in an idle minute, for `Chances`."""
        age, before = math.log(max(1, self.idle_min)), math.log1p(self.busy_min)
        roots = [math.sqrt(max(0.0, share)) for share in self.shares]
        own = (self.long_gaps, self.log_gap, math.sqrt(max(0.0, others_busy)))
        with_age = (age * self.long_gaps, age * self.log_gap, age * roots[3], age * roots[2], age * before)
        return (age, age * age, before, *roots, *own, *with_age, roots[3] * self.long_gaps)


class Chances:
    """Foretells demand for idle leases from the gaps of all leases. Memory is bounded by MAX_ROWS."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._gaps = self._fitted_rows = 0
        self._weights: list[float] = []

    def learn(self, taught: Sequence[Row]) -> None:
        """Take in what one gap taught."""
        if taught:
            self._gaps += 1
            self._rows.extend(taught)
            if len(self._rows) > MAX_ROWS:
                del self._rows[: len(self._rows) - MAX_ROWS // 2]
                self._fitted_rows = 0

    def chance(self, known: Sequence[float]) -> float | None:
        """Return the chance that a lease is needed within HORIZON_MIN; None until MIN_GAPS gaps have been seen."""
        if self._gaps < MIN_GAPS:
            return None
        if not self._weights or len(self._rows) >= REFIT_ROWS * self._fitted_rows:
            self._weights, self._fitted_rows = _fitted(self._rows), len(self._rows)
        score = self._weights[0] + sum(weight * value for weight, value in zip(self._weights[1:], known, strict=True))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, score))))


def _fitted(rows: Sequence[Row], *, rounds: int = 15) -> list[float]:
    """Return constant and weights of a ridge logistic regression, by Newton steps on standardised quantities."""
    import numpy as np  # a broker without idle policies has no use for it

    values: Array = np.array([known for known, _ in rows], float)
    wanted: Array = np.array([needed for _, needed in rows], float)
    mean, scale = values.mean(axis=0), values.std(axis=0) + 1e-9
    design = np.column_stack([np.ones(len(rows)), (values - mean) / scale])
    penalty = RIDGE * np.eye(design.shape[1])
    penalty[0, 0] = 1e-6  # outcomes that are all alike have no finite constant
    weights = np.zeros(design.shape[1])
    for _ in range(rounds):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        slope = (design * (chance * (1 - chance) + 1e-6)[:, None]).T @ design + penalty
        weights = weights + np.linalg.solve(slope, design.T @ (wanted - chance) - penalty @ weights)
    plain = weights[1:] / scale
    return [float(weights[0] - plain @ mean), *map(float, plain)]
