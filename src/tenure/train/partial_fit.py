"""A scikit-learn estimator with `partial_fit` as a training program.

Its gradient is the difference that one `partial_fit` over the shard makes to its parameters, times the shard's number of
examples; the update adds the mean. Estimators with ``coef_``/``intercept_`` or ``coefs_``/``intercepts_`` are understood
(SGDClassifier, Perceptron, MLPClassifier with solver "sgd" and no momentum…); optimizer state kept elsewhere begins anew
with each shard.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import SpecError
from tenure.train.programs import Arrays, load_arrays

_SINGLE = ("coef_", "intercept_", "t_")
_LISTS = ("coefs_", "intercepts_")


class PartialFit:
    """Adapter from an estimator to `tenure.train.programs.Program`. Data: ``x_train.npy`` … as in `load_arrays`."""

    def __init__(self, estimator: Any) -> None:
        self._pristine = estimator
        self._fitted: Any = None
        self._train: Arrays = {}

    averaged = ("t_",)
    """See `programs.averaged`: the count of steps."""

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """See Program."""
        train, held_out = load_arrays(inputs)
        self._train = train
        return train, held_out

    def build(self, seed: int) -> Arrays:
        """See Program. Linear parameters begin at zero, layers as the estimator draws them from `seed`."""
        weights = _parameters(self._begin(seed))
        return {key: value if "s_" in key or key == "t_" else np.zeros_like(value) for key, value in weights.items()}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """See Program. The loss is the share of errors before the step."""
        x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
        estimator = self._with(weights, seed=int(rng.integers(1 << 31)))
        wrong = float(np.sum(estimator.predict(x) != y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.partial_fit(x, y)
        after = _parameters(estimator)
        return {key: (after[key] - weights[key]) * len(y) for key in weights}, wrong, len(y)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """See Program."""
        return {key: weights[key] + summed[key] / n for key in weights}

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """See Program."""
        predicted = self.predict(weights, np.asarray(held_out["x"]))
        return float(np.mean(predicted == np.asarray(held_out["y"])))

    def predict(self, weights: Arrays, x: Any) -> Any:
        """Return the label of each row of x."""
        return self._with(weights).predict(x)

    def export(self, weights: Arrays, path: Path) -> None:
        """Write the estimator as ONNX: input ``x`` float32 [N, features]."""
        from skl2onnx import to_onnx  # optional and heavy
        from skl2onnx.common.data_types import FloatTensorType

        estimator = self._with(weights)
        types = [("x", FloatTensorType([None, self._train["x"].shape[1]]))]
        model = to_onnx(estimator, initial_types=types, options={id(estimator): {"zipmap": False}})
        path.write_bytes(model.SerializeToString())

    def _begin(self, seed: int) -> Any:
        estimator = copy.deepcopy(self._pristine)
        if "random_state" in estimator.get_params():
            estimator.set_params(random_state=seed % (1 << 31))
        classes, first = np.unique(np.asarray(self._train["y"]), return_index=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.partial_fit(np.asarray(self._train["x"][first]), classes, classes=classes)
        if not _parameters(estimator):
            raise SpecError(
                f"{type(estimator).__name__} has neither coef_ nor coefs_ after partial_fit: its parameters can't be "
                "averaged. Use a linear model or an MLP, or write a program."
            )
        return estimator

    def _with(self, weights: Arrays, seed: int = 0) -> Any:
        if self._fitted is None:
            self._fitted = self._begin(0)
        estimator = copy.deepcopy(self._fitted)
        if "random_state" in estimator.get_params():
            estimator.set_params(random_state=seed)
        if hasattr(estimator, "_random_state"):
            estimator._random_state = np.random.RandomState(seed)
        for key in _SINGLE:
            if key in weights:
                value = weights[key].copy()
                setattr(estimator, key, float(value) if key == "t_" else value)
        for key in _LISTS:
            if f"{key}.0" in weights:
                count = sum(name.startswith(f"{key}.") for name in weights)
                setattr(estimator, key, [weights[f"{key}.{i}"].copy() for i in range(count)])
        return estimator


def _parameters(estimator: Any) -> Arrays:
    found: Arrays = {key: np.array(getattr(estimator, key)) for key in _SINGLE if hasattr(estimator, key)}
    for key in _LISTS:
        if hasattr(estimator, key):
            found.pop("t_", None)
            found |= {f"{key}.{i}": np.array(values) for i, values in enumerate(getattr(estimator, key))}
    return found if len(found) > 1 else {}
