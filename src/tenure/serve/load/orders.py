"""What a standing application is told and what it answers: the records, one JSON line each.

    experiment ──order──► node ──order──► application ──cell──► node ──cell──► experiment

A standing application (`standing`) prepares its model once and then runs one cell when told, so that an experiment can draw
the cells of all its settings in one random order. A node (`node`) holds the applications that share one lease, and the server.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from tenure.errors import CorruptData, SpecError
from tenure.serve.tensors import ModelMetadata

T = TypeVar("T")
STAGES = ("load_data_s", "prepare_data_s", "send_s", "recognise_s", "fetch_s", "log_s", "other_s")
"""Of a request, in their order; docs/bench-serve.md says where each begins and ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What is sent, and what must come back: row i of the array, file i and answer i belong together."""

    inputs: str
    """.npy, rows of the model's one input."""
    expected: str
    """.npy with as many rows: whole numbers are compared as labels, others within 1e-4."""
    files: tuple[str, ...] = ()
    """As many picture files; empty: cells from files are refused."""
    normalise: Literal["", "none", "unit", "signed", "imagenet"] = ""
    """See `pixels.preparation_for`; empty: the model takes integers."""
    crop: float = 0.875
    size: int = 0
    metadata: ModelMetadata | None = None
    """Of the model, for a server that does not say what it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingSpec:
    """One standing application."""

    name: str
    """Within its node."""
    target: str
    """``simple:PATH``, or ``http``, ``shm`` or ``grpc://host:port``; ``{http}`` and ``{grpc}`` stand for the addresses of the
    node's own server."""
    model: str = ""
    """Name at the server; may be empty in-process."""
    interaction: Literal["sync", "async"] = "sync"
    examples: Examples
    timeout_s: float = 60.0
    """Of one request, and of waiting for the server."""
    threads: int = 0
    """In-process, per instance; 0: the lease's CPU share."""
    instances: int = 1
    """In-process: loaded copies of the model, so many calls at once."""
    prepares: int = 3
    """How often the model is prepared and timed before the first cell; the last one stays."""

    def __post_init__(self) -> None:
        if not self.target.startswith(("simple:", "http://", "shm://", "grpc://")):
            raise SpecError(f"an application's target is simple:PATH, or http, shm or grpc://host:port; found {self.target!r}")
        if self.prepares < 1 or not 0 < self.timeout_s <= 3600:
            raise SpecError("an application prepares its model at least once, and its timeout lies between 0 and 3600 s")

    def at(self, endpoints: Mapping[str, str]) -> StandingSpec:
        """Return the application with a server's addresses (http and grpc -> host:port) in its target."""
        target = self.target
        for name, address in endpoints.items():
            target = target.replace(f"{{{name}}}", address)
        return replace(self, target=target)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What one node of an experiment holds."""

    server: tuple[str, ...] = ()
    """Argv of the server; empty: none here. It prints one JSON line with its addresses once it listens."""
    applications: tuple[StandingSpec, ...]
    undisturbed: bool = False
    """Go before everything on this machine that is not in the lease."""
    start_s: float = 120.0
    """Bound of starting all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One cell to run."""

    application: str
    copies: int = 1
    """Applications that run the cell at the same time; several are called as `copies` says, and give one cell together."""
    do: Literal["warm", "run"] = "run"
    """`warm`: what a cell needs before its clock starts; nothing is measured."""
    batch: int = 1
    data: Literal["memory", "files"] = "memory"
    seconds: float = 0.5
    """No request begins later than this; those in flight are waited for."""
    in_flight: int = 1
    """Places for requests when async."""
    seed: int = 0
    """Of the rows that are sent."""
    probes: bool = True
    """False: no stage is timed, to see what timing costs."""
    bound_s: float = 120.0
    """After which the application is taken for dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one order gave. Stages are sums over all requests, seconds of places (see docs/bench-serve.md)."""

    requests: int = 0
    """Answered and right."""
    images: int = 0
    wall_s: float = 0.0
    places: int = 1
    """Requests that could be in flight."""
    stages: dict[str, float] = field(default_factory=dict)
    latencies_s: tuple[float, ...] = ()
    """From handing a request in to having its answer, in order of their end."""
    latencies_dropped: int = 0
    cpu_s: float = 0.0
    """Of the application's process, all threads."""
    own_cpu_s: float = 0.0
    """Of that: loading, preparing, checking, the log. The rest is the client's (in-process the engine's)."""
    wrong: int = 0
    failed: int = 0
    first_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An application that is ready."""

    name: str
    pid: int
    prepare_model_s: tuple[float, ...]
    """Loading the engine, or connecting and waiting until ready: once per time it was done."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """A node whose applications are all ready."""

    pid: int
    server_pid: int = 0
    endpoints: dict[str, str] = field(default_factory=dict)
    """http and grpc -> host:port, of its server."""
    server_start_s: float = 0.0
    """From starting the server to its first address."""
    applications: tuple[Standing, ...] = ()
    disturbed: str = ""
    """Why it could not be undisturbed, when it was to be."""


READY = "node.json"
ORDERS, ANSWERS = "orders", "answers"
"""Two FIFOs in the node's worker folder: any length of path, no port, from any network namespace."""


def copies(application: str, count: int) -> tuple[str, ...]:
    """Return the names of so many applications that are alike."""
    return (application,) if count == 1 else tuple(f"{application}-{n}" for n in range(1, count + 1))


def together(cells: Sequence[Cell]) -> Cell:
    """Return what applications that ran a cell at the same time gave together; it lasted as long as the longest."""
    first = cells[0]
    if len(cells) == 1:
        return first
    return Cell(
        requests=sum(each.requests for each in cells),
        images=sum(each.images for each in cells),
        wall_s=max(each.wall_s for each in cells),
        places=sum(each.places for each in cells),
        stages={name: sum(each.stages.get(name, 0.0) for each in cells) for name in first.stages},
        latencies_s=tuple(latency for each in cells for latency in each.latencies_s),
        latencies_dropped=sum(each.latencies_dropped for each in cells),
        cpu_s=sum(each.cpu_s for each in cells),
        own_cpu_s=sum(each.own_cpu_s for each in cells),
        wrong=sum(each.wrong for each in cells),
        failed=sum(each.failed for each in cells),
        first_error=next((each.first_error for each in cells if each.first_error), ""),
    )


def node_command(spec_path: Path | str) -> tuple[str, ...]:
    """Return the argv that runs a node."""
    return (sys.executable, "-m", "tenure.serve.load.node", str(spec_path))


def standing_command() -> tuple[str, ...]:
    """Return the argv of a standing application; its spec is the first line of its standard input."""
    return (sys.executable, "-m", "tenure.serve.load.standing")


def write(noun: Any) -> bytes:
    """Return one line."""
    return msgspec.json.encode(noun) + b"\n"


def read(line: bytes, kind: type[T]) -> T:
    """Read one line. Raises CorruptData; what a node or application says went wrong is raised as such too."""
    try:
        content = msgspec.json.decode(line)
        if isinstance(content, dict) and "error" in content:
            raise CorruptData(str(content["error"]))
        return msgspec.convert(content, kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptData(f"{line[:200]!r} is not a {kind.__name__}: {error}") from error
