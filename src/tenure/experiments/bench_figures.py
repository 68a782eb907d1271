"""The figures of a serving experiment: the study's figures 4 and 5 made anew, where a request's time goes, who uses what.

Every point is a mean of a sweep trial and cites it. Settings of one figure differ in nothing that it does not show: what they
have in common stands in its words. Open load is never in a figure with closed load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tenure.decide.bottleneck import STAGES
from tenure.decide.stations import OURS
from tenure.experiments.report_cite import Rows, words
from tenure.experiments.report_points import Figure, has_points, make_figure, make_point
from tenure.runs import Stage
from tenure.trials import Configuration, Trial

MIB = float(1 << 20)
ARCHITECTURES = ("simple", "microservice", "distributed")
_TONES = {"simple": 0, "microservice": 1, "distributed": 2}
"""Colours of the architectures, the same in every figure; contenders take those behind them."""
_TRANSPORTS = ("none", "shm", "grpc", "http")


def bench_figures(rows: Rows, stage: Stage, trials: Sequence[Trial], best: Trial | None) -> list[Figure]:
    """Return the figures of closed-loop trials, without twins; best: the setting whose batch the bars are drawn for."""
    if not trials:
        return []
    best = best or max(trials, key=lambda trial: trial.metrics["images_per_s"].mean)
    batch, data = best.configuration.get("batch", 1), best.configuration.get("data", "memory")
    at_batch = [trial for trial in trials if trial.configuration.get("batch", 1) == batch]
    same = [trial for trial in at_batch if trial.configuration.get("data", "memory") == data]
    made = [
        _by_batch(rows, stage, trials, str(data)),
        _by_setting(rows, stage, at_batch, batch),
        *(_stages(rows, stage, same, how, batch) for how in ("sync", "async")),
        _cpu(rows, stage, same, batch),
        _memory(rows, stage, trials, str(data)),
    ]
    return [figure for figure in made if has_points(figure)]


def setting(configuration: Configuration, *, without: Iterable[str] = ()) -> str:
    """Return a setting in one short line, e.g. ``microservice grpc async · batch 8 · files``; without: what all share.

    A contender goes by its name instead of its architecture.
    """
    left_out = set(without)
    architecture, server = str(configuration.get("architecture", "")), str(configuration.get("server", OURS))
    how = [str(configuration.get(factor, "")) for factor in ("transport", "interaction") if factor not in left_out]
    boxed = "in a container" if configuration.get("runtime") == "container" else ""
    first = " ".join(part for part in (architecture if server == OURS else server, *how, boxed) if part and part != "none")
    more = [f"batch {configuration['batch']}"] if "batch" in configuration and "batch" not in left_out else []
    more += [str(configuration["data"])] if "data" in configuration and "data" not in left_out else []
    more += [f"{configuration['clients']} clients"] if configuration.get("clients", 1) != 1 else []
    return " · ".join([first, *more])


def in_order(trials: Iterable[Trial]) -> list[Trial]:
    """Return trials in the order in which people look for them: architecture, transport, calls, data, batch."""

    def key(trial: Trial) -> tuple[object, ...]:
        factors = trial.configuration
        architecture, server = str(factors.get("architecture", "")), str(factors.get("server", OURS))
        return (
            _place(ARCHITECTURES, architecture),
            (server != OURS, server),
            str(factors.get("runtime", "process")) != "process",
            _place(_TRANSPORTS, str(factors.get("transport", "none"))),
            str(factors.get("interaction", "")) != "sync",
            str(factors.get("data", "")),
            int(factors.get("batch", 1)),
        )

    return sorted(trials, key=key)


def shown_modes(trials: Sequence[Trial], data: str) -> list[list[Trial]]:
    """Return one group of trials per architecture and contender, over batches: the mode that the study's figure 4 shows.

    In the simple architecture synchronous calls; elsewhere asynchronous ones over gRPC. What was not measured that way is
    shown in the mode in which it was fastest.
    """
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[Trial]]] = {}
    for trial in trials:
        factors = trial.configuration
        if factors.get("data", "memory") == data:
            mode = (str(factors.get("transport", "none")), str(factors.get("interaction", "sync")))
            place = tuple(str(factors.get(*one)) for one in (("architecture", ""), ("server", OURS), ("runtime", "process")))
            groups.setdefault(place, {}).setdefault(mode, []).append(trial)
    chosen = []
    for place, modes in groups.items():
        wanted = ("none", "sync") if place[0] == "simple" else ("grpc", "async")
        fastest = max(modes, key=lambda mode: max(trial.metrics["images_per_s"].mean for trial in modes[mode]))
        chosen.append(modes.get(wanted) or modes[fastest])
    first = in_order(group[0] for group in chosen)
    return sorted(chosen, key=lambda group: first.index(group[0]))


def _by_batch(rows: Rows, stage: Stage, trials: Sequence[Trial], data: str) -> Figure:
    series: list[dict[str, Any]] = []
    for group in shown_modes(trials, data):
        points = []
        for trial in (trial for trial in in_order(group) if "batch" in trial.configuration):
            along = rows.factor(trial, "batch")
            points.append(make_point(along["value"], rows.trial(trial, "images_per_s"), cite_x=along["cite"]))
        name, tone = setting(group[0].configuration, without=("batch", "data")), _tone(group[0], trials)
        series.append({"name": name, "tone": tone, "points": points})
    return make_figure(
        f"{stage.name}-by-batch",
        "lines",
        "Rate by architecture and batch (the study's figure 4)",
        f"Images per second by images per request, pictures from {data}. Whiskers: standard error.",
        x_label="images per request",
        x_ticks=sorted({point["x"] for one in series for point in one["points"]}),
        y_label="images per second",
        series=series,
    )


def _by_setting(rows: Rows, stage: Stage, trials: Sequence[Trial], batch: object) -> Figure:
    order = sorted(trials, key=lambda trial: -trial.metrics["images_per_s"].mean)
    series: dict[str, dict[str, Any]] = {}
    for trial in in_order(trials):
        factors = trial.configuration
        name = str(factors.get("architecture", "") if factors.get("server", OURS) == OURS else factors["server"])
        name = f"{name}, {factors['data']}" if "data" in factors else name
        pale = factors.get("data") == "memory"
        one = series.setdefault(name, {"name": name, "tone": _tone(trial, trials), "pale": pale, "points": []})
        one["points"].append(make_point(setting(factors, without=("batch",)), rows.trial(trial, "images_per_s")))
    return make_figure(
        f"{stage.name}-by-setting",
        "hbars",
        f"Rate of every setting at batch {batch} (the study's figure 5)",
        "Images per second of each architecture, transport and way to call, from files and from memory; the fastest on top. "
        "Whiskers: standard error.",
        x_label="images per second",
        stacked=True,
        rows=[setting(trial.configuration, without=("batch",)) for trial in order],
        series=list(series.values()),
    )


def _tone(trial: Trial, trials: Sequence[Trial]) -> int:
    """Return the place of a trial's colour: its architecture's, or one of its own for a contender."""
    server = str(trial.configuration.get("server", OURS))
    if server == OURS:
        return _TONES.get(str(trial.configuration.get("architecture")), len(_TONES))
    others = sorted({str(one.configuration.get("server", OURS)) for one in trials} - {OURS})
    return len(_TONES) + others.index(server)


def _stages(rows: Rows, stage: Stage, trials: Sequence[Trial], interaction: str, batch: object) -> Figure:
    kept = [trial for trial in in_order(trials) if trial.configuration.get("interaction", "sync") == interaction]
    meaning = "one after the other" if interaction == "sync" else "of each place for a request, waiting behind others included"
    return make_figure(
        f"{stage.name}-stages-{interaction}",
        "hbars",
        f"Where a request's time goes, {interaction} calls, batch {batch}",
        f"The stages of a request, {meaning}; they add up to its time.",
        x_label="ms per request",
        scale=1e-3,
        stacked=True,
        bare=True,
        rows=[setting(trial.configuration, without=("batch", "interaction")) for trial in kept],
        series=[
            {
                "name": words(metric),
                "points": [
                    make_point(setting(trial.configuration, without=("batch", "interaction")), rows.trial(trial, metric))
                    for trial in kept
                    if metric in trial.metrics
                ],
            }
            for metric in STAGES
        ],
    )


def _cpu(rows: Rows, stage: Stage, trials: Sequence[Trial], batch: object) -> Figure:
    kept = [trial for trial in in_order(trials) if "app_cpu" in trial.metrics]
    return make_figure(
        f"{stage.name}-cores",
        "hbars",
        f"Cores kept busy, batch {batch}",
        "Mean cores of the application (in one process the model is in it) and of the server with the model.",
        x_label="cores",
        stacked=True,
        bare=True,
        rows=[setting(trial.configuration, without=("batch",)) for trial in kept],
        series=_by_party(rows, kept, "cpu", without=("batch",)),
    )


def _memory(rows: Rows, stage: Stage, trials: Sequence[Trial], data: str) -> Figure:
    batches = [int(trial.configuration.get("batch", 1)) for trial in trials]
    least, most = min(batches), max(batches)
    transports = {trial.configuration.get("transport") for trial in trials}
    kept = [
        trial
        for trial in in_order(trials)
        if trial.configuration.get("data", "memory") == data
        and int(trial.configuration.get("batch", 1)) in (least, most)
        and trial.configuration.get("transport", "none") in (("none", "grpc") if "grpc" in transports else transports)
        and "app_memory_bytes" in trial.metrics
    ]
    return make_figure(
        f"{stage.name}-memory-parties",
        "hbars",
        f"Memory of each party, batch {least}" + (f" and {most}" if most > least else ""),
        "Highest memory of the application and of the server with the model, over gRPC where there is a choice. Processes "
        "of ours had run nothing else where n is 1; a contender's server keeps what it served before.",
        x_label="MiB",
        scale=MIB,
        stacked=True,
        bare=True,
        rows=[setting(trial.configuration, without=("data",)) for trial in kept],
        series=_by_party(rows, kept, "memory_bytes", without=("data",)),
    )


def _by_party(rows: Rows, trials: Sequence[Trial], unit: str, *, without: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "points": [
                make_point(setting(trial.configuration, without=without), rows.trial(trial, f"{party}_{unit}"))
                for trial in trials
                if f"{party}_{unit}" in trial.metrics
            ],
        }
        for party, name in (("app", "application"), ("server", "server"), ("forwarder", "the link's forwarder"))
    ]


def _place(order: Sequence[str], word: str) -> int:
    return order.index(word) if word in order else len(order)
