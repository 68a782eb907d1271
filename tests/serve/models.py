"""Small models in NumPy that misbehave on demand: run by `FakePlane` in-process, and by real instances through `load`."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenure.errors import SpecError
from tenure.serve import batchwire as wire
from tenure.serve.faults import ModelFailed
from tenure.serve.tensors import Array, TensorMetadata

Function = Callable[[Mapping[str, Array]], dict[str, Array]]
LOADER = "tests.serve.models:load"
"""What an instance calls to load one of these models from a file ``NAME.fake`` that holds a kind."""
ENDINGS = (".fake",)


@dataclass(frozen=True)
class Kind:
    """One kind of model: its signature and what it does."""

    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    function: Function


def _double(inputs):
    return {"y": inputs["x"] * 2}


def _picky(inputs):
    if (inputs["x"] < 0).any():
        raise ModelFailed("the model dislikes numbers below 0")
    return {"y": inputs["x"] + 1}


def _raising(inputs):
    raise ZeroDivisionError("nobody expects this")


def _upper(inputs):
    text = np.empty(inputs["t"].size, dtype=object)
    text[:] = [bytes(item).upper() for item in inputs["t"].reshape(-1)]
    return {"u": text.reshape(inputs["t"].shape)}


def _sums(inputs):
    return {"sum": inputs["a"] + inputs["b"], "difference": inputs["a"] - inputs["b"]}


def _mortal(inputs):
    """Die by a signal where a row starts with 666, hang where it starts with 777, answer twice the input else."""
    firsts = inputs["x"][:, 0]
    if (firsts == 666).any():
        os.kill(os.getpid(), signal.SIGSEGV)
    while (firsts == 777).any():
        time.sleep(60)
    return {"y": inputs["x"] * 2}


def _slow(inputs):
    time.sleep(float(inputs["x"][:, 0].max()))
    return {"y": inputs["x"] * 2}


def _sleepy(inputs):
    """Take 10 ms for each row."""
    time.sleep(0.01 * len(inputs["x"]))
    return {"y": inputs["x"] * 2}


def _rogue(inputs):
    """Say something to the server behind the instance's back: nonsense where a row starts with 1, a false batch with 2."""
    words = {1: b"nonsense", 2: wire.encode(wire.Done(999, 1, 0.0, 0.0, 0.0, [], []))}.get(int(inputs["x"][0, 0]))
    for fd in os.listdir("/proc/self/fd") if words else ():  # the folder's own descriptor is gone by now
        if os.path.exists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            os.write(int(fd), words)
    return {"y": inputs["x"] * 2}


def _blob(inputs):
    return {"y": np.zeros((inputs["x"].shape[0], int(inputs["x"].max())), np.uint8)}


def _sizes(inputs):
    return {"y": np.array([inputs["x"].shape[0]], np.int64)}


def _process(inputs):
    return {"pid": np.full(inputs["x"].shape[:1], os.getpid(), np.int64)}


_X = (TensorMetadata("x", "FP32", (-1, 4)),)
_Y = (TensorMetadata("y", "FP32", (-1, 4)),)
_PAIR = tuple(TensorMetadata(name, "INT64", (2,)) for name in ("a", "b"))
KINDS: Mapping[str, Kind] = {
    "double": Kind(_X, _Y, _double),
    "picky": Kind(_X, _Y, _picky),
    "raising": Kind(_X, _Y, _raising),
    "upper": Kind((TensorMetadata("t", "BYTES", (-1,)),), (TensorMetadata("u", "BYTES", (-1,)),), _upper),
    "sums": Kind(_PAIR, tuple(TensorMetadata(name, "INT64", (2,)) for name in ("sum", "difference")), _sums),
    "mortal": Kind(_X, _Y, _mortal),
    "slow": Kind(_X, _Y, _slow),
    "rogue": Kind(_X, _Y, _rogue),
    "sleepy": Kind(_X, _Y, _sleepy),
    "blob": Kind((TensorMetadata("x", "INT64", (-1,)),), (TensorMetadata("y", "UINT8", (-1, -1)),), _blob),
    "sizes": Kind((TensorMetadata("x", "INT64", (-1,)),), (TensorMetadata("y", "INT64", (-1,)),), _sizes),
    "process": Kind(_X, (TensorMetadata("pid", "INT64", (-1,)),), _process),
}


class NumpyEngine:
    """One of the kinds as an inference engine."""

    platform = "numpy_fake"

    def __init__(self, kind: Kind) -> None:
        self.inputs, self.outputs, self._function = kind.inputs, kind.outputs, kind.function

    def infer(self, inputs, outputs=()):
        found = self._function(inputs)
        return {meta.name: found[meta.name] for meta in self.outputs if not outputs or meta.name in outputs}

    def close(self):
        pass


def load(path: str | Path, **options: object) -> NumpyEngine:
    """Load the kind that a file names, whatever the options. Raises SpecError."""
    name = Path(path).read_text().strip()
    if name == "exits":
        os._exit(7)
    if name not in KINDS:
        raise SpecError(f"{path} holds no known kind: {name[:40]!r}")
    return NumpyEngine(KINDS[name])


def write_models(folder: Path, *kinds: str) -> Path:
    """Write one model file per kind, named after it; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        (folder / f"{kind}.fake").write_text(kind)
    return folder
