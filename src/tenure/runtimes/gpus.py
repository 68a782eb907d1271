"""A node's GPUs as its runtimes hand them out: what a lease's programs are told, and how far that holds.

Devices are named by the driver's uuid: CUDA counts the fastest first, the driver by place, so that an index may mean two
devices. The variables come after the job's own, which cannot undo them. A lease without devices is told that there are none.
Not for: which share a lease gets (`decide`), watching who holds what (`agent.gpus`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from tenure.devices import GpuHold, hold, memory_bound
from tenure.errors import Unavailable, Unsupported
from tenure.meter.nvml import MPS_PROGRAM
from tenure.resources import DeviceShare, Gpu
from tenure.runtimes import mps
from tenure.runtimes.mps import Mps


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuGrant:
    """A lease's devices on this machine, plain enough to be kept in a file."""

    uuids: tuple[str, ...] = ()
    """In the order of the shares; empty for declared devices."""
    memory_bytes: int = 0
    """What its programs together may hold of each device."""
    mps: Mapping[str, str] | None = None
    """Where the daemon is found that its part goes through (`Mps.to_plan`); None for one that goes through none."""
    environment: Mapping[str, str]
    hold: GpuHold | None = None

    def to_plan(self) -> dict[str, Any]:
        """Return it as plain data, without the environment."""
        mps = dict(self.mps) if self.mps else None
        found = {"uuids": list(self.uuids), "memory_bytes": self.memory_bytes, "mps": mps}
        return found if self.hold is None else found | {"bounds": dict(self.hold.bounds), "means": self.hold.means}


class Gpus:
    """The devices of one node. mps: what parts of them are held by; None: by looking only, or not at all."""

    def __init__(self, gpus: Sequence[Gpu] = (), *, mps: Mps | None = None, watched: bool = True) -> None:
        """watched: whether somebody looks at who holds what (`agent.gpus`); without, a part is declared only."""
        self._mps = mps
        self._why_no_mps = "" if mps else f"the driver came without {MPS_PROGRAM}"
        with ThreadPoolExecutor(max(1, len(gpus))) as pool:  # each may wait for its daemon
            self._gpus = tuple(pool.map(lambda gpu: self._with_parts(gpu, watched), gpus))

    def _with_parts(self, gpu: Gpu, watched: bool) -> Gpu:
        if not gpu.uuid or not watched:
            return replace(gpu, parts="declared")
        if self._mps is None or gpu.instance:
            return replace(gpu, parts="polled")
        try:
            self._mps.ensure(gpu.uuid)
        except Unavailable as error:
            self._why_no_mps = str(error)
            return replace(gpu, parts="polled")
        return replace(gpu, parts="mps")

    @property
    def all(self) -> tuple[Gpu, ...]:
        """The devices, each with how parts of it are held."""
        return self._gpus

    @property
    def mps(self) -> Mps | None:
        """What holds parts of devices."""
        return self._mps

    def close(self) -> None:
        """End the daemons, and what still goes through them."""
        for gpu in self._gpus:
            if gpu.parts == "mps" and self._mps is not None:
                self._mps.quit(gpu.uuid)

    def describe(self) -> str:
        """Return how devices are held, for people; empty without any."""
        if not self._gpus:
            return ""
        kinds = {gpu.parts for gpu in self._gpus if not gpu.instance}
        said = []
        if "mps" in kinds:
            said.append("parts by CUDA MPS")
        if "polled" in kinds:
            said.append(f"parts by looking at device memory ({self._why_no_mps})")
        if "declared" in kinds:
            said.append("declared only")
        if any(gpu.instance for gpu in self._gpus):
            said.append("instances whole (MIG)")
        return f"gpus: {', '.join(said)}"

    def grant(self, devices: Sequence[DeviceShare], *, runtime: str, uid: int | None = None) -> GpuGrant:
        """Return what a lease with these shares is told. uid: as whom it runs; None: as we do.

        Raises Unsupported for a device that is not here, Unavailable when its MPS daemon does not answer.
        """
        if not devices:
            return GpuGrant(environment={})
        known = {gpu.index: gpu for gpu in self._gpus}
        if missing := [share.index for share in devices if share.index not in known]:
            here = ", ".join(str(index) for index in sorted(known)) or "none"
            raise Unsupported("devices", f"gpu {missing[0]} is not on this node, which has {here}")
        held = [known[share.index] for share in devices]
        if any(gpu.parts == "declared" for gpu in held):
            shown = ",".join(gpu.uuid or str(gpu.index) for gpu in held)
            return GpuGrant(environment={"CUDA_VISIBLE_DEVICES": shown}, hold=hold(self._gpus, devices, runtime=runtime))
        gpu, share = held[0], devices[0]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(each.uuid for each in held)}
        uuids, memory_bytes = tuple(each.uuid for each in held), memory_bound(gpu, share)
        if share.fraction >= 1 or gpu.parts != "mps" or runtime != "process" or not self._serves(gpu.uuid, uid):
            shown_as = self._gpus if gpu.parts != "mps" else tuple(replace(each, parts="polled") for each in self._gpus)
            found = hold(shown_as if runtime == "process" else self._gpus, devices, runtime=runtime)
            return GpuGrant(uuids=uuids, memory_bytes=memory_bytes, environment=environment, hold=found)
        assert self._mps is not None
        environment |= mps.client_environment(self._mps.ensure(gpu.uuid), fraction=share.fraction, memory_bytes=memory_bytes)
        found = hold(self._gpus, devices, runtime=runtime)
        return GpuGrant(uuids=uuids, memory_bytes=memory_bytes, mps=self._mps.to_plan(), environment=environment, hold=found)

    def _serves(self, uuid: str, uid: int | None) -> bool:
        """Return whether a device's daemon lets clients of this user in beside others'."""
        if self._mps is None:
            return False
        return uid in (None, os.geteuid()) or self._mps.serves_many_users(uuid)
