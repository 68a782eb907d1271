"""Fast choice of a node for one lease at a time, over many nodes: the state of the fleet and what each choice would strand.

A lease goes where it gains most by the fleet's rule (`rules`). By Tenure's own that is where it strands least (`mix`), less
`STEP` for each node further on in a fixed order: so nodes are opened one after the other, and among those already open the one
that suits decides. That order mixes kinds of nodes evenly.

Nodes with the same free room share a *state*, and a state's gain for a shape is worked out once, ever: a choice costs one new
state, not one look at each node. States that no node is in are forgotten when room for new ones is needed.
All amounts are whole numbers (MICRO, bytes), so giving back what was taken leaves what was there, exactly.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tenure.resources import Capacity, DeviceShare, Envelope

from .mix import Bools, Floats, Mix
from .packing import Packing, Room, shortage
from .rules import TENURE, Rule
from .shapes import MICRO, Shape, micro, shape_of

MAX_ROWS = 512
"""Shapes whose gains are remembered; the one asked for longest ago goes first."""
_FIRST_STATES = 1_024

State = tuple[int, int, int, tuple[tuple[int, int, int], ...]]
"""CPUs, memory, disk, and the devices (left, memory left, model) in order."""


class Rooms:
    """What is free on each node, and where a lease would go. Not here: whose turn it is, and what was granted to whom."""

    def __init__(self, capacities: Mapping[str, Capacity], mix: Mix, rule: Rule = TENURE) -> None:
        """Build a fleet with nothing on it. capacities: by node; a `disk_bytes` of 0 bounds no disk, as in `packing`."""
        self.rule = rule
        self.names = rule.order(capacities)
        self._rank = {name: rank for rank, name in enumerate(self.names)}
        self._capacities = [capacities[name] for name in self.names]
        self._models = sorted({gpu.model for capacity in self._capacities for gpu in capacity.gpus})
        model = {name: number for number, name in enumerate(self._models)}
        self._width = max([1, *(len(capacity.gpus) for capacity in self._capacities)])
        # Devices of a node, smallest memory first: that is how whole ones are handed out.
        self._gpus = [sorted(capacity.gpus, key=lambda gpu: (gpu.memory_bytes, gpu.index)) for capacity in self._capacities]
        self._left = [[[MICRO, gpu.memory_bytes, model[gpu.model]] for gpu in gpus] for gpus in self._gpus]
        self._beside = [
            [math.floor(c.cpus * MICRO + 1e-6), c.memory_bytes, c.disk_bytes or 1 << 62] for c in self._capacities
        ]  # fmt: skip
        self._of = [-1] * len(self.names)  # rank -> state
        self._clear_states(_FIRST_STATES)
        self.weigh(mix)
        for rank in range(len(self.names)):
            self._enter(rank)

    def weigh(self, mix: Mix) -> None:
        """Take another mix; what is on the nodes stays."""
        self._mix = mix
        self._allowed = mix.allowed(self._models) if self._models else np.ones((1, len(mix.shapes)), bool)
        self._rows: dict[Shape, _Row] = {}

    def choose(self, envelope: Envelope, models: Sequence[str] = ()) -> tuple[str, tuple[DeviceShare, ...]] | None:
        """Return node and device shares for a lease, None when it fits nowhere (`refusals` says why). Changes nothing."""
        if not self.names:
            return None
        row = self._row(shape_of(envelope, models))
        score = row.gain[: self._count] - self._cost[: self._count]
        best = int(score.argmax())
        if score[best] == -math.inf:
            return None
        if np.count_nonzero(score == score[best]) > 1:
            # Numbers of states depend on the past; the order of nodes does not.
            best = min(np.flatnonzero(score == score[best]).tolist(), key=lambda state: self._first[state][0])
        rank = self._first[best][0]
        return self.names[rank], self._shares(rank, envelope, models, int(row.slot[best]))

    def __contains__(self, node: object) -> bool:
        return node in self._rank

    def take(self, node: str, envelope: Envelope, devices: Sequence[DeviceShare]) -> None:
        """Count an envelope as held on a node, without checking. Raises KeyError for an unknown node."""
        self._change(self._rank[node], envelope, devices, -1)

    def give(self, node: str, envelope: Envelope, devices: Sequence[DeviceShare]) -> None:
        """Count an envelope as held no longer."""
        self._change(self._rank[node], envelope, devices, 1)

    def choose_all(self, envelopes: Sequence[Envelope], models: Sequence[str] = ()) -> Packing | None:
        """Return where each lease of a gang goes, the largest chosen first; None when one finds no room. Changes nothing."""
        order = sorted(range(len(envelopes)), key=lambda i: (-envelopes[i].gpus, -envelopes[i].cpus, i))
        placed: dict[int, tuple[str, tuple[DeviceShare, ...]]] = {}
        for i in order:
            choice = self.choose(envelopes[i], models)
            if choice is None:
                break
            self.take(choice[0], envelopes[i], choice[1])
            placed[i] = choice
        for i, (node, devices) in placed.items():
            self.give(node, envelopes[i], devices)
        return tuple(placed[i] for i in range(len(envelopes))) if len(placed) == len(envelopes) else None

    def gain(self, node: str, envelope: Envelope, models: Sequence[str] = ()) -> float:
        """Return what placing a lease on this node would gain, in devices (its place in the order counts); -inf: no room."""
        state = self._of[self._rank[node]]
        return (float(self._row(shape_of(envelope, models)).gain[state]) - self.rule.step * self._rank[node]) / MICRO**2

    def room(self, node: str) -> Room:
        """Return what is taken of a node, in the form of `packing`."""
        rank = self._rank[node]
        capacity, (cpus, memory_bytes, disk_bytes) = self._capacities[rank], self._beside[rank]
        devices = {
            gpu.index: (1 - left[0] / MICRO, gpu.memory_bytes - left[1])
            for gpu, left in zip(self._gpus[rank], self._left[rank], strict=True)
            if left[0] < MICRO
        }
        held_disk_bytes = (capacity.disk_bytes or 1 << 62) - disk_bytes
        return Room(
            capacity, capacity.cpus - cpus / MICRO, capacity.memory_bytes - memory_bytes, held_disk_bytes, devices
        )  # fmt: skip

    def refusals(self, envelope: Envelope, models: Sequence[str] = ()) -> dict[str, str]:
        """Return why each node that has no room for a lease has none: node -> reason."""
        reasons = {}
        for name, capacity in zip(self.names, self._capacities, strict=True):
            room = self.room(name)
            text = shortage(room, envelope)
            if not text and envelope.gpus and models:
                room.capacity = replace(capacity, gpus=tuple(gpu for gpu in capacity.gpus if gpu.model in models))
                if shortage(room, envelope):
                    there = ", ".join(sorted({gpu.model for gpu in capacity.gpus}))
                    text = f"needs a gpu of model {' or '.join(models)}; node has {there}"
            if text:
                reasons[name] = text
        return reasons

    def snapshot(self) -> dict[str, State]:
        """Return what is free on each node, in a form that compares."""
        return {name: self._key(rank) for name, rank in self._rank.items()}

    # --- nodes ---

    def _change(self, rank: int, envelope: Envelope, devices: Sequence[DeviceShare], sign: int) -> None:
        beside = self._beside[rank]
        beside[0] += sign * micro(envelope.cpus)
        beside[1] += sign * envelope.memory_bytes
        beside[2] += sign * envelope.disk_bytes
        if devices:
            place = {gpu.index: number for number, gpu in enumerate(self._gpus[rank])}
            for share in devices:
                if share.index not in place:
                    continue  # held from when the node had more devices
                left = self._left[rank][place[share.index]]
                left[0] += sign * micro(share.fraction)
                left[1] += sign * share.memory_bytes
        self._leave(rank)
        self._enter(rank)

    def _shares(self, rank: int, envelope: Envelope, models: Sequence[str], slot: int) -> tuple[DeviceShare, ...]:
        if not envelope.gpus:
            return ()
        gpus, lefts = self._gpus[rank], self._left[rank]
        if envelope.gpus < 1:
            wanted = self._key(rank)[3][slot]
            number = next(number for number, left in enumerate(lefts) if tuple(left) == wanted)
            return (DeviceShare(index=gpus[number].index, fraction=envelope.gpus, memory_bytes=envelope.gpu_memory_bytes),)
        whole = [
            DeviceShare(index=gpu.index, fraction=1.0, memory_bytes=gpu.memory_bytes)
            for gpu, left in zip(gpus, lefts, strict=True)
            if left[0] == MICRO and left[1] >= envelope.gpu_memory_bytes and (not models or gpu.model in models)
        ]
        return tuple(whole[: round(envelope.gpus)])

    def _key(self, rank: int) -> State:
        cpus, memory_bytes, disk_bytes = self._beside[rank]
        return (cpus, memory_bytes, disk_bytes, tuple(sorted([(left[0], left[1], left[2]) for left in self._left[rank]])))

    # --- states ---

    def _clear_states(self, size: int) -> None:
        self._count = 0
        self._numbers: dict[State, int] = {}
        self._keys: list[State] = []
        self._first: list[list[int]] = []  # state -> heap of ranks that are, or were, in it
        self._queued: list[set[int]] = []  # what the heap holds
        self._cost = np.full(size, math.inf)  # step x the lowest rank in the state; inf when none is
        self._cpus, self._memory_bytes, self._disk_bytes = np.zeros(size), np.zeros(size), np.zeros(size)
        self._free = np.zeros((size, self._width))
        self._free_bytes = np.full((size, self._width), -1.0)
        self._model = np.full((size, self._width), 0)
        self._rows = {}

    def _enter(self, rank: int) -> None:
        key = self._key(rank)
        state = self._numbers.get(key)
        if state is None:
            state = self._add(key)
        self._of[rank] = state
        if rank not in self._queued[state]:
            self._queued[state].add(rank)
            heapq.heappush(self._first[state], rank)
        self._cost[state] = self.rule.step * self._first[state][0]

    def _leave(self, rank: int) -> None:
        state = self._of[rank]
        self._of[rank] = -1
        heap = self._first[state]
        while heap and self._of[heap[0]] != state:
            self._queued[state].discard(heapq.heappop(heap))
        self._cost[state] = self.rule.step * heap[0] if heap else math.inf

    def _add(self, key: State) -> int:
        if self._count == len(self._cost):
            self._make_room()
        state = self._count
        self._count += 1
        self._numbers[key] = state
        self._keys.append(key)
        self._first.append([])
        self._queued.append(set())
        self._cpus[state], self._memory_bytes[state], self._disk_bytes[state] = key[:3]
        for number, (left, left_bytes, model) in enumerate(key[3]):
            self._free[state, number], self._free_bytes[state, number], self._model[state, number] = left, left_bytes, model
        return state

    def _make_room(self) -> None:
        """Forget the states that no node is in; double the arrays when that would not free half of them."""
        kept = np.flatnonzero(self._cost[: self._count] < math.inf)
        old, rows = self.__dict__.copy(), self._rows
        size = len(self._cost) * (2 if 2 * len(kept) > self._count else 1)
        self._clear_states(size)
        count = len(kept)
        for name in ("_cost", "_cpus", "_memory_bytes", "_disk_bytes", "_free", "_free_bytes", "_model"):
            getattr(self, name)[:count] = old[name][kept]
        number = dict(zip(kept.tolist(), range(count), strict=True))
        self._count = count
        self._keys = [old["_keys"][state] for state in number]
        self._first = [old["_first"][state] for state in number]
        self._queued = [old["_queued"][state] for state in number]
        self._numbers = {key: state for state, key in enumerate(self._keys)}
        self._of = [number.get(state, -1) for state in self._of]
        self._rows = {shape: row.kept(kept, size) for shape, row in rows.items()}

    # --- gains ---

    def _row(self, shape: Shape) -> _Row:
        """Return the row of a shape, with a gain for each state that a node is in."""
        row = self._rows.pop(shape, None)
        if row is None:
            row = _Row(len(self._cost))
            if len(self._rows) >= MAX_ROWS:
                del self._rows[next(iter(self._rows))]
        self._rows[shape] = row
        count = self._count
        missing = np.flatnonzero((self._cost[:count] < math.inf) & ~row.known[:count])
        if len(missing):
            row.known[missing] = True
            self._fill(row, shape, missing)
        return row

    def _fill(self, row: _Row, shape: Shape, states: NDArray[np.intp]) -> None:
        cpus, memory_bytes = micro(shape.cpus), shape.memory_bytes
        states = states[
            (self._cpus[states] >= cpus)
            & (self._memory_bytes[states] >= memory_bytes)
            & (self._disk_bytes[states] >= shape.disk_bytes)
        ]
        free = self._free[states]
        if not shape.gpus:
            chosen, slots, after = np.arange(len(states)), np.zeros(len(states), int), free
        else:
            usable = self._usable(shape, states)
            part, whole = micro(shape.gpus), round(shape.gpus)
            chosen, slots, after = _part(free, usable, part) if shape.gpus < 1 else _whole(free, usable, whole)
        if not len(chosen):
            return
        own = states[chosen]
        # One call for both sides: what is free before, then after each candidate.
        gains = self.rule.gains(
            self._mix,
            np.concatenate([self._cpus[states], self._cpus[own] - cpus]),
            np.concatenate([self._memory_bytes[states], self._memory_bytes[own] - memory_bytes]),
            np.concatenate([free, after]),
            # A node's devices are taken to be of one model here; where a lease *fits* looks at each device.
            self._allowed[self._model[np.concatenate([states, own]), 0]],
            chosen,
        )
        if 0 < shape.gpus < 1:
            # Candidates come state by state, devices in order: keep the first best of each state.
            begins = np.flatnonzero(np.concatenate([[True], chosen[1:] != chosen[:-1]]))
            best = np.repeat(np.maximum.reduceat(gains, begins), np.diff(begins, append=len(chosen)))
            hits = np.flatnonzero(gains == best)[::-1]
            own, gains, slots = own[hits], gains[hits], slots[hits]
        row.gain[own] = gains  # of equals the last written, which is the first device, stays
        row.slot[own] = slots

    def _usable(self, shape: Shape, states: NDArray[np.intp]) -> Bools:
        usable: Bools = self._free_bytes[states] >= max(0, shape.gpu_memory_bytes)
        if shape.models:
            right = np.array([model in shape.models for model in self._models], bool)
            usable &= right[self._model[states]]
        return usable


class _Row:
    """Of one shape, by state: the gain (-inf: no room), the device that a share goes to, whether both are known."""

    __slots__ = ("gain", "known", "slot")

    def __init__(self, size: int) -> None:
        self.gain = np.full(size, -math.inf)
        self.slot = np.zeros(size, np.int16)
        self.known = np.zeros(size, bool)

    def kept(self, states: NDArray[np.intp], size: int) -> _Row:
        row = _Row(size)
        for name in self.__slots__:
            getattr(row, name)[: len(states)] = getattr(self, name)[states]
        return row


def _part(free: Floats, usable: Bools, part: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Return (node, device, devices after it) for each device with `part` left; of equal ones in a row only the first."""
    fits = usable & (free >= part)
    fits[:, 1:] &= (free[:, 1:] != free[:, :-1]) | ~fits[:, :-1]
    nodes, slots = np.nonzero(fits)
    after = free[nodes]
    after[np.arange(len(nodes)), slots] -= part
    return nodes, slots, after


def _whole(free: Floats, usable: Bools, gpus: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Return (node, 0, devices after it) for each node with this many devices entirely free; the first ones are taken."""
    idle = usable & (free == MICRO)
    number = idle.cumsum(axis=1)
    nodes = np.flatnonzero(number[:, -1] >= gpus)
    after = np.where(idle[nodes] & (number[nodes] <= gpus), 0.0, free[nodes])
    return nodes, np.zeros(len(nodes), int), after
