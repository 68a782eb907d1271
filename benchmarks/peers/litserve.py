"""LitServe: Python, HTTP with a JSON of one's own."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, Order, free_ports

NAME = "litserve"
ABOUT = "LitServe, one worker, base64 in JSON at /predict; one model per server"
_PROGRAM = Path(__file__).parent / "programs" / "litserve_server.py"


def install(root: Path) -> Path:
    """See Peer."""
    return homes.make(root, NAME, packages=("litserve==0.2.19", "onnxruntime>=1.30", "numpy"))


def launch(home: Path, order: Order) -> Launch:
    """See ServerPeer. Serves the first model alone. Raises ValueError when asked for more."""
    if len(order.models) != 1:
        raise ValueError(f"LitServe serves one model per server here; asked for {', '.join(order.models)}")
    (port,) = free_ports(1)
    return Launch(
        argv=(str(homes.python(home)), str(_PROGRAM), str(port), str(order.threads), *map(str, order.models.values())),
        addresses={"http": f"127.0.0.1:{port}"},
        ready_path="/health",
    )
