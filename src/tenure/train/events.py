"""The events that start the training function's roles (study 2), and their idempotency keys.

    {"start": true, "workers": 4, "generation": 0, "worker": 0}
    {"workerno": 2, "workers": 4, "round": 17, "slot": 3, "generation": 0, "idle": 0, "worker": 2}
    {"combine": true, "workers": 4, "round": 17, "generation": 0, "worker": 2}

``worker`` is the gang member to start, all that a broker reads. A *generation* is one start of the stage: resuming makes the
next one. A worker's chain of slots counts up from 0; the key of a worker event is (generation, worker, slot), so that an
event handled twice still has one successor. ``parse(event.to_dict()) == event``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenure.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Publish the plan and the first weights, have the workers started, go on as worker 0."""

    workers: int
    generation: int = 0

    @property
    def name(self) -> str:
        """The idempotency key."""
        return f"start-{self.generation:04d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the event as published."""
        return {"start": True, "workers": self.workers, "generation": self.generation, "worker": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Compute a worker's shards of one round after the other, for one slot."""

    workerno: int
    workers: int
    round: int = 0
    """Rounds finished when the event was made; a later one found in the store is taken instead."""
    slot: int = 0
    generation: int = 0
    idle: int = 0
    """Slots before this one, in a row, that saw no progress of the run."""

    @property
    def name(self) -> str:
        """The idempotency key."""
        return f"worker-{self.generation:04d}-{self.workerno:04d}-{self.slot:06d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the event as published."""
        return {
            "workerno": self.workerno,
            "workers": self.workers,
            "round": self.round,
            "slot": self.slot,
            "generation": self.generation,
            "idle": self.idle,
            "worker": self.workerno,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Combine:
    """Add one round's gradients and publish the next weights. Handled in process by the worker that claimed it."""

    workers: int
    round: int
    generation: int = 0
    worker: int = 0

    @property
    def name(self) -> str:
        """The idempotency key."""
        return f"combine-{self.generation:04d}-{self.round:08d}"

    def to_dict(self) -> dict[str, Any]:
        """Return the event as published."""
        return {
            "combine": True,
            "workers": self.workers,
            "round": self.round,
            "generation": self.generation,
            "worker": self.worker,
        }


TrainEvent = Start | Work | Combine


def parse(data: Mapping[str, Any]) -> TrainEvent:
    """Return the event that the JSON object describes. Raises SpecError naming the key that is wrong."""
    workers = _number(data, "workers", low=1)
    generation = _number(data, "generation", default=0)
    if data.get("start") is True:
        return Start(workers=workers, generation=generation)
    if data.get("combine") is True:
        worker = _number(data, "worker", default=0, high=workers - 1)
        return Combine(workers=workers, round=_number(data, "round"), generation=generation, worker=worker)
    if "workerno" not in data:
        raise SpecError(f"an event needs one of start, combine, workerno; found {sorted(data)!r}")
    return Work(
        workerno=_number(data, "workerno", high=workers - 1),
        workers=workers,
        round=_number(data, "round", default=0),
        slot=_number(data, "slot", default=0),
        generation=generation,
        idle=_number(data, "idle", default=0),
    )


def _number(data: Mapping[str, Any], key: str, *, default: int | None = None, low: int = 0, high: int = 10**9) -> int:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(f"event key {key!r} must be a whole number from {low} to {high}; found {value!r}")
    return value
