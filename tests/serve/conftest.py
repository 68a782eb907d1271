"""A tiny real model, a real server process, and their expected answers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx (extra demo) makes the test model")

FEATURES, CLASSES = 16, 5


def make_digits(path: Path) -> np.ndarray:
    """Write a linear classifier: x [n,16] FP32 -> label [n] INT64, probability [n,5] FP32; return its weights."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weights = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["z"]),
            helper.make_node("Softmax", ["z"], ["probability"], axis=1),
            helper.make_node("ArgMax", ["z"], ["label"], axis=1, keepdims=0),
        ],
        "digits",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n", FEATURES])],
        [
            helper.make_tensor_value_info("label", kinds.INT64, ["n"]),
            helper.make_tensor_value_info("probability", kinds.FLOAT, ["n", CLASSES]),
        ],
        [helper.make_tensor("w", kinds.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return weights


def make_identity(path: Path, kind: str) -> None:
    """Write a model that gives back its input: x [n] -> y [n], of one ONNX element type."""
    helper, element = onnx.helper, getattr(onnx.TensorProto, kind)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", element, ["n"])],
        [helper.make_tensor_value_info("y", element, ["n"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


class Digits(NamedTuple):
    path: Path
    x: np.ndarray
    label: np.ndarray
    probability: np.ndarray


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    folder = tmp_path_factory.mktemp("models")
    weights = make_digits(folder / "digits.onnx")
    x = np.random.default_rng(1).normal(size=(40, FEATURES)).astype(np.float32)
    z = x @ weights
    e = np.exp(z - z.max(1, keepdims=True))
    return Digits(folder / "digits.onnx", x, z.argmax(1), (e / e.sum(1, keepdims=True)).astype(np.float32))


class Server:
    """A serving process, ended with the test that made it."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        argv = [sys.executable, "-m", "tenure.serve", "--model", str(model), *options]
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, "TENURE_WORKER_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate(timeout=30)[1])
        self.endpoints = json.loads(line)["listening"]
        self.http = self.endpoints.get("http", "")
        self.grpc = self.endpoints.get("grpc", "")

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


@pytest.fixture(scope="session")
def server(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the digits model and identities of several types, its request limit at 1 MB."""
    for kind in ("INT64", "STRING", "BOOL", "FLOAT16", "UINT8"):
        make_identity(digits.path.parent / f"same_{kind.lower()}.onnx", kind)
    started = Server(digits.path.parent, tmp_path_factory.mktemp("server"), "--max-request-bytes", "1000000")
    yield started
    assert started.end() == 0
