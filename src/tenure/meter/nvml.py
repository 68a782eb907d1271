"""What NVIDIA's library says of this machine's devices: which there are, who uses them, how much.

For: the inventory of a node, and who holds how much device memory. Not for: bounds (`runtimes.gpus`, `runtimes.mps`), ending
anybody (`agent.gpus`), one device as a whole over time (`sample.NvmlSampler`).

Instances of a device in MIG mode are listed in its place, each as a device of its own; none is ever made or removed here.
The library itself is loaded only where an NVIDIA device file lies (TENURE_NVML=1: without one too, for tests).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenure.errors import Unavailable
from tenure.resources import Gpu

MPS_PROGRAM = "nvidia-cuda-mps-control"
MPS_PLACES = ("/usr/local/nvidia/bin", "/usr/bin", "/usr/local/bin", "/opt/nvidia/bin")
"""Where drivers put it that is not on the PATH."""
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """One process that has a context on a device."""

    pid: int
    """As the driver numbers it: of the machine, whatever namespace we are in."""
    memory_bytes: int = 0
    """0 where the driver does not tell."""
    through_mps: bool = False
    """Whether it goes through CUDA's Multi-Process Service."""


def has_device_file() -> bool:
    """Return whether this machine looks as if it had an NVIDIA device, without loading anything."""
    return bool(os.environ.get("TENURE_NVML")) or any(Path(name).exists() for name in DEVICE_FILES)


def find_mps_control() -> str:
    """Return the full path of the program that runs CUDA's Multi-Process Service; empty when the driver came without it."""
    return shutil.which(MPS_PROGRAM) or shutil.which(MPS_PROGRAM, path=os.pathsep.join(MPS_PLACES)) or ""


class Nvml:
    """The library, loaded and initialized. Raises Unavailable with the reason when it cannot be."""

    def __init__(self) -> None:
        try:
            import pynvml  # late: only where there is a device
        except ImportError as error:
            raise Unavailable('the package nvidia-ml-py is not installed: "pip install nvidia-ml-py"') from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVIDIA's management library does not answer ({error}); nvidia-smi must work first") from error
        self._nvml: Any = pynvml
        self._since_us: dict[str, int] = {}

    def close(self) -> None:
        """Let go of the library."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def driver(self) -> str:
        """Return the driver's version; empty when it does not tell."""
        try:
            return _text(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError:
            return ""

    def gpus(self) -> tuple[Gpu, ...]:
        """Return the devices that programs can be given, in the driver's order: whole ones, and instances of divided ones."""
        found: list[Gpu] = []
        for handle in self._devices():
            instances = list(self._instances(handle))
            for each in instances if self._is_divided(handle) else [handle]:
                with contextlib.suppress(self._nvml.NVMLError):  # a device that has fallen off the bus is none
                    found.append(self._gpu(each, index=len(found), instance=each is not handle))
        return tuple(found)

    def processes(self, uuid: str) -> tuple[GpuProcess, ...]:
        """Return who has a context on a device or an instance. Raises Unavailable when the driver does not say."""
        found: dict[int, GpuProcess] = {}
        for names, through_mps in ((("Compute", "Graphics"), False), (("MPSCompute",), True)):
            for name in names:
                for entry in self._running(uuid, name):
                    known = found.get(int(entry.pid), GpuProcess(pid=int(entry.pid)))
                    found[known.pid] = GpuProcess(
                        pid=known.pid,
                        memory_bytes=max(known.memory_bytes, int(entry.usedGpuMemory or 0)),
                        through_mps=known.through_mps or through_mps,
                    )
        return tuple(found[pid] for pid in sorted(found))

    def busy(self, uuid: str) -> float | None:
        """Return the share of the driver's last interval in which a device ran something, 0..1; None when it does not say.

        It says nothing of instances of a divided device.
        """
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            return min(1.0, float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100.0)
        except self._nvml.NVMLError:
            return None

    def busy_by_process(self, uuid: str) -> Mapping[int, float] | None:
        """Return pid -> share of its multiprocessors' time, 0..1, since the last call for this device; None: it does not say.

        The driver samples a few times a second and keeps some seconds; of several samples the mean is given.
        """
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            samples = list(self._nvml.nvmlDeviceGetProcessUtilization(handle, self._since_us.get(uuid, 0)))
        except self._nvml.NVMLError as error:
            return {} if error.value == self._nvml.NVML_ERROR_NOT_FOUND else None  # no sample since then
        by_pid: dict[int, list[float]] = {}
        for sample in samples:
            self._since_us[uuid] = max(self._since_us.get(uuid, 0), int(sample.timeStamp))
            by_pid.setdefault(int(sample.pid), []).append(min(1.0, float(sample.smUtil) / 100.0))
        return {pid: sum(values) / len(values) for pid, values in by_pid.items() if pid}

    def _devices(self) -> Iterator[Any]:
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError:
            return
        for index in range(count):
            with contextlib.suppress(self._nvml.NVMLError):
                yield self._nvml.nvmlDeviceGetHandleByIndex(index)

    def _is_divided(self, handle: Any) -> bool:
        try:
            return int(self._nvml.nvmlDeviceGetMigMode(handle)[0]) == 1
        except self._nvml.NVMLError:
            return False  # a model that has no such mode

    def _instances(self, handle: Any) -> Iterator[Any]:
        if not self._is_divided(handle):
            return
        for index in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with contextlib.suppress(self._nvml.NVMLError):  # a place for an instance that is not there
                yield self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)

    def _gpu(self, handle: Any, *, index: int, instance: bool) -> Gpu:
        return Gpu(
            index=index,
            model=_text(self._nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(self._nvml.nvmlDeviceGetMemoryInfo(handle).total),
            uuid=_text(self._nvml.nvmlDeviceGetUUID(handle)),
            instance=instance,
        )

    def _running(self, uuid: str, name: str) -> list[Any]:
        """Return one of the driver's lists of processes; what a model has no list for is empty."""
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            listed = getattr(self._nvml, f"nvmlDeviceGet{name}RunningProcesses", None)
            return list(listed(handle)) if listed else []
        except self._nvml.NVMLError as error:
            if name != "Compute":
                return []
            raise Unavailable(f"the driver does not say who uses device {uuid}: {error}") from error


def gpus() -> tuple[Gpu, ...]:
    """Return this machine's NVIDIA devices; none where device file, driver, library or right is missing."""
    if not has_device_file():
        return ()
    try:
        nvml = Nvml()
    except Unavailable:
        return ()
    try:
        return nvml.gpus()
    finally:
        nvml.close()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
