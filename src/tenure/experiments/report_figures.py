"""The figures of a report as plain data: every point holds its value in base units and the ledger row it comes from.

Their form is in `report_points`, how they are drawn in `plots`. Figures without points are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tenure.events import Event
from tenure.experiments.report_cite import Cell, Rows, label, show, words
from tenure.experiments.report_points import Figure, has_points, make_figure, make_level, make_point
from tenure.leases import Lease
from tenure.resources import Envelope
from tenure.runs import Stage
from tenure.trials import Candidate, Recommendation, Trial

MIB = float(1 << 20)
_MAX_CANDIDATES = 14
_MAX_SPANS = 60


def training_figures(rows: Rows, stage: Stage) -> list[Figure]:
    """Return learning curve, memory, round time and cost of one training stage, those that have data."""
    trials, recommendations, leases = rows.of_stage(stage)
    made = [
        _learning_curve(rows, stage, trials),
        _memory_peaks(rows, stage, trials, leases),
        _memory_over_time(rows, stage, leases),
        _round_time(rows, stage, trials, recommendations),
        *(_cost(rows, stage, recommendation) for recommendation in recommendations),
    ]
    return [figure for figure in made if has_points(figure)]


def serving_figures(rows: Rows, stage: Stage) -> list[Figure]:
    """Return throughput, latency and CPU per image of the architectures, and the cost of each goal's candidates."""
    trials, recommendations, _ = rows.of_stage(stage)
    measured = [
        trial
        for trial in trials
        if "architecture" in trial.configuration and trial.source == "probe" and trial.configuration.get("clients", 1) == 1
    ]
    made = [
        *(_throughput(rows, stage, measured, interaction) for interaction in _levels(measured, "interaction")),
        _latency(rows, stage, measured),
        _cpu_by_party(rows, stage, measured),
        *(_cost(rows, stage, recommendation) for recommendation in recommendations),
    ]
    return [figure for figure in made if has_points(figure)]


def lease_figures(rows: Rows) -> list[Figure]:
    """Return the timeline of the run's leases, from its events."""
    figure = _timeline(rows)
    return [figure] if has_points(figure) else []


def comparison_figures(stage: Stage, compared: Sequence[Mapping[str, Cell]]) -> list[Figure]:
    """Return observed over predicted for the rows of a comparison table (`report_sections.compare`)."""
    points = [
        {
            "x": row["what"]["text"],
            "y": row["observed"]["value"],
            "cite": row["observed"]["cite"],
            "predicted": row["predicted"]["value"],
            "cite_predicted": row["predicted"]["cite"],
            "low": row["low"]["value"],
            "high": row["high"]["value"],
            "cite_low": row["low"]["cite"],
            "cite_high": row["high"]["cite"],
        }
        for row in compared
    ]
    figure = make_figure(
        f"{stage.name}-compared",
        "ratios",
        "Predicted against observed",
        "Observed value divided by the predicted one, per metric; the bar is the predicted interval.",
        x_label="observed ÷ predicted",
        series=[{"name": "observed", "points": points}],
    )
    return [figure] if points else []


def _levels(trials: Iterable[Trial], factor: str) -> list[Any]:
    return sorted({trial.configuration[factor] for trial in trials if factor in trial.configuration})


def _named(trial: Trial, seen: dict[str, int]) -> str:
    """Return a name of a trial that no other trial of the figure has."""
    name = f"{trial.source}: {label(trial.configuration)}"
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name} (#{seen[name]})"


def _learning_curve(rows: Rows, stage: Stage, trials: Sequence[Trial]) -> Figure:
    series, seen = [], dict[str, int]()
    for trial in trials:
        length = min(len(trial.curves.get("accuracy", ())), len(trial.curves.get("round", ())))
        points = []
        for index in range(length):
            along = rows.curve(trial, "round", index)
            points.append(make_point(along["value"], rows.curve(trial, "accuracy", index), cite_x=along["cite"]))
        if points:
            series.append({"name": _named(trial, seen), "points": points})
    goal = rows.job(stage.name, "train_goal.accuracy")
    return make_figure(
        f"{stage.name}-learning",
        "lines",
        "Learning curve",
        "Accuracy on held-out examples by round, for each probe and for the real run.",
        x_label="round",
        y_label="held-out accuracy",
        from_zero=False,
        series=[*series, *(make_level("goal", goal, "goal") if series else [])],
    )


def _memory_peaks(rows: Rows, stage: Stage, trials: Sequence[Trial], leases: Sequence[Lease]) -> Figure:
    seen = dict[str, int]()
    points = [
        make_point(_named(trial, seen), rows.trial(trial, "peak_memory_bytes"))
        for trial in trials
        if "peak_memory_bytes" in trial.metrics
    ]
    gang = [lease for lease in _workers(leases) if lease.starts_at_s]
    granted = rows.lease(gang[-1], "envelope.memory_bytes") if gang else None
    return make_figure(
        f"{stage.name}-memory",
        "hbars",
        "Peak memory against the envelope",
        "Highest memory of one worker in each trial; the dashed line is the envelope that was granted per worker.",
        x_label="MiB, highest worker",
        scale=MIB,
        series=[{"name": "peak memory", "points": points}, *make_level("envelope granted", granted, "envelope")],
    )


def _workers(leases: Sequence[Lease]) -> list[Lease]:
    """Return the leases that trained: those of a gang whose command is started by events, not that of the export."""
    gang = [lease for lease in leases if lease.gang_id]
    return [lease for lease in gang if lease.command.on_event] or gang or list(leases)


def _memory_over_time(rows: Rows, stage: Stage, leases: Sequence[Lease]) -> Figure:
    series: list[dict[str, Any]] = []
    gang = _workers(leases)
    for lease in gang[-8:]:
        points = [make_point(at_s, cell) for at_s, cell in rows.usage(lease, "memory_bytes")]
        series.append({"name": f"worker {lease.worker}", "points": points})
    starts = [point["x"] for one in series for point in one["points"]]
    envelope = rows.lease(gang[-1], "envelope.memory_bytes") if gang and starts else None
    return make_figure(
        f"{stage.name}-memory-time",
        "lines",
        "Memory over time",
        "Memory of each worker of the gang from its first sample on; the dashed line is the envelope.",
        x_label="seconds",
        y_label="MiB",
        scale=MIB,
        x_origin=min(starts, default=0.0),
        series=[*series, *make_level("envelope granted", envelope, "envelope")],
    )


def _round_time(rows: Rows, stage: Stage, trials: Sequence[Trial], recommendations: Sequence[Recommendation]) -> Figure:
    predicted: dict[float, list[dict[str, Any]]] = {}
    for recommendation in recommendations:
        for index, candidate in _candidates(recommendation):
            if "round_s" not in candidate.predictions or "workers" not in candidate.configuration:
                continue
            low, high = (rows.prediction(recommendation, index, "round_s", part) for part in ("low", "high"))
            point = make_point(
                candidate.configuration["workers"],
                rows.prediction(recommendation, index, "round_s"),
                low=low["value"],
                high=high["value"],
                cite_low=low["cite"],
                cite_high=high["cite"],
            )
            predicted.setdefault(float(candidate.configuration.get("cpus", 1.0)), []).append(point)
    series: list[dict[str, Any]] = [
        {"name": f"predicted, {cpus:g} cpu each", "points": sorted(points, key=lambda point: float(point["x"]))}
        for cpus, points in sorted(predicted.items(), reverse=True)
    ]
    for source, name in (("probe", "probe"), ("observed", "observed")):
        points = []
        for trial in trials:
            if trial.source == source and "round_s" in trial.metrics and "workers" in trial.configuration:
                workers = rows.factor(trial, "workers")
                points.append(make_point(workers["value"], rows.trial(trial, "round_s"), cite_x=workers["cite"]))
        series.append({"name": f"measured: {name}", "style": "points", "points": points})
    return make_figure(
        f"{stage.name}-round",
        "lines",
        "Time of one round by workers",
        "Predicted time of one round with its interval, by number of workers, and what probes and the real run measured.",
        x_label="workers",
        whole=True,
        y_label="ms per round",
        scale=1e-3,
        series=series,
    )


def _candidates(recommendation: Recommendation) -> list[tuple[int, Candidate]]:
    chosen = [(-1, recommendation.chosen)] if recommendation.chosen else []
    return [*chosen, *enumerate(recommendation.ruled_out)]


def _cost(rows: Rows, stage: Stage, recommendation: Recommendation) -> Figure:
    priced = [
        (candidate.predictions[metric].value, index, candidate, metric)
        for index, candidate in _candidates(recommendation)
        for metric in [next((name for name in candidate.predictions if name.startswith("cost_usd")), "")]
        if metric
    ]
    priced.sort(key=lambda entry: (entry[1] >= 0, entry[0]))
    kept = sorted(priced[:_MAX_CANDIDATES], key=lambda entry: entry[0])
    series: dict[str, list[dict[str, Any]]] = {"chosen": [], "costs more": [], "breaks a constraint": []}
    order = []
    for _, index, candidate, metric in kept:
        low, high = (rows.prediction(recommendation, index, metric, part) for part in ("low", "high"))
        name = label(candidate.configuration)
        name += f" ({_size(candidate.envelope)})" if candidate.envelope and name in order else ""
        point = make_point(
            name,
            rows.prediction(recommendation, index, metric),
            low=low["value"],
            high=high["value"],
            cite_low=low["cite"],
            cite_high=high["cite"],
        )
        series[_standing(index, candidate)].append(point)
        order.append(name)
    hourly = stage.kind == "serve" or (bool(kept) and "hour" in kept[0][3])
    scale, unit = _money(max((entry[0] for entry in kept), default=0.0))
    return make_figure(
        f"{stage.name}-cost-{recommendation.id}",
        "hbars",
        f"Cost by candidate: {recommendation.goal}" if recommendation.goal else "Cost by candidate",
        "Predicted cost of the cheapest candidates with its interval; colour tells whether they meet the goal.",
        x_label=f"{unit} per hour" if hourly else unit,
        scale=scale,
        stacked=True,
        rows=list(dict.fromkeys(order)),
        series=[{"name": name, "role": name, "points": points} for name, points in series.items()],
    )


def _money(highest_usd: float) -> tuple[float, str]:
    """Return (divisor, unit) that keeps the axis free of powers of ten."""
    for scale, unit in ((1.0, "USD"), (1e-3, "thousandths of a USD"), (1e-6, "millionths of a USD")):
        if highest_usd >= scale:
            return scale, unit
    return 1e-9, "billionths of a USD"


def _size(envelope: Envelope) -> str:
    return show("memory_bytes", envelope.memory_bytes)


def _standing(index: int, candidate: Candidate) -> str:
    if index < 0:
        return "chosen"
    only_cost = all(broken.constraint.startswith("cost_usd") for broken in candidate.broken)
    return "costs more" if candidate.broken and only_cost else "breaks a constraint"


def _without_batch(trial: Trial, *drop: str) -> str:
    return label({key: value for key, value in trial.configuration.items() if key not in ("batch", *drop)})


def _throughput(rows: Rows, stage: Stage, trials: Sequence[Trial], interaction: str) -> Figure:
    series: dict[str, list[dict[str, Any]]] = {}
    for trial in sorted(trials, key=lambda trial: int(trial.configuration.get("batch", 0))):
        if trial.configuration.get("interaction") == interaction and "images_per_s" in trial.metrics:
            batch = rows.factor(trial, "batch")
            point = make_point(f"batch {batch['value']}", rows.trial(trial, "images_per_s"), cite_x=batch["cite"])
            series.setdefault(_without_batch(trial, "interaction"), []).append(point)
    return make_figure(
        f"{stage.name}-throughput-{interaction}",
        "bars",
        f"Throughput by batch, {interaction} calls",
        f"Images per second by batch size for each architecture and transport, {interaction}; whiskers: standard error.",
        y_label="images per second (log)",
        log=True,
        series=[{"name": name, "points": series[name]} for name in sorted(series, key=_architecture_order)],
    )


def _architecture_order(name: str) -> tuple[int, str]:
    order = ("simple", "microservice", "distributed")
    return next((place for place, word in enumerate(order) if name.startswith(word)), len(order)), name


def _smallest_batch(trials: Sequence[Trial]) -> tuple[int, list[Trial]]:
    batches = _levels(trials, "batch")
    batch = int(batches[0]) if batches else 0
    kept = [trial for trial in trials if trial.configuration.get("batch") == batch]
    return batch, sorted(kept, key=lambda trial: _architecture_order(label(trial.configuration)))


def _latency(rows: Rows, stage: Stage, trials: Sequence[Trial]) -> Figure:
    batch, kept = _smallest_batch(trials)
    return make_figure(
        f"{stage.name}-latency",
        "hbars",
        f"Latency of a request, batch {batch}",
        "Median and 99th percentile of a request's latency for each architecture; whiskers: standard error.",
        x_label="ms (log)",
        scale=1e-3,
        log=True,
        series=[
            {
                "name": name,
                "points": [
                    make_point(_without_batch(trial), rows.trial(trial, metric)) for trial in kept if metric in trial.metrics
                ],
            }
            for metric, name in (("p50_s", "p50"), ("p99_s", "p99"))
        ],
    )


def _cpu_by_party(rows: Rows, stage: Stage, trials: Sequence[Trial]) -> Figure:
    batch, kept = _smallest_batch(trials)
    return make_figure(
        f"{stage.name}-cpu",
        "hbars",
        f"CPU time per image by party, batch {batch}",
        "CPU time that the application and the server each spend on one image.",
        x_label="ms of CPU per image",
        scale=1e-3,
        stacked=True,
        series=[
            {
                "name": words(metric).split(" ")[0],
                "points": [
                    make_point(_without_batch(trial), rows.trial(trial, metric)) for trial in kept if metric in trial.metrics
                ],
            }
            for metric in ("app_cpu_s_per_image", "server_cpu_s_per_image")
        ],
    )


def _timeline(rows: Rows) -> Figure:
    begun: dict[str, Event] = {}
    ended: dict[str, Event] = {}
    for event in rows.data.events:
        if event.kind in ("lease.granting", "lease.active"):
            begun.setdefault(event.lease_id, event)
        elif event.kind == "lease.ended":
            ended[event.lease_id] = event
    leases = {lease.id: lease for lease in rows.data.leases}
    spans = sorted((event.at_s, lease_id) for lease_id, event in begun.items() if lease_id in leases)[:_MAX_SPANS]
    series: dict[str, list[dict[str, Any]]] = {}
    for _, lease_id in spans:
        lease = leases[lease_id]
        start = rows.event(begun[lease_id])
        end = rows.event(ended.get(lease_id, rows.data.events[-1]))
        reason = str(lease.end_reason) if lease.end_reason else "still held"
        name = f"{lease.stage} · worker {lease.worker} · {lease.id}"
        series.setdefault(reason, []).append(make_point(name, start, end=end["value"], cite_end=end["cite"]))
    return make_figure(
        "leases",
        "spans",
        "Leases over time",
        "One row per lease from grant to end; colour tells why it ended.",
        x_label="seconds since the first grant",
        origin=spans[0][0] if spans else 0.0,
        rows=[f"{leases[one].stage} · worker {leases[one].worker} · {one}" for _, one in spans],
        series=[{"name": reason, "points": points} for reason, points in series.items()],
    )
