"""A fake of nvidia-ml-py over the made-up machine of `device`: what `tenure.meter.nvml` asks, with the library's own words."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tests.gpu.fakes import device as made_up

NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9


class NVMLError(Exception):
    """As the library's: `value` is the code."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def nvmlInit() -> None:
    if not (made_up.folder() / "devices.json").exists():
        raise NVMLError(NVML_ERROR_DRIVER_NOT_LOADED)


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetDriverVersion() -> str:
    return "0.0-fake"


def nvmlDeviceGetCount() -> int:
    return len(made_up.devices())


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:
    return made_up.devices()[index]


def nvmlDeviceGetHandleByUUID(uuid: bytes) -> dict[str, Any]:
    for each in made_up.devices():
        for device in (each, *each.get("mig", [])):
            if device["uuid"] == uuid.decode():
                found: dict[str, Any] = device
                return found
    raise NVMLError(NVML_ERROR_NOT_FOUND)


def nvmlDeviceGetMigMode(handle: dict[str, Any]) -> tuple[int, int]:
    if "mig" not in handle:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return 1, 1


def nvmlDeviceGetMaxMigDeviceCount(handle: dict[str, Any]) -> int:
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(handle: dict[str, Any], index: int) -> dict[str, Any]:
    if index >= len(handle["mig"]):
        raise NVMLError(NVML_ERROR_NOT_FOUND)
    found: dict[str, Any] = handle["mig"][index]
    return found


def nvmlDeviceGetName(handle: dict[str, Any]) -> str:
    return str(handle["name"])


def nvmlDeviceGetUUID(handle: dict[str, Any]) -> str:
    return str(handle["uuid"])


def nvmlDeviceGetMemoryInfo(handle: dict[str, Any]) -> SimpleNamespace:
    used = sum(entry["memory_bytes"] for entry in made_up.processes(handle["uuid"]).values())
    return SimpleNamespace(total=handle["memory_bytes"], used=used)


def nvmlDeviceGetUtilizationRates(handle: dict[str, Any]) -> SimpleNamespace:
    if handle["uuid"].startswith("MIG-"):
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    busy = max([entry["busy"] for entry in made_up.processes(handle["uuid"]).values()], default=0.0)
    return SimpleNamespace(gpu=round(100 * busy))


def nvmlDeviceGetProcessUtilization(handle: dict[str, Any], since_us: int) -> list[SimpleNamespace]:
    found = made_up.processes(handle["uuid"])
    if handle["uuid"].startswith("MIG-"):
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    if not found:
        raise NVMLError(NVML_ERROR_NOT_FOUND)
    return [SimpleNamespace(pid=pid, smUtil=round(100 * entry["busy"]), timeStamp=since_us + 1) for pid, entry in found.items()]


def _running(handle: dict[str, Any], *, mps: bool) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=entry["memory_bytes"])
        for pid, entry in made_up.processes(handle["uuid"]).items()
        if entry["mps"] is mps
    ]


def nvmlDeviceGetComputeRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:
    return _running(handle, mps=False)


def nvmlDeviceGetGraphicsRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:
    return []


def nvmlDeviceGetMPSComputeRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:
    return _running(handle, mps=True)
