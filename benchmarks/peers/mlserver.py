"""MLServer: Python, HTTP in JSON (it refuses binary tensors) and gRPC."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, Order, free_ports

NAME = "mlserver"
ABOUT = "MLServer, one process for all models (parallel_workers 0), HTTP in JSON and gRPC"
_PROGRAMS = Path(__file__).parent / "programs"


def install(root: Path) -> Path:
    """See Peer."""
    return homes.make(root, NAME, packages=("mlserver==1.7.1", "onnxruntime>=1.30"))


def launch(home: Path, order: Order) -> Launch:
    """See ServerPeer."""
    http, grpc, metrics = free_ports(3)
    folder = order.folder / "mlserver"
    folder.mkdir(parents=True)
    settings = {"http_port": http, "grpc_port": grpc, "metrics_port": metrics, "host": "127.0.0.1", "parallel_workers": 0}
    settings |= {"debug": False, "grpc_max_message_length": 64 << 20, "metrics_dir": str(folder)}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name, file in order.models.items():
        (folder / name).mkdir()
        extra = {"file": str(file), "threads": order.threads}
        described = {"name": name, "implementation": "mlserver_runtime.Onnx", "parameters": {"extra": extra}}
        (folder / name / "model-settings.json").write_text(json.dumps(described))
    return Launch(
        argv=(str(homes.python(home).parent / "mlserver"), "start", str(folder)),
        env={"PYTHONPATH": str(_PROGRAMS)},
        addresses={"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"},
    )
