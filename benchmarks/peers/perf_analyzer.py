"""perf_analyzer: the load generator of Triton's authors. It lives in tritonclient's home, whose wheel carries it."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers import homes, tritonclient

NAME = "perf_analyzer"
ABOUT = "Triton's load generator, from the tritonclient 2.46 wheel"


def install(root: Path) -> Path:
    """See Peer."""
    return tritonclient.install(root)


def command(home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """See ToolPeer."""
    cuda = homes.site_packages(home) / "nvidia" / "cuda_runtime" / "lib"
    libraries = os.pathsep.join((homes.debian_libraries(home), str(cuda)))
    return (str(home / "venv" / "bin" / "perf_analyzer"),), {"LD_LIBRARY_PATH": libraries}
