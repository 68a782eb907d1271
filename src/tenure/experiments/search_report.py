"""The section of a report on a search: what was tried in which order, beside the choice and what speaks against the others.

The recommendation itself, with its confidence and what was ruled out, is shown as every other (`report_sections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenure.experiments.machine_load import DISTURBED_CORES
from tenure.experiments.report_cite import Cell, Rows, make_table, metrics_present, show, text_cell, words
from tenure.experiments.report_points import make_figure, make_point
from tenure.jobs import Job, ServeGoal
from tenure.recommend.search_words import words as setting_words
from tenure.runs import Stage
from tenure.trials import Configuration, Trial

Block = dict[str, Any]
_METRICS = (
    *("images_per_s", "p99_s", "app_cpu_s_per_image", "server_cpu_s_per_image"),
    *("app_memory_bytes", "server_memory_bytes"),
)


def is_searched(rows: Rows, stage: Stage) -> bool:
    """Whether the stage's settings were searched."""
    job = rows.data.jobs.get(stage.name)
    return job is not None and job.search is not None


def search_blocks(rows: Rows, stage: Stage) -> list[Block]:
    """Return the blocks of a search's trials; none for another stage, or before the first trial."""
    job = rows.data.jobs.get(stage.name)
    trials = [trial for trial in rows.of_stage(stage)[0] if trial.source == "probe" and "instances" in trial.configuration]
    if job is None or job.search is None or not trials:
        return []
    trials.sort(key=lambda trial: trial.at_s)
    metrics = metrics_present(trials, _METRICS)
    table: list[list[Cell]] = []
    for place, trial in enumerate(trials, 1):
        cells = [rows.trial(trial, metric) if metric in trial.metrics else text_cell("–") for metric in metrics]
        earlier = "" if trial.run_id == rows.data.run.id else " (an earlier run)"
        table.append(
            [text_cell(place), text_cell(f"{trial.id}{earlier}"), text_cell(setting_words(trial.configuration)), *cells]
        )
    columns = ["", "trial", "setting", *(words(metric) for metric in metrics)]
    text = (
        f"{len(trials)} trials, one after the other. Each was the one expected to better the choice most after those before "
        "it, so a setting that was measured again was close to the best, or to a bound. The server and its applications were "
        "started anew for each, with the instances, threads and delay that it names."
    )
    return [
        {"kind": "heading", "text": "What was tried"},
        *_warning(trials),
        {"kind": "text", "text": text},
        {"kind": "figure", "figure": _figure(rows, stage, job, trials)},
        make_table("Trials in the order in which they were made", columns, table),
    ]


def _figure(rows: Rows, stage: Stage, job: Job, trials: Sequence[Trial]) -> dict[str, Any]:
    goals = job.serve_goals or (ServeGoal(name="the most images/s"),)
    meets: dict[str, dict[str, Any]] = {
        name: {"name": name, "pale": pale, "points": []}
        for name, pale in (("keeps to the bounds of a goal", False), ("breaks a bound of each", True))
    }
    names = []
    for place, trial in enumerate(trials, 1):
        p99 = f", p99 {show('p99_s', trial.metrics['p99_s'].mean)}" if "p99_s" in trial.metrics else ""
        names.append(f"{place}. {_short(trial.configuration)}{p99}")
        kept = any(_keeps(trial, goal) for goal in goals)
        series = meets["keeps to the bounds of a goal" if kept else "breaks a bound of each"]
        series["points"].append(make_point(names[-1], rows.trial(trial, "images_per_s")))
    return make_figure(
        f"{stage.name}-search",
        "hbars",
        "Rate of what was tried, in this order",
        "Images per second of each trial, the first on top; as measured, without the margin that a choice needs. Whiskers: "
        "standard error.",
        x_label="images per second",
        stacked=True,
        rows=names,
        series=list(meets.values()),
    )


def _short(configuration: Configuration) -> str:
    """Return a setting as short as the margin of a figure: how it is asked, batch, instances x threads, delay in ms."""
    how = configuration["transport"] if configuration["architecture"] != "simple" else "simple"
    text = f"{how} {configuration['interaction']} b{configuration['batch']}"
    text += f" {configuration['instances']}×{configuration['threads']}"
    delay_ms = 1e3 * float(configuration.get("max_delay_s", 0.0))
    return f"{text} +{delay_ms:g}ms" if delay_ms else text


def search_outcome(rows: Rows, stage: Stage) -> str:
    """Return what came of a search in a sentence or two; empty where nothing was searched, or nothing chosen."""
    found = [one for one in rows.of_stage(stage)[1] if one.chosen is not None] if is_searched(rows, stage) else []
    return found[0].why if found else ""


def _keeps(trial: Trial, goal: ServeGoal) -> bool:
    """Whether a trial, as it was measured, keeps to the bounds on rate and latency of a goal with its clients."""
    if trial.configuration.get("clients", 1) != goal.clients:
        return False
    mean = {name: summary.mean for name, summary in trial.metrics.items()}
    late = bool(goal.p99_s) and mean.get("p99_s", 0.0) > goal.p99_s
    return not late and mean["images_per_s"] >= goal.images_per_s


def disturbed(trials: Sequence[Trial]) -> str:
    """Return in words that others used the machine during some of a search's trials; empty when they did not."""
    others = [t.metrics["other_cpu_cores"].mean for t in trials if "other_cpu_cores" in t.metrics]
    busy = [cores for cores in others if cores > DISTURBED_CORES]
    if not busy:
        return ""
    return (
        f"Others kept up to {max(busy):.1f} cores of this machine busy during {len(busy)} of {len(trials)} trials. These ran "
        "one after the other, so some met more of that than others: search again when the machine is quiet."
    )


def _warning(trials: Sequence[Trial]) -> list[Block]:
    text = disturbed(trials)
    return [{"kind": "warning", "text": text}] if text else []
