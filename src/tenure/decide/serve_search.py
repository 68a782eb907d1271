"""Which serving setting to measure next, and which to take: a search that is told trials and needs few of them.

Each step draws what is plausible of all settings together after the trials (`serve_posterior`). From the draws follow the
setting to take (the best in the mean of those measured), the chance that no other is better by more than `within`, and what to
measure next: the setting, measured before or not, whose trial is expected to better the choice most (the knowledge gradient of
Frazier, Powell & Dayanik 2009). The same trials and the same seed give the same advice.

Weighed and left out: hill climbing over neighbours (transports have no order, and a step costs a trial), and Bayesian
optimisation without the laws (ten trials hardly cover the levels once; the laws carry what one setting shows to the others).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tenure.trials import Configuration, Trial

from .serve_laws import Floats
from .serve_posterior import Metrics, as_shown, fit

MAX_TRIALS = 10
WITHIN = 0.03
CONFIDENCE = 0.95
TOLERANCE = 0.05
"""Share by which p99 may lie above its bound: trials of a few seconds tell it no closer."""
SMALL, OPTIMISM = 0.01, 0.975
"""A gain below which it is less trusted than the laws deserve: the setting never measured that may be best at most is next."""
_BINS = 8


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
    """That the choice meets the bounds, and no setting that does is better by more than `within`."""
    gain: float
    """What a trial of `next` is expected to better the choice by, relative."""
    why: str
    """Both in one sentence, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is plausible of one setting, measured or not."""

    configuration: Configuration
    trials: int
    """How often it was measured; 0: what follows is what the laws make of the others."""
    metrics: Mapping[str, tuple[float, float, float]]
    """By name, in a trial's units: 5 %, 50 % and 95 % of what is plausible."""
    meets: float
    """Chance that it meets all bounds."""
    breaks: Mapping[str, float]
    """By bounded metric, the chance that it breaks that bound."""
    better: float
    """Chance that it meets the bounds and is better than the choice by more than `within`."""


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
    held = values[:, choice] if choice is not None else np.zeros(len(values))
    chance = float(np.mean((held > 0) & (held >= (1 - within) * values.max(axis=1))))
    if tried >= max_trials or chance >= confidence:
        return Advice(
            next=None,
            choice=None if choice is None else settings[choice],
            chance=chance,
            gain=0.0,
            why=_why(choice is not None, chance, within, tried),
        )
    shown = _values(as_shown(metrics, seed + 1), aim, below=True)
    gains = _gains(values, shown, measured)
    target = int(np.argmax(gains))
    fresh = [n for n in range(len(settings)) if n not in measured]
    if choice is not None and gains[target] < SMALL and fresh:
        target = max(fresh, key=lambda n: float(np.quantile(values[:, n], OPTIMISM)))
    return Advice(
        next=settings[target],
        choice=None if choice is None else settings[choice],
        chance=chance,
        gain=float(gains[target]),
        why=_why(choice is not None, chance, within, tried) + f"; another is expected to better it by {gains[target]:.1%}",
    )


def outlook(
    settings: Sequence[Configuration],
    trials: Sequence[Trial],
    aim: Aim,
    *,
    choice: Configuration | None,
    cores: float,
    context: Sequence[Configuration] = (),
    more: Mapping[str, Callable[[Metrics], Floats]] | None = None,
    within: float = WITHIN,
    seed: int = 0,
) -> tuple[Outlook, ...]:
    """Return what is plausible of each setting, in their order; arguments as of `advise`, `choice` as it gave it.

    more: metrics that follow from the others, by name.
    """
    posterior = fit([*settings, *context], trials, cores=cores, seed=seed)
    metrics = {name: values[:, : len(settings)] for name, values in posterior.metrics().items()}
    values = _values(metrics, aim)
    excesses = {name: excess > 0 for name, excess in _excesses(metrics, aim).items()}
    told = metrics | {name: follows(metrics) for name, follows in (more or {}).items()}
    quantiles = {name: np.quantile(found, (0.05, 0.5, 0.95), axis=0) for name, found in told.items()}
    held = np.zeros(len(values)) if choice is None else values[:, [dict(s) for s in settings].index(dict(choice))]
    found = []
    for n, setting in enumerate(settings):
        low, middle, high = ({name: float(rows[part, n]) for name, rows in quantiles.items()} for part in range(3))
        found.append(
            Outlook(
                configuration=setting,
                trials=posterior.measured.count(n),
                metrics={name: (low[name], middle[name], high[name]) for name in quantiles},
                meets=float(np.mean(values[:, n] > 0)),
                breaks={name: float(np.mean(broken[:, n])) for name, broken in excesses.items()},
                better=float(np.mean((values[:, n] > 0) & (values[:, n] * (1 - within) > held))),
            )
        )
    return tuple(found)


def _why(found: bool, chance: float, within: float, count: int) -> str:
    if not found:
        return f"none of {count} trials showed a setting that may meet the bounds"
    return f"after {count} trials the best of them is within {within:.0%} of the best there is with a chance of {chance:.0%}"


def _values(metrics: Metrics, aim: Aim, *, below: bool = False) -> Floats:
    """Return what each setting is worth in each draw; 0 where a bound is broken, or with `below` less the further."""
    worth = metrics["images_per_s"] if aim.cost is None else 1 / aim.cost(metrics)
    excess = np.zeros(worth.shape)
    for over in _excesses(metrics, aim).values():
        excess = np.maximum(excess, over)
    return np.where(excess > 0, -excess if below else 0.0, worth)


def _excesses(metrics: Metrics, aim: Aim) -> dict[str, Floats]:
    """Return by metric that is bounded by which share each setting breaks the bound in each draw; below 0: it does not."""
    bounds = (
        ("p99_s", aim.p99_s * (1 + aim.tolerance), False),
        ("images_per_s", aim.images_per_s, True),
        ("memory_bytes", aim.memory_bytes, False),
    )
    return {name: (bound / metrics[name] if least else metrics[name] / bound) - 1 for name, bound, least in bounds if bound}


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
