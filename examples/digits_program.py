"""A training program in NumPy: two hidden layers and Adam, on handwriting images that are shifted, turned and scaled.

It shows the protocol `tenure.train.programs.Program`. All randomness comes from the generator handed in.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tenure.train.programs import Arrays, load_arrays

SIDE = 8


class Digits:
    """64 - hidden - hidden - 10, rectified linear units, cross entropy.

    copies: how many differently moved copies of each image a round sees. rate: Adam's step size.
    """

    picture = (SIDE, SIDE)
    """How the report shows an example."""

    def __init__(self, hidden: int = 160, copies: int = 8, rate: float = 0.001, decay: float = 1e-4) -> None:
        self.hidden, self.copies, self.rate, self.decay = hidden, copies, rate, decay

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """Return the arrays that `digits_data.py` wrote."""
        return load_arrays(inputs)

    def build(self, seed: int) -> Arrays:
        """Return He-initialised layers, with Adam's two moments for each."""
        rng = np.random.default_rng(seed)
        sizes = (SIDE * SIDE, self.hidden, self.hidden, 10)
        weights: Arrays = {}
        for layer, (rows, columns) in enumerate(pairwise(sizes)):
            weights[f"w{layer}"] = (rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)).astype(np.float32)
            weights[f"b{layer}"] = np.zeros(columns, np.float32)
        moments = {f"{kind}.{name}": np.zeros_like(values) for kind in "mv" for name, values in weights.items()}
        return weights | moments

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """Return summed gradients and losses over `copies` moved copies of the shard."""
        x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
        total: Arrays = {}
        loss = 0.0
        for _ in range(self.copies):
            part, part_loss = self._backward(weights, move(x, rng), y)
            loss += part_loss
            for name, values in part.items():
                total[name] = total[name] + values if name in total else values
        return total, loss, self.copies * len(y)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """Return the weights after one step of Adam (Kingma & Ba 2015) with decoupled weight decay."""
        following: Arrays = {}
        for name, values in summed.items():
            mean = values / np.float32(n)
            m = 0.9 * weights[f"m.{name}"] + 0.1 * mean
            v = 0.99 * weights[f"v.{name}"] + 0.01 * mean * mean
            step = (m / (1 - 0.9 ** (round_ + 1))) / (np.sqrt(v / (1 - 0.99 ** (round_ + 1))) + 1e-8)
            moved = weights[name] - self.rate * (step + self.decay * weights[name])
            following[name] = moved.astype(np.float32)
            following[f"m.{name}"], following[f"v.{name}"] = m.astype(np.float32), v.astype(np.float32)
        return following

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """Return the share of held-out images named rightly."""
        return float(np.mean(self.predict(weights, held_out["x"]) == held_out["y"]))

    def predict(self, weights: Arrays, x: Any) -> Any:
        """Return the digit in each row of x, shape (n, 64)."""
        return np.argmax(_forward(weights, np.asarray(x))[-1], axis=1)

    def export(self, weights: Arrays, path: Path) -> None:
        """Write ONNX: input ``x`` float32 [N, 64]; outputs ``label`` int64 [N] and ``probabilities`` float32 [N, 10]."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        tensors, nodes, last = [], [], "x"
        for layer in range(3):
            tensors += [numpy_helper.from_array(np.array(weights[f"{kind}{layer}"]), f"{kind}{layer}") for kind in "wb"]
            nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [f"z{layer}"]))
            last = f"z{layer}"
            if layer < 2:
                nodes.append(helper.make_node("Relu", [last], [f"a{layer}"]))
                last = f"a{layer}"
        nodes.append(helper.make_node("ArgMax", [last], ["label"], axis=1, keepdims=0))
        nodes.append(helper.make_node("Softmax", [last], ["probabilities"], axis=1))
        graph = helper.make_graph(
            nodes,
            "digits",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", SIDE * SIDE])],
            [
                helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
                helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10]),
            ],
            tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())

    def _backward(self, weights: Arrays, x: Any, y: Any) -> tuple[Arrays, float]:
        a0, a1, a2, scores = _forward(weights, x)
        shifted = scores - scores.max(axis=1, keepdims=True)
        shares = np.exp(shifted)
        sums = shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(y))
        loss = float(np.sum(np.log(sums[:, 0]) - shifted[rows, y], dtype=np.float64))
        back = shares / sums
        back[rows, y] -= 1
        found: Arrays = {}
        for layer, below in ((2, a2), (1, a1), (0, a0)):
            found[f"w{layer}"], found[f"b{layer}"] = below.T @ back, back.sum(axis=0)
            if layer:
                back = (back @ weights[f"w{layer}"].T) * (below > 0)
        return found, loss


def move(x: Any, rng: np.random.Generator) -> Any:
    """Return each image shifted by up to 0.8 pixels, turned by up to 10 degrees and scaled by up to 8 %, bilinear.

    x: shape (n, 64), 0..1. Outside the image is 0.
    """
    n = len(x)
    angle = rng.uniform(-0.175, 0.175, n).astype(np.float32)
    scale = rng.uniform(0.92, 1.08, n).astype(np.float32)
    shift = rng.uniform(-0.8, 0.8, (2, n, 1)).astype(np.float32)
    grid = np.arange(SIDE * SIDE)
    row, column = (grid // SIDE - 3.5).astype(np.float32), (grid % SIDE - 3.5).astype(np.float32)
    cosine, sine = (np.cos(angle) * scale)[:, None], (np.sin(angle) * scale)[:, None]
    at_row = cosine * row - sine * column + shift[0] + np.float32(3.5)
    at_column = sine * row + cosine * column + shift[1] + np.float32(3.5)
    padded = np.zeros((n, (SIDE + 6) ** 2), np.float32)
    padded.reshape(n, SIDE + 6, SIDE + 6)[:, 3:-3, 3:-3] = x.reshape(n, SIDE, SIDE)
    at_row, at_column = np.clip(at_row + 3, 0, SIDE + 4.99), np.clip(at_column + 3, 0, SIDE + 4.99)
    top, left = at_row.astype(np.int64), at_column.astype(np.int64)
    down, right = at_row - top, at_column - left
    corner = top * (SIDE + 6) + left + np.arange(n)[:, None] * (SIDE + 6) ** 2
    flat = padded.reshape(-1)
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + SIDE + 6] * (1 - right) + flat[corner + SIDE + 7] * right
    return upper * (1 - down) + lower * down


def _forward(weights: Arrays, x: Any) -> list[Any]:
    layers = [x]
    for layer in range(3):
        z = layers[-1] @ weights[f"w{layer}"] + weights[f"b{layer}"]
        layers.append(np.maximum(z, 0) if layer < 2 else z)
    return layers
