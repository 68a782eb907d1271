"""ONNX models by ONNX Runtime on the CPU: the default engine. Outputs that are not tensors (ZipMap's maps) are not offered.

What differs from the library's defaults, and why:
- Spinning is off. A pool that spins while it waits cost more than any protocol on a shared machine (0.58-0.65 of an
  in-process call with both cores loaded).
- Memory stays bounded when batch sizes vary: the arena grows by what is asked for instead of by powers of two, and no
  memory pattern is kept per input shape. ResNet-50, batches of 1 to 24 in random order after one of 24: 397 MB, then
  398 MB; with the defaults 439 MB, then 648 MB; without an arena 324 MB, then 408 MB with a peak of 573 MB. CPU time per
  image was the same within the noise (81-84 ms).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import MissingExtra, SpecError
from tenure.serve.engines import Setting
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.tensors import Array, TensorMetadata, check_inputs, check_outputs

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_AS_REQUESTED = 1
"""Value of ONNX Runtime's arena extend strategy kSameAsRequested."""


def load(path: Path, setting: Setting) -> OnnxRuntimeEngine:
    """Load an ONNX file. Raises SpecError when ONNX Runtime refuses it, MissingExtra without ONNX Runtime."""
    try:
        import onnxruntime  # heavy: only where a model is really loaded
    except ImportError as error:
        raise MissingExtra("onnxruntime", "demo", "Running an ONNX model") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, not printed
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if _one_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's errors have no common base below Exception
        raise SpecError(f"ONNX Runtime cannot load {path}: {error}") from error
    return OnnxRuntimeEngine(session, path)


class OnnxRuntimeEngine:
    """See Engine."""

    platform = "onnxruntime_onnx"

    def __init__(self, session: Any, path: Path) -> None:
        self._session = session
        self.inputs = tuple(_metadata(node) for node in session.get_inputs() if node.type in _DATATYPES)
        self.outputs = tuple(_metadata(node) for node in session.get_outputs() if node.type in _DATATYPES)
        if len(self.inputs) != len(session.get_inputs()) or not self.outputs:
            found = ", ".join(f"{node.name}: {node.type}" for node in (*session.get_inputs(), *session.get_outputs()))
            raise SpecError(f"{path} has inputs that are not tensors of a known type, or no such output; found {found}")
        self._all_outputs = [meta.name for meta in self.outputs]
        self._text_outputs = frozenset(meta.name for meta in self.outputs if meta.datatype == "BYTES")
        self._text_inputs = frozenset(meta.name for meta in self.inputs if meta.datatype == "BYTES")

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """See Engine."""
        check_inputs(inputs, self.inputs)
        check_outputs(outputs, self.outputs)
        names = [name for name in self._all_outputs if name in outputs] if outputs else self._all_outputs
        feed = {n: _as_text(a, n) for n, a in inputs.items()} if self._text_inputs else dict(inputs)
        try:
            found = self._session.run(names, feed)
        except Exception as error:  # the binding's errors have no common base below Exception
            if type(error).__name__ == "InvalidArgument":
                raise InputRefused(f"ONNX Runtime refused the input: {_first_line(error)}") from error
            raise ModelFailed(f"the model failed: {type(error).__name__}: {_first_line(error)}") from error
        answers = dict(zip(names, found, strict=True))
        for name in self._text_outputs & answers.keys():
            answers[name] = _as_bytes(answers[name])
        return answers

    def close(self) -> None:
        """See Engine."""
        self._session = None


@functools.cache
def _one_arena() -> bool:
    """Make the process's arena, once; False where this build of ONNX Runtime offers none."""
    import onnxruntime  # heavy: the caller has loaded it

    try:
        memory = onnxruntime.OrtMemoryInfo(
            "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
        )
        onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, _AS_REQUESTED, -1, -1))
    except Exception:  # absent, of another form, or somebody else's already: the session has its own arena then
        return False
    return True


def _metadata(node: Any) -> TensorMetadata:
    shape = tuple(length if isinstance(length, int) else -1 for length in node.shape)
    return TensorMetadata(node.name, _DATATYPES[node.type], shape)


def _as_text(array: Array, name: str) -> Array:
    if array.dtype.kind != "O":
        return array
    text = np.empty(array.size, dtype=object)
    for index, element in enumerate(array.reshape(-1)):
        try:
            text[index] = element.decode() if isinstance(element, bytes) else str(element)
        except UnicodeDecodeError as error:
            raise InputRefused(f'element {index} of input "{name}" is not UTF-8') from error
    return text.reshape(array.shape)


def _as_bytes(array: Array) -> Array:
    content = np.empty(array.size, dtype=object)
    for index, element in enumerate(np.asarray(array).reshape(-1)):
        content[index] = str(element).encode()
    return content.reshape(array.shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:400]
