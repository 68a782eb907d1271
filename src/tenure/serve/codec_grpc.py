"""Messages of the v2 protocol to arrays and metadata, and back. No channels or servers here.

Used by the gRPC door and the gRPC transport of the client. Typed contents are understood.
Inference messages as the door reads and writes them are `codec_infer`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenure.serve import v2
from tenure.serve.faults import InputRefused
from tenure.serve.tensors import (
    Array,
    ModelMetadata,
    TensorMetadata,
    dtype_of,
    element_count,
    from_raw,
)

_TYPED = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
MAX_TYPED_BYTES_ELEMENTS = 65_536
"""Of BYTES written as typed contents, which only Python can take apart."""
_WIDTHS = {
    "bool_contents": np.bool_,
    "int_contents": np.int32,
    "int64_contents": np.int64,
    "uint_contents": np.uint32,
    "uint64_contents": np.uint64,
    "fp32_contents": np.float32,
    "fp64_contents": np.float64,
}


def decode_outputs(message: Any) -> dict[str, Array]:
    """Return the outputs of a ModelInferResponse by name. Raises InputRefused when it does not follow the protocol."""
    tensors, raw = message.outputs, message.raw_output_contents
    if raw and len(raw) != len(tensors):
        raise InputRefused(f"{len(tensors)} outputs come with {len(raw)} raw contents; there must be one for each, or none")
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(tensors):
        if tensor.name in arrays:
            raise InputRefused(f'output "{tensor.name[:80]}" is given twice')
        if raw and tensor.contents.ListFields():  # MLServer sends an empty message beside raw contents
            raise InputRefused(f'output "{tensor.name[:80]}" has both typed and raw contents')
        if raw:
            arrays[tensor.name] = from_raw(raw[index], tensor.datatype, tensor.shape, tensor=tensor.name)
        else:
            arrays[tensor.name] = typed_array(tensor)
    return arrays


def encode_metadata(metadata: ModelMetadata) -> Any:
    """Return a ModelMetadataResponse."""
    message = v2.ModelMetadataResponse(name=metadata.name, versions=metadata.versions, platform=metadata.platform)
    for found, place in ((metadata.inputs, message.inputs), (metadata.outputs, message.outputs)):
        for tensor in found:
            place.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return message


def decode_metadata(message: Any) -> ModelMetadata:
    """Return a model's metadata."""
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
    )


def typed_array(tensor: Any) -> Array:
    """Return the array in a tensor's typed contents. Raises InputRefused when they do not fit its datatype and shape."""
    dtype = dtype_of(tensor.datatype, tensor=tensor.name)
    field = _TYPED.get(tensor.datatype)
    if field is None:
        raise InputRefused(f'tensor "{tensor.name}" is {tensor.datatype}, which has no typed contents: send it raw')
    others = [found.name for found, _ in tensor.contents.ListFields() if found.name != field]
    if others:
        raise InputRefused(f'tensor "{tensor.name}" is {tensor.datatype}, which uses {field}; found {", ".join(others)}')
    elements = getattr(tensor.contents, field)
    count = element_count(tensor.shape, tensor=tensor.name)
    if len(elements) != count:
        raise InputRefused(f'tensor "{tensor.name}" has {len(elements)} elements; shape {list(tensor.shape)} takes {count}')
    if dtype.kind == "O":
        if count > MAX_TYPED_BYTES_ELEMENTS:
            raise InputRefused(
                f'tensor "{tensor.name}" has {count} elements in bytes_contents; at most {MAX_TYPED_BYTES_ELEMENTS} are taken. '
                "Send larger ones raw"
            )
        return np.array([*elements, None], dtype=object)[:-1].reshape(tensor.shape)
    found = _elements(tensor.contents, _WIDTHS[field]) if count else np.empty(0, _WIDTHS[field])
    array = found.astype(dtype)  # as wide as the field before: converting at once would wrap 300 into a UINT8 of 44
    if dtype.kind in "iu" and not np.array_equal(array, found):
        raise InputRefused(f'tensor "{tensor.name}" has elements outside the range of {tensor.datatype}')
    return array.reshape(tensor.shape)


def _elements(contents: Any, dtype: Any) -> Array:
    """Return the elements of the one field that is set, from its packed encoding: one by one takes 50 times as long."""
    contents.DiscardUnknownFields()
    packed = contents.SerializeToString()
    start = 1  # after the field's tag: the length of the packed elements
    while packed[start] & 0x80:
        start += 1
    octets: Array = np.frombuffer(packed, np.uint8, offset=start + 1)
    if dtype in (np.float32, np.float64):
        return octets.view(np.dtype(dtype).newbyteorder("<"))
    ends = np.flatnonzero(octets < 0x80)
    if len(ends) == len(octets):
        return octets.astype(dtype)
    starts = np.concatenate(([0], ends[:-1] + 1))
    values = np.zeros(len(ends), np.uint64)
    for place in range(int((ends - starts).max()) + 1):
        here = np.flatnonzero(starts + place <= ends)
        values[here] |= (octets[starts[here] + place] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
    return values.view(np.int64).astype(dtype) if np.dtype(dtype).kind == "i" else values.astype(dtype)
