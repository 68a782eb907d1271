"""Runs a load plan: asks the server for the model, encodes what is sent, warms up by a rule, runs the loop, keeps the record.

    target = Target(plan)
    warmth = target.warm_up()
    run = target.run(plan)

Not here: what the figures mean (`judge`, `summary`).
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenure.serve.faults import ModelFailed
from tenure.serve.load import payload
from tenure.serve.load.columns import Columns
from tenure.serve.load.grpc_wire import GrpcWire
from tenure.serve.load.http_wire import HttpWire
from tenure.serve.load.loop import INTERRUPTED, Loop
from tenure.serve.load.plan import CLOSED_CAPACITY, LoadPlan
from tenure.serve.load.records import OwnUse, Record
from tenure.serve.transports import open_transport

WARM_ROUND = 8
"""Requests of one round of the warm-up."""
WARM_QUICKER = 0.95
MAX_WARM_S = 5.0
_OTHER_FILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """How the server was warmed up before the schedule began: by one client, in rounds of `WARM_ROUND` requests, until a
    round's median is no longer 5 % below that of the round before, or for `MAX_WARM_S`.
    """

    requests: int
    seconds: float
    settled: bool
    """Whether the rule ended it, not the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """What one run gave: every request of it, and what the generator says of itself."""

    plan: LoadPlan
    record: Record
    """All due requests, the warm-up's included."""
    measured_from_s: float
    own: OwnUse
    """After the warm-up, until nothing was left to send."""
    peak_in_flight: int
    realtime: bool
    """Whether the generator's thread was in the kernel's real-time class."""
    reasons: dict[str, int]
    """Why requests failed, and how often."""
    stopped: str
    """Why the run ended before its time; empty where it did not. Ctrl-C ends one with what it saw."""
    zero_s: float
    """Monotonic time of the run's zero."""
    started_at_s: float
    """UTC of the same moment."""
    ended_s: float
    """When the last request had ended, from the run's zero."""

    @property
    def measured(self) -> Record:
        """The requests due after the warm-up: those that are judged."""
        return self.record.where(self.record.due_s >= self.measured_from_s)


class Target:
    """A model of a server, with requests ready to be sent. Raises Unavailable, NotFound, SpecError.

    plan: its url, model, batch, inputs, shapes, json and seed count here.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        host, port = plan.address
        shm = False if plan.scheme == "http" else None
        transport = open_transport(f"{plan.scheme}://{host}:{port}", timeout_s=plan.timeout_s, threads=1, shm=shm)
        try:
            self.metadata = transport.metadata(plan.model)
        finally:
            transport.close()
        self.requests = self._encoded(plan)
        """Encoded for the wire."""

    def warm_up(self) -> Warmth:
        """Send requests until the server has settled; see Warmth. Raises ModelFailed when it answers none."""
        began_s = time.perf_counter()
        before_s, sent, settled = float("inf"), 0, False
        while not settled and (left_s := MAX_WARM_S - (time.perf_counter() - began_s)) > 0:
            columns = Columns(WARM_ROUND)
            wire, loop = self._loop(self._plan, columns, 0.0, connections=1)
            try:
                wire.open(loop)
                loop.run_closed(1, left_s)
            finally:
                wire.close()
                loop.close()
            if loop.stopped.startswith(INTERRUPTED):
                raise KeyboardInterrupt
            record = columns.record(loop.count)
            sent += len(record)
            good = record.service_s[record.outcome == 0]
            if not good.size:
                reason = next(iter(loop.reasons), f"no answer within {self._plan.timeout_s:g} s")
                hint = " (does the server take raw tensors? else --json-tensors)" if _may_be_raw(self._plan, reason) else ""
                raise ModelFailed(f"{self._plan.url} answers no request for {self._plan.model}: {reason}{hint}")
            median_s = statistics.median(good.tolist())
            settled = len(record) == WARM_ROUND and median_s >= WARM_QUICKER * before_s
            before_s = median_s
        return Warmth(requests=sent, seconds=time.perf_counter() - began_s, settled=settled)

    def run(self, plan: LoadPlan, folder: Path | None = None) -> LoadRun:
        """Run a plan once. folder: where its record is kept while it runs.

        Raises Unavailable when no connection can be had before the run; what happens during it is in the record.
        """
        due_s = None if plan.clients else plan.due_s()
        count = CLOSED_CAPACITY if due_s is None else len(due_s)
        columns = Columns(count, folder)
        if due_s is not None:
            columns.begin(count)
            np.asarray(columns.due)[:] = due_s
        measured_from_s = plan.measured_from_s()
        wire, loop = self._loop(plan, columns, measured_from_s, connections=plan.opened_connections(due_s))
        try:
            wire.open(loop)
            if due_s is None:
                loop.run_closed(plan.clients, plan.seconds)
            else:
                loop.run_open(count)
            ended_s = time.perf_counter() - loop.zero_s
        finally:
            wire.close()
            loop.close()
        wall_s = max(loop.wall_s, 1e-9)
        return LoadRun(
            plan=plan,
            record=columns.record(loop.count),
            measured_from_s=measured_from_s,
            own=OwnUse(
                wall_s=wall_s, cpu_s=loop.cpu_s, max_in_flight=plan.max_in_flight, full_s=min(max(loop.full_s, 0.0), ended_s)
            ),
            peak_in_flight=loop.peak_in_flight,
            realtime=loop.realtime,
            reasons=loop.reasons,
            stopped=loop.stopped,
            zero_s=loop.zero_s,
            started_at_s=time.time() - ended_s,
            ended_s=ended_s,
        )

    def _loop(self, plan: LoadPlan, columns: Columns, measured_from_s: float, *, connections: int) -> tuple[Any, Loop]:
        host, port = plan.address
        # each request in flight over HTTP has a connection, each connection a file
        room = _room_for_files(plan.max_in_flight) if plan.scheme == "http" else plan.max_in_flight
        kind = HttpWire if plan.scheme == "http" else GrpcWire
        wire = kind(host, port, connections=min(connections, room), timeout_s=plan.timeout_s)
        loop = Loop(
            wire,
            columns,
            self.requests,
            plan.choice(len(self.requests)),
            timeout_s=plan.timeout_s,
            max_in_flight=min(room, plan.max_in_flight),
            measured_from_s=measured_from_s,
        )
        return wire, loop

    def _encoded(self, plan: LoadPlan) -> Sequence[Any]:
        if plan.inputs:
            inputs = list(payload.file_inputs(Path(plan.inputs), self.metadata, batch=plan.batch))
        else:
            inputs = list(payload.random_inputs(self.metadata, batch=plan.batch, shapes=plan.shapes, seed=plan.seed, count=16))
        host, port = plan.address
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if plan.scheme == "http":
            return payload.http_requests(where, plan.model, inputs, json=plan.json)
        return payload.grpc_requests(where, plan.model, inputs)


def _may_be_raw(plan: LoadPlan, reason: str) -> bool:
    """Return whether a failure may come of a server that does not know the protocol's binary extension."""
    return plan.scheme == "http" and not plan.json and reason.startswith(("HTTP 400", "HTTP 415", "HTTP 422", "HTTP 5"))


def _room_for_files(wanted: int) -> int:
    """Let this process open so many connections and what it needs besides; return how many it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_FILES))
