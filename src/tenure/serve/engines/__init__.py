"""Inference engines: the libraries that run a model. They meet at `Engine` and never import each other.

`load_engine` is the one place that loads them, by the file's ending; the heavy library is imported only then.
Pickles are refused on purpose: loading one runs whatever it holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from tenure.errors import NotFound, SpecError
from tenure.serve.tensors import Array, TensorMetadata

ENGINES: Mapping[str, str] = {
    ".onnx": "tenure.serve.engines.onnx_runtime",
    ".skops": "tenure.serve.engines.scikit",
}
"""File ending of a model to the module whose `load(path, threads)` returns its Engine."""


class Engine(Protocol):
    """One loaded model. `infer` may be called from one thread at a time."""

    platform: str
    """As the protocol names it, e.g. ``onnxruntime_onnx``."""
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Run the model on checked inputs and return the outputs asked for (none named: all), in the model's order.

        Raises InputRefused when the library finds the input wrong after all, ModelFailed when the model raises.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


def load_engine(path: str | Path, *, threads: int = 1) -> Engine:
    """Load a model file with the engine for its ending, running on `threads` threads (>= 1).

    Raises NotFound, SpecError (ending unknown, file not loadable), MissingExtra.
    """
    file = Path(path)
    if not file.is_file():
        raise NotFound(f"there is no model file {file}")
    module = ENGINES.get(file.suffix)
    if module is None:
        hint = " Pickles run whatever they hold when loaded: save with skops or export to ONNX." if _pickled(file) else ""
        raise SpecError(f"no engine loads {file.name}: endings known are {', '.join(ENGINES)}.{hint}")
    if threads < 1:
        raise SpecError(f"a model needs at least one thread; found threads = {threads}")
    return cast(Engine, importlib.import_module(module).load(file, threads))


def _pickled(file: Path) -> bool:
    return file.suffix in {".pkl", ".pickle", ".joblib", ".pt", ".pth"}
