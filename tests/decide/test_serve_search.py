"""The search over serving settings: few trials, bounds kept, the same advice for the same trials, an honest chance."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tenure.decide.serve_search import MAX_TRIALS, Aim, advise, outlook
from tenure.errors import SpecError
from tenure.nodes import Machine
from tenure.trials import Trial
from tenure.usage import summarize

CORES = 4.0
PLACES = (("simple", "none", "in-process"), ("microservice", "http", "loopback"), ("microservice", "shm", "loopback"))
FACTORS = ("architecture", "transport", "link", "interaction", "batch", "instances", "threads", "max_delay_s")
SPACE = [
    dict(zip(FACTORS, (*place, *rest), strict=True))
    for place, *rest in itertools.product(PLACES, ("sync", "async"), (1, 8, 32), (1, 2), (1,), (0.0,))
]


def truth(setting):
    """Asymptotic bounds, nothing of the laws that the search goes by."""
    b, n = setting["batch"], 1 if setting["interaction"] == "sync" else 8
    call_s, image_s = {"none": (0.0, 0.0), "http": (0.0004, 0.0006), "shm": (0.0005, 0.0001)}[setting["transport"]]
    run_s, k = (0.002 + 0.001 * b), setting["instances"]
    wire_s = call_s + image_s * b
    per_s = b * min(n / (wire_s + run_s), k / run_s, 1 / (wire_s or 1e-9), CORES / (run_s + wire_s))
    simple = setting["architecture"] == "simple"
    app_s, server_s = (0.5 * wire_s + run_s, 0.0) if simple else (0.5 * wire_s, 0.5 * wire_s + run_s)
    return {
        "images_per_s": per_s,
        "mean_s": n * b / per_s,
        "p99_s": 1.4 * n * b / per_s,
        "app_cpu_s_per_image": app_s / b,
        "server_cpu_s_per_image": server_s / b,
        "app_memory_bytes": 1e8,
        "server_memory_bytes": 0.0 if simple else 2e8,
    }


def trial(setting, rng, noise=0.02):
    slow = np.exp(noise * rng.standard_normal(3))
    sides = {"images_per_s": -1, "mean_s": 1, "p99_s": 1}
    metrics = {name: summarize([v * one ** sides.get(name, 0) for one in slow]) for name, v in truth(setting).items()}
    return Trial(
        id="t", run_id="r", stage="s", fingerprint="f", source="probe", configuration=setting, metrics=metrics,
        machine=Machine(cpu_model="m"),
    )  # fmt: skip


def searched(aim, *, seed=0, settings=SPACE, **options):
    """Return the last advice and the trials."""
    rng, trials = np.random.default_rng(seed), []
    while (advice := advise(settings, trials, aim, cores=CORES, **options)).next is not None:
        trials.append(trial(advice.next, rng))
    return advice, trials


def usd(metrics):
    return metrics["app_cpu_s_per_image"] + metrics["server_cpu_s_per_image"]


def best(aim, worth):
    fits = [s for s in SPACE if not aim.p99_s or truth(s)["p99_s"] <= aim.p99_s]
    return max(worth(truth(s)) for s in fits)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fastest_setting_is_found_in_few_trials(seed):
    advice, trials = searched(Aim(), seed=seed)
    assert len(trials) <= MAX_TRIALS
    assert truth(advice.choice)["images_per_s"] >= 0.97 * best(Aim(), lambda t: t["images_per_s"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_latency_bound_is_kept_and_the_fastest_within_it_found(seed):
    aim = Aim(p99_s=0.02)
    advice, _ = searched(aim, seed=seed)
    assert truth(advice.choice)["p99_s"] <= 1.1 * aim.p99_s
    assert truth(advice.choice)["images_per_s"] >= 0.97 * best(aim, lambda t: t["images_per_s"])


def test_the_least_cost_is_found_among_those_that_reach_the_rate():
    aim = Aim(cost=usd, images_per_s=900)
    advice, _ = searched(aim)
    assert truth(advice.choice)["images_per_s"] >= 0.97 * aim.images_per_s
    assert usd(truth(advice.choice)) <= min(usd(truth(s)) for s in SPACE if truth(s)["images_per_s"] >= 900) / 0.97


def test_what_no_trial_has_touched_is_looked_at_before_near_equals_are_measured_again():
    _, trials = searched(Aim(p99_s=0.02), max_trials=6, confidence=1.1)
    assert {t.configuration["interaction"] for t in trials} == {"sync", "async"}
    assert len({t.configuration["batch"] for t in trials}) >= 2


def test_the_same_trials_give_the_same_advice():
    rng = np.random.default_rng(3)
    trials = [trial(SPACE[n], rng) for n in (0, 14, 30)]
    assert advise(SPACE, trials, Aim(), cores=CORES) == advise(SPACE, trials, Aim(), cores=CORES)


def test_no_more_trials_are_asked_for_than_may_be_spent():
    advice, trials = searched(Aim(), max_trials=2, confidence=1.1)
    assert len(trials) == 2
    assert advice.next is None
    assert advice.choice in [t.configuration for t in trials]


def test_a_bound_that_nothing_meets_leaves_nothing_to_take_and_says_so():
    advice, _ = searched(Aim(p99_s=1e-5), max_trials=3)
    assert advice.choice is None
    assert advice.chance == 0.0
    assert "none of 3 trials" in advice.why


def test_before_any_trial_there_is_something_to_measure_and_nothing_to_take():
    advice = advise(SPACE, [], Aim(), cores=CORES)
    assert advice.next in SPACE
    assert advice.choice is None


def test_trials_of_other_settings_are_left_out():
    rng = np.random.default_rng(4)
    known = [trial(SPACE[3], rng)]
    other = trial({**SPACE[3], "batch": 4}, rng)
    assert advise(SPACE, [*known, other], Aim(), cores=CORES) == advise(SPACE, known, Aim(), cores=CORES)


def test_context_tells_something_but_is_neither_taken_nor_counted():
    rng = np.random.default_rng(5)
    context = [{**setting, "batch": 64} for setting in SPACE if setting["batch"] == 32]
    trials = [trial(setting, rng) for setting in context]
    advice = advise(SPACE, trials, Aim(), cores=CORES, context=context, max_trials=1)
    assert advice.choice is None
    assert advice.next in SPACE
    told = advise(SPACE, [*trials, trial(advice.next, rng)], Aim(), cores=CORES, context=context, max_trials=1)
    assert told.choice == advice.next
    assert told.next is None


def test_its_chance_is_about_how_often_it_is_right():
    advices = [searched(Aim(), seed=seed, max_trials=4, confidence=1.1)[0] for seed in range(12)]
    top = best(Aim(), lambda t: t["images_per_s"])
    right = np.mean([truth(a.choice)["images_per_s"] >= 0.97 * top for a in advices])
    assert abs(np.mean([a.chance for a in advices]) - right) < 0.4


def test_trials_without_anything_but_a_rate_are_enough():
    rng = np.random.default_rng(6)
    whole = [trial(SPACE[n], rng) for n in (0, 20)]
    bare = [replace(t, metrics={"images_per_s": t.metrics["images_per_s"]}) for t in whole]
    assert advise(SPACE, bare, Aim(), cores=CORES).choice is not None


def test_impossible_settings_are_refused():
    with pytest.raises(SpecError, match="instances of a setting"):
        advise([{**SPACE[0], "instances": 0}], [], Aim(), cores=CORES)


def test_the_outlook_says_what_is_known_of_every_setting_and_how():
    aim = Aim(p99_s=0.06)
    advice, trials = searched(aim)
    found = outlook(SPACE, trials, aim, choice=advice.choice, cores=CORES)
    assert [one.configuration for one in found] == SPACE
    assert sum(one.trials for one in found) == len(trials)
    chosen = next(one for one in found if one.configuration == advice.choice)
    assert (chosen.trials > 0, chosen.better) == (True, 0.0)
    hopeless = next(one for one in found if truth(one.configuration)["p99_s"] > 0.3)
    assert hopeless.meets < 0.2
    assert hopeless.breaks["p99_s"] > 0.8
    for one in found:
        low, middle, high = one.metrics["images_per_s"]
        true = truth(one.configuration)["images_per_s"]
        assert low < middle < high
        assert 0.5 < middle / true < 2
        if one.trials:
            assert 0.97 * low <= true <= 1.03 * high


def test_the_outlook_may_tell_what_follows_from_a_draw():
    (first, *_) = outlook(SPACE, [], Aim(cost=usd), choice=None, cores=CORES, more={"cost_s": usd})
    assert 0 < first.metrics["cost_s"][0] < first.metrics["cost_s"][2]
