"""What a trace's demand would have let one foretell: capacity to hold ahead, nodes to add, run times, how long to keep idle.

The report of `tenure replay` shows it: before somebody relies on forecasts they see, on their own history, how often those
would have missed and what they would have saved. Demand is what jobs would use if nobody waited, so no policy shapes it.
"""

from __future__ import annotations

import heapq
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.decide.durations import Kind, RunTimes, keep_alive_s
from tenure.decide.forecast import Forecaster, nodes_needed, rehearse
from tenure.experiments.replay import Replay
from tenure.experiments.replay_figures import show_time
from tenure.experiments.simulator import TraceJob

Array = NDArray[np.float64]
LEAD_S = 600.0
RISK = 0.01
MAX_STEPS, MIN_STEPS = 2000, 60
SHORTEST_STEP_S = 60.0
MAX_JOBS = 20_000
"""Jobs whose run times are foretold, the latest."""
LEVEL = 0.8
_LEARNING = 1 / 3
_SHORTEST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandOutlook:
    """How forecasts of one tenant's demand, or of everyone's, would have done on the last two thirds of a trace."""

    tenant: str | None
    """None: all together."""
    peak: float
    """What a fixed capacity must be to never miss."""
    held: float
    """Mean capacity that the forecasts say to hold."""
    misses: float
    """Share of steps with demand above it; 0.01 was asked for."""
    reactive: float | None
    """Mean capacity of last value x (1 + margin), the least margin with no more misses; None: no margin is enough."""
    season_s: float | None
    nodes: float
    """Mean number of nodes that what is held needs, by the largest number of units of one node."""
    keep_alive_s: float
    """How long to keep an idle lease for the tenant, whose gaps these are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeOutlook:
    """How run times would have been foretold from jobs of the same tenant and size that had ended."""

    jobs: int
    inside: float
    """Share inside the 80 % interval."""
    off: float
    """Median factor between foretold and true run time."""
    off_last: float
    """The same of the tenant's last run time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What could be foretold on a trace."""

    step_s: float
    lead_s: float
    demands: tuple[DemandOutlook, ...]
    """All together, then the tenants with the most demand; none where the trace is too short to judge a forecast."""
    run_times: RunTimeOutlook | None


def outlook(jobs: Sequence[TraceJob], *, gpus: bool, node_units: float, restart_s: float, max_tenants: int = 5) -> Outlook:
    """Return what forecasts would have done on these jobs, which are in the order of submission.

    gpus: demand is counted in GPUs, else in CPUs. node_units: of the largest node. restart_s: what each start after a job's
    first costs; idle leases are kept in view of it.
    """
    end_s = max((job.submit_s for job in jobs), default=0.0)
    step_s = max(SHORTEST_STEP_S, end_s / MAX_STEPS)
    steps = int(end_s / step_s)
    units: dict[str, float] = defaultdict(float)
    for job in jobs:
        units[job.tenant] += _units(job, gpus) * job.duration_s
    names = sorted((name for name, asked in units.items() if asked > 0), key=lambda name: (-units[name], name))[:max_tenants]
    demands = []
    if steps >= max(MIN_STEPS, 6 * LEAD_S / step_s):
        groups: list[str | None] = [None, *names] if len(names) > 1 else [None]
        for name in groups:
            mine = [job for job in jobs if name in (None, job.tenant)]
            made = _demand(name, mine, step_s, steps, gpus=gpus, node_units=node_units, restart_s=restart_s)
            demands += [made] if made else []
    return Outlook(step_s=step_s, lead_s=max(LEAD_S, step_s), demands=tuple(demands), run_times=_run_times(jobs[-MAX_JOBS:]))


def _units(job: TraceJob, gpus: bool) -> float:
    return job.members * (job.envelope.gpus if gpus else job.envelope.cpus)


def demand_steps(jobs: Sequence[TraceJob], step_s: float, steps: int, *, gpus: bool) -> Array:
    """Return the mean demand of each step: what jobs use from submission for their duration, if none of them waits."""
    begins = np.array([job.submit_s for job in jobs])
    ends = begins + np.array([job.duration_s for job in jobs])
    weights = np.array([_units(job, gpus) for job in jobs])
    # The integral of demand up to each edge: every job contributes its part before it.
    order, times = np.argsort(np.concatenate([begins, ends]), kind="stable"), np.concatenate([begins, ends])
    changes = np.concatenate([weights, -weights])[order]
    times = times[order]
    level = np.cumsum(changes)
    integral = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(times))])
    edges = np.arange(steps + 1) * step_s
    at = np.clip(np.searchsorted(times, edges, side="right") - 1, 0, None)
    until = np.where(edges < times[0], 0.0, integral[at] + level[at] * (edges - times[at]))
    demand: Array = np.maximum(np.round(np.diff(until) / step_s, 9), 0.0)
    return demand


def _demand(
    tenant: str | None,
    jobs: Sequence[TraceJob],
    step_s: float,
    steps: int,
    *,
    gpus: bool,
    node_units: float,
    restart_s: float,
) -> DemandOutlook | None:
    demand = demand_steps(jobs, step_s, steps, gpus=gpus)
    forecaster = Forecaster(step_s=step_s, lead_s=max(LEAD_S, step_s), risk=RISK)
    found = rehearse(forecaster, ((i * step_s, value) for i, value in enumerate(demand.tolist())))
    judged = found[max(0, int(steps * _LEARNING) - forecaster.lead) :]
    wanted = np.array([one.demand for one in judged])
    if not (wanted > 0).any():
        return None
    held = np.array([one.foretold.capacity for one in judged])
    missed = int((wanted > held).sum())
    last = demand[len(demand) - len(wanted) - forecaster.lead : len(demand) - forecaster.lead]
    return DemandOutlook(
        tenant=tenant,
        peak=float(wanted.max()),
        held=float(held.mean()),
        misses=missed / len(wanted),
        reactive=_reactive(wanted, last, missed),
        season_s=forecaster.season_s,
        nodes=statistics.fmean(nodes_needed(one.foretold, node_capacity=node_units) for one in judged),
        keep_alive_s=keep_alive_s(_idle_gaps_s(jobs), restart_s=max(restart_s, _SHORTEST_S)),
    )


def _reactive(wanted: Array, last: Array, misses: int) -> float | None:
    """Return the mean capacity of the reactive policy with the least margin that misses no more steps."""
    needed = np.where(wanted > 0, np.divide(wanted, last, out=np.full(len(last), np.inf), where=last > 0), 0.0)
    least = float(np.sort(needed)[len(needed) - 1 - misses])
    return float(least * last.mean()) if np.isfinite(least) else None


def _idle_gaps_s(jobs: Sequence[TraceJob]) -> list[float]:
    """Return for how long nothing of these jobs would run before the next came, had none of them waited."""
    gaps, busy_until_s = [], jobs[0].submit_s
    for job in jobs:
        if job.submit_s > busy_until_s:
            gaps.append(job.submit_s - busy_until_s)
        busy_until_s = max(busy_until_s, job.submit_s + job.duration_s)
    return gaps


def _run_times(jobs: Sequence[TraceJob]) -> RunTimeOutlook | None:
    times, running, last = RunTimes(), list[tuple[float, int, TraceJob]](), dict[str, float]()
    inside, off, off_last = list[bool](), list[float](), list[float]()
    for number, job in enumerate(jobs):
        while running and running[0][0] <= job.submit_s:
            ended = heapq.heappop(running)[2]
            times.observe(_kind(ended), ended.duration_s)
            last[ended.tenant] = ended.duration_s
        made = times.foretell(_kind(job), level=LEVEL)
        if made is not None and job.tenant in last:
            inside.append(made.low_s <= job.duration_s <= made.high_s)
            off.append(_factor(made.value_s, job.duration_s))
            off_last.append(_factor(last[job.tenant], job.duration_s))
        heapq.heappush(running, (job.submit_s + job.duration_s, number, job))
    if len(inside) < MIN_STEPS:
        return None
    return RunTimeOutlook(
        jobs=len(inside), inside=statistics.fmean(inside), off=statistics.median(off), off_last=statistics.median(off_last)
    )


def _kind(job: TraceJob) -> Kind:
    return Kind(job.tenant, "", job.members)


def _factor(foretold_s: float, true_s: float) -> float:
    """Return how many times one is the other, at least 1; below a second nothing is told apart."""
    ratio = max(foretold_s, _SHORTEST_S) / max(true_s, _SHORTEST_S)
    return max(ratio, 1 / ratio)


def outlook_blocks(replay: Replay) -> list[dict[str, Any]]:
    """Return what the report of a timed replay says of it, as blocks of `report.build_report`."""
    capacities = [node.capacity for node in replay.fleet]
    gpus = any(one.gpus for one in capacities)
    node_units = max(len(one.gpus) if gpus else one.cpus for one in capacities)
    found = outlook(replay.trace.jobs, gpus=gpus, node_units=node_units, restart_s=replay.restart_s)
    unit, lead = "GPUs" if gpus else "CPUs", show_time(found.lead_s)
    blocks: list[dict[str, Any]] = []
    if found.demands:
        note = (
            f"What jobs would use if nobody waited, in {unit}, per {show_time(found.step_s)}, on the last two "
            f"thirds of the trace. Held: capacity fixed {lead} ahead, asked for misses in {RISK:.0%} of the steps. Reactive: "
            "last value with the best margin, known afterwards, at no more misses; no: none is enough. Nodes: what is held, "
            "on nodes of the largest size, on average. Keep idle: for how long a lease without work costs at most 3 times "
            f"what the best would, with {show_time(replay.restart_s)} per restart."
        )
        columns = ["tenant", "peak", "held", "of peak", "steps missed", "reactive", "season", "nodes", "keep idle"]
        rows = [[{"text": text} for text in _row(one)] for one in found.demands]
        blocks.append(
            {"kind": "table", "title": "Demand foretold", "columns": columns, "rows": rows, "note": note, "folded": False}
        )
    else:
        blocks.append({"kind": "text", "text": f"The trace is too short to judge forecasts {lead} ahead on it."})
    if found.run_times is not None:
        ran = found.run_times
        text = (
            f"Run times, foretold from those of the same tenant and gang size that had ended: {ran.inside:.0%} of {ran.jobs:,} "
            f"jobs inside the {LEVEL:.0%} interval; the middle one is off by a factor of {ran.off:.1f}, the tenant's last run "
            f"time by {ran.off_last:.1f}."
        )
        blocks.append({"kind": "text", "text": text})
    return blocks


def _row(one: DemandOutlook) -> tuple[str, ...]:
    return (
        one.tenant or "all",
        f"{one.peak:,.1f}",
        f"{one.held:,.1f}",
        f"{one.held / one.peak:.0%}",
        f"{one.misses:.1%}",
        f"{one.reactive:,.1f}" if one.reactive is not None else "no",
        show_time(one.season_s) if one.season_s is not None else "none",
        f"{one.nodes:,.1f}",
        show_time(one.keep_alive_s),
    )
