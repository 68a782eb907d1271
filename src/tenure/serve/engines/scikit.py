"""scikit-learn estimators from skops files: never a pickle, and only types that skops trusts by itself.

One input "x" (FP64, rows by features); outputs "label" and, where the estimator has it, "probability".
An estimator without classes (a regressor) gives "prediction". Its `n_jobs` becomes the instance's threads, and the pools
of the numeric libraries are held to as many during a call (found once: looking for them costs 8 ms, a small answer 0.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import MissingExtra, SpecError
from tenure.serve.engines import Setting
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.tensors import Array, TensorMetadata, check_inputs, check_outputs, datatype_of


def load(path: Path, setting: Setting) -> ScikitEngine:
    """Load a skops file. Raises SpecError (not loadable, holds untrusted types), MissingExtra."""
    try:
        import skops.io  # heavy (scikit-learn): only where such a model is really loaded
    except ImportError as error:
        raise MissingExtra("skops", "sklearn", "Running a scikit-learn model") from error
    try:
        untrusted = skops.io.get_untrusted_types(file=path)
        if untrusted:
            raise SpecError(
                f"{path} holds types that skops does not trust: {', '.join(untrusted)}. Export the model to ONNX, as with "
                "skl2onnx.to_onnx(model, x[:1], options={'zipmap': False})"
            )
        estimator = skops.io.load(path, trusted=[])
    except SpecError:
        raise
    except Exception as error:  # a broken archive raises whatever its reader met: zip, JSON, key, type errors
        raise SpecError(f"skops cannot load {path}: {type(error).__name__}: {error}") from error
    return ScikitEngine(estimator, path, setting.threads)


class ScikitEngine:
    """See Engine."""

    platform = "sklearn_skops"

    def __init__(self, estimator: Any, path: Path, threads: int) -> None:
        from threadpoolctl import ThreadpoolController  # comes with scikit-learn

        features = getattr(estimator, "n_features_in_", None)
        if not hasattr(estimator, "predict") or features is None:
            raise SpecError(f"{path} holds a {type(estimator).__name__}, which is not a fitted estimator with predict()")
        jobs = {name: threads for name in estimator.get_params() if name.split("__")[-1] == "n_jobs"}
        self._estimator = estimator.set_params(**jobs)
        self._threads = threads
        self._pools = ThreadpoolController()
        self.inputs = (TensorMetadata("x", "FP64", (-1, int(features))),)
        classes = getattr(estimator, "classes_", None)
        if isinstance(classes, list):
            raise SpecError(f"{path} holds a {type(estimator).__name__} with several outputs. Export the model to ONNX")
        if classes is None:
            many = getattr(estimator, "n_outputs_", 1)
            self.outputs: tuple[TensorMetadata, ...] = (
                TensorMetadata("prediction", "FP64", (-1,) if many == 1 else (-1, many)),
            )
        else:
            self.outputs = (TensorMetadata("label", datatype_of(np.asarray(classes)), (-1,)),)
            if hasattr(estimator, "predict_proba"):
                self.outputs += (TensorMetadata("probability", "FP64", (-1, len(classes))),)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """See Engine."""
        check_inputs(inputs, self.inputs)
        check_outputs(outputs, self.outputs)
        names = [meta.name for meta in self.outputs if not outputs or meta.name in outputs]
        x = inputs["x"]
        try:
            with self._pools.limit(limits=self._threads):
                return {name: self._run(name, x) for name in names}
        except Exception as error:  # an estimator may raise anything
            if not np.isfinite(x).all():
                raise InputRefused(f'input "x" holds NaN or infinity, which the estimator does not take: {error}') from error
            raise ModelFailed(f"the model failed: {type(error).__name__}: {error}") from error

    def _run(self, name: str, x: Array) -> Array:
        if name == "probability":
            return np.asarray(self._estimator.predict_proba(x), dtype=np.float64)
        found = np.asarray(self._estimator.predict(x))
        if found.dtype.kind in "USO":
            encoded = np.empty(found.size, dtype=object)
            encoded[:] = [str(item).encode() for item in found]
            return encoded
        return found.astype(np.float64) if name == "prediction" else found

    def close(self) -> None:
        """See Engine."""
        self._estimator = None
