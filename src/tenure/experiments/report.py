"""The report of a run: one HTML file that needs nothing else, and the same content as JSON.

    ReportData ── build_report ──► report (plain data, every figure cites its ledger row) ── render_html ──► page

The page holds no script and no link to elsewhere; names from job files are escaped. Runs that failed half-way are
reported as far as they came. What goes into a section is in `report_sections`, plots in `report_figures` and `plots`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tenure.experiments.bench_report import bench_cards, bench_data, bench_outcome
from tenure.experiments.plots import draw
from tenure.experiments.report_cite import ReportData, Rows, label, show
from tenure.experiments.report_figures import lease_figures
from tenure.experiments.report_sections import bounds_blocks, compare, stage_blocks
from tenure.experiments.search_report import search_outcome
from tenure.resources import show_bytes
from tenure.runs import RunState, Stage

__all__ = ["ReportData", "build_report", "figures", "render_html", "write_pages", "write_report"]

FORMAT = 1
"""Grows when a reader of the JSON file must change."""
_CLOSING = (
    "Values are means ± standard error of n repeats. Hover over a figure in a table to see the ledger row it comes from; the "
    "JSON file beside this page cites the row of every table cell and plotted point."
)


def build_report(data: ReportData) -> dict[str, Any]:
    """Return the report as plain data, ready for JSON: header, cards, one section per stage, leases, closing lines."""
    rows = Rows(data)
    sections = [
        {
            "name": stage.name,
            "title": f"{stage.name} ({stage.kind})" if stage.name != stage.kind else stage.name,
            "state": str(stage.state),
            "blocks": stage_blocks(rows, stage),
            "experiment": bench_data(rows, stage),
        }
        for stage in data.run.stages
    ]
    leases = [{"kind": "figure", "figure": figure} for figure in lease_figures(rows)] + bounds_blocks(rows)
    return {
        "format": FORMAT,
        "header": _header(data),
        "cards": _cards(rows),
        "sections": sections,
        "leases": leases,
        "notes": list(data.notes),
        "closing": _CLOSING,
    }


def figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all figures of a report, in the page's order."""
    blocks = [block for section in report["sections"] for block in section["blocks"]] + report["leases"]
    return [block["figure"] for block in blocks if block["kind"] == "figure"]


def render_html(report: Mapping[str, Any]) -> str:
    """Return the page: one HTML document with inline CSS and SVG, no script, nothing loaded from elsewhere."""
    import jinja2  # heavy: only where a page is made

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    drawn = {figure["id"]: draw(figure) for figure in figures(report)}
    return environment.get_template("report.html").render(report=report, svg=drawn, cited=_cited)


def write_report(data: ReportData, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into the folder, each at once or not at all; return their paths."""
    return write_pages(build_report(data), folder)


def write_pages(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write a report that is already plain data, as `write_report` does; return the paths of its HTML and JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    page, plain = folder / "report.html", folder / "report.json"
    _replace(page, render_html(report))
    _replace(plain, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return page, plain


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _cited(cell: Mapping[str, Any]) -> str:
    """Return where a cell comes from, for its tooltip."""
    return ", ".join(f"{key} {value}" for key, value in cell.get("cite", {}).items())


def _header(data: ReportData) -> dict[str, Any]:
    run = data.run
    machine = data.node.machine if data.node else (data.trials[0].machine if data.trials else None)
    facts = [
        ("run", run.id),
        ("tenant", run.tenant),
        ("started", _date(run.created_at_s)),
        ("report made", _date(data.at_s)),
    ]
    if machine is not None:
        facts.append(("machine", f"{machine.cpu_model}, {machine.cores} cores, {show_bytes(machine.memory_bytes)}"))
        facts.append(("features", " ".join(machine.cpu_features) or "–"))
        facts.append(("GPU", f"{machine.gpus}× {machine.gpu_model}" if machine.gpus else "none"))
        facts.append(("system", f"Linux {machine.kernel}, Python {machine.python}"))
    versions = data.versions or (data.trials[-1].versions if data.trials else {})
    seeds = sorted({trial.seed for trial in data.trials})
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "–"))
    facts.append(("seed", ", ".join(str(seed) for seed in seeds) or "–"))
    return {
        "title": run.name,
        "state": str(run.state),
        "facts": [{"name": name, "text": text} for name, text in facts if text],
        "outcome": _outcome(data),
    }


def _date(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at_s else "–"


def _outcome(data: ReportData) -> str:
    """Return one closing sentence: what came of the run."""
    run = data.run
    broken = [stage for stage in run.stages if stage.state in (RunState.FAILED, RunState.CANCELLED)]
    if broken:
        stage = broken[0]
        return f"Stage {stage.name} {stage.state}: {stage.detail or 'no reason was recorded'}"
    missed = [recommendation for recommendation in data.recommendations if recommendation.chosen is None]
    if missed:
        return f"No configuration meets the goal of stage {missed[0].stage}: {missed[0].goal}."
    if run.state is RunState.DONE:
        tellers = (bench_outcome, search_outcome)
        found = [sentence for stage in run.stages for tell in tellers if (sentence := tell(Rows(data), stage))]
        if found:
            return found[0]
        done = f"All {len(run.stages)} stages are done" if len(run.stages) != 1 else "The stage is done"
        return f"{done}; {len(data.trials)} trials were made and {len(data.leases)} leases were granted and ended."
    return f"The run is {run.state}: this report shows what it has so far."


def _cards(rows: Rows) -> list[dict[str, Any]]:
    """Return the few figures that a reader wants first, each cited."""
    cards: list[dict[str, Any]] = []
    for stage in rows.data.run.stages:
        cards += _stage_cards(rows, stage)
    return cards


def _stage_cards(rows: Rows, stage: Stage) -> list[dict[str, Any]]:
    trials, recommendations, _ = rows.of_stage(stage)
    cards = bench_cards(rows, stage)
    for recommendation in recommendations:
        if recommendation.chosen is not None:
            goal = recommendation.goal or stage.name
            cards.append({"name": f"recommended for: {goal}", "text": label(recommendation.chosen.configuration), "cite": {}})
    observed = [trial for trial in trials if trial.source == "observed"]
    for metric, name in (("accuracy", "held-out accuracy"), ("time_s", "time to the goal"), ("cost_usd", "cost of training")):
        found = [trial for trial in observed if metric in trial.metrics]
        if found and stage.kind == "train":
            cell = rows.trial(found[-1], metric)
            cards.append({"name": name, "text": show(metric, cell["value"]), "value": cell["value"], "cite": cell["cite"]})
    compared = compare(rows, trials, recommendations)
    if compared:
        missed = sum(1 for row in compared if row["sentence"]["text"])
        text = f"{len(compared) - missed} of {len(compared)}"
        cards.append({"name": f"{stage.name}: predictions within 25 %", "text": text, "cite": {}})
    return cards
