"""Serving recommendations in a synthetic world: one application is served best in process, many by one server."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tenure.jobs import Job, Probe, ServeGoal
from tenure.nodes import Machine
from tenure.prices import PriceVector
from tenure.recommend.serving import ServeModel, ServeTunable, recommend_serving
from tenure.recommend.tune import tune
from tenure.resources import Capacity
from tenure.trials import Trial
from tenure.usage import summarize

MIB = 1 << 20
PRICES = PriceVector(name="p", cpu_usd_per_hour=0.04, memory_usd_per_gib_hour=0.005)
CAPACITY = Capacity(cpus=2, memory_bytes=4 << 30)
BASES = [
    {"architecture": architecture, "transport": transport, "interaction": interaction, "batch": batch, "link": link}
    for architecture, transport, link in (("simple", "none", "in-process"), ("microservice", "http", "loopback"),
                                          ("microservice", "grpc", "loopback"), ("distributed", "http", "netns"))
    for interaction in ("sync", "async") for batch in (1, 8, 32)
]  # fmt: skip
GOALS = (
    ServeGoal(name="one", clients=1, p99_s=0.02),
    ServeGoal(name="many", clients=8, memory_bytes=700 * MIB, images_per_s=200),
)


def measure(configuration, rng, noise=0.03, wrong=0):
    """Closed-form truth: a call costs CPU on both sides; the network adds waiting only; clients share two cores."""
    clients, batch = configuration["clients"], configuration["batch"]
    call_s = {"none": 0.0, "http": 0.0012, "grpc": 0.0009}[configuration["transport"]]
    wait_s = 0.0005 if configuration["link"] == "netns" else 0.0
    app_s, server_s = call_s / 2 / batch, call_s / 2 / batch
    infer_s = 0.0002 + 0.0003 / batch
    app_s, server_s = (infer_s, 0.0) if configuration["architecture"] == "simple" else (app_s, server_s + infer_s)
    alone_s = (app_s + server_s) * batch + wait_s
    x = min(clients * batch / alone_s, 2 * 0.9 / (app_s + server_s), 0.95 / server_s if server_s else 1e9)
    latency_s = clients * batch / x
    noisy = lambda mean: summarize([mean * (1 + noise * rng.normal()) for _ in range(3)])  # noqa: E731
    memory = {"app_memory_bytes": noisy(150 * MIB if configuration["architecture"] == "simple" else 40 * MIB)}
    memory["server_memory_bytes"] = noisy(170 * MIB) if configuration["architecture"] != "simple" else summarize([0.0])
    return {"images_per_s": noisy(x), "mean_s": noisy(latency_s), "p99_s": noisy(2 * latency_s), "p50_s": noisy(latency_s),
            "app_cpu_s_per_image": noisy(app_s), "server_cpu_s_per_image": noisy(server_s),
            "wrong_answers": summarize([wrong] * 3), **memory}  # fmt: skip


def trial(configuration, rng, **more):
    return Trial(
        id="-".join(str(v) for v in configuration.values()), run_id="r", stage="serve", fingerprint="f", source="probe",
        configuration=configuration, metrics=measure(configuration, rng, **more), machine=Machine(cpu_model="m"),
    )  # fmt: skip


def recommend(goal, trials):
    return recommend_serving(goal, trials, capacity=CAPACITY, prices=PRICES, id="rec", run_id="r", stage="serve", now_s=1.0)


@pytest.fixture
def trials():
    rng = np.random.default_rng(0)
    return [trial({**base, "clients": 1}, rng) for base in BASES]


def test_one_application_is_served_best_in_process(trials):
    found = recommend(GOALS[0], trials)
    assert found.chosen.configuration["architecture"] == "simple"
    assert found.thin == ""
    service = [c for c in found.ruled_out if c.configuration["architecture"] == "microservice"]
    assert {broken.constraint for c in service for broken in c.broken} <= {"cost_usd", "p99_s"}


def test_many_applications_within_a_memory_bound_are_served_best_by_one_server(trials):
    rng = np.random.default_rng(1)
    found = recommend(GOALS[1], [*trials, *(trial({**base, "clients": 8}, rng) for base in BASES)])
    assert found.chosen.configuration["architecture"] == "microservice"
    simple = [c for c in found.ruled_out if c.configuration["architecture"] == "simple"]
    assert simple
    assert all("memory_bytes" in {broken.constraint for broken in c.broken} for c in simple)
    assert found.chosen.leases == 1
    assert found.chosen.envelope.memory_bytes >= 170 * MIB


def test_an_unmeasured_number_of_clients_gives_bounds_that_hold_the_truth(trials):
    rng = np.random.default_rng(2)
    inside = cases = 0
    for clients in (2, 4, 16):
        model = ServeModel(trials, ServeGoal(name="g", clients=clients), CAPACITY, PRICES)
        for base in BASES:
            configuration = {**base, "clients": clients}
            found, truth = model.predict(configuration, 100.0), measure(configuration, rng)
            for metric in ("images_per_s", "p99_s"):
                cases, inside = cases + 1, inside + (found[metric].low <= truth[metric].mean <= found[metric].high)
    assert inside / cases >= 0.8


def test_a_winner_that_was_not_measured_with_the_goals_clients_is_called_thin(trials):
    found = recommend(ServeGoal(name="g", clients=3), trials)
    assert "fewer or more than 3 clients" in found.thin


def test_large_batches_lose_against_a_latency_bound(trials):
    found = recommend(ServeGoal(name="g", clients=1, p99_s=0.004), trials)
    large = [c for c in found.ruled_out if c.configuration["batch"] == 32]
    assert all("p99_s" in {broken.constraint for broken in c.broken} for c in large)


def test_wrong_answers_rule_a_configuration_out(trials):
    rng = np.random.default_rng(3)
    wrong = [trial({**base, "clients": 1}, rng, wrong=1 if base["architecture"] == "simple" else 0) for base in BASES]
    found = recommend(GOALS[0], wrong)
    assert found.chosen.configuration["architecture"] != "simple"
    assert "1 answers differed" not in found.why


def test_tuning_measures_all_with_one_client_then_the_winner_with_the_goals_clients():
    rng = np.random.default_rng(4)
    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=GOALS, probe=Probe(max_s=600))
    bases = [base for base in BASES if base["batch"] == 8]
    tunable = ServeTunable(job, CAPACITY, PRICES, "f", lambda c: iter([trial(c, rng)]), configurations=bases)
    kept = []
    trials = tune(tunable, [], kept.append, max_probes=40)
    assert [t.configuration["clients"] for t in trials[: len(bases)]] == [1] * len(bases)
    assert len(bases) < len(trials) < len(tunable.configurations())
    for goal in GOALS:
        found = tunable.recommend(goal, trials, id="r", run_id="r", stage="s", now_s=0.0)
        assert found.thin == ""
    assert tunable.next_probe(trials) is None
    assert tunable.predict({**bases[0], "clients": 1}, trials)["p99_s"].value > 0


def test_nothing_measured_recommends_nothing_and_says_so():
    assert "Nothing was measured" in recommend(GOALS[0], []).why


def test_a_goal_that_is_missed_only_by_uncertainty_is_measured_with_its_clients():
    rng = np.random.default_rng(5)
    bases = [base for base in BASES if base["batch"] == 8]
    known = [trial({**base, "clients": 1}, rng) for base in bases]
    model = ServeModel(known, ServeGoal(name="g", clients=8), CAPACITY, PRICES)
    least = min((model.predict({**base, "clients": 8}, 1.0)["memory_bytes"] for base in bases), key=lambda p: p.value)
    goal = ServeGoal(name="tight", clients=8, memory_bytes=int((least.value + least.high) / 2))
    assert recommend(goal, known).chosen is None
    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=(goal,), probe=Probe(max_s=600))
    tunable = ServeTunable(job, CAPACITY, PRICES, "f", lambda c: iter([trial(c, rng)]), configurations=bases)
    assert tunable.next_probe(known)["clients"] == 8
    hopeless = ServeGoal(name="hopeless", clients=8, memory_bytes=1 << 20)
    tunable = ServeTunable(
        Job(kind="serve", name="serve", model="m.onnx", serve_goals=(hopeless,)),
        CAPACITY,
        PRICES,
        "f",
        lambda c: iter(()),
        configurations=bases,
    )
    assert tunable.next_probe(known) is None


def test_many_settings_are_searched_in_ten_probes_and_the_cheapest_found():
    rng = np.random.default_rng(6)
    goal = ServeGoal(name="g", clients=1, p99_s=0.02, images_per_s=400)
    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=(goal,), probe=Probe(max_s=600))
    tunable = ServeTunable(job, CAPACITY, PRICES, "f", lambda c: iter([trial(c, rng)]), configurations=BASES)
    found = tunable.recommend(goal, tune(tunable, [], [].append, max_probes=50), id="", run_id="", stage="", now_s=0.0)
    whole = recommend(goal, [trial({**base, "clients": 1}, np.random.default_rng(7)) for base in BASES])
    assert len(found.trials) <= 11
    assert found.chosen.predictions["cost_usd"].value <= whole.chosen.predictions["cost_usd"].value * 1.03


def test_where_one_probe_measures_everything_only_winners_are_measured_again():
    rng, asked = np.random.default_rng(8), []

    def probe(configuration):
        asked.append(configuration["clients"])
        several = BASES if configuration["clients"] == 1 else [configuration]
        return iter([trial({**base, "clients": configuration["clients"]}, rng) for base in several])

    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=GOALS, probe=Probe(max_s=600))
    tunable = ServeTunable(job, CAPACITY, PRICES, "f", probe, configurations=BASES)
    trials = tune(tunable, [], [].append)
    assert asked[0] == 1
    assert set(asked[1:]) == {8}
    assert len(asked) <= 4
    assert all(tunable.recommend(goal, trials, id="", run_id="", stage="", now_s=0.0).thin == "" for goal in GOALS)


def test_a_goal_with_many_clients_is_searched_with_its_clients():
    rng = np.random.default_rng(9)
    goal = ServeGoal(name="g", clients=8, images_per_s=200)
    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=(goal,), probe=Probe(max_s=600))
    tunable = ServeTunable(job, CAPACITY, PRICES, "f", lambda c: iter([trial(c, rng)]), configurations=BASES)
    trials = tune(tunable, [], [].append, max_probes=50)
    assert [t.configuration["clients"] for t in trials] == [1] + [8] * (len(trials) - 1)
    assert 1 < len(trials) <= 11


def test_trials_under_another_kind_of_load_are_never_in_one_answer_with_these(trials):
    rng = np.random.default_rng(10)
    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=GOALS)
    tunable = ServeTunable(job, CAPACITY, PRICES, "f", lambda c: iter(()), configurations=BASES)
    other = [replace(trial({**BASES[0], "clients": 1}, rng), configuration={**BASES[0], "clients": 1, **more})
             for more in ({"load": "open"}, {"data": "files"}, {"server": "triton"})]  # fmt: skip
    found = tunable.recommend(GOALS[0], [*trials, *other], id="", run_id="", stage="", now_s=0.0)
    assert len(found.trials) == len(trials)
