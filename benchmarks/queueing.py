"""Mean completion time of real jobs under bounded leases when nobody says how long a job takes.

World: `philly_gavel/jobs.csv` of the data folder: every job of its virtual clusters, one time origin, a gang of `gpus` whole
GPUs that runs together or not at all, on 224 interchangeable GPUs (counted as cores of one node, so that placement plays no
part). Service = `duration_v100_s` seconds, whatever the interruptions. A lease ends with its slot of 1 h; each start of a job
after its first costs 60 s of its lease. The simulator is the package's own, with the broker's own deciders. What the policy
sees is what the ledger's events hold: virtual cluster (tenant), gpus, time of submission, what it has been given so far, and
the end of those that have ended. The run lasts until the last job is done; nothing is left out.
Measured: JCT = end - submission, in hours: mean (the value), median, 95th percentile; wait = first start - submission;
restarts.
Bars: mean <= 240 h, median <= 8 h, no wait > 24 h. `fairness` judges the same run and must hold in it.
Checked: each job got its whole service and its restarts on top, no lease outlived its slot, and at no time were more GPUs
held than there are (recounted from the leases' own times); a second run gives the same outcome; a copy of the trace whose
jobs take twice as long where they had not ended by a moment is decided alike up to it: no duration has reached a decider.
Spread: interquartile range of the mean over the trace with 10 % of the jobs left out at random, 5 seeds (--quick: none).
Details: the same policy on each half of the trace (by submission), on each virtual cluster alone on its private share, and
with the jobs coming at 0.8 and 1.1 times the pace: what constants fitted to this trace would break.
Reference: FIFO with backfill and least attained service without floors, in the same simulator.
Control: FIFO with backfill must miss the bar. --quick: every third job on a third of the GPUs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import harness, philly
from benchmarks.harness import Control, Options, Result
from tenure.experiments.simulator import TraceJob

NAME = "queueing"
BAR = "mean JCT <= 240 h, median <= 8 h, no first wait > 24 h, from tenant, gpus, submission and attained service alone"
ORDER = "fair"


def run(options: Options) -> Result:
    """Replay and judge. Raises Skip without the data."""
    everything = philly.jobs_of(options.need_data("traces", "philly_gavel", "jobs.csv"))
    jobs, gpus = philly.sample(everything, options.quick)
    found = philly.figures(philly.checked(jobs, ORDER, gpus=gpus))
    backfill = philly.figures(philly.run(jobs, "backfill", gpus=gpus))
    las = philly.figures(philly.run(jobs, "las", gpus=gpus))
    means = [] if options.quick else [_left_out(jobs, options.seed + number) for number in range(5)]
    control = Control(
        name="FIFO with backfill", value=backfill["mean_h"], failed=not _holds(backfill), how="mean, median and first waits"
    )
    holds, why = harness.judge(_holds(found), control)
    return Result(
        value=found["mean_h"],
        spread=harness.spread(means) if means else None,
        unit="h",
        holds=holds,
        why=why,
        reference={"backfill": backfill, "least attained service": las},
        control=control,
        details={"run": found, "gpus": gpus, "jobs": len(jobs)} | ({} if options.quick else _elsewhere(jobs)),
    )


def _holds(found: dict[str, Any]) -> bool:
    return bool(found["mean_h"] <= 240 and found["median_h"] <= 8 and found["longest_wait_h"] <= 24)


def _left_out(jobs: Sequence[TraceJob], seed: int) -> float:
    rng = random.Random(seed)
    return philly.mean_h(philly.run([job for job in jobs if rng.random() >= 0.1], ORDER))


def _elsewhere(jobs: Sequence[TraceJob]) -> dict[str, Any]:
    middle_s = sorted(job.submit_s for job in jobs)[len(jobs) // 2]
    later = [replace(job, submit_s=job.submit_s - middle_s) for job in jobs if job.submit_s >= middle_s]
    cases: dict[str, tuple[list[TraceJob], int]] = {
        "first half": ([job for job in jobs if job.submit_s < middle_s], philly.GPUS),
        "second half": (later, philly.GPUS),
    }
    for pace in (0.8, 1.1):
        cases[f"pace {pace}"] = [replace(job, submit_s=job.submit_s / pace) for job in jobs], philly.GPUS
    for tenant, gpus in philly.private_gpus(jobs).items():
        cases[f"{tenant} alone on {gpus}"] = [job for job in jobs if job.tenant == tenant], gpus
    return {
        name: {order: philly.figures(philly.run(some, order, gpus=gpus)) for order in (ORDER, "las")}
        for name, (some, gpus) in cases.items()
    }
