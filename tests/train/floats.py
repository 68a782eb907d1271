"""A training program of a few floats whose sums depend on the order of adding: for thousands of runs a minute."""

from __future__ import annotations

from typing import Any

import numpy as np

from tenure.train.programs import Arrays

EXAMPLES = 10


class Floats:
    """Pulls weights towards points of very different sizes. Three dtypes: three blocks, so that there are three slices.

    nan_round: the round whose loss is NaN; -1: none.
    """

    def __init__(self, nan_round: int = -1) -> None:
        self.nan_round = nan_round
        rng = np.random.default_rng(1)
        self._x = rng.standard_normal((EXAMPLES, 3)) * 10 ** rng.uniform(-3, 3, (EXAMPLES, 1))

    def data(self, inputs: Any) -> tuple[Arrays, Arrays]:
        return {"x": self._x}, {"x": self._x[:1]}

    def build(self, seed: int) -> Arrays:
        return {
            "a": np.array([0.1, 0.2, 0.3], np.float32),
            "b": np.array([1.1, 1.2, 1.3]),
            "c": np.array([0.5], np.float16),
            "speed": np.zeros(3, np.float32),
            "rounds": np.zeros(1, np.int64),
        }

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        x = batch["x"] * rng.random()
        apart = weights["b"] - x
        loss = float((apart * apart).sum())
        if weights["rounds"][0] == self.nan_round:
            loss = float("nan")
        summed = {
            "a": (weights["a"] - x.astype(np.float32)).sum(axis=0),
            "b": apart.sum(axis=0),
            "c": np.tanh(x[:, :1]).astype(np.float16).sum(axis=0),
        }
        return summed, loss, len(x)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        speed = np.float32(0.9) * weights["speed"] + summed["a"] / np.float32(n)
        return {
            "a": weights["a"] - np.float32(0.1) * speed,
            "b": weights["b"] - 0.1 * summed["b"] / n,
            "c": (weights["c"] + summed["c"] / np.float16(100)).astype(np.float16),
            "speed": speed,
            "rounds": weights["rounds"] + 1,
        }

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        return float(weights["rounds"][0]) / 10
