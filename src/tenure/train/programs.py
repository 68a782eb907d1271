"""What a training program is, and how one is loaded from ``file.py:Name``.

NumPy programs implement `Program` themselves; models of other libraries are wrapped by the adapter of their library
(`partial_fit`, `torch_module`, `keras_model`), which meet here and nowhere else. Randomness comes in as a generator made
of (seed, round, shard), so that a gradient is the same whoever computes it. Not here: rounds and files (`handler`, `store`).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tenure.errors import MissingExtra, SpecError
from tenure.train.records import Arrays as Arrays  # part of the protocol: programs import it from here

CACHE_OPTIONS = ("cache", "augment", "passes")
"""Of the features of a model that is cut."""
TRAINING_OPTIONS = ("optimizer", "rate", "momentum", "decay", "cut", *CACHE_OPTIONS)
"""Options for the adapters of torch and Keras, unless the model's constructor takes them itself."""
_METHODS = ("data", "build", "gradient", "update", "evaluate")
_EXTRAS = {"torch": "torch", "keras": "keras", "sklearn": "demo"}


@runtime_checkable
class Program(Protocol):
    """A model to train. Weights and gradients are dicts of arrays; optimizer state lives in the weights.

    No method changes its arguments, and arrays that were handed over are not changed afterwards by either side.
    """

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """Return training and held-out arrays; in each dict all have the same first dimension. Called before all else."""
        ...

    def build(self, seed: int) -> Arrays:
        """Return the weights to begin with: the same for the same seed."""
        ...

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """Return the sum of gradients, the sum of losses, and the number of examples counted, of one shard's examples."""
        ...

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """Return the next weights from the gradients summed over all shards and their number of examples."""
        ...

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """Return the share of held-out examples classified rightly."""
        ...


def load_program(reference: str, folder: Path, options: Mapping[str, Any]) -> Program:
    """Return the program that ``file.py:Name`` names, built with `options`.

    The name gives a Program, a torch module, a Keras model or an estimator with `partial_fit`: a class, a function that
    makes one, or the object itself. Raises SpecError: no such file or name, wrong options, or something else;
    MissingExtra: its library is not installed.
    """
    file_name, _, name = reference.partition(":")
    path = folder / file_name
    if not path.is_file():
        raise SpecError(f'program "{reference}": there is no file {path}. Paths are relative to the job file.')
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read by Keras when the program imports it
    module = _import(path, reference)
    if not name or not hasattr(module, name):
        public = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
        raise SpecError(f'program "{reference}": {path} has no {name!r}; it has: {", ".join(public) or "nothing public"}')
    named: Any = getattr(module, name)
    ready = not callable(named) or _is_model(named)
    taken, left = ({}, dict(options)) if ready else _divide(named, options)

    def make() -> Any:
        return getattr(_import(path, reference), name) if ready else named(**taken)

    try:
        made: Any = named if ready else make()
    except TypeError as error:
        raise SpecError(f'program "{reference}": its options {dict(options)!r} do not fit: {error}') from error
    missing = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if missing and _is_model(made):
        return _adapt_model(made, make, reference, left)
    if left:
        what = "an object, not a class" if ready else f"no model of torch or Keras but {type(made).__name__}"
        raise SpecError(f'program "{reference}" is {what}: it takes no such options; found {left!r}')
    if not missing:
        program: Program = made
        return program
    if callable(getattr(made, "partial_fit", None)):
        from tenure.train.partial_fit import PartialFit  # a hidden weight: only estimators pay for it

        return PartialFit(made)
    raise SpecError(
        f'program "{reference}" is no training program: {type(made).__name__} lacks {", ".join(missing)}. '
        "Give it these methods (tenure.train.programs.Program), or name a torch module, a Keras model or a scikit-learn "
        "estimator with partial_fit."
    )


def averaged(program: Program) -> frozenset[str]:
    """Return the arrays of a gradient that are no gradients: they follow the mean of what the shards saw, as it is.

    A program names them in its attribute `averaged`, if it has any. Momentum over them would overshoot: a variance may
    end below zero.
    """
    return frozenset(getattr(program, "averaged", ()))


def draws_random(transform: Callable[..., Any] | None, x: NDArray[Any]) -> bool:
    """Return whether a model's transform(x, rng) draws random numbers for examples x in training."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    if transform is not None:
        transform(np.array(x), rng)
    return rng.bit_generator.state != before


def load_arrays(inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
    """Return ``x_train.npy y_train.npy x_test.npy y_test.npy``, found in the input folders, memory-mapped.

    Returns ({"x", "y"} for training, {"x", "y"} held out). Raises SpecError when one is missing or lengths differ.
    """
    found = {part: _map(inputs, part) for part in ("x_train", "y_train", "x_test", "y_test")}
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        if len(found[x]) != len(found[y]) or not len(found[x]):
            raise SpecError(f"{x}.npy has {len(found[x])} examples and {y}.npy {len(found[y])}; both must have the same, > 0")
    return {"x": found["x_train"], "y": found["y_train"]}, {"x": found["x_test"], "y": found["y_test"]}


def as_floats(x: NDArray[Any]) -> NDArray[Any]:
    """Return x as models take it: uint8 as float32 / 255, float64 as float32, all else as it is."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    return x.astype(np.float32) if x.dtype == np.float64 else x


def share_right(labels: NDArray[Any], y: NDArray[Any]) -> float:
    """Return the share of labels that equal y: shape (n,), or (n, 1), or (n, classes) of shares, the largest meant."""
    expected = y.argmax(axis=1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(len(y))
    return float(np.mean(labels.reshape(len(y)) == expected))


def _divide(named: Callable[..., Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that the constructor is called with, and the adapter's."""
    try:
        parameters = inspect.signature(named).parameters
    except ValueError:  # built-in
        return dict(options), {}
    left = {key: value for key, value in options.items() if key in TRAINING_OPTIONS and key not in parameters}
    return {key: value for key, value in options.items() if key not in left}, left


def _is_model(made: Any) -> bool:
    """Return whether this is an object of torch or Keras, importing neither."""
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    return (torch is not None and isinstance(made, torch.nn.Module)) or (keras is not None and isinstance(made, keras.Model))


def _adapt_model(made: Any, make: Callable[[], Any], reference: str, options: Mapping[str, Any]) -> Program:
    # Heavy, and only for programs that have loaded their library already. A Keras model on torch is a torch module too.
    kept = {key: value for key, value in options.items() if key in CACHE_OPTIONS}
    options = {key: value for key, value in options.items() if key not in kept}
    program: Any
    if "keras" in sys.modules and isinstance(made, sys.modules["keras"].Model):
        from tenure.train.keras_model import KerasModel

        program = KerasModel(made, make, reference=reference, **options)
    else:
        from tenure.train.torch_module import TorchModule

        program = TorchModule(made, make, reference=reference, **options)
    if not options.get("cut") and kept:
        raise SpecError(
            f'program "{reference}": {", ".join(kept)} is about the features of a frozen part; name its end with cut'
        )
    within_a_stage = os.environ.get("TENURE_HOME") or os.environ.get("TENURE_RUN_DIR")
    if options.get("cut") and kept.pop("cache", True) and within_a_stage:
        from tenure.train.features import Frozen

        return Frozen.of(program, **kept)
    return cast(Program, program)


def _map(inputs: Mapping[str, str], part: str) -> NDArray[Any]:
    if not inputs:
        raise SpecError(f"the program needs {part}.npy; the stage has no inputs. Name a folder under [train.inputs].")
    for place in inputs.values():
        path = Path(place) / f"{part}.npy"
        if path.is_file():
            try:
                mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise SpecError(f"{path} is not an array file that can be mapped: {error}") from error
            return mapped
    raise SpecError(f"the program needs {part}.npy; it is in none of the input folders: {', '.join(inputs.values())}")


def _import(path: Path, reference: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tenure_program_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent))  # a program may import its neighbours
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name in _EXTRAS:
            raise MissingExtra(error.name, _EXTRAS[error.name], f'The program "{reference}"') from error
        raise SpecError(f'program "{reference}": importing {path} failed: {error}') from error
    except Exception as error:
        raise SpecError(f'program "{reference}": importing {path} failed: {type(error).__name__}: {error}') from error
    finally:
        sys.path.remove(str(path.parent))
    return module
