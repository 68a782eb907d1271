"""Requests and answers of the v2 protocol as protobuf messages, both ways. No channels or servers here.

Used by the gRPC door and the gRPC transport of the client. Ours sends raw contents; typed contents are understood.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenure.serve import v2
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


def decode_request(message: Any) -> InferRequest:
    """Return the request in a ModelInferRequest. Raises InputRefused."""
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=_tensors(message.inputs, message.raw_input_contents, "input"),
        outputs=tuple(output.name for output in message.outputs),
    )


def encode_request(request: InferRequest) -> Any:
    """Return a ModelInferRequest with raw contents."""
    message = v2.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.id)
    _described(request.inputs, message.inputs, message.raw_input_contents)
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


def encode_answer(answer: InferAnswer) -> Any:
    """Return a ModelInferResponse with raw contents."""
    message = v2.ModelInferResponse(model_name=answer.model, model_version=answer.version, id=answer.id)
    _described(answer.outputs, message.outputs, message.raw_output_contents)
    return message


def decode_answer(message: Any) -> InferAnswer:
    """Return the answer in a ModelInferResponse. Raises InputRefused when it does not follow the protocol."""
    outputs = _tensors(message.outputs, message.raw_output_contents, "output")
    return InferAnswer(model=message.model_name, version=message.model_version, id=message.id, outputs=outputs)


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


def _tensors(tensors: Any, raw: Any, what: str) -> dict[str, Array]:
    if raw and len(raw) != len(tensors):
        raise InputRefused(f"{len(tensors)} {what}s come with {len(raw)} raw contents; there must be one for each, or none")
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(tensors):
        if tensor.name in arrays:
            raise InputRefused(f'{what} "{tensor.name[:80]}" is given twice')
        if raw and tensor.HasField("contents"):
            raise InputRefused(f'{what} "{tensor.name[:80]}" has both typed and raw contents')
        if raw:
            arrays[tensor.name] = from_raw(raw[index], tensor.datatype, tensor.shape, tensor=tensor.name)
        else:
            arrays[tensor.name] = _typed(tensor)
    return arrays


def _typed(tensor: Any) -> Array:
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
        return np.array([*elements, None], dtype=object)[:-1].reshape(tensor.shape)
    found = np.array(elements)  # as wide as the field: converting at once would wrap 300 into a UINT8 of 44
    array = found.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(array, found):
        raise InputRefused(f'tensor "{tensor.name}" has elements outside the range of {tensor.datatype}')
    return array.reshape(tensor.shape)


def _described(arrays: Any, tensors: Any, raw: Any) -> None:
    for name, array in arrays.items():
        tensors.add(name=name, datatype=datatype_of(array), shape=array.shape)
        raw.append(bytes(to_raw(array)))
