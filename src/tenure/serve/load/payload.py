"""What is sent: inputs drawn by a seed or read from a file, encoded once before the run for the wire that carries them.

During the run a request is only looked up. Not here: sending (`http_wire`, `grpc_wire`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tenure.errors import NotFound, SpecError
from tenure.serve import v2
from tenure.serve.http_client.v2json import infer_head, model_path, post_head
from tenure.serve.load.grpc_message import Message, header_block
from tenure.serve.tensors import DTYPES, Array, ModelMetadata, TensorMetadata, datatype_of, to_raw

MAX_BYTES = 256 << 20
"""Of all requests kept encoded."""
MAX_DIFFERENT = 64
"""Requests that are kept encoded; the run draws from them."""
_ID = "load"
"""Of every request: a server that needs one (KServe over HTTP) may have it."""
_MAX_WHOLE = 256
"""Random whole numbers lie below it, and so within any whole type, as a pixel does."""

Inputs = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the user says of one input."""

    lengths: tuple[int, ...]
    """Beside the batch."""
    datatype: str = ""
    """The protocol's name of its type; needed only where the server does not say which inputs a model has."""


def inputs_of(metadata: ModelMetadata, shapes: Mapping[str, Shape]) -> tuple[TensorMetadata, ...]:
    """Return a model's inputs as the server tells them, or where it tells none, as the user does. Raises SpecError."""
    if metadata.inputs:
        if unknown := set(shapes) - {meta.name for meta in metadata.inputs}:
            known = ", ".join(meta.name for meta in metadata.inputs)
            raise SpecError(f"the model has no input {sorted(unknown)[0]!r}; it has {known}")
        return metadata.inputs
    if not shapes or not all(shape.datatype in DTYPES for shape in shapes.values()):
        raise SpecError(
            f"the server does not say which inputs {metadata.name} has: say it, each with its type ({', '.join(DTYPES)}), "
            "as in --shape x:FP32:1024"
        )
    return tuple(TensorMetadata(name, shape.datatype, (-1, *shape.lengths)) for name, shape in shapes.items())


def random_inputs(
    metadata: ModelMetadata, *, batch: int, shapes: Mapping[str, Shape], seed: int, count: int
) -> Iterator[Inputs]:
    """Yield `count` requests of random numbers: floats from 0 to 1, whole ones from 0 to 255 (127 where signed in 8 bits).

    shapes: of inputs whose metadata leaves lengths open. Raises SpecError.
    """
    inputs = inputs_of(metadata, shapes)
    wanted = {meta.name: shape_of(meta, batch, shapes[meta.name].lengths if meta.name in shapes else None) for meta in inputs}
    chance = np.random.default_rng(seed)
    for _ in range(count):
        yield {meta.name: _drawn(chance, meta, wanted[meta.name]) for meta in inputs}


def file_inputs(path: Path, metadata: ModelMetadata, *, batch: int) -> Iterator[Inputs]:
    """Yield requests of `batch` rows each from a .npy (a model with one input) or .npz file (arrays by input name).

    Rows past the last whole batch are left out, and so are requests past `MAX_DIFFERENT`. Raises NotFound, SpecError.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise NotFound(f"the inputs {path} cannot be read: {error}") from error
    except ValueError as error:
        raise SpecError(f"{path} is not a .npy or .npz file of plain numbers: {error}") from error
    types = {meta.name: DTYPES.get(meta.datatype) for meta in metadata.inputs}
    if not isinstance(found, np.ndarray):
        arrays = {name: found[name] for name in types or found.files if name in found.files}
        types = types or dict.fromkeys(arrays)
        if missing := [name for name in types if name not in arrays]:
            raise SpecError(f"{path} has no array {missing[0]!r}, which {metadata.name} takes")
    elif len(types) == 1:
        arrays = {next(iter(types)): found}
    else:
        names = f"takes the inputs {', '.join(types)}" if types else "has inputs whose names its server does not tell"
        raise SpecError(f"{metadata.name} {names}: give a .npz with their names, not {path}")
    rows = min((len(array) if array.ndim else 0 for array in arrays.values()), default=0)
    if rows < batch:
        raise SpecError(f"{path} has {rows} rows; a request takes {batch}")
    for start in range(0, min(rows - batch + 1, batch * MAX_DIFFERENT), batch):
        yield {name: np.ascontiguousarray(array[start : start + batch], dtype=types[name]) for name, array in arrays.items()}


def shape_of(meta: TensorMetadata, batch: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """Return the shape to send for an input: an open first length is the batch. Raises SpecError for others left open."""
    batched = bool(meta.shape) and meta.shape[0] < 0
    if batch > 1 and not batched:
        raise SpecError(
            f'the input "{meta.name}" has the fixed shape {list(meta.shape)}, which leaves no room for a batch of {batch}'
        )
    rest = tuple(meta.shape[1:] if batched else meta.shape)
    if given is not None:
        if len(given) != len(rest) or any(have < 1 or want not in (-1, have) for have, want in zip(given, rest, strict=True)):
            raise SpecError(f'the input "{meta.name}" has the shape {list(rest)} beside the batch; found {list(given)}')
        rest = tuple(given)
    if any(length < 0 for length in rest):
        example = ",".join(str(length) if length > 0 else "128" for length in rest)
        raise SpecError(
            f'the input "{meta.name}" has the shape {list(rest)}, open at -1: say which, as in --shape {meta.name}:{example}'
        )
    return ((batch, *rest)) if batched else rest


def http_requests(address: str, model: str, inputs: Sequence[Inputs], *, json: bool = False) -> list[bytes]:
    """Return whole HTTP requests, tensors raw after their JSON (the protocol's binary extension), or all in JSON.

    Raises SpecError past `MAX_BYTES`.
    """
    encode = _json if json else _binary
    return _bounded(encode(address, model, each) for each in inputs)


def grpc_requests(address: str, model: str, inputs: Sequence[Inputs]) -> list[Message]:
    """Return whole gRPC requests, tensors raw. Raises SpecError past `MAX_BYTES`."""
    block = header_block(address)
    return [Message(block, message) for message in _bounded(_message(model, each) for each in inputs)]


def _binary(address: str, model: str, inputs: Inputs) -> bytes:
    raws = [to_raw(array) for array in inputs.values()]
    return infer_head(address, model, inputs, [len(raw) for raw in raws], (), id=_ID) + b"".join(raws)


def _json(address: str, model: str, inputs: Inputs) -> bytes:
    tensors = [
        {"name": name, "datatype": datatype_of(array), "shape": list(array.shape), "data": _plain(array)}
        for name, array in inputs.items()
    ]
    body = msgspec.json.encode({"id": _ID, "inputs": tensors})
    return post_head(address, f"{model_path(model)}/infer", len(body), "Content-Type: application/json") + body


def _plain(array: Array) -> list[Any]:
    flat = array.reshape(-1).tolist()
    return [each.decode() if isinstance(each, bytes) else each for each in flat]


def _message(model: str, inputs: Inputs) -> bytes:
    message = v2.ModelInferRequest(model_name=model, id=_ID)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        message.raw_input_contents.append(bytes(to_raw(array)))
    encoded: bytes = message.SerializeToString()
    return encoded


def _bounded(requests: Iterator[bytes]) -> list[bytes]:
    kept: list[bytes] = []
    size = 0
    for request in requests:
        if kept and size + len(request) > MAX_BYTES:
            break  # fewer different ones: each is a request all the same
        kept.append(request)
        size += len(request)
    if size > MAX_BYTES:
        raise SpecError(f"one request has {size} bytes; the load generator sends up to {MAX_BYTES}")
    return kept


def _drawn(chance: np.random.Generator, meta: TensorMetadata, shape: tuple[int, ...]) -> Array:
    dtype = DTYPES.get(meta.datatype)
    if dtype is None:
        raise SpecError(f'the input "{meta.name}" is {meta.datatype}, of which nothing can be drawn: give a file of inputs')
    if dtype.kind == "O":
        found: Array = np.array([b"text %d" % n for n in chance.integers(0, _MAX_WHOLE, size=math.prod(shape))] + [None])
        return found[:-1].reshape(shape)
    if dtype.kind == "f":
        return np.asarray(chance.random(shape)).astype(dtype)
    most = 2 if dtype.kind == "b" else min(_MAX_WHOLE, np.iinfo(dtype).max + 1)
    return np.asarray(chance.integers(0, most, size=shape)).astype(dtype)
