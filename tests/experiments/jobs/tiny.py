"""A training program of a few milliseconds a round, and the ways in which one goes wrong.

fault: what `gradient` does from round `fault_round` on. rounds_log: file that each combined round is appended to.
rot: file that tells whether the first export has spoilt the stage's result already; none: it does not.
needed: rounds until the accuracy is told in full; before, its share.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


class Tiny:
    """Which half of the plane a point lies in, by logistic regression on 200 made-up points."""

    def __init__(self, fault="", fault_round=0, pause_s=0.0, rounds_log="", needed=1, rot=""):
        self.fault, self.fault_round, self.pause_s = fault, fault_round, pause_s
        self.rounds_log, self.needed, self.rot = rounds_log, needed, rot

    def data(self, inputs):
        x = np.random.default_rng(0).standard_normal((240, 2)).astype(np.float32)
        y = (x[:, 0] + x[:, 1] > 0).astype(np.int64)
        return {"x": x[:200], "y": y[:200]}, {"x": x[200:], "y": y[200:]}

    def build(self, seed):
        return {"w": np.zeros((2, 2), np.float32), "round": np.zeros(1, np.float32)}

    def gradient(self, weights, batch, rng):
        spoilt = FAULTS[self.fault]() if self.fault and weights["round"][0] >= self.fault_round else 0.0
        time.sleep(self.pause_s)
        x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
        shares = np.exp(x @ weights["w"])
        shares /= shares.sum(axis=1, keepdims=True)
        loss = -np.log(shares[np.arange(len(y)), y]).sum()
        shares[np.arange(len(y)), y] -= 1
        return {"w": x.T @ shares, "round": np.zeros(1, np.float32)}, float(loss) + spoilt, len(y)

    def update(self, weights, summed, n, round_):
        if self.rounds_log:
            with open(self.rounds_log, "a") as log:
                log.write(f"{round_}\n")
        return {"w": weights["w"] - np.float32(0.05 / n) * summed["w"], "round": weights["round"] + 1}

    def evaluate(self, weights, held_out):
        told = min(1.0, float(weights["round"][0]) / self.needed)
        return told * float(np.mean(self.predict(weights, held_out["x"]) == held_out["y"]))

    def predict(self, weights, x):
        return np.argmax(np.asarray(x) @ weights["w"], axis=1)

    def export(self, weights, path):
        if self.rot and not os.path.exists(self.rot):
            Path(self.rot).touch()
            result = Path(os.environ["TENURE_RUN_DIR"], "store", "result")
            content = bytearray(result.read_bytes())
            content[-1] ^= 1
            result.write_bytes(content)
            raise OSError("the disk is losing bits")
        write_model(path, np.asarray(weights["w"]))


def write_model(path, w):
    """Write ONNX: input ``x`` float32 [N, 2]; output ``label`` int64 [N]."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("ArgMax", ["z"], ["label"], axis=1, keepdims=0)],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("label", TensorProto.INT64, ["N"])],
        [numpy_helper.from_array(w.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    Path(path).write_bytes(model.SerializeToString())


def _raise():
    raise ValueError("the seventh image is upside down")


def _hang():
    while True:
        time.sleep(60)


def _leak():
    kept = []
    while True:
        kept.append(np.ones(1 << 20))


def _weigh():
    """Hold 256 MiB for a moment."""
    return float(np.ones(32 << 20)[:1].sum() * 0)


def _fork_and_leave():
    """Leave a child, and a grandchild in a session of its own, and end without a result."""
    nap = [sys.executable, "-c", "import time; time.sleep(600)"]
    subprocess.Popen(nap)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(nap[0], nap)
        os._exit(0)
    os._exit(0)


FAULTS = {"raise": _raise, "hang": _hang, "leak": _leak, "fork": _fork_and_leave, "nan": lambda: float("nan"), "heavy": _weigh}
