"""What works for requests in a measured way to serve, and for which share of the time: GPU, link, cores of a node, one thread.

    node          app + server (+ the link's forwarder)          app    = the application, its client part in it
    server_node   server        ─┐ of the distributed            server = the server's process and its instances
    client_node   app           ─┘ architecture, if leased so    recogniser = the instances; in one process part of app

By the utilisation law a station that is busy for a share U of the time lets the rate grow by at most 1 ÷ U. What follows from
full ones is in `bottleneck`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenure.trials import Trial

ONE_CORE = 1.15
"""Cores up to which a party counts as one thread; one that used more has several, and no bound of its own."""
APART = ("app", "server", "forwarder")
"""The parties whose CPU and memory add up to those of the experiment."""
OURS = "tenure"
"""Factor `server` of what is measured here; others are contenders."""
NODES = ("node", "server_node", "client_node")
NAMES: Mapping[str, str] = {
    "app": "application",
    "client": "client part of the application",
    "server": "server's own process",
    "recogniser": "recogniser",
    "forwarder": "link's forwarder",
}
_ON = {"server_node": ("server", "recogniser"), "client_node": ("app", "client"), "app": ("client",)}
"""Station -> parties whose work is a part of it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of one trial, as evidence."""

    trial: str
    metric: str
    """Or the factor ``link``, whose delay, there and back, is then the value."""
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """Something that works for requests."""

    name: str
    """``gpu``, ``link``, one of `NODES`, ``others`` (a node that is full by what does not belong to it), or a party."""
    share: float
    """Of its capacity that is used."""
    says: str
    rows: tuple[Row, ...]
    used: float = 0.0
    """Cores."""

    def without(self, party: str, cores: float) -> float:
        """Return its share were a party's work, so many cores, not there."""
        part = self.name == "node" or party in _ON.get(self.name, ())
        return self.share * max(0.0, 1 - cores / self.used) if part and self.used > 0 else self.share


def find_stations(trial: Trial, *, near_cores: float = 0.0, far_cores: float = 0.0, server_cores: float = 0.0) -> list[Station]:
    """Return the stations of a trial that were metered, those first that settle the matter when full.

    near_cores, far_cores: of the server's node and of the distributed application's; 0: the machine's. server_cores: of the
    near ones, those that are the server's alone; 0: it shares them with the application.
    """
    found = []
    if (busy := row_of(trial, "gpu_busy")) is not None:
        found.append(Station(name="gpu", share=busy.value, says=f"the GPU was busy {busy.value:.0%} of the time", rows=(busy,)))
    if (carried := row_of(trial, "link_busy")) is not None:
        says = f"the link carried {carried.value:.0%} of its rate"
        found.append(Station(name="link", share=carried.value, says=says, rows=(carried,)))
    return found + _nodes(trial, near_cores, far_cores, server_cores) + _threads(trial, near_cores or trial.machine.cores)


def own_cores(trial: Trial) -> dict[str, float]:
    """Return party -> cores that it alone used: the server without its instances, the application without its client part."""
    found = {row.metric.removesuffix("_cpu"): row.value for row in rows_of(trial, [f"{party}_cpu" for party in NAMES])}
    simple = trial.configuration.get("architecture") == "simple"
    for part, whole in (("recogniser", "app" if simple else "server"), ("client", "app")):
        if part in found and whole in found:
            found[whole] = max(0.0, found[whole] - found[part])
    return found


def model_cores(trial: Trial) -> tuple[float | None, tuple[Row, ...]]:
    """Return the cores that the model itself used, with the rows that tell; None where nothing tells."""
    row = row_of(trial, "recogniser_cpu")
    return (None, ()) if row is None else (row.value, (row,))


def next_full(station: Station, stations: Sequence[Station]) -> float | None:
    """Return by which factor the rate can grow until another station is full, were this one's work gone; None: unknown."""
    shares = [one.without(station.name, station.used) for one in stations if one.name not in (station.name, "others")]
    return max(1.0, 1 / max(shares)) if shares and max(shares) > 0 else None


def row_of(trial: Trial, metric: str) -> Row | None:
    """Return the mean of a metric, None when it was not measured."""
    summary = trial.metrics.get(metric)
    return None if summary is None or not math.isfinite(summary.mean) else Row(trial.id, metric, summary.mean)


def rows_of(trial: Trial, metrics: Sequence[str]) -> list[Row]:
    """Return the means of those metrics that were measured."""
    return [row for row in (row_of(trial, metric) for metric in metrics) if row is not None]


def _nodes(trial: Trial, near_cores: float, far_cores: float, server_cores: float) -> list[Station]:
    machine = float(trial.machine.cores)
    used = rows_of(trial, [f"{party}_cpu" for party in APART])
    if not used:
        return []
    found = []
    architecture, contended = trial.configuration.get("architecture"), trial.configuration.get("server", OURS) != OURS
    shares: list[tuple[str, str, float]] = []
    if architecture == "distributed" and near_cores and far_cores:
        shares = [("server_node", "server", server_cores or near_cores), ("client_node", "app", far_cores)]
    elif architecture == "microservice" and server_cores and not contended:
        shares = [("server_node", "server", server_cores), ("client_node", "app", near_cores - server_cores)]
    if shares:
        for name, party, cores in shares:
            rows = [row for row in used if row.metric == f"{party}_cpu"]
            found += [_node(name, f"on the {name.split('_')[0]}'s node", rows, cores)] if rows else []
    else:
        leased = near_cores - server_cores if architecture == "simple" else near_cores
        # A contender runs outside the node's lease.
        found.append(_node("node", "all parties together", used, machine if contended else leased or machine))
    other = row_of(trial, "other_cpu_cores")
    if other is not None:
        total = sum(row.value for row in used)
        says = f"others kept {other.value:.1f} of the machine's {machine:g} cores busy beside the {total:.1f} measured here"
        share = (total + other.value) / machine if other.value > 0.1 * machine else 0.0
        found.append(Station(name="others", share=share, says=says, rows=(other, *used), used=total))
    return found


def _node(name: str, what: str, rows: Sequence[Row], cores: float) -> Station:
    used = sum(row.value for row in rows)
    says = f"{what} {used:.2f} of {cores:g} core{'s' if cores != 1 else ''} were busy"
    return Station(name=name, share=used / cores, says=says.replace("together", "together:"), rows=tuple(rows), used=used)


def _threads(trial: Trial, cores: float) -> list[Station]:
    """Return the parties that are one thread, the busiest first. In one process there is no telling them apart."""
    if trial.configuration.get("architecture") == "simple" or cores <= 1:
        return []
    own = own_cores(trial)
    rows = {party: row for party in NAMES if (row := row_of(trial, f"{party}_cpu")) is not None}
    found = []
    for party, row in rows.items():
        spent = row.value
        if party == "server":
            if "recogniser" not in rows:
                continue  # another's server: nobody knows which of its processes does what
            spent = own["server"]
        if party == "client" and rows["app"].value <= ONE_CORE:
            continue  # one thread does both
        if spent <= ONE_CORE:
            name = "client" if party == "app" and own.get("client", 0.0) > own["app"] else party
            says = f"the {NAMES[party]} kept one core busy {min(1.0, spent):.0%} of the time, and has one thread"
            told: tuple[Row, ...] = (row,) if party != "server" else (row, rows["recogniser"])
            told += (rows["client"],) if name == "client" and party == "app" else ()
            found.append(Station(name=name, share=min(1.0, spent), says=says, rows=told, used=spent))
    return sorted(found, key=lambda station: -station.share)
