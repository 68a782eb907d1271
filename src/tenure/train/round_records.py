"""The records of finished rounds, ``rounds/<r>.json``: what a round was, and whether training ends with it.

A record is made by the worker whose turn the round is, with the times that it saw. What a dead worker owed is made again from
the round's sum. Not here: when a round is finished, and who looks at the held-out examples (`slot`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenure.train.context import Context
from tenure.train.exchange import Exchange
from tenure.train.store import round_name


@dataclass(frozen=True, slots=True)
class Finished:
    """What a round's record tells of its sum."""

    loss: float
    """Sum over the examples."""
    n: int
    """Examples."""
    shard_s: tuple[float, ...]
    """Seconds that each shard took, in order."""


@dataclass(slots=True)
class Figures:
    """What one worker saw of a round, in seconds; 0 when it had no part in it."""

    began: float = 0.0
    """By the context's timer."""
    wait_s: float = 0.0
    combine_s: float = 0.0
    """Adding, gathering and updating."""
    evaluate_s: float = 0.0
    round_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RoundRecords:
    """One process's hands on the records."""

    context: Context
    exchange: Exchange

    def publish(self, rounds: int, finished: Finished, accuracy: float | None, figures: Figures) -> None:
        """Publish the record of the round that finished as the `rounds`-th. accuracy: None when nobody looked.

        The last one is forced to disk, as the result is that it tells of: nobody makes it again afterwards.
        """
        record = {
            "round": rounds,
            "loss": finished.loss / finished.n,
            "accuracy": accuracy,
            "examples": finished.n,
            "by": self.context.store.worker,
            "shard_s": finished.shard_s,
            "wait_s": figures.wait_s,
            "combine_s": figures.combine_s + figures.evaluate_s,
            "evaluate_s": figures.evaluate_s,
            "round_s": figures.round_s,
            "at_s": self.context.utc(),
        }
        self.context.store.publish_json(round_name(rounds), record, durable=bool(self.why_last(record)))

    def fill(self, before: int) -> None:
        """Publish the records that workers who died owed, before the sums they are made of are forgotten.

        A look at the held-out examples that such a record told of is lost when the record was torn.
        """
        there = {int(name.split(".")[0]) for name in self.context.store.names("rounds")}
        for rounds in (round_ + 1 for round_ in self.context.store.summed_rounds()):
            if rounds < before and rounds not in there and (meta := self.exchange.describe(rounds - 1)) is not None:
                self.publish(rounds, Finished(meta["loss"], meta["n"], tuple(meta["shard_s"])), None, Figures())

    def looks_at(self, rounds: int) -> bool:
        """Return whether the held-out examples are looked at after so many rounds."""
        return rounds >= self.context.spec.last_round or rounds % self.context.spec.evaluate_every == 0

    def undecided(self, rounds: int) -> bool:
        """Return whether training may end after so many rounds: then nobody goes on before that is known."""
        if rounds == 0 or not self.looks_at(rounds):
            return False
        record = self.context.store.read_json(round_name(rounds))
        return record is None or bool(self.why_last(record))

    def why_last(self, record: dict[str, Any]) -> str:
        """Return why training ends with the record's round, or nothing."""
        spec = self.context.spec
        if spec.goal_accuracy and record["accuracy"] is not None and record["accuracy"] >= spec.goal_accuracy:
            return "goal"
        if record["round"] < spec.last_round:
            return ""
        return "stop_at_round" if record["round"] == spec.stop_at_round else "max_rounds"
