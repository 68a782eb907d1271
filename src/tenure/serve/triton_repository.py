"""A Triton repository of the same models, and the command that serves it: for a machine that has Triton and a GPU.

    DIR/NAME/config.pbtxt        what the model takes and gives, batching, instances
    DIR/NAME/VERSION/model.onnx  ONNX models: Triton's own ONNX Runtime backend
    DIR/NAME/VERSION/model.py    all others: Triton's python backend, which runs the file by the engines of this package
    DIR/run.sh                   the command

The repository is served here, too (`tenure serve DIR`) where it holds ONNX files. Nothing is started or downloaded. What is
not written: ensembles, sequences, TensorRT plans (Triton makes them of ONNX itself where the config asks for it).
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tenure.errors import Conflict, SpecError
from tenure.serve.engines import load_engine
from tenure.serve.modelconfig import model_config
from tenure.serve.plane import ModelOptions
from tenure.serve.repository import ModelFiles
from tenure.serve.tensors import ModelMetadata

DEFAULT_ROWS = 32
"""Rows of one run where nobody chose: a GPU wants more than a core does."""
OWN_BACKENDS: Mapping[str, str] = {".onnx": "onnxruntime"}
"""Endings that a backend of Triton's own runs."""
PYTHON_PATH = "python_path"
"""Parameter of a python-backend model: a folder to import from, where its interpreter doesn't find this package by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonModel:
    """One model written."""

    name: str
    backend: str
    max_batch_rows: int
    """0: the model's shape takes no batch."""
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonRepository:
    """What was written, and how it is served."""

    folder: Path
    models: tuple[TritonModel, ...]
    container: str
    """Command line with Docker; the image is in $TRITON_IMAGE."""
    plain: str
    """Command line where Triton is installed."""
    needs: str
    """What must be there besides Triton; empty when nothing."""


def write_repository(
    source: Path,
    folder: Path,
    *,
    options: ModelOptions | None = None,
    http_port: int = 8000,
    grpc_port: int = 8001,
    python: bool = False,
    python_path: str = "",
) -> TritonRepository:
    """Write the models of a file or folder as a Triton repository; return what was written.

    folder: made when missing; a model that is there already is refused, and nothing is written. options: of every model
    (rows of a batch, delay, instances, threads); 0 leaves it to Triton. python: use the python backend for ONNX, too, for a
    Triton without the ONNX Runtime backend. Raises NotFound, SpecError, MissingExtra (a model that can't be loaded here:
    what it takes and gives is read from it), Conflict.
    """
    options = options or ModelOptions()
    files = ModelFiles(source)
    found = files.scan()
    if there := sorted(name for name in found if (folder / name).exists()):
        raise Conflict(f"{folder / there[0]} exists already: name another folder with --out, or remove it")
    configs = {}
    for name, versions in found.items():
        newest = list(versions.values())[-1]
        configs[name] = _config(name, newest, options, python=python, python_path=python_path)
    models = []
    for name, versions in found.items():
        config, backend = configs[name], str(configs[name]["backend"])
        for version, file in versions.items():
            _write_version(folder / name / version, file, backend)
        (folder / name / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
        rows = int(config["max_batch_size"])
        models.append(TritonModel(name=name, backend=backend, max_batch_rows=rows, versions=tuple(versions)))
    repository = _commands(folder, models, http_port=http_port, grpc_port=grpc_port)
    script = folder / "run.sh"
    script.write_text(_script(http_port, grpc_port), encoding="utf-8")
    script.chmod(0o755)
    return repository


def config_text(config: Mapping[str, Any]) -> str:
    """Return a model configuration as Triton's config.pbtxt. Raises SpecError for a field that it does not have."""
    from google.protobuf import json_format, text_format  # with the message classes: only where such a file is

    from tenure.serve.v2 import ModelConfigResponse

    message = ModelConfigResponse().config
    try:
        json_format.ParseDict(dict(config), message)
    except json_format.ParseError as error:
        raise SpecError(f"no Triton model configuration: {error}") from error
    return text_format.MessageToString(message)


def _config(name: str, file: Path, options: ModelOptions, *, python: bool, python_path: str) -> dict[str, Any]:
    """Return the configuration of one model, as JSON would hold it."""
    engine = load_engine(file)
    try:
        metadata = ModelMetadata(name=name, platform=engine.platform, inputs=engine.inputs, outputs=engine.outputs)
    finally:
        engine.close()
    batchable = all(meta.shape[:1] == (-1,) for meta in (*metadata.inputs, *metadata.outputs))
    chosen = replace(options, max_batch_rows=options.max_batch_rows or DEFAULT_ROWS)
    config = model_config(metadata, chosen, batchable=batchable)
    backend = "python" if python else OWN_BACKENDS.get(file.suffix, "python")
    config |= {"backend": backend, "input": _shaped(config["input"]), "output": _shaped(config["output"])}
    config["platform"] = ""  # the backend says it
    config["instance_group"] = [{"count": options.instances or 1, "kind": "KIND_AUTO"}]  # a GPU where there is one
    if batchable:
        config["dynamic_batching"].pop("preferred_batch_size")  # a batch is what waits
    parameters = {}
    if options.threads and backend == "onnxruntime":
        parameters["intra_op_thread_count"] = {"string_value": str(options.threads)}
    if backend == "python":
        parameters[PYTHON_PATH] = {"string_value": python_path}
        parameters["threads"] = {"string_value": str(options.threads or 1)}
        config["default_model_filename"] = "model.py"
    return {**config, "parameters": parameters}


def _shaped(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tensors as Triton wants them: a row that is a single value has the shape [1], reshaped for the model."""
    return [
        {**tensor, "dims": tensor["dims"] or [1], **({} if tensor["dims"] else {"reshape": {"shape": []}})}
        for tensor in tensors
    ]


def _write_version(folder: Path, file: Path, backend: str) -> None:
    folder.mkdir(parents=True)
    _place(file, folder / f"model{file.suffix}")
    for beside in sorted(file.parent.glob(f"{file.name}?*")):  # an ONNX file's weights, which it finds by their own name
        _place(beside, folder / beside.name)
    if backend == "python":
        text = (Path(__file__).parent / "templates" / "triton_model.py.in").read_text(encoding="utf-8")
        (folder / "model.py").write_text(text, encoding="utf-8")


def _place(file: Path, target: Path) -> None:
    try:
        os.link(file.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, target)


def _commands(folder: Path, models: Sequence[TritonModel], *, http_port: int, grpc_port: int) -> TritonRepository:
    where = folder.absolute()
    python = [model.name for model in models if model.backend == "python"]
    needs = ""
    if python:
        needs = (
            f"{', '.join(python)}: Triton's python backend must be able to import tenure and the model's library. Install both "
            f"into its interpreter, or name their folder in config.pbtxt, parameter {PYTHON_PATH}. Keep the NumPy that Triton "
            "came with: built for NumPy 1, its python backend sends empty outputs with NumPy 2"
        )
    return TritonRepository(
        folder=where,
        models=tuple(models),
        container=_container(shlex.quote(f"{where}:/models"), http_port, grpc_port),
        plain=_plain(shlex.quote(str(where)), http_port, grpc_port),
        needs=needs,
    )


def _container(mount: str, http_port: int, grpc_port: int) -> str:
    ports = f"-p {http_port}:8000 -p {grpc_port}:8001 -p 8002:8002"
    return (
        f'docker run --rm --gpus all --shm-size 1g {ports} -v {mount} "$TRITON_IMAGE" tritonserver --model-repository /models'
    )


def _plain(folder: str, http_port: int, grpc_port: int) -> str:
    return f"tritonserver --model-repository {folder} --http-port {http_port} --grpc-port {grpc_port}"


def _script(http_port: int, grpc_port: int) -> str:
    """Return the shell script that starts Triton: in a container where $TRITON_IMAGE names one, else from the PATH."""
    return f"""#!/bin/sh
# Serves this folder with Triton Inference Server. TRITON_IMAGE: its image as NVIDIA publishes it (…/tritonserver:YY.MM-py3);
# without it, the tritonserver that is installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -n "${{TRITON_IMAGE:-}}" ]; then
    exec {_container('"$here:/models"', http_port, grpc_port)} "$@"
fi
exec {_plain('"$here"', http_port, grpc_port)} "$@"
"""
