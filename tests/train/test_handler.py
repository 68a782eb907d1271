from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.errors import JobFailed, SpecError
from tenure.train.events import Combine, parse
from tenure.train.handler import Outcome
from tenure.train.programs import Arrays
from tenure.train.progress import measure, read_progress
from tenure.train.spec import TrainSpec
from tenure.train.store import Store, node_name, read_result, weights_name

from .driver import SHARDS, Driver, Tiny


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Driver(tmp_path_factory.mktemp("one")).run(1)


@pytest.mark.parametrize("workers", [2, 3, 5, 6])
def test_weights_are_bit_identical_for_any_number_of_workers(tmp_path: Path, reference: str, workers: int) -> None:
    assert Driver(tmp_path).run(workers) == reference


@pytest.mark.parametrize("seed", range(16))
def test_weights_are_the_same_when_workers_are_killed_at_random_file_operations(
    tmp_path: Path, reference: str, seed: int
) -> None:
    driver, workers = Driver(tmp_path), (1, 2, 3, 5)[seed % 4]
    assert driver.run(workers, kills=random.Random(seed)) == reference
    assert driver.deaths > 0 or workers == 1
    assert read_progress(tmp_path / "store").round == 5


def test_per_worker_sums_would_not_give_the_same_weights(tmp_path: Path) -> None:
    """The control: adding each worker's shards first, as frameworks do, drifts in the last bits."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(1000).astype(np.float32) for _ in range(SHARDS)]
    in_order = sum(parts[1:], start=parts[0])
    by_worker = sum(parts[2::2], start=parts[0]) + sum(parts[3::2], start=parts[1])
    assert not np.array_equal(in_order, by_worker)


def test_a_start_event_handled_twice_has_one_effect(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path)
    start = {"start": True, "workers": 2, "generation": 0, "worker": 0}
    driver.queue.extend([start, start])
    assert driver.run(2) == reference
    assert len([name for name in driver.names if name.endswith("-000000")]) == 1  # worker 1's first slot, once


def test_a_torn_gradient_is_quarantined_and_computed_again(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path)
    driver.invoke({"start": True, "workers": 2, "generation": 0, "worker": 0})
    driver.step()  # worker 0 left its shards of round 0
    victim = tmp_path / "store" / node_name(0, (0, 2))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    content[-70] ^= 1
    victim.write_bytes(bytes(content))
    assert driver.run(2) == reference
    assert read_progress(tmp_path / "store").quarantined == 1


def test_torn_weights_are_computed_again_from_the_round_before(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path)
    driver.invoke({"start": True, "workers": 2, "generation": 0, "worker": 0})
    store = Store(tmp_path / "store", worker=9)
    while store.newest_sum() < 3:
        driver.step()
    newest = tmp_path / "store" / weights_name(store.checkpoints()[-1])
    newest.write_bytes(newest.read_bytes()[:-100])
    assert driver.run(2) == reference


def test_a_torn_layout_is_made_again_by_a_worker_that_does_not_know_it(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path)
    driver.invoke({"start": True, "workers": 2, "generation": 0, "worker": 0})
    while Store(tmp_path / "store", worker=9).newest_sum() < 1:
        driver.step()
    (tmp_path / "store" / "layout.json").write_bytes(b"{")
    assert driver.run(2) == reference
    assert read_progress(tmp_path / "store").quarantined == 1


def test_a_worker_that_was_left_behind_makes_a_lost_round_again_by_itself(tmp_path: Path) -> None:
    """Else both wait for ever: one for its round's torn gradients, the other, a round ahead, for the first one's next."""
    driver = Driver(tmp_path)
    driver.invoke({"start": True, "workers": 2, "generation": 0, "worker": 0})
    store = Store(tmp_path / "store", worker=9)
    while store.newest_node() < 1:
        driver.step()
    for name in (*store.names("sums"), *store.names("nodes")):
        path = tmp_path / "store" / ("sums" if name in store.names("sums") else "nodes") / name
        if name.startswith("00000000") and name != "00000000-0000-0002":
            path.unlink()
    for name in store.names("weights")[1:]:
        (tmp_path / "store" / "weights" / name).unlink()
    behind = next(event for event in driver.queue if event["worker"] == 0)
    driver.queue.remove(behind)
    driver.queue.appendleft(behind)
    driver.step()
    assert store.newest_sum() >= 0


def test_a_dead_claimer_is_replaced_after_the_claim_period(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path, exchange="central")
    dead = Store(tmp_path / "store", worker=5)
    dead.publish_json("claims/sum-00000000-0001-0000.0000", {"owner": "worker 5, dead"})
    assert driver.run(2) == reference
    assert driver.now_s >= driver.spec.claim_period_s


def test_only_two_checkpoints_and_what_came_after_them_stay_on_disk(tmp_path: Path) -> None:
    Driver(tmp_path, max_rounds=9).run(3)
    left = sorted(path.name for path in (tmp_path / "store" / "weights").iterdir())
    assert len(left) == 2
    assert len({path.name[:8] for path in (tmp_path / "store" / "nodes").iterdir()}) <= 2
    assert min(path.name[:8] for path in (tmp_path / "store" / "sums").iterdir()) >= left[0]


def test_a_worker_hands_over_before_its_slot_ends_and_the_next_slot_goes_on(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path, slot_s=1.0)
    assert driver.run(3) == reference
    assert any(outcome == Outcome("continue", outcome.round, "slot nearly over") for outcome in driver.outcomes)
    assert all(outcome.state == "done" for outcome in driver.outcomes[-3:])
    assert any("-000001" in name for name in driver.names)


def test_training_stops_at_the_goal(tmp_path: Path) -> None:
    Driver(tmp_path, goal_accuracy=0.9, max_rounds=200).run(2)
    result = read_result(tmp_path / "store")
    assert result is not None
    assert result.meta["why"] == "goal"
    assert result.meta["accuracy"] >= 0.9
    assert result.meta["rounds"] < 200


def test_a_probe_stops_at_its_round_and_is_measured(tmp_path: Path) -> None:
    Driver(tmp_path, stop_at_round=3, evaluate_every=2).run(2)
    progress = read_progress(tmp_path / "store")
    assert (progress.state, progress.why, progress.round) == ("done", "stop_at_round", 3)
    assert progress.accuracy_rounds == (2, 3)
    metrics = measure(progress)
    assert len(metrics["shard_s"]) == 2 * SHARDS
    assert {"startup_s", "combine_s", "round_s", "examples_per_s"} <= metrics.keys()


def test_a_loss_that_is_not_finite_ends_the_training_in_words(tmp_path: Path) -> None:
    class Diverges(Tiny):
        def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
            return weights, float("nan"), 1

    driver = Driver(tmp_path, program=Diverges())
    with pytest.raises(JobFailed, match=r"round 0: the loss is nan.*Lower the learning rate"):
        driver.run(1)
    assert read_progress(tmp_path / "store").state == "failed"


def test_a_worker_that_never_comes_is_named(tmp_path: Path) -> None:
    driver = Driver(tmp_path, max_idle_slots=3)
    driver.invoke({"start": True, "workers": 2, "generation": 0, "worker": 0})
    driver.step()
    driver.queue = type(driver.queue)(event for event in driver.queue if event["worker"] == 0)
    for _ in range(3):
        driver.step()
    with pytest.raises(JobFailed, match=r"shards \[3, 4, 5\] of workers \[1\]"):
        driver.step()


def test_a_slot_too_short_for_one_shard_is_named(tmp_path: Path) -> None:
    driver = Driver(tmp_path, slot_s=0.0, max_idle_slots=3)
    driver.invoke({"start": True, "workers": 1, "generation": 0, "worker": 0})
    for _ in range(3):
        driver.step()
    with pytest.raises(JobFailed, match="could not finish one of its own shards; its slot is too short"):
        driver.step()


def test_a_resumed_stage_goes_on_with_another_number_of_workers(tmp_path: Path, reference: str) -> None:
    driver = Driver(tmp_path)
    driver.invoke({"start": True, "workers": 3, "generation": 0, "worker": 0})
    for _ in range(5):
        driver.step()
    stale = list(driver.queue)
    driver.queue.clear()
    driver.invoke({"start": True, "workers": 2, "generation": 1, "worker": 0})
    driver.step()
    driver.queue.extend(stale)
    assert driver.run(2) == reference
    assert any("superseded" in outcome.why for outcome in driver.outcomes)


def test_a_combine_event_adds_a_round_by_itself(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.queue.append({"start": True, "workers": 2, "generation": 0, "worker": 0})
    driver.step()
    driver.queue.appendleft(Combine(workers=2, round=0, worker=1).to_dict())
    driver.step()
    assert read_progress(tmp_path / "store").round == 1


def test_more_workers_than_shards_are_refused(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    with pytest.raises(SpecError, match="7 workers can't share 6 shards"):
        driver.run(7)


def test_every_example_is_used_once_in_a_pass_whatever_the_batch(tmp_path: Path) -> None:
    from tenure.train.rounds import Rounds

    spec = TrainSpec(program="x.py:X", folder="/", shards=6, batch=18)
    rounds = Rounds(spec=spec, program=Tiny())
    seen: list[Any] = [rounds.shard_examples(r, s) for r in range(10) for s in range(6)]
    stream = np.concatenate(seen)
    assert all(sorted(stream[i * 60 : (i + 1) * 60]) == list(range(60)) for i in range(3))


@pytest.mark.parametrize(
    "event",
    [
        {"start": True, "workers": 4, "generation": 1, "worker": 0},
        {"workerno": 2, "workers": 4, "round": 17, "slot": 3, "generation": 0, "idle": 1, "worker": 2},
        {"combine": True, "workers": 4, "round": 17, "generation": 0, "worker": 2},
    ],
)
def test_an_event_prints_as_it_was_read(event: dict[str, Any]) -> None:
    assert parse(event).to_dict() == event


@pytest.mark.parametrize("event", [{}, {"workers": 2}, {"workerno": 2, "workers": 2}, {"start": True, "workers": "2"}])
def test_a_wrong_event_is_refused(event: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="event"):
        parse(event)
