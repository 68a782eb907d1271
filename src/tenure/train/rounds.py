"""The work of one round: which examples a shard has, its gradient, what follows from the sum. All of it is deterministic.

The examples of all rounds are one stream: permutations of the training set, one per pass over it, each drawn from
(seed, pass). Round r takes the r-th `batch` of the stream, and its shards are consecutive parts of it. A shard's own
randomness is drawn from (seed, round, shard). So a gradient does not depend on who computes it. Not here: files (`exchange`,
`checkpoints`), waiting (`handler`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import JobFailed, SpecError
from tenure.train.exchange import Sum
from tenure.train.programs import Arrays, Program
from tenure.train.spec import TrainSpec

ORDER_STREAM = 1
SHARD_STREAM = 2


@dataclass(slots=True)
class Rounds:
    """A program with its data."""

    spec: TrainSpec
    program: Program
    timer: Callable[[], float] = time.perf_counter
    """Seconds, for the figures in records."""
    train: Arrays = field(default_factory=dict)
    held_out: Arrays = field(default_factory=dict)
    passes: int = 1
    """Copies of the training set, one after the other, that the arrays hold: pass p over the data reads copy p modulo these."""
    _order: tuple[int, NDArray[Any]] = (-1, np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        self.train, self.held_out = self.program.data(self.spec.inputs)
        self.passes = int(getattr(self.program, "passes", 1))
        lengths = {name: len(values) for name, values in self.train.items()}
        if len(set(lengths.values())) != 1 or self.examples < self.spec.shards:
            raise SpecError(
                f'program "{self.spec.program}": its training arrays must all have the same length, at least one example for '
                f"each of the {self.spec.shards} shards; found {lengths}"
            )

    @property
    def examples(self) -> int:
        """Size of the training set, without its copies."""
        return len(next(iter(self.train.values()))) // self.passes if self.train else 0

    def build(self) -> Arrays:
        """Return the weights before the first round."""
        return self.program.build(self.spec.seed)

    def gradient(self, round_: int, shard: int, weights: Arrays) -> tuple[Arrays, float, int, float]:
        """Return one shard's gradient, the sum of its losses, its number of examples, and the seconds it took."""
        began = self.timer()
        indexes = self.shard_examples(round_, shard)
        batch = {name: values[indexes] for name, values in self.train.items()}
        rng = np.random.default_rng((self.spec.seed, SHARD_STREAM, round_, shard))
        with _missing_file():
            summed, loss, n = self.program.gradient(weights, batch, rng)
        return summed, float(loss), int(n), self.timer() - began

    def update(self, round_: int, weights: Arrays, total: Sum) -> Arrays:
        """Return the weights after a round from those before it. They share no memory with the sum."""
        following = self.program.update(weights, total.arrays, total.n, round_)
        vectors = list({id(view.base): view.base for view in total.arrays.values()}.values())
        return {
            name: np.array(values) if any(np.may_share_memory(values, vector) for vector in vectors) else values
            for name, values in following.items()
        }

    def evaluate(self, weights: Arrays) -> float:
        """Return the share of held-out examples classified rightly."""
        with _missing_file():
            return float(self.program.evaluate(weights, self.held_out))

    def shard_examples(self, round_: int, shard: int) -> NDArray[Any]:
        """Return the indexes of the training examples of one shard, in order."""
        batch = self.spec.batch or self.examples
        edges = [round_ * batch + batch * part // self.spec.shards for part in (shard, shard + 1)]
        parts, at = [], edges[0]
        while at < edges[1]:
            passes, inside = divmod(at, self.examples)
            part = self._permutation(passes)[inside : inside + edges[1] - at]
            parts.append(part + self.examples * (passes % self.passes))
            at += len(part)
        return np.concatenate(parts)

    def _permutation(self, passes: int) -> NDArray[Any]:
        if self._order[0] != passes:
            rng = np.random.default_rng((self.spec.seed, ORDER_STREAM, passes))
            self._order = (passes, rng.permutation(self.examples))
        return self._order[1]


@contextlib.contextmanager
def _missing_file() -> Iterator[None]:
    """Keep a program's own FileNotFoundError apart from files of the store, which may vanish and are looked for again."""
    try:
        yield
    except FileNotFoundError as error:
        raise JobFailed(f"the program needs a file that is not there: {error}") from error
