"""What must hold after any interleaving: compares what a run published with undisturbed runs of the same training.

An *effect* is what later results may depend on or what a user is told: nodes, sums, weights, the result, the layout, a
plan, and of a round's record the loss, the accuracy and the number of examples. Times, fences and who did it may differ;
claims, fences and starts are no effects. A *double effect* is a name of an effect under which two different contents were
ever published, or a finished file that was overwritten. A *double start* is work done that was published already: it is
allowed, and must be counted.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

from tenure.train.records import read_arrays
from tenure.train.store import round_name

from .explorer import ROOT, Hangs, Run, Schedule
from .floats import Floats
from .memory_files import MemoryFiles

Effect = tuple[Any, ...]


def effect(name: str, content: bytes) -> Effect | None:
    """Return what a publication means; None for one that is no effect."""
    folder = name.split("/")[0]
    if folder in ("nodes", "sums", "weights", "result"):
        _, length, _ = struct.unpack_from("<8sII", content)
        body = json.loads(content[16 : 16 + length])
        meta = {key: value for key, value in body["meta"].items() if key not in ("shard_s", "at_s")}
        arrays = {key: (entry["dtype"], entry["shape"], entry["offset"]) for key, entry in body["arrays"].items()}
        table = 4 * -(-body["payload_bytes"] // body["block_bytes"])
        payload = content[-(-(16 + length + table) // 64) * 64 :]
        return (repr(sorted(meta.items())), repr(sorted(arrays.items())), payload)
    if folder == "rounds":
        data = json.loads(content)["data"]
        return tuple(data[key] for key in ("round", "loss", "accuracy", "examples"))
    if folder in ("plans", "layout.json", "failures"):
        return (repr(json.loads(content)["data"]),)
    return None


@dataclass(slots=True)
class Oracle:
    """Knows the effects of undisturbed runs, by the training they belong to."""

    _known: dict[Effect, dict[str, Effect]] = field(default_factory=dict)

    def explore(self, schedule: Schedule, **options: Any) -> tuple[Run, list[str]]:
        """Run a schedule; return it and what is wrong with it."""
        expected = self.expected(schedule)
        run = Run(schedule, Floats(schedule.nan_round), **options)
        try:
            run.go()
        except (Hangs, Exception) as error:  # whatever a process may not end with
            return run, [f"{type(error).__name__}: {error}"]
        found = self._judge(run, expected)
        return run, found

    def expected(self, schedule: Schedule) -> dict[str, Effect]:
        """Return name -> effect of this training, from undisturbed runs with any number of workers."""
        key = (schedule.shards, schedule.rounds, schedule.goal, schedule.evaluate_every, schedule.nan_round)
        if key not in self._known:
            known: dict[str, Effect] = {}
            for workers in sorted({1, 2, 3, schedule.shards}):
                for exchange in ("sharded", "central"):
                    plan = Schedule(
                        seed=0,
                        workers=workers,
                        shards=schedule.shards,
                        rounds=schedule.rounds,
                        exchange=exchange,
                        goal=schedule.goal,
                        evaluate_every=schedule.evaluate_every,
                        nan_round=schedule.nan_round,
                    )
                    run = Run(plan, Floats(schedule.nan_round)).go()
                    for name, meaning in effects(run).items():
                        if name.startswith("plans"):
                            continue  # the one effect that names the workers
                        assert set(meaning) == {known.setdefault(name, meaning[0])}, f"undisturbed runs differ in {name}"
            self._known[key] = known
        return self._known[key]

    def _judge(self, run: Run, expected: dict[str, Effect]) -> list[str]:
        wrong = [f"overwritten: {name}" for name in run.overwritten]
        wrong += [f"published in spite of its fence: {name}" for name in run.stale]
        if run.uncounted:
            wrong.append(f"{run.uncounted} double starts were not counted")
        for name, meanings in effects(run).items():
            if name in run.rotten and name.startswith("rounds/"):
                # An accuracy that was on a spoiled file alone can't be told again; the rest can.
                meanings = [m if m[2] is not None else (m[0], m[1], expected[name][2], m[3]) for m in meanings]
            if len(set(meanings)) > 1:
                wrong.append(f"double effect: {name} was published with {len(set(meanings))} contents")
            if expected.get(name, meanings[0]) != meanings[0]:
                wrong.append(f"{name} differs from an undisturbed run's: {_short(meanings[0])}, not {_short(expected[name])}")
        failed = [text for text in run.failures if not text.startswith("StaleFence")]
        if run.schedule.nan_round >= 0:
            return wrong + self._judge_failure(run, failed)
        wrong += [f"a process failed: {text}" for text in failed]
        store = MemoryFiles(run.disk)
        if "result" in run.rotten:
            return wrong  # whoever reads it says so; nobody is left to make it again
        if not store.exists(ROOT / "result"):
            return [*wrong, "there is no result"]
        header, _ = read_arrays(ROOT / "result", store)  # verified
        there = set(store.names(ROOT / "rounds"))
        for rounds in range(1, int(header.meta["rounds"]) + 1):
            name = round_name(rounds)
            if name.split("/")[1] not in there and name not in run.rotten:
                wrong.append(f"missing: {name}")
        return wrong

    def _judge_failure(self, run: Run, failed: list[str]) -> list[str]:
        wrong = [
            f"wrongly named: {text}"
            for text in failed
            if f"failed in round {run.schedule.nan_round}: the loss is nan" not in text
        ]
        store = MemoryFiles(run.disk)
        if store.exists(ROOT / "result"):
            wrong.append("there is a result although the loss is NaN")
        if not failed or not store.names(ROOT / "failures"):
            wrong.append("nobody says that the loss is NaN")
        return wrong


def effects(run: Run) -> dict[str, list[Effect]]:
    """Return what was published under each name, in order."""
    found: dict[str, list[Effect]] = {}
    for published in run.publications:
        meaning = effect(published.name, published.content)
        if meaning is not None:
            found.setdefault(published.name, []).append(meaning)
    return found


def _short(meaning: Effect) -> str:
    return repr(meaning)[:120]
