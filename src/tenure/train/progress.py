"""How far a training stage is, read from its store; and the metrics that trials keep. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenure.errors import CorruptData
from tenure.train.files import Files
from tenure.train.store import failure_name, read_document, read_result


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """What the store says now. Lists are in round order."""

    round: int = 0
    """Rounds finished."""
    loss: float | None = None
    """Mean loss of the newest round."""
    accuracy: float | None = None
    """Newest share of held-out examples right."""
    losses: tuple[float, ...] = ()
    """One per round."""
    accuracies: tuple[float, ...] = ()
    """One per look at the held-out examples."""
    accuracy_rounds: tuple[int, ...] = ()
    """Rounds finished at each look."""
    startup_s: tuple[float, ...] = ()
    shard_s: tuple[float, ...] = ()
    combine_s: tuple[float, ...] = ()
    round_s: tuple[float, ...] = ()
    wait_s: tuple[float, ...] = ()
    examples: tuple[int, ...] = ()
    """Examples of each round."""
    state: str = "waiting"
    """`waiting` (no plan), `running`, `done` or `failed`."""
    why: str = ""
    """`goal`, `max_rounds` or `stop_at_round`; or the error."""
    quarantined: int = 0
    """Files found torn or rotten."""
    at_s: float = 0.0
    """UTC of the newest round's end."""


class ProgressReader:
    """Reads a store again and again, each round's record once: cheap enough for a live display."""

    def __init__(self, store_dir: Path) -> None:
        self._root = store_dir
        self._files = Files()
        self._records: dict[str, Mapping[str, Any]] = {}
        self._starts: dict[str, float] = {}

    def read(self) -> TrainProgress:
        """Return the progress now."""
        self._load()
        records = [self._records[name] for name in sorted(self._records)]
        looks = [record for record in records if record["accuracy"] is not None]
        state, why = self._state()
        return TrainProgress(
            round=records[-1]["round"] if records else 0,
            loss=records[-1]["loss"] if records else None,
            accuracy=looks[-1]["accuracy"] if looks else None,
            losses=tuple(float(record["loss"]) for record in records),
            accuracies=tuple(float(look["accuracy"]) for look in looks),
            accuracy_rounds=tuple(int(look["round"]) for look in looks),
            startup_s=tuple(self._starts.values()),
            shard_s=tuple(float(seconds) for record in records for seconds in record["shard_s"]),
            combine_s=tuple(float(record["combine_s"]) for record in records),
            round_s=tuple(float(record["round_s"]) for record in records),
            wait_s=tuple(float(record["wait_s"]) for record in records),
            examples=tuple(int(record["examples"]) for record in records),
            state=state,
            why=why,
            quarantined=len(self._files.names(self._root / "quarantine")),
            at_s=records[-1]["at_s"] if records else 0.0,
        )

    def _load(self) -> None:
        for name in self._files.names(self._root / "rounds"):
            if name not in self._records:
                try:
                    record = read_document(self._root / "rounds" / name)
                except CorruptData:
                    continue  # a torn record costs one point of the curve, never the display
                if record is not None:
                    self._records[name] = record
        for name in self._files.names(self._root / "starts"):
            if name not in self._starts:
                try:
                    self._starts[name] = float(read_document(self._root / "starts" / name)["startup_s"])
                except (CorruptData, TypeError):
                    continue

    def _state(self) -> tuple[str, str]:
        try:
            result = read_result(self._root)
            plans = self._files.names(self._root / "plans")
            failure = read_document(self._root / failure_name(int(plans[-1][:4]) if plans else 0))
        except CorruptData as error:
            return "running", str(error)
        if result is not None:
            return "done", str(result.meta["why"])
        if failure is not None:
            return "failed", str(failure["error"])
        return ("running" if plans else "waiting"), ""


def read_progress(store_dir: Path) -> TrainProgress:
    """Return the progress of a stage, read once from the start."""
    return ProgressReader(store_dir).read()


def measure(progress: TrainProgress) -> dict[str, list[float]]:
    """Return metric -> values seen, for a trial: startup_s, shard_s, combine_s, round_s, examples_per_s.

    The first round warms caches up and is left out when there are more. `peak_memory_bytes` is the leases' to tell.
    """
    first = 1 if len(progress.round_s) > 1 else 0
    shards = len(progress.shard_s) // max(1, len(progress.round_s))
    found = {
        "startup_s": list(progress.startup_s),
        "shard_s": list(progress.shard_s[first * shards :]),
        "combine_s": list(progress.combine_s[first:]),
        "round_s": list(progress.round_s[first:]),
        "examples_per_s": [n / s for n, s in zip(progress.examples[first:], progress.round_s[first:], strict=True) if s > 0],
    }
    return {name: values for name, values in found.items() if values}
