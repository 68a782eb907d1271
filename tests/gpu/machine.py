"""A made-up machine with NVIDIA devices for a test: what it is and the environment in which programs find it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.fakes import device

FAKES = Path(__file__).parent / "fakes"
ROOT = FAKES.parents[2]
GIB = 1 << 30


def uuid(number: int) -> str:
    return f"GPU-0000000{number}-1111-2222-3333-444444444444"


def whole(number: int = 0, *, memory_bytes: int = 16 * GIB) -> dict[str, Any]:
    return {"uuid": uuid(number), "name": "NVIDIA Fake", "memory_bytes": memory_bytes}


def divided(number: int = 0, *, instances: int = 2) -> dict[str, Any]:
    parts = [
        {"uuid": f"MIG-{number}{i}", "name": "NVIDIA Fake MIG 1g.10gb", "memory_bytes": 10 * GIB} for i in range(instances)
    ]
    return whole(number) | {"mig": parts}


class MadeUp:
    """The machine. `close` ends what its daemons left."""

    def __init__(self, *devices: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tg-"))
        device.make(self.folder, *devices)
        self.program = str(FAKES / "nvidia-cuda-mps-control")

    def environment(self, **more: str) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        return found | {
            "TENURE_FAKE_GPU": str(self.folder),
            "TENURE_NVML": "1",
            "PATH": os.pathsep.join([str(FAKES), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT / "src"), str(ROOT)]),
            **more,
        }

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
