"""A stage that goes on: after a failure, with another program or other data, on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.errors import JobFailed, SpecError
from tenure.train import circumstances
from tenure.train.programs import Arrays, load_program
from tenure.train.progress import read_progress
from tenure.train.store import Store

from .driver import Driver, Tiny

FILE_PROGRAM = """
from tests.train.driver import Tiny
class Filed(Tiny):
    pass
"""


def start(driver: Driver, *, workers: int = 2, generation: int = 0) -> None:
    driver.queue.clear()
    driver.invoke({"start": True, "workers": workers, "generation": generation, "worker": 0})


def go_on(driver: Driver, **options: Any) -> str:
    start(driver, **options)
    while driver.queue:
        driver.step()
    return driver.sha256()


class Diverging(Tiny):
    """Gives a loss that is not finite in round 2, until it is mended."""

    mended = False

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        summed, loss, n = super().gradient(weights, batch, rng)
        return summed, loss if self.mended or self.round < 2 else float("nan"), n

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        self.round = round_ + 1
        return super().update(weights, summed, n, round_)

    round = 0


def test_a_stage_that_failed_goes_on_once_its_program_is_mended(tmp_path: Path) -> None:
    reference = Driver(tmp_path / "whole").run(1)
    driver = Driver(tmp_path / "failed", program=(program := Diverging()))
    with pytest.raises(JobFailed, match="round 2: the loss is nan"):
        driver.run(1)
    with pytest.raises(JobFailed, match="round 2: the loss is nan"):
        go_on(driver, workers=1, generation=1)  # not mended: the same again, in the same words
    program.mended = True
    assert go_on(driver, workers=3, generation=2) == reference
    assert read_progress(driver.root / "store").state == "done"
    told = sorted(path.name for path in (driver.root / "store" / "failures").iterdir())
    assert told == ["0000.json", "0001.json"]


class Reading(Tiny):
    """Has an input file, which `before_round` may change."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        self.calls += 1
        if self.calls == 8:  # the second shard of the second round
            self.path.write_text("other")
        return super().gradient(weights, batch, rng)

    path: Path


def test_data_that_change_between_two_rounds_end_the_training_before_they_are_published(tmp_path: Path) -> None:
    program = Reading()
    program.path = tmp_path / "input.txt"
    program.path.write_text("data")
    driver = Driver(tmp_path / "run", program=program, inputs={"text": str(program.path)})
    with pytest.raises(JobFailed, match=r"data changed between two rounds: .*input.txt has 5 bytes, it had 4"):
        driver.run(1)
    store = Store(driver.root / "store", worker=9)
    assert store.newest_sum() == 0
    assert {node[1] for node in store.pairs("nodes", 1)} <= {1}
    driver.queue.extend([{"workerno": 0, "workers": 1, "generation": 0, "slot": 0, "worker": 0}])
    with pytest.raises(JobFailed, match="data changed while it is trained on"):
        driver.step()
    assert go_on(driver, workers=2, generation=1)
    assert "other data (" in store.read_json("plans/0001.json")["new"]


def test_a_program_that_changes_between_two_slots_is_refused_and_told_when_resumed(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "filed.py").write_text(FILE_PROGRAM)
    driver = Driver(root, program=load_program("filed.py:Filed", root, {}), slot_s=1.0)
    start(driver)
    driver.step()
    (root / "filed.py").write_text(FILE_PROGRAM + "# edited\n")
    with pytest.raises(JobFailed, match=r"program changed while it trains: filed\.py"):
        driver.step()
    go_on(driver, generation=1)
    assert "another program (filed.py" in Store(root / "store", worker=9).read_json("plans/0001.json")["new"]


def test_a_worker_or_a_resume_on_another_kind_of_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(tmp_path, slot_s=1.0)
    start(driver)
    driver.step()
    monkeypatch.setattr(circumstances, "_cpu", lambda: ("another CPU", ("sse4_2",)))
    with pytest.raises(JobFailed, match="this worker would round differently: the CPU is 'another CPU'"):
        driver.step()
    with pytest.raises(SpecError, match="this run was trained on another kind of machine"):
        go_on(driver, generation=1)
    loose = Driver(tmp_path / "loose", slot_s=1.0, same_result=False)
    monkeypatch.undo()
    start(loose)
    loose.step()
    monkeypatch.setattr(circumstances, "_cpu", lambda: ("another CPU", ("sse4_2",)))
    loose.step()


class Sleeping(Tiny):
    """Has steps of one second, but for one of three."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths = [1.0, 3.0]
        self.sleep: Any = None

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        self.sleep(self.lengths.pop(0) if self.lengths else 1.0)
        return super().gradient(weights, batch, rng)


def test_one_slow_step_does_not_keep_all_later_slots_from_trying(tmp_path: Path) -> None:
    program = Sleeping()
    driver = Driver(tmp_path, program=program, slot_s=4.5, max_rounds=1)
    program.sleep = driver.sleep
    driver.timer = lambda: driver.now_s
    start(driver, workers=1)
    driver.step()
    driver.slot_s = 2.0  # less than the slow step, which the store tells of
    while driver.queue:
        driver.step()
    assert driver.sha256()
    assert any(outcome.why == "slot nearly over" for outcome in driver.outcomes)
