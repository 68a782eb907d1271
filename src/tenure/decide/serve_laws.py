"""What serving settings should give by the laws of closed queueing networks, from a few parameters of machine and model.

    client's thread ──► wire ──► doors ──► queue ──► instances (runs of up to `max_batch_rows`) ──► back

Requests in flight are customers; each station has a service demand (Denning & Buzen 1978). Queueing by approximate mean-value
analysis (Schweitzer 1979); several instances, and requests that share a run, by Seidmann's split into a queue and a delay
(Seidmann, Schweitzer & Shalev-Oren 1987); CPU time of all parts is bounded by the cores. The parameters (`prior`) are
logarithms: seconds of a run and of an image in it, what threads save and cost and lose to one another each run, what each
transport costs per request and per image on both sides, the wire, requests in flight. Latency follows from the rate (Little's
law) and a tail factor.

Not here: fitting the parameters, what the laws leave unexplained, what to try next (`serve_search`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError
from tenure.trials import Configuration

Floats = NDArray[np.float64]

QUANTITIES = ("rate", "app_cpu", "server_cpu", "in_flight", "tail", "app_memory", "server_memory")
"""What a setting is described by, as logarithms: images/s; CPU seconds per image; requests in flight; p99 over mean; bytes."""
FACTORS = ("architecture", "transport", "link", "interaction", "batch", "instances", "threads", "max_delay_s", "clients")
MAX_BATCH_ROWS = 32
"""Rows that share a run, where the setting does not say."""
_STEPS = 14
_RESIDUAL = 0.4
"""What a service that hardly varies leaves of the one in service, less than one that varies a lot: (1 - cv^2) / 2."""
_COALESCE = 12.0
"""Turns, in delays, after which the groups of requests that a delay joins have not yet become one."""
_CPU_POWER = 6.0
"""How sharply the cores bound the rate."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The settings as columns of numbers, shape (settings,)."""

    batch: Floats
    instances: Floats
    threads: Floats
    delay_s: Floats
    clients: Floats
    rows: Floats
    simple: NDArray[np.bool_]
    asynchronous: NDArray[np.bool_]
    transport: NDArray[np.intp]
    transports: tuple[str, ...]
    link: NDArray[np.intp]
    """0: none worth a parameter."""
    links: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many settings there are."""
        return int(self.batch.size)


def levels(settings: Sequence[Configuration]) -> Levels:
    """Return the columns of some settings. Raises SpecError for none, or for numbers that make no sense."""
    if not settings:
        raise SpecError("a search needs at least one setting; found none")

    def column(name: str, default: float, least: float) -> Floats:
        values = np.array([float(setting.get(name, default)) for setting in settings])
        if not np.all(np.isfinite(values)) or values.min() < least:
            raise SpecError(f"{name} of a setting must be a number of at least {least:g}; found {values.min()!r}")
        return values

    def names(name: str, default: str) -> list[str]:
        return [str(setting.get(name, default)) for setting in settings]

    transports = tuple(sorted(set(names("transport", "none"))))
    links = ("", *sorted({link for link in names("link", "") if link not in ("", "in-process", "loopback")}))
    return Levels(
        batch=column("batch", 1, 1),
        instances=column("instances", 1, 1),
        threads=column("threads", 1, 1),
        delay_s=column("max_delay_s", 0, 0),
        clients=column("clients", 1, 1),
        rows=column("max_batch_rows", MAX_BATCH_ROWS, 1),
        simple=np.array([name == "simple" for name in names("architecture", "simple")]),
        asynchronous=np.array([name == "async" for name in names("interaction", "sync")]),
        transport=np.array([transports.index(name) for name in names("transport", "none")]),
        transports=transports,
        link=np.array([links.index(name) if name in links else 0 for name in names("link", "")]),
        links=links,
    )


@dataclass(frozen=True, slots=True)
class Prior:
    """Where the parameters are expected: normal, independent."""

    names: tuple[str, ...]
    mean: Floats
    sd: Floats


_COMMON: Mapping[str, tuple[float, float]] = {
    "image_s": (math.log(0.004), 2.0),  # of a run with one thread
    "run_over_image": (math.log(0.6), 1.3),
    "parallel": (0.8, 1.2),  # logit of the share of a run that threads divide
    "join_over_image": (math.log(0.05), 0.8),  # what a run's threads lose to one another each time they meet, two of them
    "thread_cost": (math.log(0.08), 0.8),
    "run_cpu": (-0.3, 0.8),  # CPU time over time of a run; far below 0 where a device does the work
    "scaling": (1.0, 1.3),  # logit of how instances add up
    "client_image": (math.log(0.03), 1.2),  # over image_s
    "door_image": (math.log(0.05), 1.2),
    "client_call_s": (math.log(0.00015), 0.8),
    "door_call_s": (math.log(0.0002), 0.8),
    "in_flight": (math.log(8), 0.7),
    "tail": (math.log(0.35), 0.6),  # of p99 / mean - 1, roughly
    "tail_async": (0.0, 0.5),
    "app_memory": (math.log(80e6), 1.0),
    "server_memory": (math.log(200e6), 1.0),
    "model_memory": (math.log(0.3), 1.2),  # of a further instance, over the first
    "app_model_memory": (math.log(1.0), 1.0),  # what holding the model adds to an application, over its own
}
_TRANSPORT_IMAGE = {"shm": -1.0, "grpc": 0.4, "none": -2.0}
_TRANSPORT_CALL = {"none": -3.0}


def prior(known: Levels) -> Prior:
    """Return what is expected of the parameters before anything is measured."""
    found = dict(_COMMON)
    for name in known.transports:
        found |= {f"client_image {name}": (_TRANSPORT_IMAGE.get(name, 0.0), 0.5)}
        found |= {f"door_image {name}": (_TRANSPORT_IMAGE.get(name, 0.0), 0.5)}
        found |= {f"client_call {name}": (_TRANSPORT_CALL.get(name, 0.0), 0.4)}
        found |= {f"door_call {name}": (_TRANSPORT_CALL.get(name, 0.0), 0.4)}
    for name in known.links[1:]:
        found |= {f"round_trip_s {name}": (math.log(0.001), 1.2), f"wire_image {name}": (math.log(0.05), 1.5)}
    return Prior(tuple(found), np.array([m for m, _ in found.values()]), np.array([s for _, s in found.values()]))


def predict(known: Levels, names: Sequence[str], parameters: Floats, *, cores: float) -> Floats:
    """Return the logarithms of `QUANTITIES`, shape (..., quantities, settings), for parameters of shape (..., parameters)."""
    value = dict(zip(names, np.moveaxis(parameters[..., None], -2, 0), strict=True))
    at = {name: np.exp(np.clip(v, -30, 30)) for name, v in value.items()}

    def by_transport(name: str) -> Floats:
        stacked = np.stack([value[f"{name} {one}"][..., 0] for one in known.transports], axis=-1)
        found: Floats = np.exp(np.clip(stacked[..., known.transport], -30, 30))
        return found

    def by_link(name: str) -> Floats:
        zero = np.zeros_like(value["image_s"][..., 0])
        stacked = np.stack([zero, *(at[f"{name} {one}"][..., 0] for one in known.links[1:])], axis=-1)
        found: Floats = stacked[..., known.link]
        return found

    batch, image_s = known.batch, at["image_s"]
    client_s = (
        at["client_call_s"] * by_transport("client_call") + image_s * at["client_image"] * by_transport("client_image") * batch
    )
    door_s = at["door_call_s"] * by_transport("door_call") + image_s * at["door_image"] * by_transport("door_image") * batch
    parallel = 1 / (1 + np.exp(-value["parallel"]))
    network = _Network(
        flights=known.clients * np.where(known.asynchronous, at["in_flight"], 1.0),
        client_s=client_s,
        door_s=np.where(known.simple, 0.0, door_s),
        wire_s=by_link("wire_image") * image_s * batch,
        round_trip_s=by_link("round_trip_s"),
        run_s=image_s * at["run_over_image"],
        rows_s=image_s * batch,
        faster=1 - parallel + parallel / known.threads,
        join_s=image_s * at["join_over_image"] * np.log2(known.threads),
        cpu=at["run_cpu"] * (1 + at["thread_cost"] * (known.threads - 1)),
        room=np.where(known.simple, 1.0, np.maximum(1.0, np.floor(known.rows / batch))),
        servers=(known.instances * np.where(known.simple, known.clients, 1.0)) ** (1 / (1 + np.exp(-value["scaling"]))),
        cores=cores,
    )
    requests_per_s, merged = network.solve(known)
    run_cpu_s = (network.run_s + network.join_s + network.rows_s * merged) * network.cpu / merged
    app_s = (client_s + np.where(known.simple, run_cpu_s, 0.0)) / batch
    server_s = np.where(known.simple, 1e-9, (door_s + run_cpu_s) / batch)
    copies = 1 + at["model_memory"] * (known.instances - 1)
    found = (
        np.log(requests_per_s * batch),
        np.log(app_s),
        np.log(server_s),
        np.log(network.flights),
        np.log1p(np.exp(value["tail"] + np.where(known.asynchronous, value["tail_async"], 0.0))),
        value["app_memory"] + np.where(known.simple, np.log1p(at["app_model_memory"] * copies), 0.0),
        value["server_memory"] + np.log(copies),
    )
    stacked: Floats = np.stack(np.broadcast_arrays(*found), axis=-2)
    return stacked


@dataclass(frozen=True, slots=True)
class _Network:
    """Demands of one request at each station, seconds."""

    flights: Floats
    client_s: Floats
    door_s: Floats
    wire_s: Floats
    round_trip_s: Floats
    run_s: Floats
    rows_s: Floats
    """Of a request's rows in a run."""
    faster: Floats
    """By threads: a run's time over that with one."""
    join_s: Floats
    """What threads of a run lose to one another, however many rows it has: an operator ends when the last of them has."""
    cpu: Floats
    """CPU time over one thread's run time."""
    room: Floats
    """Requests that may share a run."""
    servers: Floats
    """Instances, as they add up."""
    cores: float

    def solve(self, known: Levels) -> tuple[Floats, Floats]:
        """Return requests per second, and requests that share a run on average."""
        n, clients = self.flights, known.clients
        others = (n - 1) / n
        rate = np.zeros(np.broadcast_shapes(self.client_s.shape, n.shape, self.servers.shape))
        merged = rate + 1
        at_client = at_door = at_wire = at_run = rate
        for step in range(_STEPS):
            run_s = (self.run_s + self.rows_s * merged) * self.faster + self.join_s
            queue_s = run_s / (self.servers * merged)

            def passed(service_s: Floats, there: Floats, rate: Floats = rate) -> Floats:
                """Return waiting and service: those ahead in line, the one being served half done."""
                return service_s * (1 + others * np.maximum(0.0, there - _RESIDUAL * np.minimum(1.0, rate * service_s)))

            client_s = passed(self.client_s / clients, at_client) + self.client_s * (1 - 1 / clients)
            door_s, wire_s = passed(self.door_s, at_door), passed(self.wire_s, at_wire)
            wait_s = passed(queue_s, at_run)
            company_s = np.maximum(0.0, known.delay_s - (wait_s - queue_s)) * (self.room > 1) * (n / self.room < 1)
            total_s = client_s + door_s + wire_s + self.round_trip_s + wait_s + (run_s - queue_s) + company_s
            slowest_s = np.maximum(np.maximum(self.client_s / clients, self.door_s), np.maximum(self.wire_s, queue_s))
            free = np.minimum(n / total_s, 1 / slowest_s)
            cpu_s = self.client_s + self.door_s + (self.run_s + self.join_s + self.rows_s * merged) * self.cpu / merged
            slow = (1 + (free * cpu_s / self.cores) ** _CPU_POWER) ** (1 / _CPU_POWER)
            weight = 1.0 if step == 0 else 0.5
            rate = rate + weight * (free / slow - rate)
            at_client = at_client + weight * (rate * client_s / clients - at_client)
            at_door = at_door + weight * (rate * door_s - at_door)
            at_wire = at_wire + weight * (rate * wire_s - at_wire)
            at_run = at_run + weight * (rate * slow * wait_s - at_run)
            there = np.maximum(0.0, n - rate * (client_s + door_s + wire_s + self.round_trip_s))
            # Requests that shared a run come back together, and a delay joins them with others until few groups go round.
            k, turns = known.instances, total_s / np.maximum(known.delay_s, 1e-9)
            groups = np.where(known.delay_s > 0, 1 + (k - 1) * -np.expm1(-turns / _COALESCE), k)
            together = np.maximum(there / (groups + (groups / k) ** 4), np.minimum(there, 1 + rate * known.delay_s))
            merged = merged + weight * (np.clip(together, 1.0, self.room) - merged)
        return rate, merged
