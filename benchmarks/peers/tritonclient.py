"""Triton's Python client with perf_analyzer, which the 2.46 wheel still carries. It pins an older protobuf, hence a home apart.

The wheel's perf_analyzer wants libb64 and a CUDA runtime library to start at all, also where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import homes

NAME = "tritonclient"
ABOUT = "Triton's Python client (http, grpc, aio, shared memory) with ONNX Runtime beside it, and perf_analyzer"
_PACKAGES = ("tritonclient[http,grpc]==2.46.0", "nvidia-cuda-runtime-cu12", "numpy")


def install(root: Path) -> Path:
    """See Peer."""
    return homes.make(root, NAME, packages=_PACKAGES, debian=("libb64-0d",))


def command(home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """See ToolPeer: the interpreter that has the library."""
    return (str(homes.python(home)),), {}
