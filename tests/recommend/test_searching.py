"""Serving as a search: the space it covers, few probes, the choice with its confidence, and a word on every other setting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tenure.errors import JobFailed, SpecError
from tenure.jobs import Job, ServeGoal
from tenure.nodes import Machine
from tenure.prices import PriceVector
from tenure.recommend.search_words import words
from tenure.recommend.searching import MAX_TOLD, SearchTunable, space
from tenure.recommend.tune import tune
from tenure.resources import Capacity
from tenure.sweeps import Search
from tenure.trials import Trial
from tenure.usage import summarize

MIB = 1 << 20
PRICES = PriceVector(name="p", cpu_usd_per_hour=0.04, memory_usd_per_gib_hour=0.005)
CAPACITY = Capacity(cpus=2, memory_bytes=8 << 30)


def truth(setting):
    """Asymptotic bounds of a closed network, nothing finer."""
    batch, clients = setting["batch"], setting["clients"]
    in_flight = clients * (1 if setting["interaction"] == "sync" else 8)
    call_s, image_s = {"none": (0, 0), "shm": (4e-4, 1e-4), "http": (4e-4, 6e-4), "grpc": (5e-4, 8e-4)}[setting["transport"]]
    run_s = (0.002 + 0.004 * batch) * (0.2 + 0.8 / setting["threads"])
    cpu_s = (0.002 + 0.004 * batch) * (1 + 0.1 * (setting["threads"] - 1))
    wire_s = call_s + image_s * batch
    simple = setting["architecture"] == "simple"
    copies = setting["instances"] * (clients if simple else 1)
    per_s = min(in_flight / (wire_s + run_s), copies / run_s, 2 / (cpu_s + wire_s))
    app_s = (0.5 * wire_s + cpu_s if simple else 0.5 * wire_s) / batch
    return {
        "images_per_s": per_s * batch,
        "mean_s": in_flight / per_s,
        "p99_s": 1.4 * in_flight / per_s,
        "app_cpu_s_per_image": app_s,
        "server_cpu_s_per_image": 0.0 if simple else (0.5 * wire_s + cpu_s) / batch,
        "app_memory_bytes": (100 + 80 * setting["instances"]) * MIB if simple else 60 * MIB,
        "server_memory_bytes": 0.0 if simple else (120 + 80 * setting["instances"]) * MIB,
    }


SMALL = Search(transports=("http", "shm"), batches=(1, 8), max_delays_s=(0.0,))


class World:
    """Measures by the truth, with noise; what `broken` says of a setting can't be measured."""

    def __init__(self, *goals, search=SMALL, broken=lambda setting: ""):
        self.asked, self.said, self.broken, self.rng = [], [], broken, np.random.default_rng(0)
        self.job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=goals, search=search)
        self.tunable = SearchTunable(self.job, CAPACITY, PRICES, "f", self.probe, told=self.said.append)

    def probe(self, setting):
        self.asked.append(setting)
        if why := self.broken(setting):
            raise JobFailed(why)
        slow = np.exp(0.02 * self.rng.standard_normal(3))
        sides = {"images_per_s": -1, "mean_s": 1, "p99_s": 1}
        metrics = {name: summarize([v * s ** sides.get(name, 0) for s in slow]) for name, v in truth(setting).items()}
        yield Trial(
            id=f"t{len(self.asked)}", run_id="r", stage="serve", fingerprint="f", source="probe", configuration=setting,
            metrics=metrics, machine=Machine(cpu_model="m"),
        )  # fmt: skip

    def tuned(self, known=()):
        return tune(self.tunable, known, lambda trial: None, max_probes=self.tunable.max_probes)

    def recommend(self, trials, goal=None):
        return self.tunable.recommend(
            goal or self.tunable.goals[0], trials, id="rec", run_id="r", stage="serve", now_s=1.0
        )  # fmt: skip


def test_the_space_leaves_out_what_cannot_be_better():
    found = space(Search(), cores=2)
    assert all(setting["instances"] * setting["threads"] <= 2 for setting in found)
    alone = [setting for setting in found if setting["interaction"] == "sync"]
    assert {(setting["instances"], setting["max_delay_s"]) for setting in alone} == {(1, 0.0)}
    in_process = [setting for setting in found if setting["architecture"] == "simple"]
    assert {setting["max_delay_s"] for setting in in_process} == {0.0}
    served = [s for s in found if s["transport"] == "grpc" and s["interaction"] == "async" and s["batch"] == 8]
    assert {(s["instances"], s["threads"], s["max_delay_s"]) for s in served} == {
        (i, t, d) for i, t in ((1, 1), (1, 2), (2, 1)) for d in (0.0, 0.003)
    }
    several = [
        s for s in space(Search(), cores=2, clients=4) if s["architecture"] == "microservice" and s["interaction"] == "sync"
    ]
    assert {s["instances"] for s in several} == {1, 2}


@pytest.mark.parametrize(
    ("search", "more", "says"),
    [
        (Search(instances=(8,)), {}, "no setting is left to search"),
        (Search(batches=(1, 8)), {"fixed_batch": 4}, "the model takes 4 at a time"),
        (Search(batches=tuple(range(1, 17))), {"cores": 64}, "settings are too many to search, at most 1000"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_what_to_change(search, more, says):
    with pytest.raises(SpecError, match=says):
        space(search, **{"cores": 2, **more})


def test_the_fastest_within_a_bound_is_found_in_few_trials_and_said_with_its_confidence():
    world = World(ServeGoal(name="quick", p99_s=0.06))
    trials = world.tuned()
    assert 3 <= len(trials) <= 10
    settings = world.tunable.configurations()
    fits = [truth(setting)["images_per_s"] for setting in settings if truth(setting)["p99_s"] <= 0.06]
    found = world.recommend(trials)
    chosen = truth(found.chosen.configuration)
    assert chosen["p99_s"] <= 0.06 * 1.05
    assert chosen["images_per_s"] >= 0.95 * max(fits)
    assert "is the fastest that meets the goal" in found.why
    assert "of the best there is with a chance of" in found.why
    assert found.goal == "quick: 1 client, p99 at most 60 ms, and then the most images/s"
    assert found.trials == tuple(trial.id for trial in trials)
    low, high = (getattr(found.chosen.predictions["images_per_s"], end) for end in ("low", "high"))
    assert low <= chosen["images_per_s"] * 1.03
    assert high >= chosen["images_per_s"] * 0.97
    assert found.chosen.envelope.cpus >= min(2, found.chosen.configuration["instances"] * found.chosen.configuration["threads"])


def test_every_other_setting_has_a_reason_and_says_whether_it_was_measured():
    world = World(ServeGoal(name="quick", p99_s=0.06))
    trials = world.tuned()
    found = world.recommend(trials)
    measured = {words(trial.configuration) for trial in trials} - {words(found.chosen.configuration)}
    told = {words(c.configuration): c.broken[0].reason for c in found.ruled_out}
    assert all(told[name].startswith("measured") for name in measured)
    others = [reason for name, reason in told.items() if name not in measured]
    assert len(others) == min(MAX_TOLD, len(world.tunable.configurations()) - len(measured) - 1)
    assert all(reason.startswith("not measured, by the laws:") for reason in others)
    assert {c.broken[0].constraint for c in found.ruled_out} <= {"p99_s", "images_per_s"}


def test_a_goal_with_a_rate_is_met_at_the_least_cost():
    world = World(ServeGoal(name="shop", clients=2, p99_s=0.1, images_per_s=100))
    trials = world.tuned()
    assert {trial.configuration["clients"] for trial in trials} == {2}
    found = world.recommend(trials)
    chosen = truth(found.chosen.configuration)
    assert chosen["images_per_s"] >= 97
    assert "is the cheapest that meets the goal" in found.why
    assert found.goal.endswith("at the least cost")
    dearer = [c for c in found.ruled_out if c.broken[0].constraint == "cost_usd"]
    assert dearer
    assert all(c.predictions["cost_usd"].value > 0 for c in dearer)


def test_the_cheapest_may_be_asked_for_without_a_rate():
    world = World(ServeGoal(name="thrifty", p99_s=0.1), search=Search(transports=("shm",), batches=(1, 8), best="cost"))
    found = world.recommend(world.tuned())
    assert "for a million images" in found.why
    assert found.chosen.predictions["million_images_usd"].value > 0


def test_each_goal_has_trials_of_its_own():
    goals = (ServeGoal(name="quick", p99_s=0.012), ServeGoal(name="much"), ServeGoal(name="many", clients=3))
    world = World(*goals, search=replace(SMALL, trials=4))
    trials = world.tuned()
    assert len(trials) <= 12
    for goal in goals:
        assert world.tunable.advice(goal, trials).next is None
        assert world.recommend(trials, goal).chosen.configuration["clients"] == goal.clients
    slow, quick = (world.recommend(trials, goal).chosen.predictions["p99_s"].value for goal in (goals[1], goals[0]))
    assert quick < slow


def test_known_trials_are_not_measured_again():
    world = World(ServeGoal(name="quick", p99_s=0.06))
    trials = world.tuned()
    again = World(ServeGoal(name="quick", p99_s=0.06))
    assert again.tuned(trials) == trials
    assert again.asked == []


def test_what_cannot_be_measured_is_left_out_and_told():
    world = World(ServeGoal(name="g"), broken=lambda s: "the server ended out_of_memory" if s["instances"] > 1 else "")
    trials = world.tuned()
    assert trials
    failed = [setting for setting in world.asked if setting["instances"] > 1]
    assert len({words(setting) for setting in failed}) == len(failed) == len(world.said)
    found = world.recommend(trials)
    assert found.chosen.configuration["instances"] == 1
    if failed:
        reasons = {words(c.configuration): c.broken[0].reason for c in found.ruled_out}
        assert all("could not be measured: the server ended out_of_memory" in reasons[words(setting)] for setting in failed)


def test_a_stage_in_which_nothing_can_be_measured_fails_with_the_reason():
    world = World(ServeGoal(name="g"), broken=lambda s: "the model is no model")
    with pytest.raises(JobFailed, match="the model is no model"):
        world.tuned()
    assert len(world.asked) == 3


def test_a_goal_that_nothing_meets_has_no_choice_and_names_the_nearest():
    world = World(ServeGoal(name="impossible", p99_s=0.0001), search=replace(SMALL, trials=5))
    found = world.recommend(world.tuned())
    assert found.chosen is None
    assert "Nearest is" in found.why
    assert "where at most 0.1 ms is asked" in found.why
    assert all(c.broken[0].constraint == "p99_s" for c in found.ruled_out)


def test_an_answer_that_is_not_sure_says_so_and_what_to_do():
    world = World(ServeGoal(name="g"), search=replace(SMALL, trials=1))
    found = world.recommend(world.tuned())
    assert "more trials may find one" in found.thin
    assert world.tunable.predict(found.chosen.configuration, [])["images_per_s"].value > 0
    with pytest.raises(SpecError, match="not among the settings"):
        world.tunable.predict({**found.chosen.configuration, "batch": 3}, [])
