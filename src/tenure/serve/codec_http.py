"""Requests and answers of the v2 protocol as HTTP bodies: JSON, and JSON followed by raw tensors; both sides.

Used by the HTTP door and the HTTP transport of the client, which share nothing else. No sockets here.
A body with raw tensors starts with `Inference-Header-Content-Length` bytes of JSON; the tensors follow in order, each
`parameters.binary_data_size` long. Ours pads the JSON with spaces so that the first tensor lies aligned: no copy needed.

The server's side describes tensors and touches none: a request's JSON becomes a `Template`, which depends on nothing but the
JSON, so that a door keeps it for the next body that starts with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from tenure.serve.codec_json import JsonData, to_json
from tenure.serve.faults import InputRefused
from tenure.serve.plane import ALIGNMENT, Answer, Output, TensorRef, Wanted
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
_MAX_BYTES = 1 << 48
"""Larger claims than this are nonsense on any machine; they stay small integers everywhere."""


class _Placing(msgspec.Struct, frozen=True):
    binary_data_size: int | None = None
    shared_memory_region: str = ""
    shared_memory_byte_size: int | None = None
    shared_memory_offset: int = 0


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: _Placing = _Placing()
    data: msgspec.Raw = msgspec.Raw()


class _OutputPlacing(msgspec.Struct, frozen=True):
    binary_data: bool | None = None
    classification: int = 0
    shared_memory_region: str = ""
    shared_memory_byte_size: int = 0
    shared_memory_offset: int = 0


class _Wanted(msgspec.Struct):
    name: str
    parameters: _OutputPlacing = _OutputPlacing()


class _Parameters(msgspec.Struct, frozen=True):
    binary_data_output: bool = False
    priority: int = 0
    timeout: int = 0
    sequence_id: int | str = 0


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: _Parameters = _Parameters()
    outputs: list[_Wanted] = []


class _Answer(msgspec.Struct):
    model_name: str
    outputs: list[_Tensor]
    model_version: str = ""
    id: str = ""


class _Metadata(msgspec.Struct):
    name: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    platform: str = ""
    versions: list[str] = []


_request_decoder = msgspec.json.Decoder(_Request)
_answer_decoder = msgspec.json.Decoder(_Answer)
_metadata_decoder = msgspec.json.Decoder(_Metadata)


@dataclass(slots=True, eq=False)
class Template:
    """What the JSON of a request says. Offsets of raw inputs count from the first byte after the JSON."""

    inputs: tuple[TensorRef, ...]
    outputs: tuple[Wanted, ...]
    raw_outputs: frozenset[str] | None
    """Names of outputs to send raw; None: all."""
    raw_bytes: int
    """What follows the JSON."""
    id: str = ""
    priority: int = 0
    timeout_s: float = 0.0
    heads: dict[Any, bytes] = field(default_factory=dict)
    """The door's: answers' heads by the shapes of their outputs."""
    last: tuple[Any, bytes] = (None, b"")
    """The door's: the newest of them."""


@dataclass(slots=True, eq=False)
class TypedRequest:
    """A request of which at least one tensor is written as JSON."""

    template: Template
    """Its inputs' offsets count from the start of what `write` fills."""
    nbytes: int
    """All tensors in the raw layout, one after the other, each aligned."""
    _typed: tuple[tuple[TensorRef, JsonData], ...]
    _moved: tuple[tuple[TensorRef, int], ...]

    def write(self, into: memoryview, raw: memoryview) -> None:
        """Fill the request's tensors in, taking those that came raw from `raw`. Raises InputRefused."""
        for ref, data in self._typed:
            data.write(into[ref.offset : ref.offset + ref.nbytes])
        for ref, at in self._moved:
            into[ref.offset : ref.offset + ref.nbytes] = raw[at : at + ref.nbytes]


def decode_request(content: bytes | memoryview) -> Template | TypedRequest:
    """Return what the JSON of a request says; content is that JSON alone. Raises InputRefused."""
    parsed = _parse(_request_decoder, content, "request")
    asked = parsed.parameters
    if asked.sequence_id not in (0, ""):
        raise InputRefused("sequence_id is given, but models here keep no state between requests; send it without a sequence")
    if not 0 <= asked.priority < 1 << 32 or not 0 <= asked.timeout < 1 << 53:
        raise InputRefused(f"priority and timeout (microseconds) must not be negative; found {asked.priority}, {asked.timeout}")
    refs, typed, raw_bytes = _inputs(parsed.inputs)
    default = asked.binary_data_output
    template = Template(
        inputs=tuple(refs),
        outputs=tuple(_wanted(output) for output in parsed.outputs),
        raw_outputs=None
        if default and not parsed.outputs
        else frozenset(o.name for o in parsed.outputs if _or(o.parameters.binary_data, default)),
        raw_bytes=raw_bytes,
        id=parsed.id,
        priority=asked.priority,
        timeout_s=asked.timeout / 1e6,
    )
    return _packed(template, typed) if typed else template


def answer_json(answer: Answer, id: str, raw_outputs: frozenset[str] | None) -> tuple[bytes, list[memoryview]]:
    """Return an answer's JSON and the raw outputs that follow it, none if the JSON is all. Reads outputs sent as JSON."""
    outputs: list[dict[str, Any]] = []
    raw: list[memoryview] = []
    for output in answer.outputs:
        tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.data is None:
            tensor["parameters"] = {
                "shared_memory_region": output.region,
                "shared_memory_byte_size": output.nbytes,
                "shared_memory_offset": output.offset,
            }
        elif raw_outputs is None or output.name in raw_outputs:
            tensor["parameters"] = {"binary_data_size": output.data.nbytes}
            raw.append(output.data)
        else:
            tensor["data"] = msgspec.Raw(to_json(output.data, output.datatype, output.shape))
        outputs.append(tensor)
    header: dict[str, Any] = {"id": id} if id else {}
    header |= {"model_name": answer.model, "model_version": answer.version, "outputs": outputs}
    return (_padded(header) if raw else msgspec.json.encode(header)), raw


def json_elements(outputs: Sequence[Output], raw_outputs: frozenset[str] | None) -> int:
    """Return how many bytes of an answer's outputs must be written as JSON."""
    if raw_outputs is None:
        return 0
    return sum(o.data.nbytes for o in outputs if o.data is not None and o.name not in raw_outputs)


def encode_request(
    inputs: Mapping[str, Array | TensorRef],
    outputs: Sequence[str | Wanted] = (),
    *,
    id: str = "",
    priority: int = 0,
    timeout_s: float = 0.0,
) -> tuple[list[bytes | memoryview], int]:
    """Return the parts of a body with raw tensors both ways, and the length of its JSON, which is the first part.

    inputs: an array is sent raw; a TensorRef tells in which registered region the tensor lies. outputs: a Wanted with a
    region has the server write it there. Raises InputRefused for arrays the protocol has no name for.
    """
    tensors: list[dict[str, Any]] = []
    raw: list[bytes | memoryview] = []
    for name, given in inputs.items():
        if isinstance(given, TensorRef):
            placing = _place(given.region, given.offset, given.nbytes)
            tensors.append({"name": name, "datatype": given.datatype, "shape": given.shape, "parameters": placing})
        else:
            raw.append(to_raw(given))
            placing = {"binary_data_size": len(raw[-1])}
            tensors.append({"name": name, "datatype": datatype_of(given), "shape": given.shape, "parameters": placing})
    parameters: dict[str, Any] = {"binary_data_output": True}
    if priority:
        parameters["priority"] = priority
    if timeout_s:
        parameters["timeout"] = max(1, round(timeout_s * 1e6))
    header: dict[str, Any] = {"id": id} if id else {}
    header |= {"inputs": tensors, "parameters": parameters}
    if outputs:
        header["outputs"] = [_ask(output) for output in outputs]
    content = _padded(header)
    return [content, *raw], len(content)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer as the client reads it."""

    model: str
    version: str
    id: str
    outputs: dict[str, Array]
    """Those in the body; they may lie in the body's memory."""
    placed: dict[str, TensorRef]
    """Those the server wrote to a region."""


def decode_answer(body: bytes | bytearray | memoryview, header_length: int | None) -> HttpAnswer:
    """Return the answer in a body, raw outputs without a copy. Raises InputRefused when it does not follow the protocol."""
    view = memoryview(body)
    content, raw = split(view, header_length)
    parsed = _parse(_answer_decoder, content, "answer")
    outputs: dict[str, Array] = {}
    placed: dict[str, TensorRef] = {}
    at = 0
    for tensor in parsed.outputs:
        name, given = tensor.name, tensor.parameters
        if name in outputs or name in placed:
            raise InputRefused(f'output "{name[:80]}" is given twice')
        shape = tuple(tensor.shape)
        if given.shared_memory_region:
            size = _bounded(given.shared_memory_byte_size or 0, name)
            placed[name] = TensorRef(name, tensor.datatype, shape, given.shared_memory_offset, size, given.shared_memory_region)
        elif given.binary_data_size is None:
            outputs[name] = _from_json(tensor)
        else:
            size = _bounded(given.binary_data_size, name)
            if size > raw.nbytes - at:
                raise InputRefused(f'output "{name[:80]}" claims {size} raw bytes; {raw.nbytes - at} are left in the body')
            outputs[name] = from_raw(raw[at : at + size], tensor.datatype, shape, tensor=name)
            at += size
    if at != raw.nbytes:
        raise InputRefused(f"{raw.nbytes - at} bytes follow the last raw output")
    return HttpAnswer(parsed.model_name, parsed.model_version, parsed.id, outputs, placed)


def encode_metadata(metadata: ModelMetadata) -> bytes:
    """Return the JSON of a model's metadata."""
    return msgspec.json.encode(metadata)


def decode_metadata(body: bytes) -> ModelMetadata:
    """Return a model's metadata. Raises InputRefused when the JSON does not follow the protocol."""
    found = _parse(_metadata_decoder, body, "metadata")
    return ModelMetadata(
        name=found.name,
        versions=tuple(found.versions),
        platform=found.platform,
        inputs=tuple(found.inputs),
        outputs=tuple(found.outputs),
    )


def split(body: memoryview, header_length: int | None) -> tuple[memoryview, memoryview]:
    """Return the JSON of a body and what follows. Raises InputRefused."""
    if header_length is None:
        return body, body[:0]
    if not 0 <= header_length <= body.nbytes:
        raise InputRefused(f"{HEADER_LENGTH} is {header_length}; the body has {body.nbytes} bytes")
    return body[:header_length], body[header_length:]


def _parse(decoder: msgspec.json.Decoder[Any], content: bytes | memoryview, what: str) -> Any:
    try:
        return decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"the {what} is not v2 JSON: {error}") from error


def _inputs(parsed: Sequence[_Tensor]) -> tuple[list[TensorRef], dict[str, JsonData], int]:
    refs: list[TensorRef] = []
    typed: dict[str, JsonData] = {}
    seen: set[str] = set()
    at = 0
    for tensor in parsed:
        name, shape, given = tensor.name, tuple(tensor.shape), tensor.parameters
        if name in seen:
            raise InputRefused(f'input "{name[:80]}" is given twice')
        seen.add(name)
        ways = (given.binary_data_size is not None, bool(given.shared_memory_region), bool(tensor.data))
        if sum(ways) > 1:
            raise InputRefused(
                f'input "{name[:80]}" is given more than one way; use one of "data", "binary_data_size", "shared_memory_region"'
            )
        if given.shared_memory_region:
            if given.shared_memory_byte_size is None:
                raise InputRefused(f'input "{name[:80]}" names a region without "shared_memory_byte_size"')
            size = _sized(given.shared_memory_byte_size, tensor)
            offset = _bounded(given.shared_memory_offset, name)
            refs.append(TensorRef(name, tensor.datatype, shape, offset, size, given.shared_memory_region))
        elif given.binary_data_size is not None:
            size = _sized(given.binary_data_size, tensor)
            refs.append(TensorRef(name, tensor.datatype, shape, at, size))
            at += size
        else:
            typed[name] = data = JsonData(bytes(tensor.data), tensor.datatype, shape, tensor=name)
            refs.append(TensorRef(name, tensor.datatype, shape, 0, data.nbytes))
    return refs, typed, at


def _sized(size: int, tensor: _Tensor) -> int:
    """Return a claimed size that fits datatype and shape. Raises InputRefused."""
    dtype = dtype_of(tensor.datatype, tensor=tensor.name)
    count = element_count(tensor.shape, tensor=tensor.name)
    least = count * (4 if dtype.kind == "O" else dtype.itemsize)
    if _bounded(size, tensor.name) != least and (dtype.kind != "O" or size < least):
        raise InputRefused(
            f'input "{tensor.name[:80]}" claims {size} bytes; {tensor.datatype} of shape {tensor.shape} takes {least}'
            + (" or more" if dtype.kind == "O" else "")
        )
    return size


def _bounded(size: int, name: str) -> int:
    if not 0 <= size < _MAX_BYTES:
        raise InputRefused(f'tensor "{name[:80]}" claims {size} as a size or an offset in bytes')
    return size


def _wanted(output: _Wanted) -> Wanted:
    given = output.parameters
    if given.classification:
        raise InputRefused(
            f'output "{output.name[:80]}" asks for classification, which is not offered; ask for the output itself'
        )
    if not given.shared_memory_region:
        return Wanted(output.name)
    size, offset = _bounded(given.shared_memory_byte_size, output.name), _bounded(given.shared_memory_offset, output.name)
    return Wanted(output.name, given.shared_memory_region, offset, size)


def _packed(template: Template, typed: Mapping[str, JsonData]) -> TypedRequest:
    """Lay typed and raw inputs out in one buffer."""
    at = 0
    inputs: list[TensorRef] = []
    pairs: list[tuple[TensorRef, JsonData]] = []
    moved: list[tuple[TensorRef, int]] = []
    for ref in template.inputs:
        if ref.region:
            inputs.append(ref)
            continue
        placed = TensorRef(ref.name, ref.datatype, ref.shape, at, ref.nbytes)
        inputs.append(placed)
        if ref.name in typed:
            pairs.append((placed, typed[ref.name]))
        else:
            moved.append((placed, ref.offset))
        at += ref.nbytes + -ref.nbytes % ALIGNMENT
    template.inputs = tuple(inputs)
    return TypedRequest(template, at, tuple(pairs), tuple(moved))


def _from_json(tensor: _Tensor) -> Array:
    data = JsonData(bytes(tensor.data), tensor.datatype, tensor.shape, tensor=tensor.name)
    raw = np.empty(data.nbytes, np.uint8)
    data.write(raw.data)
    return from_raw(raw.data, tensor.datatype, tensor.shape, tensor=tensor.name)


def _place(region: str, offset: int, nbytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {"shared_memory_region": region, "shared_memory_byte_size": nbytes}
    if offset:
        found["shared_memory_offset"] = offset
    return found


def _ask(output: str | Wanted) -> dict[str, Any]:
    if isinstance(output, Wanted) and output.region:
        return {"name": output.name, "parameters": _place(output.region, output.offset, output.nbytes)}
    return {"name": output if isinstance(output, str) else output.name, "parameters": {"binary_data": True}}


def _padded(header: dict[str, Any]) -> bytes:
    content = msgspec.json.encode(header)
    return content + b" " * (-len(content) % ALIGNMENT)


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given
