"""scikit-learn estimators from skops files: never a pickle, and only types that skops trusts by itself.

One input "x" (FP64, rows by features); outputs "label" and, where the estimator has it, "probability".
An estimator without classes (a regressor) gives "prediction".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import MissingExtra, SpecError
from tenure.serve.faults import ModelFailed
from tenure.serve.tensors import Array, TensorMetadata, datatype_of


def load(path: Path, threads: int) -> ScikitEngine:
    """Load a skops file. Raises SpecError (not loadable, holds untrusted types), MissingExtra."""
    try:
        import skops.io  # heavy (scikit-learn): only where such a model is really loaded
    except ImportError as error:
        raise MissingExtra("skops", "demo", "Running a scikit-learn model") from error
    try:
        untrusted = skops.io.get_untrusted_types(file=path)
        if untrusted:
            raise SpecError(f"{path} holds types that are not trusted: {', '.join(untrusted)}. Export the model to ONNX")
        estimator = skops.io.load(path, trusted=[])
    except SpecError:
        raise
    except Exception as error:  # a broken archive raises whatever its reader met: zip, JSON, key, type errors
        raise SpecError(f"skops cannot load {path}: {type(error).__name__}: {error}") from error
    return ScikitEngine(estimator, path, threads)


class ScikitEngine:
    """See Engine."""

    platform = "sklearn_skops"

    def __init__(self, estimator: Any, path: Path, threads: int) -> None:
        features = getattr(estimator, "n_features_in_", None)
        if not hasattr(estimator, "predict") or features is None:
            raise SpecError(f"{path} holds a {type(estimator).__name__}, which is not a fitted estimator with predict()")
        self._estimator = estimator
        self._threads = threads
        self.inputs = (TensorMetadata("x", "FP64", (-1, int(features))),)
        classes = getattr(estimator, "classes_", None)
        if classes is None:
            self.outputs: tuple[TensorMetadata, ...] = (TensorMetadata("prediction", "FP64", (-1,)),)
        else:
            self.outputs = (TensorMetadata("label", datatype_of(np.asarray(classes)), (-1,)),)
            if hasattr(estimator, "predict_proba"):
                self.outputs += (TensorMetadata("probability", "FP64", (-1, len(classes))),)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """See Engine."""
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

        names = [meta.name for meta in self.outputs if not outputs or meta.name in outputs]
        try:
            with threadpool_limits(limits=self._threads):
                return {name: self._run(name, inputs["x"]) for name in names}
        except Exception as error:  # an estimator may raise anything
            raise ModelFailed(f"the model failed: {type(error).__name__}: {error}") from error

    def _run(self, name: str, x: Array) -> Array:
        if name == "probability":
            return np.asarray(self._estimator.predict_proba(x), dtype=np.float64)
        found = np.asarray(self._estimator.predict(x))
        if found.dtype.kind in "US":
            encoded = np.empty(found.size, dtype=object)
            encoded[:] = [str(item).encode() for item in found]
            return encoded
        return found.astype(np.float64) if name == "prediction" else found

    def close(self) -> None:
        """See Engine."""
        self._estimator = None
