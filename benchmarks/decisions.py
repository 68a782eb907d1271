"""How fast placements are decided, at the quality that `packing` shows.

Input: openb `default`, arrivals of seed 42, on the 1,213 nodes; then on 10 and 100 copies of the nodes (12,130 and 121,300,
names suffixed), with the arrivals repeated: there 20,000 decisions are timed after a third of the GPUs was given out untimed
(--quick: 3,000 after 3,000). One process, one thread, garbage collection on.
Counts: decisions per wall second over the whole run, one decision = choose a node and devices, take them; the wall time of
each decision for the percentiles; CPU seconds beside, since neighbours on the machine show in wall time. Value: decisions/s
at 1,213 nodes, median over 3 runs (--quick: 1).
Bar: >= 5,000/s with p99 < 2 ms at 1,213 nodes, and the median decision at 121,300 nodes less than 100 x that at 1,213.
Reference: FGD in plain NumPy (every node scored for every pod), the first 2,000 arrivals, in the same rounds.
Checked: nothing over-used, counted anew; every run allocates the same, within 0.01 points of what `packing` measures.
Control: our scores without what is remembered (all gains dropped before each decision), 300 decisions at 1,213 nodes after half
of the arrivals were placed untimed, when nodes differ from each other: must miss the rate.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import openb
from benchmarks.fgd import Fgd
from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from benchmarks.openb import Pod
from benchmarks.packing import Placed, allocated, by_rooms, mix_of
from tenure.decide.mix import Mix
from tenure.decide.rooms import Rooms
from tenure.resources import Capacity

NAME = "decisions"
BAR = "5,000 placements/s with p99 < 2 ms at 1,213 nodes with the quality of `packing`; growth with nodes below linear"
RATE, P99_S = 5_000, 0.002
COPIES = (10, 100)
SEED = 42


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run."""

    per_s: float
    p50_s: float
    p99_s: float
    cpu_s: float
    """CPU seconds per decision."""
    allocated_percent: float = 0.0


def run(options: Options) -> Result:
    """Time decisions on three sizes of fleet."""
    folder = options.need_data("traces", "openb")
    nodes, pods = openb.nodes_of(folder), openb.pods_of(folder, "default")
    arrived = openb.arrivals(pods, openb.gpus_of(nodes), SEED)
    mix = mix_of(Counter(pods))
    rounds = interleaved(
        {"ours": lambda: whole(nodes, arrived, mix), "fgd": lambda: plain(nodes, pods, arrived[:2_000])},
        1 if options.quick else 3,
        seed=options.seed,
    )
    ours = rounds["ours"]
    expected = allocated(nodes, by_rooms(nodes, arrived, mix))
    assert all(abs(one.allocated_percent - expected) <= 0.01 for one in ours), "the timed runs place otherwise than `packing`"
    timed = 3_000 if options.quick else 20_000
    larger = {copies: many(nodes, arrived, mix, copies, timed, fill=not options.quick) for copies in COPIES}
    p50_s, p99_s = median([one.p50_s for one in ours]), median([one.p99_s for one in ours])
    per_s = median([one.per_s for one in ours])
    growth = larger[COPIES[-1]].p50_s / p50_s
    forgetful = without_memory(nodes, arrived, mix).per_s
    control = Control(name="nothing remembered", value=forgetful, failed=forgetful < RATE, how="decisions/s at 1,213 nodes")
    holds, why = judge(per_s >= RATE and p99_s < P99_S and growth < COPIES[-1], control)
    sizes = {len(nodes): ours[0], **{copies * len(nodes): one for copies, one in larger.items()}}
    return Result(
        value=round(per_s, 1),
        spread=round(spread([one.per_s for one in ours]), 1),
        unit="decisions/s",
        holds=holds,
        why=why,
        reference={"fgd_plain_per_s": round(median([one.per_s for one in rounds["fgd"]]), 1)},
        control=control,
        details={
            "p99_ms": round(p99_s * 1e3, 3),
            "p50_growth_100x": round(growth, 2),
            "allocated_percent": round(expected, 3),
            **{f"nodes_{size}": _shown(one) for size, one in sizes.items()},
        },
    )


def whole(nodes: Mapping[str, Capacity], arrived: Sequence[Pod], mix: Mix) -> Run:
    """Time every arrival on the fleet."""
    return timed_run(nodes, Rooms(nodes, mix), arrived, None)


def without_memory(nodes: Mapping[str, Capacity], arrived: Sequence[Pod], mix: Mix) -> Run:
    """Time 300 arrivals in the middle, all remembered gains dropped before each."""
    rooms, half = Rooms(nodes, mix), len(arrived) // 2
    for pod in arrived[:half]:
        choice = rooms.choose(pod.envelope, pod.models)
        if choice is not None:
            rooms.take(choice[0], pod.envelope, choice[1])
    return timed_run(nodes, rooms, arrived[half : half + 300], mix)


def many(nodes: Mapping[str, Capacity], arrived: Sequence[Pod], mix: Mix, copies: int, timed: int, *, fill: bool) -> Run:
    """Time decisions on so many copies of the nodes, after a third of the GPUs (or 3,000 leases) was given out."""
    fleet = {f"{name}-{copy}": capacity for copy in range(copies) for name, capacity in nodes.items()}
    rooms, given, number = Rooms(fleet, mix), 0.0, 0
    enough = openb.gpus_of(fleet) / 3 if fill else math.inf
    while given < enough and (fill or number < 3_000):
        pod = arrived[number % len(arrived)]
        choice = rooms.choose(pod.envelope, pod.models)
        if choice is not None:
            rooms.take(choice[0], pod.envelope, choice[1])
            given += pod.envelope.gpus
        number += 1
    return timed_run(fleet, rooms, [arrived[(number + i) % len(arrived)] for i in range(timed)], None)


def timed_run(nodes: Mapping[str, Capacity], rooms: Rooms, arrived: Sequence[Pod], forget: Mix | None) -> Run:
    """Decide on each arrival; nothing over-used is checked after the clock has stopped."""
    placed, times_s = Placed(), []
    cpu_s, began_s = time.process_time(), time.perf_counter()
    for pod in arrived:
        before_s = time.perf_counter()
        if forget is not None:
            rooms.weigh(forget)
        choice = rooms.choose(pod.envelope, pod.models)
        if choice is not None:
            rooms.take(choice[0], pod.envelope, choice[1])
        times_s.append(time.perf_counter() - before_s)
        if choice is not None:
            placed.append((pod, choice[0], tuple(share.index for share in choice[1])))
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return _run(times_s, took_s, cpu_s, allocated(nodes, placed))


def plain(nodes: Mapping[str, Capacity], pods: Sequence[Pod], arrived: Sequence[Pod]) -> Run:
    """Time FGD when it scores each node for each pod."""
    fgd, times_s = Fgd(nodes, pods), []
    cpu_s, began_s = time.process_time(), time.perf_counter()
    for pod in arrived:
        before_s = time.perf_counter()
        choice = fgd.choose(pod, anew=True)
        if choice is not None:
            fgd.take(choice[0], pod, choice[1])
        times_s.append(time.perf_counter() - before_s)
    return _run(times_s, time.perf_counter() - began_s, time.process_time() - cpu_s, 0.0)


def _run(times_s: list[float], took_s: float, cpu_s: float, percent: float) -> Run:
    times_s = sorted(times_s)
    count = len(times_s)
    return Run(count / took_s, times_s[count // 2], times_s[math.ceil(count * 0.99) - 1], cpu_s / count, percent)


def _shown(one: Run) -> dict[str, float]:
    return {
        "per_s": round(one.per_s, 1),
        "p50_ms": round(one.p50_s * 1e3, 3),
        "p99_ms": round(one.p99_s * 1e3, 3),
        "cpu_ms": round(one.cpu_s * 1e3, 3),
    }
