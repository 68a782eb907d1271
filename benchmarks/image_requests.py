"""Requests and answers of the Open Inference Protocol v2, as the exchanges of `benchmarks.image_grammar` want them.

Written without the product's client, so that what refuses a broken request is the server. Not here: sending (`image_player`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.image_grammar import Infer, Refused, Served, values
from tenure.serve import v2

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
_DTYPES = {
    "FP32": "<f4", "FP64": "<f8", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8", "BOOL": "?",
}  # fmt: skip
_OTHER = {"FP32": "INT32", "FP64": "INT64", "INT64": "FP64", "INT32": "FP32"}
_PATHS = {
    "live": "/v2/health/live", "ready": "/v2/health/ready", "server": "/v2", "model": "/v2/models/@",
    "model ready": "/v2/models/@/ready", "model at version": "/v2/models/@/versions/1",
    "config": "/v2/models/@/config", "statistics": "/v2/models/@/stats",
    "index": "/v2/repository/index", "metrics": "/metrics", "no such model": "/v2/models/nobody", "no such page": "/v3/nothing",
    "head": "/v2/health/live", "options": "/v2",
}  # fmt: skip
_METHODS = {"index": "POST", "head": "HEAD", "options": "OPTIONS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One request, as `http.client` sends it."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes
    parameters: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None
    """In place of what `raw` holds, in JSON."""

    @property
    def listed(self) -> Any:
        """The elements, as JSON has them."""
        if self.data is not None:
            return self.data
        return np.frombuffer(self.raw, _DTYPES[self.datatype]).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    model: str
    version: str = ""
    inputs: tuple[_Input, ...] = ()
    outputs: Sequence[str] = ()
    id: str = ""


def http_infer(model: Served, asked: Infer) -> HttpRequest:
    """Return the request of an exchange, by JSON or with binary tensors."""
    return _packed(_http(_infer_plan(model, asked), binary=asked.door == "http-binary"), asked.compression)


def grpc_infer(model: Served, asked: Infer) -> bytes:
    """Return the request of an exchange as gRPC's message."""
    return _grpc(_infer_plan(model, asked))


def http_refused(model: Served, refused: Refused) -> HttpRequest:
    """Return the request that is wrong in the way that is asked for."""
    binary = refused.door == "http-binary"
    plan = _broken(_infer_plan(model, _valid(refused)), refused.way)
    request = _http(plan, binary=binary or refused.way in ("lying binary size", "lying header length"))
    json_only = replace(request, headers={"Content-Type": "application/json"})
    match refused.way:
        case "not JSON":
            return replace(json_only, body=b"{inputs")
        case "not UTF-8":
            return replace(json_only, body=b'{"id": "\xff\xfe", "inputs": []}')
        case "JSON too deep":
            return replace(json_only, body=b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}")
        case "empty body":
            return replace(json_only, body=b"")
        case "lying binary size":
            head = json.dumps({"inputs": [_entry(plan.inputs[0], size=len(plan.inputs[0].raw) + 8)]}).encode()
            headers = {**request.headers, "Inference-Header-Content-Length": str(len(head))}
            return replace(request, body=head + plan.inputs[0].raw, headers=headers)
        case "lying header length":
            return replace(request, headers={**request.headers, "Inference-Header-Content-Length": "99999"})
        case "wrong compression":
            return replace(request, body=b"this is no archive", headers={**json_only.headers, "Content-Encoding": "gzip"})
        case "unknown path":
            return replace(request, path="/v2/nothing")
        case "wrong method":
            return replace(request, method="PUT")
    return request


def grpc_refused(model: Served, refused: Refused) -> tuple[str, bytes]:
    """Return method and message that are wrong in the way that is asked for."""
    if refused.way == "empty body":
        return "ModelInfer", b""
    message = _grpc(_broken(_infer_plan(model, _valid(refused)), refused.way))
    return ("Nothing" if refused.way == "unknown path" else "ModelInfer"), message


def http_asked(model: Served, question: str) -> HttpRequest:
    """Return a question that no model answers."""
    return HttpRequest(method=_METHODS.get(question, "GET"), path=_PATHS[question].replace("@", model.name))


def grpc_asked(model: Served, question: str) -> tuple[str, bytes]:
    """Return method and message of a question."""
    method = {
        "live": "ServerLive", "ready": "ServerReady", "server": "ServerMetadata", "model": "ModelMetadata",
        "model ready": "ModelReady", "no such model": "ModelMetadata", "no such page": "Nothing",
    }[question]  # fmt: skip
    if not method.startswith("Model"):
        return method, b""
    message = v2.METHODS[method][0](name="nobody" if question == "no such model" else model.name)
    return method, message.SerializeToString()


def grpc_method(name: str) -> tuple[str, Any]:
    """Return the service that has a method, and how its answer is read (None: nobody knows it)."""
    classes = v2.METHODS.get(name)
    return v2.SERVICE, classes[1].FromString if classes else None


def read_http(headers: Any, body: bytes) -> tuple[str, Tensors]:
    """Return what an answer says besides its tensors, and these."""
    if headers.get("Content-Encoding") in ("gzip", "deflate"):
        body = gzip.decompress(body) if headers["Content-Encoding"] == "gzip" else zlib.decompress(body)
    end = int(headers.get("Inference-Header-Content-Length") or len(body))
    text = body[:end].decode(errors="replace")
    try:
        head = json.loads(text)
    except ValueError:
        return text, {}
    if not isinstance(head, dict) or not isinstance(head.get("outputs"), list) or "model_name" not in head:
        return text, {}
    tensors, at = {}, end
    for entry in head.pop("outputs"):
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is not None:
            content = body[at : at + size]
            at += size
        else:
            content = np.array([np.nan if x is None else x for x in entry["data"]], _DTYPES[entry["datatype"]]).tobytes()
        tensors[entry["name"]] = (entry["datatype"], tuple(entry["shape"]), content)
    return json.dumps(head, sort_keys=True), tensors


def read_grpc(read: Any, body: bytes) -> tuple[str, Tensors]:
    """Return what an answer says besides its tensors, and these."""
    message = read(body)
    if not hasattr(message, "raw_output_contents"):
        return str(message), {}
    tensors = {
        output.name: (output.datatype, tuple(output.shape), bytes(raw))
        for output, raw in zip(message.outputs, message.raw_output_contents, strict=True)
    }
    return f"{message.model_name} {message.model_version} {message.id}", tensors


def _valid(refused: Refused) -> Infer:
    seed = refused.values_seed
    return Infer(
        door=refused.door, rows=3, values="normal", values_seed=seed, outputs=(), id="", compression="", fresh=True
    )  # fmt: skip


def _infer_plan(model: Served, asked: Infer) -> _Plan:
    inputs = []
    for number, tensor in enumerate(model.inputs):
        x = values(tensor, asked.rows, asked.values, asked.values_seed + number)
        raw = np.ascontiguousarray(x).tobytes()
        inputs.append(_Input(name=tensor.name, datatype=tensor.datatype, shape=tuple(x.shape), raw=raw))
    return _Plan(model=model.name, inputs=tuple(inputs), outputs=asked.outputs, id=asked.id)


def _broken(plan: _Plan, way: str) -> _Plan:
    first = plan.inputs[0]
    width = np.dtype(_DTYPES[first.datatype]).itemsize

    def changed(**fields: Any) -> _Plan:
        return replace(plan, inputs=(replace(first, **fields), *plan.inputs[1:]))

    match way:
        case "wrong shape":
            return changed(shape=(*first.shape, 1))
        case "wrong width":
            rest = len(first.raw) // first.shape[-1]
            return changed(shape=(*first.shape[:-1], first.shape[-1] + 1), raw=first.raw + bytes(rest))
        case "wrong datatype":
            return changed(datatype=_OTHER[first.datatype])
        case "unknown model":
            return replace(plan, model="nobody")
        case "unknown version":
            return replace(plan, version="9")
        case "unknown input":
            return changed(name="nothing")
        case "unknown output":
            return replace(plan, outputs=("nothing",))
        case "no inputs":
            return replace(plan, inputs=())
        case "input twice":
            return replace(plan, inputs=(first, *plan.inputs))
        case "short data":
            return changed(raw=first.raw[:-width])
        case "long data":
            return changed(raw=first.raw + bytes(width))
        case "negative length":
            return changed(shape=(-1, *first.shape[1:]))
        case "huge shape":
            return changed(shape=(1 << 40, *first.shape[1:]))
        case "text for numbers":
            return changed(data=["many"] * (len(first.raw) // width))
        case "unknown region":
            return changed(parameters={"shared_memory_region": "nothing", "shared_memory_byte_size": len(first.raw)}, raw=b"")
    return plan


def _entry(tensor: _Input, *, size: int | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    parameters = dict(tensor.parameters)
    if parameters:
        return {**entry, "parameters": parameters}
    if size is not None:
        return {**entry, "parameters": {"binary_data_size": size}}
    return {**entry, "data": tensor.listed}


def _http(plan: _Plan, *, binary: bool) -> HttpRequest:
    version = f"/versions/{plan.version}" if plan.version else ""
    path = f"/v2/models/{plan.model}{version}/infer"
    binary = binary and not any(tensor.data for tensor in plan.inputs)
    head: dict[str, Any] = {"inputs": [_entry(tensor, size=len(tensor.raw) if binary else None) for tensor in plan.inputs]}
    if plan.outputs:
        head["outputs"] = [
            {"name": name, "parameters": {"binary_data": True}} if binary else {"name": name} for name in plan.outputs
        ]
    elif binary:
        head["parameters"] = {"binary_data_output": True}
    if plan.id:
        head["id"] = plan.id
    text = json.dumps(head).encode()
    if not binary:
        return HttpRequest(method="POST", path=path, body=text, headers={"Content-Type": "application/json"})
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
    return HttpRequest(method="POST", path=path, body=text + b"".join(tensor.raw for tensor in plan.inputs), headers=headers)


def _packed(request: HttpRequest, compression: str) -> HttpRequest:
    if not compression:
        return request
    body = request.body or b""
    packed = gzip.compress(body, mtime=0) if compression == "gzip" else zlib.compress(body)
    headers = {**request.headers, "Content-Encoding": compression, "Accept-Encoding": compression}
    return replace(request, body=packed, headers=headers)


def _grpc(plan: _Plan) -> bytes:
    message = v2.ModelInferRequest(model_name=plan.model, model_version=plan.version, id=plan.id)
    for tensor in plan.inputs:
        entry = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        for name, value in tensor.parameters.items():
            if isinstance(value, str):
                entry.parameters[name].string_param = value
            else:
                entry.parameters[name].int64_param = value
        if not tensor.parameters:
            message.raw_input_contents.append(tensor.raw)
    for name in plan.outputs:
        message.outputs.add(name=name)
    return bytes(message.SerializeToString())
