"""Three small models for each of five engines, from the seed: what the benchmarks of images serve.

    perceptron    64-32-10, trained on scikit-learn's digits; the same weights for every engine
    convolution   8 filters of 3 x 3, then a line to 10 classes, weights drawn; scikit-learn: logistic regression on digits
    boosting      40 trees of depth 3, gradient-boosted on digits; ONNX Runtime runs the trees, NumPy, LiteRT and PyTorch the
                  same as products of matrices; scikit-learn: AdaBoost of logistic regressions (its trees are not safe to load)

NumPy's are .npz files for `benchmarks/programs/numpy_door.py`; LiteRT's are written with the schema in its wheel, without
TensorFlow. scikit-learn fits, so it has to be there, whatever is written.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.image_grammar import DOORS, Served, Service, Tensor

Weights = Mapping[str, np.ndarray[Any, Any]]
LIGHT = ("numpy", "onnxruntime", "litert")
ENGINES = ("numpy", "sklearn", "onnxruntime", "litert", "torch")
ENDINGS = {"numpy": ".npz", "sklearn": ".skops", "onnxruntime": ".onnx", "litert": ".tflite", "torch": ".pt2"}
KINDS = ("perceptron", "convolution", "boosting")
DEPTH, NODES, LEAVES = 3, 7, 8


def write(folder: Path, engine: str, kind: str, *, seed: int = 0) -> Path:
    """Write one model into a folder that is made where it is missing; return its file, `<kind><ending>`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}{ENDINGS[engine]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that stop early, and of exporters about their own insides
        _WRITERS[engine](path, kind, seed)
    return path


def service(engine: str) -> Service:
    """Return what held-out runs of an engine are drawn for."""
    models = tuple(_served(engine, kind) for kind in KINDS)
    if engine == "numpy":
        return Service(engine, models, ("http-json", "http-binary"), settings=False)
    return Service(engine, models, DOORS)


def _served(engine: str, kind: str) -> Served:
    if engine == "sklearn":
        outputs = Tensor("label", "INT64", (-1,)), Tensor("probability", "FP64", (-1, 10))
        return Served(kind, (Tensor("x", "FP64", (-1, 64)),), outputs)
    shape = (-1, 8, 8, 1) if kind == "convolution" else (-1, 64)
    names = ("probability",) if engine == "onnxruntime" and kind == "boosting" else ("score", "probability")
    return Served(kind, (Tensor("x", "FP32", shape),), tuple(Tensor(name, "FP32", (-1, 10)) for name in names))


def turn_a_bit(path: Path) -> None:
    """Turn the last bit of the largest weight of a model of NumPy's, in place."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = "filters" if "filters" in arrays else "w1"
    flat = arrays[name].reshape(-1).view(np.uint32)
    flat[int(np.argmax(np.abs(arrays[name])))] ^= 1
    np.savez(path, **arrays)


@functools.cache
def _digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x, y


@functools.cache
def _fitted(kind: str, seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.neural_network import MLPClassifier

    if kind == "perceptron":
        return MLPClassifier((32,), solver="lbfgs", max_iter=40, random_state=seed).fit(*_digits())
    return GradientBoostingClassifier(n_estimators=4, max_depth=DEPTH, random_state=seed).fit(*_digits())


def weights(kind: str, seed: int) -> Weights:
    """Return a model's arrays in FP32, by name."""
    if kind == "perceptron":
        fitted = _fitted(kind, seed)
        found = {"w1": fitted.coefs_[0], "b1": fitted.intercepts_[0], "w2": fitted.coefs_[1], "b2": fitted.intercepts_[1]}
    elif kind == "convolution":
        rng = np.random.default_rng(seed)
        found = {
            "filters": rng.standard_normal((3, 3, 8)) / 3,  # height, width, filter
            "bias": rng.standard_normal(8) / 10,
            "w": rng.standard_normal((6 * 6 * 8, 10)) / 17,
            "b": rng.standard_normal(10) / 10,
        }
    else:
        found = _as_products(_fitted(kind, seed))
    return {
        name: np.ascontiguousarray(array, array.dtype if array.dtype == np.int32 else np.float32)
        for name, array in found.items()
    }


def _as_products(fitted: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return trees as: compare (x[feature] <= threshold), count along the paths (@ paths == lefts), add (@ values + start)."""
    trees = [(tree.tree_, number) for row in fitted.estimators_ for number, tree in enumerate(row)]
    feature = np.zeros((len(trees), NODES), np.int32)
    threshold = np.full((len(trees), NODES), 3e38)  # where a branch ends early everything goes left
    values = np.zeros((len(trees), LEAVES, 10))
    for index, (tree, number) in enumerate(trees):

        def place(node: int, at: int, tree: Any = tree, index: int = index, number: int = number) -> None:
            if at >= NODES:
                values[index, at - NODES, number] = fitted.learning_rate * tree.value[node, 0, 0]
            elif tree.children_left[node] < 0:
                place(node, 2 * at + 1)
            else:
                feature[index, at], threshold[index, at] = tree.feature[node], tree.threshold[node]
                place(tree.children_left[node], 2 * at + 1)
                place(tree.children_right[node], 2 * at + 2)

        place(0, 0)
    path = np.zeros((NODES, LEAVES))
    for leaf in range(LEAVES):
        at = leaf + NODES
        while at:
            parent = (at - 1) // 2
            path[parent, leaf] = 1.0 if at == 2 * parent + 1 else -1.0
            at = parent
    paths = np.kron(np.eye(len(trees)), path)
    start = np.log(fitted.init_.class_prior_)
    lefts = np.maximum(paths, 0).sum(0)
    return {
        "feature": feature.reshape(-1), "threshold": threshold.reshape(-1), "paths": paths, "lefts": lefts,
        "values": values.reshape(-1, 10), "start": start,
    }  # fmt: skip


def _write_numpy(path: Path, kind: str, seed: int) -> None:
    np.savez(path, **weights(kind, seed))


def _write_sklearn(path: Path, kind: str, seed: int) -> None:
    import skops.io
    from sklearn.ensemble import AdaBoostClassifier
    from sklearn.linear_model import LogisticRegression

    line = LogisticRegression(max_iter=25)
    made = {"convolution": line, "boosting": AdaBoostClassifier(line, n_estimators=3, random_state=seed)}
    estimator = _fitted(kind, seed) if kind == "perceptron" else made[kind].fit(*_digits())
    skops.io.dump(estimator, path)


def _write_onnx(path: Path, kind: str, seed: int) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    if kind == "boosting":
        from skl2onnx import to_onnx
        from skl2onnx.common.data_types import FloatTensorType

        made = to_onnx(
            _fitted(kind, seed), initial_types=[("x", FloatTensorType([None, 64]))], options={"zipmap": False}, target_opset=17
        )
        renamed = {"probabilities": "probability"}
        for node in made.graph.node:
            node.output[:] = [renamed.get(name, name) for name in node.output]
        del made.graph.output[:]
        made.graph.output.append(helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 10]))
        save(made, path)
        return
    w = dict(weights(kind, seed))
    if kind == "perceptron":
        nodes = [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["score"]),
        ]
        shape = ["n", 64]
    else:
        w["filters"] = np.ascontiguousarray(w["filters"].transpose(2, 0, 1)[:, None])
        w["flat"] = np.array([-1, 6 * 6 * 8], np.int64)
        nodes = [
            helper.make_node("Transpose", ["x"], ["c"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["c", "filters", "bias"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", ["t", "flat"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "b"], ["score"]),
        ]
        shape = ["n", 8, 8, 1]
    nodes.append(helper.make_node("Softmax", ["score"], ["probability"], axis=1))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 10]) for name in ("score", "probability")]
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in w.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def _write_litert(path: Path, kind: str, seed: int) -> None:
    from tests.serve import make_tflite

    relu, w = 1, weights(kind, seed)
    dense = "FullyConnectedOptions"
    inner: list[tuple[str, tuple[int, ...], str]]
    if kind == "perceptron":
        operators = [
            ("FULLY_CONNECTED", (dense, {"fusedActivationFunction": relu}), ["x", "w1", "b1"], ["h"]),
            ("FULLY_CONNECTED", dense, ["h", "w2", "b2"], ["score"]),
        ]
        shape, inner = (1, 64), [("h", (1, 32), "FP32")]
        constants = {"w1": w["w1"].T, "b1": w["b1"], "w2": w["w2"].T, "b2": w["b2"]}
    elif kind == "convolution":
        convolution = {"padding": 1, "strideW": 1, "strideH": 1, "fusedActivationFunction": relu}
        operators = [
            ("CONV_2D", ("Conv2DOptions", convolution), ["x", "filters", "bias"], ["h"]),
            ("RESHAPE", ("ReshapeOptions", {"newShape": [-1, 288]}), ["h", "flat"], ["f"]),
            ("FULLY_CONNECTED", dense, ["f", "w", "b"], ["score"]),
        ]
        shape, inner = (1, 8, 8, 1), [("h", (1, 6, 6, 8), "FP32"), ("f", (1, 288), "FP32")]
        filters = w["filters"].transpose(2, 0, 1)[..., None]
        constants = {"filters": filters, "bias": w["bias"], "w": w["w"].T, "b": w["b"], "flat": np.array([-1, 288], np.int32)}
    else:
        many, ends = len(w["feature"]), len(w["lefts"])
        operators = [
            ("GATHER", ("GatherOptions", {"axis": 1}), ["x", "feature"], ["g"]),
            ("LESS_EQUAL", "LessEqualOptions", ["g", "threshold"], ["left"]),
            ("CAST", "CastOptions", ["left"], ["l"]),
            ("FULLY_CONNECTED", dense, ["l", "paths", "none"], ["c"]),
            ("EQUAL", "EqualOptions", ["c", "lefts"], ["leaf"]),
            ("CAST", "CastOptions", ["leaf"], ["e"]),
            ("FULLY_CONNECTED", dense, ["e", "values", "start"], ["score"]),
        ]
        shape = (1, 64)
        inner = [("g", (1, many), "FP32"), ("left", (1, many), "BOOL"), ("l", (1, many), "FP32")]
        inner += [("c", (1, ends), "FP32"), ("leaf", (1, ends), "BOOL"), ("e", (1, ends), "FP32")]
        constants = {
            "feature": w["feature"], "threshold": w["threshold"][None], "paths": w["paths"].T, "lefts": w["lefts"][None],
            "none": np.zeros(ends, np.float32), "values": w["values"].T, "start": w["start"],
        }  # fmt: skip
    operators.append(("SOFTMAX", "SoftmaxOptions", ["score"], ["probability"]))
    make_tflite.write(
        path,
        operators,
        [("x", shape, "FP32")],
        [("score", (1, 10), "FP32"), ("probability", (1, 10), "FP32")],
        tuple((name, np.ascontiguousarray(array)) for name, array in constants.items()),
        inner,
    )


def _write_torch(path: Path, kind: str, seed: int) -> None:
    import torch

    w = {
        name: torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)
        for name, array in weights(kind, seed).items()
    }

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in w.items():
                self.register_buffer(name, tensor)
            if kind == "convolution":
                self.register_buffer("kernel", w["filters"].permute(2, 0, 1)[:, None].contiguous())

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            if kind == "perceptron":
                score = torch.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2
            elif kind == "convolution":
                h = torch.relu(torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), self.kernel, self.bias))
                score = h.permute(0, 2, 3, 1).reshape(-1, 288) @ self.w + self.b
            else:
                left = (x[:, self.feature] <= self.threshold).to(torch.float32)
                leaf = ((left @ self.paths) == self.lefts).to(torch.float32)
                score = leaf @ self.values + self.start
            return {"score": score, "probability": score.softmax(1)}

    shape = (2, 8, 8, 1) if kind == "convolution" else (2, 64)
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(Net().eval(), (torch.zeros(shape),), dynamic_shapes=({0: rows},))
    torch.export.save(program, path)


_WRITERS: Mapping[str, Callable[[Path, str, int], None]] = {
    "numpy": _write_numpy,
    "sklearn": _write_sklearn,
    "onnxruntime": _write_onnx,
    "litert": _write_litert,
    "torch": _write_torch,
}
