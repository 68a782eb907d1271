"""Requests and answers of the v2 protocol as HTTP bodies: JSON, and JSON followed by raw tensors; both ways.

Used by the HTTP door and the HTTP transport of the client, which share nothing else. No sockets here.
A body with raw tensors starts with `Inference-Header-Content-Length` bytes of JSON; the tensors follow in order, each
`parameters.binary_data_size` long. Ours pads the JSON with spaces so that the first tensor lies aligned: no copy needed.
JSON has no NaN: in JSON answers it reads null; ask for binary outputs where that matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from tenure.serve.faults import InputRefused
from tenure.serve.messages import InferAnswer, InferRequest
from tenure.serve.tensors import (
    Array,
    ModelMetadata,
    TensorMetadata,
    datatype_of,
    dtype_of,
    element_count,
    from_raw,
    to_raw,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
_ALIGNMENT = 16


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: Any = None


class _Wanted(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Wanted] = []


class _Answer(msgspec.Struct):
    model_name: str
    outputs: list[_Tensor]
    model_version: str = ""
    id: str = ""


_request_decoder = msgspec.json.Decoder(_Request)
_answer_decoder = msgspec.json.Decoder(_Answer)


def decode_request(
    body: bytes, header_length: int | None, *, model: str, version: str
) -> tuple[InferRequest, frozenset[str] | None]:
    """Return the request in a body, and which outputs are wanted raw (None: all of them). Raises InputRefused."""
    content, raw = _split(body, header_length)
    parsed = _parse(_request_decoder, content, "request")
    inputs = _tensors(parsed.inputs, raw, "input")
    if parsed.parameters.get("binary_data_output") is True and not parsed.outputs:
        binary = None
    else:
        default = parsed.parameters.get("binary_data_output") is True
        binary = frozenset(o.name for o in parsed.outputs if o.parameters.get("binary_data", default) is True)
    names = tuple(output.name for output in parsed.outputs)
    return InferRequest(model=model, version=version, id=parsed.id, inputs=inputs, outputs=names), binary


def encode_request(request: InferRequest) -> tuple[list[bytes | memoryview], int]:
    """Return the parts of a body with raw tensors both ways, and its JSON length."""
    tensors, raw = _described(request.inputs, None)
    header: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if request.id:
        header["id"] = request.id
    if request.outputs:
        header["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in request.outputs]
    return _joined(header, raw)


def encode_answer(answer: InferAnswer, binary: frozenset[str] | None) -> tuple[list[bytes | memoryview], int | None]:
    """Return the parts of a body and its JSON length, None for pure JSON. binary: outputs sent raw (None: all)."""
    tensors, raw = _described(answer.outputs, binary)
    header: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version, "outputs": tensors}
    if answer.id:
        header["id"] = answer.id
    if not raw:
        return [msgspec.json.encode(header)], None
    return _joined(header, raw)


def decode_answer(body: bytes, header_length: int | None) -> InferAnswer:
    """Return the answer in a body. Raises InputRefused when it does not follow the protocol."""
    content, raw = _split(body, header_length)
    parsed = _parse(_answer_decoder, content, "answer")
    outputs = _tensors(parsed.outputs, raw, "output")
    return InferAnswer(model=parsed.model_name, version=parsed.model_version, id=parsed.id, outputs=outputs)


def encode_metadata(metadata: ModelMetadata) -> bytes:
    """Return the JSON of a model's metadata."""
    return msgspec.json.encode(metadata)


def decode_metadata(body: bytes) -> ModelMetadata:
    """Return a model's metadata. Raises InputRefused when the JSON does not follow the protocol."""

    class _Metadata(msgspec.Struct):
        name: str
        inputs: list[TensorMetadata]
        outputs: list[TensorMetadata]
        platform: str = ""
        versions: list[str] = []

    found = _parse(msgspec.json.Decoder(_Metadata), memoryview(body), "metadata")
    return ModelMetadata(
        name=found.name,
        versions=tuple(found.versions),
        platform=found.platform,
        inputs=tuple(found.inputs),
        outputs=tuple(found.outputs),
    )


def _split(body: bytes, header_length: int | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    if not 0 <= header_length <= len(body):
        raise InputRefused(f"{HEADER_LENGTH} is {header_length}; the body has {len(body)} bytes")
    return view[:header_length], view[header_length:]


def _parse(decoder: msgspec.json.Decoder[Any], content: memoryview, what: str) -> Any:
    try:
        return decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"the {what} is not v2 JSON: {error}") from error


def _tensors(parsed: Iterable[_Tensor], raw: memoryview, what: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    at = 0
    for tensor in parsed:
        if tensor.name in arrays:
            raise InputRefused(f'{what} "{tensor.name[:80]}" is given twice')
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[tensor.name] = _from_json(tensor)
            continue
        if tensor.data is not None:
            raise InputRefused(f'{what} "{tensor.name[:80]}" has both "data" and "binary_data_size"')
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(raw) - at:
            raise InputRefused(f'{what} "{tensor.name[:80]}" claims {size!r} raw bytes; {len(raw) - at} are left in the body')
        arrays[tensor.name] = from_raw(raw[at : at + size], tensor.datatype, tensor.shape, tensor=tensor.name)
        at += size
    if at != len(raw):
        raise InputRefused(f"{len(raw) - at} bytes follow the last raw {what}")
    return arrays


def _from_json(tensor: _Tensor) -> Array:
    name, dtype = tensor.name, dtype_of(tensor.datatype, tensor=tensor.name)
    count = element_count(tensor.shape, tensor=name)
    if not isinstance(tensor.data, list):
        raise InputRefused(f'input "{name}" needs "data", an array of elements, or "binary_data_size" with raw bytes')
    if dtype.kind == "O":
        array = np.array([_text(item, name) for item in _flat(tensor.data)] or [], dtype=object)
    else:
        array = _numbers(tensor.data, dtype, tensor)
    if array.size != count:
        raise InputRefused(f'input "{name}" has {array.size} elements; shape {tensor.shape} takes {count}')
    return array.reshape(tensor.shape)


def _numbers(data: list[Any], dtype: np.dtype[Any], tensor: _Tensor) -> Array:
    """Convert without changing a value: 1.5 is not an INT64, 300 is not a UINT8, true is not a number."""
    try:
        found = np.array(data)
    except (ValueError, OverflowError) as error:
        raise InputRefused(f'input "{tensor.name}" is not a regular array: {error}') from error
    allowed = {"b": "b", "f": "iuf"}.get(dtype.kind, "iu")
    if found.size == 0:
        return found.astype(dtype) if found.dtype.kind == "f" else np.zeros(0, dtype)
    if found.dtype.kind not in allowed:
        raise InputRefused(f'input "{tensor.name}" has elements that are not {tensor.datatype}')
    with np.errstate(over="ignore"):
        array = found.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(array, found):
        raise InputRefused(f'input "{tensor.name}" has elements outside the range of {tensor.datatype}')
    return array


def _text(item: Any, name: str) -> bytes:
    if not isinstance(item, str):
        raise InputRefused(f'input "{name}" is BYTES: its elements must be strings; found {type(item).__name__}')
    return item.encode()


def _flat(data: Sequence[Any]) -> Iterable[Any]:
    for item in data:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _described(
    arrays: Mapping[str, Array], binary: frozenset[str] | None
) -> tuple[list[dict[str, Any]], list[bytes | memoryview]]:
    tensors, parts = [], []
    for name, array in arrays.items():
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if binary is None or name in binary:
            raw = to_raw(array)
            tensor["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        elif array.dtype.kind == "O":
            tensor["data"] = [item.decode(errors="replace") for item in array.reshape(-1)]
        else:
            tensor["data"] = array.reshape(-1).tolist()
        tensors.append(tensor)
    return tensors, parts


def _joined(header: dict[str, Any], raw: list[bytes | memoryview]) -> tuple[list[bytes | memoryview], int]:
    content = msgspec.json.encode(header)
    content += b" " * (-len(content) % _ALIGNMENT)
    return [content, *raw], len(content)
