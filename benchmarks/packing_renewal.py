"""What moving leases when they renew adds to placement, with a bounded number of moves.

Input and arrivals as in `packing`, list `default`, seeds 42..51 (--quick: 42 alone). Time is counted in arrivals: a lease
renews every 1,000 arrivals from its own arrival, until the last pod has arrived. At its renewal, and only then, a lease may
stay or move to another node where it fits; it never ends. Dropped pods stay dropped; a pod that fits somewhere is placed at
once.

Counts: GPUs allocated / 6,212 in % after all arrivals; moves of the whole run / leases admitted. Value: mean allocation.
Bar: >= 97.5 % with moves <= 3 % of the leases admitted.
Reference: the same run without moves; and, per seed, a bound that no moving lifts as long as what fits is placed:
`bound_percent`. A share leaves a part of its device that only smaller shares can use. The least number of devices that hold
the GPU requests of the first n arrivals (fractional cutting stock over shares; CPU, memory, nodes ignored) passes 6,212 at
some n: from there on something has been refused, and all that can still come in beside what is placed are shares no larger
than what the commonest large share leaves over. So: requests of the first n, plus all later shares of at most 190
thousandths. It is an argument, not a proof: a policy could refuse earlier, and so end with another mix; but a large share
fits wherever a whole device is free, so it can't be kept out in favour of requests that leave nothing over.
Checked: nothing over-used, counted anew at the end; each move was at a renewal of that lease; the count of moves is the
log's.
Control: moves at random (at 3 % of renewals, to any node with room) must not reach what ours reaches.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from benchmarks import openb
from benchmarks.harness import Control, Options, Result, judge, spread
from benchmarks.openb import Pod
from benchmarks.packing import Placed, allocated, mix_of
from tenure.decide.mix import Mix
from tenure.decide.moves import MAX_SHARE, moved
from tenure.decide.packing import choose_devices, shortage
from tenure.decide.rooms import Rooms
from tenure.resources import Capacity, DeviceShare

NAME = "packing_renewal"
BAR = "openb default, leases renewing every 1,000 arrivals: 97.5 % of the GPUs allocated, moves at most 3 % of the leases"
PERCENT = 97.5
RENEWS_EACH = 1_000
LEFT_OVER_MILLI = 190


@dataclass(slots=True)
class Outcome:
    """What one run gave."""

    percent: float = 0.0
    admitted: int = 0
    moves: list[tuple[int, int]] = field(default_factory=list)
    """(arrival at which, lease)."""


def run(options: Options) -> Result:
    """Place, with and without moves."""
    folder = options.need_data("traces", "openb")
    nodes, pods = openb.nodes_of(folder), openb.pods_of(folder, "default")
    mix, gpus = mix_of(Counter(pods)), openb.gpus_of(nodes)
    seeds = openb.SEEDS[:1] if options.quick else openb.SEEDS
    with_moves, without, bounds, arrived = [], [], [], []
    for seed in seeds:
        arrived = openb.arrivals(pods, gpus, seed)
        with_moves.append(replayed(nodes, arrived, mix, "ours"))
        without.append(replayed(nodes, arrived, mix, "none"))
        bounds.append(bound(arrived, gpus))
        one = with_moves[-1]
        print(f"seed {seed}: {one.percent:.2f} %, {len(one.moves)} moves, without {without[-1].percent:.2f} %", flush=True)
    by_chance = replayed(nodes, arrived, mix, "random", seed=seeds[-1])
    control = Control(
        name="moves at random",
        value=by_chance.percent,
        failed=by_chance.percent < with_moves[-1].percent,
        how=f"% of the GPUs with {len(by_chance.moves)} moves, seed {seeds[-1]}; ours {with_moves[-1].percent:.2f}",
    )
    percents = [one.percent for one in with_moves]
    value, moves = sum(percents) / len(percents), max(len(one.moves) / one.admitted for one in with_moves)
    holds, why = judge(value >= PERCENT and moves <= MAX_SHARE, control)
    highest = max(bounds)
    if not holds and highest < PERCENT:
        why = f"{why}: without refusing what fits, at most {highest:.2f} % can be reached on these arrivals (bound_percent)"
    return Result(
        value=round(value, 3),
        spread=round(spread(percents), 3),
        unit="% of the GPUs",
        holds=holds,
        why=why,
        reference={"without_moves_percent": round(sum(one.percent for one in without) / len(without), 3)},
        control=control,
        details={
            "moves_per_lease_percent": round(100 * moves, 3),
            "bound_percent": [round(one, 2) for one in bounds],
            "percent": [round(one, 2) for one in percents],
        },
    )


def replayed(nodes: Mapping[str, Capacity], arrived: Sequence[Pod], mix: Mix, way: str, *, seed: int = 0) -> Outcome:
    """Run all arrivals with moves by the decider (`ours`), none, or at random."""
    rooms, outcome, rng = Rooms(nodes, mix), Outcome(), random.Random(seed)
    held: list[tuple[Pod, str, tuple[DeviceShare, ...]]] = []
    began: list[int] = []
    due: deque[tuple[int, int]] = deque()
    for now, pod in enumerate(arrived):
        while due and due[0][0] <= now:
            at, lease = due.popleft()
            due.append((at + RENEWS_EACH, lease))
            own, node, devices = held[lease]
            choice = None
            if way == "ours":
                done, admitted = len(outcome.moves), len(held)
                choice = moved(rooms, node, own.envelope, devices, own.models, moves=done, admitted=admitted)
            elif way == "random" and rng.random() < MAX_SHARE and len(outcome.moves) + 1 <= MAX_SHARE * len(held):
                choice = _anywhere(rooms, nodes, own, rng)
            if choice is not None:
                rooms.give(node, own.envelope, devices)
                rooms.take(choice[0], own.envelope, choice[1])
                held[lease] = (own, *choice)
                outcome.moves.append((at, lease))
        found = rooms.choose(pod.envelope, pod.models)
        if found is not None:
            rooms.take(found[0], pod.envelope, found[1])
            held.append((pod, *found))
            began.append(now)
            due.append((now + RENEWS_EACH, len(held) - 1))
    assert all(at > began[lease] and (at - began[lease]) % RENEWS_EACH == 0 for at, lease in outcome.moves), "not at a renewal"
    placed: Placed = [(pod, node, tuple(share.index for share in devices)) for pod, node, devices in held]
    outcome.percent, outcome.admitted = allocated(nodes, placed), len(held)
    return outcome


def bound(arrived: Sequence[Pod], gpus: int) -> float:
    """Return the most that can be allocated in % when what fits is placed; see the definition above."""
    low, high = 0, len(arrived)
    patterns: dict[tuple[int, ...], list[np.ndarray]] = {}
    while high - low > 1:
        middle = (low + high) // 2
        if devices_needed(arrived[:middle], patterns) <= gpus:
            low = middle
        else:
            high = middle
    late = sum(pod.milli for pod in arrived[high:] if pod.milli <= LEFT_OVER_MILLI)
    return (sum(pod.milli for pod in arrived[:high]) + late) / gpus / 10


def devices_needed(pods: Sequence[Pod], patterns: dict[tuple[int, ...], list[np.ndarray]]) -> float:
    """Return the least number of devices for these, fractional. patterns: ways to cut one device, kept from call to call.

    Column generation (Gilmore & Gomory 1961): patterns are added until the knapsack over the prices finds none worth above 1.
    """
    shares = Counter(pod.milli for pod in pods if 0 < pod.milli < 1000)
    sizes = tuple(sorted(shares))
    wanted = np.array([shares[size] for size in sizes], float)
    known = patterns.setdefault(sizes, [np.eye(len(sizes))[i] * (1000 // size) for i, size in enumerate(sizes)])
    while True:
        matrix = np.array(known).T
        solved = linprog(np.ones(len(known)), A_ub=-matrix, b_ub=-wanted, method="highs")
        worth, pattern = _best_cut(sizes, -solved.ineqlin.marginals)
        if worth <= 1 + 1e-7:
            return float(solved.fun) + sum(pod.milli for pod in pods if pod.milli >= 1000) / 1000
        known.append(pattern)


def _best_cut(sizes: Sequence[int], prices: np.ndarray) -> tuple[float, np.ndarray]:
    best, last = np.zeros(1001), np.full(1001, -1)
    for room in range(1, 1001):
        best[room] = best[room - 1]
        for i, size in enumerate(sizes):
            if size <= room and best[room - size] + prices[i] > best[room] + 1e-12:
                best[room], last[room] = best[room - size] + prices[i], i
    pattern, room = np.zeros(len(sizes)), 1000
    while room > 0:
        if last[room] < 0:
            room -= 1
        else:
            pattern[last[room]] += 1
            room -= sizes[last[room]]
    return float(best[1000]), pattern


def _anywhere(
    rooms: Rooms, nodes: Mapping[str, Capacity], pod: Pod, rng: random.Random
) -> tuple[str, tuple[DeviceShare, ...]] | None:
    """Return a node with room, drawn at random, with the devices that best fit takes there."""
    for _ in range(50):
        node = rng.choice(list(nodes))
        if pod.models and nodes[node].gpus[0].model not in pod.models:
            continue
        room = rooms.room(node)
        if not shortage(room, pod.envelope) and (devices := choose_devices(room, pod.envelope)) is not None:
            return node, devices
    return None
