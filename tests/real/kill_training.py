"""One training run left in peace beside one whose processes are killed all along: both end with the same weights.

    python -m tests.real.kill_training [--seed N] [--rounds N] [--every SECONDS]

prints both hashes. Killed, by SIGKILL and at random: workers, shims, the agent, the broker, the command itself, and now and
then all of them at once. When the command has died or given up, the run is resumed with another number of workers.
Everything is real: broker, agent, leases with enforced bounds, a NumPy program of a few milliseconds a step.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tenure.train.records import read_arrays

PROGRAM = '''
"""Softmax regression on made-up points, with noise of the shard's own generator."""

import time

import numpy as np


class Softmax:
    def __init__(self, pause_s=0.0):
        self.pause_s = pause_s

    def data(self, inputs):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((1200, 40)).astype(np.float32)
        y = np.argmax(x @ rng.standard_normal((40, 10)), axis=1)
        return {"x": x[:1000], "y": y[:1000]}, {"x": x[1000:], "y": y[1000:]}

    def build(self, seed):
        return {"w": np.random.default_rng(seed).standard_normal((40, 10)).astype(np.float32), "v": np.zeros((40, 10), "f4")}

    def gradient(self, weights, batch, rng):
        time.sleep(self.pause_s)
        x = batch["x"] + rng.normal(0, 0.1, batch["x"].shape).astype(np.float32)
        shares = np.exp(x @ weights["w"])
        shares /= shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = float(-np.log(shares[rows, batch["y"]]).sum())
        shares[rows, batch["y"]] -= 1
        return {"w": x.T @ shares}, loss, len(x)

    def update(self, weights, summed, n, round_):
        v = np.float32(0.9) * weights["v"] + summed["w"] / np.float32(n)
        return {"w": weights["w"] - np.float32(0.1) * v, "v": v}

    def evaluate(self, weights, held_out):
        return float(np.mean(np.argmax(held_out["x"] @ weights["w"], axis=1) == held_out["y"]))

    def predict(self, weights, x):
        return np.argmax(np.asarray(x) @ weights["w"], axis=1)

    def export(self, weights, path):
        from onnx import TensorProto, helper, numpy_helper, save

        multiply = helper.make_node("MatMul", ["x", "w"], ["z"])
        choose = helper.make_node("ArgMax", ["z"], ["label"], axis=1, keepdims=0)
        graph = helper.make_graph(
            [multiply, choose],
            "softmax",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 40])],
            [helper.make_tensor_value_info("label", TensorProto.INT64, ["N"])],
            [numpy_helper.from_array(weights["w"], "w")],
        )
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
'''
JOB = """
[run]
name = "softmax"

[train]
program = "softmax.py:Softmax"
shards = 6
workers = {workers}
max_rounds = {rounds}
seed = 3
options = {{ pause_s = {pause_s} }}
envelope = {{ cpus = 0.3, memory = "128MiB", slot = "{slot}", total = "10min" }}
probe = {{ memory = "512MiB" }}
"""
MAX_S = 300.0
KINDS = {"worker": 70, "shim": 10, "agent": 5, "broker": 5, "command": 5, "all": 5}
"""What is killed, and how often of 100 times."""


@dataclass
class World:
    """One home with a job in it; `seen` counts what was killed."""

    folder: Path
    rounds: int = 60
    pause_s: float = 0.01
    slot: str = "5s"
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "softmax.py").write_text(PROGRAM)
        text = JOB.format(workers=2, rounds=self.rounds, pause_s=self.pause_s, slot=self.slot)
        (self.folder / "job.toml").write_text(text)
        self.env = {**os.environ, "TENURE_HOME": str(self.home), "TENURE_SHARES_FILE": str(self.folder / "shares.json")}

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start `tenure train job.toml` with these words."""
        words = [sys.executable, "-m", "tenure.cli", "train", str(self.folder / "job.toml"), *argv]
        output = (self.folder / "said").open("a")
        with output:
            return subprocess.Popen(words, env=self.env, stdout=output, stderr=output, text=True, start_new_session=True)

    def train(self, *argv: str) -> None:
        """Train undisturbed."""
        with self.start(*argv) as process:
            code = process.wait(MAX_S)
        assert code == 0, self.said()

    def said(self) -> str:
        """Return what the commands have printed."""
        return (self.folder / "said").read_text()

    @property
    def run_id(self) -> str:
        """The one run here, empty before there is one."""
        found = [path.name for path in self.home.glob("runs/r-*")]
        return found[0] if found else ""

    def rounds_done(self) -> int:
        """Return how many rounds are recorded."""
        return len(list(self.home.glob("runs/*/train/store/rounds/*.json")))

    def has_result(self) -> bool:
        """Return whether training is through."""
        return bool(list(self.home.glob("runs/*/train/store/result")))

    def sha256(self) -> str:
        """Return the hash of the result's weights."""
        (path,) = self.home.glob("runs/*/train/store/result")
        _, weights = read_arrays(path)
        return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()

    def processes(self) -> dict[str, list[int]]:
        """Return kind -> pids of everything that belongs to this home, the commands too."""
        found: dict[str, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            if int(entry.name) != os.getpid() and (kind := self._kind(entry)):
                found.setdefault(kind, []).append(int(entry.name))
        return found

    def _kind(self, entry: Path) -> str:
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            environment = (entry / "environ").read_bytes()
        except OSError:
            return ""
        if f"TENURE_HOME={self.home}".encode() not in environment and str(self.home) not in words:
            return "worker" if f"TENURE_RUN_DIR={self.home}".encode() in environment else ""
        if "tenure.train.worker" in words:
            return "worker"
        for kind, part in (("broker", "tenure.broker"), ("agent", "tenure.agent"), ("command", "tenure.cli")):
            if part in words:
                return kind
        return "shim" if "forkserver" in words else "other"

    def kill(self, kind: str, rng: random.Random) -> None:
        """SIGKILL one process of a kind, or every process there is (`all`)."""
        found = self.processes()
        victims = [pid for pids in found.values() for pid in pids] if kind == "all" else found.get(kind, [])
        if kind != "all" and victims:
            victims = [rng.choice(victims)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.seen[kind] += bool(victims)

    @contextlib.contextmanager
    def cleaned(self) -> Iterator[World]:
        """Leave no process of this home behind."""
        try:
            yield self
        finally:
            subprocess.run(
                [sys.executable, "-m", "tenure.cli", "down"], env=self.env, capture_output=True, timeout=60, check=False
            )
            self.kill("all", random.Random(0))


def disturb(world: World, *, seed: int, every_s: float) -> list[int]:
    """Train until there is a result, killing every `every_s` seconds or so; return the numbers of workers used."""
    rng, workers, end_s = random.Random(seed), [3], time.monotonic() + MAX_S
    process = world.start("--workers", "3")
    try:
        while not world.has_result():
            assert time.monotonic() < end_s, world.said()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.5, 1.5) * every_s)
                workers.append(rng.choice([number for number in (1, 2, 4) if number != workers[-1]]))
                again = ["--resume", world.run_id] if world.run_id else []
                process = world.start(*again, "--workers", str(workers[-1]))
                continue
            if world.rounds_done():
                world.kill(rng.choices(list(KINDS), list(KINDS.values()))[0], rng)
    finally:
        process.kill()
        process.wait()
    return workers


def main() -> None:
    """Do both and print both hashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two kills, on average")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        with World(Path(folder) / "peace", rounds=given.rounds).cleaned() as peace:
            peace.train()
            print(f"undisturbed, 2 workers: {peace.sha256()}", flush=True)
        with World(Path(folder) / "kills", rounds=given.rounds).cleaned() as kills:
            workers = disturb(kills, seed=given.seed, every_s=given.every)
            print(f"killed all along:       {kills.sha256()}")
            print(json.dumps({"killed": dict(kills.seen), "workers": workers}))
            if kills.sha256() != peace.sha256():
                sys.exit("the weights differ")


if __name__ == "__main__":
    main()
