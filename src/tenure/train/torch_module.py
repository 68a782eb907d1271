"""A torch module as a training program. Data: ``x_train.npy`` … as in `load_arrays`; what it assumes: docs/training.md.

Parameters and buffers are copied into one live module, and the optimizer's state into one live optimizer, before they
are used: a few memory copies beside a whole backward pass, and no result depends on what was computed before. The
optimizer's state is handed out with the weights (``optimizer/<parameter>/<part>``), so that any process goes on with
the same bits. Memory is always torch's own: kernels may round differently for arrays that are aligned differently.
Weighed and rejected: `torch.use_deterministic_algorithms`, which loads the compiler and changes nothing on one
CPU thread. Not here: cutting a module in two (`torch_cut`), writing ONNX (`torch_onnx`). CPU only.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tenure.errors import SpecError
from tenure.train.programs import Arrays, draws_random, load_arrays, share_right
from tenure.train.torch_cpu import EVALUATED_AT_ONCE, keep_memory, obey_threads, seeded
from tenure.train.torch_cut import split

OPTIMIZERS: Mapping[str, tuple[Any, float]] = {
    "adam": (torch.optim.Adam, 0.001),
    "adamw": (torch.optim.AdamW, 0.001),
    "sgd": (torch.optim.SGD, 0.01),
}
"""Name -> class and default rate."""
_STATE = "optimizer/"
_COUNTER = "num_batches_tracked"


class TorchModule:
    """Adapter from a torch module to `tenure.train.programs.Program`.

    module: one that was made. make: makes another, with weights drawn anew from torch's generator.
    optimizer, rate, momentum, decay: see docs/training.md; rate 0 is the optimizer's default. cut: the module, as in
    `named_modules`, before which everything is frozen. Raises SpecError for options that do not fit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        make: Callable[[], nn.Module],
        *,
        reference: str = "",
        optimizer: str = "adam",
        rate: float = 0.0,
        momentum: float = 0.9,
        decay: float = 0.0,
        cut: str = "",
    ) -> None:
        obey_threads()
        keep_memory()
        self.reference = reference or type(module).__name__
        self._make, self._cut = make, cut
        with seeded(0):  # the frozen part is no part of the weights: it must be the same in every process
            self._whole = make() if cut else module
        self._frozen: Any = None
        self._live: nn.Module = self._whole
        if cut:
            self._frozen, self._live = split(self._whole, cut, self.reference)
        self._tensors = _tensors(self._live, self.reference)
        self._views = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._trained = {name: p for name, p in self._live.named_parameters() if p.requires_grad}
        if not self._trained:
            raise SpecError(f'program "{self.reference}": no parameter requires a gradient; there is nothing to train')
        parameters = {name for name, _ in self._live.named_parameters()}
        self._moving = [name for name, t in self._tensors.items() if name not in parameters and t.is_floating_point()]
        self._optimizer = self._new_optimizer(optimizer, rate, momentum, decay)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._held: Arrays = {}
        self._shown: NDArray[Any] | None = None
        self._channels_last: bool | None = None
        """Whether images keep their layout in memory; None before it was tried."""
        self.on_features = False
        """Whether the x of batches are what `features` gave for them (a cache), not the frozen part's inputs."""

    @property
    def averaged(self) -> tuple[str, ...]:
        """See `programs.averaged`: running statistics."""
        return tuple(self._moving)

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """See Program. A module's own `data(inputs)` goes before."""
        own = self._method("data")
        train, held_out = own(inputs) if own else load_arrays(inputs)
        self._shown = held_out["x"][:2]
        return train, held_out

    def build(self, seed: int) -> Arrays:
        """See Program. The optimizer's state joins with the first update, as torch makes it."""
        with seeded(seed):
            made = self._make()
        built = split(made, self._cut, self.reference)[1] if self._cut else made
        return {name: tensor.numpy().copy() for name, tensor in _tensors(built, self.reference).items()}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """See Program. Running statistics appear as their difference times the number of examples."""
        seed = int(rng.integers(1 << 63))
        y = torch.tensor(np.asarray(batch["y"]))
        self._load(weights)
        self._live.train()
        with seeded(seed):
            loss = self._loss(self._outputs(batch["x"], rng, on_features=self.on_features), y)
            loss.backward()
        n = len(y)
        found: Arrays = {}
        for name, parameter in self._trained.items():
            found[name] = np.zeros_like(weights[name]) if parameter.grad is None else parameter.grad.contiguous().numpy()
            parameter.grad = None
        for name in self._moving:
            found[name] = np.asarray((self._views[name] - weights[name]) * n, weights[name].dtype)
        return found, float(loss.detach()), n

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """See Program."""
        self._load(weights)
        self._load_state(weights)
        for name, parameter in self._trained.items():
            parameter.grad = torch.empty_like(parameter)
            np.divide(summed[name], n, out=parameter.grad.numpy(), casting="same_kind")
        schedule = self._method("schedule")
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * float(schedule(round_)) if schedule else rate
        self._optimizer.step()
        following = dict(weights)
        for name, parameter in self._trained.items():
            following[name], parameter.grad = self._views[name].copy(), None
        for name in self._moving:
            following[name] = np.asarray(weights[name] + summed[name] / n, weights[name].dtype)
        for name in weights:
            if name.rpartition(".")[2] == _COUNTER:
                following[name] = np.asarray(weights[name] + 1)
        self._held = self._state()
        return following | self._held

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """See Program."""
        return share_right(self._labels_of(weights, held_out["x"], self.on_features), np.asarray(held_out["y"]))

    def predict(self, weights: Arrays, x: Any, *, on_features: bool = False) -> NDArray[Any]:
        """Return the label of each example of x, or of each row of what `features` gave."""
        return self._labels_of(weights, x, on_features)

    def export(self, weights: Arrays, path: Path) -> None:
        """Write ONNX: input ``x`` as in ``x_test.npy`` but float32; outputs ``label``, and ``probabilities`` of scores.

        Raises SpecError for a module that torch can't trace, and for a `transform` that changes x in evaluation.
        """
        from tenure.train.torch_onnx import write_onnx  # only the export pays for it

        if self._shown is None:
            raise SpecError(f'program "{self.reference}": export follows data(inputs), which says how x looks')
        shown = np.array(self._shown)
        transform = self._method("transform")
        if transform and not np.array_equal(np.asarray(transform(shown.copy(), None)), shown):
            raise SpecError(
                f'program "{self.reference}": transform(x, None) changes x, and NumPy code is not part of an ONNX model. '
                "Do in forward what evaluation needs."
            )
        self._load(weights)
        self._live.eval()
        is_bytes, is_images = shown.dtype == np.uint8, _is_images(shown)

        def answers(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = x.permute(0, 3, 1, 2).contiguous() if is_images else x
            x = x / 255 if is_bytes else x
            outputs = self._live(x if self._frozen is None else self._frozen(x))
            labels = self._labels(outputs)
            return (labels, outputs.softmax(1)) if outputs.ndim == 2 else (labels,)

        write_onnx([part for part in (self._frozen, self._live) if part is not None], answers, shown, path, self.reference)

    def features(self, x: NDArray[Any], rng: np.random.Generator | None = None) -> NDArray[Any]:
        """Return what the frozen part gives for examples x, augmented when there is an rng: the head's input."""
        frozen = self._need_frozen()
        with torch.inference_mode():
            found: NDArray[Any] = frozen(self._input(x, rng)).numpy()
        return found

    def identity(self) -> bytes:
        """Return a SHA-256 that changes with the frozen part's weights, its steps, the transform's code and torch."""
        frozen = self._need_frozen()
        digest = hashlib.sha256(f"{self.reference} {self._cut} {torch.__version__}\n{frozen.code}".encode())
        if transform := self._method("transform"):
            digest.update(inspect.getsource(transform).encode())
        for name, tensor in frozen.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.digest()

    def augments(self, x: NDArray[Any]) -> bool:
        """Return whether `transform` draws random numbers for examples x in training."""
        return draws_random(self._method("transform"), x)

    def _method(self, name: str) -> Callable[..., Any] | None:
        """Return the user's method; an attribute of the name that is no method means something else to the module."""
        found = getattr(self._whole, name, None)
        return found if inspect.isroutine(found) else None

    def _need_frozen(self) -> Any:
        if self._frozen is None:
            raise SpecError(
                f'program "{self.reference}" has no frozen part; name the layer to cut at, options = {{ cut = "…" }}'
            )
        return self._frozen

    def _outputs(self, x: Any, rng: np.random.Generator | None, *, on_features: bool) -> torch.Tensor:
        if on_features:
            outputs: torch.Tensor = self._live(to_input(np.ascontiguousarray(x)))
            return outputs
        given = self._input(x, rng)
        if self._frozen is not None:
            with torch.no_grad():
                given = self._frozen(given)
        outputs = self._live(given)
        return outputs

    def _input(self, x: Any, rng: np.random.Generator | None) -> torch.Tensor:
        transform = self._method("transform")
        if transform:
            x = transform(np.array(x), rng)
        if isinstance(x, torch.Tensor):
            return x
        tensor = to_input(np.ascontiguousarray(x))
        if tensor.is_contiguous():
            return tensor
        if self._channels_last is None:
            self._channels_last = self._takes(tensor[:2])
        return tensor if self._channels_last else tensor.contiguous()

    def _takes(self, images: torch.Tensor) -> bool:
        """Return whether the module runs on images laid out with channels last; one that calls `view` may not.

        Tried once: convolutions and pooling on a CPU are 1.3 to 1.5 times as fast so (the net of benchmarks/programs).
        """
        modules = [module for module in (self._frozen, self._live) if module is not None]
        before = [[buffer.clone() for buffer in module.buffers()] for module in modules]
        training = self._live.training
        self._live.eval()
        try:
            with torch.no_grad(), seeded(0):
                nn.Sequential(*modules)(images)
        except RuntimeError:
            return False
        finally:
            self._live.train(training)
            for module, buffers in zip(modules, before, strict=True):
                for buffer, values in zip(module.buffers(), buffers, strict=True):
                    buffer.copy_(values)
        return True

    def _loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the sum of the examples' losses."""
        own = getattr(self._whole, "loss", None)
        if not callable(own):
            return nn.functional.cross_entropy(outputs, y, reduction="sum")
        loss: torch.Tensor = own(outputs, y)
        if loss.ndim == 0:
            return loss * len(y)
        if loss.shape[0] != len(y):
            raise SpecError(
                f'program "{self.reference}": loss(outputs, y) gave shape {tuple(loss.shape)} for {len(y)} examples; it must '
                "return the loss of each example, or their mean"
            )
        return loss.sum()

    def _labels(self, outputs: torch.Tensor) -> torch.Tensor:
        own = self._method("labels")
        labels: torch.Tensor = own(outputs) if own else outputs.argmax(1)
        return labels

    def _labels_of(self, weights: Arrays, x: Any, on_features: bool) -> NDArray[Any]:
        self._load(weights)
        self._live.eval()
        with torch.inference_mode():
            parts = [
                self._labels(self._outputs(x[at : at + EVALUATED_AT_ONCE], None, on_features=on_features)).numpy()
                for at in range(0, len(x), EVALUATED_AT_ONCE)
            ]
        return np.concatenate(parts)

    def _load(self, weights: Arrays) -> None:
        for name, view in self._views.items():
            if name not in weights or weights[name].shape != view.shape:
                found = weights[name].shape if name in weights else "nothing"
                raise SpecError(
                    f'program "{self.reference}": the weights have {found} for {name!r}; the module has {view.shape}. The '
                    "module changed since this run began: begin a new run."
                )
            np.copyto(view, weights[name], casting="same_kind")

    def _new_optimizer(self, kind: str, rate: float, momentum: float, decay: float) -> torch.optim.Optimizer:
        own = self._method("optimizer")
        if own:
            made: torch.optim.Optimizer = own(list(self._trained.values()))
            return made
        if kind not in OPTIMIZERS:
            raise SpecError(
                f'program "{self.reference}": there is no optimizer {kind!r}; valid: {", ".join(OPTIMIZERS)}, or a method '
                "optimizer(parameters) of the module that returns one of torch.optim"
            )
        make, usual_rate = OPTIMIZERS[kind]
        values = {"lr": rate or usual_rate, "weight_decay": decay} | ({"momentum": momentum} if kind == "sgd" else {})
        try:
            made = make(list(self._trained.values()), **values)
        except ValueError as error:
            raise SpecError(f'program "{self.reference}": optimizer {kind!r}: {error}') from error
        return made

    def _load_state(self, weights: Arrays) -> None:
        """Make the optimizer's state that of the weights. Arrays handed out last are those it still has."""
        given = {key: array for key, array in weights.items() if key.startswith(_STATE)}
        if given.keys() != self._held.keys():
            self._optimizer.state.clear()
            self._held = {}
        for key, array in given.items():
            if self._held.get(key) is not array:
                name, _, part = key.removeprefix(_STATE).rpartition("/")
                self._optimizer.state[self._trained[name]][part] = torch.tensor(array)

    def _state(self) -> Arrays:
        found: Arrays = {}
        for name, parameter in self._trained.items():
            for part, value in self._optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    found[f"{_STATE}{name}/{part}"] = value.numpy().copy()
                elif value is not None:
                    raise SpecError(
                        f'program "{self.reference}": {type(self._optimizer).__name__} keeps {part!r} as '
                        f"{type(value).__name__}; only state kept as tensors can go on in another process"
                    )
        return found


def to_input(x: NDArray[Any]) -> torch.Tensor:
    """Return x as a tensor of torch's own memory: uint8 as float32 / 255, with channels first if it looks like images.

    Images keep their order in memory: torch calls that layout channels last.
    """
    tensor = torch.tensor(x, dtype=torch.float32) if x.dtype in (np.uint8, np.float64) else torch.tensor(x)
    if x.dtype == np.uint8:
        tensor.div_(255)
    return tensor.permute(0, 3, 1, 2) if _is_images(x) else tensor


def _is_images(x: NDArray[Any]) -> bool:
    return x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] in (1, 3, 4)


def _tensors(module: nn.Module, reference: str) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers, each once, detached."""
    kept = module.state_dict()
    named = [*module.named_parameters(), *((name, buffer) for name, buffer in module.named_buffers() if name in kept)]
    for name, tensor in named:
        if nn.parameter.is_lazy(tensor):
            raise SpecError(
                f'program "{reference}": {name} gets its shape from the first input only; give the layer its number of inputs'
            )
        if tensor.device.type != "cpu" or tensor.dtype in (torch.bfloat16, torch.complex32):
            raise SpecError(
                f'program "{reference}": {name} is {tensor.dtype} on {tensor.device}; weights must be on the CPU and of a type '
                "that NumPy has. Build the module there, as float32."
            )
    return {name: tensor.detach() for name, tensor in named}
