"""What a load application is told and what it measured: the records, and how they are written and read.

The application itself is `python -m tenure.serve.load SPEC.json` (see `closed`): it prepares the model, then for each
(batch, repeat), in a seeded random order, runs a closed loop and checks every answer.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from tenure.errors import CorruptData, NotFound, SpecError
from tenure.serve.processes import write_json

MAX_LATENCIES = 20_000
"""Latencies kept of one cell; more are counted in `latencies_dropped`, never silently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """One application of study 3."""

    target: str
    """``simple:PATH``, ``http://host:port`` (never by shared memory), ``shm://host:port`` or ``grpc://host:port``."""
    model: str = ""
    """Name at the server; may be empty in-process."""
    interaction: Literal["sync", "async"] = "sync"
    batches: tuple[int, ...] = (1,)
    repeats: int = 3
    seconds: float = 1.0
    """How long one (batch, repeat) runs."""
    max_requests: int = 100_000
    """Bound of one (batch, repeat) beside `seconds`."""
    warmup_requests: int = 3
    """Per (batch, repeat), before the clock starts."""
    concurrency: int = 4
    """Requests in flight when async."""
    inputs: str
    """A .npy file: rows of the model's one input."""
    expected: str
    """A .npy file with as many rows: whole numbers are compared as labels, others within 1e-4."""
    output: str = ""
    """Which output is compared; empty: the one whose kind fits `expected`."""
    seed: int = 0
    start_at_s: float = 0.0
    """UTC time to start together with other applications; 0 is now."""
    timeout_s: float = 30.0
    """Of one request, and of waiting for the server."""
    threads: int = 0
    """In-process, per instance; 0: the lease's CPU share."""
    instances: int = 1
    """In-process: loaded copies of the model, so many calls at once."""

    def __post_init__(self) -> None:
        if not self.target.startswith(("simple:", "http://", "shm://", "grpc://")):
            raise SpecError(f"load.target is simple:PATH, or http, shm or grpc://host:port; found {self.target!r}")
        if self.interaction not in ("sync", "async"):
            raise SpecError(f"load.interaction is sync or async; found {self.interaction!r}")
        if not self.batches or min(self.batches) < 1 or max(self.batches) > 1 << 20:
            raise SpecError(f"load.batches needs sizes from 1 to 1048576; found {self.batches!r}")
        if self.repeats < 1 or self.concurrency < 1 or self.max_requests < 1 or self.warmup_requests < 0:
            raise SpecError("load.repeats, concurrency and max_requests must be at least 1, warmup_requests at least 0")
        if not 0 < self.seconds <= 3600 or not 0 < self.timeout_s <= 3600:
            raise SpecError("load.seconds and load.timeout_s must lie between 0 and 3600")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCell:
    """What one (batch, repeat) gave. Means are per answered request."""

    batch: int
    repeat: int
    requests: int
    """Answered and right."""
    images: int
    """Rows answered and right."""
    wall_s: float
    images_per_s: float
    latencies_s: tuple[float, ...]
    """Of answered requests, in order of their end; async from handing in, so waiting in the client counts."""
    latencies_dropped: int = 0
    prepare_data_s: float = 0.0
    """Cutting the batch out of the data and converting it."""
    send_s: float = 0.0
    recognise_s: float = 0.0
    fetch_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process, all threads, over the cell."""
    wrong: int = 0
    """Answers that differ from `expected`."""
    failed: int = 0
    """Requests that raised."""
    first_error: str = ""
    memory_bytes: int = 0
    """Largest anonymous + shared memory of this process seen during the cell."""

    @property
    def mean_s(self) -> float:
        """Mean latency, seconds; NaN without an answer."""
        return sum(self.latencies_s) / len(self.latencies_s) if self.latencies_s else math.nan

    def percentile_s(self, percent: float) -> float:
        """Return the latency's nearest-rank percentile (0 < percent <= 100), seconds; NaN without an answer."""
        ordered = sorted(self.latencies_s)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan

    @property
    def app_cpu_s_per_image(self) -> float:
        """CPU seconds of this process per right image; NaN without one."""
        return self.cpu_s / self.images if self.images else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What one application measured."""

    cells: tuple[LoadCell, ...]
    """In the order they ran."""
    prepare_model_s: float
    """Loading the engine, or connecting and waiting until ready."""
    load_data_s: float
    """Reading the data files."""
    peak_memory_bytes: int
    """Largest anonymous + shared memory of the process seen (polled each 20 ms at most, between requests)."""
    started_at_s: float
    """UTC time of the first cell."""
    ended_at_s: float
    versions: dict[str, str] = field(default_factory=dict)

    def of_batch(self, batch: int) -> tuple[LoadCell, ...]:
        """Return the repeats of one batch size."""
        return tuple(cell for cell in self.cells if cell.batch == batch)

    @property
    def wrong(self) -> int:
        """Wrong answers of all cells."""
        return sum(cell.wrong for cell in self.cells)

    @property
    def failed(self) -> int:
        """Failed requests of all cells."""
        return sum(cell.failed for cell in self.cells)


def write_load_spec(path: Path | str, spec: LoadSpec) -> None:
    """Write a spec for `load_command`."""
    write_json(Path(path), asdict(spec))


def read_load_spec(path: Path | str) -> LoadSpec:
    """Read a spec. Raises NotFound, SpecError (unknown or wrong fields)."""
    spec: LoadSpec = _read(Path(path), LoadSpec, SpecError)
    return spec


def load_command(spec_path: Path | str) -> tuple[str, ...]:
    """Return the argv that runs an application."""
    return (sys.executable, "-m", "tenure.serve.load", str(spec_path))


def read_load_result(worker_dir: Path | str) -> LoadResult:
    """Read what an application wrote into its worker folder. Raises NotFound, CorruptData (also when it failed)."""
    path = Path(worker_dir) / "result.json"
    content = _read(path, dict[str, Any], CorruptData)
    if content.get("state") != "done" or "load" not in content:
        raise CorruptData(f"{path} holds no finished load: {content.get('error', content.get('state'))!r}")
    try:
        return msgspec.convert(content["load"], LoadResult)
    except msgspec.ValidationError as error:
        raise CorruptData(f"{path} is not a load result: {error}") from error


def _read(path: Path, kind: Any, refused: type[Exception]) -> Any:
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise refused(f"{path} is not JSON: {error}") from error
    try:
        if kind is LoadSpec and (unknown := set(content) - set(LoadSpec.__dataclass_fields__)):
            raise refused(f"{path} has unknown fields {sorted(unknown)}; known: {', '.join(LoadSpec.__dataclass_fields__)}")
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, TypeError) as error:
        raise refused(f"{path}: {error}") from error
