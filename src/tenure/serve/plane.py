"""What the doors and the data plane hand each other: nouns and one protocol, no I/O.

    HTTP door ┐  reserve a buffer, read the body into it,        ┌ instance (a process) of model a
              ├─ describe its tensors as a Call, submit ─► Plane ┤
    gRPC door ┘  … done(call) is called with answer or error     └ instance of model b …

Request bytes lie in an arena of shared memory that is as large as the memory budget; the doors read from the socket
straight into it and the instances map it, so a tensor is not copied on its way. Nothing on this path is a coroutine:
a door submits with a plain call and is called back once, on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from tenure.errors import TenureError
from tenure.serve.tensors import ModelMetadata

SERVER_NAME = "tenure"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
"""Extensions of the protocol that both doors always offer."""
SHARED_MEMORY = "system_shared_memory"
"""The extension that is offered only where clients may register regions."""
ALIGNMENT = 64
"""Every buffer starts at a multiple of this, so that tensors read to its start need no copy to be used."""


@dataclass(slots=True, eq=False)
class Buffer:
    """Arena memory held by one request until its call has ended."""

    offset: int
    """Place in the arena, bytes."""
    view: memoryview
    """Writable bytes, as many as were reserved."""
    door: str


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where an input lies, in the protocol's raw layout (BYTES elements carry their 4-byte length)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the call's buffer, or of the region."""
    nbytes: int
    region: str = ""
    """Name of a registered shared-memory region; empty: the call's buffer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output asked for, and where it goes."""

    name: str
    region: str = ""
    """Registered region that the model's process writes it to; empty: into the answer."""
    offset: int = 0
    nbytes: int = 0
    """Room in the region."""


class Output(msgspec.Struct, frozen=True, gc=False):
    """One output of an answer."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | None
    """Raw layout, valid only until `done` returns: copy what is kept. None: it was written to the region asked for."""
    region: str = ""
    offset: int = 0
    nbytes: int = 0


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What a model gave for one call, outputs in the order asked for, else the model's."""

    model: str
    version: str
    outputs: tuple[Output, ...]


@dataclass(slots=True, eq=False)
class Call:
    """One inference request on its way. The plane sets `answer` or `error`, then calls `done` exactly once."""

    model: str
    version: str
    inputs: tuple[TensorRef, ...]
    done: Callable[[Call], None]
    buffer: Buffer | None = None
    """Owned by the plane from `submit` on, also when it refuses: a door does not release it then."""
    outputs: tuple[Wanted, ...] = ()
    """None named: all, into the answer."""
    id: str = ""
    priority: int = 0
    """1 is the highest; 0 takes the model's default."""
    timeout_s: float = 0.0
    """From submit to answer; 0 takes the model's default."""
    answer: Answer | None = None
    error: TenureError | None = None
    state: Any = None
    """The door's own: which connection or stream waits. The plane leaves it alone."""
    ticket: Any = field(default=None, repr=False)
    """The plane's own."""


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """One registered shared-memory region."""

    name: str
    key: str
    """As shm_open takes it, e.g. ``/weights``."""
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One version of one model of the repository."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE, as the repository extension names them."""
    reason: str = ""


@dataclass(slots=True)
class Durations:
    """How often something happened, and how long it took in all."""

    count: int = 0
    total_s: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count `count` occurrences that took `seconds` together."""
        self.count += count
        self.total_s += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Counters of one model version since it was loaded; the statistics extension's fields in our units."""

    inference_count: int = 0
    """Rows answered (a batch of 8 counts 8)."""
    execution_count: int = 0
    """Runs of the engine."""
    last_inference_at_s: float = 0.0
    """Unix time of the last request, seconds."""
    success: Durations = field(default_factory=Durations)
    fail: Durations = field(default_factory=Durations)
    queue: Durations = field(default_factory=Durations)
    compute_input: Durations = field(default_factory=Durations)
    compute_infer: Durations = field(default_factory=Durations)
    compute_output: Durations = field(default_factory=Durations)
    batches: dict[int, tuple[Durations, Durations, Durations]] = field(default_factory=dict)
    """Rows of a run → its compute input, infer, output times."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Requests by how they ended: ok, refused, overloaded, failed, timed_out, cancelled."""
    restarts: int = 0
    """Instances started again after a crash or a hang."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How one model is served. Zero means: chosen from the lease and the model."""

    max_batch_rows: int = 0
    max_delay_s: float = 0.0
    """How long a request may wait for company; 0: a batch is what waits when an instance falls free."""
    instances: int = 0
    threads: int = 0
    """Per instance."""
    max_queue: int = 1024
    """Requests waiting per model."""
    timeout_s: float = 60.0
    """From acceptance to answer, where the request names none; also what a hanging instance is ended after."""
    queue_timeout_s: float = 0.0
    """How long a request may wait before it is run; 0: as long as its timeout."""
    priority_levels: int = 0
    warmup: bool = True
    device: str = "cpu"
    """Where the engine runs it: ``cpu``, ``cuda`` or ``cuda:1``."""
    precision: str = "fp32"
    """``fp16``: in half precision where the engine can, on ``cuda``."""


class Plane(Protocol):
    """The data plane as a door sees it. All of it belongs to one event loop and its thread."""

    draining: bool

    @property
    def ready(self) -> bool:
        """Whether requests are welcome: not draining, every model that should be loaded is."""
        ...

    @property
    def extensions(self) -> Sequence[str]:
        """Names of the protocol's extensions that are offered."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes reserved now, all doors together."""
        ...

    def reserve(self, nbytes: int, door: str) -> Buffer:
        """Return room for a request of `nbytes` in all. Raises TooLarge; Overloaded (with when to try again)."""
        ...

    def release(self, buffer: Buffer) -> None:
        """Give back a buffer that was never submitted."""
        ...

    def submit(self, call: Call) -> None:
        """Queue a call. It may be refused at once (raises, `done` is not called) or later (`done` with `error`).

        Raises NotFound, InputRefused, Overloaded, Unavailable (the model is not ready).
        """
        ...

    def cancel(self, call: Call) -> None:
        """Nobody waits any more: drop it if it has not started; `done` is not called from here on."""
        ...

    def model_ready(self, name: str, version: str = "") -> bool:
        """Return whether a model can answer. Raises NotFound."""
        ...

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Return what a model takes and gives. Raises NotFound, Unavailable."""
        ...

    def config(self, name: str, version: str = "") -> Mapping[str, Any]:
        """Return the model's configuration as the model configuration extension's JSON. Raises NotFound, Unavailable."""
        ...

    def statistics(self, name: str = "", version: str = "") -> Mapping[tuple[str, str], ModelStatistics]:
        """Return the counters by (model, version). Raises NotFound."""
        ...

    def index(self, *, ready_only: bool = False) -> Sequence[IndexEntry]:
        """Return what the repository holds, loaded or not."""
        ...

    async def load(self, name: str) -> None:
        """Load a model's versions, or swap them for what the repository holds now; requests keep being answered.

        Raises NotFound, SpecError, MissingExtra; what was served before goes on being served then.
        """
        ...

    async def unload(self, name: str) -> None:
        """Refuse new requests for a model, answer those accepted, free it. Raises NotFound."""
        ...

    def register_region(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Make a system shared-memory object usable by name. Raises InputRefused (absent, too short, name taken)."""
        ...

    def unregister_region(self, name: str = "") -> None:
        """Forget one region, or all. Unknown names are no error, as the extension says."""
        ...

    def regions(self, name: str = "") -> Sequence[RegionStatus]:
        """Return registered regions. Raises NotFound for a name that is not."""
        ...
