"""The words and tables of a report: what was measured, recommended, ruled out, leased, and how well it was predicted.

A section is a list of blocks, each ``{"kind": "text" | "warning" | "table" | "figure" | "pictures" | …}``; table cells cite
their ledger rows (`report_cite`). Figures are made in `report_figures`, pages in `report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tenure.experiments.bench_report import bench_blocks
from tenure.experiments.report_cite import Cell, Rows, label, make_table, metrics_present, show, text_cell, words
from tenure.experiments.report_figures import comparison_figures, serving_figures, training_figures
from tenure.experiments.report_predictions import prediction_blocks
from tenure.experiments.search_report import is_searched, search_blocks
from tenure.leases import Lease
from tenure.recommend import observe
from tenure.runs import RunState, Stage
from tenure.trials import Recommendation, Trial

Block = dict[str, Any]
_FOLD_ABOVE = 10
"""Longer tables are opened by a click: the plots show the same."""
_TRAINING = ("startup_s", "shard_s", "combine_s", "round_s", "peak_memory_bytes")
_REACHED = ("rounds", "accuracy", "time_s", "cost_usd")
_SERVING = ("images_per_s", "p50_s", "p99_s", "wrong_answers")
_SERVING_USE = ("app_cpu_s_per_image", "server_cpu_s_per_image", "app_memory_bytes", "server_memory_bytes", "memory_bytes")
_FORMS = ("size_bytes", "cold_start_s", "memory_floor_bytes", "peak_memory_bytes")
_SERVING_PARTS = ("prepare_model_s", "prepare_data_s", "send_s", "recognise_s", "fetch_s")


def stage_blocks(rows: Rows, stage: Stage) -> list[Block]:
    """Return the blocks of one stage: partial runs give fewer, never an error."""
    trials, recommendations, leases = rows.of_stage(stage)
    blocks: list[Block] = []
    if stage.detail:
        failed = stage.state in (RunState.FAILED, RunState.CANCELLED)
        blocks.append({"kind": "warning" if failed else "text", "text": stage.detail})
    blocks += bench_blocks(rows, stage)
    trials = [trial for trial in trials if trial.source != "sweep"]
    if is_searched(rows, stage):
        for recommendation in recommendations:
            blocks += _recommended(rows, recommendation)
        return blocks + search_blocks(rows, stage) + _closing(rows, stage, trials, recommendations, leases, blocks)
    figures = serving_figures(rows, stage) if stage.kind == "serve" else training_figures(rows, stage)
    costs = [figure for figure in figures if "-cost-" in figure["id"]]
    blocks += _measured(rows, trials) + _as_blocks([figure for figure in figures if figure not in costs])
    for recommendation in recommendations:
        mine = [figure for figure in costs if figure["id"].endswith(recommendation.id)]
        blocks += _recommended(rows, recommendation) + _as_blocks(mine)
    return blocks + _closing(rows, stage, trials, recommendations, leases, blocks)


def _closing(
    rows: Rows,
    stage: Stage,
    trials: Sequence[Trial],
    recommendations: Sequence[Recommendation],
    leases: Sequence[Lease],
    before: Sequence[Block],
) -> list[Block]:
    """Return what every stage ends with: predictions held against what came, and its leases."""
    blocks = _compared(rows, stage, trials, recommendations)
    if found := rows.data.predictions.get(stage.name):
        blocks += prediction_blocks(stage.name, dict(found))
    if leases:
        blocks += [{"kind": "heading", "text": "Leases granted"}, lease_table(rows, leases)]
    if not blocks and not before:
        blocks.append({"kind": "text", "text": "Nothing was measured or granted in this stage."})
    return blocks


def _as_blocks(figures: Sequence[dict[str, Any]]) -> list[Block]:
    return [{"kind": "figure", "figure": figure} for figure in figures]


def _measured(rows: Rows, trials: Sequence[Trial]) -> list[Block]:
    if not trials:
        return []
    blocks: list[Block] = [{"kind": "heading", "text": "What was measured"}]
    serving = any("architecture" in trial.configuration for trial in trials)
    for title, order in _tables(trials, serving):
        metrics = metrics_present(trials, order)
        kept = [trial for trial in trials if any(metric in trial.metrics for metric in metrics)]
        if kept:
            table = [_trial_row(rows, trial, metrics) for trial in kept]
            columns = ["trial", "configuration", "n", *(words(metric) for metric in metrics)]
            blocks.append(make_table(title, columns, table, folded=len(table) > _FOLD_ABOVE))
    notes: dict[str, list[str]] = {}
    for trial in trials:
        if trial.note:
            notes.setdefault(trial.note, []).append(trial.id)
    blocks += [{"kind": "small", "text": f"{note} (trials {', '.join(ids)})"} for note, ids in list(notes.items())[:10]]
    return blocks


def _tables(trials: Sequence[Trial], serving: bool) -> list[tuple[str, Sequence[str]]]:
    if serving:
        return [
            ("Rate and latency", _SERVING),
            ("CPU and memory by party", _SERVING_USE),
            ("Parts of a request", _SERVING_PARTS),
            *([("Forms of the image", _FORMS)] if any("form" in trial.configuration for trial in trials) else []),
        ]
    known = [("Times of a round, and memory", _TRAINING), ("What was reached", _REACHED)]
    shown = {"examples_per_s", *_TRAINING, *_REACHED}
    other = sorted({metric for trial in trials for metric in trial.metrics} - shown)
    return [*known, *[("Further metrics", tuple(other[at : at + 5])) for at in range(0, len(other), 5)]]


def _trial_row(rows: Rows, trial: Trial, metrics: Sequence[str]) -> list[Cell]:
    cells = [rows.trial(trial, metric) if metric in trial.metrics else text_cell("–") for metric in metrics]
    n = max((trial.metrics[metric].n for metric in metrics if metric in trial.metrics), default=0)
    link = trial.configuration.get("link", "")
    clients = trial.configuration.get("clients", 1)
    name = label(trial.configuration)
    name += f" · {clients} clients" if clients not in (0, 1) else ""
    name += f" ({link})" if link and trial.configuration.get("architecture") == "distributed" else ""
    return [text_cell(f"{trial.id} ({trial.source})"), text_cell(name), text_cell(n), *cells]


def _recommended(rows: Rows, recommendation: Recommendation) -> list[Block]:
    blocks: list[Block] = [{"kind": "heading", "text": f"Recommended for: {recommendation.goal or 'the goal'}"}]
    if recommendation.chosen is None:
        blocks.append({"kind": "warning", "text": f"No configuration meets this goal. {recommendation.why}"})
    else:
        chosen = recommendation.chosen
        size = f"; per lease: {chosen.envelope.describe()}" if chosen.envelope else ""
        many = f"{chosen.leases} lease{'s' if chosen.leases != 1 else ''}"
        blocks.append({"kind": "chosen", "text": f"{label(chosen.configuration)} ({many}{size})"})
        if recommendation.why:
            blocks.append({"kind": "text", "text": recommendation.why})
        predicted = [
            [
                text_cell(words(metric)),
                *(rows.prediction(recommendation, -1, metric, part) for part in ("value", "low", "high")),
            ]
            for metric in chosen.predictions
        ]
        if predicted:
            blocks.append(make_table("What it predicts", ["metric", "expected", "low", "high"], predicted))
    if recommendation.thin:
        blocks.append({"kind": "warning", "text": f"Thin data: {recommendation.thin}"})
    if recommendation.ruled_out:
        blocks.append(_ruled_out(rows, recommendation))
    if recommendation.trials:
        blocks.append({"kind": "small", "text": f"Rests on trials {', '.join(recommendation.trials)}."})
    return blocks


def _ruled_out(rows: Rows, recommendation: Recommendation) -> Block:
    table = []
    for index, candidate in enumerate(recommendation.ruled_out):
        name = text_cell(label(candidate.configuration))
        for broken in candidate.broken:
            limit, found = (
                {
                    "value": getattr(broken, part),
                    "text": show(broken.constraint, getattr(broken, part)),
                    "cite": {
                        "recommendation": recommendation.id,
                        "candidate": index,
                        "broken": broken.constraint,
                        "part": part,
                    },
                }
                for part in ("limit", "found")
            )
            table.append([name, text_cell(words(broken.constraint)), limit, found, text_cell(broken.reason)])
    columns = ["configuration", "constraint broken", "limit", "found", "why"]
    return make_table("What was ruled out", columns, table, folded=len(table) > _FOLD_ABOVE)


def lease_table(rows: Rows, leases: Sequence[Lease]) -> Block:
    """Return the table of leases with what was granted, how long it was held and why it ended."""
    table = [
        [
            text_cell(lease.id),
            text_cell(lease.worker),
            text_cell(lease.node or "–"),
            rows.lease(lease, "envelope.cpus"),
            rows.lease(lease, "envelope.memory_bytes"),
            rows.lease(lease, "envelope.slot_s"),
            rows.lease(lease, "envelope.total_s"),
            rows.lease(lease, "held_s"),
            text_cell(lease.end_reason or lease.state),
            text_cell(lease.end_detail),
        ]
        for lease in leases
    ]
    columns = ["lease", "worker", "node", "cpus", "memory", "slot", "total", "held", "end", "detail"]
    return make_table(f"{len(leases)} lease{'s' if len(leases) != 1 else ''}", columns, table, folded=len(table) > _FOLD_ABOVE)


def bounds_blocks(rows: Rows) -> list[Block]:
    """Return how the node held each bound, and by which means."""
    node = rows.data.node
    if node is None:
        return []
    meaning = {"exact": "held exactly", "upper": "held, but coarser or later", "advisory": "watched; can be overrun briefly"}
    blocks: list[Block] = []
    for runtime, bounds in sorted(node.bounds.items()):
        table = [[text_cell(name), text_cell(bound), text_cell(meaning[bound])] for name, bound in sorted(bounds.items())]
        sentence = node.confinement.get(runtime, "")
        if sentence:
            blocks.append({"kind": "text", "text": f"Confinement of runtime {runtime}: {sentence}."})
        blocks.append(make_table(f"How runtime {runtime} holds each bound", ["bound", "word", "meaning"], table))
    return blocks


def _compared(rows: Rows, stage: Stage, trials: Sequence[Trial], recommendations: Sequence[Recommendation]) -> list[Block]:
    compared = compare(rows, trials, recommendations)
    if not compared:
        return []
    table = []
    for row in compared:
        table.append([row[part] for part in ("what", "predicted", "low", "high", "observed", "miss")])
    columns = ["metric", "predicted", "low", "high", "observed", "miss"]
    blocks: list[Block] = [
        {"kind": "heading", "text": "Predicted against observed"},
        make_table("The real run against its prediction", columns, table),
        *_as_blocks(comparison_figures(stage, compared)),
    ]
    sentences = [row["sentence"]["text"] for row in compared if row["sentence"]["text"]]
    closing = "Every prediction lies within 25 % of what was observed."
    return blocks + ([{"kind": "warning", "text": text} for text in sentences] or [{"kind": "text", "text": closing}])


def compare(rows: Rows, trials: Sequence[Trial], recommendations: Sequence[Recommendation]) -> list[dict[str, Cell]]:
    """Return one row per metric that was both predicted for a chosen candidate and observed in the real run.

    The observed trial of a recommendation is the last one of source `observed` with the chosen configuration. `miss` is as
    `recommend.observe` defines it, None when infinite; `sentence` is empty unless that calls it missed.
    """
    compared = []
    for recommendation in recommendations:
        trial = _observed(trials, recommendation)
        if trial is None or recommendation.chosen is None:
            continue
        for metric in recommendation.chosen.predictions:
            if metric in trial.metrics:
                prefix = f"{recommendation.goal}: " if len(recommendations) > 1 else ""
                compared.append(_comparison(rows, recommendation, trial, metric, prefix))
    return compared


def _observed(trials: Sequence[Trial], recommendation: Recommendation) -> Trial | None:
    if recommendation.chosen is None:
        return None
    wanted: Mapping[str, Any] = recommendation.chosen.configuration
    matching = [
        trial
        for trial in trials
        if trial.source == "observed" and all(trial.configuration.get(key, level) == level for key, level in wanted.items())
    ]
    return matching[-1] if matching else None


def _comparison(rows: Rows, recommendation: Recommendation, trial: Trial, metric: str, prefix: str) -> dict[str, Cell]:
    parts = {part: rows.prediction(recommendation, -1, metric, part) for part in ("value", "low", "high")}
    observed, predicted = rows.trial(trial, metric), parts["value"]
    chosen = rows.candidate(recommendation, -1)
    (row,) = observe.compare({metric: chosen.predictions[metric]}, {metric: trial.metrics[metric]})
    sentence = ""
    if row.missed:
        way = "above" if observed["value"] > predicted["value"] else "below"
        sentence = (
            f"The prediction of {words(metric)} missed by more than {observe.MISSED:.0%}: {predicted['text']} was expected "
            f"({parts['low']['text']} to {parts['high']['text']}), {observed['text']} was observed, which is {way} it."
        )
    return {
        "what": text_cell(f"{prefix}{words(metric)}"),
        "predicted": predicted,
        "low": parts["low"],
        "high": parts["high"],
        "observed": observed,
        "miss": {"value": row.miss if math.isfinite(row.miss) else None, "text": f"{row.miss:+.0%}"},
        "sentence": text_cell(prefix + sentence if sentence else ""),
    }
