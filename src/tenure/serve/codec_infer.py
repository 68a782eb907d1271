"""Inference messages of the v2 protocol over gRPC, read and written by hand: the server's side, on its hot path.

A ModelInferRequest is walked at its top level only. Its raw contents are described where they lie; the rest (names,
shapes, parameters) goes through protobuf, and what it says is kept by its bytes, for clients send it again and again.
Answers are a kept head and the outputs. Not here: messages as arrays (`codec_grpc`), HTTP/2 (`http2`).
Sources: protocolbuffers.dev "Encoding"; grpc_service.proto; the shared memory and schedule policy extensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from tenure.serve import v2
from tenure.serve.codec_grpc import typed_array
from tenure.serve.faults import InputRefused, TooLarge
from tenure.serve.plane import ALIGNMENT, Answer, Output, TensorRef, Wanted
from tenure.serve.tensors import dtype_of, element_count, to_raw

MAX_DESCRIPTION = 4 << 20
"""Longest request, raw contents left out. Typed contents are in it: larger tensors are to be sent raw."""
MAX_FIELDS, MAX_TENSORS, MAX_PARAMETERS = 8192, 1024, 64
"""Top-level fields of a request; inputs, and outputs asked for; parameters of one thing: read one by one, in Python."""
_KEPT = 256
_KEPT_BYTES = 4096
"""How many descriptions are kept, and the longest."""
_KEPT_LENGTHS, _KEPT_HEADS = 64, 8
"""How many lengths of messages are known, and heads per length."""
_ID, _RAW = 0x1A, 0x3A
_TRUNCATED = "the request is not a ModelInferRequest: it ends inside a field"
_FINAL = "triton_final_response"


@dataclass(slots=True, eq=False)
class Template:
    """What a request says, its id and its raw contents aside."""

    model: str
    version: str
    inputs: tuple[TensorRef, ...]
    """Offsets count from the start of the message plus `shift`."""
    outputs: tuple[Wanted, ...]
    priority: int
    timeout_s: float
    shift: int
    """Where in its buffer the message should start, so that its first raw content is aligned."""
    buffered: bool
    """Whether any input lies in the buffer."""
    final: bool = False
    """Whether each answer on a stream is to be marked as the last of its request."""
    typed: tuple[tuple[int, Any], ...] = ()
    """Inputs that came as typed contents: where in the buffer each belongs, and its raw layout."""
    typed_bytes: int = 0


class RequestReader:
    """Reads ModelInferRequests, and remembers what they said."""

    def __init__(self) -> None:
        self._templates: dict[tuple[bytes, tuple[tuple[int, int], ...]], Template] = {}
        self._heads: dict[int, tuple[int, dict[bytes, Template]]] = {}
        """Message length → length and bytes of what precedes its only raw content: the same bytes say the same."""

    def read(self, data: memoryview, start: int, stop: int) -> tuple[Template, str]:
        """Return what the message data[start:stop] says, and its id. Raises InputRefused."""
        guess = self._heads.get(stop - start)
        if guess is not None:
            found = guess[1].get(bytes(data[start : start + guess[0]]))
            if found is not None:
                return found, ""
        rest, raws, id = split(data, start, stop)
        key = rest, raws
        template = self._templates.get(key)
        if template is None:
            template = describe(rest, raws)
            if template.typed or len(rest) > _KEPT_BYTES:
                return template, id
            _keep(self._templates, key, template)
        if not id and len(raws) == 1 and sum(raws[0]) == stop - start and raws[0][0] <= _KEPT_BYTES:
            known = self._heads.get(stop - start)
            if known is None or known[0] != raws[0][0]:
                known = raws[0][0], {}
                _keep(self._heads, stop - start, known, _KEPT_LENGTHS)
            _keep(known[1], bytes(data[start : start + raws[0][0]]), template, _KEPT_HEADS)
        return template, id


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int = _KEPT) -> None:
    while len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value


def split(data: memoryview, start: int, stop: int) -> tuple[bytes, tuple[tuple[int, int], ...], str]:
    """Return a message's other fields, where its raw contents lie (from `start`; length), and its id.

    Raises InputRefused for bytes that are no message, and for groups, which no message of the protocol has.
    """
    at, since, left = start, start, MAX_FIELDS
    rest: list[bytes] = []
    raws: list[tuple[int, int]] = []
    id = ""
    while at < stop:
        field = at
        left -= 1
        if not left:
            raise InputRefused(f"the request has more than {MAX_FIELDS} fields")
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = _varint(data, field, stop, 5)
        kind = tag & 7
        if not 8 <= tag < 1 << 32:
            raise InputRefused("the request is not a ModelInferRequest: it has a field number out of range")
        if kind == 2:
            if at >= stop:
                raise InputRefused(_TRUNCATED)
            length = data[at]
            at += 1
            if length > 127:
                length, at = _varint(data, at - 1, stop, 5)
            if length > stop - at:
                raise InputRefused(_TRUNCATED)
            if tag in (_RAW, _ID):
                if field > since:
                    rest.append(bytes(data[since:field]))
                if tag == _RAW:
                    raws.append((at - start, length))
                else:
                    id = _text(data, at, length)
                since = at + length
            at += length
        elif kind == 0:
            _, at = _varint(data, at, stop, 10)
        elif kind == 1 or kind == 5:
            at += 8 if kind == 1 else 4
        else:
            raise InputRefused("the request is not a ModelInferRequest: it has a field of a type the protocol does not use")
    if at > stop:
        raise InputRefused(_TRUNCATED)
    if since < stop:
        rest.append(bytes(data[since:stop]))
    return rest[0] if len(rest) == 1 else b"".join(rest), tuple(raws), id


def first_raw(data: memoryview, start: int, stop: int) -> int:
    """Return where, from `start`, the first raw content of a message lies of which data[start:stop] is here; else 0.

    Looks at the first 256 fields only.
    """
    at, left = start, 256
    try:
        while at < stop and left:
            left -= 1
            tag, at = _varint(data, at, stop, 5)
            if tag & 7 == 2:
                length, at = _varint(data, at, stop, 5)
                if tag == _RAW:
                    return at - start
                at += length
            elif tag & 7 == 0:
                _, at = _varint(data, at, stop, 10)
            else:
                at += {1: 8, 5: 4}[tag & 7]
    except (InputRefused, KeyError):
        pass
    return 0


def _varint(data: memoryview, at: int, stop: int, most: int) -> tuple[int, int]:
    value = shift = 0
    last = at + most
    while at < stop and at < last:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise InputRefused(_TRUNCATED)


def _text(data: memoryview, at: int, length: int) -> str:
    try:
        return str(data[at : at + length], "utf-8")
    except UnicodeDecodeError as error:
        raise InputRefused("the request is not a ModelInferRequest: its id is not UTF-8") from error


def describe(rest: bytes, raws: Sequence[tuple[int, int]]) -> Template:
    """Return what a message says: its fields without raw contents, and where those lie. Raises InputRefused, TooLarge."""
    if len(rest) > MAX_DESCRIPTION:
        raise TooLarge(
            f"the request has {len(rest)} bytes besides its raw contents; at most {MAX_DESCRIPTION} are taken. "
            "Send large tensors as raw_input_contents"
        )
    try:
        message = v2.ModelInferRequest.FromString(rest)
    except DecodeError as error:
        raise InputRefused(f"the request is not a ModelInferRequest: {error}") from error
    if max(len(message.inputs), len(message.outputs)) > MAX_TENSORS:
        found = f"{len(message.inputs)} inputs and asks for {len(message.outputs)} outputs"
        raise InputRefused(f"the request has {found}; at most {MAX_TENSORS} of each are taken")
    asked = _parameters(message.parameters, "the request")
    if asked.get("sequence_id", 0) not in (0, ""):
        raise InputRefused("sequence_id is given, but models here keep no state between requests; send it without a sequence")
    priority = _whole(asked, "priority", 32)
    timeout_us = _whole(asked, "timeout", 53)
    here = sum(1 for tensor in message.inputs if "shared_memory_region" not in tensor.parameters)
    if raws and len(raws) != here:
        raise InputRefused(
            f"{here} inputs outside of shared memory come with {len(raws)} raw contents; there must be one for each, or none"
        )
    shift = -raws[0][0] % ALIGNMENT if raws else 0
    inputs, typed, names, room = [], [], set(), 0
    left = iter(raws)
    for tensor in message.inputs:
        if tensor.name in names:
            raise InputRefused(f'input "{tensor.name[:80]}" is given twice')
        names.add(tensor.name)
        if "shared_memory_region" in tensor.parameters:
            if tensor.HasField("contents"):
                raise InputRefused(f'input "{tensor.name[:80]}" has both contents and a shared-memory region')
            inputs.append(_in_region(tensor))
        elif raws:
            at, nbytes = next(left)
            if tensor.HasField("contents"):
                raise InputRefused(f'input "{tensor.name[:80]}" has both typed and raw contents')
            inputs.append(_ref(tensor, at + shift, nbytes))
        else:
            raw = to_raw(typed_array(tensor))
            typed.append((room, raw))
            inputs.append(_ref(tensor, room, len(raw)))
            room += -(-len(raw) // ALIGNMENT) * ALIGNMENT
    return Template(
        model=message.model_name,
        version=message.model_version,
        inputs=tuple(inputs),
        outputs=_wanted(message.outputs),
        priority=priority,
        timeout_s=timeout_us / 1e6,
        shift=shift,
        buffered=bool(raws or room),
        final=asked.get("triton_enable_empty_final_response") is True,
        typed=tuple(typed),
        typed_bytes=room,
    )


def _ref(tensor: Any, offset: int, nbytes: int, region: str = "") -> TensorRef:
    dtype = dtype_of(tensor.datatype, tensor=tensor.name)
    count = element_count(tensor.shape, tensor=tensor.name)
    if dtype.kind != "O" and nbytes != count * dtype.itemsize:
        raise InputRefused(
            f'tensor "{tensor.name}" carries {nbytes} bytes; {tensor.datatype} of shape {list(tensor.shape)} takes '
            f"{count * dtype.itemsize}"
        )
    return TensorRef(tensor.name, tensor.datatype, tuple(tensor.shape), offset, nbytes, region)


def _in_region(tensor: Any) -> TensorRef:
    region, offset, nbytes = _placing(tensor)
    return _ref(tensor, offset, nbytes, region)


def _placing(tensor: Any) -> tuple[str, int, int]:
    asked = _parameters(tensor.parameters, f'tensor "{tensor.name[:80]}"')
    region = asked.get("shared_memory_region")
    if not isinstance(region, str) or not region:
        raise InputRefused(f'tensor "{tensor.name[:80]}" needs the name of a region as shared_memory_region')
    return region, _whole(asked, "shared_memory_offset", 53), _whole(asked, "shared_memory_byte_size", 53)


def _wanted(outputs: Any) -> tuple[Wanted, ...]:
    found, names = [], set()
    for output in outputs:
        if output.name in names:
            raise InputRefused(f'output "{output.name[:80]}" is asked for twice')
        names.add(output.name)
        if "classification" in output.parameters:
            raise InputRefused(f'output "{output.name[:80]}": classification is not offered; ask for the tensor')
        if "shared_memory_region" in output.parameters:
            found.append(Wanted(output.name, *_placing(output)))
        else:
            found.append(Wanted(output.name))
    return tuple(found)


def _parameters(parameters: Any, what: str) -> dict[str, Any]:
    asked = {}
    if len(parameters) > MAX_PARAMETERS:
        raise InputRefused(f"{what} has {len(parameters)} parameters; at most {MAX_PARAMETERS} are taken")
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise InputRefused(f'{what} has the parameter "{name[:80]}" without a value')
        asked[name] = getattr(value, kind)
    return asked


def _whole(asked: dict[str, Any], name: str, bits: int) -> int:
    value = asked.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise InputRefused(f"{name} must be a whole number from 0 to {(1 << bits) - 1}; found {str(value)[:80]}")
    return value


class AnswerWriter:
    """Writes ModelInferResponses as gRPC messages, and remembers their heads."""

    def __init__(self) -> None:
        self._heads: dict[Any, tuple[bytes, list[bytes], int]] = {}

    def unary(self, answer: Answer, id: str) -> tuple[list[bytes | memoryview], int]:
        """Return the pieces of the message with its gRPC prefix, and their length in bytes."""
        parts, nbytes = self._parts(answer, id, False)
        parts.insert(0, b"\0" + nbytes.to_bytes(4, "big"))
        return parts, nbytes + 5

    def streamed(self, answer: Answer, id: str, final: bool) -> tuple[list[bytes | memoryview], int]:
        """Return the same as a ModelStreamInferResponse."""
        parts, nbytes = self._parts(answer, id, final)
        outer = b"\x12" + encode_varint(nbytes)
        nbytes += len(outer)
        parts.insert(0, b"\0" + nbytes.to_bytes(4, "big") + outer)
        return parts, nbytes + 5

    def _parts(self, answer: Answer, id: str, final: bool) -> tuple[list[bytes | memoryview], int]:
        outputs = answer.outputs
        if len(outputs) == 1:
            o = outputs[0]
            key: Any = (answer.model, answer.version, final, o.name, o.shape, o.datatype, _length(o), o.region, o.offset)
        else:
            described = ((o.name, o.shape, o.datatype, _length(o), o.region, o.offset) for o in outputs)
            key = (answer.model, answer.version, final, *described)
        found = self._heads.get(key)
        if found is None:
            found = self._head(answer, final)
            _keep(self._heads, key, found)
        head, marks, nbytes = found
        parts: list[bytes | memoryview] = [head]
        if id:
            encoded = id.encode()
            named = b"\x1a" + encode_varint(len(encoded)) + encoded
            parts.append(named)
            nbytes += len(named)
        for mark, output in zip(marks, outputs, strict=True):
            parts.append(mark)
            if output.data is not None:
                parts.append(output.data)
        return parts, nbytes

    @staticmethod
    def _head(answer: Answer, final: bool) -> tuple[bytes, list[bytes], int]:
        """Return all but id and contents, what precedes each output's content, and the length of it all."""
        message = v2.ModelInferResponse(model_name=answer.model, model_version=answer.version)
        marks, nbytes = [], 0
        for output in answer.outputs:
            tensor = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            length = output.data.nbytes if output.data is not None else 0
            if output.data is None:
                tensor.parameters["shared_memory_region"].string_param = output.region
                tensor.parameters["shared_memory_offset"].int64_param = output.offset
                tensor.parameters["shared_memory_byte_size"].int64_param = output.nbytes
            # Clients count raw contents by output: one that lies in a region has an empty one.
            marks.append(b"\x32" + encode_varint(length))
            nbytes += len(marks[-1]) + length
        if final:
            message.parameters[_FINAL].bool_param = True
        head = message.SerializeToString()
        return head, marks, nbytes + len(head)


def stream_error(reason: str, id: str) -> bytes:
    """Return a ModelStreamInferResponse for a request that was not answered, as a gRPC message."""
    message = v2.ModelStreamInferResponse(error_message=reason)
    if id:
        message.infer_response.id = id
    content: bytes = message.SerializeToString()
    return b"\0" + len(content).to_bytes(4, "big") + content


def encode_varint(value: int) -> bytes:
    """Return a whole number as protobuf writes it."""
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _length(output: Output) -> int:
    return output.nbytes if output.data is None else output.data.nbytes
