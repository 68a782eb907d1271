"""The report of a replay: the answer first, then policy beside policy over time and by tenant, with the spread over seeds.

Same page and figures as a run's report (`report`, `plots`); plain data in, plain data out, no clock: equal replays give equal
bytes. Not here: what a run counts (`replay_figures`, `replay_fill`), which policy is best (`replay_compare`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tenure.experiments.replay import LEFT_OUT, Replay, code_digest
from tenure.experiments.replay_compare import FILLED, TIMED, Measure, Results, answer, count, percent, ranked, with_spread
from tenure.experiments.replay_figures import mean, show_time
from tenure.experiments.replay_outlook import outlook_blocks
from tenure.resources import format_duration, show_bytes

Block = dict[str, Any]
FORMAT = 1
"""Grows when a reader of the JSON file must change."""
_GRID = 160
_MAX_TENANTS = 16
_FOLD_ABOVE = 12
_ONLY_IF_ANY = ("restarts", "dropped", "unfinished")
"""Columns that are left out while they hold nothing but 0."""
_SPREAD = "± is the standard deviation over the seeds; bands and whiskers reach from the least to the most of them."
_NO_SPREAD = "One run per policy: --seeds N would show the spread."
_FAIR_TIMED = "fairness: Jain's index of the tenants' stretch, 1 when all wait alike"
_FAIR_FILLED = "fairness: Jain's index of the share of what it asked for that each tenant got"


def measures_of(replay: Replay) -> Sequence[Measure]:
    """Return what the policies of this replay are compared by, the deciding one first."""
    return TIMED if replay.fill_percent is None else FILLED


def build_replay_report(replay: Replay, results: Results) -> dict[str, Any]:
    """Return the report as plain data, in the form of `report.build_report`."""
    measures = measures_of(replay)
    filled = replay.fill_percent is not None
    sections = [
        _section("Policy beside policy", [_table(replay, results, measures)]),
        _section("While the fleet fills" if filled else "Over time", _curves(replay, results)),
        _section("Tenants", _tenants(replay, results)),
        *([] if filled else [_section("What could be foretold", outlook_blocks(replay))]),
        _section("What was replayed, and how", _how(replay)),
    ]
    return {
        "format": FORMAT,
        "kind": "replay",
        "header": {
            "title": f"Replay of {replay.trace.name}",
            "state": "done",
            "outcome": answer(results, measures[0]),
            "facts": _facts(replay),
        },
        "cards": _cards(results, measures[0]),
        "sections": sections,
        "leases": [],
        "notes": [],
        "closing": _SPREAD if replay.seeds > 1 else _NO_SPREAD,
        "results": {label: [dict(result) for result in runs] for label, runs in results.items()},
    }


def _section(title: str, blocks: list[Block]) -> dict[str, Any]:
    return {"name": title.lower(), "title": title, "state": "", "blocks": blocks}


def _cards(results: Results, measure: Measure) -> list[dict[str, Any]]:
    return [
        {"name": f"{label}: {measure.name}", "text": with_spread(measure.of(results, label), measure), "cite": {}}
        for label in ranked(results, measure)[:6]
    ]


def _facts(replay: Replay) -> list[dict[str, str]]:
    capacities = [node.capacity for node in replay.fleet]
    held = f"{sum(len(one.gpus) for one in capacities):,} GPUs, {sum(one.cpus for one in capacities):,.0f} CPUs"
    memory = show_bytes(sum(one.memory_bytes for one in capacities))
    nodes = f"{len(capacities):,} node{'s' if len(capacities) != 1 else ''} of {replay.fleet_name}"
    tenants = len({job.tenant for job in replay.trace.jobs})
    jobs = f"{len(replay.trace.jobs):,} jobs of {tenants:,} tenant{'s' if tenants != 1 else ''}"
    facts = {
        "trace": f"{replay.trace.name}: {jobs}",
        "nodes": f"{nodes}: {held}, {memory}",
        "seeds": f"0 to {replay.seeds - 1}" if replay.seeds > 1 else "0",
        "trace hash": replay.trace.digest()[:16],
        "code hash": code_digest()[:16],
    }
    return [{"name": name, "text": text} for name, text in facts.items()]


def _unit(replay: Replay) -> str:
    return "GPUs" if any(node.capacity.gpus for node in replay.fleet) else "CPUs"


def _table(replay: Replay, results: Results, measures: Sequence[Measure]) -> Block:
    measures = [one for one in measures if one.key not in _ONLY_IF_ANY or any(sum(one.of(results, x)) for x in results)]
    rows = [
        [{"text": label}, *({"text": with_spread(measure.of(results, label), measure)} for measure in measures)]
        for label in ranked(results, measures[0])
    ]
    unit, spread = _unit(replay), f" Means over {replay.seeds} seeds." if replay.seeds > 1 else ""
    note = (
        f"Best first, by {measures[0].name}.{spread} Completion counts from submission; allocation: share of the {unit} while "
        f"jobs came; {_FAIR_TIMED}; dropped: jobs that the fleet could never hold."
        if replay.fill_percent is None
        else f"Best first.{spread} Shares of the fleet's {unit}; idle and unusable: GPUs that are free and that the average "
        f"request of the trace could not take; {_FAIR_FILLED}."
    )
    return _as_table("The answer", ["policy", *(measure.name for measure in measures)], rows, note=note)


def _as_table(title: str, columns: Sequence[str], rows: list[list[dict[str, str]]], *, note: str = "") -> Block:
    folded = len(rows) > _FOLD_ABOVE
    return {"kind": "table", "title": title, "columns": list(columns), "rows": rows, "note": note, "folded": folded}


def _curves(replay: Replay, results: Results) -> list[Block]:
    unit = _unit(replay)
    last = max(run["series"]["x"][-1] for runs in results.values() for run in runs)
    low = 0.0
    if replay.fill_percent is not None:
        x_label, x_scale = f"{unit} asked for, % of the fleet", 0.01
        low = max(0.0, min(0.8, last - 0.3))
        drawn = [
            (
                "allocated",
                "Allocation",
                f"Share of the fleet's {unit} in use, from where it begins to be full.",
                "% allocated",
                0.01,
            ),
            (
                "fragmentation",
                "Fragmentation",
                "GPUs that are free and that the average request of the trace could not take.",
                "% of the fleet's GPUs",
                0.01,
            ),
        ]
    else:
        x_scale, name = next(
            ((one, name) for name, one in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)) if last > 3 * one),
            (1.0, "seconds"),
        )
        x_label = f"{name} since the first job"
        drawn = [
            ("allocated", "Allocation", f"Share of the fleet's {unit} that leases hold.", "% allocated", 0.01),
            ("waiting", "Waiting", f"{unit} that jobs in the queue ask for.", f"{unit} waited for", 1.0),
            (
                "fragmentation",
                "Fragmentation",
                f"Share of the free {unit} on nodes with too little of it for the largest member that waits; 0: none waits.",
                "% of what is free",
                0.01,
            ),
        ]
    blocks: list[Block] = []
    for key, title, alt, y_label, scale in drawn:
        grid = np.linspace(low if key == "allocated" else 0.0, last, _GRID)
        figure = {
            "id": f"replay-{key}",
            "title": title,
            "alt": alt,
            "kind": "lines",
            "series": [
                {"name": label, "points": _band(grid, runs, key, x_scale, steps=replay.fill_percent is None)}
                for label, runs in results.items()
            ],
            "x_label": x_label,
            "y_label": y_label,
            "scale": scale,
            "from_zero": not low or key != "allocated",
        }
        blocks.append({"kind": "figure", "figure": figure})
    return blocks


def _band(
    grid: np.ndarray[Any, Any], runs: Sequence[Mapping[str, Any]], key: str, x_scale: float, *, steps: bool
) -> list[dict[str, float]]:
    """Return the mean of the runs' curves with their least and most. Before a curve begins it is 0; later its last value.

    steps: a value holds until the next one; else what lies between is a straight line.
    """
    curves = []
    for run in runs:
        xs, ys = np.array(run["series"]["x"]), np.array(run["series"][key])
        curves.append(np.array([0.0, *ys])[np.searchsorted(xs, grid, side="right")] if steps else np.interp(grid, xs, ys))
    found = np.array(curves)
    columns = zip(grid / x_scale, found.mean(axis=0), found.min(axis=0), found.max(axis=0), strict=True)
    points = [{"x": float(x), "y": float(y), "low": float(low), "high": float(high)} for x, y, low, high in columns]
    return points if len(runs) > 1 else [{"x": point["x"], "y": point["y"]} for point in points]


def _tenants(replay: Replay, results: Results) -> list[Block]:
    timed = replay.fill_percent is None
    weight, shown = ("service", "stretch") if timed else ("asked", "served")
    first = next(iter(results.values()))[0]["tenants"]
    names = sorted(first, key=lambda name: (-first[name][weight], name))[:_MAX_TENANTS]
    series = []
    for label, runs in results.items():
        found = {name: [run["tenants"][name][shown] for run in runs if name in run["tenants"]] for name in names}
        points = [{"x": name, "y": mean(values), "low": min(values), "high": max(values)} for name, values in found.items()]
        series.append({"name": label, "points": points})
    figure = {
        "id": "replay-tenants",
        "title": "Stretch by tenant" if timed else "Share of what was asked for, by tenant",
        "alt": "Seconds from submission to completion per second of service, a tenant's jobs together: 1 is no wait at all."
        if timed
        else "Of what a tenant asked for, the share that was placed.",
        "kind": "hbars",
        "series": series,
        "x_label": "seconds per second of service" if timed else "% of what was asked for",
        "scale": 1.0 if timed else 0.01,
    }
    rows = [_tenant_row(name, label, runs, timed=timed) for name in names for label, runs in results.items()]
    columns = ("jobs", "mean completion", "mean first wait", "longest first wait", "stretch") if timed else ("asked", "placed")
    blocks: list[Block] = [
        {"kind": "figure", "figure": figure},
        _as_table("Each tenant under each policy", ["tenant", "policy", *columns], rows),
    ]
    if len(first) > len(names):
        blocks.append({"kind": "small", "text": f"The {len(names)} largest of {len(first):,} tenants; the JSON file has all."})
    return blocks


def _tenant_row(name: str, label: str, runs: Sequence[Mapping[str, Any]], *, timed: bool) -> list[dict[str, str]]:
    mine = [run["tenants"][name] for run in runs if name in run["tenants"]]
    means = {key: mean([one[key] for one in mine]) for key in mine[0]}
    texts = (
        [
            count(means["jobs"]),
            show_time(means["mean_completion_s"]),
            show_time(means["mean_wait_s"]),
            show_time(max(one["max_wait_s"] for one in mine)),
            f"{means['stretch']:.2f}",
        ]
        if timed
        else [f"{means['asked']:,.1f}", percent(means["served"])]
    )
    return [{"text": text} for text in (name, label, *texts)]


def _how(replay: Replay) -> list[Block]:
    rows = [[{"text": tried.label}, {"text": tried.means(fill=replay.fill_percent is not None)}] for tried in replay.policies]
    blocks: list[Block] = [_as_table("Policies", ["name", "what it does"], rows)]
    if replay.fill_percent is None:
        slot, restart = format_duration(replay.slot_s), format_duration(replay.restart_s)
        texts = [
            f"Jobs come when the trace says and run under leases of {slot}, which then renew or give way; each start of a job "
            f"after its first costs {restart}. The broker's own deciders choose; no job's duration reaches them. The run lasts "
            "until the last job is done."
        ]
        if replay.seeds > 1:
            texts.append(
                f"Seed 0 is the trace as it is; each other seed leaves out a random {100 * LEFT_OUT:.0f} % of the jobs."
            )
    else:
        texts = [
            f"Jobs come one by one onto the empty fleet and stay, until they have asked for {replay.fill_percent:g} % of it: "
            "the whole trace, then jobs drawn from it with replacement, shuffled by the seed. What fits nowhere is dropped. "
            "Every policy knows beforehand how often the trace asks for what."
        ]
    return blocks + [{"kind": "text", "text": text} for text in (*texts, *replay.trace.notes)]
