"""The nodes of an experiment, each one lease, and the cells that run on them.

    server's node                                            client's node
    [ simple … ] [ microservice … ] [ server + instances ]  <== link ==>  [ distributed … ]

One node's lease bounds all that runs in it, as a machine would: in the simple architecture the model has the whole of it,
in the microservice it shares it with the application, in the distributed one the application has a node of its own.
Not here: which cells (`sweep`), one node (`sweep_node`), what they used (`sweep_parties`), trials (`sweep_trials`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenure.errors import JobFailed, Unavailable
from tenure.experiments import links, netns
from tenure.experiments.architectures import server_command
from tenure.experiments.sweep import OURS, Contender, Setting
from tenure.experiments.sweep_boxes import Box, boxed
from tenure.experiments.sweep_crossing import Crossed, Crossing
from tenure.experiments.sweep_node import StandingNode, standing_node
from tenure.experiments.sweep_parties import CellUse, PartyMeter
from tenure.jobs import ServerOptions
from tenure.links import DeclaredLink
from tenure.meter.process import children
from tenure.protocols import Launch, Launched
from tenure.resources import Envelope
from tenure.serve.load.orders import Cell, Examples, Order, StandingSpec

CELL_S, CELL_PER_S = 120.0, 4.0
"""Bound of one cell, and by how much it grows per second that the cell is meant to take."""
RENEW_S = 20.0
"""How often leases are renewed; a slot is several times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured, and by which means."""

    name: str
    """The model's name at the server."""
    model: Path
    examples: Examples
    launch: Launch
    workdir: Path
    """Specs are written here; made when missing."""
    near: Envelope
    """Of the server's node."""
    far: Envelope | None = None
    """Of the client's node; None where nothing is distributed."""
    options: ServerOptions = field(default_factory=ServerOptions)
    renew: Callable[[Launched], None] = lambda launched: None
    contenders: Sequence[Contender] = ()
    undisturbed: bool = False
    """See Sweep."""
    link: DeclaredLink = field(default_factory=DeclaredLink)
    """Between the two nodes."""
    answer_bytes: int = 0
    """Of one image, all outputs of the model; 0: not known."""
    apart: Envelope | None = None
    """Of each server, where servers have leases of their own; None: the server shares that of its node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One cell that was run."""

    setting: Setting
    repeat: int
    order: float
    """Its place among all cells of the experiment."""
    cell: Cell
    """Without its latencies."""
    latencies_s: NDArray[np.float32]
    """From handing a request in to having its answer, in order of their end."""
    use: CellUse
    queue_s: float
    """Per request, as the server counts it; 0 without one that does."""
    compute_s: float
    crossed: Crossed | None = None
    """None where nothing crossed it."""
    lease_memory_bytes: float = 0.0
    """Of a server with a lease of its own at the end of the cell, as that lease's bound counts it; 0: it has none."""
    at_s: float


class Nodes:
    """Nodes whose applications are ready. Made by `standing`."""

    def __init__(
        self,
        bench: Bench,
        near: StandingNode,
        far: StandingNode | None,
        meter: PartyMeter,
        crossing: Crossing | None,
        note: str,
        boxes: Mapping[str, Box],
    ) -> None:
        self.note = note
        """What a reader must know of how the nodes are joined."""
        self.meter = meter
        self._bench, self._near, self._far, self._crossing, self._boxes = bench, near, far, crossing, boxes
        self._renewed_s = time.monotonic()
        self._contenders = {contender.name: contender for contender in bench.contenders}

    def prepare_model_s(self, setting: Setting) -> tuple[float, ...]:
        """Return how long the setting's application took to prepare its model, each time."""
        known = self._node(setting).applications
        return tuple(took_s for name in setting.applications for took_s in known[name].prepare_model_s)

    @property
    def disturbed(self) -> str:
        """Why the leases do not go before everything else, when they were to."""
        return next((node.ready.disturbed for node in (self._near, self._far) if node and node.ready.disturbed), "")

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the process that each node's lease began with: the server's node, then the client's."""
        return tuple(node.ready.pid for node in (self._near, self._far) if node is not None)

    def server_start_s(self, setting: Setting) -> float:
        """Return how long the setting's server took to listen; 0 without one of ours."""
        if setting.architecture == "simple" or setting.server != OURS:
            return 0.0
        return self._boxes[setting.runtime].start_s if self._boxes else self._near.ready.server_start_s

    @property
    def versions(self) -> dict[str, str]:
        """Of what the applications have loaded."""
        nodes = [self._near, *([self._far] if self._far else [])]
        found: dict[str, str] = {}
        for node in nodes:
            for application in node.ready.applications:
                found |= application.versions
        return found

    def run(self, setting: Setting, *, repeat: int, order: int, seconds: float, in_flight: int, probes: bool = True) -> Asked:
        """Warm up for a cell and run it, watched. Raises JobFailed when it gave no answer."""
        self._renew()
        node, server = self._node(setting), self._server_pids(setting)
        parties = {"app": tuple(node.applications[name].pid for name in setting.applications)}
        if server:
            parties["server"] = server
            if setting.server == OURS:
                parties["recogniser"] = server[1:]

        def told(do: str) -> Order:
            return Order(
                application=setting.application,
                copies=setting.clients,
                do="warm" if do == "warm" else "run",
                batch=setting.batch,
                data="files" if setting.data == "files" else "memory",
                seconds=seconds,
                in_flight=in_flight,
                seed=repeat,  # all settings of a repeat get the same pictures
                probes=probes,
                bound_s=CELL_S + CELL_PER_S * seconds,
            )

        what = setting.describe()
        node.ask(told("warm"), what)
        crossing = self._crossing if setting.far else None
        before = self._counted(setting)
        if crossing:
            crossing.begin()
        self.meter.begin(parties if probes else {})
        try:
            cell = node.ask(told("run"), what)
        finally:
            use = self.meter.end()
        crossed = crossing.end() if crossing else None
        after = self._counted(setting)
        requests = max(1, after[0] - before[0])
        return Asked(
            setting=setting,
            repeat=repeat,
            order=order,
            cell=replace(_checked(cell, what), latencies_s=()),  # a tuple of a million floats takes eight times as much
            latencies_s=np.array(cell.latencies_s, np.float32),
            use=use,
            queue_s=max(0.0, after[1] - before[1]) / requests,
            compute_s=max(0.0, after[2] - before[2]) / requests,
            crossed=crossed,
            lease_memory_bytes=box.memory_bytes() if (box := self._box(setting)) else 0.0,
            at_s=time.time(),
        )

    def _node(self, setting: Setting) -> StandingNode:
        if not setting.far:
            return self._near
        assert self._far is not None
        return self._far

    def _server_pids(self, setting: Setting) -> tuple[int, ...]:
        if setting.architecture == "simple":
            return ()
        if setting.server != OURS:
            return self._contenders[setting.server].pids
        box = self._box(setting)
        pid = box.pid if box else self._near.ready.server_pid
        return (pid, *children(pid))

    def _counted(self, setting: Setting) -> tuple[int, float, float]:
        """Return the server's own count of requests, their seconds in the queue and in the model; zeros without a server."""
        if setting.architecture == "simple":
            return 0, 0.0, 0.0
        if setting.server == OURS:
            box = self._box(setting)
            return counted((box.near if box else self._near.ready.endpoints)["http"], self._bench.name)
        contender = self._contenders[setting.server]
        if "http" in contender.targets:
            with contextlib.suppress(Unavailable):  # not every server counts
                return counted(contender.targets["http"].removeprefix("http://"), contender.model)
        return 0, 0.0, 0.0

    def _box(self, setting: Setting) -> Box | None:
        """Return the setting's server, where it has a lease of its own."""
        return self._boxes.get(setting.runtime) if setting.server == OURS and setting.architecture != "simple" else None

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_s < RENEW_S:
            return
        self._renewed_s = time.monotonic()
        for node in (self._near, self._far):
            if node is not None:
                self._bench.renew(node.launched)
        for box in self._boxes.values():
            self._bench.renew(box.launched)


@contextlib.contextmanager
def standing(bench: Bench, all_settings: Sequence[Setting], meter: PartyMeter) -> Iterator[Nodes]:
    """Start what the settings need, wait until all of it is ready, and end it, whatever happened inside.

    Raises JobFailed with the reason when a node can't be started, Refused without room, Unavailable where the kernel cannot
    make the declared link.
    """
    near_settings = [setting for setting in all_settings if not setting.far]
    far_settings = [setting for setting in all_settings if setting.far]
    served = {s.runtime: None for s in all_settings if s.server == OURS and s.architecture != "simple"}
    with contextlib.ExitStack() as stack:
        why_not = netns.available() if far_settings else ""
        joined = stack.enter_context(links.joined(bench.link)) if far_settings and not why_not else None
        host, boxes = joined.near if joined else "127.0.0.1", dict[str, Box]()
        if bench.apart is not None:
            boxes = {runtime: stack.enter_context(boxed(bench, runtime, bench.apart, joined)) for runtime in served}
        server = _server(bench, host) if served and bench.apart is None else ()
        near_specs = _applications(bench, near_settings, boxes)
        near = stack.enter_context(standing_node(bench, "server", bench.near, near_specs, server=server))
        far = None
        if far_settings:
            assert bench.far is not None
            far_specs = [spec.at(near.ready.endpoints) for spec in _applications(bench, far_settings, boxes)]
            network = f"netns:{joined.namespace}" if joined else "host"
            far = stack.enter_context(standing_node(bench, "client", bench.far, far_specs, network=network))
        note = f"The distributed ones measured over loopback, not over a second network stack: {why_not}." if why_not else ""
        yield Nodes(bench, near, far, meter, Crossing(joined) if joined else None, note, boxes)


def _server(bench: Bench, host: str) -> tuple[str, ...]:
    command = server_command(bench.model, name=bench.name, options=replace(bench.options, host=host))
    # Its address on the cable is this machine's own, so whoever stands on this node may use shared memory.
    return (*command.argv, "--shared-memory=on")


def _applications(bench: Bench, some: Sequence[Setting], boxes: Mapping[str, Box]) -> list[StandingSpec]:
    """Return the applications that some settings need, each once."""
    found: dict[str, StandingSpec] = {}
    contenders = {contender.name: contender for contender in bench.contenders}
    doors = {"http": "http://{http}", "shm": "shm://{http}", "grpc": "grpc://{grpc}"}
    for setting in some:
        if setting.applications[0] in found:
            continue
        if setting.architecture == "simple":
            target, model = f"simple:{bench.model}", ""
        elif setting.server == OURS:
            target, model = doors[setting.transport], bench.name
            if (box := boxes.get(setting.runtime)) is not None:
                target = target.format(**(box.far if setting.far else box.near))
        else:
            contender = contenders[setting.server]
            target, model = contender.targets[setting.transport], contender.model
        for name in setting.applications:
            found[name] = StandingSpec(
                name=name,
                target=target,
                model=model,
                interaction="async" if setting.interaction == "async" else "sync",
                examples=bench.examples,
                instances=max(1, setting.instances),
                threads=setting.threads,
            )
    return list(found.values())


def _checked(cell: Cell, what: str) -> Cell:
    """Return the cell when every answer was right. Raises JobFailed otherwise: a fast wrong answer is no measurement."""
    if cell.wrong:
        raise JobFailed(f"{what}: {cell.wrong} answers differ from the model's own in-process answers; nothing is recorded")
    if cell.failed or not cell.images:
        raise JobFailed(
            f"{what}: {cell.failed} requests failed and {cell.requests} were answered "
            f"({cell.first_error or 'no error was given'}); nothing is recorded"
        )
    return cell


def counted(address: str, model: str) -> tuple[int, float, float]:
    """Return a server's own count of a model's requests, and their seconds in the queue and in the model.

    Source: the statistics extension of the Open Inference Protocol v2. Raises Unavailable.
    """
    try:
        client = http.client.HTTPConnection(address, timeout=5.0)
    except http.client.InvalidURL as error:
        raise Unavailable(f"{address!r} is no address: {error}") from error
    try:
        client.request("GET", f"/v2/models/{model}/stats")
        stats = json.loads(client.getresponse().read())["model_stats"][0]["inference_stats"]
        return int(stats["success"]["count"]), stats["queue"]["ns"] / 1e9, stats["compute_infer"]["ns"] / 1e9
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise Unavailable(f"the server at {address} does not tell what it counted: {error}") from error
    finally:
        client.close()
