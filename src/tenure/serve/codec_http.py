"""Requests and answers of the v2 protocol as HTTP bodies, the server's side: JSON, and JSON followed by raw tensors.

A body with raw tensors starts with `Inference-Header-Content-Length` bytes of JSON; the tensors follow in order, each
`parameters.binary_data_size` long. Ours pads the JSON with spaces so that the first tensor lies aligned for the client.

Tensors are described, not touched: a request's JSON becomes a `Template`, which depends on nothing but the JSON, so that a
door keeps it for the next body that starts with the same bytes. Not here: sockets; the client's side (`http_client`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tenure.serve.codec_json import JsonData, slices, to_json
from tenure.serve.faults import InputRefused
from tenure.serve.plane import ALIGNMENT, Answer, Output, TensorRef, Wanted
from tenure.serve.tensors import (
    ModelMetadata,
    dtype_of,
    element_count,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
_FREE_BYTES = 1 << 20
_MAX_OBJECTS = 4096
"""In JSON longer than that: an object takes up to 20 times the memory of its text, and there must be few."""
_MAX_SHAPE_BYTES = 1024
_MAX_TENSORS = 1024
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
    shape: msgspec.Raw
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


_shape_decoder = msgspec.json.Decoder(list[int])
_request_decoder = msgspec.json.Decoder(_Request)


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
    if len(content) > _FREE_BYTES and sum(piece.count(b"{") for piece in slices(memoryview(content))) > _MAX_OBJECTS:
        raise InputRefused(f"JSON of more than {_FREE_BYTES} bytes may hold {_MAX_OBJECTS} objects; this one holds more")
    try:
        parsed = _request_decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"the request is not v2 JSON: {error}") from error
    asked = parsed.parameters
    if asked.sequence_id not in (0, ""):
        raise InputRefused("sequence_id is given, but models here keep no state between requests; send it without a sequence")
    if not 0 <= asked.priority < 1 << 32 or not 0 <= asked.timeout < 1 << 53:
        raise InputRefused(f"priority and timeout (microseconds) must not be negative; found {asked.priority}, {asked.timeout}")
    if max(len(parsed.inputs), len(parsed.outputs)) > _MAX_TENSORS:
        raise InputRefused(
            f"a request may name {_MAX_TENSORS} inputs and as many outputs;"
            f" found {len(parsed.inputs)} and {len(parsed.outputs)}"
        )
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
        # Parameters would be read as a binary tensor's by Triton's C++ client: an output in a region has none.
        if output.data is not None and (raw_outputs is None or output.name in raw_outputs):
            tensor["parameters"] = {"binary_data_size": output.data.nbytes}
            raw.append(output.data)
        elif output.data is not None:
            tensor["data"] = msgspec.Raw(to_json(output.data, output.datatype, output.shape))
        outputs.append(tensor)
    header: dict[str, Any] = {"id": id} if id else {}
    header |= {"model_name": answer.model, "model_version": answer.version, "outputs": outputs}
    return (_padded(header) if raw else msgspec.json.encode(header)), raw


def json_bytes(outputs: Sequence[Output], raw_outputs: frozenset[str] | None) -> int:
    """Return how many raw bytes of an answer's outputs are to be written as JSON."""
    if raw_outputs is None:
        return 0
    return sum(o.data.nbytes for o in outputs if o.data is not None and o.name not in raw_outputs)


def encode_metadata(metadata: ModelMetadata) -> bytes:
    """Return the JSON of a model's metadata."""
    return msgspec.json.encode(metadata)


def split(body: memoryview, header_length: int | None) -> tuple[memoryview, memoryview]:
    """Return the JSON of a body and what follows. Raises InputRefused."""
    if header_length is None:
        return body, body[:0]
    if not 0 <= header_length <= body.nbytes:
        raise InputRefused(f"{HEADER_LENGTH} is {header_length}; the body has {body.nbytes} bytes")
    return body[:header_length], body[header_length:]


def _inputs(parsed: Sequence[_Tensor]) -> tuple[list[TensorRef], dict[str, JsonData], int]:
    refs: list[TensorRef] = []
    typed: dict[str, JsonData] = {}
    seen: set[str] = set()
    at = 0
    for tensor in parsed:
        name, shape, given = tensor.name, _shape(tensor), tensor.parameters
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
            size = _sized(given.shared_memory_byte_size, tensor, shape)
            offset = _bounded(given.shared_memory_offset, name)
            refs.append(TensorRef(name, tensor.datatype, shape, offset, size, given.shared_memory_region))
        elif given.binary_data_size is not None:
            size = _sized(given.binary_data_size, tensor, shape)
            refs.append(TensorRef(name, tensor.datatype, shape, at, size))
            at += size
        else:
            typed[name] = data = JsonData(memoryview(tensor.data), tensor.datatype, shape, tensor=name)
            refs.append(TensorRef(name, tensor.datatype, shape, 0, data.nbytes))
    return refs, typed, at


def _shape(tensor: _Tensor) -> tuple[int, ...]:
    text = memoryview(tensor.shape)
    if len(text) > _MAX_SHAPE_BYTES:
        raise InputRefused(f'the shape of input "{tensor.name[:80]}" takes {len(text)} bytes, the limit is {_MAX_SHAPE_BYTES}')
    try:
        return tuple(_shape_decoder.decode(text))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputRefused(f'the shape of input "{tensor.name[:80]}" is not v2 JSON: {error}') from error


def _sized(size: int, tensor: _Tensor, shape: tuple[int, ...]) -> int:
    """Return a claimed size that fits datatype and shape. Raises InputRefused."""
    dtype = dtype_of(tensor.datatype, tensor=tensor.name)
    count = element_count(shape, tensor=tensor.name)
    least = count * (4 if dtype.kind == "O" else dtype.itemsize)
    if _bounded(size, tensor.name) != least and (dtype.kind != "O" or size < least):
        raise InputRefused(
            f'input "{tensor.name[:80]}" claims {size} bytes; {tensor.datatype} of shape {list(shape)} takes {least}'
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


def _padded(header: dict[str, Any]) -> bytes:
    content = msgspec.json.encode(header)
    return content + b" " * (-len(content) % ALIGNMENT)


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given
