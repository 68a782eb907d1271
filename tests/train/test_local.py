"""Local steps without files: what a worker contributes, and the outer step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.train.driver import Tiny

from tenure.errors import SpecError
from tenure.train.exchange import Sum
from tenure.train.layout import Layout
from tenure.train.local import OUTER, LocalSteps, checksum, outer_step, without_outer
from tenure.train.programs import Arrays
from tenure.train.rounds import Rounds
from tenure.train.spec import TrainSpec


class Momentum(Tiny):
    """Tiny with moments of its own."""

    def build(self, seed: int) -> Arrays:
        built = super().build(seed)
        return {**built, **{f"m.{name}": np.zeros_like(values) for name, values in built.items()}}

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        following = dict(weights)
        for name, values in summed.items():
            following[f"m.{name}"] = np.float32(0.5) * weights[f"m.{name}"] + values / np.float32(n)
            following[name] = weights[name] - np.float32(0.3) * following[f"m.{name}"]
        return following


def rounds_of(program: Any = None, **spec: Any) -> Rounds:
    defaults: dict[str, Any] = {"shards": 4, "batch": 24, "same_result": False, "local_steps": 5}
    return Rounds(spec=TrainSpec(program="tiny.py:Tiny", folder="/", **{**defaults, **spec}), program=program or Momentum())


def go(local: LocalSteps, round_: int, node: tuple[int, int], weights: Arrays, look: Any = None) -> Any:
    return local.contribute(round_, node, weights, Layout.of, look or (lambda step_s: None))


def total_of(parts: list[Any], weights: Arrays) -> Sum:
    layout = Layout.of({name: weights[name] for name in ("b", "w")})
    flats = {dtype: np.sum([part.flats[dtype] for part in parts], axis=0) for dtype in layout.sizes}
    n = sum(part.n for part in parts)
    return Sum(layout.views(flats), sum(part.loss for part in parts), n, True, ())


def test_one_worker_that_averages_with_itself_takes_the_steps_it_would_take_anyway() -> None:
    rounds = rounds_of()
    local, weights = LocalSteps(rounds), rounds.build()
    for round_ in range(2):
        weights = outer_step(weights, total_of([go(local, round_, (0, 4), weights)], weights), rate=1.0, momentum=0.0)
    plain = rounds.build()
    for step in range(10):
        parts = [rounds.gradient(step, shard, plain) for shard in range(4)]
        summed = {name: np.sum([part[0][name] for part in parts], axis=0) for name in ("b", "w")}
        plain = rounds.update(step, plain, Sum(summed, 0.0, sum(part[2] for part in parts), True, ()))
    for name in ("b", "w"):
        assert np.allclose(weights[name], plain[name], atol=1e-5)
    assert np.allclose(local.inner["m.w"], plain["m.w"], atol=1e-5)
    assert not np.any(weights["m.w"])  # the worker's own, not the others'


def test_a_worker_counts_the_examples_and_losses_of_all_its_steps() -> None:
    rounds = rounds_of()
    part = go(LocalSteps(rounds), 0, (1, 3), rounds.build())
    assert part.node == (1, 3)
    assert part.n == 5 * 12
    assert part.loss > 0
    assert len(part.shard_s) == 2


def test_nodes_are_weighted_by_their_examples() -> None:
    rounds = rounds_of(Tiny(), local_steps=1)
    weights = rounds.build()
    parts = [go(LocalSteps(rounds), 0, node, weights) for node in ((0, 3), (3, 4))]
    mean = outer_step(weights, total_of(parts, weights), rate=1.0, momentum=0.0)
    whole = [go(LocalSteps(rounds), 0, (0, 4), weights)]
    together = outer_step(weights, total_of(whole, weights), rate=1.0, momentum=0.0)
    assert np.allclose(mean["w"], together["w"], atol=1e-6)


def test_the_outer_step_is_nesterovs_with_the_rate_and_momentum_asked_for() -> None:
    start = np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)
    weights, mean = {"w": start}, np.full((3, 2), 0.25, dtype=np.float32)
    for _ in range(4):
        weights = outer_step(weights, Sum({"w": mean * np.float32(8)}, 0.0, 8, True, ()), rate=0.7, momentum=0.9)
    # torch.optim.SGD(lr=0.7, momentum=0.9, nesterov=True): buffers 1, 1.9, 2.71, 3.439 gradients; steps of 1 + 0.9 buffer
    steps = 4 + 0.9 * (1 + 1.9 + 2.71 + 3.439)
    assert np.allclose(weights["w"], start - 0.7 * steps * 0.25, atol=1e-6)
    assert np.allclose(weights[f"{OUTER}w"], 3.439 * 0.25, atol=1e-6)
    assert set(without_outer(weights)) == {"w"}


def test_what_the_program_names_as_averaged_takes_the_mean_as_it_is() -> None:
    weights = {"variance": np.ones(2, dtype=np.float32)}
    for _ in range(3):
        total = Sum({"variance": weights["variance"] * np.float32(4)}, 0.0, 8, True, ())
        weights = outer_step(weights, total, rate=0.7, momentum=0.9, averaged=frozenset({"variance"}))
    assert np.allclose(weights["variance"], 1 / 8)
    assert set(weights) == {"variance"}


def test_a_round_left_between_two_steps_is_gone_on_with_there() -> None:
    rounds = rounds_of()
    weights = rounds.build()
    whole = go(LocalSteps(rounds), 3, (0, 2), weights)
    local = LocalSteps(rounds)
    seen = 0

    def leave(step_s: float) -> None:
        nonlocal seen
        seen += 1
        if seen % 2 == 0:
            raise InterruptedError

    for _ in range(20):
        try:
            part = go(local, 3, (0, 2), weights, leave)
            break
        except InterruptedError:
            kept = LocalSteps(rounds)
            kept.begin(3, local.inner)
            kept.go_on(local.step, local.names, local.loss, local.n, local.took_s)
            local = kept
    assert seen > 5
    assert part.flats["<f4"].tobytes() == whole.flats["<f4"].tobytes()
    assert (part.loss, part.n) == (whole.loss, whole.n)


def test_a_layout_that_can_not_be_told_after_the_last_step_is_asked_for_again() -> None:
    rounds = rounds_of()
    weights = rounds.build()
    local, whole = LocalSteps(rounds), go(LocalSteps(rounds), 0, (0, 4), weights)

    def torn(arrays: Arrays) -> Layout:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        local.contribute(0, (0, 4), weights, torn, lambda step_s: None)
    assert go(local, 0, (0, 4), weights).flats["<f4"].tobytes() == whole.flats["<f4"].tobytes()


def test_the_weights_handed_in_are_left_as_they_are() -> None:
    rounds = rounds_of()
    weights = rounds.build()
    before = checksum(weights)
    part = go(LocalSteps(rounds), 0, (0, 4), weights)
    outer_step(weights, total_of([part], weights), rate=0.7, momentum=0.9)
    assert checksum(weights) == before


def test_what_is_exchanged_has_the_type_of_the_weights_whatever_the_gradients_have() -> None:
    class Double(Momentum):
        def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
            summed, loss, n = super().gradient(weights, batch, rng)
            return {name: values.astype(np.float64) for name, values in summed.items()}, loss, n

        def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
            return {name: values.astype(np.float32) for name, values in super().update(weights, summed, n, round_).items()}

    rounds = rounds_of(Double())
    seen: list[Arrays] = []

    def settle(arrays: Arrays) -> Layout:
        seen.append(arrays)
        return Layout.of(arrays)

    part = LocalSteps(rounds).contribute(0, (0, 4), rounds.build(), settle, lambda step_s: None)
    assert set(part.flats) == {"<f4"}
    assert [{values.dtype.str for values in arrays.values()} for arrays in seen] == [{"<f4"}]


def test_weights_that_are_no_floats_and_gradients_of_no_weights_are_refused() -> None:
    class Whole(Tiny):
        def build(self, seed: int) -> Arrays:
            return {**super().build(seed), "w": np.ones((4, 2), dtype=np.int64)}

    class Strange(Tiny):
        def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
            return {"v": np.ones(2, dtype=np.float32)}, 1.0, 1

    with pytest.raises(SpecError, match="'w' is of dtype int64"):
        go(LocalSteps(rounds_of(Whole())), 0, (0, 4), Whole().build(0))
    with pytest.raises(SpecError, match="'v' is not among the weights"):
        go(LocalSteps(rounds_of(Strange())), 0, (0, 4), Strange().build(0))
