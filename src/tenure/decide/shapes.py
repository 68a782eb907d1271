"""What of a request decides where it fits, and in which order nodes are opened: the light half of `mix`, without NumPy.

A broker whose fleet has no GPUs never loads the other half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenure.resources import Capacity, Envelope

MICRO = 1_000_000
"""Parts of one device or core. Whole numbers below 2**53 add up exactly in float64, whatever the order."""
STEP = MICRO * MICRO // 2_000
"""What opening the next node in the order costs: half a thousandth of a device. 0.3 to 1.5 give the same on openb."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a request decides where it fits."""

    cpus: float
    memory_bytes: int
    gpus: float
    gpu_memory_bytes: int = 0
    disk_bytes: int = 0
    models: tuple[str, ...] = ()
    """GPU models it may run on; empty: any."""


def shape_of(envelope: Envelope, models: Sequence[str] = ()) -> Shape:
    """Return the shape of an envelope."""
    return Shape(
        envelope.cpus, envelope.memory_bytes, envelope.gpus, envelope.gpu_memory_bytes, envelope.disk_bytes, tuple(models)
    )  # fmt: skip


def micro(amount: float) -> int:
    """Return cores, or parts of a device, in MICRO, rounded up: what is taken never adds up to more than there is."""
    return math.ceil(amount * MICRO - 1e-6)


def node_order(capacities: Mapping[str, Capacity]) -> list[str]:
    """Return the names in the order in which nodes are opened: each kind spread evenly over it, names deciding within a kind.

    A kind that came first or last as a whole would be gone, or untouched, when the leases that suit it come: that cost 0.2 to
    2 points on openb. Any mixed order does as well as any other, so names do not matter.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name in sorted(capacities):
        capacity = capacities[name]
        models = tuple(sorted((gpu.model, gpu.memory_bytes) for gpu in capacity.gpus))
        kinds.setdefault((models, capacity.cpus, capacity.memory_bytes, capacity.disk_bytes), []).append(name)
    spread = [
        ((2 * number + 1) / (2 * len(names)), kind, name) for kind, names in kinds.items() for number, name in enumerate(names)
    ]
    return [name for _, _, name in sorted(spread, key=lambda item: (item[0], repr(item[1]), item[2]))]
