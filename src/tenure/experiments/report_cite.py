"""Figures for the report, each taken from the ledger row it cites; how they read for people.

A cell is ``{"value", "text", "cite"}``, with ``"error"`` (standard error) and ``"n"`` where repeats were summarized.
Nothing in a report holds a measured number that did not come through `Rows`, so a reader can follow every one back:

    {"trial": id, "metric": name}                     mean of the trial's summary; with "part": that part of it instead
    {"trial": id, "against": id, "ratio": curve}      typical ratio of two trials' curves, repeat by repeat (decide.intervals);
                                                      with "part": "mean", the mean of the ratios by repeat (decide.repeats)
    {"trial": id, "curve": name, "index": i}          one point of a curve
    {"trial": id, "configuration": factor}            level of a factor
    {"recommendation": id, "candidate": k, "metric": name, "part": "value" | "low" | "high"}    k = -1: the chosen one
    {"lease": id, "field": "envelope.memory_bytes"}   a field of the lease's last state
    {"event": seq, "field": "at_s"}                   when something happened
    {"usage": lease id, "index": i, "field": name}    a rollup of one lease's consumption
    {"job": stage, "field": "train_goal.accuracy"}    what the job file asked for
    {"artefact": "train/predictions.npz", "array": name, "index": i}    an element of an array that a stage left
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from tenure.decide.bottleneck import rate_ratio
from tenure.decide.repeats import Paired
from tenure.errors import NotFound
from tenure.events import Event
from tenure.jobs import Job
from tenure.leases import Lease
from tenure.nodes import Node
from tenure.resources import show_bytes
from tenure.runs import Run, Stage
from tenure.trials import Candidate, Recommendation, Trial
from tenure.wire import UsagePoint

Cell = dict[str, Any]
Cite = dict[str, Any]
MAX_ROWS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """The ledger rows of one run, as the broker hands them out. Only `run` is needed: what is missing is left out."""

    run: Run
    node: Node | None = None
    """Where it ran: machine, bounds and confinement."""
    leases: tuple[Lease, ...] = ()
    """Last state of each, in order of request."""
    events: tuple[Event, ...] = ()
    trials: tuple[Trial, ...] = ()
    """Those of the run, and those of older runs that its recommendations rest on."""
    recommendations: tuple[Recommendation, ...] = ()
    usage: tuple[UsagePoint, ...] = ()
    """Rollups, in order of time, for memory over time."""
    jobs: Mapping[str, Job] = field(default_factory=dict)
    """Stage -> its job, for the goal lines of the plots."""
    predictions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage -> arrays of its artefact predictions.npz, for the grid of pictures."""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Closing lines and warnings, as shown while the run went on."""
    at_s: float = 0.0
    """When the report was made, UTC seconds."""


class Rows:
    """The rows of one run by id, and cells made of them. Raises NotFound for a citation that leads nowhere."""

    def __init__(self, data: ReportData) -> None:
        self.data = data
        self._trials = {trial.id: trial for trial in data.trials}
        self._recommendations = {recommendation.id: recommendation for recommendation in data.recommendations}
        self._leases = {lease.id: lease for lease in data.leases}
        self._events = {event.seq: event for event in data.events}
        self._usage: dict[str, list[UsagePoint]] = {}
        for point in data.usage:
            self._usage.setdefault(point.lease_id, []).append(point)

    def of_stage(self, stage: Stage) -> tuple[list[Trial], list[Recommendation], list[Lease]]:
        """Return the trials, recommendations and leases of one stage, in the ledger's order."""
        recommendations = [row for row in self.data.recommendations if row.stage == stage.name]
        cited = {trial for row in recommendations for trial in row.trials}
        trials = [row for row in self.data.trials if row.id in cited or row.stage == stage.name]
        return trials, recommendations, [row for row in self.data.leases if row.stage == stage.name]

    def trial(self, trial: Trial, metric: str, part: str = "") -> Cell:
        """Return the mean of one metric with its standard error and number of repeats; or another part, e.g. ``maximum``."""
        summary = self._trials[trial.id].metrics.get(metric)
        if summary is None:
            raise NotFound(f"trial {trial.id} has no metric {metric!r}; it has: {', '.join(trial.metrics)}")
        if part:
            value = getattr(summary, part)
            return {"value": value, "text": show(metric, value), "cite": {"trial": trial.id, "metric": metric, "part": part}}
        text = show(metric, summary.mean)
        if summary.n > 1:
            text = show_spread(metric, summary.mean, summary.standard_error)
        cite = {"trial": trial.id, "metric": metric}
        return {"value": summary.mean, "error": summary.standard_error, "n": summary.n, "text": text, "cite": cite}

    def ratio(self, trial: Trial, against: Trial) -> Cell:
        """Return images/s of a trial ÷ another's, paired by repeat, with its 95 % interval; words where they do not pair."""
        found = rate_ratio(self._trials[trial.id], self._trials[against.id])
        if found is None:
            return text_cell("–")
        text = f"{found.value:.2f}× ({found.low:.2f}–{found.high:.2f})"
        cite = {"trial": trial.id, "against": against.id, "ratio": "images_per_s"}
        return {"value": found.value, "text": text, "cite": cite}

    def paired(self, pair: Paired) -> Cell:
        """Return the mean ratio of a setting to the first of its batch, with its standard error relative to it."""
        cite = {"trial": pair.trial, "against": pair.against, "ratio": "images_per_s", "part": "mean"}
        text = f"{pair.mean:.3f}× ± {pair.standard_error:.2%}"
        return {"value": pair.mean, "error": pair.standard_error * pair.mean, "n": pair.repeats, "text": text, "cite": cite}

    def factor(self, trial: Trial, name: str) -> Cell:
        """Return the level of one factor."""
        value = self._trials[trial.id].configuration[name]
        return {"value": value, "text": str(value), "cite": {"trial": trial.id, "configuration": name}}

    def curve(self, trial: Trial, name: str, index: int) -> Cell:
        """Return one point of a curve."""
        value = self._trials[trial.id].curves[name][index]
        return {"value": value, "text": show(name, value), "cite": {"trial": trial.id, "curve": name, "index": index}}

    def prediction(self, recommendation: Recommendation, candidate: int, metric: str, part: str = "value") -> Cell:
        """Return a predicted value, or an end of its interval. candidate: index into `ruled_out`, -1 for the chosen one."""
        row = self.candidate(recommendation, candidate)
        value = getattr(row.predictions[metric], part)
        cite = {"recommendation": recommendation.id, "candidate": candidate, "metric": metric, "part": part}
        return {"value": value, "text": show(metric, value), "cite": cite}

    def candidate(self, recommendation: Recommendation, candidate: int) -> Candidate:
        """Return the chosen candidate (-1) or one that was ruled out."""
        row = self._recommendations[recommendation.id]
        found = row.chosen if candidate < 0 else row.ruled_out[candidate]
        if found is None:
            raise NotFound(f"recommendation {recommendation.id} chose nothing")
        return found

    def lease(self, lease: Lease, path: str) -> Cell:
        """Return a field of a lease; path: dotted."""
        value = _walk(self._leases[lease.id], path)
        return {"value": value, "text": show(path, value), "cite": {"lease": lease.id, "field": path}}

    def event(self, event: Event) -> Cell:
        """Return when an event happened."""
        at_s = self._events[event.seq].at_s
        return {"value": at_s, "text": show("at_s", at_s), "cite": {"event": event.seq, "field": "at_s"}}

    def usage(self, lease: Lease, name: str) -> list[tuple[float, Cell]]:
        """Return (UTC seconds, cell) of every rollup of a lease."""
        return [
            (
                point.at_s,
                {
                    "value": getattr(point.usage, name),
                    "text": show(name, getattr(point.usage, name)),
                    "cite": {"usage": lease.id, "index": index, "field": name},
                },
            )
            for index, point in enumerate(self._usage.get(lease.id, []))
        ]

    def job(self, stage: str, path: str) -> Cell | None:
        """Return what the job file asked for, or None when it did not."""
        try:
            value = _walk(self.data.jobs[stage], path)
        except (KeyError, AttributeError):
            return None
        return {"value": value, "text": show(path, value), "cite": {"job": stage, "field": path}}


def _walk(row: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), row)


def show(name: str, value: Any) -> str:
    """Return a value for people in the unit that its name ends in. Text is returned as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if name.endswith("_bytes"):
        return show_bytes(value)
    if "usd" in name:
        return f"${value:.4f}" if value >= 0.01 or not value else f"${value:.2g}"
    if name.endswith("_per_s"):
        return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"
    if name.endswith(("_s", "_s_per_image")):
        return _show_seconds(value)
    if "accuracy" in name:
        return f"{100 * value:.2f} %"
    if name.endswith(("_cpu", "_cpu_max", "_cpu_min", "_cpu_cores")):
        return f"{value:.2f}"
    if name.endswith("_busy"):
        return f"{100 * value:.0f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def show_spread(name: str, mean: float, error: float) -> str:
    """Return mean ± error for people, both in the unit that fits the mean, e.g. ``422 ± 2.9 ms``."""
    if name.endswith("_per_s"):
        number = show(name, mean).removesuffix("/s")
        return f"{number} ± {error:.0f}/s" if error >= 100 else f"{number} ± {error:.2g}/s"
    number, _, unit = show(name, mean).rpartition(" ")
    if not number or not mean:
        return f"{show(name, mean)} ± {show(name, error)}"
    scaled = error * float(number.replace(",", "")) / mean
    return f"{number} ± {scaled:.0f} {unit}" if scaled >= 100 else f"{number} ± {scaled:.2g} {unit}"


def _show_seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor or unit == "µs":
            scaled = value / factor
            return f"{scaled:.0f} {unit}" if abs(scaled) >= 100 or not scaled else f"{scaled:.3g} {unit}"
    return f"{value} s"


WORDS: Mapping[str, str] = {
    "startup_s": "start",
    "shard_s": "one shard",
    "combine_s": "combine",
    "round_s": "one round",
    "peak_memory_bytes": "peak memory",
    "cold_start_s": "time to start",
    "memory_floor_bytes": "memory floor",
    "size_bytes": "size",
    "examples_per_s": "examples",
    "time_s": "time to goal",
    "cost_usd": "cost",
    "cost_usd_per_hour": "cost per hour",
    "rounds": "rounds",
    "accuracy": "accuracy",
    "images_per_s": "images",
    "p50_s": "p50 latency",
    "p99_s": "p99 latency",
    "mean_s": "mean latency",
    "prepare_model_s": "prepare model",
    "prepare_data_s": "prepare data",
    "send_s": "send",
    "recognise_s": "recognise",
    "fetch_s": "fetch",
    "app_cpu_s_per_image": "app CPU per image",
    "server_cpu_s_per_image": "server CPU per image",
    "app_memory_bytes": "app memory",
    "server_memory_bytes": "server memory",
    "memory_bytes": "memory",
    "wrong_answers": "wrong answers",
    "load_data_s": "load data",
    "log_s": "print the log",
    "other_s": "other",
    "wall_s": "a request's time",
    "queue_s": "in the server's queue",
    "compute_s": "in the model",
    "app_cpu": "application's cores",
    "client_cpu": "client part's cores",
    "server_cpu": "server's cores",
    "recogniser_cpu": "recogniser's cores",
    "forwarder_cpu": "forwarder's cores",
    "other_cpu_cores": "cores used by others",
    "recogniser_memory_bytes": "recogniser memory",
    "gpu_busy": "GPU busy",
    "gpu_memory_bytes": "GPU memory",
    "link_busy": "link busy",
    "server_start_s": "start the server",
    "server_lease_memory_bytes": "server memory, inside its lease",
    "link": "link, there and back",
    "million_images_usd": "cost of a million images",
    "measuring": "could be measured",
}
"""Metric -> the words that tables and plots use."""


def words(metric: str) -> str:
    """Return what a metric is called in tables and plots."""
    return WORDS.get(metric, metric)


def label(configuration: Mapping[str, Any]) -> str:
    """Return a configuration in one short line, e.g. ``microservice · grpc · async · batch 8 · 2 × 1 threads``."""
    if "architecture" in configuration:
        shown = [configuration["architecture"]]
        if "form" in configuration:
            shown.append(f"form {configuration['form']}")
        if configuration.get("transport", "none") != "none":
            shown.append(configuration["transport"])
        if "interaction" in configuration:
            shown.append(configuration["interaction"])
        if "batch" in configuration:
            shown.append(f"batch {configuration['batch']}")
        if "instances" in configuration and "threads" in configuration:
            shown.append(f"{configuration['instances']} × {configuration['threads']} threads")
        if configuration.get("max_delay_s"):
            shown.append(f"delay {show('max_delay_s', configuration['max_delay_s'])}")
        return " · ".join(str(part) for part in shown)
    if "workers" in configuration:
        many = "" if configuration["workers"] == 1 else "s"
        text = f"{configuration['workers']} worker{many}"
        return text + (f" × {configuration['cpus']:g} cpu" if "cpus" in configuration else "")
    return ", ".join(f"{key} {value}" for key, value in configuration.items()) or "–"


def text_cell(text: object) -> Cell:
    """Return a cell of plain words that cites nothing."""
    return {"text": str(text)}


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, most: int = MAX_ROWS, **more: Any
) -> dict[str, Any]:
    """Return the block of a table, cut off after so many rows and saying so."""
    shown = [list(row) for row in rows[:most]]
    left = len(rows) - len(shown)
    note = f"{left} further rows are in the JSON file's ledger rows only." if left > 0 else ""
    return {"kind": "table", "title": title, "columns": list(columns), "rows": shown, "note": note, **more}


def metrics_present(trials: Sequence[Trial], order: Sequence[str]) -> list[str]:
    """Return the metrics of `order` that at least one trial has."""
    return [metric for metric in order if any(metric in trial.metrics for trial in trials)]
