"""Weights on disk: rare, because the sums of the rounds since then give the rest. What a worker that starts goes on from.

A checkpoint is written when the rounds since the last one took ten times as long as writing does, and after 32 rounds at the
latest: it costs a tenth of the time at most, and a worker that starts adds up no more than 32 sums twice. Two are kept with
all sums since the older one, so that a torn one costs a longer replay and no training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tenure.errors import CorruptData
from tenure.train.records import Arrays
from tenure.train.store import Store, weights_name

COST_SHARE = 0.1
MAX_ROUNDS = 32
KEPT = 2


@dataclass(slots=True)
class Checkpoints:
    """One process's hands on the weights of the store."""

    store: Store
    timer: Callable[[], float] = time.perf_counter
    _write_s: float = 0.0
    """What the last one took; the first is free to find out."""

    def newest(self) -> tuple[int, Arrays, Mapping[str, Any]] | None:
        """Return rounds, weights and meta of the newest sound checkpoint; None without one. Torn ones go to quarantine."""
        for rounds in reversed(self.store.checkpoints()):
            try:
                header, weights = self.store.read(weights_name(rounds))
                return rounds, weights, header.meta
            except (CorruptData, FileNotFoundError):
                continue
        return None

    def begin(self, weights: Arrays) -> None:
        """Publish the weights before the first round, unless some are there."""
        if not self.store.checkpoints():
            self.store.publish_arrays(weights_name(0), weights, {})

    def due(self, rounds: int, round_s: float, *, seldom: bool = False) -> bool:
        """Return whether the weights after so many rounds, of `round_s` seconds each, should be written.

        seldom: only after the most rounds, where bytes are to be few: weights are many more than a round's sum.
        """
        kept = self.store.checkpoints()
        since = rounds - (kept[-1] if kept else 0)
        if seldom:
            return since >= MAX_ROUNDS
        return since >= min(MAX_ROUNDS, max(1, math.ceil(self._write_s / (COST_SHARE * max(round_s, 1e-9)))))

    def write(self, rounds: int, weights: Arrays, meta: Mapping[str, Any]) -> None:
        """Publish the weights after so many rounds."""
        began = self.timer()
        self.store.publish_arrays(weights_name(rounds), weights, meta)
        self._write_s = self.timer() - began

    def forget(self, rounds: int) -> None:
        """Remove what no step from `rounds` finished ones on can need."""
        kept = self.store.checkpoints()[-KEPT:]
        oldest = kept[0] if kept else 0
        self.store.forget(nodes_before=rounds - 1, sums_before=min(oldest, rounds - 1), weights_before=oldest)
