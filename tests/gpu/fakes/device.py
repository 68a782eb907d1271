"""A machine with NVIDIA devices, made up in a folder (TENURE_FAKE_GPU): what programs, the library and MPS share there.

    devices.json        [{"uuid", "name", "memory_bytes", "mig": [{"uuid", "name", "memory_bytes"}...]}...]
    processes/PID.json  {"uuid", "memory_bytes", "mps", "busy"}, written by who has a context; void once it is dead

Standard library only: the fake library and the fake control program are run where nothing of ours is on the path.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

CONTEXT_BYTES = 256 << 20
"""What a context takes by itself."""


def folder() -> Path:
    return Path(os.environ["TENURE_FAKE_GPU"])


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder() / "devices.json").read_text())
    return found


def make(place: Path, *found: dict[str, Any]) -> None:
    """Make up a machine with these devices."""
    (place / "processes").mkdir(parents=True, exist_ok=True)
    (place / "devices.json").write_text(json.dumps(list(found)))


def note(pid: int, **fields: Any) -> None:
    path = folder() / "processes" / f"{pid}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(fields))
    draft.rename(path)


def processes(uuid: str) -> dict[int, dict[str, Any]]:
    """Return pid -> note of all living processes with a context on a device."""
    found = {}
    for path in (folder() / "processes").glob("*.json"):
        pid = int(path.stem)
        if not is_alive(pid):
            path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(path.read_text())
            if entry["uuid"] == uuid:
                found[pid] = entry
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class FakeCuda:
    """What `tests.gpu.cuda.Cuda` is on a real device."""

    multiprocessors_of_a_device = 132

    def __init__(self) -> None:
        known = [device for each in devices() for device in (each.get("mig") or [each])]
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = known
        if wanted is not None:
            by_name = {device["uuid"]: device for device in known} | {str(i): device for i, device in enumerate(known)}
            seen = [by_name[name] for name in wanted.split(",") if name in by_name]
        if not seen:
            from tests.gpu.cuda import CudaError

            raise CudaError("cuInit", 100)
        self._device, self.visible = seen[0], len(seen)
        self._through_mps = self._reaches_mps()
        self._share = float(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")) / 100 if self._through_mps else 1.0
        limit = os.environ.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "") if self._through_mps else ""
        if os.environ.get("TENURE_FAKE_CUDA") == "unbounded":
            limit = ""
        self._limit_bytes = int(limit.removeprefix("0=").removesuffix("M")) << 20 if limit else self._device["memory_bytes"]
        self.multiprocessors = max(1, round(self.multiprocessors_of_a_device * self._share))
        self._held_bytes = CONTEXT_BYTES
        self._note(busy=0.0)

    def _reaches_mps(self) -> bool:
        pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
        try:
            return is_alive(int((Path(pipe) / "nvidia-cuda-mps-control.pid").read_text()))
        except (OSError, ValueError):
            return False

    def _note(self, *, busy: float) -> None:
        note(os.getpid(), uuid=self._device["uuid"], memory_bytes=self._held_bytes, mps=self._through_mps, busy=busy)

    def allocate(self, size_bytes: int) -> int | None:
        others = sum(entry["memory_bytes"] for pid, entry in processes(self._device["uuid"]).items() if pid != os.getpid())
        after = self._held_bytes + size_bytes
        if after > self._limit_bytes or after + others > self._device["memory_bytes"]:
            return None
        self._held_bytes = after
        self._note(busy=0.0)
        return 1 << 32

    def memory(self) -> tuple[int, int]:
        return self._limit_bytes - self._held_bytes, self._limit_bytes

    def burn(self, out: int, blocks: int, loops: int) -> None:
        self._note(busy=self._share)
        sharers = 1 if self._through_mps else max(1, len(processes(self._device["uuid"])))
        time.sleep(0.005 * sharers)

    def floats(self, place: int, count: int) -> list[float]:
        return [2.0] * count
