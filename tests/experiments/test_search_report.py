"""The report of a search: the choice with its confidence first, then what was tried in order, and why not the others."""

from dataclasses import replace

import numpy as np

from tenure.experiments.report import build_report, figures, render_html
from tenure.jobs import Job, ServeGoal
from tenure.prices import PriceVector
from tenure.recommend.searching import SearchTunable
from tenure.recommend.tune import tune
from tenure.resources import Capacity
from tenure.sweeps import Search
from tenure.usage import summarize

from .bench_synthetic import bench_run
from .synthetic import trial


def searched(goal, *, other_cores=0.1):
    """Return the data of a run in which a small space was searched."""
    space = Search(transports=("shm",), batches=(1, 8), max_delays_s=(0.0,), trials=6)
    job = Job(kind="serve", name="serve", model="m.onnx", serve_goals=(goal,), search=space)
    rng = np.random.default_rng(3)

    def probe(setting):
        in_flight, run_s = 1 if setting["interaction"] == "sync" else 8, (0.002 + 0.004 * setting["batch"]) / setting["threads"]
        simple = setting["architecture"] == "simple"
        call_s = run_s + (0.0 if simple else 0.001)
        per_s = min(in_flight / call_s, setting["instances"] / run_s) * float(np.exp(0.02 * rng.standard_normal()))
        metrics = {
            "images_per_s": summarize([per_s * setting["batch"] * near for near in (0.99, 1.0, 1.01)]),
            "mean_s": summarize([in_flight / per_s]),
            "p99_s": summarize([1.5 * in_flight / per_s]),
            "app_cpu_s_per_image": summarize([run_s if simple else 0.0005]),
            "server_cpu_s_per_image": summarize([0.0 if simple else run_s]),
            "app_memory_bytes": summarize([8e7]),
            "server_memory_bytes": summarize([0.0 if simple else 2e8]),
            "other_cpu_cores": summarize([other_cores]),
        }
        number = len(made)
        made.append(
            replace(
                trial(number, "serve", "probe", setting, metrics),
                curves={}, at_s=1e9 + number, fingerprint="f",
            )
        )  # fmt: skip
        yield made[-1]

    made = []
    tunable = SearchTunable(
        job, Capacity(cpus=2, memory_bytes=4 << 30), PriceVector(name="p", cpu_usd_per_hour=0.04), "f", probe
    )
    trials = tune(tunable, [], lambda one: None, max_probes=tunable.max_probes)
    found = tunable.recommend(goal, trials, id="rec-1", run_id=trials[0].run_id, stage="serve", now_s=2e9)
    return replace(bench_run(trials=trials), jobs={"serve": job}, recommendations=(found,)), found, trials


def test_the_page_begins_with_the_choice_and_shows_what_was_tried_in_order():
    data, found, trials = searched(ServeGoal(name="quick", p99_s=0.03))
    report = build_report(data)
    page = render_html(report)
    assert "is the fastest that meets the goal" in page[: page.index("1. ")]
    (drawn,) = [figure for figure in figures(report) if figure["id"] == "figure-serve-search"]
    assert sum(len(series["points"]) for series in drawn["series"]) == len(trials)
    assert [row.split(".")[0] for row in drawn["rows"]] == [str(n) for n in range(1, len(trials) + 1)]
    assert "of the best there is with a chance of" in page
    assert "not measured, by the laws:" in page
    assert "× 1 threads" in page or "× 2 threads" in page
    assert found.chosen is not None


def test_a_search_beside_others_work_warns_of_it():
    data, _, trials = searched(ServeGoal(name="quick", p99_s=0.03), other_cores=1.3)
    assert f"up to 1.3 cores of this machine busy during {len(trials)} of {len(trials)} trials" in render_html(
        build_report(data)
    )


def test_a_goal_that_nothing_meets_is_said_first_and_its_trials_are_shown():
    data, _, _ = searched(ServeGoal(name="impossible", p99_s=0.0001))
    page = render_html(build_report(data))
    assert "No configuration meets the goal of stage serve" in page
    assert "Nearest is" in page
    assert "What was tried" in page
