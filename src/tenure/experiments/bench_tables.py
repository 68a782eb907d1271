"""The tables of a serving experiment: the study's table 2 with values, its findings asked again, every setting's figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tenure.decide.bottleneck import STAGES, Bottleneck
from tenure.decide.repeats import Paired
from tenure.decide.stations import OURS
from tenure.experiments.bench_figures import in_order, setting, shown_modes
from tenure.experiments.report_cite import Cell, Rows, make_table, metrics_present, show, text_cell, words
from tenure.experiments.sweep_forecast import CURVE
from tenure.trials import Trial

Block = dict[str, Any]
_FOLD_ABOVE = 12
_FORETOLD = re.compile(r"Foretold bound: ([a-z ]+)\.")
_MOST = 400
_PARTIES = (("server", "Server, all of it"), ("recogniser", "Recogniser"), ("client", "Client part"), ("app", "Application"))
_TABLES: Sequence[tuple[str, Sequence[str]]] = (
    ("Rate and latency", ("images_per_s", "mean_s", "p50_s", "p99_s", "requests")),
    ("Stages of a request", (*STAGES, "wall_s", "queue_s", "compute_s")),
    ("Cores", ("app_cpu", "client_cpu", "server_cpu", "recogniser_cpu", "forwarder_cpu", "other_cpu_cores", "gpu_busy")),
    (
        "Memory and preparation",
        ("app_memory_bytes", "server_memory_bytes", "server_lease_memory_bytes", "gpu_memory_bytes", "prepare_model_s"),
    ),
)


def table_two(rows: Rows, trials: Sequence[Trial], best: Trial | None) -> list[Block]:
    """Return the study's table 2 with values instead of crosses: one column per architecture and contender.

    Each column is the setting of figure 4's mode at the best setting's batch.
    """
    if best is None:
        return []
    batch, data = best.configuration.get("batch", 1), str(best.configuration.get("data", "memory"))
    shown = [
        next((trial for trial in group if trial.configuration.get("batch", 1) == batch), group[-1])
        for group in shown_modes(trials, data)
    ]
    table: list[list[Cell]] = []

    def add(who: str, what: str, metric: str, part: str = "") -> None:
        known = [metric in trial.metrics and (not part or trial.metrics[metric].n > 1) for trial in shown]
        cells = [rows.trial(trial, metric, part) if told else text_cell("") for trial, told in zip(shown, known, strict=True)]
        if any("cite" in cell for cell in cells):
            table.append([text_cell(who), text_cell(what), *cells])

    add("All", "images per second", "images_per_s")
    table.append([text_cell("All"), text_cell("standard error, of the mean"), *(text_cell(_error(trial)) for trial in shown)])
    add("Application", "prepare the model", "prepare_model_s")
    for metric in ("load_data_s", "prepare_data_s", "send_s", "fetch_s", "recognise_s", "log_s", "other_s"):
        add("per request", words(metric), metric)
    for party, who in _PARTIES:
        for what, metric in (("mean", f"{party}_cpu"), ("highest", f"{party}_cpu_max"), ("lowest", f"{party}_cpu_min")):
            add(who, f"cores, {what}", metric)
    for what, metric in (("mean", "gpu_busy"), ("highest", "gpu_busy_max"), ("lowest", "gpu_busy_min")):
        add("GPU", f"busy, {what}", metric)
    for party, who in (*_PARTIES, ("gpu", "GPU")):
        for what, part in (("mean", ""), ("highest", "maximum"), ("lowest", "minimum")):
            add(who, f"memory, {what}", f"{party}_memory_bytes", part)
    add("Server", "memory inside its lease", "server_lease_memory_bytes")
    columns = ["who", "what", *(setting(trial.configuration, without=("data",)) for trial in shown)]
    title = f"Pictures from {data}. Highest and lowest cores are of 50 ms; highest and lowest memory of repeats"
    heading = "All that was measured of each architecture (the study's table 2)"
    return [{"kind": "heading", "text": heading}, make_table(title, columns, table)]


def asked_again(rows: Rows, trials: Sequence[Trial]) -> list[Block]:
    """Return the study's findings as ratios of this experiment's settings, those that were measured."""

    def find(**wanted: object) -> list[Trial]:
        full = {"server": OURS, "runtime": "process", **wanted}
        missing = {"server": OURS, "runtime": "process"}
        return [t for t in trials if all(t.configuration.get(f, missing.get(f)) == level for f, level in full.items())]

    data = "files" if any(trial.configuration.get("data") == "files" for trial in trials) else "memory"
    batches = sorted({int(trial.configuration.get("batch", 1)) for trial in trials})
    table: list[list[Cell]] = []

    def ask(what: str, study: str, one: Mapping[str, object], two: Mapping[str, object]) -> None:
        cells = []
        for batch in batches:
            pairs = [(a, b) for a in find(batch=batch, **one) for b in find(batch=batch, **two)]
            cells.append(rows.ratio(*pairs[0]) if pairs else text_cell("–"))
        if any("cite" in cell for cell in cells):
            table.append([text_cell(what), text_cell(study), *cells])

    simple: dict[str, object] = {"architecture": "simple", "interaction": "sync", "data": data}

    def remote(architecture: str, transport: str, interaction: str) -> dict[str, object]:
        return {"architecture": architecture, "transport": transport, "interaction": interaction, "data": data}

    ask(
        "simple, pictures in memory ÷ from files",
        "far ahead",
        {**simple, "data": "memory"},
        {**simple, "data": "files"},
    )
    for architecture in ("microservice", "distributed"):
        ask(f"{architecture} http sync ÷ simple sync", "slower", remote(architecture, "http", "sync"), simple)
        ask(f"{architecture} grpc async ÷ simple sync", "faster", remote(architecture, "grpc", "async"), simple)
        ask(
            f"{architecture} grpc, async ÷ sync",
            "faster",
            remote(architecture, "grpc", "async"),
            remote(architecture, "grpc", "sync"),
        )
    ask(
        "grpc async, distributed ÷ microservice",
        "slower past 10 pictures",
        remote("distributed", "grpc", "async"),
        remote("microservice", "grpc", "async"),
    )
    ask(
        "microservice sync, shm ÷ grpc",
        "not tried",
        remote("microservice", "shm", "sync"),
        remote("microservice", "grpc", "sync"),
    )
    for transport in ("http", "grpc"):
        boxed = remote("microservice", transport, "async")
        ask(f"microservice {transport} async, container ÷ process", "not tried", {**boxed, "runtime": "container"}, boxed)
    if not table:
        return []
    table += _memory_again(find, data, batches)
    columns = ["ratio of rates (95 %)", "the study", *(f"batch {batch}" for batch in batches)]
    return [
        {"kind": "heading", "text": "What the study found, asked again"},
        make_table(f"Pictures from {data} unless it says otherwise", columns, table),
    ]


def _memory_again(find: Callable[..., list[Trial]], data: str, batches: Sequence[int]) -> list[list[Cell]]:
    """Return the row on what asynchronous calls cost the server in memory."""
    cells = []
    for batch in batches:
        held = [
            trial.metrics["server_memory_bytes"].mean
            for how in ("async", "sync")
            for trial in find(architecture="microservice", transport="grpc", interaction=how, data=data, batch=batch)[:1]
            if "server_memory_bytes" in trial.metrics
        ]
        cells.append(text_cell(f"{held[0] / held[1]:.2f}×" if len(held) == 2 and held[1] > 0 else "–"))
    if all(cell["text"] == "–" for cell in cells):
        return []
    return [[text_cell("server memory, microservice grpc, async ÷ sync"), text_cell("4–4.4× at batch 1"), *cells]]


def bottleneck_table(rows: Rows, trials: Sequence[Trial], found: Mapping[str, Bottleneck]) -> list[Block]:
    """Return what bounds every setting, in one table that opens by a click."""
    table: list[list[Cell]] = []
    for trial in trials:
        one = found.get(trial.id)
        if one is None:
            continue
        gain = text_cell("–")
        if one.gain is not None:
            gain = rows.ratio(next(other for other in trials if other.id == one.gain.trial), trial)
            gain = {**gain, "text": f"{one.gain.change}: {gain['text']}"}
        most = "–" if one.at_most is None else f"{one.at_most:.3g}×"
        cells = [setting(trial.configuration), one.why, one.change, most]
        table.append([*(text_cell(text) for text in cells), gain])
    columns = [
        "setting",
        "what bounds it, and by what that is seen",
        "what to change",
        "to win at most, at this batch",
        "measured with one change",
    ]
    title = "What bounds each setting"
    return [make_table(title, columns, table, most=_MOST, folded=len(table) > _FOLD_ABOVE)] if table else []


def forecast_table(rows: Rows, trials: Sequence[Trial]) -> list[Block]:
    """Return what was foretold over the declared link beside what was measured over it; none without forecasts."""
    table: list[list[Cell]] = []
    for trial in (trial for trial in trials if CURVE in trial.curves):
        value, low, high = trial.curves[CURVE]
        told = [
            {"value": one, "text": show("images_per_s", one), "cite": {"trial": trial.id, "curve": CURVE, "index": index}}
            for index, one in enumerate((value, low, high))
        ]
        mean = trial.metrics["images_per_s"].mean
        bound = _FORETOLD.search(trial.note)
        off = f"{value / mean - 1:+.0%}, {'inside' if low <= mean <= high else 'outside'}" if mean else "–"
        cells = [text_cell(setting(trial.configuration)), *told, text_cell(bound[1] if bound else "–")]
        table.append([*cells, rows.trial(trial, "images_per_s"), text_cell(off)])
    if not table:
        return []
    text = (
        "Foretold from the microservice's settings of the same transport, batch and data, the bytes of request and answer, and "
        "what TCP allows (docs/links.md). There application and server share the server's node, here each has its own: where "
        "the microservice fills its cores, more than foretold may come."
    )
    columns = ["setting", "foretold", "low", "high", "bounded by", "measured", "foretold is off by; the measured lies"]
    return [{"kind": "text", "text": text}, make_table("Images/s over the declared link", columns, table)]


def open_table(rows: Rows, trials: Sequence[Trial]) -> list[Block]:
    """Return the settings that were measured under open load."""
    metrics = metrics_present(trials, ("offered_per_s", "images_per_s", "p50_s", "p99_s"))
    table = [
        [text_cell(setting(trial.configuration)), *(_cell(rows, trial, metric) for metric in metrics)]
        for trial in in_order(trials)
    ]
    columns = ["setting", *(words(metric) for metric in metrics)]
    return [make_table("Open load", columns, table, most=_MOST, folded=len(table) > _FOLD_ABOVE)] if table else []


def setting_tables(rows: Rows, trials: Sequence[Trial], pairs: Sequence[Paired] = ()) -> list[Block]:
    """Return all metrics of all settings under closed load, in tables of a few columns.

    pairs: settings held against the first of their batch; the first table has them as a column.
    """
    blocks: list[Block] = []
    held = {pair.trial: rows.paired(pair) for pair in pairs}
    firsts = {pair.against for pair in pairs}
    for title, order in _TABLES:
        metrics = metrics_present(trials, order)
        table = [
            [text_cell(setting(trial.configuration)), text_cell(trial.id), *(_cell(rows, trial, metric) for metric in metrics)]
            for trial in trials
        ]
        if metrics and table:
            columns = ["setting", "trial", *(words(metric) for metric in metrics)]
            if held and not blocks:
                columns.append("÷ the first of its batch ± standard error")
                for trial, row in zip(trials, table, strict=True):
                    row.append(held.get(trial.id, text_cell("the first" if trial.id in firsts else "–")))
            blocks.append(make_table(title, columns, table, most=_MOST, folded=len(table) > _FOLD_ABOVE))
    return blocks


def _cell(rows: Rows, trial: Trial, metric: str) -> Cell:
    return rows.trial(trial, metric) if metric in trial.metrics else text_cell("–")


def _error(trial: Trial) -> str:
    summary = trial.metrics["images_per_s"]
    return f"{100 * summary.standard_error / summary.mean:.2g} %" if summary.n > 1 and summary.mean else "–"
