"""KServe's Python server: the best of the Python gRPC servers measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, Order, free_ports

NAME = "kserve"
ABOUT = "KServe's Python server, one worker, HTTP and gRPC"
_PROGRAM = Path(__file__).parent / "programs" / "kserve_server.py"


def install(root: Path) -> Path:
    """See Peer."""
    return homes.make(root, NAME, packages=("kserve==0.21.0", "onnxruntime>=1.30"))


def launch(home: Path, order: Order) -> Launch:
    """See ServerPeer."""
    http, grpc = free_ports(2)
    models = (f"{name}={file}" for name, file in order.models.items())
    return Launch(
        argv=(str(homes.python(home)), str(_PROGRAM), str(http), str(grpc), str(order.threads), "01"[order.quiet], *models),
        addresses={"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"},
    )
