"""The exchange where the same result is not asked for, in the explorer's interleavings: it ends, with a result or in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tenure.train.local import checksum
from tenure.train.records import read_arrays

from .explorer import ROOT, Run, Schedule
from .floats import Floats
from .memory_files import MemoryFiles

MODES: list[dict[str, Any]] = [{}, {"codec": "int8"}, {"local_steps": 2}, {"local_steps": 2, "codec": "topk:0.5"}]


def explore(schedule: Schedule, mode: dict[str, Any]) -> Run:
    run = Run(schedule, Floats(schedule.nan_round))
    run.spec = replace(run.spec, same_result=False, **mode)
    return run.go()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_any_interleaving_ends_with_a_result_or_the_reason_and_overwrites_nothing(mode: dict[str, Any]) -> None:
    for seed in range(20):
        schedule = Schedule.draw(seed)
        run = explore(schedule, mode)
        assert not run.overwritten, schedule
        assert not run.stale, schedule
        failed = [text for text in run.failures if not text.startswith("StaleFence")]
        store = MemoryFiles(run.disk)
        if schedule.nan_round >= 0:
            assert failed, schedule
            assert all("a gradient is not finite" in text for text in failed), (failed, schedule)
        else:
            assert not failed, (failed, schedule)
            header, _ = read_arrays(ROOT / "result", store)
            assert 1 <= header.meta["rounds"] <= schedule.rounds, schedule


def test_undisturbed_runs_of_as_many_workers_give_the_same_bytes() -> None:
    for mode in MODES:
        plan = Schedule(seed=0, workers=3, shards=5, rounds=3)
        # Another order of steps, but everybody adds its own slice: no takeovers in an undisturbed run.
        found = [explore(replace(plan, seed=seed), mode) for seed in range(3)]
        results = [read_arrays(ROOT / "result", MemoryFiles(run.disk))[1] for run in found]
        assert len({checksum(weights) for weights in results}) == 1, mode
