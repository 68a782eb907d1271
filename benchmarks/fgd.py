"""The published best policy, as a reference: FGD (Weng et al., USENIX ATC'23) after its artefact's Go source.

Typical shapes: the most frequent ones until they cover 95 % of the pods, CPU-only ones included, memory not looked at.
Score of a node: int(100 x sigmoid((F before - F after) / 1000)), F the mean over typical shapes of the idle GPU milli that each
cannot use. A share goes to the device that gives the best score, the first of equals; nodes that score the same to the smallest
name. Nothing here is used by Tenure itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.openb import Pod
from tenure.resources import Capacity

COVERED = 0.95
Array = NDArray[Any]


class Fgd:
    """The cluster and the policy. Nodes in the order of names; `choose` gives (node number, device numbers)."""

    def __init__(self, nodes: Mapping[str, Capacity], pods: Sequence[Pod]) -> None:
        self.names = sorted(nodes)
        capacities = [nodes[name] for name in self.names]
        self._models = [capacity.gpus[0].model if capacity.gpus else "" for capacity in capacities]
        self.cpus = np.array([round(capacity.cpus * 1000) for capacity in capacities])
        self.memory_bytes = np.array([capacity.memory_bytes for capacity in capacities])
        self.free = np.zeros((len(capacities), 8), int)
        for number, capacity in enumerate(capacities):
            self.free[number, : len(capacity.gpus)] = 1000
        self.shapes = {pod: number for number, pod in enumerate(dict.fromkeys(pods))}
        self._asked = [_asked(pod) for pod in self.shapes]
        self._pod_bytes = np.array([pod.envelope.memory_bytes for pod in self.shapes])
        self._pod_right = self._right([asked[3] for asked in self._asked])
        self._set_typical(pods)
        self._score = np.zeros((len(self.shapes), len(self.names)))
        self._device = np.zeros((len(self.shapes), len(self.names)), int)
        self._changed = list(range(len(self.names)))
        self._scored_at = [0] * len(self.shapes)  # shape -> how much of `_changed` its scores know

    def choose(self, pod: Pod, *, anew: bool = False) -> tuple[int, tuple[int, ...]] | None:
        """Return where a pod goes, None when it fits nowhere.

        anew: score every node for this pod, as a scheduler without memory does, instead of only those that have changed.
        """
        shape = self.shapes[pod]
        changed = range(len(self.names)) if anew else set(self._changed[self._scored_at[shape] :])
        self._rescore(np.array(sorted(changed), int), shape)
        self._scored_at[shape] = len(self._changed)
        node = int(self._score[shape].argmax())
        if self._score[shape, node] < 0:
            return None
        _, count, milli, _ = self._asked[shape]
        if not count:
            return node, ()
        if milli < 1000:
            return node, (int(self._device[shape, node]),)
        return node, tuple(int(device) for device in np.flatnonzero(self.free[node] == 1000)[:count])

    def fitting(self, pod: Pod) -> Array:
        """Return the nodes that have room for a pod, looked at anew."""
        shape = self.shapes[pod]
        cpus, count, milli, _ = self._asked[shape]
        fits = (self.cpus >= cpus) & (self.memory_bytes >= pod.envelope.memory_bytes)
        if count:
            fits &= self._pod_right[:, shape] & ((self.free >= milli).sum(axis=1) >= count)
        return np.flatnonzero(fits)

    def take(self, node: int, pod: Pod, devices: Sequence[int]) -> None:
        """Count a pod as placed."""
        self.cpus[node] -= self._asked[self.shapes[pod]][0]
        self.memory_bytes[node] -= pod.envelope.memory_bytes
        for device in devices:
            self.free[node, device] -= min(1000, pod.milli)
        self._changed.append(node)

    def _set_typical(self, pods: Sequence[Pod]) -> None:
        counted = Counter(_asked(pod) for pod in pods)
        order = sorted(counted, key=lambda asked: (counted[asked], asked[0], asked[2], asked[1], asked[3]), reverse=True)
        typical, covered = [], 0
        for asked in order:
            if covered >= COVERED * len(pods):
                break
            typical.append(asked)
            covered += counted[asked]
        self.typical = typical
        self._often = np.array([counted[asked] / covered for asked in typical])
        self._typical_cpus = np.array([asked[0] for asked in typical])
        self._typical_count = np.array([asked[1] for asked in typical])
        self._millis, self._milli_of = np.unique(np.array([asked[2] for asked in typical]), return_inverse=True)
        self._typical_right = self._right([asked[3] for asked in typical]) & (self._typical_count > 0)

    def _right(self, specs: Sequence[str]) -> Array:
        """Return per node and spec whether the node's model is one that the spec names."""
        kinds = {model: np.array([not spec or model in spec.split("|") for spec in specs]) for model in set(self._models)}
        return np.array([kinds[model] for model in self._models])

    def _fragmentation(self, nodes: Array, cpus: Array, free: Array) -> Array:
        enough = free[:, :, None] >= self._millis
        usable = (free[:, :, None] * enough).sum(axis=1)[:, self._milli_of]
        fits = enough.sum(axis=1)[:, self._milli_of] >= self._typical_count
        fits &= (cpus[:, None] >= self._typical_cpus) & self._typical_right[nodes]
        found: Array = free.sum(axis=1) * self._often.sum() - (fits * usable) @ self._often
        return found

    def _rescore(self, nodes: Array, shape: int) -> None:
        """Score each of the nodes for one shape."""
        cpus, count, milli, _ = self._asked[shape]
        self._score[shape, nodes] = -1
        nodes = nodes[(self.cpus[nodes] >= cpus) & (self.memory_bytes[nodes] >= self._pod_bytes[shape])]
        if count:
            nodes = nodes[self._pod_right[nodes, shape]]
        free = self.free[nodes]
        if not count:
            rows, devices, after = np.arange(len(nodes)), np.zeros(len(nodes), int), free
        elif milli < 1000:
            rows, devices = np.nonzero(free >= milli)
            after = free[rows]
            after[np.arange(len(rows)), devices] -= milli
        else:
            idle = free == 1000
            number = idle.cumsum(axis=1)
            rows = np.flatnonzero(number[:, -1] >= count)
            devices, after = np.zeros(len(rows), int), np.where(idle[rows] & (number[rows] <= count), 0, free[rows])
        if not len(rows):
            return
        before = self._fragmentation(nodes, self.cpus[nodes], free)[rows]
        fallen = before - self._fragmentation(nodes[rows], self.cpus[nodes[rows]] - cpus, after)
        score = np.floor(100 / (1 + np.exp(-fallen / 1000)))
        # Last written wins: the best score, of equals the first device.
        order = np.lexsort((-devices, score))
        self._score[shape, nodes[rows[order]]] = score[order]
        self._device[shape, nodes[rows[order]]] = devices[order]


def _asked(pod: Pod) -> tuple[int, int, int, str]:
    """Return CPU milli, devices, milli of each, models: what the artefact tells shapes apart by."""
    count = 0 if not pod.milli else max(1, pod.milli // 1000)
    return round(pod.envelope.cpus * 1000), count, min(1000, pod.milli), "|".join(pod.models)
