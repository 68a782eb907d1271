"""The figures of a load run: counts, percentiles of all due requests, HDR histograms, and what the generator says of itself.

Latency counts from the due time; service time and issue delay stand beside it. Histograms are HdrHistogram's, in its own
compressed form: they are what is merged over runs, and percentiles never are. Not here: VALID or INVALID (`judge`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenure.serve.load.records import Floats, Outcome
from tenure.serve.load.runner import LoadRun

LATE_S = 1e-3
"""A request issued later than this after its due time counts as late."""
PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)
_LONGEST_US = 3_600_000_000
_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one time over all requests that have it, seconds; None where none has."""

    count: int
    mean_s: float | None
    percentiles_s: Mapping[str, float | None]
    """By nearest rank, under names such as ``p99``."""
    max_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What one run came to, after its warm-up."""

    due: int
    counts: Mapping[str, int]
    """By `Outcome`, in small letters."""
    late: int
    """Issued more than `LATE_S` after being due."""
    asked_per_s: float
    """Due requests per second of the schedule; closed loop: issued ones."""
    answered_per_s: float
    """Right answers per second, from the end of the warm-up to the end of the last request."""
    latency: Figures
    """End - due; of what was not answered rightly, at least the timeout."""
    service: Figures
    """End - issue of what was answered."""
    issue_delay: Figures
    """Issue - due: the generator's own part."""
    histogram: str
    """Of latencies in microseconds, 3 digits: HdrHistogram's compressed form in base64."""


def summary(run: LoadRun) -> Summary:
    """Return the figures of a run."""
    record, plan = run.measured, run.plan
    latency_s = record.latency_s(plan.timeout_s)
    answered = record.outcome == Outcome.OK
    seconds = max(run.ended_s - run.measured_from_s, 1e-9)
    span_s = float(record.due_s[-1] - run.measured_from_s) if len(record) > 1 else seconds
    delay_s = record.issue_delay_s
    return Summary(
        due=len(record),
        counts={outcome.name.lower(): record.count(outcome) for outcome in Outcome},
        late=int(np.count_nonzero(delay_s > LATE_S)),
        asked_per_s=len(record) / max(span_s, 1e-9),
        answered_per_s=int(np.count_nonzero(answered)) / seconds,
        latency=figures(latency_s),
        service=figures(record.service_s[answered]),
        issue_delay=figures(delay_s),
        histogram=encode(histogram(latency_s)),
    )


def figures(values_s: Floats) -> Figures:
    """Return mean, percentiles and maximum of those values that are numbers."""
    ordered = np.sort(values_s[np.isfinite(values_s)])
    count = len(ordered)
    if not count:
        return Figures(count=0, mean_s=None, percentiles_s=dict.fromkeys(map(_name, PERCENTS)), max_s=None)
    found = {_name(percent): float(ordered[max(0, math.ceil(percent / 100 * count) - 1)]) for percent in PERCENTS}
    return Figures(count=count, mean_s=float(ordered.mean()), percentiles_s=found, max_s=float(ordered[-1]))


def histogram(values_s: Floats) -> Any:
    """Return an `hdrh.histogram.HdrHistogram` of times in microseconds, up to an hour, exact to 3 digits."""
    from hdrh.histogram import HdrHistogram  # with its codec 4 MB that only a report needs

    found = HdrHistogram(1, _LONGEST_US, _DIGITS)
    micros = np.clip(np.rint(values_s[np.isfinite(values_s)] * 1e6), 0, _LONGEST_US).astype(np.int64)
    for value, count in zip(*np.unique(micros, return_counts=True), strict=True):
        found.record_value(int(value), int(count))
    return found


def encode(found: Any) -> str:
    """Return a histogram in HdrHistogram's compressed form, base64."""
    return bytes(found.encode()).decode("ascii")


def merged(encoded: Iterable[str]) -> Any:
    """Return one histogram of several runs' `Summary.histogram`."""
    from hdrh.histogram import HdrHistogram

    found = HdrHistogram(1, _LONGEST_US, _DIGITS)
    for each in encoded:
        found.decode_and_add(each)
    return found


def _name(percent: float) -> str:
    return f"p{percent:g}"
