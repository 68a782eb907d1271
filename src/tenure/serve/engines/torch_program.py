"""torch's exported programs (.pt2 by torch.export.save), on the CPU or on a CUDA device.

A program is checked first (`pt2.check`): loading one that holds more than tensors and operators would run code. A
program that changes its own buffers (one exported in training mode) is refused: calls would depend on earlier ones.
Outputs are named by the keys of the dict that the program returns; else "output", or "output_0", "output_1" of a tuple.
On a CUDA device calls go through `pt2.graphs`.
"""

from __future__ import annotations

import ctypes
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import MissingExtra, SpecError, TenureError
from tenure.serve.engines import Setting
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.pt2.check import check_program
from tenure.serve.pt2.graphs import MAX_ROWS, Cuda, GraphRunner, prepared
from tenure.serve.tensors import Array, TensorMetadata, check_inputs, check_outputs

_DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip


def load(path: Path, setting: Setting) -> TorchEngine:
    """Load an exported program. Raises SpecError (not loadable, not safe to load, device absent), MissingExtra."""
    try:
        import torch  # heavy: only where such a model is really loaded
    except ImportError as error:
        raise MissingExtra("torch", "torch", "Running an exported program of torch") from error
    content = io.BytesIO(path.read_bytes())
    check_program(content, path)
    content.seek(0)
    if setting.device != "cpu" and not torch.cuda.is_available():
        raise SpecError(f'{path} is to run on device "{setting.device}", but torch finds no CUDA device here')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about its own insides
            return TorchEngine(torch, torch.export.load(content), path, setting)
    except TenureError:
        raise
    except Exception as error:  # a program of another version of torch raises whatever its reader met
        raise SpecError(f"torch {torch.__version__} cannot load {path}: {type(error).__name__}: {error}") from error


class TorchEngine:
    """See Engine."""

    platform = "pytorch_exported"

    def __init__(self, torch: Any, program: Any, path: Path, setting: Setting) -> None:
        if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in program.graph.nodes):
            program = program.run_decompositions({})  # in-place operators become a list of what they change
        signature = program.graph_signature
        if signature.buffers_to_mutate or getattr(signature, "parameters_to_mutate", None):
            raise SpecError(f"{path} changes its own buffers when it is called. Call model.eval() before torch.export")
        nodes = {node.name: node for node in program.graph.nodes}
        values = [nodes[name].meta["val"] if isinstance(name, str) else name for name in signature.user_inputs]
        results = [nodes[name].meta["val"] if isinstance(name, str) else name for name in signature.user_outputs]
        if not values or not all(isinstance(value, torch.Tensor) for value in (*values, *results)):
            raise SpecError(f"{path} takes or gives something other than tensors. Export it with tensors only")
        self.inputs = tuple(_metadata(n, v, path) for n, v in zip(signature.user_inputs, values, strict=True))
        self.outputs = tuple(
            _metadata(name, value, path)
            for name, value in zip(_output_names(program.call_spec.out_spec, len(results)), results, strict=True)
        )
        self._torch = torch
        self._dtypes = [value.dtype for value in results]
        self._threads = setting.threads
        self._ranges = _ranges(program, values)
        self._writes_inputs = bool(signature.user_inputs_to_mutate)
        program, self._around = prepared(torch, program, setting)
        self._in_spec = program.call_spec.in_spec
        self._module: Any = program.module(check_guards=False)
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in program.state_dict.values()}
        self._graphs: GraphRunner | None = None
        if setting.device != "cpu":
            stackable = all(meta.shape[:1] == (-1,) for meta in (*self.inputs, *self.outputs))
            fixed = all(-1 not in meta.shape[1:] for meta in self.inputs)
            self._graphs = GraphRunner(Cuda(torch, setting.device), self._call)
            if stackable and fixed and not self._writes_inputs:
                with torch.inference_mode():
                    self._graphs.capture([(v.shape[1:], v.dtype) for v in values], setting.max_batch_rows or MAX_ROWS)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """See Engine."""
        check_inputs(inputs, self.inputs)
        check_outputs(outputs, self.outputs)
        self._check_ranges(inputs)
        torch = self._torch
        if torch.get_num_threads() != self._threads:  # of the calling thread
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                tensors = [_borrowed(torch, inputs[meta.name]) for meta in self.inputs]
                found = self._graphs.run(tensors) if self._graphs else self._run(tensors)
                return {
                    meta.name: tensor.numpy()
                    for meta, tensor in zip(self.outputs, found, strict=True)
                    if not outputs or meta.name in outputs
                }
        except Exception as error:  # a model may raise anything
            reason = (str(error).strip().splitlines() or [""])[0][:400]
            raise ModelFailed(f"the model failed: {type(error).__name__}: {reason}") from error

    def _run(self, tensors: list[Any]) -> list[Any]:
        if self._writes_inputs:
            tensors = [tensor.clone() for tensor in tensors]
        found = self._call(tensors)
        borrowed = self._kept | {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return [tensor.clone() if tensor.untyped_storage().data_ptr() in borrowed else tensor for tensor in found]

    def _call(self, tensors: Sequence[Any]) -> list[Any]:
        tree = self._torch.utils._pytree
        arguments, named = tree.tree_unflatten(list(tensors), self._in_spec)
        with self._around():
            found = tree.tree_leaves(self._module(*arguments, **named))
            return [tensor.to(dtype) for tensor, dtype in zip(found, self._dtypes, strict=True)]  # half precision stays inside

    def _check_ranges(self, inputs: Mapping[str, Array]) -> None:
        for name, axis, low, high in self._ranges:
            length = inputs[name].shape[axis]
            if not low <= length <= high:
                raise InputRefused(f'input "{name}" may have {low} to {high} along axis {axis}, as exported; found {length}')

    def close(self) -> None:
        """See Engine."""
        self._module = self._graphs = None


def _borrowed(torch: Any, array: Array) -> Any:
    """Return a tensor over the array's memory, while the array lives. Programs here do not write to it, so torch's warning
    about memory that cannot be written is of no use.
    """
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        memory = memoryview((ctypes.c_char * array.nbytes).from_address(array.ctypes.data)).cast("B")
        array = np.frombuffer(memory, array.dtype).reshape(array.shape)
    return torch.from_numpy(array)


def _metadata(name: str, value: Any, path: Path) -> TensorMetadata:
    datatype = _DATATYPES.get(str(value.dtype).removeprefix("torch."))
    if datatype is None:
        raise SpecError(f'{path} has a tensor "{name}" of type {value.dtype}, which cannot be served')
    return TensorMetadata(name, datatype, tuple(length if isinstance(length, int) else -1 for length in value.shape))


def _output_names(spec: Any, count: int) -> list[str]:
    keys = spec.context if spec.type is dict else None
    if keys is not None and len(keys) == count and all(isinstance(key, str) for key in keys):
        return list(keys)
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _ranges(program: Any, values: Sequence[Any]) -> list[tuple[str, int, int, int]]:
    """Return input, axis, least and most length, of the axes whose length is a symbol with a bound above the usual."""
    found = []
    for name, value in zip(program.graph_signature.user_inputs, values, strict=True):
        for axis, length in enumerate(value.shape):
            bounds = None if isinstance(length, int) else program.range_constraints.get(length.node.expr)
            if bounds is not None:
                low = int(bounds.lower) if int(bounds.lower) > 2 else 1  # torch itself exports 2 and means 1
                high = int(bounds.upper) if bounds.upper.is_Integer else 1 << 62
                found.append((name, axis, low, high))
    return found
