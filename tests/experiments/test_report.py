import json
import math
import re
import statistics
from dataclasses import replace
from functools import reduce

import pytest

from tenure.codec import to_builtins
from tenure.experiments import plots
from tenure.experiments.report import ReportData, build_report, figures, render_html, write_report
from tenure.runs import RunState

from .synthetic import failed_run, full_run, spread, trial

HOSTILE = "<script>alert(1)</script>\"' $x^{ & </svg>"


@pytest.fixture(scope="module")
def data():
    return full_run()


@pytest.fixture(scope="module")
def report(data):
    return build_report(data)


@pytest.fixture(scope="module")
def page(report):
    return render_html(report)


class Ledger:
    """Follows a citation through the rows as plain JSON: knows nothing of how the report was made."""

    def __init__(self, data):
        rows = json.loads(json.dumps(to_builtins(data)))
        self.trials = {row["id"]: row for row in rows["trials"]}
        self.recommendations = {row["id"]: row for row in rows["recommendations"]}
        self.leases = {row["id"]: row for row in rows["leases"]}
        self.events = {row["seq"]: row for row in rows["events"]}
        self.usage, self.jobs = rows["usage"], rows["jobs"]

    def follow(self, cite):
        if "ratio" in cite:
            pairs = zip(*(self.trials[cite[one]]["curves"][cite["ratio"]] for one in ("trial", "against")), strict=True)
            if cite.get("part") == "mean":
                return statistics.fmean(one / other for one, other in pairs)
            logs = [math.log(one / other) for one, other in pairs]
            return math.exp(statistics.median((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:]))
        if "trial" in cite:
            row = self.trials[cite["trial"]]
            if "metric" in cite:
                return row["metrics"][cite["metric"]][cite.get("part", "mean")]
            return (
                row["curves"][cite["curve"]][cite["index"]] if "curve" in cite else row["configuration"][cite["configuration"]]
            )
        if "recommendation" in cite:
            row = self.recommendations[cite["recommendation"]]
            candidate = row["chosen"] if cite["candidate"] == -1 else row["ruled_out"][cite["candidate"]]
            if "broken" in cite:
                return next(b for b in candidate["broken"] if b["constraint"] == cite["broken"])[cite["part"]]
            return candidate["predictions"][cite["metric"]][cite["part"]]
        if "lease" in cite:
            row = self.leases[cite["lease"]]
            if cite["field"] == "held_s":
                return max(0.0, row["ended_at_s"] - row["starts_at_s"])
            return reduce(dict.__getitem__, cite["field"].split("."), row)
        if "event" in cite:
            return self.events[cite["event"]][cite["field"]]
        if "usage" in cite:
            return [row for row in self.usage if row["lease_id"] == cite["usage"]][cite["index"]]["usage"][cite["field"]]
        return reduce(dict.__getitem__, cite["field"].split("."), self.jobs[cite["job"]])


CITED = {"y": "cite", "low": "cite_low", "high": "cite_high", "end": "cite_end", "predicted": "cite_predicted"}


def test_every_plotted_value_equals_the_ledger_row_it_cites(data, report):
    ledger, checked = Ledger(data), 0
    for figure in figures(json.loads(json.dumps(report))):
        for series in figure["series"]:
            assert series["points"]
            for point in series["points"]:
                for value, cite in CITED.items():
                    if value in point:
                        assert point[value] == ledger.follow(point[cite]), (figure["id"], point)
                        checked += 1
                if "cite_x" in point:
                    shown = point["x"] if isinstance(point["x"], float | int) else int(point["x"].removeprefix("batch "))
                    assert shown == ledger.follow(point["cite_x"])
                if point.get("error"):
                    summary = ledger.trials[point["cite"]["trial"]]["metrics"][point["cite"]["metric"]]
                    assert point["error"] == pytest.approx(summary["sd"] / summary["n"] ** 0.5)
    assert checked > 250


def test_every_table_cell_with_a_value_equals_the_ledger_row_it_cites(data, report):
    ledger, checked = Ledger(data), 0
    blocks = [block for section in report["sections"] for block in section["blocks"]] + report["leases"]
    for block in blocks:
        if block["kind"] != "table":
            continue
        for row in block["rows"]:
            assert len(row) == len(block["columns"])
            for cell in row:
                if "cite" in cell:
                    assert cell["value"] == ledger.follow(cell["cite"])
                    checked += 1
    assert checked > 200


def test_all_figures_of_a_full_run_are_there_once(report):
    ids = [figure["id"] for figure in figures(report)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {
        "figure-train-learning",
        "figure-train-memory",
        "figure-train-memory-time",
        "figure-train-round",
        "figure-train-cost-rec-train",
        "figure-train-compared",
        "figure-serve-throughput-async",
        "figure-serve-throughput-sync",
        "figure-serve-latency",
        "figure-serve-cpu",
        "figure-serve-cost-rec-one",
        "figure-serve-cost-rec-many",
        "figure-serve-compared",
        "figure-leases",
    }
    assert {figure["kind"] for figure in figures(report)} == set(plots.KINDS)


def test_a_miss_above_a_quarter_is_said_plainly_and_a_hit_is_not(report):
    warnings = [b["text"] for s in report["sections"] for b in s["blocks"] if b["kind"] == "warning"]
    assert any("images missed by more than 25%" in text and "4,300/s was observed" in text for text in warnings)
    assert not any("peak memory missed" in text for text in warnings)


def test_each_loser_is_shown_with_the_constraint_it_broke(page):
    assert "8 copies need 520 MiB; the goal allows 300 MiB." in page
    assert "p99 would be 1.9 ms; the goal allows 0.5 ms." in page
    assert "4 cpus are needed; node local has 2." in page


def test_the_page_says_how_bounds_are_held(page):
    assert "cgroup v1: memory, cpu, pids" in page
    assert "held, but coarser or later" in page


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script(page):
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"<style.*?</style>", "", without_names, flags=re.DOTALL))
    assert "@import" not in page
    assert not re.search(r"<script|<link|<iframe|<img|<object|\son\w+=", page, re.IGNORECASE)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_ids_on_the_page_are_unique_and_every_reference_has_one(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets <= set(ids)


def test_the_same_rows_give_the_same_page(report, page):
    assert render_html(build_report(full_run())) == page


def test_hostile_names_are_text_on_the_page_and_in_plots():
    data = full_run(name=HOSTILE)
    trials = tuple(replace(t, note=HOSTILE, versions={HOSTILE: HOSTILE}) for t in data.trials)
    trials = tuple(
        replace(t, configuration={**t.configuration, "architecture": HOSTILE}) if "architecture" in t.configuration else t
        for t in trials
    )
    stages = tuple(replace(stage, detail=HOSTILE) for stage in data.run.stages)
    recommendations = tuple(replace(r, goal=HOSTILE, why=HOSTILE, thin=HOSTILE) for r in data.recommendations)
    leases = tuple(replace(lease, end_detail=HOSTILE) for lease in data.leases)
    run = replace(data.run, stages=stages)
    page = render_html(
        build_report(replace(data, run=run, trials=trials, recommendations=recommendations, leases=leases, notes=(HOSTILE,)))
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_run_that_failed_in_its_first_stage_still_has_a_report(tmp_path):
    page, plain = write_report(failed_run(), tmp_path / "report")
    assert "the program raised MemoryError: no room" in page.read_text()
    assert json.loads(plain.read_text())["header"]["outcome"].startswith("Stage train failed")


def test_any_part_of_the_rows_may_be_missing():
    data = full_run()
    empty = {"leases": (), "events": (), "trials": (), "recommendations": (), "usage": (), "jobs": {}, "node": None}
    for name, value in empty.items():
        part = {name: value, "recommendations": ()} if name == "trials" else {name: value}
        report = build_report(replace(data, **part))
        assert [section["name"] for section in report["sections"]] == ["train", "serve"]
        assert all(section["blocks"] for section in report["sections"])
    nothing = build_report(ReportData(run=data.run))
    assert figures(nothing) == []
    assert "Nothing was measured or granted" in render_html(nothing)
    assert "Tenure report" in render_html(build_report(ReportData(run=replace(data.run, stages=()))))


def test_a_goal_that_nothing_meets_is_the_outcome():
    data = full_run()
    none = replace(data.recommendations[1], chosen=None, why="The nearest is in-process.")
    report = build_report(replace(data, recommendations=(data.recommendations[0], none)))
    assert report["header"]["outcome"].startswith("No configuration meets the goal of stage serve")


def test_what_is_known_of_an_images_forms_is_a_table_and_no_measurement_of_its_answers():
    """Of a run that only served an image: what its builder measured, and what the run showed."""
    data = full_run()
    built = {"size_bytes": spread(70e6, n=1), "cold_start_s": spread(0.4, n=1)}
    seen = {"cold_start_s": spread(0.6, n=1), "peak_memory_bytes": spread(50e6, n=1)}
    configuration = {"architecture": "microservice", "form": "root"}
    trials = (
        trial(900, "serve", "probe", configuration, built),
        trial(901, "serve", "observed", {**configuration, "cpus": 1.0}, seen),
    )
    report = build_report(replace(data, trials=trials, recommendations=()))
    blocks = [block for section in report["sections"] for block in section["blocks"]]
    (table,) = [block for block in blocks if block.get("title") == "Forms of the image"]
    assert table["columns"][3:] == ["size", "time to start", "peak memory"]
    assert [row[1]["text"] for row in table["rows"]] == ["microservice · form root"] * 2
    assert not [figure for figure in figures(report) if figure["id"].startswith("serve-")]


def test_a_lease_still_held_is_drawn_to_the_last_event():
    data = full_run()
    events = tuple(e for e in data.events if not (e.lease_id == "l-003" and e.kind == "lease.ended"))
    leases = tuple(replace(row, end_reason=None) if row.id == "l-003" else row for row in data.leases)
    run = replace(data.run, state=RunState.RUNNING)
    report = build_report(replace(data, run=run, events=events, leases=leases))
    (timeline,) = [figure for figure in figures(report) if figure["id"] == "figure-leases"]
    held = next(series for series in timeline["series"] if series["name"] == "still held")
    assert held["points"][0]["end"] == data.events[-1].at_s


def test_both_files_are_written_and_the_json_is_the_report(tmp_path, data, report):
    page, plain = write_report(data, tmp_path)
    assert page.read_text().startswith(("\n", "<!doctype"))
    assert json.loads(plain.read_text()) == json.loads(json.dumps(report))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
