"""How far a lease's GPUs are held: the bound words of its share and its memory, and one sentence for people.

| the lease has | share | device memory |
| --- | --- | --- |
| whole devices or instances, process | upper: who uses another device is ended at the next look | exact: all of it |
| whole devices or instances, container | exact: no other device is there | exact: all of it |
| a part, CUDA MPS | advisory: a program that changes its own environment takes more | upper: refused past it, and ended |
| a part, polled | advisory: nothing bounds it | upper: ended past it at the next look |
| declared devices | advisory | advisory |

Pure: the runtimes write it into the lease's file, the commands show it. Not for: who gets which device (`decide`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenure.resources import Bound, DeviceShare, Gpu, show_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHold:
    """How a lease's devices are held."""

    share: Bound
    memory: Bound
    means: str
    """One sentence."""

    @property
    def bounds(self) -> Mapping[str, Bound]:
        """Envelope field -> how it is held."""
        return {"gpus": self.share, "gpu_memory_bytes": self.memory}


def hold(gpus: Sequence[Gpu], devices: Sequence[DeviceShare], *, runtime: str) -> GpuHold | None:
    """Return how a lease's shares of a node's devices are held; None for a lease without.

    A share of a device that the node does not list is declared only.
    """
    if not devices:
        return None
    known = {gpu.index: gpu for gpu in gpus}
    held = [known.get(share.index, Gpu(index=share.index, parts="declared")) for share in devices]
    if any(not gpu.uuid or gpu.parts in ("", "declared") for gpu in held):
        return GpuHold(share="advisory", memory="advisory", means="declared only: nothing bounds it")
    if devices[0].fraction >= 1:
        what = "whole instances of a divided GPU (MIG)" if any(gpu.instance for gpu in held) else "whole devices"
        if runtime == "container":
            return GpuHold(share="exact", memory="exact", means=f"{what}; the container has no other")
        return GpuHold(share="upper", memory="exact", means=f"{what}; who uses another is ended within about a second")
    memory = show_bytes(memory_bound(held[0], devices[0]))
    if held[0].parts == "mps" and runtime == "process":
        return GpuHold(
            share="advisory",
            memory="upper",
            means=f"CUDA MPS: {devices[0].fraction:.3g} of the multiprocessors, unless it changes its own environment; "
            f"past {memory} an allocation is refused, and who goes around MPS is ended within about a second",
        )
    return GpuHold(
        share="advisory",
        memory="upper",
        means=f"polled: who holds more than {memory} of the device's memory is ended within about a second; "
        "nothing bounds the share of its multiprocessors",
    )


def memory_bound(gpu: Gpu, share: DeviceShare) -> int:
    """Return what a share may hold of its device's memory in bytes: what it asked for, else the same part as of the device."""
    return share.memory_bytes or int(gpu.memory_bytes * min(1.0, share.fraction))
