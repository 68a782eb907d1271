"""One run of a job file, stage by stage, from the first or from where it stopped; a report at the end, however it ended.

Ctrl-C, an error and a failed stage all take the same way out: live leases of the run are ended, its state is recorded, the
report is written. `resume` then goes on with the stage that was not done; what was measured and trained is kept.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tenure.broker.client import BrokerClient
from tenure.errors import Conflict, NotFound, SpecError, TenureError, Unsupported
from tenure.experiments.context import RunContext, undisturbed
from tenure.experiments.report import ReportData, write_report
from tenure.experiments.report_predictions import ARTEFACT, read_predictions
from tenure.experiments.stage_serve import run_serve
from tenure.experiments.stage_task import run_task
from tenure.experiments.stage_train import run_train
from tenure.jobfile import JobFile, parse_job_file
from tenure.jobs import Job, JobKind
from tenure.runs import Run, RunFiles, RunState, Stage

MAX_EVENTS = 100_000
LEASE_KEYS = ("envelope", "workers", "probe", "retry")
"""Keys of a stage that bound its work and change nothing of it: a resumed run may have others."""

STAGE_RUNNERS: Mapping[JobKind, Callable[[RunContext, Job], None]] = {
    "task": run_task,
    "workspace": run_task,
    "train": run_train,
    "serve": run_serve,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    run: Run
    closing: tuple[str, ...]
    """One line per step."""
    report_html: Path
    report_json: Path
    failed: str = ""
    """Why it failed, empty when it did not."""
    error: TenureError | None = None


def new_run(text: str, *, source: Path, run_id: str, now_s: float, only: str = "") -> tuple[Run, JobFile]:
    """Return a new run of a job file and its jobs. only: a stage's name or kind; earlier tasks it needs still run."""
    job_file = parse_job_file(text, source=str(source))
    if only:
        job_file = _restricted(job_file, only)
    run = Run(
        id=run_id,
        name=job_file.name,
        tenant=job_file.tenant,
        job_file=text,
        source=str(source),
        stages=tuple(Stage(name=job.name, kind=job.kind) for job in job_file.stages),
        created_at_s=now_s,
        disk_bytes=job_file.disk_bytes,
    )
    return run, job_file


def _restricted(job_file: JobFile, only: str) -> JobFile:
    """Keep the named stage and, before it, every stage whose artefacts it needs."""
    wanted = [job for job in job_file.stages if only in (job.name, job.kind)]
    if not wanted:
        stages = ", ".join(f"{job.name} ({job.kind})" for job in job_file.stages)
        raise SpecError(f"the job file has no {only} stage; it has: {stages}")
    needed = {job.name for job in wanted}
    for job in reversed(job_file.stages):
        if job.name in needed:
            needed |= _needs(job)
    return replace(job_file, stages=tuple(job for job in job_file.stages if job.name in needed))


def _needs(job: Job) -> set[str]:
    """Return the stages whose artefacts a job refers to."""
    return {reference.partition(":")[0] for reference in (*job.inputs.values(), job.model) if ":" in reference}


def check_workers(job_file: JobFile, workers: int) -> None:
    """Raise SpecError when so many workers were asked for that no training stage, or not every one, can have them. 0: any."""
    trained = [job for job in job_file.stages if job.kind == "train"]
    if workers and not trained:
        raise SpecError(f"--workers {workers}: there is no training stage that could have them")
    for job in trained:
        if workers > job.shards:
            raise SpecError(
                f"--workers {workers}: stage {job.name} has {job.shards} shards, and a worker needs at least one. Ask for at "
                f"most {job.shards}; the shards of a run do not change, those of a new run are set in its job file."
            )


def resumed_run(runs: tuple[Run, ...], run_id: str, *, text: str = "", source: Path | None = None) -> tuple[Run, JobFile]:
    """Return a recorded run and its jobs, to go on with.

    text, source: of a job file named beside it, which may differ from the run's own in what LEASE_KEYS name: the rest of its
    leases are made by it. Raises NotFound, SpecError when the run is done already or the job file differs in more.
    """
    found = [run for run in runs if run.id == run_id]
    if not found:
        raise NotFound(f'no run {run_id!r}; "tenure runs" lists those there are')
    run = found[0]
    if run.state is RunState.DONE:
        raise SpecError(f'run {run_id} is done; there is nothing to resume. See it with "tenure report {run_id}".')
    job_file = parse_job_file(run.job_file, source=run.source)
    if text:
        job_file = _with_other_leases(job_file, parse_job_file(text, source=str(source)), run_id)
    names = {stage.name for stage in run.stages}
    return run, replace(job_file, stages=tuple(job for job in job_file.stages if job.name in names))


def _with_other_leases(then: JobFile, now: JobFile, run_id: str) -> JobFile:
    """Return the job file as it is now, if it says the same but for the leases."""
    same = [*(job.name for job in then.stages)] == [*(job.name for job in now.stages)]
    differs = "" if same and (then.name, then.tenant, then.disk_bytes) == (now.name, now.tenant, now.disk_bytes) else "[run]"
    for before, after in zip(then.stages, now.stages, strict=False):
        for key in (field.name for field in fields(Job)):
            if not differs and key not in LEASE_KEYS and getattr(before, key) != getattr(after, key):
                differs = f"{key} of stage {before.name}"
    if differs:
        raise SpecError(
            f"run {run_id} was begun with another job file: {differs} differs. A run keeps its job but for "
            f"{', '.join(LEASE_KEYS)}: leave the file away to go on, or begin a new run with it."
        )
    return now


def run_stages(context: RunContext, job_file: JobFile) -> Outcome:
    """Run every stage that is not done, and write the report. Ctrl-C is raised again once everything is cleaned up.

    Raises Conflict, and changes nothing, when another process runs this run.
    """
    with _alone(context):
        return _run_stages(context, job_file)


def _run_stages(context: RunContext, job_file: JobFile) -> Outcome:
    error: BaseException | None = None
    stage_name = ""
    try:
        context.set_run(RunState.RUNNING)
        context.release_all(why="left behind by a command of this run that was killed")
        for job in job_file.stages:
            stage_name = job.name
            if context.until != "recommend" or _can_recommend(context, job_file, job):
                _run_stage(context, job)
        context.set_run(RunState.DONE)
    except BaseException as caught:  # also Ctrl-C and our own mistakes: nothing of the run may stay behind
        error = caught
        with undisturbed():
            _clean_up(context, caught, stage_name)
    with undisturbed():
        html, json = _report(context, after=error)
    if error is not None and not isinstance(error, TenureError):
        raise error
    return Outcome(
        run=context.run,
        closing=tuple(context.closing),
        report_html=html,
        report_json=json,
        failed=str(error) if error else "",
        error=error,
    )


def _can_recommend(context: RunContext, job_file: JobFile, job: Job) -> bool:
    """Whether a run that only recommends runs this stage: what it measures, and tasks that something measured needs."""
    measured = {other.name for other in job_file.stages if other.kind in ("train", "serve") and other.envelope is None}
    if job.kind in ("task", "workspace"):
        needed = set(measured)
        for other in reversed(job_file.stages):
            needed |= _needs(other) if other.name in needed else set()
        return job.name in needed
    if untrained := _needs(job) & {other.name for other in job_file.stages if other.kind == "train"}:
        text = f"left out: it needs what {', '.join(sorted(untrained))} trains, and only tenure run trains"
        context.close_step(job.name, "recommend", text)
        return False
    return job.name in measured


@contextmanager
def _alone(context: RunContext) -> Iterator[None]:
    """Hold the run for this process: two that run one run would train it twice."""
    path = context.files.root / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise Conflict(
                f"run {context.run.id} goes on in another process (pid {held.read().strip() or 'unknown'}); "
                "wait for its end, or interrupt it first"
            ) from None
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
        yield


def _clean_up(context: RunContext, error: BaseException, stage_name: str) -> None:
    """End what lives of the run and record how it ended. What can't be done is told and hides nothing else."""
    interrupted = isinstance(error, KeyboardInterrupt)
    state = RunState.CANCELLED if interrupted else RunState.FAILED
    why = "interrupted" if interrupted else str(error) or type(error).__name__
    steps: list[Callable[[], object]] = [lambda: context.release_all(why=why[:500])]
    if stage_name:
        steps.append(lambda: context.set_stage(stage_name, state=state, detail=why[:2000]))
    steps.append(lambda: context.set_run(state, why[:2000]))
    for step in steps:
        try:
            step()
        except TenureError as also:
            context.display.warn(f"cleaning up after run {context.run.id}: {also}")
    if interrupted and context.listening is not None:
        context.display.warn("interrupted before the server listened; nothing of it is left")
    elif interrupted:
        context.display.warn(
            f"run {context.run.id} is interrupted; what was done is kept. tenure run --resume {context.run.id}"
        )


def _report(context: RunContext, *, after: BaseException | None) -> tuple[Path, Path]:
    """Write the report; when that fails after an error, the error stays the one that is told."""
    notes = tuple(context.closing)
    try:
        return report_run(context.client, context.files, context.run.id, now_s=context.clock.utc_s(), notes=notes)
    except (TenureError, OSError) as also:
        if after is None:
            raise
        context.display.warn(f"no report of run {context.run.id} could be written: {also}")
        return context.files.root / "report" / "report.html", context.files.root / "report" / "report.json"


def _run_stage(context: RunContext, job: Job) -> None:
    stage = next(stage for stage in context.run.stages if stage.name == job.name)
    if stage.state is RunState.DONE:
        context.artefacts[job.name] = dict(stage.artefacts)
        context.close_step(job.name, "kept", "done before; its artefacts are used as they are")
        return
    if job.runtime not in context.node.runtimes:
        offered = ", ".join(context.node.runtimes)
        raise Unsupported("runtime", f"stage {job.name} asks for {job.runtime!r}, node {context.node.name} offers: {offered}")
    context.set_stage(job.name, state=RunState.RUNNING, attempts=stage.attempts + 1, detail="")
    STAGE_RUNNERS[job.kind](context, job)
    context.set_stage(job.name, state=RunState.DONE)


def _predictions(files: RunFiles, run: Run) -> dict[str, dict[str, Any]]:
    found = {
        stage.name: read_predictions(files.artefacts(stage.name) / ARTEFACT) for stage in run.stages if stage.kind == "train"
    }
    return {name: arrays for name, arrays in found.items() if arrays is not None}


def report_run(
    client: BrokerClient,
    files: RunFiles,
    run_id: str,
    *,
    now_s: float,
    folder: Path | None = None,
    notes: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Write a run's report from the ledger; return the paths of the HTML and the JSON. Raises NotFound."""
    found = client.runs(run_id=run_id)
    if not found:
        raise NotFound(f'no run {run_id!r}; "tenure runs" lists those there are')
    run = found[0]
    recommendations = tuple(client.recommendations(run_id=run_id))
    cited = {trial for recommendation in recommendations for trial in recommendation.trials}
    fingerprints = {stage.fingerprint for stage in run.stages if stage.fingerprint}
    older = (trial for fingerprint in sorted(fingerprints) for trial in client.trials(fingerprint=fingerprint))
    own = tuple(client.trials(run_id=run_id))
    leases = tuple(client.leases(run_id=run_id))
    nodes = client.status().nodes
    data = ReportData(
        run=run,
        node=nodes[0] if nodes else None,
        leases=leases,
        events=tuple(client.events(run_id=run_id, max_events=MAX_EVENTS)),
        trials=(*(trial for trial in older if trial.id in cited and trial.run_id != run_id), *own),
        recommendations=recommendations,
        usage=tuple(point for lease in leases for point in client.usage(lease.id)),
        predictions=_predictions(files, run),
        jobs={job.name: job for job in parse_job_file(run.job_file, source=run.source).stages},
        notes=notes,
        at_s=now_s,
    )
    return write_report(data, folder or files.root / "report")
