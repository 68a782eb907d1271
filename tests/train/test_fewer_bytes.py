"""Local steps and codecs in whole stages: what is learned, what is kept, what is sent."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.train.driver import Driver
from tests.train.test_local import Momentum

from tenure.errors import JobFailed
from tenure.train.context import Context
from tenure.train.events import Work
from tenure.train.files import Files
from tenure.train.local import checksum, without_outer
from tenure.train.programs import Arrays
from tenure.train.records import read_arrays
from tenure.train.rounds import Rounds
from tenure.train.slot import Slot
from tenure.train.spec import TrainSpec
from tenure.train.store import Store, sum_name

FAST: dict[str, Any] = {"same_result": False, "batch": 24}
MODES: list[dict[str, Any]] = [
    {},
    {"codec": "int8"},
    {"local_steps": 4},
    {"local_steps": 4, "codec": "int8"},
    {"local_steps": 3, "codec": "topk:0.5", "exchange": "central"},
]


class Wide(Momentum):
    """With a parameter that is large enough for the sizes of records to tell."""

    def build(self, seed: int) -> Arrays:
        return {**super().build(seed), "wide": np.ones(40_000, dtype=np.float32), "m.wide": np.zeros(40_000, dtype=np.float32)}

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        summed, loss, n = super().gradient(weights, batch, rng)
        return {**summed, "wide": weights["wide"] * np.float32(n)}, loss, n


class CountingFiles(Files):
    """Counts the bytes that are read and written."""

    def __init__(self) -> None:
        self.bytes = 0

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        found = super().read(path, offset, size)
        self.bytes += len(found)
        return found

    def _write(self, temp: Path, pieces: Iterable[bytes | memoryview], durable: bool) -> None:
        kept = list(pieces)
        self.bytes += sum(len(piece) for piece in kept)
        super()._write(temp, kept, durable)


def result(driver: Driver) -> tuple[Any, Arrays]:
    header, weights = read_arrays(driver.root / "store" / "result")
    return header.meta, weights


def anew(driver: Driver) -> list[str]:
    return sorted(path.name for path in (driver.root / "store" / "anew").iterdir())


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_learns_with_any_number_of_workers(tmp_path: Path, mode: dict[str, Any], workers: int) -> None:
    driver = Driver(tmp_path, program=Momentum(), max_rounds=12, evaluate_every=4, **FAST, **mode)
    driver.run(workers)
    meta, weights = result(driver)
    assert meta["rounds"] == 12
    assert meta["accuracy"] > 0.85
    assert sorted(weights) == ["b", "m.b", "m.w", "w"]


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_slots_that_end_anywhere_change_nothing(tmp_path: Path, mode: dict[str, Any]) -> None:
    class Slow(Momentum):
        def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
            driver.now_s += 0.3
            return super().gradient(weights, batch, rng)

    found = []
    for name, slot_s in (("long", 40.0), ("short", 2.2)):
        # The period: nobody adds the slice of one who is between two slots, without what he left out before.
        driver = Driver(tmp_path / name, program=Slow(), slot_s=slot_s, max_rounds=4, claim_period_s=1000.0, **FAST, **mode)
        driver.run(3)
        found.append(checksum(result(driver)[1]))
        assert anew(driver) == []
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_stage_with_deaths_at_any_file_operation_ends_with_a_result(tmp_path: Path, mode: dict[str, Any]) -> None:
    driver = Driver(tmp_path, program=Momentum(), max_rounds=6, **FAST, **mode)
    driver.run(3, kills=random.Random(str(mode)))
    meta, _ = result(driver)
    assert meta["rounds"] == 6
    assert meta["accuracy"] > 0.7
    assert driver.deaths


def test_a_worker_that_died_begins_anew_and_the_store_says_so(tmp_path: Path) -> None:
    driver = Driver(tmp_path, program=Momentum(), **FAST, local_steps=3, codec="int8")
    driver.invoke({"start": True, "workers": 2, "generation": 0, "worker": 0})
    while driver.queue and not (tmp_path / "store" / "rounds" / "00000002.json").exists():
        driver.step()
    for saved in (tmp_path / "store" / "local").glob("0001-0002-*"):
        saved.unlink()
    while driver.queue:
        driver.step()
    assert [name[-9:] for name in anew(driver)] == ["0001.json"]
    assert result(driver)[0]["rounds"] == 5


def test_a_stage_goes_on_with_another_number_of_workers_and_forgets_what_was_for_the_old_one(tmp_path: Path) -> None:
    driver = Driver(tmp_path, program=Momentum(), max_rounds=6, **FAST, local_steps=3, codec="int8")
    driver.invoke({"start": True, "workers": 4, "generation": 0, "worker": 0})
    while driver.queue and not (tmp_path / "store" / "rounds" / "00000002.json").exists():
        driver.step()
    driver.queue.clear()
    driver.invoke({"start": True, "workers": 3, "generation": 1, "worker": 0})
    while driver.queue:
        driver.step()
    meta, _ = result(driver)
    assert meta["rounds"] == 6
    assert meta["accuracy"] > 0.85
    assert {name[-9:] for name in anew(driver)} == {"0000.json", "0001.json", "0002.json"}
    assert all(path.name[4:10] == "-0003-" for path in (tmp_path / "store" / "local").iterdir())


def test_one_local_step_of_plain_averaging_is_an_exchange_after_every_step(tmp_path: Path) -> None:
    alone = Driver(tmp_path / "a", **FAST, local_steps=1, outer_rate=1.0, outer_momentum=0.0)
    every = Driver(tmp_path / "b", **FAST)
    alone.run(3)
    every.run(3)
    for name, values in result(every)[1].items():
        assert np.allclose(values, result(alone)[1][name], atol=1e-5)


def test_fewer_bytes_go_through_the_store_by_as_much_as_the_codec_and_the_steps_say(tmp_path: Path) -> None:
    found = {}
    for name, mode in {
        "plain": {"max_rounds": 16},
        "int8": {"max_rounds": 16, "codec": "int8"},
        "topk": {"max_rounds": 16, "codec": "topk:0.01"},
        "local": {"max_rounds": 2, "local_steps": 8, "codec": "int8"},
    }.items():
        spec = TrainSpec(program="x:Wide", folder="/", shards=4, evaluate_every=100, **FAST, **mode)
        files = [CountingFiles() for _ in range(2)]
        in_threads(tmp_path / name, spec, Wide(), files)
        found[name] = sum(counted.bytes for counted in files) - 4 * 160_000 * 2  # first weights and result
    assert found["plain"] / found["int8"] > 2.5
    assert found["plain"] / found["topk"] > 10
    assert found["plain"] / found["local"] > 12


def test_a_loss_that_is_not_finite_ends_the_training_in_words_through_a_codec_too(tmp_path: Path) -> None:
    class Nan(Momentum):
        def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
            summed, loss, n = super().gradient(weights, batch, rng)
            summed["w"][0, 0] = np.nan
            return summed, loss, n

    driver = Driver(tmp_path, program=Nan(), **FAST, local_steps=2, codec="topk:0.5")
    with pytest.raises(JobFailed, match=r"loss is .* or a gradient is not finite"):
        driver.run(2)


class TearingFiles(Files):
    """Tears a file when one of several workers reads it first."""

    def __init__(self, torn: list[str]) -> None:
        self.torn = torn

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        if self.torn and path.as_posix().endswith(self.torn[0]):
            self.torn.pop()
            content = bytearray(path.read_bytes())
            content[-1] ^= 255
            hidden = path.with_name(f".torn.{path.name}")
            hidden.write_bytes(content)
            hidden.replace(path)
        return super().read(path, offset, size)


def in_threads(root: Path, spec: TrainSpec, program: Any, files: list[Any]) -> list[Slot]:
    """Train with one thread per worker, and return their slots."""
    slots = []
    for worker, own in enumerate(files):
        store = Store(root / "store", worker=worker, fence=1, files=own)
        context = Context(spec=spec, store=store, program=lambda: program, invoke=lambda event: None, poll_s=0.002)
        slots.append(Slot(Work(workerno=worker, workers=len(files)), context, Rounds(spec=spec, program=program)))
    slots[0].begin()
    failed: list[BaseException] = []

    def run(slot: Slot) -> None:
        try:
            slot.run()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=(slot,), daemon=True) for slot in slots]
    for thread in threads:
        thread.start()
    while not failed and any(thread.is_alive() for thread in threads):
        threads[0].join(0.05)
        threads[-1].join(0.05)
    assert not failed
    assert (root / "store" / "result").exists()
    return slots


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_all_workers_hold_the_same_weights_also_after_a_sum_was_torn_and_made_again(
    tmp_path: Path, mode: dict[str, Any]
) -> None:
    spec = TrainSpec(
        program="x:Momentum", folder="/", shards=6, max_rounds=6, evaluate_every=100, claim_period_s=0.05, **FAST, **mode
    )
    name = sum_name(2, 1, 0) if "exchange" in mode else sum_name(2, 3, 2)
    torn = [name]
    slots = in_threads(tmp_path, spec, Momentum(), [TearingFiles(torn) for _ in range(3)])
    shared = [{key: slot.weights[key] for key in ("b", "w")} for slot in slots]
    assert len({checksum(without_outer(weights)) for weights in shared}) == 1
    assert list((tmp_path / "store" / "quarantine").iterdir())
