"""What was measured and what follows from it: trials, predictions, recommendations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tenure.errors import SpecError
from tenure.nodes import Machine
from tenure.resources import Bound, Envelope
from tenure.usage import Summary

Scalar = str | int | float | bool
Configuration = Mapping[str, Scalar]
"""Factor -> level, e.g. ``{"workers": 2, "cpus": 1.0}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration measured. Kept for ever under its fingerprint."""

    id: str
    run_id: str
    stage: str
    fingerprint: str
    source: Literal["probe", "sweep", "observed"]
    """`probe`: short, made to predict. `sweep`: part of an experiment. `observed`: the real run."""
    configuration: Configuration
    metrics: Mapping[str, Summary]
    """Metric, unit in its name, e.g. ``round_s``, ``peak_memory_bytes``, ``p99_s``, ``images_per_s``."""
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    """How each bound of the envelope was held while this was measured."""
    machine: Machine
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    at_s: float = 0.0
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Ordered raw values where order matters, e.g. ``accuracy`` by round."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A value expected, with the interval it should fall in."""

    value: float
    low: float
    high: float
    level: float = 0.9
    """Share of cases in which the truth should lie within [low, high]."""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise SpecError(f"a prediction must lie within its interval; found {self.low!r} <= {self.value!r} <= {self.high!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A constraint that a configuration does not meet."""

    constraint: str
    """Metric, e.g. ``memory_bytes``, ``time_s``, ``node capacity``."""
    limit: float
    found: float
    reason: str
    """One sentence for people, with both values and units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration considered."""

    configuration: Configuration
    envelope: Envelope | None = None
    """Per lease."""
    leases: int = 1
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    broken: tuple[Broken, ...] = ()
    """Empty: it meets the goal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to lease for a goal, and why not something else."""

    id: str
    run_id: str
    stage: str
    goal: str
    """The goal in one line, as the user wrote it."""
    chosen: Candidate | None
    """The cheapest candidate that breaks nothing; None when every one breaks something."""
    ruled_out: tuple[Candidate, ...] = ()
    """Those that break a constraint, and those that cost more (`broken` then names `cost_usd`)."""
    trials: tuple[str, ...] = ()
    """Ids of the trials it rests on."""
    why: str = ""
    thin: str = ""
    """Empty, or what the data could not tell with enough certainty."""
    at_s: float = 0.0
