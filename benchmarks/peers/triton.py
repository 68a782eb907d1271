"""Triton Inference Server: the C++ core and python backend that the nvidia-pytriton wheel carries, without pytriton.

Started directly: the wheel's proxy costs five sixths of the requests. What has to be known: the backend's stub must be the
one for an interpreter whose libpython can be found, and must lie in the backend's folder; libraries of the wheel come by
LD_LIBRARY_PATH; the stub's interpreter is isolated, so the model adds its own site-packages.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from benchmarks.harness import Skip
from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, Order, free_ports

NAME = "triton"
ABOUT = "Triton core 2.51 with a python-backend model over ONNX Runtime"
_PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime>=1.30", "numpy")
_TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 6: "TYPE_INT32", 7: "TYPE_INT64", 10: "TYPE_FP16", 11: "TYPE_FP64"}


def install(root: Path) -> Path:
    """See Peer."""
    home = homes.make(root, NAME, packages=_PACKAGES)
    source = homes.site_packages(home) / "pytriton" / "tritonserver"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = source / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise Skip(f"the nvidia-pytriton wheel has no stub for Python {version}")
    backend = home / "backends" / "python"
    if not (backend / stub.name).exists():
        shutil.copytree(source / "backends" / "python", backend, dirs_exist_ok=True)
        shutil.copy2(stub, backend)
    return home


def launch(home: Path, order: Order) -> Launch:
    """See ServerPeer."""
    repository = order.folder / "models"
    for name, file in order.models.items():
        _model(repository / name, name, file, home, order)
    site = homes.site_packages(home)
    http, grpc = free_ports(2)
    libraries = [
        str(site / "nvidia_pytriton.libs"),
        sysconfig.get_config_var("LIBDIR") or "",
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return Launch(
        argv=(
            str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
            *("--model-repository", str(repository), "--backend-directory", str(home / "backends")),
            *("--http-address", "127.0.0.1", "--http-port", str(http), "--grpc-address", "127.0.0.1", "--grpc-port", str(grpc)),
            *("--allow-metrics", "false", "--exit-timeout-secs", "5"),
        ),
        env={"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))},
        addresses={"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"},
    )


def _model(folder: Path, name: str, file: Path, home: Path, order: Order) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    os.link(file, version / "model.onnx")
    text = (Path(__file__).parent / "programs" / "triton_model.py").read_text()
    filled = text.replace("@SITE@", str(homes.site_packages(home))).replace("@THREADS@", str(order.threads))
    (version / "model.py").write_text(filled)
    (folder / "config.pbtxt").write_text(_config(name, file, order.max_batch_rows))


def _config(name: str, file: Path, max_batch_rows: int) -> str:
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    tensors = [f'name: "{name}"', 'backend: "python"', f"max_batch_size: {max_batch_rows}", "dynamic_batching { }"]
    tensors += ["instance_group [ { count: 1 kind: KIND_CPU } ]"]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            dims = ", ".join(str(dim.dim_value or -1) for dim in tensor.shape.dim[1:])
            shape = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
            tensors.append(f'{kind} [ {{ name: "{value.name}" data_type: {_TYPES[tensor.elem_type]} {shape} }} ]')
    return "\n".join(tensors) + "\n"
