"""A model, or a folder of them, served in the foreground: `tenure serve MODEL` as a job under one lease.

    options ─► job file text ─► run, one serve stage with an envelope ─► lease ─► server ─► Listening, told to whoever asked

The job is an ordinary one, so that lease, enforcement, log and report are what every job has. Not here: holding the lease
until Ctrl-C (`stage_serve`), printing (`cli`).
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenure.errors import MissingExtra, NotFound, Refused, SpecError, TenureError
from tenure.jobfile import JobFile, format_job_file
from tenure.jobs import Job, ServerOptions
from tenure.nodes import Node
from tenure.resources import Envelope, show_bytes
from tenure.serve.client import Model
from tenure.serve.repository import ModelFiles
from tenure.serve.tensors import ModelMetadata, TensorMetadata

SLOT_S = 120.0
"""Of the lease, which is renewed while the command lives: when it is killed, its server ends within this time."""
TOTAL_S = 365 * 86400.0
"""How long a server is served that no `--time` bounds."""
MAX_TOLD = 20
"""Models that are told one by one."""
_MAX_ZEROS = 64
"""Elements that a curl line spells out; a larger input is better sent by a program."""
_HTTP, _GRPC = 8000, 8001


@dataclass(frozen=True, slots=True, kw_only=True)
class ForegroundSpec:
    """What to serve, where, under which lease."""

    model: Path
    """A model file, a folder of models, or a repository with a folder per model and version."""
    http_port: int = _HTTP
    """0 takes any free one."""
    grpc_port: int = _GRPC
    cpus: float = 0.0
    """0: what is free on the node."""
    memory_bytes: int = 0
    """0: half of what is free on the node."""
    time_s: float = 0.0
    """0: until it is interrupted."""
    options: ServerOptions = field(default_factory=ServerOptions)

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise SpecError(f"a port lies between 0 (any free one) and 65535; found {getattr(self, name)!r}")
        if self.http_port and self.http_port == self.grpc_port:
            raise SpecError(f"HTTP and gRPC cannot share port {self.http_port}: give one of them another")
        if not math.isfinite(self.cpus) or self.cpus < 0:
            raise SpecError(f"the number of cores must be above 0; found {self.cpus!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model that a server offers, and how to call it."""

    name: str
    versions: tuple[str, ...] = ()
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()
    curl: str = ""
    """A line for a shell: one request of zeros; of a model with large inputs, what it takes and gives."""
    python: str = ""
    """A line for a shell that asks the model through the client."""
    problem: str = ""
    """Why it cannot be asked now; the rest is empty then."""

    def describe(self) -> str:
        """Return one line for people."""
        if self.problem:
            return f"{self.name} cannot be asked now: {self.problem}"
        versions = f"version{'s' if len(self.versions) > 1 else ''} {', '.join(self.versions)}"
        return f"{self.name}, {versions}: {_tensors(self.inputs)} -> {_tensors(self.outputs)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """A server that answers."""

    lease_id: str
    endpoints: Mapping[str, str]
    """http and grpc -> host:port."""
    models: tuple[ServedModel, ...]


def check_models(path: Path) -> None:
    """Raise NotFound for a path that is not there, SpecError when no model is in it, MissingExtra without its engine."""
    if not path.exists():
        raise NotFound(f"{path} does not exist: name a model file, a folder of models, or a job file (.toml)")
    for versions in ModelFiles(path).scan().values():
        for file in versions.values():
            _check_engine(file)
    if ":" in str(path.absolute()):
        raise SpecError(f"{path.absolute()} has a colon in it, which means an earlier stage in a job file: rename or link it")


_ENGINE_PACKAGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    ".onnx": (("onnxruntime", "demo"),),
    ".skops": (("skops", "demo"), ("sklearn", "demo")),
    ".pt2": (("torch", "torch"),),
    ".tflite": (("ai_edge_litert", "litert"),),
}
"""File ending -> the packages without which its engine cannot run, and the extra that brings each."""


def _check_engine(file: Path) -> None:
    for package, extra in _ENGINE_PACKAGES.get(file.suffix, ()):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra, f"Serving {file.name}")


def check_ports(spec: ForegroundSpec) -> None:
    """Raise SpecError naming a port that is taken. Between this look and the server's own it may still be taken."""
    for option, port in (("--http-port", spec.http_port), ("--grpc-port", spec.grpc_port)):
        if not port:
            continue
        family = socket.AF_INET6 if ":" in spec.options.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((spec.options.host, port))
            except OSError as error:
                raise SpecError(
                    f"port {port} on {spec.options.host} cannot be had: {error.strerror}. Choose another with {option}, or 0 "
                    "for any free one"
                ) from error


def job_file_of(spec: ForegroundSpec, node: Node) -> tuple[str, str]:
    """Return the text of the job file that serves it on this node, and a sentence on where its envelope comes from.

    Raises Refused when nothing of the node is free.
    """
    envelope, why = envelope_of(spec, node)
    name = re.sub(r"[^a-z0-9._-]+", "-", spec.model.absolute().stem.lower()).lstrip("._-")[:63] or "model"
    job = Job(
        kind="serve",
        name="serve",
        model=str(spec.model.absolute()),
        envelope=envelope,
        ports={"http": spec.http_port, "grpc": spec.grpc_port},
        server=spec.options,
    )
    return format_job_file(JobFile(name=name, tenant="default", stages=(job,))), why


def envelope_of(spec: ForegroundSpec, node: Node) -> tuple[Envelope, str]:
    """Return the envelope of what is served on this node, and a sentence on where it comes from. Raises Refused."""
    free_cpus = round(node.capacity.cpus - node.held_cpus, 3)
    free_bytes = node.capacity.memory_bytes - node.held_memory_bytes
    if not spec.cpus and free_cpus < 0.01:
        raise Refused(
            f'leases hold all cores of node {node.name}: "tenure leases --live" lists them, "tenure release LEASE" ends one. '
            "A server takes all free cores unless it is started with --cpus."
        )
    cpus = spec.cpus or free_cpus
    memory_bytes = spec.memory_bytes or free_bytes // 2 // (1 << 20) * (1 << 20)
    if memory_bytes < 64 << 20:
        raise Refused(f"{show_bytes(memory_bytes)} of memory is too little for a server: it needs at least 64MiB (--memory)")
    total_s = spec.time_s or TOTAL_S
    envelope = Envelope(cpus=cpus, memory_bytes=memory_bytes, slot_s=min(SLOT_S, total_s), total_s=total_s)
    chosen = [
        *([] if spec.cpus else [f"all {free_cpus:g} free cores (--cpus)"]),
        *([] if spec.memory_bytes else [f"half of the {show_bytes(free_bytes)} of free memory (--memory)"]),
    ]
    return envelope, " and ".join(chosen) or "as asked for"


def look(lease_id: str, endpoints: Mapping[str, str], names: Sequence[str]) -> Listening:
    """Ask a server that listens what it offers, through the public client. A model that does not answer says why."""
    address = reachable(endpoints["http"]) if names else ""
    models = tuple(_look_at(address, name) for name in names[:MAX_TOLD])
    return Listening(lease_id=lease_id, endpoints=dict(endpoints), models=models)


def answered(endpoints: Mapping[str, str]) -> str:
    """Return how many requests a server has answered and how many failed, for people; empty when it does not say."""
    if "http" not in endpoints:
        return ""
    client = http.client.HTTPConnection(reachable(endpoints["http"]), timeout=2.0)
    try:
        client.request("GET", "/v2/models/stats")
        found = json.loads(client.getresponse().read())["model_stats"]
        done, failed = (sum(stats["inference_stats"][key]["count"] for stats in found) for key in ("success", "fail"))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""
    finally:
        client.close()
    return f"; {done:,} requests answered" + (f", {failed:,} refused or failed" if failed else "")


def reachable(address: str) -> str:
    """Return an address that this machine's clients can use: one that stands for all of them becomes the loopback's."""
    host, _, port = address.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"


def _look_at(address: str, name: str) -> ServedModel:
    try:
        with Model(f"http://{address}", name, timeout_s=10.0) as model:
            return _callable(address, model.metadata())
    except TenureError as error:
        return ServedModel(name=name, problem=str(error))


def _callable(address: str, metadata: ModelMetadata) -> ServedModel:
    return ServedModel(
        name=metadata.name,
        versions=metadata.versions,
        inputs=metadata.inputs,
        outputs=metadata.outputs,
        curl=_curl(address, metadata),
        python=_python(address, metadata),
    )


def _curl(address: str, metadata: ModelMetadata) -> str:
    url = f"http://{address}/v2/models/{metadata.name}"
    if sum(math.prod(_row(meta)) for meta in metadata.inputs) > _MAX_ZEROS:
        return f"curl -s {shlex.quote(url)}"
    inputs = [
        {
            "name": meta.name,
            "shape": _row(meta),
            "datatype": meta.datatype,
            "data": [_ZEROS.get(meta.datatype, 0)] * math.prod(_row(meta)),
        }
        for meta in metadata.inputs
    ]
    body = json.dumps({"inputs": inputs}, separators=(",", ":"), ensure_ascii=False)
    return f"curl -s {shlex.quote(url + '/infer')} -d {shlex.quote(body)}"


_ZEROS: Mapping[str, Any] = {"BYTES": "text", "BOOL": False}


def _python(address: str, metadata: ModelMetadata) -> str:
    arrays = {meta.name: _array(meta) for meta in metadata.inputs}
    given = next(iter(arrays.values())) if len(arrays) == 1 else f"{{{', '.join(f'{n!r}: {a}' for n, a in arrays.items())}}}"
    target = f'Model("http://{address}", {json.dumps(metadata.name)})'
    return f"python -c {shlex.quote(f'import numpy as np; from tenure import Model; print({target}.predict({given}))')}"


_NUMPY: Mapping[str, str] = {"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}


def _array(meta: TensorMetadata) -> str:
    shape = tuple(_row(meta))
    if meta.datatype == "BYTES":
        return f'np.full({shape}, b"text", object)'
    return f'np.zeros({shape}, "{_NUMPY.get(meta.datatype, meta.datatype.lower())}")'


def _row(meta: TensorMetadata) -> list[int]:
    """Return a shape that fits: 1 where any length does."""
    return [1 if length < 0 else length for length in meta.shape]


def _tensors(metas: tuple[TensorMetadata, ...]) -> str:
    return ", ".join(
        f"{meta.name} {meta.datatype} [{', '.join('n' if n < 0 else str(n) for n in meta.shape)}]" for meta in metas
    )
