"""The client's side of v2 over HTTP: request heads made once per shape, answers read by a layout found once.

A hot request builds nothing: the same model, shapes and outputs give the same head and JSON, and the same answer header
gives the same places of the tensors. The server's side is `codec_http`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np

from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge
from tenure.serve.http_client.response import Head
from tenure.serve.tensors import Array, ModelMetadata, TensorMetadata, datatype_of, dtype_of, from_raw

_KEPT, _KEPT_BYTES = 256, 16 << 10
_ALIGNMENT = 64
_ERRORS: dict[int, type[TenureError]] = {400: InputRefused, 404: NotFound, 413: TooLarge, 503: Unavailable, 504: Unavailable}

Place = tuple[str, int, int]
"""Region, offset, size: where an input lies in shared memory."""
Key = tuple[Any, ...]


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: Any = None


class _Answer(msgspec.Struct):
    outputs: list[_Tensor]


class _Metadata(msgspec.Struct):
    """Optional parts are null at some servers (KServe: versions), or missing."""

    name: str
    inputs: list[TensorMetadata] | None = None
    outputs: list[TensorMetadata] | None = None
    platform: str | None = None
    versions: list[str] | None = None


class _Server(msgspec.Struct):
    extensions: list[str] = []


_answer_decoder = msgspec.json.Decoder(_Answer)
_metadata_decoder = msgspec.json.Decoder(_Metadata)
_server_decoder = msgspec.json.Decoder(_Server)


def request_key(name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Key:
    """Return what a request's head depends on."""
    return (name, tuple([(key, array.dtype, array.shape) for key, array in inputs.items()]), tuple(outputs))


def get_head(host: str, path: str) -> bytes:
    """Return a request without a body."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def post_head(host: str, path: str, length: int, *fields: str) -> bytes:
    """Return the head of a request with a body of `length` bytes."""
    lines = (f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {length}", *fields)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def model_path(name: str) -> str:
    """Return a model's place at a server."""
    return f"/v2/models/{quote(name, safe='')}"


def infer_head(
    host: str,
    name: str,
    inputs: Mapping[str, Array],
    sizes: Sequence[int],
    outputs: Sequence[str],
    places: Sequence[Place] = (),
    *,
    id: str = "",
) -> bytes:
    """Return head and JSON of an inference request. The raw tensors follow, unless `places` says where they lie.

    sizes: bytes of each raw tensor, none with `places`. Outputs are asked for raw.
    Raises InputRefused for types the protocol has no name for.
    """
    tensors: list[dict[str, Any]] = []
    where: dict[str, Any]
    for index, (key, array) in enumerate(inputs.items()):
        if places:
            region, offset, size = places[index]
            where = {"shared_memory_region": region, "shared_memory_offset": offset, "shared_memory_byte_size": size}
        else:
            where = {"binary_data_size": sizes[index]}
        tensors.append({"name": key, "datatype": datatype_of(array), "shape": list(array.shape), "parameters": where})
    header: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if id:
        header["id"] = id
    if outputs:
        header["outputs"] = [{"name": wanted, "parameters": {"binary_data": True}} for wanted in outputs]
    content = msgspec.json.encode(header)
    content += b" " * (-len(content) % _ALIGNMENT)
    raw = sum(sizes)
    told = f"Inference-Header-Content-Length: {len(content)}"
    kind = "Content-Type: application/octet-stream"
    return post_head(host, f"{model_path(name)}/infer", len(content) + raw, kind, told) + content


Layout = tuple[tuple[str, np.dtype[Any], tuple[int, ...], int, int], ...]
_layouts: dict[bytes, Layout] = {}


def read_answer(head: Head, body: memoryview) -> dict[str, Array]:
    """Return the outputs of an answer; arrays look into `body`. Raises what the status means; ModelFailed when it is no v2."""
    if head.status != 200:
        raise told_error(head, body)
    try:
        return _outputs(head.json_length, body)
    except (InputRefused, ValueError) as error:  # of the answer, so nothing that the caller could mend
        raise ModelFailed(f"the answer cannot be read: {error}") from error


def read_metadata(body: memoryview) -> ModelMetadata:
    """Return a model's metadata. Raises ModelFailed when the JSON does not follow the protocol."""
    try:
        found = _metadata_decoder.decode(body)
    except msgspec.DecodeError as error:
        raise ModelFailed(f"the server's metadata is not v2 JSON: {error}") from error
    return ModelMetadata(
        name=found.name,
        versions=tuple(found.versions or ()),
        platform=found.platform or "",
        inputs=tuple(found.inputs or ()),
        outputs=tuple(found.outputs or ()),
    )


def read_extensions(body: memoryview) -> frozenset[str]:
    """Return the protocol extensions a server offers; none when it does not say."""
    try:
        return frozenset(_server_decoder.decode(body).extensions)
    except msgspec.DecodeError:
        return frozenset()


def told_error(head: Head, body: memoryview) -> TenureError:
    """Return the error that an answer's status means, with the server's reason."""
    try:
        reason = str(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        reason = f"HTTP {head.status}: {bytes(body[:200])!r}"
    if head.status == 429:
        return Overloaded(reason, retry_after_s=1.0 if head.retry_after_s is None else head.retry_after_s)
    return _ERRORS.get(head.status, ModelFailed)(reason)


def _outputs(length: int | None, body: memoryview) -> dict[str, Array]:
    if length is None:
        return {tensor.name: _from_json(tensor) for tensor in _parsed(body).outputs}
    if length > len(body):
        raise ModelFailed(f"the answer claims {length} bytes of JSON; it has {len(body)} in all")
    content = bytes(body[:length])
    layout = _layouts.get(content)
    if layout is None:
        parsed = _parsed(body[:length]).outputs
        if any(tensor.data is not None or tensor.datatype == "BYTES" for tensor in parsed):
            return _mixed(parsed, body[length:])
        layout = _layout(parsed)
        if length <= _KEPT_BYTES:
            if len(_layouts) >= _KEPT:
                _layouts.clear()
            _layouts[content] = layout
    if length + (layout[-1][4] if layout else 0) != len(body):
        raise ModelFailed(
            f"the answer has {len(body) - length} raw bytes; its header describes {layout[-1][4] if layout else 0}"
        )
    outputs: dict[str, Array] = {}
    for name, dtype, shape, start, end in layout:
        array = np.frombuffer(body[length + start : length + end], dtype).reshape(shape)
        outputs[name] = array if array.flags.aligned else array.copy()
    return outputs


def _parsed(content: memoryview) -> _Answer:
    try:
        return _answer_decoder.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelFailed(f"the answer is not v2 JSON: {error}") from error


def _layout(tensors: Sequence[_Tensor]) -> Layout:
    found, at = [], 0
    for tensor in tensors:
        dtype = dtype_of(tensor.datatype, tensor=tensor.name)
        size, shape = tensor.parameters.get("binary_data_size"), tuple(tensor.shape)
        if size != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ModelFailed(f'output "{tensor.name}" has {size} bytes; {tensor.datatype} of shape {list(shape)} takes others')
        found.append((tensor.name, dtype, shape, at, at + size))
        at += size
    return tuple(found)


def _mixed(tensors: Sequence[_Tensor], raw: memoryview) -> dict[str, Array]:
    """Outputs of which some are JSON or BYTES: nothing about them is kept."""
    outputs: dict[str, Array] = {}
    at = 0
    for tensor in tensors:
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            outputs[tensor.name] = _from_json(tensor)
            continue
        if not isinstance(size, int) or not 0 <= size <= len(raw) - at:
            raise ModelFailed(f'output "{tensor.name}" claims {size!r} raw bytes; {len(raw) - at} are left')
        outputs[tensor.name] = from_raw(raw[at : at + size], tensor.datatype, tensor.shape, tensor=tensor.name)
        at += size
    return outputs


def _from_json(tensor: _Tensor) -> Array:
    dtype = dtype_of(tensor.datatype, tensor=tensor.name)
    try:
        if dtype.kind != "O":
            return np.array(tensor.data, dtype=dtype).reshape(tensor.shape)
        texts = np.array(tensor.data, dtype=object).reshape(-1)
        return np.array([*(str(item).encode() for item in texts), None], dtype=object)[:-1].reshape(tensor.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelFailed(f'output "{tensor.name}" is not {tensor.datatype} of shape {tensor.shape}: {error}') from error
