"""Scaling: planted rounds, memory margins, bounds of closed networks, cost."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tenure.decide.cost import cost_usd, predicted_cost
from tenure.decide.scaling import MIB, closed_bounds, memory_with_margin, round_model
from tenure.errors import SpecError
from tenure.nodes import Machine
from tenure.prices import PriceVector
from tenure.resources import Envelope
from tenure.trials import Prediction, Trial
from tenure.usage import summarize


def a_trial(workers, cpus, *, rng, shards=8, shard_s=0.05, growth=0.2, cores=4, noise=0.05, rounds=8):
    load = workers * cpus
    slow = (1 + growth * max(0, min(load, cores) - 1)) * max(1, load / cores) / min(cpus, 1)
    noisy = lambda mean: summarize([mean * (1 + noise * rng.normal()) for _ in range(rounds)])  # noqa: E731
    round_s = math.ceil(shards / workers) * shard_s * slow + 0.02 / min(cpus, 1) + 0.01
    metrics = {"shard_s": noisy(shard_s * slow), "combine_s": noisy(0.02 / min(cpus, 1)), "round_s": noisy(round_s)}
    return Trial(
        id=f"{workers}-{cpus}", run_id="r", stage="train", fingerprint="f", source="probe", machine=Machine(cpu_model="m"),
        configuration={"workers": workers, "cpus": cpus}, metrics=metrics,
    )  # fmt: skip


def test_rounds_of_unmeasured_configurations_fall_into_their_intervals():
    inside = cases = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        model = round_model([a_trial(1, 1.0, rng=rng), a_trial(2, 1.0, rng=rng)], shards=8, cores=4)
        for workers in (1, 2, 3, 4, 6, 8):
            for cpus in (0.5, 1.0):
                truth = a_trial(workers, cpus, rng=rng).metrics["round_s"].mean
                found = model.predict(workers, cpus)
                cases, inside = cases + 1, inside + (found.low <= truth <= found.high)
    assert inside / cases >= 0.8


def test_contention_is_learned_from_two_workers_and_grows_past_the_cores():
    rng = np.random.default_rng(0)
    model = round_model([a_trial(1, 1.0, rng=rng, noise=0), a_trial(2, 1.0, rng=rng, noise=0)], shards=8, cores=4)
    assert model.contention(1) == 1
    assert model.contention(3) == pytest.approx(1.4)
    assert model.contention(8) == pytest.approx(1.6 * 2)


def test_a_round_needs_at_least_one_trial():
    with pytest.raises(SpecError, match="no trial measured round_s"):
        round_model([], shards=8, cores=2)


def test_the_memory_margin_shrinks_with_repeats_and_is_at_least_16_mib():
    once, often = memory_with_margin([summarize([40 * MIB])]), memory_with_margin([summarize([40 * MIB] * 8)])
    assert once.high == 72 * MIB
    assert often.high == 58 * MIB
    assert memory_with_margin([summarize([1000 * MIB] * 100)]).high >= 1150 * MIB
    assert memory_with_margin([summarize([40 * MIB, 60 * MIB])]).value == 60 * MIB


def test_closed_networks_lie_between_their_bounds():
    assert closed_bounds(1, 0.01, 0.004, 2) == (100.0, 100.0)
    least, most = closed_bounds(16, 0.01, 0.004, 2)
    assert most == pytest.approx(500)
    assert least == pytest.approx(16 / 0.07)
    with pytest.raises(SpecError):
        closed_bounds(0, 0.01, 0.004, 2)


def test_cost_is_envelope_times_held_time_times_price():
    prices = PriceVector(name="p", cpu_usd_per_hour=0.04, memory_usd_per_gib_hour=0.01, start_usd=0.5)
    envelope = Envelope(cpus=2, memory_bytes=1 << 30)
    assert cost_usd(envelope, 1800, prices, leases=3) == pytest.approx(3 * 0.09 / 2)
    assert cost_usd(envelope, 0, prices, starts=2) == pytest.approx(1.0)
    found = predicted_cost(envelope, Prediction(value=3600, low=1800, high=7200), prices)
    assert (found.low, found.value, found.high) == pytest.approx((0.045, 0.09, 0.18))
