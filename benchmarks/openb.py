"""The openb trace (Alibaba gpu-v2023) as leases to place: node list, pod lists, and the arrivals of the published experiment.

Not here: a policy. Protocol: hkust-adsl/kubernetes-scheduler-simulator (FGD, USENIX ATC'23), `tune 1.3` with 10 seeds.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenure.resources import Capacity, Envelope, Gpu

LISTS = (
    *("default", "cpu050", "cpu100", "cpu200", "gpushare40", "gpushare60"),
    *("gpuspec10", "gpuspec20", "multigpu20", "multigpu30"),
)
SEEDS = tuple(range(42, 52))
ARRIVED = 1.3
"""GPUs requested by all arrivals, over the GPUs of the nodes."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Pod:
    """One request: what it asks for, and the GPU models that it may run on (empty: any)."""

    envelope: Envelope
    models: tuple[str, ...] = ()

    @property
    def milli(self) -> int:
        """GPUs asked for, in thousandths."""
        return round(self.envelope.gpus * 1000)


def nodes_of(folder: Path, *, permute: int | None = None) -> dict[str, Capacity]:
    """Return the GPU nodes by name, in the order of names.

    permute: a seed by which the names are dealt out anew; None leaves each node its own.
    """
    with (folder / "openb_node_list_gpu_node.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = sorted(row["sn"] for row in rows)
    if permute is not None:
        random.Random(permute).shuffle(names)
    found = {}
    for name, row in zip(names, sorted(rows, key=lambda row: row["sn"]), strict=True):
        gpus = tuple(Gpu(index=i, model=row["model"]) for i in range(int(row["gpu"])))
        found[name] = Capacity(cpus=int(row["cpu_milli"]) / 1000, memory_bytes=int(row["memory_mib"]) * MIB, gpus=gpus)
    return dict(sorted(found.items()))


def pods_of(folder: Path, name: str) -> list[Pod]:
    """Return the pods of one list, in the order of the file. Equal pods are the same object."""
    shapes: dict[tuple[str, ...], Pod] = {}
    pods = []
    with (folder / f"openb_pod_list_{name}.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            count, milli = int(row["num_gpu"]), int(row["gpu_milli"])
            spec = row.get("gpu_spec") or ""
            key = (row["cpu_milli"], row.get("memory_mib") or "0", str(count), str(milli), spec)
            if key not in shapes:
                envelope = Envelope(
                    cpus=int(key[0]) / 1000,
                    # The multi-GPU lists state no memory: the least that an envelope may have stands for none.
                    memory_bytes=max(1, int(key[1])) * MIB,
                    gpus=float(count) if milli == 1000 or not count else milli / 1000,
                    disk_bytes=0,
                )
                shapes[key] = Pod(envelope, tuple(sorted(spec.split("|"))) if spec else ())
            pods.append(shapes[key])
    return pods


def arrivals(pods: Sequence[Pod], gpus: int, seed: int) -> list[Pod]:
    """Return the pods in the order of arrival: the list, then draws with replacement up to `ARRIVED` x `gpus`, shuffled."""
    rng = random.Random(seed)
    found, milli = list(pods), sum(pod.milli for pod in pods)
    while True:
        pod = pods[rng.randrange(len(pods))]
        milli += pod.milli
        if milli > ARRIVED * gpus * 1000:
            break
        found.append(pod)
    rng.shuffle(found)
    return found


def gpus_of(nodes: Mapping[str, Capacity]) -> int:
    """Return the number of devices of all nodes."""
    return sum(len(capacity.gpus) for capacity in nodes.values())
