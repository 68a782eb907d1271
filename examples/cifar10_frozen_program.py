"""A softmax layer in NumPy over the features of a frozen MobileNetV2: transfer learning in a few minutes on one core.

`Photos` is what the job file names. The model is an ONNX file of yours, cut at the pool before its classifier; images are
enlarged to 96 x 96 within its graph. Any convolutional model will do: name its file, the tensor, and what a pixel becomes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tenure.train.features import Frozen
from tenure.train.onnx_features import onnx_features
from tenure.train.programs import Arrays, load_arrays

POOL = "MobilenetV2/Logits/AvgPool"


def Photos(model: str, output: str = POOL, side: int = 96, rate: float = 0.002, classes: int = 10) -> Frozen:
    """Return the program. model: path of the ONNX file, relative to this one. output: the tensor to cut at."""
    path = Path(__file__).parent / model
    cut = onnx_features(path, output=output, size=(side, side), scale=1 / 127.5, shift=-1.0)
    return Frozen(cut, cut.identity, Softmax(rate, classes), batch=50)


class Softmax:
    """One layer, cross entropy, Adam."""

    def __init__(self, rate: float = 0.002, classes: int = 10, decay: float = 1e-4) -> None:
        self.rate, self.classes, self.decay = rate, classes, decay
        self.width = 0

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """Return the features, which lie in the first of the inputs, with the labels of the images."""
        train, held_out = load_arrays(inputs)
        self.width = train["x"].shape[1]
        return train, held_out

    def build(self, seed: int) -> Arrays:
        """Return zeros: a softmax layer has one minimum, wherever it begins."""
        layer = {"w": np.zeros((self.width, self.classes), np.float32), "b": np.zeros(self.classes, np.float32)}
        return layer | {f"{kind}.{name}": np.zeros_like(values) for kind in "mv" for name, values in layer.items()}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """Return summed gradients and losses."""
        x, y = batch["x"], batch["y"]
        scores = x @ weights["w"] + weights["b"]
        shifted = scores - scores.max(axis=1, keepdims=True)
        shares = np.exp(shifted)
        sums = shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(y))
        loss = float(np.sum(np.log(sums[:, 0]) - shifted[rows, y], dtype=np.float64))
        back = shares / sums
        back[rows, y] -= 1
        return {"w": x.T @ back, "b": back.sum(axis=0)}, loss, len(y)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """Return the weights after one step of Adam (Kingma & Ba 2015) with decoupled weight decay."""
        following: Arrays = {}
        for name, values in summed.items():
            mean = values / np.float32(n)
            m = 0.9 * weights[f"m.{name}"] + 0.1 * mean
            v = 0.99 * weights[f"v.{name}"] + 0.01 * mean * mean
            step = (m / (1 - 0.9 ** (round_ + 1))) / (np.sqrt(v / (1 - 0.99 ** (round_ + 1))) + 1e-8)
            following[name] = (weights[name] - self.rate * (step + self.decay * weights[name])).astype(np.float32)
            following[f"m.{name}"], following[f"v.{name}"] = m.astype(np.float32), v.astype(np.float32)
        return following

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """Return the share of held-out images named rightly."""
        return float(np.mean(self.predict(weights, held_out["x"]) == held_out["y"]))

    def predict(self, weights: Arrays, x: Any) -> Any:
        """Return the class of each row of features."""
        return np.argmax(x @ weights["w"] + weights["b"], axis=1)

    def export(self, weights: Arrays, path: Path) -> None:
        """Write the layer as ONNX; `Frozen` puts the frozen part before it."""
        from onnx import TensorProto, helper, numpy_helper

        nodes = [
            helper.make_node("Gemm", ["features", "w", "b"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        ]
        graph = helper.make_graph(
            nodes,
            "softmax",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", self.width])],
            [
                helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
                helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", self.classes]),
            ],
            [numpy_helper.from_array(np.array(weights[name]), name) for name in "wb"],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        path.write_bytes(model.SerializeToString())
