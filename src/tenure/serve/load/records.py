"""What became of each request of one run, as columns: the noun between the load generator, the judge and the files.

Times are seconds on one monotonic clock whose zero is the run's own. Not here: verdicts (`judge`), how requests are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError

Floats = NDArray[np.float64]


class Outcome(IntEnum):
    """How one request ended. Late ones are not an outcome: `Record.issue_delay_s` tells them."""

    OK = 0
    """Answered, and right as far as it was checked."""
    WRONG = 1
    """Answered with something other than expected."""
    FAILED = 2
    """Refused or broken: by the server, or on the way."""
    TIMED_OUT = 3
    """Given up after the timeout; an answer that came later changes nothing."""
    DROPPED = 4
    """Due, and never issued."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """The requests of one run, one entry per due request in every column, in order of `due_s`."""

    due_s: Floats
    """When the schedule wanted it sent. Closed loop: when its client had become free, so that nothing is hidden."""
    issued_s: Floats
    """When it was handed to the connection; NaN when dropped."""
    ended_s: Floats
    """When its answer had been read, or when it was given up; NaN when it never ended."""
    outcome: NDArray[np.uint8]
    """`Outcome` by number."""

    def __post_init__(self) -> None:
        for name, dtype in (("due_s", np.float64), ("issued_s", np.float64), ("ended_s", np.float64), ("outcome", np.uint8)):
            object.__setattr__(self, name, _column(name, getattr(self, name), dtype))
        lengths = {name: len(getattr(self, name)) for name in ("due_s", "issued_s", "ended_s", "outcome")}
        if len(set(lengths.values())) > 1:
            raise SpecError(f"the columns of a record need one length; found {lengths}")
        if not np.isfinite(self.due_s).all():
            raise SpecError(f"record.due_s must be finite; request {_first(~np.isfinite(self.due_s))} is not")
        if (np.diff(self.due_s) < 0).any():
            raise SpecError(f"record.due_s must not fall; it does after request {_first(np.diff(self.due_s) < 0)}")
        if (self.outcome > max(Outcome)).any():
            row = _first(self.outcome > max(Outcome))
            raise SpecError(f"record.outcome is 0 to {int(max(Outcome))}; request {row} has {self.outcome[row]}")
        answered = self.outcome <= Outcome.WRONG
        unclear = answered & ~(np.isfinite(self.issued_s) & np.isfinite(self.ended_s) & (self.ended_s >= self.issued_s))
        if unclear.any():
            row = _first(unclear)
            raise SpecError(
                f"an answered request needs issued_s <= ended_s; request {row} has {self.issued_s[row]} and {self.ended_s[row]}"
            )

    def __len__(self) -> int:
        """Return the number of due requests."""
        return len(self.due_s)

    def count(self, outcome: Outcome) -> int:
        """Return how many requests ended so."""
        return int(np.count_nonzero(self.outcome == outcome))

    def latency_s(self, timeout_s: float) -> Floats:
        """Return `ended_s - due_s` of each request; one that was not answered rightly counts as `timeout_s` at least.

        So a server that fails or drops quickly never looks quick, and no request is left out.
        """
        latency = self.ended_s - self.due_s
        bad = self.outcome != Outcome.OK
        latency[bad] = np.fmax(latency[bad], timeout_s)
        return latency

    @property
    def service_s(self) -> Floats:
        """`ended_s - issued_s` of each request; NaN where either is. Beside the latency, never instead of it."""
        return self.ended_s - self.issued_s

    @property
    def issue_delay_s(self) -> Floats:
        """`issued_s - due_s` of each request: how late the generator was; NaN when dropped."""
        return self.issued_s - self.due_s

    def where(self, mask: NDArray[np.bool_]) -> Record:
        """Return the requests that a mask keeps, e.g. those due after the warm-up."""
        return Record(self.due_s[mask], self.issued_s[mask], self.ended_s[mask], self.outcome[mask])


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnUse:
    """What the generator itself used during the measured part of a run: what tells that it was the bottleneck."""

    wall_s: float
    cpu_s: float
    """CPU seconds of the generator's processes, all threads."""
    cores: float = 1.0
    """Cores it could have used: 1 per event loop, at most those it may run on."""
    max_in_flight: int = 0
    """Its own bound on requests in flight; 0: none."""
    full_s: float = 0.0
    """Seconds in which a due request waited only because `max_in_flight` were in flight."""

    def __post_init__(self) -> None:
        for name in ("wall_s", "cores"):
            if not getattr(self, name) > 0:
                raise SpecError(f"own_use.{name} must be above 0; found {getattr(self, name)!r}")
        for name in ("cpu_s", "max_in_flight", "full_s"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"own_use.{name} must be at least 0; found {getattr(self, name)!r}")

    @property
    def cpu_share(self) -> float:
        """CPU used of what it could have used; 1 is saturated."""
        return self.cpu_s / (self.wall_s * self.cores)


def _column(name: str, values: Any, dtype: type[np.generic]) -> NDArray[Any]:
    column = np.asarray(values)
    if column.ndim != 1 or (column.size and column.dtype.kind not in "fiu"):
        raise SpecError(f"record.{name} is a column of numbers; found shape {column.shape} of {column.dtype}")
    if dtype is np.uint8 and column.size and not (column.dtype.kind in "iu" and column.min() >= 0 and column.max() <= 255):
        raise SpecError(f"record.{name} holds whole numbers from 0 to {int(max(Outcome))}; found {column.dtype} {column.min()}")
    return np.asarray(column, dtype=dtype)


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))
