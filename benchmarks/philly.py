"""Jobs of `philly_gavel/jobs.csv`, and what the queueing benchmarks say of a run of them. Not a benchmark."""

from __future__ import annotations

import csv
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenure.events import Event
from tenure.experiments.simulator import Outcome, Policy, Simulation, TraceJob, simulate
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope

GPUS = 224
MIB = 1 << 20
SLOT_S, RESTART_S = 3600.0, 60.0


def jobs_of(path: Path) -> list[TraceJob]:
    """Return the trace's jobs in file order, a GPU as a core: interchangeable, so that nodes play no part."""
    with path.open(newline="") as file:
        return [
            TraceJob(
                id=f"{row['vc']}-{row['job']}",
                tenant=row["vc"],
                submit_s=float(row["submit_s"]),
                envelope=Envelope(cpus=float(row["gpus"]), memory_bytes=MIB),
                duration_s=float(row["duration_v100_s"]),
            )
            for row in csv.DictReader(file)
        ]


def fleet(gpus: int = GPUS) -> list[Node]:
    """Return one node of as many interchangeable GPUs, counted as cores."""
    capacity = Capacity(cpus=float(gpus), memory_bytes=MIB << 20)
    return [Node(name="pool", capacity=capacity, machine=Machine(cpu_model="interchangeable"))]


def run(jobs: Sequence[TraceJob], order: str, *, gpus: int = GPUS, seed: int = 0) -> Outcome:
    """Replay jobs by an order of the queue."""
    return simulate(jobs, fleet(gpus), Policy(order=order, slot_s=SLOT_S, restart_s=RESTART_S), seed=seed)


class Recorded(Simulation):
    """A run that keeps what the deciders were told."""

    def __init__(self, jobs: Sequence[TraceJob], order: str, *, gpus: int = GPUS) -> None:
        self.told: list[Event] = []
        super().__init__(jobs, fleet(gpus), Policy(order=order, slot_s=SLOT_S, restart_s=RESTART_S))

    def _tell(self, kind: str, data: Mapping[str, Any], *, node: str = "") -> None:
        super()._tell(kind, data, node=node)
        self.told.append(Event(seq=len(self.told) + 1, at_s=self.now_s, kind=kind, who="broker", node=node, data=data))

    def grants(self, until_s: float) -> list[tuple[float, str, str]]:
        """Return when which lease began, was renewed or ended."""
        return [
            (event.at_s, event.kind, event.data["lease"].id) for event in self.told if event.at_s <= until_s and not event.node
        ]


def checked(jobs: Sequence[TraceJob], order: str, *, gpus: int = GPUS) -> Outcome:
    """Replay jobs, and recount from the leases what must be true of any honest run. Raises AssertionError."""
    run_ = Recorded(jobs, order, gpus=gpus)
    while run_.step():
        pass
    outcome = run_.outcome()
    _recount(run_, jobs, outcome, gpus)
    assert run(jobs, order, gpus=gpus) == outcome, "a second run gave another outcome"
    # Up to a moment nothing may depend on how much longer the jobs take that have not ended by then.
    moment_s = statistics.median(job.submit_s for job in jobs)
    ends = {job.id: job.end_s or math.inf for job in outcome.jobs}
    other = Recorded(
        [replace(job, duration_s=job.duration_s * (2.0 if ends[job.id] > moment_s else 1.0)) for job in jobs], order, gpus=gpus
    )
    while other.now_s <= moment_s and other.step():
        pass
    assert run_.grants(moment_s - 1) == other.grants(moment_s - 1), "a decision depended on how long a job still takes"
    return outcome


def _recount(run_: Recorded, jobs: Sequence[TraceJob], outcome: Outcome, gpus: int) -> None:
    held: dict[str, float] = {}
    changes: list[tuple[float, float]] = []
    for event in run_.told:
        if event.kind == "lease.ended":
            lease = event.data["lease"]
            assert lease.ends_at_s >= lease.ended_at_s - 1e-6, f"lease {lease.id} outlived its slot"
            held[lease.run_id] = held.get(lease.run_id, 0.0) + lease.ended_at_s - lease.starts_at_s
            changes += [(lease.starts_at_s, lease.envelope.cpus), (lease.ended_at_s, -lease.envelope.cpus)]
    for job, end in zip(jobs, outcome.jobs, strict=True):
        wanted_s = job.duration_s + end.restarts * RESTART_S
        assert abs(held[job.id] - wanted_s) < 1e-3 + 1e-9 * wanted_s, f"job {job.id} held {held[job.id]} s, needed {wanted_s} s"
    taken = 0.0
    for _, change in sorted(changes):  # what ends at a moment comes before what begins
        taken += change
        assert taken <= gpus + 1e-6, f"{taken} GPUs were held of {gpus}"


def sample(jobs: Sequence[TraceJob], quick: bool, *, every: int = 3) -> tuple[list[TraceJob], int]:
    """Return jobs and GPUs: all, or every third (`every`) job on a third of the GPUs."""
    return (list(jobs[::every]), GPUS // every) if quick else (list(jobs), GPUS)


def with_estimates(jobs: Sequence[TraceJob], sigma: float, seed: int) -> list[TraceJob]:
    """Return the jobs, each with an estimate off by a log-normal factor."""
    rng = random.Random(seed * 1_000 + round(10 * sigma))
    return [replace(job, estimate_s=job.duration_s * math.exp(sigma * rng.gauss(0.0, 1.0))) for job in jobs]


def load_gpu_s(jobs: Iterable[TraceJob]) -> float:
    """Return the GPU-seconds that jobs need."""
    return math.fsum(job.envelope.cpus * job.duration_s for job in jobs)


def mean_h(outcome: Outcome) -> float:
    """Return the mean completion time in hours. Raises AssertionError when a job was not completed."""
    times = [job.completion_s for job in outcome.jobs]
    assert None not in times, "a job was not completed"
    return statistics.fmean(time for time in times if time is not None) / 3600


def figures(outcome: Outcome) -> dict[str, Any]:
    """Return what is told of a run, times in hours."""
    times = sorted((job.completion_s or 0.0) / 3600 for job in outcome.jobs)
    waits = sorted(((job.first_start_s or 0.0) - job.submit_s) / 3600 for job in outcome.jobs)
    return {
        "mean_h": round(mean_h(outcome), 2),
        "median_h": round(statistics.median(times), 2),
        "p95_h": round(times[int(0.95 * len(times))], 1),
        "longest_wait_h": round(waits[-1], 2),
        "mean_wait_h": round(statistics.fmean(waits), 2),
        "restarts": sum(job.restarts for job in outcome.jobs),
    }


def tenant_means_h(outcome: Outcome) -> dict[str, float]:
    """Return the mean completion time of each virtual cluster's jobs, in hours."""
    times: dict[str, list[float]] = {}
    for job in outcome.jobs:
        times.setdefault(job.tenant, []).append((job.completion_s or math.inf) / 3600)
    return {tenant: statistics.fmean(each) for tenant, each in sorted(times.items())}


def tenant_median_h(outcome: Outcome, tenant: str) -> float:
    """Return the median completion time of one virtual cluster's jobs, in hours."""
    return statistics.median((job.completion_s or math.inf) / 3600 for job in outcome.jobs if job.tenant == tenant)


def private_gpus(jobs: Sequence[TraceJob], gpus: int = GPUS) -> dict[str, int]:
    """Return each virtual cluster's share of the fleet in whole GPUs: max(scaled share of the load, largest gang), sum `gpus`.

    Raises ValueError when the largest gangs alone need more.
    """
    load: dict[str, float] = {}
    largest: dict[str, int] = {}
    for job in jobs:
        load[job.tenant] = load.get(job.tenant, 0.0) + load_gpu_s([job])
        largest[job.tenant] = max(largest.get(job.tenant, 0), round(job.envelope.cpus))
    if sum(largest.values()) > gpus:
        raise ValueError(f"the largest gangs need {sum(largest.values())} GPUs; the fleet has {gpus}")
    low, high = 0.0, 1.0
    for _ in range(60):
        scale = (low + high) / 2
        total = sum(max(scale * gpus * load[each] / sum(load.values()), largest[each]) for each in load)
        low, high = (low, scale) if total > gpus else (scale, high)
    exact = {each: max(low * gpus * load[each] / sum(load.values()), largest[each]) for each in sorted(load)}
    whole = {each: math.floor(share + 1e-9) for each, share in exact.items()}
    for each in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[: gpus - sum(whole.values())]:
        whole[each] += 1
    return whole
