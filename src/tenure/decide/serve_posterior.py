"""What trials tell of all serving settings: the laws of `serve_laws` fitted to them, and draws of what is then plausible.

The parameters have normal priors; what the laws leave unexplained is a Gaussian process over the factors (of each level, of
each pair of levels, of each setting), whose size follows from the trials, and in which one of the settings measured may be
odd: a cliff there says nothing of its neighbours. Draws are of the parameters (their posterior about the best fit), put through
the laws themselves, then of the unexplained. Nothing is random: they come from the seed handed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenure.trials import Configuration, Trial

from . import serve_laws
from .serve_laws import FACTORS, QUANTITIES, Floats, Levels

DRAWS = 800

Metrics = Mapping[str, Floats]
"""What settings give, by the name of the metric, each of shape (draws, settings)."""


@dataclass(frozen=True, slots=True)
class _Effects:
    """How far one quantity leaves the laws: standard deviations of its logarithm."""

    level: float
    """Of each level of each factor."""
    pair: float
    """Of each two levels together."""
    own: float
    """Of each setting."""
    odd: float
    """Of a setting where something happens that tells of no other (a cliff)."""
    repeat: float
    """Of one repeat of a trial, until the trials' own repeats tell."""
    hour: float
    """That all repeats of a trial share."""


_EFFECTS: Mapping[str, _Effects] = {
    "rate": _Effects(0.05, 0.02, 0.02, 0.3, 0.04, 0.015),
    "app_cpu": _Effects(0.03, 0.01, 0.02, 0.1, 0.03, 0.01),
    "server_cpu": _Effects(0.03, 0.01, 0.02, 0.1, 0.03, 0.01),
    "in_flight": _Effects(0.0, 0.0, 0.03, 0.0, 0.05, 0.02),
    "tail": _Effects(0.1, 0.02, 0.06, 0.2, 0.1, 0.02),
    "app_memory": _Effects(0.05, 0.01, 0.02, 0.0, 0.02, 0.01),
    "server_memory": _Effects(0.05, 0.01, 0.02, 0.0, 0.02, 0.01),
}
_SCALES = ((0.7, 0.3), (1.0, 0.4), (1.6, 0.2), (2.5, 0.1))
"""By which the unexplained may be larger than that, and how likely each is before anything is measured."""
ODD = 0.5
"""How likely it is, before anything is measured, that one of the settings measured is such a one."""
_PRIOR_REPEATS = 6
"""How many repeats the standard deviations of a repeat count for."""
_SHARED = 4
"""Draws that share parameters: the laws are what takes time."""
_STEP, _ITERATIONS = 1e-3, 12


@dataclass(frozen=True, slots=True)
class Posterior:
    """What is plausible of all settings: draws of the logarithms of `QUANTITIES`."""

    known: Levels
    logs: Floats
    """Shape (draws, quantities, settings)."""
    measured: tuple[int, ...]
    """Numbers of the settings that were measured, one per trial."""
    parameters: Mapping[str, float]
    """Of the laws, as fitted."""

    def metrics(self) -> Metrics:
        """Return plausible metrics, shape (draws, settings)."""
        rate, app, server, flights, tail, app_memory, server_memory = (
            np.exp(np.clip(self.logs[:, q], -60, 60)) for q in range(len(QUANTITIES))
        )
        mean_s = flights * self.known.batch / rate
        simple = self.known.simple
        return {
            "images_per_s": rate,
            "mean_s": mean_s,
            "p99_s": mean_s * tail,
            "app_cpu_s_per_image": app,
            "server_cpu_s_per_image": np.where(simple, 0.0, server),
            "app_memory_bytes": app_memory,
            "server_memory_bytes": np.where(simple, 0.0, server_memory),
            "memory_bytes": app_memory * self.known.clients + np.where(simple, 0.0, server_memory),
        }


def as_shown(metrics: Metrics, seed: int) -> Metrics:
    """Return what a trial of each setting might show."""
    rng = np.random.default_rng(seed)

    def noise(quantity: str) -> Floats:
        effects = _EFFECTS[quantity]
        return math.hypot(effects.repeat / math.sqrt(3), effects.hour) * rng.standard_normal(metrics["images_per_s"].shape)

    rate = noise("rate")
    moved = {"images_per_s": rate, "p99_s": noise("tail") - rate, "app_cpu_s_per_image": noise("app_cpu")}
    moved["server_cpu_s_per_image"] = noise("server_cpu")
    return {name: value * np.exp(moved[name]) if name in moved else value for name, value in metrics.items()}


@dataclass(frozen=True, slots=True)
class _Seen:
    """The observations, one a row: of which quantity and setting, the logarithm, its standard deviation."""

    quantity: NDArray[np.intp]
    setting: NDArray[np.intp]
    y: Floats
    sd: Floats


def fit(settings: Sequence[Configuration], trials: Sequence[Trial], *, cores: float, seed: int = 0) -> Posterior:
    """Return what the trials tell of all settings. Trials of settings that are not in `settings` are left out."""
    known = serve_laws.levels(settings)
    numbers = {_key(setting): n for n, setting in enumerate(settings)}
    used = [(numbers[_key(t.configuration)], t) for t in trials if _key(t.configuration) in numbers]
    seen = _seen(known, used)
    expected = serve_laws.prior(known)
    unexplained = _unexplained(settings)
    same = seen.quantity[:, None] == seen.quantity[None, :]
    residual = same * unexplained[seen.quantity[:, None], seen.setting[:, None], seen.setting[None, :]] + np.diag(seen.sd**2)
    fitted = _fitted(known, expected, seen, residual, cores)
    logs = _plausible(known, fitted, unexplained, seen, cores=cores, seed=seed)
    return Posterior(known, logs, tuple(n for n, _ in used), dict(zip(expected.names, fitted.theta.tolist(), strict=True)))


@dataclass(frozen=True, slots=True)
class _Fitted:
    """The most plausible parameters of the laws, what these predict (flat), and the derivative of that."""

    expected: serve_laws.Prior
    theta: Floats
    f: Floats
    jacobian: Floats


def _fitted(known: Levels, expected: serve_laws.Prior, seen: _Seen, residual: Floats, cores: float) -> _Fitted:
    """Return the parameters that fit best (Gauss and Newton's steps, halved where they overshoot)."""
    at = seen.quantity * known.size + seen.setting
    inverse = np.linalg.inv(residual)
    variance = expected.sd**2

    def laws(theta: Floats) -> tuple[Floats, Floats]:
        moved = theta + _STEP * np.concatenate([np.zeros((1, theta.size)), np.eye(theta.size)])
        found = serve_laws.predict(known, expected.names, moved, cores=cores).reshape(theta.size + 1, -1)
        return found[0], (found[1:] - found[0]).T / _STEP

    def misfit(theta: Floats, f: Floats) -> float:
        off = seen.y - f[at]
        return float(off @ inverse @ off + np.sum((theta - expected.mean) ** 2 / variance))

    theta = expected.mean
    f, jacobian = laws(theta)
    least = misfit(theta, f)
    for _ in range(_ITERATIONS if at.size else 0):
        here = jacobian[at]
        off = seen.y - f[at] + here @ (theta - expected.mean)
        goal = expected.mean + variance * (here.T @ np.linalg.solve(here * variance @ here.T + residual, off))
        part = 1.0
        while part > 0.05:
            tried = theta + part * (goal - theta)
            tried_f, tried_jacobian = laws(tried)
            if (tried_misfit := misfit(tried, tried_f)) < least:
                break
            part /= 2
        else:
            break
        gained = least - tried_misfit
        theta, f, jacobian, least = tried, tried_f, tried_jacobian, tried_misfit
        if gained < 1e-3:
            break
    return _Fitted(expected, theta, f, jacobian)


@dataclass(frozen=True, slots=True)
class _Way:
    """One way in which the unexplained may be: how large, and at which setting something happened that tells of no other."""

    scale: float
    odd: int
    """Number of a setting; -1: none."""
    draws: int


def _plausible(known: Levels, fitted: _Fitted, unexplained: Floats, seen: _Seen, *, cores: float, seed: int) -> Floats:
    """Return draws of everything given what was seen: of the parameters first, then of what the laws leave unexplained."""
    quantities, size, _ = unexplained.shape
    at = seen.quantity * size + seen.setting
    expected, slope = fitted.expected, fitted.jacobian[at]
    missed = seen.y - fitted.f[at] + slope @ (fitted.theta - expected.mean)
    roots = np.linalg.cholesky(unexplained)
    rng, found = np.random.default_rng(seed), []
    for way in _likely_ways(slope * expected.sd**2 @ slope.T, unexplained, missed, seen):
        own = _covariance(unexplained, seen, way.scale, way.odd)
        noise = own[at] + np.diag(seen.sd**2)
        precision = slope.T @ np.linalg.solve(noise, slope) + np.diag(expected.sd**-2.0)
        spread = np.linalg.inv(precision)
        centre = expected.mean + spread @ (slope.T @ np.linalg.solve(noise, missed))
        theta = centre + rng.standard_normal((-(-way.draws // _SHARED), centre.size)) @ np.linalg.cholesky(spread).T
        logs = np.repeat(serve_laws.predict(known, expected.names, theta, cores=cores), _SHARED, axis=0)[: way.draws]
        for q, name in enumerate(QUANTITIES):
            logs[:, q] += way.scale * rng.standard_normal((way.draws, size)) @ roots[q].T
            if way.odd >= 0:
                logs[:, q, way.odd] += _EFFECTS[name].odd * rng.standard_normal(way.draws)
        logs = logs.reshape(way.draws, -1)
        # Matheron's rule: a draw before anything is seen, corrected by what it misses.
        off = seen.y + seen.sd * rng.standard_normal((way.draws, at.size)) - logs[:, at]
        logs += np.linalg.solve(noise, off.T).T @ own.T
        found.append(logs)
    return np.concatenate(found).reshape(DRAWS, quantities, size)


def _likely_ways(laws: Floats, unexplained: Floats, missed: Floats, seen: _Seen) -> list[_Way]:
    """Return the ways that are likely after what was seen, and how many of the draws each gets."""
    at = seen.quantity * unexplained.shape[1] + seen.setting
    settings = sorted(set(seen.setting.tolist()))
    odds = [(-1, 1.0 - (ODD if settings else 0.0)), *((n, ODD / len(settings)) for n in settings)]
    ways, weights = [], []
    for scale, weight in _SCALES:
        for odd, share in odds:
            covariance = laws + _covariance(unexplained, seen, scale, odd)[at] + np.diag(seen.sd**2)
            size = np.linalg.slogdet(covariance)[1]
            ways.append((scale, odd))
            weights.append(math.log(weight * share) - (size + missed @ np.linalg.solve(covariance, missed)) / 2)
    shares = np.exp(np.array(weights) - max(weights))
    parts = np.diff(np.round(np.cumsum(shares / shares.sum()) * DRAWS).astype(int), prepend=0)
    return [_Way(scale, odd, int(part)) for (scale, odd), part in zip(ways, parts, strict=True) if part]


def _covariance(unexplained: Floats, seen: _Seen, scale: float, odd: int) -> Floats:
    """Return the covariance of the unexplained, of everything (flat) with each observation."""
    quantities, size, _ = unexplained.shape
    found = np.zeros((quantities * size, seen.y.size))
    for q, name in enumerate(QUANTITIES):
        here = np.flatnonzero(seen.quantity == q)
        found[q * size : (q + 1) * size, here] = scale**2 * unexplained[q][:, seen.setting[here]]
        if odd >= 0:
            found[q * size + odd, here[seen.setting[here] == odd]] += _EFFECTS[name].odd ** 2
    return found


def _unexplained(settings: Sequence[Configuration]) -> Floats:
    """Return the covariance of what the laws leave unexplained, shape (quantities, settings, settings)."""
    size = len(settings)
    alike = np.zeros((size, size))
    for factor in FACTORS:
        found = [setting.get(factor) for setting in settings]
        seen = list(dict.fromkeys(found))
        if len(seen) > 1:
            column = np.array([seen.index(level) for level in found])
            alike += column[:, None] == column[None, :]
    pairs = alike * (alike - 1) / 2
    effects = [_EFFECTS[name] for name in QUANTITIES]
    return np.stack([e.level**2 * alike + e.pair**2 * pairs + e.own**2 * np.eye(size) for e in effects])


def _seen(known: Levels, used: Sequence[tuple[int, Trial]]) -> _Seen:
    """Return the observations of some trials, by the numbers of their settings."""
    rows = [(q, n, *value) for n, trial in used for q, value in _observed(known, n, trial).items()]
    found = {}
    for name in QUANTITIES:
        effects = _EFFECTS[name]
        repeats = [(count - 1, sd) for q, _, _, sd, count in rows if q == name and count > 1]
        freedom = _PRIOR_REPEATS + sum(n for n, _ in repeats)
        found[name] = math.sqrt((_PRIOR_REPEATS * effects.repeat**2 + sum(n * sd**2 for n, sd in repeats)) / freedom)
    return _Seen(
        np.array([QUANTITIES.index(q) for q, *_ in rows], np.intp),
        np.array([n for _, n, *_ in rows], np.intp),
        np.array([math.log(value) for _, _, value, *_ in rows]),
        np.array([math.hypot(found[q] / math.sqrt(count), _EFFECTS[q].hour) for q, _, _, _, count in rows]),
    )


def _observed(known: Levels, n: int, trial: Trial) -> dict[str, tuple[float, float, int]]:
    """Return quantity -> value above 0, relative spread of a repeat, number of repeats."""

    def told(metric: str) -> tuple[float, float, int]:
        s = trial.metrics.get(metric)
        if s is None or s.mean <= 0:
            return 0.0, 0.0, 0
        return (s.median if s.n >= 3 else s.mean), s.sd / s.mean, s.n  # the median: others may have disturbed one repeat

    found = {"rate": told("images_per_s")}
    found |= {"app_cpu": told("app_cpu_s_per_image"), "app_memory": told("app_memory_bytes")}
    if not known.simple[n]:
        found |= {"server_cpu": told("server_cpu_s_per_image"), "server_memory": told("server_memory_bytes")}
    mean_s, p99_s = told("mean_s"), told("p99_s")
    if known.asynchronous[n]:
        found["in_flight"] = (mean_s[0] * found["rate"][0] / float(known.batch[n]), 0.0, min(mean_s[2], 1))
    if mean_s[0]:
        found["tail"] = (p99_s[0] / mean_s[0], *p99_s[1:])
    return {quantity: value for quantity, value in found.items() if value[0] > 0}


def _key(configuration: Configuration) -> tuple[object, ...]:
    return tuple(configuration.get(factor) for factor in FACTORS)
