"""A lease of a part of a device, started by the process runtime as an agent does; what its program then may and may not."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenure.agent.gpus import GpuWatch, Holder
from tenure.meter.nvml import Nvml
from tenure.protocols import ExitKind, RuntimeHandle, StartSpec, SystemClock
from tenure.resources import DeviceShare, Envelope, Gpu
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.mps import Mps
from tenure.runtimes.process import ProcessRuntime

GIB = 1 << 30
STARTS_MAX_S = 20.0


def check(home: Path, gpu: Gpu, mps: Mps, root: Path) -> dict[str, Any]:
    """Return what was seen of a lease bounded by MPS and of one bounded by looking; `holds` when both were."""
    nvml = Nvml()
    try:
        part = _bounded(home / "part", gpu, mps, root, nvml)
        greedy = _looked_at(home / "greedy", gpu, root, nvml)
    finally:
        nvml.close()
    return {"holds": part.pop("good") and greedy.pop("good"), "through_mps": part, "looked_at": greedy}


def _bounded(home: Path, gpu: Gpu, mps: Mps, root: Path, nvml: Nvml) -> dict[str, Any]:
    with _running(home, gpu, mps, root, memory_bytes=2 * GIB, asks=(GIB, 2 * GIB)) as (runtime, handle, log):
        said = _first_line(log)
        holder = _holder(runtime, handle)
        uses, ends = GpuWatch(nvml, (gpu.uuid,), mps=mps).look([holder])
        told = json.loads((home / "work" / "lease.json").read_text())
        return {
            "good": '"got": [true, false]' in said
            and told["bounds"]["gpu_memory_bytes"] == "upper"
            and not ends
            and uses["part"].memory_bytes >= GIB,
            "said": said[-600:],
            "memory_bytes_metered": uses["part"].memory_bytes,
            "bounds": told["bounds"],
            "held_by": told["gpus"]["held_by"],
            "confinement": runtime.confinement(),
        }


def _looked_at(home: Path, gpu: Gpu, root: Path, nvml: Nvml) -> dict[str, Any]:
    with _running(home, gpu, None, root, memory_bytes=GIB, asks=(3 * GIB,)) as (runtime, handle, log):
        said = _first_line(log)
        watch, end_s = GpuWatch(nvml, (gpu.uuid,)), time.monotonic() + 10.0
        while (ended := runtime.wait(handle, 0.2)) is None and time.monotonic() < end_s:
            for over in watch.look([_holder(runtime, handle)])[1]:
                runtime.stop(handle, grace_s=0.0, fence=1, kind=over.kind, why=over.witness)
        return {
            "good": ended is not None and ended.kind is ExitKind.OUT_OF_MEMORY and "NVML" in ended.witness,
            "said": said[-600:],
            "ended": ended and [str(ended.kind), ended.witness],
        }


@contextlib.contextmanager
def _running(
    home: Path, gpu: Gpu, mps: Mps | None, root: Path, *, memory_bytes: int, asks: tuple[int, ...]
) -> Iterator[tuple[ProcessRuntime, RuntimeHandle, Path]]:
    clock = SystemClock()
    runtime = ProcessRuntime(home / "state", clock=clock, gpus=Gpus((gpu,), mps=mps))
    try:
        handle = runtime.start(
            StartSpec(
                lease_id="part",
                fence=1,
                attempt=1,
                argv=(sys.executable, "-m", "tests.gpu.work", "alloc", *map(str, asks), "--stay"),
                # The job's own word on its bounds does not count.
                env=_made_up() | {"PYTHONPATH": str(root), "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=64G"},
                workdir=str(root),
                worker_dir=str(home / "work"),
                log_path=str(home / "log"),
                envelope=Envelope(gpus=0.5, gpu_memory_bytes=memory_bytes, memory_bytes=8 * GIB, cpus=2),
                devices=(DeviceShare(index=gpu.index, fraction=0.5, memory_bytes=memory_bytes),),
                deadline_boot_s=clock.boot_s() + 60,
                boot_id=clock.boot_id(),
            )
        )
        try:
            yield runtime, handle, home / "log"
        finally:
            runtime.stop(handle, grace_s=0.0, fence=1)
            runtime.wait(handle, 10.0)
    finally:
        runtime.close()


def _made_up() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("TENURE_FAKE_")}


def _first_line(log: Path) -> str:
    end_s = time.monotonic() + STARTS_MAX_S
    while "\n" not in (said := log.read_text() if log.exists() else "") and time.monotonic() < end_s:
        time.sleep(0.05)
    return said


def _holder(runtime: ProcessRuntime, handle: RuntimeHandle) -> Holder:
    gpu = runtime.gpu(handle.lease_id)
    return Holder(
        handle=handle, pids=runtime.pids(handle), uuids=tuple(gpu["uuids"]), memory_bytes=gpu["memory_bytes"], mps=gpu["mps"]
    )
