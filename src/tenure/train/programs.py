"""What a training program is, and how one is loaded from ``file.py:Name``.

NumPy programs implement `Program` themselves; a scikit-learn estimator with `partial_fit` is wrapped by
`partial_fit.PartialFit`. Randomness comes in as a generator made of (seed, round, shard), so that a gradient is the same
whoever computes it. Not here: rounds and files (`handler`, `store`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError
from tenure.train.records import Arrays as Arrays  # part of the protocol: programs import it from here

_METHODS = ("data", "build", "gradient", "update", "evaluate")


@runtime_checkable
class Program(Protocol):
    """A model to train. Weights and gradients are dicts of arrays; optimizer state lives in the weights."""

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

    Raises SpecError: no such file or name, wrong options, or neither the methods of `Program` nor `partial_fit`.
    """
    file_name, _, name = reference.partition(":")
    path = folder / file_name
    if not path.is_file():
        raise SpecError(f'program "{reference}": there is no file {path}. Paths are relative to the job file.')
    module = _import(path, reference)
    if not name or not hasattr(module, name):
        public = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
        raise SpecError(f'program "{reference}": {path} has no {name!r}; it has: {", ".join(public) or "nothing public"}')
    made: Any = getattr(module, name)
    if callable(made):
        try:
            made = made(**options)
        except TypeError as error:
            raise SpecError(f'program "{reference}": its options {dict(options)!r} do not fit: {error}') from error
    elif options:
        raise SpecError(f'program "{reference}" is an object, not a class: it takes no options; found {dict(options)!r}')
    missing = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if not missing:
        program: Program = made
        return program
    if callable(getattr(made, "partial_fit", None)):
        from tenure.train.partial_fit import PartialFit  # a hidden weight: only estimators pay for it

        return PartialFit(made)
    raise SpecError(
        f'program "{reference}" is no training program: {type(made).__name__} lacks {", ".join(missing)}. '
        "Give it these methods (tenure.train.programs.Program), or name a scikit-learn estimator with partial_fit."
    )


def load_arrays(inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
    """Return ``x_train.npy y_train.npy x_test.npy y_test.npy``, found in the input folders, memory-mapped.

    Returns ({"x", "y"} for training, {"x", "y"} held out). Raises SpecError when one is missing or lengths differ.
    """
    found = {part: _map(inputs, part) for part in ("x_train", "y_train", "x_test", "y_test")}
    for x, y in (("x_train", "y_train"), ("x_test", "y_test")):
        if len(found[x]) != len(found[y]) or not len(found[x]):
            raise SpecError(f"{x}.npy has {len(found[x])} examples and {y}.npy {len(found[y])}; both must have the same, > 0")
    return {"x": found["x_train"], "y": found["y_train"]}, {"x": found["x_test"], "y": found["y_test"]}


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
    except Exception as error:
        raise SpecError(f'program "{reference}": importing {path} failed: {type(error).__name__}: {error}') from error
    finally:
        sys.path.remove(str(path.parent))
    return module
