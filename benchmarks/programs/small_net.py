"""A network of one or two hidden layers in NumPy on made-up examples, for benchmarks that need no data folder."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tenure.train.programs import Arrays


class Net:
    """Inputs, then layers of tanh, then a softmax; SGD with momentum, which is kept in the weights.

    noise: standard deviation of what is added to the inputs, from the shard's generator. pause_s: slept in each gradient.
    """

    def __init__(
        self, sizes: str = "8-16-3", *, examples: int = 240, rate: float = 0.2, noise: float = 0.1, pause_s: float = 0.0
    ) -> None:
        self.sizes = [int(size) for size in sizes.split("-")]
        self.rate, self.noise, self.pause_s = rate, noise, pause_s
        rng = np.random.default_rng(7)
        y = rng.integers(0, self.sizes[-1], examples)
        centres = rng.standard_normal((self.sizes[-1], self.sizes[0]))
        x = (centres[y] + rng.standard_normal((examples, self.sizes[0]))).astype(np.float32)
        split = examples * 5 // 6
        self._data = {"x": x[:split], "y": y[:split]}, {"x": x[split:], "y": y[split:]}

    def data(self, inputs: Any) -> tuple[Arrays, Arrays]:
        """See Program."""
        return self._data

    def build(self, seed: int) -> Arrays:
        """See Program."""
        rng = np.random.default_rng(seed)
        weights: Arrays = {}
        for layer, (before, after) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            weights[f"w{layer}"] = (rng.standard_normal((before, after)) / np.sqrt(before)).astype(np.float32)
            weights[f"b{layer}"] = np.zeros(after, np.float32)
        return weights | {f"speed_{name}": np.zeros_like(values) for name, values in weights.items()}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """See Program."""
        if self.pause_s:
            time.sleep(self.pause_s)
        layers, x = len(self.sizes) - 1, batch["x"]
        if self.noise:
            x = x + np.float32(self.noise) * rng.standard_normal(x.shape, dtype=np.float32)
        outputs = [x]
        for layer in range(layers):
            before = outputs[-1] @ weights[f"w{layer}"] + weights[f"b{layer}"]
            outputs.append(before if layer == layers - 1 else np.tanh(before))
        shares = np.exp(outputs[-1] - outputs[-1].max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = float(-np.log(shares[rows, batch["y"]]).sum())
        shares[rows, batch["y"]] -= 1
        found: Arrays = {}
        for layer in reversed(range(layers)):
            found[f"w{layer}"], found[f"b{layer}"] = outputs[layer].T @ shares, shares.sum(axis=0)
            if layer:
                shares = (shares @ weights[f"w{layer}"].T) * (1 - outputs[layer] ** 2)
        return found, loss, len(x)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """See Program."""
        following: Arrays = {}
        for name, values in summed.items():
            speed = np.float32(0.9) * weights[f"speed_{name}"] + values / np.float32(n)
            following[f"speed_{name}"] = speed
            following[name] = weights[name] - np.float32(self.rate) * speed
        return following

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """See Program."""
        x = held_out["x"]
        for layer in range(len(self.sizes) - 1):
            x = x @ weights[f"w{layer}"] + weights[f"b{layer}"]
            x = np.tanh(x) if layer < len(self.sizes) - 2 else x
        return float(np.mean(x.argmax(axis=1) == held_out["y"]))
