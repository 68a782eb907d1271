"""What rooms hand each other: the runtime contract, and the callables that let rooms work without knowing one another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from tenure.jobs import Command
from tenure.resources import Bound, DeviceShare, Envelope
from tenure.trials import Configuration, Prediction, Trial
from tenure.usage import Usage


class Clock(Protocol):
    """Time as an argument. Deadlines are counted on `boot_s`, kept and shown in `utc_s`."""

    def utc_s(self) -> float:
        """Seconds since 1970, UTC. May jump."""
        ...

    def boot_s(self) -> float:
        """Seconds since boot, suspended time included (CLOCK_BOOTTIME). Never jumps."""
        ...

    def boot_id(self) -> str:
        """Changes with every boot; a `boot_s` is only comparable within one."""
        ...


class SystemClock:
    """This machine's clock."""

    def utc_s(self) -> float:
        """See Clock."""
        return time.time()

    def boot_s(self) -> float:
        """See Clock."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """See Clock."""
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


MACHINE_RESTARTED = "its machine was started again"
"""How the witness of an attempt begins that a reboot ended: `stopped`, though nobody ordered it."""


class ExitKind(StrEnum):
    """How a job's process ended, as its runtime saw it."""

    COMPLETED = "completed"
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_TIME = "out_of_time"
    OUT_OF_DISK = "out_of_disk"
    STOPPED = "stopped"
    """Ended on order."""
    SIGNALLED = "signalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The exit record that a shim writes to disk."""

    kind: ExitKind
    code: int = 0
    """Exit status, for `failed`."""
    signal: int = 0
    """Signal number, for `signalled`."""
    witness: str = ""
    """Who says so: the cgroup's own counter, the shim's poll with its figures."""
    started_at_s: float = 0.0
    ended_at_s: float = 0.0
    usage: Usage | None = None
    """Last counters; `peak_memory_bytes` is the height over the whole attempt."""
    result: Mapping[str, Any] | None = None
    """Content of the attempt's `result.json`, or None."""
    log_tail: str = ""
    """Last lines of the attempt's output, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpec:
    """One attempt to be started under a lease. A field that a runtime cannot honour raises Unsupported."""

    lease_id: str
    fence: int
    attempt: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str
    """Absolute; made when missing."""
    worker_dir: str
    """TENURE_WORKER_DIR: absolute; made when missing; `result.json` and `lease.json` lie here; disk is polled here."""
    log_path: str
    """Both output streams, appended."""
    envelope: Envelope
    devices: tuple[DeviceShare, ...] = ()
    deadline_boot_s: float
    """End of the slot on CLOCK_BOOTTIME."""
    boot_id: str
    grace_s: float = 5.0
    network: str = "host"
    user: str = ""
    """Empty: the agent's own. Of another user the attempt's folders are made, and files in them touched, with that user's
    rights: they lie where that user may write."""
    image: str = ""
    mounts: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    pids_max: int = 1024
    read_only_root: bool = False
    capabilities: tuple[str, ...] = ()
    seccomp: str = ""
    """Absolute path of a profile of system calls, in Docker's format. Empty: that of the image, if it is one of Tenure with a
    profile; else the engine's for a container, and none for a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeHandle:
    """What a runtime needs to find one attempt again after its own death."""

    lease_id: str
    attempt: int
    fence: int
    pid: int
    """Of the shim."""
    start_ticks: int
    """Field 22 of /proc/<pid>/stat: tells a reused pid apart."""
    started_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The terminal that a command inside a lease is shown in."""

    rows: int = 24
    columns: int = 80
    term: str = "xterm"
    """TERM: what it understands."""


class Session(Protocol):
    """A command inside a lease that somebody talks to. Nothing of it blocks but `end`; one thread at a time uses it."""

    def fileno(self) -> int:
        """Return what is readable when there is output, or its end."""
        ...

    def input_fileno(self) -> int:
        """Return what is writable when input is taken."""
        ...

    def read(self) -> bytes | None:
        """Return some output; empty at its end, None while there is none."""
        ...

    def write(self, data: bytes) -> int:
        """Hand input to the command; return how many bytes were taken. Of one that reads no more, all are."""
        ...

    def close_input(self) -> None:
        """Say that no more input comes: as Ctrl-D does in a terminal."""
        ...

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command of a window's new size. Nothing happens without a window."""
        ...

    def code(self) -> int | None:
        """Return the exit code (negative: signal), None while it runs."""
        ...

    def end(self) -> None:
        """End the command, if it still runs, and let go of everything: SIGHUP as from a terminal that is gone, then SIGKILL."""
        ...


class Runtime(Protocol):
    """Confines commands on this machine. One contract suite runs over all (tests/contracts/runtime_contract.py).

    Exactly one attempt of a lease runs at a time; `start` of a lease that still runs raises Conflict, with an older
    fence StaleFence. Handles stay valid after the agent's death (`attach`). No process of a lease outlives its attempt.
    """

    name: str

    def bounds(self) -> Mapping[str, Bound]:
        """Return how each envelope field is held here."""
        ...

    def confinement(self) -> str:
        """Return one sentence on the means, e.g. ``cgroup v1: memory, cpu, pids``."""
        ...

    def start(self, spec: StartSpec) -> RuntimeHandle:
        """Start an attempt and return once its program is about to run. Raises Unsupported, Conflict, StaleFence."""
        ...

    def attach(self, lease_id: str) -> RuntimeHandle:
        """Return the handle of a lease's last attempt. Raises NotFound."""
        ...

    def list(self) -> Sequence[RuntimeHandle]:
        """Return the handles of all attempts whose shim is alive."""
        ...

    def usage(self, handle: RuntimeHandle) -> Usage:
        """Return the attempt's consumption so far."""
        ...

    def renew(self, handle: RuntimeHandle, *, deadline_boot_s: float, fence: int) -> None:
        """Move the deadline. Raises StaleFence."""
        ...

    def resize(self, handle: RuntimeHandle, envelope: Envelope, *, fence: int) -> None:
        """Change CPU, memory and disk bounds live. Raises StaleFence, Unsupported."""
        ...

    def exec(self, handle: RuntimeHandle, argv: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
        """Run a command inside the lease's bounds; return exit code and output (at most 1 MiB)."""
        ...

    def session(self, handle: RuntimeHandle, argv: Sequence[str], *, window: Window | None) -> Session:
        """Begin a command inside the lease's bounds for somebody to talk to. window: None: pipes instead of a terminal.

        Raises Conflict when the attempt has ended, Unsupported where there can be none.
        """
        ...

    def logs(self, handle: RuntimeHandle, *, max_bytes: int = 65536) -> bytes:
        """Return the end of the attempt's output."""
        ...

    def wait(self, handle: RuntimeHandle, timeout_s: float) -> Exit | None:
        """Return the exit record, or None when the attempt still runs after `timeout_s`."""
        ...

    def stop(self, handle: RuntimeHandle, *, grace_s: float, fence: int, kind: ExitKind = ExitKind.STOPPED) -> None:
        """Ask the attempt to leave, and end it after the grace. Returns at once; `wait` tells the end."""
        ...

    def forget(self, lease_id: str) -> None:
        """Remove what the runtime keeps of an ended lease (exit records, cgroups)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """Something to be run under a lease of its own."""

    name: str
    """Within the stage; names the worker folder and the log."""
    command: Command
    envelope: Envelope
    resumes: int = 0
    """How often it is asked for again, as a whole, when it had to give way to others."""


class Launched(Protocol):
    """Something that runs under a lease."""

    lease_id: str
    worker_dir: Path

    @property
    def endpoints(self) -> Mapping[str, str]:
        """Named addresses of the command's ports, e.g. ``{"http": "127.0.0.1:8000"}``."""
        ...

    def usage(self) -> Usage:
        """Return its consumption so far."""
        ...

    def wait(self, timeout_s: float) -> Exit | None:
        """Return how it ended, or None when it still runs."""
        ...

    def stop(self, grace_s: float = 5.0) -> Exit:
        """End it and return how it ended."""
        ...


class Launch(Protocol):
    """The one way to run a job: hands a command to the broker and returns when it runs. Raises Refused, JobFailed."""

    def __call__(self, request: LaunchRequest) -> Launched:
        """Launch one command under one lease."""
        ...


class Invoke(Protocol):
    """Start one of the training function's roles with an event (study 2): published once, started at least once."""

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Publish the event under its idempotency key and have it started."""
        ...


class Progress(Protocol):
    """Told what a stage is doing, for a live display."""

    def __call__(self, text: str, *, done: float | None = None) -> None:
        """text: what happens now. done: share finished, 0..1, when known."""
        ...


class Tunable(Protocol):
    """Something whose configuration can be measured and chosen: what `recommend` works on.

    `probe` touches the world; the others are pure. `recommend.tune` loops: predict for all configurations from the
    trials at hand, ask `next_probe` what is still too uncertain, probe, until nothing is left or the bound is spent.
    """

    fingerprint: str

    def configurations(self) -> Sequence[Configuration]:
        """Return every configuration to choose from."""
        ...

    def next_probe(self, trials: Sequence[Trial]) -> Configuration | None:
        """Return the configuration whose measurement would tell most, or None when the trials are enough."""
        ...

    def probe(self, configuration: Configuration) -> Iterator[Trial]:
        """Measure and yield each trial made."""
        ...

    def predict(self, configuration: Configuration, trials: Sequence[Trial]) -> Mapping[str, Prediction]:
        """Return the predicted metrics of one configuration."""
        ...
