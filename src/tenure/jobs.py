"""A job: one thing to run, and the command that a lease holds. What a job file says is parsed in `jobfile`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tenure.errors import SpecError
from tenure.resources import Envelope
from tenure.sweeps import Search, Sweep

JobKind = Literal["workspace", "train", "serve", "task"]
JOB_KINDS: tuple[JobKind, ...] = ("workspace", "train", "serve", "task")
EXCHANGES = ("sharded", "central")
RuntimeName = Literal["process", "container", "microvm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a lease runs."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    """Absolute folder to start in; empty means the worker folder."""
    on_event: bool = False
    """Start once per event addressed to this worker, instead of once at the grant."""
    expects_result: bool = False
    """Exit 0 without `result.json` (`state: done | continue`) is a failure."""
    grace_s: float = 5.0
    """Between SIGTERM and SIGKILL."""
    network: str = "host"
    """`host`, or `netns:NAME` for an existing network namespace."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Named ports the command listens on, e.g. ``{"http": 8000}``; endpoints are made of them."""
    announces: bool = True
    """It writes ``endpoints.json`` itself once it listens; False: a port that it names counts once something answers there."""
    secrets: tuple[str, ...] = ()
    """Names of environment variables handed through from the submitter, never stored."""
    runtime: RuntimeName = "process"
    image: str = ""
    """Folder of an image of Tenure, whose form fits the runtime; or, of a container, one that the node's engine has; empty:
    this machine's own files (in a container: its Python, `runtimes/images.py`)."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """What a container sees of the machine: path there -> path inside, with ``:ro`` at its end only to be read."""
    seccomp: str = ""
    """Profile of system calls in Docker's format, an absolute path on the node; empty: the image's, or the runtime's own."""

    def __post_init__(self) -> None:
        if not self.argv or not self.argv[0]:
            raise SpecError("a command needs at least a program to run")
        if not 0 <= self.grace_s <= 600:
            raise SpecError(f"command grace must lie between 0 and 600 s; found {self.grace_s!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """What to do when a stage's job fails by itself."""

    attempts: int = 1
    """How often it is started at most."""
    preempted: int = 8
    """How often it is asked for again after it had to give way to others, with what is left of its total; it begins anew."""

    def __post_init__(self) -> None:
        if not 0 <= self.preempted <= 1000:
            raise SpecError(f"retry.preempted must lie between 0 and 1,000; found {self.preempted!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How measuring may spend time."""

    max_s: float = 60.0
    """Bound of all probes of the stage together."""
    repeats: int = 3
    memory_bytes: int = 1 << 30
    """Memory of the generous envelope that probes run under, per worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainGoal:
    """What a training run must reach, at the least cost."""

    accuracy: float
    """Share of held-out examples classified rightly, 0 < accuracy <= 1."""
    time_s: float = 0.0
    """Latest end, from the grant; 0 = no bound."""
    cost_usd: float = 0.0
    """Highest cost; 0 = no bound."""

    def __post_init__(self) -> None:
        if not 0 < self.accuracy <= 1:
            raise SpecError(f"goal.accuracy must lie above 0 and at most 1; found {self.accuracy!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeGoal:
    """What a served model must meet, at the least cost. A bound of 0 is no bound."""

    name: str
    clients: int = 1
    """Applications that use the model at the same time, each a process of its own."""
    p99_s: float = 0.0
    """Highest 99th percentile of a request's latency."""
    images_per_s: float = 0.0
    """Least rate over all clients."""
    memory_bytes: int = 0
    """Highest memory of everything that holds the model: all applications, and the server if there is one."""
    lease: bool = False
    """Lease the winner and answer one request through the public client."""

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise SpecError(f"goal.clients must be at least 1; found {self.clients!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How the server of a model is set up. Zero: the server chooses, from its lease and the model."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of the machine's."""
    memory_budget_bytes: int = 0
    """For the requests held at once; past it they are refused with when to try again."""
    instances: int = 0
    """Loaded copies of each model, each a process."""
    threads: int = 0
    """Of each model, shared by its instances."""
    max_batch_rows: int = 0
    """Rows of one run of a model, over all requests in it."""
    max_delay_s: float = 0.0
    """How long a request may wait for others to share its run."""

    def __post_init__(self) -> None:
        for name in ("instances", "threads", "max_batch_rows"):
            if not 0 <= getattr(self, name) <= 65536:
                raise SpecError(
                    f"server.{name} must lie between 0 (the server chooses) and 65,536; found {getattr(self, name)!r}"
                )
        if not 0 <= self.max_delay_s <= 10:
            raise SpecError(f"server.max_delay must lie between 0 and 10 s; found {self.max_delay_s!r} s")
        if self.memory_budget_bytes and self.memory_budget_bytes < 1 << 20:
            raise SpecError(f"server.memory_budget must be at least 1MiB; found {self.memory_budget_bytes} bytes")
        if not self.host or self.host.startswith("-"):
            raise SpecError(f"server.host must be an address to listen on, such as 127.0.0.1; found {self.host!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to run: a stage of a job file. Raises SpecError when its parts contradict each other."""

    kind: JobKind
    name: str
    runtime: RuntimeName = "process"
    image: str = ""
    """Folder of an image of Tenure, whose form fits the runtime; or, of a container, one that the node's engine has; empty:
    this machine's Python."""
    program: str = ""
    """``file.py:Name`` of a training program."""
    command: tuple[str, ...] = ()
    model: str = ""
    """Path of a model, or ``stage:file`` for an artefact of an earlier stage."""
    envelope: Envelope | None = None
    """None: measure, and recommend one."""
    train_goal: TrainGoal | None = None
    serve_goals: tuple[ServeGoal, ...] = ()
    workers: int = 0
    """Size of the gang when the envelope is given; 0: recommend."""
    shards: int = 8
    """Parts of a round's work, whoever computes them (same-result mode)."""
    batch: int = 0
    """Examples per round over all shards; 0: the whole training set."""
    max_rounds: int = 1000
    evaluate_every: int = 1
    """Rounds of training between two looks at the held-out examples."""
    seed: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name -> path, relative to the job file, or ``stage:file``."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Name -> path relative to the worker folder; kept as artefacts. A missing one fails the stage."""
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    server: ServerOptions = field(default_factory=ServerOptions)
    """Of a serve stage's server."""
    sweep: Sweep | None = None
    """A serve stage that is an experiment."""
    search: Search | None = None
    """A serve stage whose goals are answered by a search over settings, of which only some are measured."""
    retry: Retry = field(default_factory=Retry)
    probe: Probe = field(default_factory=Probe)
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Handed to a training program's constructor."""
    same_result: bool = True
    """The trained weights do not depend on the number of workers, bit for bit; False: faster, or fewer bytes."""
    exchange: str = "sharded"
    """`sharded`: each worker adds a slice of all gradients. `central`: one adds everything."""
    local_steps: int = 0
    """Steps that each worker takes alone between two exchanges; 0: an exchange after every step."""
    codec: str = "none"
    """How exchanged numbers are made smaller: `none`, `int8` or `topk:SHARE`."""
    outer_rate: float = 0.7
    """Of the outer step after local steps."""
    outer_momentum: float = 0.9
    """Of the outer step after local steps."""

    def __post_init__(self) -> None:
        needs = {"train": self.program, "serve": self.model, "task": self.command, "workspace": True}
        if not needs[self.kind]:
            key = {"train": "program", "serve": "model", "task": "command"}[self.kind]
            raise SpecError(f"a {self.kind} stage needs {key!r}")
        if self.kind == "train" and self.runtime != "process":
            raise SpecError(f'runtime must be "process" in a train stage: its workers share a store; found {self.runtime!r}')
        if self.image and self.runtime != "container" and not self.image.startswith("/"):
            raise SpecError(
                f'image must be left out, or be the folder of an image of Tenure, with runtime = "{self.runtime}"; '
                f'found {self.image!r}. Write runtime = "container" to use an image of the engine'
            )
        if self.kind == "train" and self.envelope is None and self.train_goal is None:
            raise SpecError("a train stage needs either [train.goal] or [train.envelope] with workers")
        ways = [name for name in ("envelope", "sweep", "search") if getattr(self, name) is not None]
        if self.kind == "serve" and not ways and not self.serve_goals:
            raise SpecError("a serve stage needs [[serve.goals]], [serve.search], [serve.sweep] or [serve.envelope]")
        if self.kind == "serve" and len(ways) > 1:
            raise SpecError(
                "a serve stage is served ([serve.envelope]), an experiment ([serve.sweep]) or searched ([serve.search]), one "
                f"of them; found {' and '.join(ways)}"
            )
        if not 1 <= self.shards <= 4096:
            raise SpecError(f"shards must lie between 1 and 4096; found {self.shards!r}")
        if self.workers < 0 or self.workers > self.shards:
            raise SpecError(f"workers must lie between 1 and shards ({self.shards}); found {self.workers!r}")
        if not 1 <= self.max_rounds <= 10_000_000:
            raise SpecError(f"max_rounds must lie between 1 and 10,000,000; found {self.max_rounds!r}")
        if not 1 <= self.evaluate_every <= 1_000_000:
            raise SpecError(f"evaluate_every must lie between 1 and 1,000,000 rounds; found {self.evaluate_every!r}")
        check_exchange(
            same_result=self.same_result,
            exchange=self.exchange,
            local_steps=self.local_steps,
            codec=self.codec,
            outer_rate=self.outer_rate,
            outer_momentum=self.outer_momentum,
        )


def parse_codec(codec: str) -> tuple[str, float]:
    """Return kind (`none`, `int8` or `topk`) and the share of values that is kept, from e.g. "topk:0.01". Raises SpecError."""
    kind, colon, share = codec.partition(":")
    if codec in ("none", "int8"):
        return codec, 1.0
    try:
        kept = float(share) if kind == "topk" and colon else 0.0
    except ValueError:
        kept = 0.0
    if not 0 < kept <= 1:
        raise SpecError(
            f'codec must be "none", "int8" or "topk:SHARE" with a share above 0, at most 1, e.g. "topk:0.01"; found {codec!r}'
        )
    return kind, kept


def check_exchange(
    *, same_result: bool, exchange: str, local_steps: int, codec: str, outer_rate: float, outer_momentum: float
) -> None:
    """Check what a training stage says of its exchange. Raises SpecError."""
    if exchange not in EXCHANGES:
        raise SpecError(f"exchange must be one of {', '.join(EXCHANGES)}; found {exchange!r}")
    kind, _ = parse_codec(codec)
    if not 0 <= local_steps <= 1_000_000:
        raise SpecError(f"local_steps must lie between 0 (exchange every step) and 1,000,000; found {local_steps!r}")
    if not 0 < outer_rate <= 10:
        raise SpecError(f"outer_rate must lie above 0 and at most 10; found {outer_rate!r}")
    if not 0 <= outer_momentum < 1:
        raise SpecError(f"outer_momentum must be at least 0 and below 1; found {outer_momentum!r}")
    if same_result and (local_steps or kind != "none"):
        raise SpecError(
            f"{'local_steps' if local_steps else 'codec'} must be left out with same_result = true, which promises weights "
            f'that do not depend on the number of workers; found local_steps = {local_steps}, codec = "{codec}". '
            "Set same_result = false to have fewer bytes instead."
        )


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the 16-digit name under which trials of the same job on the same kind of machine are found again.

    parts: JSON-ready: program content hashes, input manifest, library versions, machine class.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
