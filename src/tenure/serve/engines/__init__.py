"""Inference engines: the libraries that run a model. They meet at `Engine` and never import each other.

    .onnx    onnx_runtime    ONNX Runtime, the default
    .skops   scikit          scikit-learn estimators, types that skops trusts only
    .pt2     torch_program   torch.export's programs, checked before torch reads them (`pt2.check`)
    .tflite  litert          LiteRT (TensorFlow Lite)

`load_engine` is the one place that loads them, by the file's ending; the heavy library is imported only then.
Pickles are refused on purpose: loading one runs whatever it holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from tenure.errors import NotFound, SpecError
from tenure.serve.tensors import Array, TensorMetadata

ENGINES: Mapping[str, str] = {
    ".onnx": "tenure.serve.engines.onnx_runtime",
    ".skops": "tenure.serve.engines.scikit",
    ".pt2": "tenure.serve.engines.torch_program",
    ".tflite": "tenure.serve.engines.litert",
}
"""File ending of a model to the module whose `load(path, setting)` returns its Engine."""
ON_DEVICES = frozenset({".pt2"})
"""Endings of models that run elsewhere than on the CPU, too."""
DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How an engine runs a model."""

    threads: int = 1
    """That one call keeps busy at most."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:1``."""
    precision: str = "fp32"
    """``fp16``, on ``cuda`` only: matrix products and convolutions in half precision; inputs and outputs stay what they are."""
    max_batch_rows: int = 0
    """The largest batch to make a captured graph for, on ``cuda``; 0: the engine's own."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise SpecError(f"a model needs at least one thread; found threads = {self.threads}")
        name, _, index = self.device.partition(":")
        if name not in DEVICES or (index and not (index.isdecimal() and name != "cpu")):
            raise SpecError(f'a model runs on "cpu", "cuda" or "cuda:<index>"; found device = "{self.device}"')
        if self.precision not in PRECISIONS:
            raise SpecError(f'precision is one of {", ".join(PRECISIONS)}; found "{self.precision}"')
        if self.precision == "fp16" and self.device == "cpu":
            raise SpecError('precision "fp16" needs device = "cuda": CPUs are slower in half precision')


class Engine(Protocol):
    """One loaded model. `infer` may be called from one thread at a time."""

    platform: str
    """As the protocol names it, e.g. ``onnxruntime_onnx``."""
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    """A first dimension of -1 in every input and output promises: rows do not depend on each other."""

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Run the model and return the outputs asked for (none named: all), in the model's order.

        The arrays may be read-only and are not kept; what is returned is not written to by later calls.
        Raises InputRefused when the input does not fit (nothing was run), ModelFailed when the model raises.
        """
        ...

    def close(self) -> None:
        """Free the model's memory. No `infer` afterwards."""
        ...


def load_engine(
    path: str | Path, *, threads: int = 1, device: str = "cpu", precision: str = "fp32", max_batch_rows: int = 0
) -> Engine:
    """Load a model file with the engine for its ending; the options are those of `Setting`.

    Raises NotFound, SpecError (ending unknown, file not loadable or not safe to load), MissingExtra.
    """
    file = Path(path)
    setting = Setting(threads=threads, device=device, precision=precision, max_batch_rows=max_batch_rows)
    if not file.is_file():
        raise NotFound(f"there is no model file {file}")
    module = ENGINES.get(file.suffix)
    if module is None:
        hint = (
            " Pickles run whatever they hold when loaded: save with skops, torch.export or as ONNX." if _pickled(file) else ""
        )
        raise SpecError(f"no engine loads {file.name}: endings known are {', '.join(ENGINES)}.{hint}")
    if device != "cpu" and file.suffix not in ON_DEVICES:
        raise SpecError(
            f'{file.name} cannot run on device "{device}": that is for {", ".join(sorted(ON_DEVICES))}. Leave device = "cpu", '
            "or export the model with torch.export"
        )
    engine = cast(Engine, importlib.import_module(module).load(file, setting))
    _trim()
    return engine


def _trim() -> None:
    """Give back what reading a model took: ResNet-50 by ONNX Runtime stays at 155 MB instead of 299 MB."""
    with contextlib.suppress(AttributeError, OSError):  # only the GNU C library keeps freed memory, and has this
        ctypes.CDLL(None).malloc_trim(0)


def _pickled(file: Path) -> bool:
    return file.suffix in {".pkl", ".pickle", ".joblib", ".pt", ".pth"}
