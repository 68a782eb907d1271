"""What a load run is asked for, checked before anything is sent. Not here: doing it (`runner`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tenure.errors import SpecError
from tenure.serve.load.payload import Shape
from tenure.serve.load.records import Floats
from tenure.serve.load.schedule import MAX_REQUESTS, Arrivals, drawn, recorded

Kind = Literal["open", "closed"]
"""Of a load: open sends by the clock whatever the server does; in a closed one each client waits for its answer. Their
latencies are never put in one column: a server that stands still stops a closed load, and so hides from it."""
MAX_WARMUP_S = 2.0
WARMUP_SHARE = 0.1
CLOSED_CAPACITY = 4_000_000
"""Requests that a closed loop keeps; it ends there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """One run against one model of any server of the v2 protocol. Give one of `rate_per_s`, `clients` and `schedule`."""

    url: str
    """``http://host:port`` or ``grpc://host:port``."""
    model: str
    rate_per_s: float = 0.0
    """Open loop: requests per second."""
    arrivals: Arrivals = "poisson"
    """Of an open loop: ``poisson`` as of users who do not know of each other, or ``constant``."""
    clients: int = 0
    """Closed loop: each sends its next request when the last has ended."""
    schedule: str = ""
    """Open loop: a file of due times (see `schedule.recorded`)."""
    seconds: float = 10.0
    """How long requests become due; a schedule file says that itself."""
    warmup_s: float | None = None
    """Requests due before it are sent and not judged; None: a tenth of the run, 2 s at most, nothing of a schedule file.
    It is laid down before the run, so that no choice made afterwards can hide a slow time."""
    batch: int = 1
    """Rows of a request."""
    inputs: str = ""
    """A .npy or .npz file of rows; empty: random numbers."""
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    """Of random inputs whose lengths the model leaves open, or which the server does not tell."""
    json: bool = False
    """Over HTTP: tensors as JSON, for servers without the binary extension."""
    seed: int = 0
    timeout_s: float = 10.0
    """Of a request, from the moment it is due."""
    connections: int = 0
    """Opened before the run; 0: over gRPC 2, over HTTP what a second of the rate needs, 8 to 256."""
    max_in_flight: int = 4096
    """Of requests; past it a due request waits here, which can make the run invalid. Over HTTP each has its connection."""

    def __post_init__(self) -> None:
        self.address  # noqa: B018 - raises where there is none
        if not self.model:
            raise SpecError("a load run needs the name of a model, as the server knows it (--model NAME)")
        given = [name for name in ("rate_per_s", "clients", "schedule") if getattr(self, name)]
        if len(given) != 1:
            raise SpecError(
                "a load run is one of: --rate R (open loop), --clients N (closed loop), --schedule FILE (open loop); "
                f"found {' and '.join(given) or 'none'}"
            )
        if self.rate_per_s and not 0 < self.rate_per_s <= 1e6:
            raise SpecError(f"rate_per_s lies between 0 and 1e6; found {self.rate_per_s!r}")
        if self.arrivals not in get_args(Arrivals):
            raise SpecError(f"arrivals are {' or '.join(get_args(Arrivals))}; found {self.arrivals!r}")
        bounds = {
            "clients": (0, 65_536),
            "seconds": (0.01, 86_400),
            "batch": (1, 1 << 20),
            "timeout_s": (0.001, 3600),
            "connections": (0, 16_384),
            "max_in_flight": (1, 65_536),
        }
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise SpecError(f"{name} lies between {least} and {most}; found {getattr(self, name)!r}")
        if self.warmup_s is not None and not 0 <= self.warmup_s < self.seconds and not self.schedule:
            raise SpecError(f"warmup_s is part of the run's {self.seconds:g} s; found {self.warmup_s!r}")
        if self.clients > self.max_in_flight:
            raise SpecError(f"{self.clients} clients need max_in_flight of as many; found {self.max_in_flight}")
        if self.rate_per_s * self.seconds > MAX_REQUESTS:
            raise SpecError(f"{self.rate_per_s * self.seconds:.0f} requests are asked for; one run keeps {MAX_REQUESTS}")
        if self.json and self.scheme != "http":
            raise SpecError("json says how tensors go over http://; over grpc:// they always go raw")

    @property
    def scheme(self) -> str:
        """``http`` or ``grpc``."""
        return self.url.partition("://")[0]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port. Raises SpecError."""
        scheme, found, rest = self.url.partition("://")
        host, _, port = rest.rstrip("/").rpartition(":")
        if scheme not in ("http", "grpc") or not found or not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise SpecError(f"a server to load is http://host:port or grpc://host:port; found {self.url!r}")
        return host.removeprefix("[").removesuffix("]"), int(port)

    @property
    def kind(self) -> Kind:
        """Of the load."""
        return "closed" if self.clients else "open"

    def due_s(self) -> Floats:
        """Return the due times of an open loop, from 0. Raises SpecError, NotFound."""
        if self.schedule:
            return recorded(Path(self.schedule))
        return drawn(self.arrivals, self.rate_per_s, self.seconds, self.seed)

    def measured_from_s(self) -> float:
        """Return where the warm-up ends."""
        if self.warmup_s is not None:
            return self.warmup_s
        return 0.0 if self.schedule else min(MAX_WARMUP_S, WARMUP_SHARE * self.seconds)

    def opened_connections(self, due_s: Floats | None) -> int:
        """Return how many connections are opened before the run."""
        if self.connections:
            return min(self.connections, self.max_in_flight)
        if self.scheme == "grpc":
            return 2
        if due_s is None:
            return self.clients
        busiest = int(np.max(np.searchsorted(due_s, due_s + (1 - 1e-9)) - np.arange(len(due_s))))
        return min(self.max_in_flight, max(8, min(256, math.ceil(busiest))))

    def choice(self, different: int) -> list[int]:
        """Return which of so many different requests is sent as which, drawn with replacement; the run repeats it."""
        return [int(number) for number in np.random.default_rng([self.seed, 1]).integers(0, different, size=4096)]
