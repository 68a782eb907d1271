"""The report on a serving experiment: what it says of planted trials, and that every figure leads back to its row."""

import json
import re
from dataclasses import replace

import pytest

from tenure.experiments.bench_figures import setting
from tenure.experiments.bench_report import find_experiment
from tenure.experiments.report import ReportData, build_report, figures, render_html, write_report
from tenure.experiments.report_cite import Rows
from tenure.runs import RunState
from tenure.usage import summarize

from .bench_synthetic import bench_run
from .synthetic import full_run
from .test_report import HOSTILE, Ledger


@pytest.fixture(scope="module")
def data():
    return bench_run()


@pytest.fixture(scope="module")
def report(data):
    return build_report(data)


def blocks(report, kind):
    return [block for section in report["sections"] for block in section["blocks"] if block["kind"] == kind]


def table(report, title):
    (found,) = [block for block in blocks(report, "table") if title in block["title"]]
    return found


def test_every_number_of_the_experiment_leads_back_to_its_row(data, report):
    ledger, cells, points = Ledger(data), 0, 0
    for block in blocks(json.loads(json.dumps(report)), "table"):
        for row in block["rows"]:
            assert len(row) == len(block["columns"]), block["title"]
            for cell in row:
                if "cite" in cell:
                    assert cell["value"] == pytest.approx(ledger.follow(cell["cite"])), (block["title"], cell)
                    cells += 1
    for figure in figures(report):
        for series in figure["series"]:
            for point in series["points"]:
                assert point["y"] == ledger.follow(point["cite"])
                assert "cite_x" not in point or point["x"] == ledger.follow(point["cite_x"])
                points += 1
    assert cells > 1500
    assert points > 150


def test_the_studys_figures_and_table_are_there_and_ordered_as_a_reader_needs_them(report):
    assert [figure["id"].removeprefix("figure-serve-") for figure in figures(report) if "serve" in figure["id"]] == [
        "by-batch",
        "by-setting",
        "stages-sync",
        "stages-async",
        "cores",
        "memory-parties",
    ]
    headings = [block["text"] for block in blocks(report, "heading")]
    assert headings[0].startswith("Answer for: p99<400ms")
    assert headings[1].startswith("The bottleneck of ")
    assert any("table 2" in heading for heading in headings)


def test_figure_four_shows_each_architecture_in_the_studys_mode_and_a_contender_beside_them(report):
    (by_batch,) = [figure for figure in figures(report) if figure["id"] == "figure-serve-by-batch"]
    names = [series["name"] for series in by_batch["series"]]
    assert names == ["simple sync", "microservice grpc async", "triton grpc async", "distributed grpc async"]
    assert all([point["x"] for point in series["points"]] == [1, 8, 32] for series in by_batch["series"])
    assert all(point["error"] > 0 for series in by_batch["series"] for point in series["points"])


def test_figure_five_has_every_setting_of_one_batch_once_the_fastest_on_top(data, report):
    (bars,) = [figure for figure in figures(report) if figure["id"] == "figure-serve-by-setting"]
    points = {point["x"]: point["y"] for series in bars["series"] for point in series["points"]}
    assert len(points) == sum(len(series["points"]) for series in bars["series"]) == 28
    assert [points[row] for row in bars["rows"]] == sorted(points.values(), reverse=True)


def test_table_two_has_the_studys_rows_with_a_column_per_architecture(report):
    found = table(report, "Highest and lowest cores")
    assert found["columns"][2:] == [
        "simple sync · batch 1",
        "microservice grpc async · batch 1",
        "triton grpc async · batch 1",
        "distributed grpc async · batch 1",
    ]
    what = [f"{row[0]['text']}: {row[1]['text']}" for row in found["rows"]]
    for wanted in (
        "Application: prepare the model",
        "per request: load data",
        "per request: send",
        "per request: fetch",
        "per request: recognise",
        "per request: print the log",
        "Server, all of it: cores, highest",
        "Recogniser: cores, mean",
        "Application: cores, lowest",
        "Application: memory, highest",
        "Server, all of it: memory, lowest",
    ):
        assert wanted in what
    errors = next(row for row in found["rows"] if row[1]["text"].startswith("standard error"))
    assert all(re.fullmatch(r"[0-9.]+ %", cell["text"]) for cell in errors[2:])


def test_the_answer_names_what_bounds_it_what_to_change_and_the_proof(data, report):
    chosen = [block["text"] for block in blocks(report, "chosen")]
    assert chosen[0].startswith("simple async · batch 1 · files: ")
    assert chosen[1].startswith("What to change: ")
    proof = table(report, "The rows that prove it")
    assert {row[0]["text"] for row in proof["rows"]} >= {"application's cores", "recogniser's cores", "images"}
    assert report["header"]["outcome"].startswith("Of 84 settings simple async · batch 1 · files answers p99<400ms best: ")
    cards = {card["name"]: card["text"] for card in report["cards"]}
    assert cards["best for p99<400ms"] == "simple async · batch 1 · files"
    assert cards["what bounds it"] == "all cores: the model"


def test_programs_find_answers_and_bottlenecks_beside_the_blocks(data, report):
    (section,) = json.loads(json.dumps(report, allow_nan=False))["sections"]
    ids, ledger = {trial.id for trial in data.trials}, Ledger(data)
    (answer,) = section["experiment"]["answers"]
    assert answer["goal"]["p99_s"] == 0.4
    assert {answer["best"], *answer["ties"]} <= ids
    assert len(section["experiment"]["bottlenecks"]) == 84
    for found in section["experiment"]["bottlenecks"]:
        for row in found["rows"]:
            if row["metric"] != "link":
                assert row["value"] == ledger.follow({"trial": row["trial"], "metric": row["metric"]})
    assert section["experiment"]["repeat_error"]["repeats"] == 20


def test_following_the_report_from_a_sync_setting_leads_to_async(report):
    rows = {row[0]["text"]: row for row in table(report, "What bounds each setting")["rows"]}
    sync = rows["distributed grpc sync · batch 1 · files"]
    assert "link's way there and back" in sync[1]["text"]
    assert "async" in sync[2]["text"]
    assert sync[4]["text"].startswith("interaction async: ")
    assert sync[4]["value"] > 3


def test_the_studys_findings_are_asked_again_by_paired_ratios(report):
    found = {row[0]["text"]: row for row in table(report, "unless it says otherwise")["rows"]}
    assert found["simple, pictures in memory ÷ from files"][2]["value"] > 1.2
    assert found["microservice http sync ÷ simple sync"][2]["value"] < 1
    assert found["distributed grpc, async ÷ sync"][2]["value"] > 3
    assert found["server memory, microservice grpc, async ÷ sync"][1]["text"].startswith("4")
    # A drift of 10 % over the run hits both settings of a pair alike.
    assert re.fullmatch(r"1\.9\d× \(1\.9\d–1\.9\d\)", found["microservice grpc, async ÷ sync"][2]["text"])


def test_open_load_never_shares_a_column_with_closed_load(data, report):
    opened = {trial.id for trial in data.trials if trial.configuration.get("load") == "open"}
    twins = {trial.id for trial in data.trials if trial.configuration.get("twin")}
    cited = {
        block["title"]: {cell["cite"].get("trial") for row in block["rows"] for cell in row if "cite" in cell}
        for block in blocks(report, "table")
    }
    assert opened
    assert [title for title, ids in cited.items() if ids & opened] == ["Open load"]
    assert cited["Open load"] == opened
    assert not any(ids & twins for ids in cited.values())
    drawn = {point["cite"]["trial"] for figure in figures(report) for s in figure["series"] for point in s["points"]}
    assert not drawn & (opened | twins)


def test_the_machines_own_repeat_error_is_said(report):
    texts = [block["text"] for block in blocks(report, "text")]
    (found,) = [text for text in texts if "repeat error" in text]
    assert "3 settings were measured twice" in found


def test_a_contender_is_said_to_have_run_outside_the_leases(report):
    texts = [block["text"] for block in blocks(report, "text")]
    assert any(text.startswith("triton ran already, under no lease of ours") and "2 cores" in text for text in texts)


def test_a_goal_that_nothing_meets_is_said_with_what_comes_nearest():
    report = build_report(bench_run(goal="p99<5ms", p99_s=0.005))
    (warning,) = blocks(report, "warning")
    assert warning["text"].startswith("Nothing that was measured meets the goal. Nearest is ")
    assert "where 5 ms is asked" in warning["text"]
    assert "none meets p99<5ms" in report["header"]["outcome"]


def test_a_disturbed_machine_is_said_first_and_what_uses_the_cores_all_the_same(data):
    busy = tuple(
        replace(trial, metrics={**trial.metrics, "other_cpu_cores": summarize([1.6] * 20)}, note="Others kept 1.6 cores busy.")
        for trial in data.trials
        if trial.configuration["interaction"] == "sync"
    )
    report = build_report(replace(data, trials=busy))
    assert blocks(report, "warning")[0]["text"].startswith("Others kept 1.6 to 1.6 cores of this machine busy while 42 of 42")
    rows = {row[0]["text"]: row for row in table(report, "What bounds each setting")["rows"]}
    why, change, most = (rows["simple sync · batch 1 · files"][at]["text"] for at in (1, 2, 3))
    assert "of what was measured is the model itself" in why
    assert change.startswith("Measure again while nobody else uses the machine. The model itself")
    assert most == "–"


def test_too_few_requests_meet_a_goal_only_barely(data):
    few = tuple(replace(trial, metrics={**trial.metrics, "requests": summarize([3.0] * 20)}) for trial in data.trials)
    report = build_report(replace(data, trials=few))
    assert any("barely" in block["text"] for block in blocks(report, "warning"))


def test_any_part_of_an_experiment_may_be_missing(data):
    only_rates = tuple(
        replace(trial, metrics={"images_per_s": trial.metrics["images_per_s"]}, curves={}, configuration={})
        for trial in data.trials[:3]
    )
    for trials in (data.trials[:1], only_rates, data.trials[-1:]):
        page = render_html(build_report(replace(data, trials=trials, leases=(), jobs={}, node=None)))
        assert "How this was measured" in page
    running = replace(data.run, state=RunState.RUNNING)
    assert "is running" in build_report(ReportData(run=running, trials=data.trials))["header"]["outcome"]


def test_probes_beside_an_experiment_are_reported_as_before():
    both = full_run()
    both = replace(both, trials=(*both.trials, *bench_run().trials))
    report = build_report(both)
    ids = [figure["id"] for figure in figures(report)]
    assert len(ids) == len(set(ids))
    assert {"figure-serve-throughput-sync", "figure-serve-by-batch"} <= set(ids)


def test_a_setting_is_named_shortly_and_without_what_all_share():
    factors = bench_run().trials[-5].configuration
    assert setting(factors) == "triton grpc async · batch 32 · files"
    assert setting({**factors, "clients": 4}, without=("batch", "interaction")) == "triton grpc · files · 4 clients"


def test_hostile_names_in_an_experiment_are_text(data, tmp_path):
    trials = tuple(
        replace(trial, note=HOSTILE, configuration={**trial.configuration, "server": HOSTILE})
        if trial.configuration["server"] == "triton"
        else trial
        for trial in data.trials
    )
    page, plain = write_report(replace(data, trials=trials), tmp_path)
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.findall(r"(?:https?:)?//[\w.]+", re.sub(r'xmlns(:\w+)?="[^"]*"|<style.*?</style>', "", text, flags=re.DOTALL))
    assert json.loads(plain.read_text())["sections"]


def test_of_an_experiment_that_was_resumed_the_last_measurement_counts(data):
    again = tuple(
        replace(trial, id=f"{trial.id}-again", at_s=trial.at_s + 1e6) for trial in data.trials if trial.source == "sweep"
    )
    experiment = find_experiment(Rows(replace(data, trials=(*again, *data.trials))), data.run.stages[0])
    assert set(experiment.trials) == {f"{trial}-again" for trial in find_experiment(Rows(data), data.run.stages[0]).trials}


def test_rows_of_another_stage_are_not_mixed_in(data):
    other = replace(data.run.stages[0], name="other")
    rows = Rows(replace(data, run=replace(data.run, stages=(*data.run.stages, other))))
    assert rows.of_stage(other)[0] == []
