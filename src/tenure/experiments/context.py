"""What the stages of one run share: the broker, the files, the display, ids and the clock."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tenure.broker.client import BrokerClient
from tenure.broker.launch import BrokerLaunch
from tenure.errors import JobFailed, SpecError
from tenure.experiments.manifest import Hasher, job_fingerprint
from tenure.homes import is_guest
from tenure.jobs import Job
from tenure.leases import EndReason, Lease
from tenure.nodes import Node
from tenure.prices import PriceVector
from tenure.protocols import Clock
from tenure.runs import Run, RunFiles, RunState, Stage
from tenure.trials import Configuration, Trial
from tenure.usage import Summary

if TYPE_CHECKING:
    from tenure.experiments.foreground import Listening


INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let a second Ctrl-C wait for nothing and break nothing: what is ended or cleaned up here has bounds of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Display(Protocol):
    """Shown what a run does, as it happens."""

    def stage_started(self, stage: str, step: str, text: str) -> None:
        """A step of a stage begins."""
        ...

    def progress(self, text: str, done: float | None = None) -> None:
        """What happens now; `done` is the share finished, 0..1, when known."""
        ...

    def step_done(self, stage: str, step: str, closing_line: str) -> None:
        """The step is over; one line tells its result."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should know, though the run goes on."""
        ...


@dataclass(slots=True)
class RunContext:
    """One run in progress. Stages read it and leave their artefacts and closing lines in it."""

    client: BrokerClient
    files: RunFiles
    run: Run
    folder: Path
    """Folder of the job file: relative paths start here."""
    display: Display
    node: Node
    prices: PriceVector
    clock: Clock
    new_id: Callable[[str], str]
    versions: Mapping[str, str]
    until: str = "done"
    """`recommend`: stop each stage once its recommendations are recorded."""
    workers: int = 0
    """Size of each training gang, whatever its job or the recommendation says; 0: as they say."""
    listening: Callable[[Listening], None] | None = None
    """Told what a server offers once it listens. A run that has one serves in the foreground: Ctrl-C is its good end."""
    artefacts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stage -> artefact -> path below the stage's artefacts folder."""
    closing: list[str] = field(default_factory=list)
    launches: list[BrokerLaunch] = field(default_factory=list)

    def step(self, stage: str, step: str, text: str) -> None:
        """Begin a step."""
        self.display.stage_started(stage, step, text)

    def close_step(self, stage: str, step: str, line: str) -> None:
        """End a step with its one line."""
        self.closing.append(f"{stage} · {step}: {line}")
        self.display.step_done(stage, step, line)

    def progress(self, text: str, *, done: float | None = None) -> None:
        """Show what happens now (a `protocols.Progress`)."""
        self.display.progress(text, done)

    def launch(self, stage: str) -> BrokerLaunch:
        """Return the way to run something under a lease of its own in this stage."""
        launch = BrokerLaunch(self.client, home=self.files.home, run_id=self.run.id, stage=stage, tenant=self.run.tenant)
        self.launches.append(launch)
        return launch

    def resolve(self, reference: str) -> Path:
        """Return the path of an input: ``stage:file`` is an artefact of an earlier stage, else relative to the job file."""
        stage, colon, rest = reference.partition(":")
        if not colon:
            return (self.folder / reference).resolve()
        path = self.files.artefacts(stage) / rest
        if not path.exists():
            known = ", ".join(sorted(self.artefacts.get(stage, {}))) or "none"
            raise SpecError(f"{reference!r}: stage {stage} left no {rest!r}; its artefacts: {known}")
        return path

    def inputs(self, job: Job) -> dict[str, Path]:
        """Return a job's inputs by name. Raises SpecError naming what is missing."""
        found = {name: self.resolve(reference) for name, reference in job.inputs.items()}
        for name, path in found.items():
            if not path.exists():
                raise SpecError(f"stage {job.name}: input {name} = {job.inputs[name]!r} does not exist (looked for {path})")
        return found

    def fingerprint(self, job: Job, *, sources: tuple[Path, ...] = (), inputs: Mapping[str, Path]) -> str:
        """Return the job's fingerprint on this node."""
        return job_fingerprint(
            job,
            sources=sources,
            inputs=inputs,
            versions=self.versions,
            machine=self.node.machine,
            hasher=Hasher(_hashes(self.files.home, self.run.tenant)),
        )

    def set_stage(self, name: str, **changes: object) -> Stage:
        """Record a change of one of the run's stages."""
        stage = next(stage for stage in self.run.stages if stage.name == name)
        stage = replace(stage, **changes)  # type: ignore[arg-type]
        self.run = replace(self.run, stages=tuple(stage if s.name == name else s for s in self.run.stages))
        self.client.set_stage(self.run.id, stage)
        return stage

    def set_run(self, state: RunState, why: str = "") -> None:
        """Record the run's state."""
        self.run = replace(self.run, state=state)
        self.client.set_run(self.run.id, state, why)

    def keep(self, stage: str, name: str, source: Path, target: str) -> None:
        """Copy a file or folder into the stage's artefacts."""
        if not source.exists():
            raise JobFailed(f"stage {stage}: the declared output {name} = {target!r} was not written", reason="failed")
        destination = self.files.artefacts(stage) / target
        destination.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, destination, dirs_exist_ok=True)
        else:
            shutil.copy2(source, destination)
        self.artefacts.setdefault(stage, {})[target] = target

    def trial(
        self,
        *,
        stage: str,
        fingerprint: str,
        source: str,
        configuration: Configuration,
        metrics: Mapping[str, Summary],
        seed: int = 0,
        curves: Mapping[str, tuple[float, ...]] | None = None,
        note: str = "",
    ) -> Trial:
        """Return a trial with everything that every trial of this run carries. It still has to be recorded."""
        return Trial(
            id=self.new_id("t"),
            run_id=self.run.id,
            stage=stage,
            fingerprint=fingerprint,
            source=source,  # type: ignore[arg-type]
            configuration=configuration,
            metrics=metrics,
            bounds=self.node.bounds.get("process", {}),
            machine=self.node.machine,
            versions=self.versions,
            seed=seed,
            at_s=self.clock.utc_s(),
            curves=curves or {},
            note=note,
        )

    def release_all(self, why: str) -> tuple[Lease, ...]:
        """Ask every live lease of this run to end, and wait (bounded) until they have. Returns those that were live."""
        live = tuple(self.client.leases(run_id=self.run.id, live=True))
        if live:
            ids = tuple(lease.id for lease in live)
            self.client.release(ids, reason=EndReason.CANCELLED, why=why)
            self.client.wait_leases(ids, until="ended", timeout_s=20.0)
        return live


def _hashes(home: Path, tenant: str) -> Path:
    """Return where hashes of inputs are kept: of a user of a shared home, in its own volume."""
    return home / "homes" / tenant / ".hashes.json" if is_guest(home) else home / "hashes.json"
