"""A Keras 3 model, on torch, as a training program. Data: ``x_train.npy`` … as in `load_arrays`; more: docs/training.md.

Variables are known by their place and name (``003.kernel``, and ``optimizer/003``): Keras numbers layers through a whole
process, so their paths differ between a process that made one model and one that made two. Each call copies the weights
into one live model, and `update` the optimizer's state into one live optimizer, so that no result depends on what came
before. Not here: other backends; they have no `backward`, and none is a dependency of Tenure.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from numpy.typing import NDArray

from tenure.errors import SpecError
from tenure.train.programs import Arrays, as_floats, draws_random, load_arrays, share_right
from tenure.train.torch_cpu import EVALUATED_AT_ONCE, keep_memory, obey_threads, seeded

OPTIMIZERS: Mapping[str, tuple[Any, float]] = {
    "adam": (keras.optimizers.Adam, 0.001),
    "adamw": (keras.optimizers.AdamW, 0.001),
    "sgd": (keras.optimizers.SGD, 0.01),
}
"""Name -> class and default rate."""
_STATE = "optimizer/"
_SEED = "seed_generator_state"


class KerasModel:
    """Adapter from a Keras model to `tenure.train.programs.Program`.

    model: one that was made. make: makes another, with weights drawn anew.
    optimizer, rate, momentum, decay: for a model that is not compiled; see docs/training.md. cut: the name of the layer
    before which everything is frozen. Raises SpecError for options that do not fit the model, or another backend.
    """

    def __init__(
        self,
        model: Any,
        make: Callable[[], Any],
        *,
        reference: str = "",
        optimizer: str = "",
        rate: float = 0.0,
        momentum: float = 0.9,
        decay: float = 0.0,
        cut: str = "",
    ) -> None:
        self.reference = reference or type(model).__name__
        if keras.backend.backend() != "torch":
            raise SpecError(
                f'program "{self.reference}": Keras runs on {keras.backend.backend()} here; training needs its torch backend. '
                f"Unset KERAS_BACKEND (it is {os.environ.get('KERAS_BACKEND', '')!r}) or set it to torch."
            )
        obey_threads()
        keep_memory()
        self._make, self._cut = make, cut
        self._model = model
        self._options = (optimizer, rate, momentum, decay)
        self._live: _Trained | None = None
        self.on_features = False
        """Whether the x of batches are what `features` gave for them (a cache), not the frozen part's inputs."""

    @property
    def averaged(self) -> tuple[str, ...]:
        """See `programs.averaged`: moving statistics."""
        return tuple(self._live.moving) if self._live is not None else ()

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """See Program. The model is built for the shape of x. A model's own `data(inputs)` goes before."""
        own = self._method("data")
        train, held_out = own(inputs) if own else load_arrays(inputs)
        self._shown = np.array(held_out["x"][:2])
        with _all_seeded(0):  # the frozen part is no part of the weights: it must be the same in every process
            self._live = self._trained(self._make() if self._cut else self._model)
        return train, held_out

    def build(self, seed: int) -> Arrays:
        """See Program."""
        with _all_seeded(seed):
            return self._trained(self._make()).arrays()

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """See Program. Moving statistics appear as their difference times the number of examples."""
        live, seed = self._loaded(weights), int(rng.integers(1 << 63))
        for generator in live.generators:
            np.copyto(_view(generator), rng.integers(0, 1 << 31, generator.shape), casting="unsafe")
        y = torch.tensor(np.asarray(batch["y"]))
        n = len(y)
        with seeded(seed):
            given = self._input(batch["x"], rng, on_features=self.on_features)
            outputs = live.outputs(given, training=True, on_features=self.on_features)
            loss = live.loss(outputs, y) * n
            loss.backward()
        found: Arrays = {}
        for name, variable in live.parameters.items():
            gradient, variable.value.grad = variable.value.grad, None
            found[name] = np.zeros_like(weights[name]) if gradient is None else gradient.contiguous().numpy()
        for name, variable in live.moving.items():
            found[name] = np.asarray((_view(variable) - weights[name]) * n, weights[name].dtype)
        return found, float(loss.detach()), n

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """See Program."""
        live = self._loaded(weights)
        for name, variable in live.state.items():
            np.copyto(_view(variable), weights[name])
        means = [torch.tensor(summed[name] / n, dtype=variable.value.dtype) for name, variable in live.parameters.items()]
        schedule = self._method("schedule")
        if schedule:
            live.optimizer.learning_rate.assign(live.rate * float(schedule(round_)))
        with torch.no_grad():
            live.optimizer.apply(means, list(live.parameters.values()))
        moved = {name: np.asarray(weights[name] + summed[name] / n, weights[name].dtype) for name in live.moving}
        changed = {name: _view(variable).copy() for name, variable in (live.parameters | live.state).items()}
        return weights | moved | changed

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """See Program."""
        return share_right(self._labels_of(weights, held_out["x"], self.on_features), np.asarray(held_out["y"]))

    def predict(self, weights: Arrays, x: Any, *, on_features: bool = False) -> NDArray[Any]:
        """Return the label of each example of x, or of each row of what `features` gave."""
        return self._labels_of(weights, x, on_features)

    def export(self, weights: Arrays, path: Path) -> None:
        """Write ONNX: input ``x`` as in ``x_test.npy`` but float32; outputs ``label`` and ``probabilities``.

        Raises SpecError for a model that can't be traced, and for a `transform` that changes x in evaluation.
        """
        from tenure.train.torch_onnx import write_onnx  # only the export pays for it

        live = self._loaded(weights)
        transform = self._method("transform")
        if transform and not np.array_equal(np.asarray(transform(self._shown.copy(), None)), self._shown):
            raise SpecError(
                f'program "{self.reference}": transform(x, None) changes x, and NumPy code is not part of an ONNX model. '
                "Make a layer of what evaluation needs."
            )

        def answers(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = live.outputs(x / 255 if self._shown.dtype == np.uint8 else x, training=False, on_features=False)
            return live.labels(outputs), live.probabilities(outputs)

        write_onnx([part for part in (live.frozen, live.head) if part is not None], answers, self._shown, path, self.reference)

    def features(self, x: NDArray[Any], rng: np.random.Generator | None = None) -> NDArray[Any]:
        """Return what the frozen part gives for examples x, augmented when there is an rng: the head's input."""
        with torch.inference_mode():
            found: NDArray[Any] = self._frozen()(self._input(x, rng), training=False).numpy()
        return found

    def identity(self) -> bytes:
        """Return a SHA-256 that changes with the frozen part's weights, its layers, the transform's code and versions."""
        frozen = self._frozen()
        digest = hashlib.sha256(f"{self.reference} {self._cut} {keras.__version__} {torch.__version__}".encode())
        digest.update("\n".join(f"{type(layer).__name__} {_nameless(layer.get_config())}" for layer in frozen.layers).encode())
        if transform := self._method("transform"):
            digest.update(inspect.getsource(transform).encode())
        for variable in frozen.weights:
            digest.update(variable.name.encode() + _view(variable).tobytes())
        return digest.digest()

    def augments(self, x: NDArray[Any]) -> bool:
        """Return whether `transform` draws random numbers for examples x in training."""
        return draws_random(self._method("transform"), x)

    def _method(self, name: str) -> Callable[..., Any] | None:
        found = getattr(self._model, name, None)
        return found if inspect.isroutine(found) else None

    def _frozen(self) -> Any:
        if self._live is None or self._live.frozen is None:
            raise SpecError(
                f'program "{self.reference}" has no frozen part: name the layer to cut at, options = {{ cut = "…" }}, and '
                "call data(inputs) first"
            )
        return self._live.frozen

    def _input(self, x: Any, rng: np.random.Generator | None, *, on_features: bool = False) -> torch.Tensor:
        transform = self._method("transform")
        if transform and not on_features:
            x = transform(np.array(x), rng)
        return x if isinstance(x, torch.Tensor) else torch.tensor(as_floats(np.ascontiguousarray(x)))

    def _labels_of(self, weights: Arrays, x: Any, on_features: bool) -> NDArray[Any]:
        live = self._loaded(weights)
        parts = []
        with torch.inference_mode():
            for at in range(0, len(x), EVALUATED_AT_ONCE):
                given = self._input(x[at : at + EVALUATED_AT_ONCE], None, on_features=on_features)
                parts.append(live.labels(live.outputs(given, training=False, on_features=on_features)).numpy())
        return np.concatenate(parts)

    def _loaded(self, weights: Arrays) -> _Trained:
        live = self._live
        assert live is not None, "data(inputs) is called before all else"
        for name, variable in live.weights.items():
            if name not in weights or weights[name].shape != tuple(variable.shape):
                found = weights[name].shape if name in weights else "nothing"
                raise SpecError(
                    f'program "{self.reference}": the weights have {found} for {name!r}; the model has '
                    f"{tuple(variable.shape)}. The model changed since this run began: begin a new run."
                )
            np.copyto(_view(variable), weights[name], casting="same_kind")
        return live

    def _trained(self, model: Any) -> _Trained:
        """Return a model with its optimizer, built for the shape of x and cut."""
        if not model.built:
            model(self._input(self._shown, None))
        frozen, head = _split(model, self._cut, self.reference) if self._cut else (None, model)
        if not head.trainable_variables:
            raise SpecError(f'program "{self.reference}": no variable is trainable; there is nothing to train')
        return _Trained(model, frozen, head, self._new_optimizer(model), self._method("loss"))

    def _new_optimizer(self, model: Any) -> Any:
        kind, rate, momentum, decay = self._options
        if getattr(model, "compiled", False):
            if kind or rate:
                raise SpecError(
                    f'program "{self.reference}": the model is compiled with its optimizer; drop the option {kind or rate!r}'
                )
            return model.optimizer
        kind = kind or "adam"
        if kind not in OPTIMIZERS:
            raise SpecError(
                f'program "{self.reference}": there is no optimizer {kind!r}; valid: {", ".join(OPTIMIZERS)}, or compile the '
                "model with one of keras.optimizers"
            )
        make, usual_rate = OPTIMIZERS[kind]
        values = {"learning_rate": rate or usual_rate, "weight_decay": decay or None}
        return make(**values, **({"momentum": momentum} if kind == "sgd" else {}))


class _Trained:
    """One model's trained part, its optimizer, and its variables by name."""

    def __init__(self, model: Any, frozen: Any, head: Any, optimizer: Any, loss: Callable[..., Any] | None) -> None:
        self._model, self.frozen, self.head, self.optimizer, self._own_loss = model, frozen, head, optimizer, loss
        optimizer.build(head.trainable_variables)
        self.rate = float(optimizer.learning_rate)
        numbers = {id(variable): name for name, variable in _named(head.weights).items()}
        moving = {id(variable) for layer in head._flatten_layers() for variable in layer._non_trainable_variables}
        self.parameters = {numbers[id(variable)]: variable for variable in head.trainable_variables}
        self.moving = {numbers[id(v)]: v for v in head.weights if id(v) in moving and v.value.is_floating_point()}
        self.weights = {numbers[id(variable)]: variable for variable in head.weights}
        self.state = {f"{_STATE}{place:03d}": variable for place, variable in enumerate(optimizer.variables)}
        self.generators = [variable for variable in head.non_trainable_variables if variable.name == _SEED]
        last = getattr(head.layers[-1], "activation", None) if getattr(head, "layers", None) else None
        self._last = keras.activations.softmax if isinstance(head.layers[-1], keras.layers.Softmax) else last

    def arrays(self) -> Arrays:
        """Return copies of the weights and the optimizer's state."""
        return {name: _view(variable).copy() for name, variable in (self.weights | self.state).items()}

    def outputs(self, x: torch.Tensor, *, training: bool, on_features: bool) -> torch.Tensor:
        """Return what the model gives for x, or for features that the frozen part gave."""
        if self.frozen is not None and not on_features:
            with torch.no_grad():
                x = self.frozen(x, training=False)
        outputs: torch.Tensor = self.head(x, training=training)
        return outputs

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the examples, with the losses that layers add."""
        if getattr(self._model, "compiled", False):
            compiled: torch.Tensor = self._model.compute_loss(y=y, y_pred=outputs)
            return compiled
        if self._own_loss:
            each = self._own_loss(outputs, y)
        elif y.ndim == 2 and y.shape[1] > 1:
            each = keras.losses.categorical_crossentropy(y, outputs, from_logits=self._last is not keras.activations.softmax)
        else:
            scores = self._last is not keras.activations.softmax
            each = keras.losses.sparse_categorical_crossentropy(y.reshape(len(y)), outputs, from_logits=scores)
        loss: torch.Tensor = each.mean() + sum(self.head.losses)
        return loss

    def labels(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the place of the largest output; of a single output whether it is above the middle."""
        if outputs.shape[1] == 1:
            return (outputs[:, 0] > (0.5 if self._last is keras.activations.sigmoid else 0)).to(torch.int64)
        return outputs.argmax(1)

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs as shares of classes."""
        return outputs if self._last in (keras.activations.softmax, keras.activations.sigmoid) else outputs.softmax(1)


def _split(model: Any, cut: str, reference: str) -> tuple[Any, Any]:
    """Return the layers before layer `cut` as a frozen model, and the rest as another. Both share `model`'s variables."""
    names = [layer.name for layer in model.layers]
    if cut not in names:
        raise SpecError(f'program "{reference}": cut = {cut!r} names no layer; it has: {", ".join(names[:40])}')
    try:
        entry = model.get_layer(cut).input
        frozen, head = keras.Model(model.inputs, entry), keras.Model(entry, model.outputs)
    except (AttributeError, ValueError) as error:
        raise SpecError(
            f'program "{reference}" can\'t be cut at {cut!r}: {error}. Only a Sequential or functional model can, where the '
            "layers before reach the rest through that layer's input alone."
        ) from error
    frozen.trainable = False
    return frozen, head


def _nameless(config: Any) -> Any:
    """Return a layer's configuration without names, which count the layers of the process."""
    if isinstance(config, dict):
        return {key: _nameless(value) for key, value in config.items() if key != "name"}
    return config


def _named(variables: list[Any]) -> dict[str, Any]:
    return {f"{place:03d}.{variable.name}": variable for place, variable in enumerate(variables)}


def _view(variable: Any) -> NDArray[Any]:
    """Return a variable's own memory."""
    view: NDArray[Any] = variable.value.detach().numpy()
    return view


@contextmanager
def _all_seeded(seed: int) -> Iterator[None]:
    """Draw all that Keras begins with from `seed`; its initialisers take their seeds from Python's generator."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        with seeded(seed):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
