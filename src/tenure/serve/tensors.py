"""Tensors as the Open Inference Protocol v2 names and lays them out, and the checks every request passes.

One table of data types, raw (little-endian, row-major) encoding both ways, and `check_inputs`, used by every engine's
caller. Not here: JSON or protobuf around the tensors (`codec_http`, `codec_grpc`).
Source: the protocol's "Tensor Data Types" and its binary tensor data extension (BYTES elements carry a 4-byte length).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.serve.faults import InputRefused

Array = NDArray[Any]
Raw = bytes | bytearray | memoryview

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""NumPy type of each protocol data type. BYTES elements are Python `bytes`. BF16 is not supported."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


_MAX_ELEMENTS = 1 << 59
"""NumPy counts bytes in a signed 64-bit number and leaves zeros out of the count."""


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """One input or output of a model."""

    name: str
    datatype: str
    """Protocol name, e.g. ``FP32``."""
    shape: tuple[int, ...]
    """-1 where any length fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetadata:
    """What a model takes and gives."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


def datatype_of(array: Array) -> str:
    """Return the protocol's name of an array's type. Raises InputRefused for types it has no name for."""
    kind = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    name = "BYTES" if kind.kind in "OSU" else _NAMES.get(kind)
    if name is None:
        raise InputRefused(f"arrays of type {array.dtype} cannot be sent; the protocol knows {', '.join(DTYPES)}")
    return name


def dtype_of(datatype: str, *, tensor: str) -> np.dtype[Any]:
    """Return the NumPy type of a protocol data type. Raises InputRefused, naming the tensor."""
    found = DTYPES.get(datatype)
    if found is None:
        raise InputRefused(f'tensor "{tensor}" has datatype {datatype[:40]!r}; supported: {", ".join(DTYPES)}')
    return found


def element_count(shape: Sequence[int], *, tensor: str) -> int:
    """Return how many elements a shape claims, as an exact integer.

    Raises InputRefused for negative lengths, rank > 32, and lengths that no array can have beside one of zero.
    """
    if len(shape) > 32 or any(length < 0 for length in shape):
        raise InputRefused(f'tensor "{tensor}" has shape {list(shape)[:33]}; lengths must be >= 0, at most 32 of them')
    if 0 in shape and math.prod(length or 1 for length in shape) > _MAX_ELEMENTS:
        raise InputRefused(f'tensor "{tensor}" has shape {list(shape)}, whose other lengths no array can have')
    return math.prod(shape)


def to_raw(array: Array) -> memoryview | bytes:
    """Return the array's elements in the protocol's raw layout; no copy for a C-contiguous little-endian array."""
    if array.dtype.kind in "OSU":
        return _bytes_to_raw(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data if flat.size else b""


def from_raw(raw: Raw, datatype: str, shape: Sequence[int], *, tensor: str) -> Array:
    """Return the array that raw bytes hold; no copy where they are aligned (then read-only, keeping `raw` alive).

    Raises InputRefused when the number of bytes is not what datatype and shape ask for. Allocates nothing from claims.
    """
    dtype = dtype_of(datatype, tensor=tensor)
    count = element_count(shape, tensor=tensor)
    if dtype.kind == "O":
        return _bytes_from_raw(raw, count, tensor).reshape(shape)
    if len(raw) != count * dtype.itemsize:
        raise InputRefused(
            f'tensor "{tensor}" carries {len(raw)} bytes; {datatype} of shape {list(shape)} takes {count * dtype.itemsize}'
        )
    array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise InputRefused(f'tensor "{tensor}" holds BOOL bytes other than 0 and 1')
    return array if array.flags.aligned else array.copy()


def check_inputs(inputs: Mapping[str, Array], expected: Sequence[TensorMetadata]) -> None:
    """Hold a request's tensors against a model's inputs: names, types, ranks, lengths. Raises InputRefused."""
    if len(inputs) != len(expected) or any(meta.name not in inputs for meta in expected):
        wanted = ", ".join(meta.name for meta in expected)
        raise InputRefused(f"the model takes the inputs {wanted}; the request carries {', '.join(map(str, inputs)) or 'none'}")
    for meta in expected:
        array = inputs[meta.name]
        if datatype_of(array) != meta.datatype:
            raise InputRefused(f'input "{meta.name}" must be {meta.datatype}; found {datatype_of(array)}')
        if not _fits(array.shape, meta.shape):
            raise InputRefused(
                f'input "{meta.name}" must have shape {list(meta.shape)} (-1: any length above 0); found {list(array.shape)}'
            )


def check_outputs(names: Iterable[str], offered: Sequence[TensorMetadata]) -> None:
    """Refuse requested outputs that a model does not have. Raises InputRefused."""
    known = {meta.name for meta in offered}
    for name in names:
        if name not in known:
            raise InputRefused(f'the model has no output "{name[:80]}"; it gives {", ".join(sorted(known))}')


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(found) == len(expected) and all(
        have > 0 if want < 0 else have == want for have, want in zip(found, expected, strict=True)
    )


def _bytes_to_raw(array: Array) -> bytes:
    parts = []
    for element in array.reshape(-1):
        content = element.encode() if isinstance(element, str) else bytes(element)
        parts.append(struct.pack("<I", len(content)) + content)
    return b"".join(parts)


def _bytes_from_raw(raw: Raw, count: int, tensor: str) -> Array:
    if count * 4 > len(raw):  # each element has at least its length: claims are checked before anything is allocated
        raise InputRefused(f'tensor "{tensor}" claims {count} elements; its {len(raw)} bytes cannot hold them')
    elements, at = np.empty(count, dtype=object), 0
    for index in range(count):
        start = at + 4
        if start > len(raw):
            raise InputRefused(f'tensor "{tensor}" ends inside element {index} of {count}')
        at = start + struct.unpack_from("<I", raw, at)[0]
        if at > len(raw):
            raise InputRefused(f'tensor "{tensor}" ends inside element {index} of {count}')
        elements[index] = bytes(raw[start:at])
    if at != len(raw):
        raise InputRefused(f'tensor "{tensor}" has {len(raw) - at} bytes after its last element')
    return elements
