"""Training recommendations in synthetic worlds whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tenure.errors import SpecError
from tenure.jobs import Job, Probe, TrainGoal
from tenure.nodes import Machine
from tenure.prices import PriceVector
from tenure.recommend.training import TrainTunable, recommend_training, slot_s
from tenure.recommend.tune import tune
from tenure.resources import Capacity
from tenure.trials import Trial
from tenure.usage import summarize

MIB = 1 << 20
PRICES = PriceVector(name="p", cpu_usd_per_hour=0.04, memory_usd_per_gib_hour=0.005)


class World:
    """A training job with planted truth; measuring it adds noise, never a sleep."""

    def __init__(self, seed=0, *, shard_s=0.02, noise=0.04, cores=2.0, goal=0.95, power=1.0, max_s=60.0, time_s=0.0):
        self.rng = np.random.default_rng(seed)
        self.shard_s, self.noise, self.cores, self.power = shard_s, noise, cores, power
        self.probed = []
        self.job = Job(
            kind="train", name="train", program="p.py:P", shards=8, max_rounds=2000,
            train_goal=TrainGoal(accuracy=goal, time_s=time_s), probe=Probe(max_s=max_s),
        )  # fmt: skip
        self.tunable = TrainTunable(self.job, Capacity(cpus=cores, memory_bytes=4 << 30), PRICES, "f", self.probe)

    def accuracy(self, r):
        return 1 - 0.01 - 0.9 * (r + 1.0) ** -self.power

    def truth(self, workers, cpus):
        load = workers * cpus
        slow = (1 + 0.15 * max(0, min(load, self.cores) - 1)) * max(1, load / self.cores) / cpus
        round_s = math.ceil(8 / workers) * self.shard_s * slow + 0.01 / cpus + 0.005
        rounds = next(r for r in range(1, 100_000) if self.accuracy(r) >= self.job.train_goal.accuracy)
        return {"round_s": round_s, "shard_s": self.shard_s * slow, "combine_s": 0.01 / cpus, "startup_s": 0.4 / cpus,
                "rounds": rounds, "time_s": 0.4 / cpus + rounds * round_s}  # fmt: skip

    def probe(self, configuration):
        self.probed.append(dict(configuration))
        truth = self.truth(configuration["workers"], configuration["cpus"])
        day = 1 + self.noise * self.rng.normal()
        noisy = lambda mean, n: summarize([mean * day * (1 + self.noise * self.rng.normal()) for _ in range(n)])  # noqa: E731
        rounds = configuration["rounds"]
        metrics = {name: noisy(truth[name], rounds) for name in ("round_s", "shard_s", "combine_s")}
        metrics["startup_s"] = noisy(truth["startup_s"], configuration["workers"])
        metrics["peak_memory_bytes"] = summarize(
            [50 * MIB + int(self.rng.integers(0, MIB)) for _ in range(configuration["workers"])]
        )
        axis = tuple(float(r) for r in range(1, rounds + 1))
        yield Trial(
            id=f"t{len(self.probed)}", run_id="r", stage="train", fingerprint="f", source="probe",
            machine=Machine(cpu_model="m"),
            configuration=configuration, metrics=metrics,
            curves={"round": axis, "accuracy": tuple(self.accuracy(r) for r in axis)},
        )  # fmt: skip


def measured(world):
    kept = []
    trials = tune(world.tunable, [], kept.append)
    assert list(trials) == kept
    return trials


def recommended(world, trials):
    return recommend_training(world.tunable, trials, id="rec", run_id="r", stage="train", now_s=1.0)


def test_the_truth_of_every_prediction_lies_in_its_interval_in_four_of_five_cases():
    inside = cases = 0
    for seed in range(12):
        world = World(seed, power=0.9 + 0.05 * (seed % 5))
        trials = measured(world)
        for configuration in world.tunable.configurations():
            found, truth = world.tunable.predict(configuration, trials), world.truth(**configuration)
            for metric in ("time_s", "rounds", "round_s"):
                cases, inside = cases + 1, inside + (found[metric].low <= truth[metric] <= found[metric].high)
    assert inside / cases >= 0.8


def test_probes_look_at_one_worker_then_two_then_longer_while_the_curve_is_thin():
    world = World(power=0.55)
    measured(world)
    first, second, *longer = world.probed
    assert (first["workers"], second["workers"]) == (1, 2)
    assert longer
    assert longer[0]["rounds"] > 2 * first["rounds"]
    assert len(world.probed) <= 6


def test_probing_stops_when_its_time_is_spent():
    world = World(power=0.3, max_s=6.0)
    trials = measured(world)
    assert sum(world.truth(p["workers"], p["cpus"])["round_s"] * p["rounds"] + 0.4 for p in world.probed) <= 8
    found = recommended(world, trials)
    assert found.thin


def test_thin_data_is_judged_by_values_and_says_so_instead_of_ruling_everything_out():
    world = World(power=0.75, max_s=3.0, time_s=120.0)
    trials = measured(world)
    found = recommended(world, trials)
    assert found.thin
    assert found.chosen is not None
    assert found.chosen.predictions["rounds"].high <= world.job.max_rounds


def test_known_trials_of_the_same_fingerprint_spare_the_probes():
    world = World()
    trials = measured(world)
    world.probed.clear()
    assert tune(world.tunable, trials, lambda trial: None) == trials
    assert world.probed == []


def test_trials_of_another_fingerprint_are_not_used():
    world, other = World(), World()
    other.tunable.fingerprint = "g"
    assert other.tunable.next_probe([]) == {"workers": 1, "cpus": 1.0, "rounds": 10}
    assert all(trial.fingerprint == "f" for trial in measured(world))
    with pytest.raises(SpecError, match="no trial measured round_s"):
        recommended(other, measured(world))


def test_a_curve_that_reached_the_goal_makes_the_rounds_exact():
    world = World(goal=0.8)
    found = recommended(world, measured(world))
    rounds = found.chosen.predictions["rounds"]
    assert rounds.low == rounds.value == rounds.high == world.truth(1, 1.0)["rounds"]
    assert found.thin == ""


def test_without_a_time_bound_the_fewest_leases_win_and_every_other_says_why_not():
    world = World()
    found = recommended(world, measured(world))
    assert found.chosen.configuration["workers"] == 1
    assert len(found.ruled_out) == len(world.tunable.configurations()) - 1
    reasons = {broken.constraint for candidate in found.ruled_out for broken in candidate.broken}
    assert reasons == {"cost_usd", "node capacity"}
    envelope = found.chosen.envelope
    assert 51 * MIB < envelope.memory_bytes <= 96 * MIB
    assert 20 <= envelope.slot_s <= envelope.total_s
    assert envelope.total_s >= 3 * found.chosen.predictions["time_s"].high - 1


def test_a_time_bound_brings_in_a_second_worker():
    slow = World(shard_s=0.1)
    alone, pair = slow.truth(1, 1.0)["time_s"], slow.truth(2, 1.0)["time_s"]
    assert pair < alone
    world = World(
        shard_s=0.1, time_s=(0.6 * alone + 0.4 * pair) if pair * 1.4 > alone else pair * 1.5, max_s=600.0, noise=0.005
    )
    found = recommended(world, measured(world))
    assert found.chosen is not None, found.why
    assert found.chosen.configuration == {"workers": 2, "cpus": 1.0}
    one = next(c for c in found.ruled_out if c.configuration == {"workers": 1, "cpus": 1.0})
    assert [broken.constraint for broken in one.broken] == ["time_s"]


def test_what_a_run_takes_around_its_rounds_is_learned_from_whole_times():
    world = World()
    trials = measured(world)
    before = world.tunable.predict({"workers": 1, "cpus": 1.0}, trials)["time_s"].value
    first = trials[0].metrics
    whole_s = first["startup_s"].mean + 10 * first["round_s"].mean + 0.7
    told = [replace(trials[0], metrics={**first, "time_s": summarize([whole_s])}), *trials[1:]]
    assert world.tunable.predict({"workers": 1, "cpus": 1.0}, told)["time_s"].value == pytest.approx(before + 0.7)


def test_a_job_without_a_goal_is_refused():
    from tenure.resources import Envelope

    job = Job(kind="train", name="t", program="p.py:P", envelope=Envelope(), workers=1)
    with pytest.raises(SpecError, match=r"no \[train.goal\]"):
        TrainTunable(job, Capacity(cpus=1, memory_bytes=1 << 30), PRICES, "f", lambda c: iter(()))


def test_slots_are_short_enough_to_end():
    assert slot_s(5) == 20
    assert slot_s(120) == 40
    assert slot_s(1e6) == 900
