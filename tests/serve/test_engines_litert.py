"""The engine contract over LiteRT, and what batching its models really allow."""

from __future__ import annotations

import numpy as np
import pytest
from tests.contracts.engine_contract import EngineContract, Sample
from tests.serve import make_tflite

from tenure.errors import SpecError
from tenure.serve.engines import load_engine

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert (extra litert) is not installed")


class TestLiteRt(EngineContract):
    platform = "litert_tflite"

    def sample(self, folder):
        random = np.random.default_rng(0)
        weights, x = random.normal(size=(3, 4)).astype(np.float32), random.normal(size=(9, 4)).astype(np.float32)
        score = x @ weights.T
        e = np.exp(score - score.max(1, keepdims=True))
        path = make_tflite.dense(folder / "dense.tflite", weights)
        return Sample(path, "x", x, {"score": score, "probability": e / e.sum(1, keepdims=True)})

    def identity(self, folder, datatype):
        return make_tflite.identity(folder / "identity.tflite", datatype)

    def failing(self, folder):
        return make_tflite.gather(folder / "gather.tflite"), {"x": np.array([1, 7], np.int32)}

    def heavy(self, folder):
        weights = np.ones((4096, 1024), np.float32)
        return make_tflite.dense(folder / "heavy.tflite", weights), weights.nbytes


def falsely_open(path):
    return make_tflite.fixed_reshape(path, open_rows=True)


@pytest.mark.parametrize("make", [make_tflite.fixed_reshape, make_tflite.mixed_rows, falsely_open])
def test_a_model_whose_rows_cannot_be_stacked_says_one_row(tmp_path, make):
    engine = load_engine(make(tmp_path / "one.tflite"))
    assert engine.inputs[0].shape == (1, 4)
    assert engine.outputs[0].shape[0] == 1
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    np.testing.assert_array_equal(engine.infer({"x": x})["y"].reshape(1, 4), x)
    with pytest.raises(SpecError, match=r"must have shape \[1, 4\]"):
        engine.infer({"x": np.concatenate([x, x])})
