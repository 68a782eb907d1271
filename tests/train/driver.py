"""A stage's processes, one after the other, on a real folder: events from a queue, a clock that only sleeping moves.

Not here: processes that go on side by side, in any order (`explorer`).
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tenure.train.events import parse
from tenure.train.files import Files
from tenure.train.handler import Context, Outcome, handle
from tenure.train.programs import Arrays, Program
from tenure.train.records import read_arrays
from tenure.train.spec import TrainSpec
from tenure.train.store import Store

from .explorer import Killed

SHARDS = 6


class Tiny:
    """Softmax regression on two clouds of points, with noise from the shard's generator."""

    def __init__(self, rate: float = 0.5) -> None:
        self.rate = rate

    def data(self, inputs: Any) -> tuple[Arrays, Arrays]:
        rng = np.random.default_rng(3)
        y = rng.integers(0, 2, 90)
        x = (rng.standard_normal((90, 4)) + 3 * y[:, None]).astype(np.float32)
        return {"x": x[:60], "y": y[:60]}, {"x": x[60:], "y": y[60:]}

    def build(self, seed: int) -> Arrays:
        return {"w": np.random.default_rng(seed).standard_normal((4, 2)).astype(np.float32), "b": np.zeros(2, np.float32)}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        x = batch["x"] + rng.normal(0, 0.1, batch["x"].shape).astype(np.float32)
        shares = np.exp(x @ weights["w"] + weights["b"])
        shares /= shares.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = float(-np.log(shares[rows, batch["y"]]).sum())
        shares[rows, batch["y"]] -= 1
        return {"w": x.T @ shares, "b": shares.sum(axis=0)}, loss, len(x)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        return {name: weights[name] - np.float32(self.rate / n) * summed[name] for name in weights}

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        return float(np.mean(np.argmax(held_out["x"] @ weights["w"] + weights["b"], axis=1) == held_out["y"]))


class KillingFiles(Files):
    """Ends the process at the n-th file operation, before or after it; once dead, nothing works any more."""

    def __init__(self, countdown: int, *, after: bool) -> None:
        self.countdown, self.after = countdown, after

    def _step(self, name: str, *args: Any, **options: Any) -> Any:
        self.countdown -= 1
        if self.countdown < 0 or (self.countdown == 0 and not self.after):
            raise Killed
        answer = getattr(super(), name)(*args, **options)
        if self.countdown == 0:
            raise Killed
        return answer

    def link(self, temp: Path, path: Path) -> bool:
        return bool(self._step("link", temp, path))

    def remove(self, path: Path) -> None:
        self._step("remove", path)

    def move(self, source: Path, target: Path) -> bool:
        return bool(self._step("move", source, target))

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        return bytearray(self._step("read", path, offset, size))

    def names(self, folder: Path, *, hidden: bool = False) -> list[str]:
        return list(self._step("names", folder, hidden=hidden))

    def _write(self, temp: Path, pieces: Iterable[bytes | memoryview], durable: bool) -> None:
        self._step("_write", temp, pieces, False)


class Driver:
    """Runs a stage to its end: one event at a time, as often as it takes."""

    def __init__(self, root: Path, *, program: Program | None = None, slot_s: float = 4.0, **spec: Any) -> None:
        defaults: dict[str, Any] = {"shards": SHARDS, "max_rounds": 5, "claim_period_s": 1.0, "seed": 11}
        self.spec = TrainSpec(program="tiny.py:Tiny", folder=str(root), **{**defaults, **spec})
        self.root = root
        self.program = program or Tiny()
        self.slot_s = slot_s
        self.now_s = 0.0
        self.timer = time.perf_counter
        self.queue: deque[dict[str, Any]] = deque()
        self.names: set[str] = set()
        self.outcomes: list[Outcome] = []
        self.deaths = 0
        self.fence = 0

    def invoke(self, event: dict[str, Any]) -> None:
        name = parse(event).name
        if name not in self.names:
            self.names.add(name)
            self.queue.append(event)

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.25)

    def step(self, files: Files | None = None) -> Outcome:
        """Handle the next event; on a death it is queued again, as the broker would."""
        event = self.queue.popleft()
        ends_s = self.now_s + self.slot_s
        self.fence += 1
        try:
            store = Store(self.root / "store", worker=event["worker"], fence=self.fence, files=files)
            context = Context(
                spec=self.spec,
                store=store,
                program=lambda: self.program,
                invoke=self.invoke,
                remaining_s=lambda: ends_s - self.now_s,
                monotonic=lambda: self.now_s,
                sleep=self.sleep,
                timer=self.timer,
                poll_s=0.5,
            )
            outcome = handle(parse(event), context)
        except Killed:
            self.deaths += 1
            self.queue.append(event)
            return Outcome("continue", -1, "killed")
        self.outcomes.append(outcome)
        return outcome

    def run(self, workers: int, *, kills: random.Random | None = None, max_steps: int = 2000) -> str:
        """Train with so many workers; return the SHA-256 of the result's weights."""
        self.invoke({"start": True, "workers": workers, "generation": 0, "worker": 0})
        for _ in range(max_steps):
            if not self.queue:
                return self.sha256()
            if kills is not None and kills.random() < 0.9:
                self.step(KillingFiles(int(kills.expovariate(1 / 40)) + 1, after=kills.random() < 0.5))
            else:
                self.step()
        raise AssertionError(f"not done after {max_steps} events; outcomes: {self.outcomes[-5:]}")

    def sha256(self) -> str:
        _, weights = read_arrays(self.root / "store" / "result")
        return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()
