"""What bounds each measured way to serve a model: by which rows, what to change, and how much there is to win.

    trial ──► stations: GPU, link, a node's cores, one thread ──► one is FULL: it bounds
                                             └──► none is full: requests wait, and the longest wait bounds

Operational analysis (Denning & Buzen, 1978): a full station lets nothing else help; where none is full, places for requests
stand idle (Little's law), and the stage that holds them longest is the one to shorten or to overlap. A gain is either a bound
by the utilisation law (`stations`), or was measured: another trial that differs in one thing, paired repeat by repeat. Not
here: which configuration to lease (`recommend`), how it is shown (`experiments`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tenure.decide.bottleneck_advice import advice
from tenure.decide.intervals import Interval, paired_ratio
from tenure.decide.stations import (
    NAMES,
    NODES,
    OURS,
    Row,
    Station,
    find_stations,
    model_cores,
    next_full,
    own_cores,
    row_of,
    rows_of,
)
from tenure.errors import SpecError
from tenure.resources import parse_duration
from tenure.trials import Configuration, Trial

FULL = 0.85
"""Share of the time from which on a station counts as full: the rest is lost between requests, and to the meter's grain."""
STAGES = ("load_data_s", "prepare_data_s", "send_s", "recognise_s", "fetch_s", "log_s", "other_s")
"""Of a request, in order; they add up to `wall_s`."""
PLACE = ("architecture", "transport", "link")
"""Factors that change together: the simple architecture has no transport."""
FACTORS = ("server", "interaction", "batch", "data", "clients", "load", "runtime", "instances", "threads", "max_delay_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a change was measured to win."""

    trial: str
    """The one with the change."""
    change: str
    """What is different there, e.g. ``interaction async``."""
    ratio: Interval
    """Its images per second ÷ those of the trial that is bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What bounds one trial."""

    trial: str
    where: str
    """``gpu``, ``link``, ``node``, ``server_node``, ``client_node``, ``others``, a party (``app``, ``client``, ``server``,
    ``recogniser``), ``delay``, ``queue``, or a stage without its unit (``load_data``)."""
    party: str
    """Who uses most of a node's cores: ``model``, the party that uses most of the rest, or ``other``, a server whose
    parts are not known; empty elsewhere."""
    waiting: bool
    """No station is full: requests wait for one another. Else `where` is the station that is."""
    share: float
    """Of the station's capacity, or of a request's time."""
    why: str
    """One sentence with the figures of `rows`."""
    change: str
    """What to do about it, in one sentence."""
    at_most: float | None
    """Factor by which the rate can grow at most by it, the batch being what it is: a larger one may cost everything less, the
    model too. None where the rows do not tell."""
    rows: tuple[Row, ...]
    """The proof."""
    gain: Gain | None = None
    """The change of one thing, the first that is advised, that was measured to be faster, beyond its own interval and the
    machine's repeat error."""


def find_bottlenecks(
    trials: Sequence[Trial], *, near_cores: float = 0.0, far_cores: float = 0.0, server_cores: float = 0.0
) -> tuple[Bottleneck, ...]:
    """Return what bounds each closed-loop trial that has the metrics to tell by, in the order of the trials.

    near_cores, far_cores: of the server's node and of the distributed application's, as they are leased; 0: no less than the
    machine's. server_cores: of the near ones, the server's own; 0: it shares them with the application. Open-loop trials and
    twins are left out: their rate is given, or is that of another trial.
    """
    closed = [trial for trial in trials if is_closed(trial) and not is_twin(trial)]
    margin = repeat_margin(trials)
    cores = {"near_cores": near_cores, "far_cores": far_cores, "server_cores": server_cores}
    found = [(trial, bottleneck(trial, **cores)) for trial in closed]
    return tuple(replace(one, gain=_gain(trial, closed, one, margin)) for trial, one in found if one is not None)


def bottleneck(
    trial: Trial, *, near_cores: float = 0.0, far_cores: float = 0.0, server_cores: float = 0.0
) -> Bottleneck | None:
    """Return what bounds one trial, without what was measured elsewhere; None when it has neither CPU nor stages."""
    stations = find_stations(trial, near_cores=near_cores, far_cores=far_cores, server_cores=server_cores)
    full = [station for station in stations if station.share >= FULL]
    waits = sorted(_waits(trial), key=lambda wait: -wait.share)
    if full and full[0].name == "others" and waits and waits[0].name == "delay":
        return _waiting(trial, waits[0], stations)  # no CPU makes a link's way shorter
    if full:
        return _full(trial, full[0], stations)
    if waits:
        return _waiting(trial, waits[0], stations)
    return _full(trial, max(stations, key=lambda station: station.share), stations) if stations else None


def is_closed(trial: Trial) -> bool:
    """Whether its rate is a result: open load has it given."""
    return trial.configuration.get("load", "closed") == "closed" and "images_per_s" in trial.metrics


def is_twin(trial: Trial) -> bool:
    """Whether it is the second measurement of a setting, for the machine's own repeat error."""
    return bool(trial.configuration.get("twin"))


def repeat_error(trials: Sequence[Trial]) -> Interval | None:
    """Return the ratio of the images per second of twins: its truth is 1, so what it shows beyond is the machine's doing.

    Of several pairs that which is farthest from 1; None without twins.
    """
    twins = [(one, two) for two in trials if is_twin(two) for one in trials if not is_twin(one) and _same(one, two)]
    ratios = [ratio for one, two in twins if (ratio := rate_ratio(two, one)) is not None]
    return max(ratios, key=_apart, default=None)


def repeat_margin(trials: Sequence[Trial]) -> float:
    """Return the factor, at least 1, by which a machine made a setting faster than itself.

    A ratio must lie beyond it with its whole interval to be called a difference: the interval holds the noise, this what
    lasts, such as where memory happened to lie. 1 without twins.
    """
    error = repeat_error(trials)
    return 1.0 if error is None else _apart(error)


def rate_ratio(trial: Trial, against: Trial) -> Interval | None:
    """Return images/s of one trial ÷ those of another, paired by repeat; None when their repeats do not pair."""
    rates, others = (one.curves.get("images_per_s", ()) for one in (trial, against))
    if len(rates) < 2 or len(rates) != len(others) or min(*rates, *others) <= 0:
        return None
    return paired_ratio(rates, others)


def changed(trial: Trial, against: Trial) -> str:
    """Return what one thing is different in a trial, e.g. ``batch 32``; empty when nothing is, or more than one thing."""
    one, two = trial.configuration, against.configuration
    apart = [factor for factor in FACTORS if one.get(factor) != two.get(factor)]
    if any(one.get(factor) != two.get(factor) for factor in PLACE):
        apart.append("place")
    if len(apart) != 1:
        return ""
    if apart[0] != "place":
        return f"{apart[0]} {one.get(apart[0])}"
    return " over ".join(str(one[factor]) for factor in PLACE[:2] if one.get(factor, "none") != "none")


def delay_s(trial: Trial) -> float:
    """Return the one-way delay that the trial's link declares, in seconds; 0 when none is."""
    for part in (part for part in str(trial.configuration.get("link", "")).split() if part.endswith("s")):
        with contextlib.suppress(SpecError):
            return parse_duration(part)
    return 0.0


# --- a station is full ---


def _full(trial: Trial, station: Station, stations: Sequence[Station]) -> Bottleneck:
    party, rows, says, at_most = "", station.rows, station.says, next_full(station, stations)
    if station.name in (*NODES, "others"):
        party, further, telling = _filler(trial, station)
        rows, says = rows + further, says + telling
    if station.name == "others":
        at_most = None  # whatever is changed here, others' work stays
    elif station.name in NODES:
        at_most = station.used / model if (model := model_cores(trial)[0]) and station.name != "client_node" else at_most
    return Bottleneck(
        trial=trial.id,
        where=station.name,
        party=party,
        waiting=False,
        share=station.share,
        why=_sentence(says),
        change=advice(station.name, party).change,
        at_most=at_most,
        rows=(*rows, *rows_of(trial, ["images_per_s"])),
    )


def _filler(trial: Trial, station: Station) -> tuple[str, tuple[Row, ...], str]:
    """Return who fills a node, the further rows that tell so, and the words for it."""
    if station.name == "client_node":
        return "app", (), ""
    model, rows = model_cores(trial)
    if model is None:
        if trial.configuration.get("server", OURS) != OURS:
            return "other", (), ""
        used = [row for row in station.rows if row.metric.endswith("_cpu")]
        return max(used, key=lambda row: row.value).metric.removesuffix("_cpu"), (), ""
    of_what = "what was measured" if station.name == "others" else "that"
    telling = f"; {model / station.used:.0%} of {of_what} is the model itself" if station.used else ""
    if model >= station.used / 2:
        return "model", rows, telling
    owns = {party: cores for party, cores in own_cores(trial).items() if party != "recogniser"}
    most = max(owns, key=lambda party: owns[party])
    return most, rows, f"{telling}, {owns[most] / station.used:.0%} the {NAMES[most]}'s" if station.used else ""


# --- waits: where a request's time goes when nothing is full ---


@dataclass(frozen=True, slots=True)
class _Wait:
    name: str
    share: float
    says: str
    rows: tuple[Row, ...]


def _waits(trial: Trial) -> Iterator[_Wait]:
    """Yield each stage's share of a request's time. Recognising is split where its parts are known: delay, queue, the rest."""
    wall = row_of(trial, "wall_s")
    if wall is None or wall.value <= 0:
        return
    for row in rows_of(trial, STAGES):
        name, left = row.metric.removesuffix("_s"), row.value
        if name == "recognise":
            for part in _parts(trial):
                yield _Wait(part.name, min(part.share, left) / wall.value, part.says, (*part.rows, wall))
                left -= min(part.share, left)
        says = f"{left / wall.value:.0%} of a request's {_ms(wall.value)} is {_STAGE_NAMES[name]}"
        yield _Wait(name, left / wall.value, says, (row, wall))


def _parts(trial: Trial) -> Iterator[_Wait]:
    """Yield what a request waits for besides the model while it is away; `share` is in seconds here."""
    if (round_trip_s := 2 * delay_s(trial)) > 0:
        says = f"each request waits {_ms(round_trip_s)} for the link's way there and back"
        yield _Wait("delay", round_trip_s, says, (Row(trial.id, "link", round_trip_s),))
    queue, compute = row_of(trial, "queue_s"), row_of(trial, "compute_s")
    if queue is not None and compute is not None and queue.value > 0:
        says = f"a request waits {_ms(queue.value)} in the server's queue for {_ms(compute.value)} of work"
        yield _Wait("queue", queue.value, says, (queue, compute))


def _waiting(trial: Trial, wait: _Wait, stations: Sequence[Station]) -> Bottleneck:
    metered = [station for station in stations if station.name != "others"]
    fullest = max(metered, key=lambda station: station.share, default=None)
    without = 1 / (1 - wait.share) if wait.share < 1 else None
    says, rows, at_most = wait.says, wait.rows, without
    if fullest is not None:
        says += f", and of what is measured here nothing is full meanwhile ({fullest.says})"
        rows += fullest.rows
    share = max((station.share for station in metered if _stays(station, trial)), default=0.0)
    if share > 0:
        at_most = max(1.0, 1 / share)
    return Bottleneck(
        trial=trial.id,
        where=wait.name,
        party="",
        waiting=True,
        share=wait.share,
        why=_sentence(says),
        change=advice(wait.name, "").change,
        at_most=at_most,
        rows=(*rows, *rows_of(trial, ["images_per_s"])),
    )


def _stays(station: Station, trial: Trial) -> bool:
    """Whether a station keeps its capacity once requests overlap, so that it bounds what overlapping can win.

    With a single request under way one instance works at a time, whatever others there are, and pictures are decoded by the one
    thread that asks: with several, more of both do.
    """
    alone = trial.configuration.get("interaction") == "sync" and trial.configuration.get("clients", 1) == 1
    decodes = station.name == "app" and trial.configuration.get("data") == "files"
    return not (alone and (station.name == "recogniser" or decodes))


# --- what is shown and measured of it ---

_STAGE_NAMES = {
    "load_data": "reading files",
    "prepare_data": "decoding and preparing pictures",
    "send": "sending",
    "recognise": "the model's answer being waited for",
    "fetch": "fetching the answer",
    "log": "printing the log",
    "other": "the application's own work between the stages",
}


def _gain(trial: Trial, trials: Sequence[Trial], found: Bottleneck, margin: float) -> Gain | None:
    """Return the best change of the first thing, in the order of the advice, that was measured to be surely faster."""
    best: dict[str, Gain] = {}
    for other in trials:
        change = changed(other, trial)
        factor = change.split(" ")[0] if change.split(" ")[0] in FACTORS else "place"
        ratio = rate_ratio(other, trial) if change else None
        if ratio is None or ratio.low <= margin:
            continue
        if factor not in best or ratio.value > best[factor].ratio.value:
            best[factor] = Gain(trial=other.id, change=change, ratio=ratio)
    return next((best[factor] for factor in advice(found.where, found.party).factors if factor in best), None)


def _same(one: Trial, two: Trial) -> bool:
    def setting(configuration: Configuration) -> dict[str, object]:
        return {factor: level for factor, level in configuration.items() if factor != "twin"}

    return setting(one.configuration) == setting(two.configuration)


def _apart(ratio: Interval) -> float:
    return max(ratio.value, 1 / ratio.value)


def _sentence(says: str) -> str:
    return says[0].upper() + says[1:] + "."


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
