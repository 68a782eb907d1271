"""How much of a GPU cluster the placement fills, against the best published policy on the same arrivals.

Input: openb (`traces/openb` of the data folder): the 1,213 GPU nodes, empty (6,212 GPUs, 107,018 cores), and ten pod lists.
Arrivals of a seed: the whole list, then pods drawn from it uniformly with replacement until the GPUs asked for reach 130 % of
6,212, all shuffled. Pods come one by one and never leave; one that fits nowhere is dropped and the run goes on; one that fits
somewhere is placed. It fits: CPU, memory, GPU model, and one device with enough left (a share) or enough whole free devices.
Seeds 42..51 (--quick: 42, three lists) with the names of nodes as in the file, then 42..44 (--quick: none) with the names
dealt out anew (permutation = seed), the same for both policies; the bar must hold for either.

Counts: GPUs allocated / 6,212 in %, after all arrivals. Value: mean over lists and seeds of ours - FGD, in points; spread: of
the ten lists' means. Bar: mean >= +0.3, no list below -0.1, and `default` at 95.8 % or more.
Reference: FGD (USENIX ATC'23) as its artefact does it, re-run here on the same arrivals: shapes that cover 95 % of the pods,
node score int(100 x sigmoid((F before - F after) / 1000)), ties to the smallest name. Both know the list's mix of shapes
beforehand, as the artefact does. `details` also has ours with nothing known beforehand (learnt from what has arrived, at each
doubling).

Checked for both: no node, device or model is over-used, counted anew from the placements; every dropped pod fitted nowhere at
that moment (each 50th drop, node by node, by the packing rules that grant leases).
Control: any node with room, and any of its devices with room, at random (drawn from the seed): must miss the bar.
Left out: pods that end; time (see `decisions`); moves (see `packing_renewal`).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import openb
from benchmarks.fgd import Fgd
from benchmarks.harness import Control, Options, Result, judge, spread
from benchmarks.openb import Pod
from tenure.decide.mix import Mix
from tenure.decide.rooms import Rooms
from tenure.decide.shapes import shape_of
from tenure.resources import Capacity

NAME = "packing"
BAR = "openb, 10 lists, 10 seeds: GPU allocation at least 0.3 points above FGD in the mean, no list 0.1 below, default 95.8 %"
MEAN, LEAST, DEFAULT = 0.3, -0.1, 95.8
PERMUTED = (42, 43, 44)
CHECK_EACH = 50
LEARN_FROM = 64
"""Arrivals after which the mix is learnt for the first time; then at each doubling."""
Placed = list[tuple[Pod, str, tuple[int, ...]]]


def run(options: Options) -> Result:
    """Place every list with every seed, by both policies."""
    folder = options.need_data("traces", "openb")
    lists = ("default", "cpu200", "gpushare60") if options.quick else openb.LISTS
    seeds = openb.SEEDS[:1] if options.quick else openb.SEEDS
    as_named = {name: compared(folder, name, seeds, permuted=False) for name in lists}
    permuted = {} if options.quick else {name: compared(folder, name, PERMUTED, permuted=True) for name in lists}
    tables = [table for table in (as_named, permuted) if table]
    holds = all(_holds(table) for table in tables)
    nodes, pods = openb.nodes_of(folder), openb.pods_of(folder, "default")
    at_random = allocated(nodes, by_chance(nodes, pods, openb.arrivals(pods, openb.gpus_of(nodes), seeds[0]), seeds[0]))
    control = Control(name="random node and device", value=at_random, failed=at_random < DEFAULT, how="default, % of the GPUs")
    holds, why = judge(holds, control)
    gains = {name: ours - fgd for name, (ours, fgd) in as_named.items()}
    return Result(
        value=round(_mean(gains.values()), 3),
        spread=round(spread(list(gains.values())), 3),
        unit="points of GPU allocation above FGD",
        holds=holds,
        why=why,
        reference={"fgd_percent": {name: round(fgd, 2) for name, (_, fgd) in as_named.items()}},
        control=control,
        details={
            "seeds": list(seeds),
            "ours_percent": {name: round(ours, 2) for name, (ours, _) in as_named.items()},
            "gain_points": {name: round(gain, 2) for name, gain in gains.items()},
            "gain_points_permuted_names": {name: round(ours - fgd, 2) for name, (ours, fgd) in permuted.items()},
            "ours_percent_permuted_names": {name: round(ours, 2) for name, (ours, _) in permuted.items()},
            "ours_percent_learnt_online": {name: round(online(folder, name, seeds[:2]), 2) for name in lists},
        },
    )


def compared(folder: Path, name: str, seeds: Sequence[int], *, permuted: bool) -> tuple[float, float]:
    """Return what we and FGD allocate of one list, in %, means over the seeds, both placements checked."""
    pods = openb.pods_of(folder, name)
    ours, theirs = [], []
    for seed in seeds:
        nodes = openb.nodes_of(folder, permute=seed if permuted else None)
        arrived = openb.arrivals(pods, openb.gpus_of(nodes), seed)
        ours.append(allocated(nodes, by_rooms(nodes, arrived, mix_of(Counter(pods)))))
        theirs.append(allocated(nodes, by_fgd(nodes, pods, arrived)))
        print(f"{name} seed {seed}{' permuted' if permuted else ''}: {ours[-1]:.2f} %, FGD {theirs[-1]:.2f} %", flush=True)
    return _mean(ours), _mean(theirs)


def online(folder: Path, name: str, seeds: Sequence[int]) -> float:
    """Return what we allocate of one list when the mix is learnt from what has arrived, in %, mean over the seeds."""
    nodes, pods = openb.nodes_of(folder), openb.pods_of(folder, name)
    gpus = openb.gpus_of(nodes)
    return _mean([allocated(nodes, by_rooms(nodes, openb.arrivals(pods, gpus, seed), None)) for seed in seeds])


def by_rooms(nodes: Mapping[str, Capacity], arrived: Sequence[Pod], mix: Mix | None) -> Placed:
    """Place by Tenure's decider. mix: None learns it on the way."""
    rooms, seen, dropped, placed = Rooms(nodes, mix or Mix({})), Counter[Pod](), 0, Placed()
    for number, pod in enumerate(arrived, start=1):
        if mix is None:
            seen[pod] += 1
            if number >= LEARN_FROM and number.bit_count() == 1:
                rooms.weigh(mix_of(seen))
        choice = rooms.choose(pod.envelope, pod.models)
        if choice is None:
            dropped += 1
            if dropped % CHECK_EACH == 0:
                reasons = rooms.refusals(pod.envelope, pod.models)
                assert len(reasons) == len(nodes), f"{pod} was dropped though it fits on {set(nodes) - set(reasons)}"
            continue
        rooms.take(choice[0], pod.envelope, choice[1])
        placed.append((pod, choice[0], tuple(share.index for share in choice[1])))
    return placed


def by_fgd(nodes: Mapping[str, Capacity], pods: Sequence[Pod], arrived: Sequence[Pod]) -> Placed:
    """Place by the reference."""
    fgd, dropped, placed = Fgd(nodes, pods), 0, Placed()
    for pod in arrived:
        choice = fgd.choose(pod)
        if choice is None:
            dropped += 1
            assert dropped % CHECK_EACH or not len(fgd.fitting(pod)), f"{pod} was dropped though it fits"
            continue
        fgd.take(choice[0], pod, choice[1])
        placed.append((pod, fgd.names[choice[0]], choice[1]))
    return placed


def by_chance(nodes: Mapping[str, Capacity], pods: Sequence[Pod], arrived: Sequence[Pod], seed: int) -> Placed:
    """Place anywhere with room."""
    state, rng, placed = Fgd(nodes, pods), random.Random(seed), Placed()
    for pod in arrived:
        fitting = state.fitting(pod)
        if not len(fitting):
            continue
        node = int(fitting[rng.randrange(len(fitting))])
        right = np.flatnonzero(state.free[node] >= min(1000, pod.milli)).tolist() if pod.milli else []
        devices = tuple(rng.sample(right, max(1, pod.milli // 1000))) if right else ()
        state.take(node, pod, devices)
        placed.append((pod, state.names[node], devices))
    return placed


def allocated(nodes: Mapping[str, Capacity], placed: Placed) -> float:
    """Return the GPUs allocated in %, counted from the placements. AssertionError when something is used twice."""
    cpus, memory, devices = Counter[str](), Counter[str](), defaultdict[tuple[str, int], int](int)
    for pod, node, indices in placed:
        cpus[node] += round(pod.envelope.cpus * 1000)
        memory[node] += pod.envelope.memory_bytes
        assert len(indices) == (max(1, pod.milli // 1000) if pod.milli else 0), f"{pod} got {len(indices)} devices"
        for index in indices:
            devices[node, index] += min(1000, pod.milli)
            assert not pod.models or nodes[node].gpus[index].model in pod.models, f"{pod} is on a model it cannot run on"
    for node, capacity in nodes.items():
        assert cpus[node] <= round(capacity.cpus * 1000), f"the CPUs of {node} are over-used"
        assert memory[node] <= capacity.memory_bytes, f"the memory of {node} is over-used"
    assert all(milli <= 1000 for milli in devices.values()), "a device is over-used"
    return sum(pod.milli for pod, _, _ in placed) / openb.gpus_of(nodes) / 10


def mix_of(counted: Mapping[Pod, int]) -> Mix:
    """Return the mix of these pods."""
    return Mix({shape_of(pod.envelope, pod.models): count for pod, count in counted.items()})


def _holds(table: Mapping[str, tuple[float, float]]) -> bool:
    gains = [ours - fgd for ours, fgd in table.values()]
    return _mean(gains) >= MEAN and min(gains) >= LEAST and table["default"][0] >= DEFAULT


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
