"""The three serving architectures of study 3, measured: every application and server runs under a lease of its own.

    simple         application + model in one process
    microservice   application ──loopback──► server          over HTTP and gRPC
    distributed    application in another network namespace ──veth──► the same server

One load application per (architecture, transport, interaction) runs all batch sizes and repeats, interleaved; the
applications run one after another in a seeded random order, so that a drift of the machine hits all alike. Every answer
is checked; a wrong one refuses the trial. Not here: which architecture to choose (`recommend.serving`).
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tenure.errors import JobFailed, SpecError
from tenure.experiments import netns
from tenure.jobs import Command, ServerOptions
from tenure.protocols import Exit, ExitKind, Launch, Launched, LaunchRequest, Progress
from tenure.resources import Envelope, format_bytes
from tenure.serve.load import LoadCell, LoadResult, LoadSpec, load_command, read_load_result, write_load_spec
from tenure.trials import Configuration, Trial
from tenure.usage import Summary, Usage, summarize

Interaction = Literal["sync", "async"]
INTERACTIONS: tuple[Interaction, ...] = ("sync", "async")
TRANSPORTS = ("http", "grpc")
HELD = ("instances", "threads", "max_delay_s")
"""Factors of a configuration that say how the model is held, where it was searched."""
SAMPLE_MAX_S = 3.0
"""How long to wait for a sample of the server that is as new as the end of a load."""
DRAIN_S, LEAVE_S = 5.0, 5.0
"""How long a server may answer what it accepted, after SIGTERM; and then to end its instances, before it is killed."""
START_S, START_PER_CLIENT_S = 2.0, 1.0
"""How far ahead applications that must start together are told to begin: interpreters start one after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What is measured, and by which means."""

    name: str
    """The model's name at the server."""
    model: Path
    inputs: Path
    """.npy, rows of the model's one input."""
    expected: Path
    """.npy, the answers that the model gives in-process: labels, or values compared within 1e-4."""
    launch: Launch
    workdir: Path
    """Load specs are written here; made when missing."""
    app: Envelope
    """Of each application."""
    server: Envelope
    options: ServerOptions = field(default_factory=ServerOptions)
    """Of the server. Its host is chosen here, where the applications reach it."""
    seed: int = 0
    repeats: int = 3
    seconds: float = 0.4
    """Of one (batch, repeat)."""
    concurrency: int = 8
    """Requests in flight of an asynchronous application."""


def door(transport: str) -> str:
    """Return the door of a server that a transport begins at: shared memory is agreed over HTTP."""
    return "http" if transport == "shm" else transport


def held_options(options: ServerOptions, configuration: Configuration) -> ServerOptions:
    """Return a server's options with the instances, threads and delay of a configuration that says them.

    `threads` of a configuration are of each instance, those of the options of all together.
    """
    if "instances" not in configuration:
        return options
    instances, threads = int(configuration["instances"]), int(configuration["threads"])
    delay_s = float(configuration["max_delay_s"])
    return replace(options, instances=instances, threads=instances * threads, max_delay_s=delay_s)


def server_command(
    model: Path, *, name: str, ports: Mapping[str, int] | None = None, options: ServerOptions | None = None
) -> Command:
    """Return the command of a server of a model file, or of a folder of models.

    name: of a single model; empty: its file's stem. ports: transport -> port, 0 for any free one; what is left out is off.
    """
    wanted = {"http": 0, "grpc": 0} if ports is None else dict(ports)
    flags = server_flags(wanted, options or ServerOptions())
    argv = (sys.executable, "-m", "tenure.serve", f"--model={model}", *([f"--name={name}"] if name else []), *flags)
    return Command(argv=argv, ports=wanted, grace_s=DRAIN_S + LEAVE_S)


def server_flags(wanted: Mapping[str, int], options: ServerOptions) -> tuple[str, ...]:
    """Return what a server is told of its ports and options. wanted: as `ports` above."""
    given = {
        "host": options.host,
        **{f"{transport}-port": str(wanted.get(transport, "off")) for transport in TRANSPORTS},
        "memory-budget": format_bytes(options.memory_budget_bytes) if options.memory_budget_bytes else "",
        "instances": str(options.instances or ""),
        "threads": str(options.threads or ""),
        "max-batch-rows": str(options.max_batch_rows or ""),
        "max-delay-ms": f"{options.max_delay_s * 1e3:g}" if options.max_delay_s else "",
        "grace-s": f"{DRAIN_S:g}",
    }
    return tuple(f"--{flag}={value}" for flag, value in given.items() if value)


def measure_serving(
    served: Served,
    *,
    batches: Sequence[int] = (1, 8, 32),
    interactions: Sequence[Interaction] = INTERACTIONS,
    transports: Sequence[str] = TRANSPORTS,
    make_trial: Callable[..., Trial],
    record: Callable[[Trial], None],
    progress: Progress,
    source: str = "probe",
) -> list[Trial]:
    """Measure all architectures and return their trials: one per (architecture, transport, interaction, batch).

    make_trial: called with source, configuration, metrics, seed, note; adds what all trials of the stage share.
    record: called with each trial as soon as it is made. Without the right to make a network namespace the distributed
    architecture runs over loopback, and its configuration and note say so.
    Raises JobFailed when an application or server ends badly or gives a wrong answer.
    """
    made: list[Trial] = []
    with _service(served) as service:
        places: list[tuple[str, str]] = [("simple", "none")]
        places += [(architecture, transport) for architecture in ("microservice", "distributed") for transport in transports]
        apps = [(*place, interaction) for place in places for interaction in interactions]
        random.Random(served.seed).shuffle(apps)
        for done, (architecture, transport, interaction) in enumerate(apps):
            progress(f"{architecture} {transport} {interaction}".replace(" none", ""), done=done / len(apps))
            base = service.configuration(architecture, transport, interaction)
            loaded = service.run(base, batches=tuple(batches), clients=1)
            for batch in batches:
                metrics = loaded.metrics_of(batch)
                trial = make_trial(
                    source=source,
                    configuration={**base, "batch": batch, "clients": 1},
                    metrics=metrics,
                    seed=served.seed,
                    note=service.note(architecture),
                )
                record(trial)
                made.append(trial)
    progress("all architectures measured", done=1.0)
    return made


def measure_clients(
    served: Served,
    configuration: Configuration,
    *,
    clients: int,
    make_trial: Callable[..., Trial],
    record: Callable[[Trial], None],
    progress: Progress,
    source: str = "observed",
    server: Launched | None = None,
) -> Trial:
    """Measure N applications at once, each under a lease of its own, and return the trial.

    configuration: architecture, transport, interaction, batch. server: one that already runs; else one is launched for
    this. Metrics: `images_per_s` summed over the applications, latencies pooled over all of them, `memory_bytes` of
    everything that holds the model (peaks added up). Raises JobFailed as `measure_serving`, Refused without room.
    """
    if clients < 1:
        raise SpecError(f"clients must be at least 1; found {clients!r}")
    architecture, batch = str(configuration["architecture"]), int(configuration["batch"])
    held = {name: configuration[name] for name in HELD if name in configuration}
    progress(f"{clients} clients at once: {architecture}")
    with _service(served, server=server, needed=architecture != "simple", far=architecture == "distributed") as service:
        base = service.configuration(architecture, str(configuration["transport"]), str(configuration["interaction"]))
        loaded = service.run({**base, **held}, batches=(batch,), clients=clients)
        note = " ".join(part for part in (service.note(architecture), loaded.lateness()) if part)
        trial = make_trial(
            source=source,
            configuration={**base, **held, "batch": batch, "clients": clients},
            metrics=loaded.pooled_metrics(batch),
            seed=served.seed,
            note=note,
        )
    record(trial)
    return trial


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """What applications that ran at the same time measured."""

    results: tuple[LoadResult, ...]
    app_peaks: tuple[int, ...]
    server_cpu_s: float
    """Spent by the server from before the first request to after the last."""
    server_peak_bytes: int
    start_at_s: float

    def metrics_of(self, batch: int) -> dict[str, Summary]:
        """Return the metrics of one application's batch size, summarized over its repeats."""
        (result,) = self.results
        cells = result.of_batch(batch)
        latencies = [sorted(cell.latencies_s) for cell in cells]
        return {
            "images_per_s": summarize([cell.images_per_s for cell in cells]),
            "p50_s": summarize([percentile(row, 50) for row in latencies]),
            "p99_s": summarize([percentile(row, 99) for row in latencies]),
            "mean_s": summarize([cell.mean_s for cell in cells]),
            "prepare_model_s": summarize([result.prepare_model_s]),
            **{name: summarize([getattr(cell, name) for cell in cells]) for name in _PARTS},
            "app_cpu_s_per_image": summarize([cell.app_cpu_s_per_image for cell in cells]),
            "server_cpu_s_per_image": summarize([self._server_cpu_s(cell) / cell.images for cell in cells]),
            "app_memory_bytes": summarize([self.app_peaks[0]]),
            "server_memory_bytes": summarize([self.server_peak_bytes]),
            "wrong_answers": summarize([float(cell.wrong) for cell in cells]),
        }

    def pooled_metrics(self, batch: int) -> dict[str, Summary]:
        """Return the metrics of all applications together: rates added per repeat, latencies in one pool."""
        rows = [result.of_batch(batch) for result in self.results]
        cells = [cell for row in rows for cell in row]
        pool = sorted(latency for cell in cells for latency in cell.latencies_s)
        images = sum(cell.images for cell in cells)
        return {
            "images_per_s": summarize([sum(cell.images_per_s for cell in at_once) for at_once in zip(*rows, strict=True)]),
            "p50_s": summarize([percentile(pool, 50)]),
            "p99_s": summarize([percentile(pool, 99)]),
            "mean_s": summarize([sum(pool) / len(pool)]),
            "prepare_model_s": summarize([result.prepare_model_s for result in self.results]),
            **{name: summarize([getattr(cell, name) for cell in cells]) for name in _PARTS},
            "app_cpu_s_per_image": summarize([sum(cell.cpu_s for cell in cells) / images]),
            "server_cpu_s_per_image": summarize([self.server_cpu_s / images]),
            "app_memory_bytes": summarize(self.app_peaks),
            "server_memory_bytes": summarize([self.server_peak_bytes]),
            "memory_bytes": summarize([sum(self.app_peaks) + self.server_peak_bytes]),
            "wrong_answers": summarize([float(sum(cell.wrong for cell in cells))]),
        }

    def lateness(self) -> str:
        """Return "" or a sentence when an application began clearly after the others: rates then add up too high."""
        late_s = max(result.started_at_s for result in self.results) - self.start_at_s
        span_s = max(result.ended_at_s for result in self.results) - self.start_at_s
        if len(self.results) == 1 or late_s <= 0.25 * span_s:
            return ""
        return f"One of the {len(self.results)} applications began {late_s:.1f} s after the others."

    def _server_cpu_s(self, cell: LoadCell) -> float:
        """Return the server's CPU time for one cell: the load's total, split by how long each cell waited for answers."""
        waited_s = sum(one.recognise_s * one.requests for result in self.results for one in result.cells)
        return self.server_cpu_s * cell.recognise_s * cell.requests / waited_s if waited_s else 0.0


_PARTS = ("prepare_data_s", "send_s", "recognise_s", "fetch_s")


def percentile(ordered_s: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted, non-empty values (0 < percent <= 100)."""
    rank = -(-percent * len(ordered_s) // 100)
    return ordered_s[max(0, int(rank) - 1)]


class _Service:
    """A server that applications on both sides of the cable reach, and the means to run applications against it."""

    def __init__(self, served: Served, link: netns.Link | None, why_not: str, server: Launched | None) -> None:
        self._served, self._link, self._why_not, self._server = served, link, why_not, server
        self._names = itertools.count()

    def configuration(self, architecture: str, transport: str, interaction: str) -> dict[str, Any]:
        """Return the factors of an application, batch and clients apart."""
        links = {"simple": "in-process", "microservice": "loopback", "distributed": "netns" if self._link else "loopback"}
        if architecture not in links or (architecture == "simple") != (transport == "none"):
            raise SpecError(f"no such serving architecture: {architecture!r} over {transport!r}")
        return {
            "architecture": architecture,
            "transport": transport,
            "interaction": interaction,
            "link": links[architecture],
        }

    def note(self, architecture: str) -> str:
        """Return what a reader must know of how this was measured."""
        if architecture == "distributed" and self._link is None:
            return f"Measured over loopback, not over a second network stack: {self._why_not}."
        return ""

    def run(self, base: Mapping[str, Any], *, batches: tuple[int, ...], clients: int) -> _Loaded:
        """Run applications at the same time and return what they measured. Ends them all, whatever happens."""
        served, alone = self._served, base["architecture"] == "simple"
        server = None if alone else self._server
        before = _sample(server, time.time()) if server else None
        start_at_s = time.time() + START_S + START_PER_CLIENT_S * clients if clients > 1 else 0.0
        apps: list[Launched] = []
        try:
            for _ in range(clients):
                apps.append(served.launch(self._request(base, batches, start_at_s)))
            bound_s = 60.0 + 10.0 * clients + 4.0 * served.seconds * served.repeats * len(batches)
            exits = [_finished(app, time.monotonic() + bound_s) for app in apps]
        finally:
            for app in apps:
                if app.wait(0.0) is None:
                    app.stop()
        after = _sample(server, time.time()) if server else None
        results = tuple(_checked(read_load_result(app.worker_dir), base) for app in apps)
        peaks = [ended.usage.peak_memory_bytes if ended.usage else 0 for ended in exits]
        return _Loaded(
            results=results,
            app_peaks=tuple(max(peak, result.peak_memory_bytes) for peak, result in zip(peaks, results, strict=True)),
            server_cpu_s=max(0.0, after.cpu_s - before.cpu_s) if before and after else 0.0,
            server_peak_bytes=max(after.peak_memory_bytes, after.memory_bytes) if after else 0,
            start_at_s=start_at_s,
        )

    def _request(self, base: Mapping[str, Any], batches: tuple[int, ...], start_at_s: float) -> LaunchRequest:
        served, transport = self._served, str(base["transport"])
        target = f"simple:{served.model}"
        if base["architecture"] != "simple":
            if self._server is None:
                raise SpecError("a server is needed for this architecture, and none runs")
            target = f"{transport}://{self._server.endpoints[door(transport)]}"
        name = f"app-{base['architecture']}-{transport}-{base['interaction']}-{next(self._names)}"
        spec = LoadSpec(
            target=target,
            model="" if base["architecture"] == "simple" else served.name,
            interaction=base["interaction"],
            batches=batches,
            repeats=served.repeats,
            seconds=served.seconds,
            concurrency=served.concurrency,
            inputs=str(served.inputs),
            expected=str(served.expected),
            seed=served.seed,
            start_at_s=start_at_s,
            instances=int(base.get("instances", 1)),
            threads=int(base.get("threads", 0)),
        )
        served.workdir.mkdir(parents=True, exist_ok=True)
        path = served.workdir / f"{name}.json"
        write_load_spec(path, spec)
        network = f"netns:{self._link.namespace}" if self._link and base["link"] == "netns" else "host"
        command = Command(argv=load_command(path), expects_result=True, network=network)
        return LaunchRequest(name=name, command=command, envelope=served.app)


@contextlib.contextmanager
def _service(served: Served, *, server: Launched | None = None, needed: bool = True, far: bool = True) -> Iterator[_Service]:
    """Make the namespace where that is possible and wanted, start the server, and end both.

    A server that already runs keeps its address: applications in a namespace reach it only if it listens on the cable,
    so beside a given server none is made.
    """
    why_not = "the server listens on loopback only" if server else (netns.available() if needed and far else "not asked for")
    with contextlib.ExitStack() as stack:
        link = None if why_not else stack.enter_context(netns.namespace())
        if needed and server is None:
            # On the near end of the cable it is reached from the namespace, and from here by the loopback device:
            # packets to one's own address never leave the machine's lo.
            options = replace(served.options, host=link.near if link else "127.0.0.1")
            command = server_command(served.model, name=served.name, options=options)
            server = served.launch(LaunchRequest(name="server", command=command, envelope=served.server))
            stack.callback(server.stop)
        yield _Service(served, link, why_not, server)


def _sample(server: Launched, since_s: float) -> Usage:
    """Return the server's consumption at `since_s` (UTC) or later; the newest there is when none comes in time."""
    end_s = time.monotonic() + SAMPLE_MAX_S
    while (usage := server.usage()).at_s < since_s and time.monotonic() < end_s:
        time.sleep(0.05)
    return usage


def _finished(app: Launched, end_s: float) -> Exit:
    """Return how an application ended. Raises JobFailed when it ended badly or not in time."""
    while (ended := app.wait(1.0)) is None:
        if time.monotonic() > end_s:
            raise JobFailed(f"the load application of lease {app.lease_id} did not end in time", reason="out_of_time")
    if ended.kind is not ExitKind.COMPLETED:
        detail = "\n".join(part for part in (ended.witness, ended.log_tail) if part)
        raise JobFailed(f"the load application of lease {app.lease_id} ended {ended.kind}\n{detail}", reason=str(ended.kind))
    return ended


def _checked(result: LoadResult, base: Mapping[str, Any]) -> LoadResult:
    """Return the result when every answer was right. Raises JobFailed otherwise: a fast wrong answer is no measurement."""
    what = f"{base['architecture']} over {base['transport']}, {base['interaction']}"
    if result.wrong:
        raise JobFailed(f"{what}: {result.wrong} answers differ from the model's own in-process answers; nothing is recorded")
    empty = [cell for cell in result.cells if cell.failed or not cell.images]
    if empty:
        cell = empty[0]
        raise JobFailed(
            f"{what}, batch {cell.batch}: {cell.failed} requests failed and {cell.requests} were answered "
            f"({cell.first_error or 'no error was given'}); nothing is recorded"
        )
    return result
