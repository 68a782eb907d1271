"""How long a job that has run for a while still takes, when its owner said how long it would, and owners err.

What is learnt: by how much jobs that have ended missed their estimates, as a median and a spread of log(took / said). With
that, a job's run time is log-normal about what was said, cut at what it has already run; a small part of all estimates is
taken to be worthless, so that a job far past its estimate counts as one without.

The answer is the Gittins index: the least expected service per completion over all ways to stop early,
min over d of E[min(X, d)] / P(X <= d), X what is left. Serving the smallest first gives the least mean completion time on one
server when run times are independent and jobs may be interrupted. Source: Gittins, Glazebrook & Weber (2011), chapters 2 and 3.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from .queueing import TAIL

WORTHLESS = 0.05
"""Share of estimates taken to say nothing."""
PRIOR_JOBS = 5
"""As many jobs with an error of PRIOR_SIGMA are taken as seen beforehand."""
PRIOR_SIGMA = 1.0
MIN_SIGMA = 0.05
_STEP = 0.1
_REACH = 10.0
_GRID = np.exp(np.arange(-_REACH, _REACH + _STEP / 2, _STEP))
"""Run times in units of the most likely one."""


class Estimates:
    """What is known of the worth of estimates. A fold over jobs that have ended; equal histories give equal answers."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._table = _table(self.sigma)
        self._next = 1

    @property
    def jobs(self) -> int:
        """Jobs that have ended and had an estimate."""
        return self._count

    @property
    def bias(self) -> float:
        """Mean of log(took / said), drawn towards 0 by the prior."""
        return self._sum / (self._count + PRIOR_JOBS)

    @property
    def sigma(self) -> float:
        """Spread of log(took / said) about the bias, drawn towards PRIOR_SIGMA by the prior."""
        count = self._count + PRIOR_JOBS
        variance = (self._squares + PRIOR_JOBS * PRIOR_SIGMA**2) / count - self.bias**2
        return math.sqrt(max(variance, MIN_SIGMA**2))

    def learn(self, *, took_s: float, estimate_s: float) -> bool:
        """Take in one job that has ended. Return whether answers have changed: they do when a tenth more is known."""
        error = math.log(max(took_s, 1.0) / max(estimate_s, 1.0))
        self._count += 1
        self._sum += error
        self._squares += error * error
        if self._count < self._next:
            return False
        self._next = self._count + max(1, self._count // 10)
        self._table = _table(self.sigma)
        return True

    def service_per_completion_s(self, estimate_s: float, served_s: float) -> float:
        """Return the index of a job with this estimate that has been served for so long: seconds, the smaller the sooner."""
        unit_s = max(estimate_s, 1.0) * math.exp(self.bias - TAIL * self.sigma**2)
        place = (math.log(max(served_s / unit_s, math.exp(-_REACH))) + _REACH) / _STEP
        low = min(int(place), len(self._table) - 2)
        part = min(place - low, 1.0)
        beyond = max(1.0, served_s / unit_s / math.exp(_REACH))
        index = (1 - part) * self._table[low] + part * self._table[low + 1]
        return unit_s * beyond * index


def _table(sigma: float) -> list[float]:
    """Return the index at each point of the grid, in its unit: a log-normal mixed with WORTHLESS of a heavy tail."""
    times = np.concatenate([_GRID, _GRID[-1] * np.exp(np.arange(1, 40) * 0.2)])
    alive = (1 - WORTHLESS) * ndtr(-np.log(times) / sigma) + WORTHLESS * (1 + times) ** -TAIL
    spent = np.concatenate([[0.0], np.cumsum(np.diff(times) * (alive[1:] + alive[:-1]) / 2)])
    best = []
    for start in range(len(_GRID)):
        done = alive[start] - alive[start + 1 :]
        rate = done / (spent[start + 1 :] - spent[start])
        best.append(float(1 / rate.max()))
    return best
