"""A run: one execution of a job file, its stages, and the files it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tenure.jobs import JobKind


class RunState(StrEnum):
    """State of a run, and of each of its stages."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


DEFAULT_DISK_BYTES = 10 << 30
FINAL_RUN_STATES = frozenset({RunState.DONE, RunState.FAILED, RunState.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One job of a run."""

    name: str
    kind: JobKind
    state: RunState = RunState.PENDING
    fingerprint: str = ""
    attempts: int = 0
    artefacts: Mapping[str, str] = field(default_factory=dict)
    """Name -> path below the stage's folder."""
    detail: str = ""
    """Why it failed, or its closing line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of a job file. Stages are in the order of the file."""

    id: str
    name: str
    tenant: str
    job_file: str
    """The job file's text, as it was when the run began."""
    source: str
    """Where the job file lies; relative inputs are resolved against its folder."""
    state: RunState = RunState.PENDING
    stages: tuple[Stage, ...] = ()
    created_at_s: float = 0.0
    disk_bytes: int = DEFAULT_DISK_BYTES
    """What its folder may occupy, all stages together; 0 for no bound."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Where a run's files lie below TENURE_HOME. Paths only: nothing is made or read here."""

    home: Path
    run_id: str

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.home / "runs" / self.run_id

    def stage(self, stage: str) -> Path:
        """A stage's folder, TENURE_RUN_DIR of its processes."""
        return self.root / stage

    def store(self, stage: str) -> Path:
        """The stage's training store; invocation events lie in ``store/events``."""
        return self.stage(stage) / "store"

    def artefacts(self, stage: str) -> Path:
        """What the stage leaves for later stages and people."""
        return self.stage(stage) / "artefacts"

    def logs(self, stage: str) -> Path:
        """Output of the stage's processes."""
        return self.stage(stage) / "logs"

    def worker(self, stage: str, worker: int, attempt: int) -> Path:
        """TENURE_WORKER_DIR of one attempt."""
        return self.stage(stage) / "workers" / str(worker) / str(attempt)
