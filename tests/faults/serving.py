"""A real server for the fault tests: models that are quick, slow or endless, load on it, and a client that must not notice."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.serve.conftest import Server

from tenure.errors import TenureError
from tenure.serve.client import Model

onnx = pytest.importorskip("onnx", reason="onnx (extra demo) makes the test models")

WIDTH = 8
LONG_S = 40.0
"""Bound of a wait for something that is to happen."""


def write_scaled(path: Path, factor: float) -> None:
    """Write x [n,8] -> y [n,8], each value times a factor: what answered can be told from the answer."""
    _write(path, [onnx.helper.make_node("Mul", ["x", "k"], ["y"])], [onnx.helper.make_tensor("k", 1, [], [factor])])


def write_picky(path: Path) -> None:
    """Write x -> y = x that raises on inputs below zero: they are looked up outside of a table."""
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Sign", ["x"], ["sign"]),
        helper.make_node("Relu", ["sign"], ["positive"]),
        helper.make_node("Sub", ["positive", "sign"], ["below"]),  # 1 where x is below zero, else 0
        helper.make_node("Cast", ["below"], ["index"], to=kinds.INT64),
        helper.make_node("Gather", ["zero", "index"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    _write(path, nodes, [helper.make_tensor("zero", kinds.FLOAT, [1], [0.0])])


def write_slow(path: Path, turns: int = 200_000) -> None:
    """Write x -> y = x after so many turns of a loop: tens of milliseconds of work in one run."""
    helper, kinds = onnx.helper, onnx.TensorProto
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "one"], ["sum_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", kinds.INT64, []),
            helper.make_tensor_value_info("go", kinds.BOOL, []),
            helper.make_tensor_value_info("sum", kinds.FLOAT, []),
        ],
        [helper.make_tensor_value_info("go_on", kinds.BOOL, []), helper.make_tensor_value_info("sum_out", kinds.FLOAT, [])],
        [helper.make_tensor("one", kinds.FLOAT, [], [1.0])],
    )
    nodes = [
        helper.make_node("Loop", ["turns", "yes", "none"], ["count"], body=body),
        helper.make_node("Mul", ["count", "none"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    constants = [
        helper.make_tensor("turns", kinds.INT64, [], [turns]),
        helper.make_tensor("yes", kinds.BOOL, [], [True]),
        helper.make_tensor("none", kinds.FLOAT, [], [0.0]),
    ]
    _write(path, nodes, constants)


def _write(path: Path, nodes: list, constants: list) -> None:
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", WIDTH])],
        constants,
    )
    draft = path.with_suffix(".draft")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), draft)
    draft.replace(path)


def until(true, what):
    end_s = time.monotonic() + LONG_S
    while not (found := true()):
        assert time.monotonic() < end_s, f"this did not happen in time: {what}"
        time.sleep(0.02)
    return found


def instances(server: Server, model: str) -> list[psutil.Process]:
    """Return the processes that run a model."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(f"/{model}" in word for word in child.cmdline()):
                found.append(child)
    return found


def ask_http(server: Server, method: str, path: str, body: bytes = b"", headers=()) -> tuple[int, dict, dict]:
    """Ask one thing over a connection of its own; return status, JSON, headers."""
    client = http.client.HTTPConnection(server.http, timeout=LONG_S)
    try:
        client.request(method, path, body, dict(headers))
        answer = client.getresponse()
        content = answer.read()
        return answer.status, json.loads(content or b"null"), dict(answer.getheaders())
    finally:
        client.close()


class Load:
    """Threads that ask one model in turn, over one door each, until told to stop."""

    def __init__(self, target: str, model: str, *, threads: int = 2, timeout_s: float = 10.0, positive: bool = False) -> None:
        self.answers: list[tuple[np.ndarray, np.ndarray]] = []
        self.errors: list[BaseException] = []
        self.slowest_s = 0.0
        self._positive = positive
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(target, model, seed, timeout_s), daemon=True) for seed in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, target: str, model: str, seed: int, timeout_s: float) -> None:
        rng = np.random.default_rng(seed)
        with Model(target, model, timeout_s=timeout_s, shm=False) as client:
            while not self._stop.is_set():
                x = rng.normal(size=(1, WIDTH)).astype(np.float32)
                x = np.abs(x) if self._positive else x
                began_s = time.monotonic()
                try:
                    self.answers.append((x, client.predict(x)))
                except TenureError as error:
                    self.errors.append(error)
                    self._stop.wait(0.005)
                except BaseException as error:
                    self.errors.append(error)
                    return
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)

    def more(self, count: int = 20) -> None:
        """Return when so many more answers are in."""
        wanted = len(self.answers) + count
        until(lambda: len(self.answers) >= wanted, f"{count} more answers; errors: {self.errors[-3:]}")

    def stop(self) -> None:
        """Return when the last request has ended; every error must be one that a client can act on."""
        self._stop.set()
        for thread in self._threads:
            thread.join(LONG_S)
        assert not [error for error in self.errors if not isinstance(error, TenureError)]

    def factors(self) -> set[float]:
        """Return which factors the answers show."""
        return {round(float(np.median(y / x)), 3) for x, y in self.answers}

    def right(self, *factors: float) -> bool:
        """Whether each answer is the input times one of these."""
        return all(any(np.allclose(y, x * factor, rtol=1e-5) for factor in factors) for x, y in self.answers)


@contextlib.contextmanager
def loads(server: Server, model: str, **options):
    """Load a model over both doors."""
    both = [Load(f"http://{server.http}", model, **options), Load(f"grpc://{server.grpc}", model, **options)]
    try:
        yield both
    finally:
        for load in both:
            load.stop()
