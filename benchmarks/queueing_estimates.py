"""Mean completion time when each job comes with an uncertain estimate of its run time.

World: as in `queueing`; beside that each job tells, on submission, estimate = duration x exp(sigma x z), z standard normal by
`--seed`, sigma one of 0.5, 1, 2. The policy is told neither sigma nor whether estimates are any good: it has to learn that from
jobs that have ended. Bars: mean JCT <= 100, 130, 180 h for the three; no wait > 24 h is not asked here, and is reported.
Value: the largest ratio of mean to bar over the three sigmas. Spread: interquartile range of that ratio over 3 seeds
(--quick: one seed, every third job on a third of the GPUs). Details: mean, median, longest wait, restarts per sigma.
Checked: as in `queueing`, for each sigma with the first seed.
Reference: the same policy without estimates, with true durations as estimates, and with estimates dealt out at random.
Control: FIFO with backfill, which hears no estimate, must miss the bars.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from benchmarks import harness, philly
from benchmarks.harness import Control, Options, Result

NAME = "queueing_estimates"
BAR = "mean JCT <= 100, 130, 180 h with estimates off by log-normal sigma 0.5, 1, 2, sigma unknown to the policy"
ORDER = "fair"
BARS_H = {0.5: 100.0, 1.0: 130.0, 2.0: 180.0}


def run(options: Options) -> Result:
    """Replay and judge. Raises Skip without the data."""
    everything = philly.jobs_of(options.need_data("traces", "philly_gavel", "jobs.csv"))
    jobs, gpus = philly.sample(everything, options.quick)
    details: dict[str, Any] = {}
    ratios = []
    for number in range(1 if options.quick else 3):
        worst = 0.0
        for sigma, bar_h in BARS_H.items():
            told = philly.with_estimates(jobs, sigma, options.seed + number)
            outcome = philly.run(told, ORDER, gpus=gpus) if number else philly.checked(told, ORDER, gpus=gpus)
            found = details[f"sigma {sigma}, seed {options.seed + number}"] = philly.figures(outcome)
            worst = max(worst, found["mean_h"] / bar_h)
        ratios.append(worst)
    shuffled = [job.duration_s for job in jobs]
    random.Random(options.seed).shuffle(shuffled)
    dealt = [replace(job, estimate_s=each) for job, each in zip(jobs, shuffled, strict=True)]
    reference: dict[str, Any] = (
        {}
        if options.quick
        else {
            "without estimates": philly.figures(philly.run(jobs, ORDER, gpus=gpus)),
            "true durations": philly.figures(philly.run(philly.with_estimates(jobs, 0.0, 0), ORDER, gpus=gpus)),
            "dealt at random": philly.figures(philly.run(dealt, ORDER, gpus=gpus)),
        }
    )
    backfill_h = philly.mean_h(philly.run(jobs, "backfill", gpus=gpus))
    ratio = min(backfill_h / bar_h for bar_h in BARS_H.values())
    control = Control(name="FIFO with backfill", value=ratio, failed=ratio > 1, how="mean JCT against the widest bar")
    holds, why = harness.judge(max(ratios) <= 1, control)
    return Result(
        value=harness.median(ratios),
        spread=harness.spread(ratios),
        unit="of the bar",
        holds=holds,
        why=why,
        reference=reference,
        control=control,
        details=details,
    )
