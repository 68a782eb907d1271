"""Softmax regression in NumPy with momentum, on images."""

import numpy as np

from tenure.train.programs import Arrays, load_arrays


class Linear:
    def data(self, inputs):  # type: ignore[no-untyped-def]
        return load_arrays(inputs)

    def build(self, seed: int) -> Arrays:
        w = np.random.default_rng(seed).standard_normal((192, 3)).astype(np.float32) / 100
        return {"w": w, "velocity": np.zeros_like(w)}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        x = batch["x"].reshape(len(batch["x"]), -1) / np.float32(255)
        shares = np.exp(x @ weights["w"])
        shares /= shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = float(-np.log(shares[rows, batch["y"]]).sum())
        shares[rows, batch["y"]] -= 1
        return {"w": x.T @ shares}, loss, len(x)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        velocity = np.float32(0.9) * weights["velocity"] + summed["w"] / np.float32(n)
        return {"w": weights["w"] - np.float32(0.1) * velocity, "velocity": velocity}

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        return float(np.mean((held_out["x"].reshape(len(held_out["x"]), -1) @ weights["w"]).argmax(1) == held_out["y"]))
