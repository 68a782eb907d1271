"""LiteRT (TensorFlow Lite) models on the CPU. Quantised tensors are what they are: UINT8 in, UINT8 out, no scaling here.

Tensors have the names of the model's one signature, else their own. Most files fix the batch at 1, and some declare it
open without being so. A model is tried out once, when it is loaded: it counts as batchable (first dimension -1) only when
two different rows in one call give what each gives alone. Models with a fixed reshape inside, as many converted
classifiers have, are served as [1, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import MissingExtra, SpecError, TenureError
from tenure.serve.engines import Setting
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.tensors import DTYPES, Array, TensorMetadata, check_inputs, check_outputs

_DATATYPES = {dtype: name for name, dtype in DTYPES.items() if name != "BYTES"}


def load(path: Path, setting: Setting) -> LiteRtEngine:
    """Load a flatbuffer. Raises SpecError (not loadable; text or other tensors without a protocol type), MissingExtra."""
    try:
        from ai_edge_litert.interpreter import Interpreter  # heavy: only where such a model is really loaded
    except ImportError as error:
        raise MissingExtra("ai-edge-litert", "litert", "Running a LiteRT model") from error

    def interpreter(rows: int = 0) -> Any:
        made = Interpreter(model_path=str(path), num_threads=setting.threads)
        for detail in made.get_input_details() if rows else ():
            made.resize_tensor_input(detail["index"], (rows, *detail["shape"][1:]))
        made.allocate_tensors()
        return made

    try:
        made = interpreter()
        rows = 0
        if _has_rows(made):
            rows = -1 if _rows_are_independent(made, interpreter) else 1
        return LiteRtEngine(made, path, rows=rows)
    except TenureError:
        raise
    except Exception as error:  # the binding raises ValueError, RuntimeError and whatever its reader met
        raise SpecError(f"LiteRT cannot load {path}: {error}") from error


class LiteRtEngine:
    """See Engine."""

    platform = "litert_tflite"

    def __init__(self, interpreter: Any, path: Path, *, rows: int) -> None:
        """rows: the first dimension of every tensor; 0: as the file declares it."""
        self._interpreter = interpreter
        names = _signature_names(interpreter)
        details = interpreter.get_input_details(), interpreter.get_output_details()
        for detail in (*details[0], *details[1]):
            if np.dtype(detail["dtype"]) not in _DATATYPES:
                raise SpecError(f'{path} has a tensor "{detail["name"]}" of type {detail["dtype"]}, which cannot be served')
        self.inputs = tuple(_metadata(detail, names, rows) for detail in details[0])
        self.outputs = tuple(_metadata(detail, names, rows) for detail in details[1])
        for part in (self.inputs, self.outputs):
            if len({meta.name for meta in part}) < len(part):
                raise SpecError(f"{path} has several tensors of one name: {', '.join(meta.name for meta in part)}")
        self._input_indices = [detail["index"] for detail in details[0]]
        self._output_indices = [detail["index"] for detail in details[1]]
        self._shapes = [tuple(int(length) for length in detail["shape"]) for detail in details[0]]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """See Engine."""
        check_inputs(inputs, self.inputs)
        check_outputs(outputs, self.outputs)
        arrays = [inputs[meta.name] for meta in self.inputs]
        self._fit(arrays)
        try:
            for index, array in zip(self._input_indices, arrays, strict=True):
                self._interpreter.set_tensor(index, array)
            self._interpreter.reset_all_variables()  # what one caller sent must not reach the next one
            self._interpreter.invoke()
            return {
                meta.name: self._interpreter.get_tensor(index)
                for meta, index in zip(self.outputs, self._output_indices, strict=True)
                if not outputs or meta.name in outputs
            }
        except (RuntimeError, ValueError) as error:  # what the binding raises
            raise ModelFailed(f"the model failed: {type(error).__name__}: {error}") from error

    def _fit(self, arrays: Sequence[Array]) -> None:
        """Give the input tensors the arrays' shapes; a no-op while these stay the same."""
        shapes = [array.shape for array in arrays]
        if shapes == self._shapes:
            return
        self._shapes = []
        try:
            for index, shape in zip(self._input_indices, shapes, strict=True):
                self._interpreter.resize_tensor_input(index, shape)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise InputRefused(f"the model does not take inputs of shapes {shapes}: {error}") from error
        self._shapes = shapes

    def close(self) -> None:
        """See Engine."""
        self._interpreter = None


def _signature_names(interpreter: Any) -> dict[int, str]:
    """Return tensor index -> name in the model's signature, where it has exactly one."""
    keys = list(interpreter.get_signature_list())
    if len(keys) != 1:
        return {}
    runner = interpreter.get_signature_runner(keys[0])
    details = {**runner.get_input_details(), **runner.get_output_details()}
    return {detail["index"]: name for name, detail in details.items()}


def _metadata(detail: Mapping[str, Any], names: Mapping[int, str], rows: int) -> TensorMetadata:
    shape = tuple(int(length) for length in detail["shape_signature"]) or tuple(int(length) for length in detail["shape"])
    if rows:
        shape = (rows, *shape[1:])
    return TensorMetadata(names.get(detail["index"], detail["name"]), _DATATYPES[np.dtype(detail["dtype"])], shape)


def _has_rows(interpreter: Any) -> bool:
    """Return whether every tensor has one row now, and a first dimension that is fixed at 1 or open."""
    details = (*interpreter.get_input_details(), *interpreter.get_output_details())
    return all(
        len(d["shape"]) > 0 and d["shape"][0] == 1 and list(d["shape_signature"][:1]) in ([], [1], [-1]) for d in details
    )


def _rows_are_independent(single: Any, interpreter: Callable[[int], Any]) -> bool:
    """Return whether two different rows in one call give what each of them gives alone."""
    try:
        double = interpreter(2)
        feeds = [_two_rows(detail) for detail in single.get_input_details()]
        together = _run(double, feeds)
        alone = [_run(single, [feed[row : row + 1] for feed in feeds]) for row in range(2)]
    except (RuntimeError, ValueError):  # as a fixed reshape inside does
        return False
    return all(
        found.shape == (2, *first.shape[1:]) and _close(found, np.concatenate([first, second]))
        for found, first, second in zip(together, *alone, strict=True)
    )


def _two_rows(detail: Mapping[str, Any]) -> Array:
    """Return two rows of unlike numbers: all of the range of 8 bits, 0 and 1 in wider integers (they may be indices).

    They are the multiples of the golden ratio, which spread evenly: NumPy's own random numbers are 2.6 MB of code to load.
    """
    shape, dtype = (2, *detail["shape"][1:]), np.dtype(detail["dtype"])
    spread = (np.arange(np.prod(shape, dtype=int), dtype=np.uint32) * np.uint32(2654435769)).reshape(shape)
    if dtype.kind == "f":
        return (spread / 2**32).astype(dtype)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        return (spread >> np.uint32(24)).astype(np.uint8).view(dtype)
    return (spread >> np.uint32(31)).astype(dtype)


def _run(interpreter: Any, feeds: Sequence[Array]) -> list[Array]:
    for detail, feed in zip(interpreter.get_input_details(), feeds, strict=True):
        interpreter.set_tensor(detail["index"], feed)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


def _close(found: Array, expected: Array) -> bool:
    """Equal but for rounding: by one step of a quantised number, by a thousandth of a float."""
    if found.dtype.kind == "f":
        return bool(np.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True))
    return bool((np.abs(found.astype(np.float64) - expected.astype(np.float64)) <= 1).all())
