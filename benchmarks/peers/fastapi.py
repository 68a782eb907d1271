"""The yardstick: a plain FastAPI server that takes and gives raw bytes. No protocol, no batching, no bounds."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, Order, free_ports

NAME = "fastapi"
ABOUT = "a plain FastAPI server with raw bytes, one worker: the yardstick"
_PROGRAM = Path(__file__).parent / "programs" / "fastapi_server.py"


def install(root: Path) -> Path:
    """See Peer."""
    packages = ("fastapi==0.165.0", "uvicorn==0.54.0", "uvloop", "httptools", "numpy", "onnxruntime>=1.30")
    return homes.make(root, NAME, packages=packages)


def launch(home: Path, order: Order) -> Launch:
    """See ServerPeer. A model answers at /NAME."""
    (port,) = free_ports(1)
    models = (f"{name}={file}" for name, file in order.models.items())
    return Launch(
        argv=(str(homes.python(home)), str(_PROGRAM), str(port), str(order.threads), *models),
        addresses={"http": f"127.0.0.1:{port}"},
        ready_path="/ready",
    )
