"""Whether a series repeats itself with a period, and what that foretells: one `Season` per period that might be.

A season counts only where it pays: its forecasts run beside forecasts without it from the third period on, both made before
the value was known, and it is used while its squared error is lower by several standard errors. Thus a trace that is too
short for its season, or has none, is noticed without being told. Values come already stabilised (square roots of demand).
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BINS_MAX = 288
"""Parts of a period that are told apart, at most: 5 minutes of a day."""
_FIT_FADES = 0.999
_RIDGE = 0.01
_LEARNING_PERIODS = 2
_FADES = 0.97
"""Weight of a visit of the same part of the period one period later."""
_BLOCKS_MIN = 8
_BLOCK_FADES = 0.995
_LATELY = 0.02
_GAIN_MIN = 0.005
"""Least gain of late, as a share of the error without the season; late: one in 1 / _LATELY half periods. A season that ended
leaves a high score behind."""
_USE_FROM, _USE_UNTIL = 2.0, 1.0
"""Standard errors of the gain from which a season is used, and below which it no longer is."""


class LeastSquares:
    """A linear forecast from features, fitted as values come; near `near` while little was seen. Old values fade."""

    def __init__(self, near: Array) -> None:
        """near: coefficients to start from, shape (features,)."""
        self._near, self._eye = near, np.eye(len(near))
        self._normal, self._moment = np.zeros((len(near), len(near))), np.zeros(len(near))

    def learn(self, features: Array, value: float) -> None:
        """Learn what came for these features."""
        self._normal = self._normal * _FIT_FADES + np.outer(features, features)
        self._moment = self._moment * _FIT_FADES + features * value

    def ahead(self, features: Array) -> float:
        """Return the forecast for these features."""
        ridge = _RIDGE * float(np.trace(self._normal)) / len(self._near) + 1e-300
        solved = np.linalg.solve(self._normal + ridge * self._eye, self._moment + ridge * self._near)
        return float(features @ solved)


class Made(NamedTuple):
    """Forecasts of one step that has not come yet."""

    forecasts: Array
    """From the profile as it is and smoothed, each on a slow and a fast level; then the fitted one."""
    features: Array
    base: Array
    """Slow and fast level without a profile."""
    best: int
    """The one with the lowest error so far."""
    best_without: int
    """The same of the two levels without a profile and the best forecast of others."""


class Season:
    """A profile over one period, learnt as values come, and the running proof of whether it pays. Memory is fixed."""

    def __init__(self, period: float, lead: int, near: Array) -> None:
        """period, lead: in steps; period >= 2. Forecasts are made `lead` >= 1 steps ahead.

        near: what a forecast from the features handed in with each value starts from, as in `LeastSquares`.
        """
        self.period, self.lead = period, lead
        self.used = False
        bins = max(2, min(round(period), BINS_MAX))
        self._sum, self._n = np.zeros(bins), np.zeros(bins)
        self._near = np.arange(-max(1, bins // 12), max(1, bins // 12) + 1)
        self._first: int | None = None
        self._base = np.zeros(2)
        """Slow and fast level of the values as they are: a profile deviates from the slow one."""
        self._levels = np.zeros(4)
        """Level without the season: slow and fast, for the profile as it is and for its smoothed one."""
        self._gains = 1 - np.exp(-1 / np.array([period, 2.0 * lead, period, 2.0 * lead]))
        self._fit = LeastSquares(np.concatenate([near, [0.5, 0.5, -0.5]]))
        self._errors, self._errors_without = np.zeros(5), np.zeros(3)
        self._block, self._in_block = 0.0, 0
        self._block_size = max(lead, math.ceil(period / 2))
        self._m = self._mean = self._m2 = 0.0
        self.error = self.error_without = 0.0
        """Mean squared error so far of the forecasts with the season, and of those without."""
        self._compared = 0
        self._lately = self._plain = 0.0
        """Gain and squared error without the season, of late."""

    def observe(self, at: int, value: float) -> None:
        """Learn the value of step `at`, which is later than all before."""
        bin_ = self._bin(at)
        if self._first is None:
            self._first = at
            self._base[:] = self._levels[:] = value
        self._base += self._gains[:2] * (value - self._base)
        self._levels += self._gains * (value - self._shape(bin_) - self._levels)
        self._sum[bin_] = self._sum[bin_] * _FADES + value - self._base[0]
        self._n[bin_] = self._n[bin_] * _FADES + 1

    def ahead(self, at: int, features: Array) -> Made | None:
        """Return forecasts for step `at + lead` after `at` was observed; None while the first periods are learnt."""
        if self._first is None or at - self._first < _LEARNING_PERIODS * self.period:
            return None
        then, now = self._shape(self._bin(at + self.lead)), self._shape(self._bin(at))
        features = np.concatenate([features, [then[0], then[2], now[2]]])
        forecasts = np.append(self._levels + then, self._fit.ahead(features))
        best, without = int(np.argmin(self._errors)), int(np.argmin(self._errors_without))
        return Made(np.maximum(forecasts, 0.0), features, self._base.copy(), best, without)

    def compare(self, value: float, made: Made, plain: float) -> None:
        """Learn how earlier forecasts did on a value that was not yet known to them.

        plain: the best of others without a season. The season has to beat it and its own levels without their profile, or it
        would pass for one by being a better level.
        """
        errors = (value - made.forecasts) ** 2
        errors_without = (value - np.append(made.base, plain)) ** 2
        without = float(errors_without[made.best_without])
        self._errors_without = self._errors_without * 0.999 + errors_without
        self._compared += 1
        self.error += (float(errors[made.best]) - self.error) / self._compared
        self.error_without += (without - self.error_without) / self._compared
        self._block += float(without - errors[made.best])
        self._plain += _LATELY / self._block_size * (without - self._plain)
        self._in_block += 1
        self._errors = self._errors * 0.999 + errors
        self._fit.learn(made.features, value)
        if self._in_block >= self._block_size:
            self._end_block(self._block / self._in_block)

    def score(self) -> float:
        """Return by how many standard errors the season's squared error is lower; 0 before enough half periods passed."""
        if self._m2 <= 0.0 or self._m < min(_BLOCKS_MIN, 1 / (1 - _BLOCK_FADES)) * _BLOCK_FADES**_BLOCKS_MIN:
            return 0.0
        return self._mean / math.sqrt(self._m2 / self._m / max(self._m - 1, 1.0))

    def _end_block(self, gain: float) -> None:
        self._block, self._in_block = 0.0, 0
        self._m = self._m * _BLOCK_FADES + 1
        off = gain - self._mean
        self._mean += off / self._m
        self._m2 = self._m2 * _BLOCK_FADES + off * (gain - self._mean)
        self._lately += _LATELY * (gain - self._lately)
        self.used = self._lately > _GAIN_MIN * self._plain and self.score() >= (_USE_UNTIL if self.used else _USE_FROM)

    def _bin(self, at: int) -> int:
        return int(at % self.period / self.period * len(self._sum)) % len(self._sum)

    def _shape(self, bin_: int) -> Array:
        """Return what the profile adds at a bin, as it is (twice) and smoothed over a sixth of the period (twice).

        Each is shrunk towards 0 as if one visit without any deviation had been seen too.
        """
        near = (bin_ + self._near) % len(self._sum)
        raw = self._sum[bin_] / (self._n[bin_] + 1)
        smooth = float(self._sum[near].sum()) / (float(self._n[near].sum()) + 1)
        return np.array([raw, raw, smooth, smooth])


def find_period(values: Array, *, shortest: int) -> float | None:
    """Return the period in steps of the strongest repetition in the autocorrelation, None where noise would show it too.

    values: shape (n,), in order, no gaps. shortest: least period looked for, >= 2; the longest is a third of n.
    A candidate only: `Season` proves it on values that come later.
    """
    n = len(values)
    longest = n // 3
    if longest <= shortest + 1:
        return None
    x = values - np.polyval(np.polyfit(np.arange(n), values, 1), np.arange(n))
    spectrum = np.fft.rfft(x, 2 * n)
    correlation = np.fft.irfft(spectrum * np.conj(spectrum))[: longest + 2] / np.arange(n, n - longest - 2, -1)
    if correlation[0] <= 1e-12 * float(np.mean(values**2)):
        return None
    r = correlation / correlation[0]
    lags = np.arange(shortest, longest + 1)
    peaks = lags[(r[lags] > r[lags - 1]) & (r[lags] >= r[lags + 1]) & (r[lags] > 3.0 / math.sqrt(n))]
    if not len(peaks):
        return None
    # The shortest of nearly as high peaks: multiples of a period repeat as well as it does, and tell it more finely.
    period = float(peaks[r[peaks] >= 0.85 * r[peaks].max()][0])
    for times in range(2, int(longest / period) + 1):
        near = peaks[np.abs(peaks - times * period) <= max(1.0, 0.1 * period)]
        if len(near):
            period = float(near[np.argmax(r[near])]) / times
    return period


class Recent:
    """The last values of a series, at most `size`, as an array; a gap in the steps empties it."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._next: int | None = None

    def append(self, at: int, value: float) -> None:
        """Add the value of step `at`."""
        if self._next is not None and at != self._next:
            self._values.clear()
        self._values.append(value)
        self._next = at + 1

    def __len__(self) -> int:
        return len(self._values)

    def array(self) -> Array:
        """Return the values, oldest first."""
        return np.array(self._values)
