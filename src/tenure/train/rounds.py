"""The work of one round: which examples a shard has, its gradient, and the combine. All of it is deterministic.

The examples of all rounds are one stream: permutations of the training set, one per pass over it, each drawn from
(seed, pass). Round r takes the r-th `batch` of the stream, and its shards are consecutive parts of it. A shard's own
randomness is drawn from (seed, round, shard). So a gradient does not depend on who computes it, and the sum over shards
in their order does not depend on how many workers there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import CorruptData, SpecError
from tenure.train.programs import Arrays, Program
from tenure.train.spec import TrainSpec
from tenure.train.store import Store, gradient_name, round_name, weights_name

ORDER_STREAM = 1
SHARD_STREAM = 2


@dataclass(slots=True)
class Rounds:
    """One process's hands on a training stage: computes shards and combines, through the store only."""

    spec: TrainSpec
    store: Store
    program: Program
    timer: Callable[[], float] = time.perf_counter
    """Seconds, for the figures in records."""
    utc: Callable[[], float] = time.time
    train: Arrays = field(default_factory=dict)
    held_out: Arrays = field(default_factory=dict)
    _order: tuple[int, NDArray[Any]] = (-1, np.empty(0, dtype=np.int64))
    _weights: tuple[int, Arrays] = (-1, {})

    def __post_init__(self) -> None:
        self.train, self.held_out = self.program.data(self.spec.inputs)
        lengths = {name: len(values) for name, values in self.train.items()}
        if len(set(lengths.values())) != 1 or self.examples < self.spec.shards:
            raise SpecError(
                f'program "{self.spec.program}": its training arrays must all have the same length, at least one example for '
                f"each of the {self.spec.shards} shards; found {lengths}"
            )

    @property
    def examples(self) -> int:
        """Size of the training set."""
        return len(next(iter(self.train.values()))) if self.train else 0

    def begin(self) -> None:
        """Publish the weights before the first round, unless training is further already."""
        if self.store.latest_round() < 0:
            built = self.program.build(self.spec.seed)
            self.store.publish_arrays(weights_name(0), built, {"rounds": 0})

    def weights(self, round_: int) -> Arrays:
        """Return the weights after `round_` rounds. Raises FileNotFoundError, CorruptData (then in quarantine)."""
        if self._weights[0] != round_:
            self._weights = (round_, self.store.read(weights_name(round_))[1])
        return self._weights[1]

    def publish_gradient(self, round_: int, shard: int) -> float:
        """Compute one shard's gradient and publish it. Returns the seconds that computing took."""
        began = self.timer()
        indexes = self.shard_examples(round_, shard)
        batch = {name: values[indexes] for name, values in self.train.items()}
        rng = np.random.default_rng((self.spec.seed, SHARD_STREAM, round_, shard))
        summed, loss, n = self.program.gradient(self.weights(round_), batch, rng)
        shard_s = self.timer() - began
        # A NaN is no JSON number: the combine finds it as None and ends the training in words.
        meta = {
            "loss": float(loss) if math.isfinite(loss) else None,
            "n": int(n),
            "shard_s": shard_s,
            "worker": self.store.worker,
        }
        self.store.publish_arrays(gradient_name(round_, shard), summed, meta)
        return shard_s

    def combine(self, round_: int, *, waited_s: float, round_began: float) -> None:
        """Add a round's gradients in shard order, publish its record and the next weights, and the result at the end.

        A gradient that is torn or gone is computed again. A loss or gradient that is not finite ends the training:
        `failure.json` says so. Doing all this twice has the effect of once.
        """
        began = self.timer()
        total, loss, n, shard_s = self._add(round_)
        rounds = round_ + 1
        if not (math.isfinite(loss) and n > 0 and all(np.isfinite(values).all() for values in total.values())):
            self.store.publish_json("failure.json", {"error": self._not_finite(round_, loss, n), "round": round_}, durable=True)
            return
        following = self.program.update(self.weights(round_), total, n, round_)
        added_s = self.timer() - began
        last = rounds >= self.spec.last_round
        accuracy = None
        if last or rounds % self.spec.evaluate_every == 0:
            accuracy = float(self.program.evaluate(following, self.held_out))
        combine_s = self.timer() - began
        record = {
            "round": rounds,
            "loss": loss / n,
            "accuracy": accuracy,
            "examples": n,
            "by": self.store.worker,
            "shard_s": shard_s,
            "wait_s": waited_s,
            "combine_s": combine_s,
            "evaluate_s": combine_s - added_s,
            "round_s": self.timer() - round_began,
            "at_s": self.utc(),
        }
        self.store.publish_json(round_name(round_), record)
        reached = bool(self.spec.goal_accuracy) and accuracy is not None and accuracy >= self.spec.goal_accuracy
        if reached or last:
            why = "goal" if reached else ("stop_at_round" if rounds == self.spec.stop_at_round else "max_rounds")
            meta = {"rounds": rounds, "accuracy": accuracy, "loss": loss / n, "why": why, "at_s": record["at_s"]}
            self.store.publish_arrays("result", following, meta, durable=True)
        self.store.publish_arrays(weights_name(rounds), following, {"rounds": rounds})
        self._weights = (rounds, following)
        self.store.forget_before(rounds)

    def shard_examples(self, round_: int, shard: int) -> NDArray[Any]:
        """Return the indexes of the training examples of one shard, in order."""
        batch = self.spec.batch or self.examples
        edges = [round_ * batch + batch * part // self.spec.shards for part in (shard, shard + 1)]
        parts, at = [], edges[0]
        while at < edges[1]:
            passes, inside = divmod(at, self.examples)
            part = self._permutation(passes)[inside : inside + edges[1] - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts)

    def _permutation(self, passes: int) -> NDArray[Any]:
        if self._order[0] != passes:
            rng = np.random.default_rng((self.spec.seed, ORDER_STREAM, passes))
            self._order = (passes, rng.permutation(self.examples))
        return self._order[1]

    def _add(self, round_: int) -> tuple[Arrays, float, int, list[float]]:
        total: Arrays = {}
        loss, n, seconds = 0.0, 0, []
        for shard in range(self.spec.shards):
            try:
                header, gradient = self.store.read(gradient_name(round_, shard))
            except (CorruptData, FileNotFoundError):
                self.publish_gradient(round_, shard)
                header, gradient = self.store.read(gradient_name(round_, shard))
            meta = header.meta
            loss += math.nan if meta["loss"] is None else meta["loss"]
            n += meta["n"]
            seconds.append(meta["shard_s"])
            for name, values in gradient.items():
                if name in total:
                    np.add(total[name], values, out=total[name])
                else:
                    total[name] = values
        return total, loss, n, seconds

    def _not_finite(self, round_: int, loss: float, n: int) -> str:
        return (
            f"training failed in round {round_}: the loss is {loss if n else 'of no example'} or a gradient is not finite. "
            f'The weights of round {round_} are kept. Lower the learning rate of "{self.spec.program}", or look for '
            "NaN and infinity in its inputs."
        )
