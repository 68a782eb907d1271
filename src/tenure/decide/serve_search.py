"""Which serving setting to measure next, and which to take: a search that is told trials and needs few of them.

Each step fits the laws of `serve_laws` to the trials, with what they leave unexplained as a Gaussian process over the factors
(of each level, of each pair of levels, of each setting; how large it is follows from the trials), and draws what is then
plausible of all settings together. From the draws follow the setting to take (the best in the mean of those measured), the
chance that no other is better by more than `within`, and what to measure next: the setting, measured before or not, whose
trial is expected to better the choice most (the knowledge gradient of Frazier, Powell & Dayanik 2009). Nothing is random: the
draws come from the seed handed in, so that the same trials give the same advice.

Weighed and left out: hill climbing over neighbours (transports have no order, and a step costs a trial), and Bayesian
optimisation without the laws (ten trials hardly cover the levels once; the laws carry what one setting shows to the others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenure.trials import Configuration, Trial

from . import serve_laws
from .serve_laws import FACTORS, QUANTITIES, Floats, Levels

MAX_TRIALS = 10
WITHIN = 0.03
CONFIDENCE = 0.95
TOLERANCE = 0.05
"""Share by which p99 may lie above its bound: trials of a few seconds tell it no closer."""
DRAWS = 800

Metrics = Mapping[str, Floats]
"""What settings give, by the name of the metric, each of shape (draws, settings)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is wanted. A bound of 0 is none."""

    p99_s: float = 0.0
    images_per_s: float = 0.0
    memory_bytes: float = 0.0
    cost: Callable[[Metrics], Floats] | None = None
    """What shall be least among the settings that meet the bounds, above 0; None: the rate shall be highest."""
    tolerance: float = TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What follows from the trials so far."""

    next: Configuration | None
    """To be measured; None: enough is known, or the trials are spent."""
    choice: Configuration | None
    """The best of those measured; None when none of them may meet the bounds."""
    chance: float
    """That no setting is better than the choice by more than `within`."""
    gain: float
    """What a trial of `next` is expected to better the choice by, relative."""
    why: str
    """Both in one sentence, for people."""


@dataclass(frozen=True, slots=True)
class _Effects:
    """How far one quantity leaves the laws: standard deviations of its logarithm."""

    level: float
    """Of each level of each factor."""
    pair: float
    """Of each two levels together."""
    own: float
    """Of each setting."""
    repeat: float
    """Of one repeat of a trial, until the trials' own repeats tell."""
    hour: float
    """That all repeats of a trial share."""


_EFFECTS: Mapping[str, _Effects] = {
    "rate": _Effects(0.05, 0.02, 0.02, 0.04, 0.015),
    "app_cpu": _Effects(0.03, 0.01, 0.02, 0.03, 0.01),
    "server_cpu": _Effects(0.03, 0.01, 0.02, 0.03, 0.01),
    "in_flight": _Effects(0.0, 0.0, 0.03, 0.05, 0.02),
    "tail": _Effects(0.1, 0.02, 0.06, 0.1, 0.02),
    "app_memory": _Effects(0.05, 0.01, 0.02, 0.02, 0.01),
    "server_memory": _Effects(0.05, 0.01, 0.02, 0.02, 0.01),
}
_SCALES = ((0.7, 0.3), (1.0, 0.4), (1.6, 0.2), (2.5, 0.1))
"""By which the unexplained may be larger than that, and how likely each is before anything is measured."""
_PRIOR_REPEATS = 6
"""How many repeats the standard deviations of a repeat count for."""
_STEP, _ITERATIONS = 1e-3, 12
_BINS = 8


def advise(
    settings: Sequence[Configuration],
    trials: Sequence[Trial],
    aim: Aim,
    *,
    cores: float,
    context: Sequence[Configuration] = (),
    max_trials: int = MAX_TRIALS,
    within: float = WITHIN,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Advice:
    """Return what to measure next and what to take so far.

    settings: what can be measured, each named once; factors as in `FACTORS`, `threads` per instance, others are not looked at.
    trials: in any order; of settings that are not named they are left out. Each needs `images_per_s`; `mean_s`, `p99_s`,
    `app_cpu_s_per_image`, `server_cpu_s_per_image`, `app_memory_bytes` and `server_memory_bytes` are used where they are.
    cores: of the machine that runs all of it. context: further settings, whose trials tell something, but which are not to
    be taken, nor do they count for `max_trials` (fewer clients, say).
    Raises SpecError for no settings, or numbers that make no sense.
    """
    posterior = fit([*settings, *context], trials, cores=cores, seed=seed)
    counted = [n for n in posterior.measured if n < len(settings)]
    metrics = {name: values[:, : len(settings)] for name, values in posterior.metrics().items()}
    measured, tried = sorted(set(counted)), len(counted)
    values = _values(metrics, aim)
    mean = values.mean(axis=0)
    choice = max(measured, key=lambda n: float(mean[n]), default=None)
    if choice is not None and mean[choice] <= 0:
        choice = None
    chance = 0.0 if choice is None else float(np.mean(values[:, choice] >= (1 - within) * values.max(axis=1)))
    if tried >= max_trials or chance >= confidence:
        return Advice(
            next=None,
            choice=None if choice is None else settings[choice],
            chance=chance,
            gain=0.0,
            why=_why(choice is not None, chance, within, tried),
        )
    shown = _values(_as_shown(metrics, seed + 1), aim, below=True)
    gains = _gains(values, shown, measured)
    target = int(np.argmax(gains))
    return Advice(
        next=settings[target],
        choice=None if choice is None else settings[choice],
        chance=chance,
        gain=float(gains[target]),
        why=_why(choice is not None, chance, within, tried) + f"; another is expected to better it by {gains[target]:.1%}",
    )


def _why(found: bool, chance: float, within: float, count: int) -> str:
    if not found:
        return f"none of {count} trials showed a setting that may meet the bounds"
    return f"after {count} trials the best of them is within {within:.0%} of the best there is with a chance of {chance:.0%}"


def _values(metrics: Metrics, aim: Aim, *, below: bool = False) -> Floats:
    """Return what each setting is worth in each draw; 0 where a bound is broken, or with `below` less the further."""
    worth = metrics["images_per_s"] if aim.cost is None else 1 / aim.cost(metrics)
    excess = np.zeros(worth.shape)
    for bound, found, least in (
        (aim.p99_s * (1 + aim.tolerance), metrics["p99_s"], False),
        (aim.images_per_s, metrics["images_per_s"], True),
        (aim.memory_bytes, metrics["memory_bytes"], False),
    ):
        if bound:
            excess = np.maximum(excess, (bound / found if least else found / bound) - 1)
    return np.where(excess > 0, -excess if below else 0.0, worth)


def _as_shown(metrics: Metrics, seed: int) -> Metrics:
    """Return what a trial of each setting might show."""
    rng = np.random.default_rng(seed)

    def noise(quantity: str) -> Floats:
        effects = _EFFECTS[quantity]
        return math.hypot(effects.repeat / math.sqrt(3), effects.hour) * rng.standard_normal(metrics["images_per_s"].shape)

    rate = noise("rate")
    moved = {"images_per_s": rate, "p99_s": noise("tail") - rate, "app_cpu_s_per_image": noise("app_cpu")}
    moved["server_cpu_s_per_image"] = noise("server_cpu")
    return {name: value * np.exp(moved[name]) if name in moved else value for name, value in metrics.items()}


def _gains(values: Floats, shown: Floats, measured: Sequence[int]) -> Floats:
    """Return by how much a trial of each setting is expected to better the choice, relative.

    The draws are sorted by what the trial would show and cut into bins: in each, the choice falls on what is best there.
    """
    count, size = values.shape
    order = np.argsort(shown, axis=0)
    held, gains = values[:, list(measured)], np.empty(size)
    for n in range(size):
        columns = np.column_stack([held, values[:, n]])[order[:, n]]
        gains[n] = columns.reshape(_BINS, count // _BINS, -1).mean(axis=1).max(axis=1).mean()
    before = float(held.mean(axis=0).max()) if len(measured) else 0.0
    found: Floats = (gains - before) / max(float(values.mean(axis=0).max()), 1e-300)
    return found


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


def _plausible(known: Levels, fitted: _Fitted, unexplained: Floats, seen: _Seen, *, cores: float, seed: int) -> Floats:
    """Return draws of everything given what was seen: of the parameters first, then of what the laws leave unexplained."""
    quantities, size, _ = unexplained.shape
    at = seen.quantity * size + seen.setting
    own = np.zeros((quantities * size, at.size))
    for q in range(quantities):
        here = np.flatnonzero(seen.quantity == q)
        own[q * size : (q + 1) * size, here] = unexplained[q][:, seen.setting[here]]
    expected, slope = fitted.expected, fitted.jacobian[at]
    laws = slope * expected.sd**2 @ slope.T
    off = seen.y - fitted.f[at] - slope @ (expected.mean - fitted.theta)
    roots = np.linalg.cholesky(unexplained)
    rng, found = np.random.default_rng(seed), []
    for scale, part in _likely_scales(laws, own[at], off, seen.sd):
        noise = scale**2 * own[at] + np.diag(seen.sd**2)
        spread = np.linalg.cholesky(np.linalg.inv(slope.T @ np.linalg.solve(noise, slope) + np.diag(expected.sd**-2.0)))
        theta = fitted.theta + rng.standard_normal((part, expected.mean.size)) @ spread.T
        logs = serve_laws.predict(known, expected.names, theta, cores=cores)
        for q in range(quantities):
            logs[:, q] += scale * rng.standard_normal((part, size)) @ roots[q].T
        logs = logs.reshape(part, -1)
        # Matheron's rule: a draw before anything is seen, corrected by what it misses.
        missed = seen.y + seen.sd * rng.standard_normal((part, at.size)) - logs[:, at]
        logs += scale**2 * np.linalg.solve(noise, missed.T).T @ own.T
        found.append(logs)
    return np.concatenate(found).reshape(DRAWS, quantities, size)


def _likely_scales(laws: Floats, own: Floats, off: Floats, sd: Floats) -> list[tuple[float, int]]:
    """Return scales of the unexplained and how many of the draws each gets, by its likelihood."""
    weights = []
    for scale, weight in _SCALES:
        covariance = laws + scale**2 * own + np.diag(sd**2)
        _, size = np.linalg.slogdet(covariance)
        weights.append(math.log(weight) - (size + off @ np.linalg.solve(covariance, off)) / 2)
    shares = np.exp(np.array(weights) - max(weights))
    ends = np.round(np.cumsum(shares / shares.sum()) * DRAWS).astype(int)
    parts = np.diff(ends, prepend=0)
    return [(scale, int(part)) for (scale, _), part in zip(_SCALES, parts, strict=True) if part]


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
