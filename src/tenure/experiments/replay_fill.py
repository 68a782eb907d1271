"""Placement alone: jobs come one by one onto an empty fleet and stay; what fits nowhere is dropped and the next one comes.

The protocol of the published experiment on openb (Weng et al., USENIX ATC'23): the whole trace, then jobs drawn from it with
replacement until `percent` of the fleet's GPUs (CPUs, in a fleet without any) have been asked for, shuffled by the seed. Every
rule knows beforehand how often each shape is asked for. Not here: time and queues (`simulator`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tenure.decide.mix import Mix
from tenure.decide.rooms import Rooms
from tenure.decide.rules import Rule
from tenure.decide.shapes import MICRO, micro, shape_of
from tenure.experiments.replay_figures import jain, thinned
from tenure.experiments.replay_trace import LoadedTrace
from tenure.experiments.simulator import TraceJob
from tenure.nodes import Node

_POINTS = 60


def fill_fleet(
    trace: LoadedTrace,
    fleet: Sequence[Node],
    rule: Rule,
    percent: float,
    *,
    seed: int,
    tell: Callable[[str, float], None] = lambda _text, _share: None,
) -> dict[str, Any]:
    """Return the figures of one run: what was allocated in the end and on the way, by tenant too. Shares from 0 to 1."""
    by_gpu = any(node.capacity.gpus for node in fleet)
    total = sum(len(node.capacity.gpus) if by_gpu else node.capacity.cpus for node in fleet)
    counts = Counter(shape_of(job.envelope, trace.models.get(job.id, ())) for job in trace.jobs for _ in range(job.members))
    rooms = Rooms({node.name: node.capacity for node in fleet}, rule.mix(counts), rule)
    judge = Mix(counts, power=0.0)  # the same for every rule: each shape counts by how often it is asked for
    arrived = arrivals(trace.jobs, percent / 100 * total, seed, by_gpu=by_gpu)
    asked = dict.fromkeys(sorted({job.tenant for job in trace.jobs}), 0.0)
    held, dropped = dict(asked), 0
    curve: dict[str, list[float]] = {"x": [], "allocated": [], "fragmentation": []}
    every = max(1, len(arrived) // _POINTS)
    for number, job in enumerate(arrived, start=1):
        amount = _amount(job, by_gpu)
        asked[job.tenant] += amount
        choice = rooms.choose_all([job.envelope] * job.members, trace.models.get(job.id, ()))
        if choice is None:
            dropped += 1
        else:
            held[job.tenant] += amount
            for node, devices in choice:
                rooms.take(node, job.envelope, devices)
        if number % every == 0 or number == len(arrived):
            curve["x"].append(sum(asked.values()) / total)
            curve["allocated"].append(sum(held.values()) / total)
            curve["fragmentation"].append(_stranded(rooms, fleet, judge) / total)
            tell(f"{number:,} of {len(arrived):,} requests have come", number / len(arrived))
    kept = thinned(len(curve["x"]))
    served = {name: held[name] / amount if amount else 1.0 for name, amount in asked.items()}
    allocated = sum(held.values()) / total
    return {
        "jobs": len(arrived),
        "dropped": dropped,
        "allocated": allocated,
        "fragmentation": curve["fragmentation"][-1] if curve["fragmentation"] else 0.0,
        "fairness": jain(list(served.values())),
        "tenants": {name: {"asked": asked[name], "served": share} for name, share in served.items()},
        "series": {name: [round(points[i], 6) for i in kept] for name, points in curve.items()},
        "line": f"{100 * allocated:.2f} % of the {'GPUs' if by_gpu else 'CPUs'} allocated, {dropped:,} requests dropped",
    }


def arrivals(jobs: Sequence[TraceJob], wanted: float, seed: int, *, by_gpu: bool) -> list[TraceJob]:
    """Return jobs in the order in which they come, until they ask for `wanted` GPUs or CPUs together."""
    rng, found = random.Random(seed), list(jobs)
    asked = sum(_amount(job, by_gpu) for job in jobs)
    while 0 < asked <= wanted:
        job = jobs[rng.randrange(len(jobs))]
        asked += _amount(job, by_gpu)
        if asked <= wanted:
            found.append(job)
    rng.shuffle(found)
    asked = 0.0
    for number, job in enumerate(found):  # a trace that asks for more by itself is cut
        asked += _amount(job, by_gpu)
        if asked > wanted:
            return found[:number]
    return found


def _amount(job: TraceJob, by_gpu: bool) -> float:
    return (job.envelope.gpus if by_gpu else job.envelope.cpus) * job.members


def _stranded(rooms: Rooms, fleet: Sequence[Node], judge: Mix) -> float:
    """Return the free GPUs that the average request could not use."""
    width = max([1, *(len(node.capacity.gpus) for node in fleet)])
    free = np.zeros((len(fleet), width))
    cpus, memory_bytes, models = np.zeros(len(fleet)), np.zeros(len(fleet)), []
    for number, node in enumerate(fleet):
        room = rooms.room(node.name)
        cpus[number] = micro(node.capacity.cpus - room.cpus)
        memory_bytes[number] = node.capacity.memory_bytes - room.memory_bytes
        for place, gpu in enumerate(node.capacity.gpus):
            free[number, place] = micro(1 - room.devices.get(gpu.index, (0.0, 0))[0])
        models.append(node.capacity.gpus[0].model if node.capacity.gpus else "")
    kinds = sorted(set(models))
    allowed = judge.allowed(kinds)[[kinds.index(model) for model in models]]
    return float(judge.stranded(cpus, memory_bytes, free, allowed).sum()) / MICRO**2
