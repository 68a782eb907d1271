"""What one run of a replay with time counts, as plain data. Not here: how it is compared and drawn (`replay_report`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tenure.experiments.simulator import JobOutcome, Outcome, Sample

MAX_POINTS = 240
"""Of a curve over time; longer ones are thinned evenly."""


def of_outcome(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of one run: of all jobs, by tenant, and over time. Times in seconds, shares from 0 to 1."""
    done = [job for job in outcome.jobs if job.end_s is not None]
    tenants: dict[str, list[JobOutcome]] = {}
    for job in outcome.jobs:
        tenants.setdefault(job.tenant, []).append(job)
    by_tenant = {name: _of_tenant(jobs) for name, jobs in sorted(tenants.items())}
    completions = sorted(job.end_s - job.submit_s for job in done if job.end_s is not None)
    waits = sorted(job.first_start_s - job.submit_s for job in outcome.jobs if job.first_start_s is not None)
    last_s = max((job.submit_s for job in outcome.jobs), default=0.0)
    found: dict[str, Any] = {
        "jobs": len(outcome.jobs),
        "completed": len(done),
        "dropped": sum(bool(job.dropped) for job in outcome.jobs),
        "unfinished": sum(job.end_s is None and not job.dropped for job in outcome.jobs),
        "why_dropped": next((job.dropped for job in outcome.jobs if job.dropped), "")[:300],
        "mean_completion_s": mean(completions),
        "median_completion_s": quantile(completions, 0.5),
        "p95_completion_s": quantile(completions, 0.95),
        "mean_wait_s": mean(waits),
        "max_wait_s": waits[-1] if waits else 0.0,
        "restarts": sum(job.restarts for job in outcome.jobs),
        "end_s": max((job.end_s for job in outcome.jobs if job.end_s is not None), default=0.0),
        "allocated": _over_time(outcome.series, last_s or math.inf),
        "fairness": jain([tenant["stretch"] for tenant in by_tenant.values() if tenant["stretch"]]),
        "tenants": by_tenant,
        "series": _series(outcome.series),
    }
    many = f"{len(done):,} of {len(outcome.jobs):,} jobs"
    found["line"] = f"{many} completed, after {show_time(found['mean_completion_s'])} in the mean"
    return found


def show_time(seconds: float) -> str:
    """Return a time for people, rounded, in days from two days on."""
    for unit, factor, least in (("d", 86400.0, 2 * 86400.0), ("h", 3600.0, 3600.0), ("min", 60.0, 60.0)):
        if seconds >= least:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.1f} s"


def jain(values: Sequence[float]) -> float:
    """Return how even values are: 1 when all are equal, 1/n when one has everything.

    Source: Jain, Chiu and Hawe (1984), DEC-TR-301.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of ascending values, nearest rank; 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def thinned(count: int) -> list[int]:
    """Return which of `count` points are kept: first, last, and evenly between them."""
    if count <= MAX_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)})


def _of_tenant(jobs: Sequence[JobOutcome]) -> dict[str, Any]:
    done = [(job.end_s - job.submit_s, job.duration_s) for job in jobs if job.end_s is not None]
    waits = [job.first_start_s - job.submit_s for job in jobs if job.first_start_s is not None]
    service_s = sum(service for _, service in done)
    return {
        "jobs": len(jobs),
        "service": sum(max(job.gpus, 1.0) * job.duration_s for job in jobs),
        "mean_completion_s": mean([completion for completion, _ in done]),
        "mean_wait_s": mean(waits),
        "max_wait_s": max(waits, default=0.0),
        "stretch": sum(completion for completion, _ in done) / service_s if service_s else 0.0,
    }


def _over_time(samples: Sequence[Sample], until_s: float) -> float:
    """Return the mean share allocated from the first sample on, each holding until the next."""
    held_s, span_s = 0.0, 0.0
    for sample, after in pairwise(samples):
        lasts_s = max(0.0, min(after.at_s, until_s) - sample.at_s)
        held_s, span_s = held_s + sample.allocated * lasts_s, span_s + lasts_s
    return held_s / span_s if span_s else 0.0


def _series(samples: Sequence[Sample]) -> dict[str, list[float]]:
    kept = [samples[i] for i in thinned(len(samples))]
    return {
        "x": [sample.at_s for sample in kept],
        "allocated": [round(sample.allocated, 6) for sample in kept],
        "waiting": [round(sample.waiting_amount, 6) for sample in kept],
        "fragmentation": [round(sample.fragmentation, 6) for sample in kept],
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 of none."""
    return sum(values) / len(values) if values else 0.0
