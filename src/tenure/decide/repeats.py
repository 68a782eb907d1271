"""How surely two settings of one experiment are told apart: the mean of their ratios by repeat, and its standard error.

All settings are held against one of their batch, the *first*: the one that was measured twice in every repeat, whose second
measurement (its twin) shows what the machine alone does to such a ratio. Intervals are `intervals`'.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tenure.decide.bottleneck import is_closed, is_twin
from tenure.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A setting's images/s ÷ those of the first setting of its batch."""

    trial: str
    against: str
    mean: float
    """Of the ratios of the same repeat."""
    standard_error: float
    """Standard deviation of the ratios ÷ square root of their number, relative to the mean."""
    repeats: int
    far: bool
    """Whether one of both is distributed."""
    twin: bool
    """The same setting once more: the truth is 1, and the error is the machine's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """The relative standard errors of an experiment's paired ratios."""

    median: float
    near: float | None
    """The highest on one node; None without one."""
    far: float | None
    """The highest of the distributed ones."""
    machine: float | None
    """The highest of the twins."""


def paired_with_first(trials: Sequence[Trial]) -> tuple[Paired, ...]:
    """Return every closed-loop setting held against the first of its batch, in the order of the trials.

    Batches without a twin, and settings whose repeats do not pair with the first's, are left out.
    """
    closed = [trial for trial in trials if is_closed(trial)]
    firsts = {_batch(twin): one for twin in closed if is_twin(twin) for one in closed if _repeated(one, twin)}
    found = []
    for trial in closed:
        first = firsts.get(_batch(trial))
        if first is not None and trial.id != first.id and (pair := _paired(trial, first)) is not None:
            found.append(pair)
    return tuple(found)


def errors(pairs: Sequence[Paired]) -> Errors | None:
    """Return the standard errors of an experiment in four figures; None where nothing pairs."""
    near = [pair.standard_error for pair in pairs if not (pair.far or pair.twin)]
    far = [pair.standard_error for pair in pairs if pair.far and not pair.twin]
    machine = [pair.standard_error for pair in pairs if pair.twin]
    if not near + far:
        return None
    return Errors(
        median=statistics.median(near + far),
        near=max(near, default=None),
        far=max(far, default=None),
        machine=max(machine, default=None),
    )


def in_words(found: Errors) -> str:
    """Return the standard errors in a sentence, without its full stop."""
    where = [(found.near, "on one node"), (found.far, "distributed")]
    highest = " and ".join(f"{error:.2%} {place}" for error, place in where if error is not None)
    machine = "is not known" if found.machine is None else f"is {found.machine:.2%}"
    return (
        f"standard error of the paired ratio to the first setting: {found.median:.2%} in the median, at most {highest}; "
        f"the machine's own, of a setting against itself, {machine}"
    )


def _paired(trial: Trial, first: Trial) -> Paired | None:
    rates, others = (one.curves.get("images_per_s", ()) for one in (trial, first))
    if len(rates) < 2 or len(rates) != len(others) or min(others) <= 0:
        return None
    ratios = [one / other for one, other in zip(rates, others, strict=True)]
    mean = statistics.fmean(ratios)
    if mean <= 0:
        return None
    return Paired(
        trial=trial.id,
        against=first.id,
        mean=mean,
        standard_error=statistics.stdev(ratios) / math.sqrt(len(ratios)) / mean,
        repeats=len(ratios),
        far="distributed" in (trial.configuration.get("architecture"), first.configuration.get("architecture")),
        twin=is_twin(trial),
    )


def _repeated(one: Trial, twin: Trial) -> bool:
    """Whether a trial is the setting that a twin is the second measurement of."""
    plain = {factor: level for factor, level in twin.configuration.items() if factor != "twin"}
    return not is_twin(one) and {f: level for f, level in one.configuration.items() if f != "twin"} == plain


def _batch(trial: Trial) -> object:
    return trial.configuration.get("batch", 1)
