"""What was used: one sample of a party's consumption, and summaries of repeated values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tenure.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Consumption of one party (a lease, a process tree, a machine) at one moment. Counters grow from its start."""

    at_s: float
    """UTC seconds."""
    cpu_s: float = 0.0
    """CPU seconds so far, user + system, ended children included."""
    memory_bytes: int = 0
    """Anonymous + shared memory now."""
    peak_memory_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    processes: int = 0
    gpu_busy: float = 0.0
    """Share of the last interval in which the GPU ran something, 0..1."""
    gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Repeats of one measured quantity. The unit is in the metric's name."""

    n: int
    mean: float
    sd: float
    """Sample standard deviation; 0 for one repeat."""
    minimum: float
    median: float
    maximum: float

    @property
    def standard_error(self) -> float:
        """sd / sqrt(n)."""
        return self.sd / math.sqrt(self.n)


def summarize(values: Sequence[float]) -> Summary:
    """Return the summary of at least one finite value. Raises SpecError for none or for NaN and infinity."""
    if not values or not all(math.isfinite(value) for value in values):
        raise SpecError(f"a summary needs at least one finite value; found {list(values)[:5]!r}")
    values = [float(value) for value in values]
    return Summary(
        n=len(values),
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else 0.0,
        minimum=min(values),
        median=statistics.median(values),
        maximum=max(values),
    )
