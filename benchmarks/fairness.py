"""No virtual cluster is worse off in the shared fleet than on a private one of its share.

World: the run of `queueing`, same policy and figures. Private share of a virtual cluster: max(its share of the trace's
GPU-hours x 224, its largest gang), scaled to a sum of 224: the largest gangs stay as they are (scaled below one, a private
cluster could never run it), the load shares are scaled until the sum is 224; whole GPUs by largest remainder. Its jobs alone
are replayed on that many GPUs with the same policy, slots and restart cost.
Value: the largest ratio of shared to private mean JCT over the virtual clusters. Bar: <= 1.2. The table is printed: virtual
cluster, jobs, share of load, private GPUs, private mean and median, shared mean and median, ratio.
Details: the same for least attained service without floors, with the mean JCT of all jobs: what fairness costs.
Checked: shares sum to the fleet, each holds its largest gang; the run itself is checked by `queueing`.
Control: FIFO with backfill, shared and private, must miss the bar. --quick: every second job on half of the GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import harness, philly
from benchmarks.harness import Control, Options, Result
from tenure.experiments.simulator import TraceJob

NAME = "fairness"
BAR = "no virtual cluster's mean JCT above 1.2 x that on its private share, in the run of queueing"
LIMIT = 1.2


def run(options: Options) -> Result:
    """Replay shared and private, and judge. Raises Skip without the data."""
    everything = philly.jobs_of(options.need_data("traces", "philly_gavel", "jobs.csv"))
    jobs, gpus = philly.sample(everything, options.quick, every=2)
    private = philly.private_gpus(jobs, gpus)
    assert sum(private.values()) == gpus, "private shares do not add up to the fleet"
    assert all(job.envelope.cpus <= private[job.tenant] for job in jobs), "a private share is smaller than a gang"
    found, las, backfill = (_compare(jobs, order, private, gpus) for order in ("fair", "las", "backfill"))
    _print(jobs, found)
    control = Control(name="FIFO with backfill", value=backfill["worst"], failed=backfill["worst"] > LIMIT, how="worst ratio")
    holds, why = harness.judge(found["worst"] <= LIMIT, control)
    return Result(
        value=found["worst"],
        spread=None,
        unit="x private mean JCT",
        holds=holds,
        why=why,
        reference={"least attained service without floors": {key: las[key] for key in ("worst", "mean_h")}},
        control=control,
        details=found,
    )


def _compare(jobs: Sequence[TraceJob], order: str, private: dict[str, int], gpus: int) -> dict[str, Any]:
    outcome = philly.run(jobs, order, gpus=gpus)
    shared = philly.tenant_means_h(outcome)
    rows = {}
    for tenant, share in private.items():
        alone = philly.figures(philly.run([job for job in jobs if job.tenant == tenant], order, gpus=share))
        rows[tenant] = {
            "private_gpus": share,
            "private_mean_h": alone["mean_h"],
            "private_median_h": alone["median_h"],
            "shared_mean_h": round(shared[tenant], 2),
            "shared_median_h": round(philly.tenant_median_h(outcome, tenant), 2),
            "ratio": round(shared[tenant] / alone["mean_h"], 3),
        }
    return {"worst": max(row["ratio"] for row in rows.values()), "mean_h": philly.mean_h(outcome), "tenants": rows}


def _print(jobs: Sequence[TraceJob], found: dict[str, Any]) -> None:
    all_gpu_s = philly.load_gpu_s(jobs)
    print("cluster   jobs   load  GPUs  private mean, median h   shared mean, median h  ratio")
    for tenant, row in found["tenants"].items():
        own = [job for job in jobs if job.tenant == tenant]
        print(
            f"{tenant:8} {len(own):5} {philly.load_gpu_s(own) / all_gpu_s:6.1%} {row['private_gpus']:5} "
            f"{row['private_mean_h']:13.1f} {row['private_median_h']:9.1f} {row['shared_mean_h']:13.1f} "
            f"{row['shared_median_h']:9.1f} {row['ratio']:6.2f}"
        )
