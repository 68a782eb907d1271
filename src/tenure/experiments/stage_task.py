"""A task or workspace stage: one command under one lease; its declared outputs become artefacts."""

from __future__ import annotations

import itertools

from tenure.errors import JobFailed
from tenure.experiments.context import RunContext
from tenure.jobs import Command, Job
from tenure.protocols import Exit, ExitKind, Launched, LaunchRequest
from tenure.resources import Envelope, show_bytes


def run_task(context: RunContext, job: Job) -> None:
    """Run the stage's command under its lease and keep its outputs. Raises JobFailed with the reason and the log's end."""
    inputs = context.inputs(job)
    context.set_stage(job.name, fingerprint=context.fingerprint(job, inputs=inputs))
    envelope = job.envelope or Envelope()
    context.step(job.name, "lease + run", " ".join(job.command))
    env = {f"TENURE_INPUT_{name.upper().replace('-', '_')}": str(path) for name, path in inputs.items()}
    command = Command(
        argv=job.command,
        env={**env, **job.env},
        workdir=str(context.folder),
        ports=job.ports,
        secrets=job.secrets,
        runtime=job.runtime,
        image=job.image,
        mounts={str(path): f"{path}:ro" for path in inputs.values()} if job.runtime == "container" else {},
    )
    launched, ended = _completed(
        context, job, LaunchRequest(name=job.name, command=command, envelope=envelope, resumes=job.retry.preempted)
    )
    for name, path in job.outputs.items():
        context.keep(job.name, name, launched.worker_dir / path, path)
    context.set_stage(job.name, artefacts=context.artefacts.get(job.name, {}))
    held_s = max(0.0, ended.ended_at_s - ended.started_at_s)
    peak = show_bytes(ended.usage.peak_memory_bytes) if ended.usage else "unknown"
    outputs = f"; left {', '.join(job.outputs.values())}" if job.outputs else ""
    context.close_step(
        job.name, "lease + run", f"completed in {held_s:.1f} s, peak memory {peak} of {envelope.describe()}{outputs}"
    )


def _completed(context: RunContext, job: Job, request: LaunchRequest) -> tuple[Launched, Exit]:
    """Launch until an attempt completes. Raises JobFailed when the last one the job allows does not."""
    for attempt in itertools.count(1):
        launched = context.launch(job.name)(request)
        while (ended := launched.wait(0.5)) is None:
            usage = launched.usage()
            context.display.progress(f"{show_bytes(usage.memory_bytes)} in use, {usage.cpu_s:.1f} CPU-s")
        if ended.kind is ExitKind.COMPLETED:
            return launched, ended
        why = f"{ended.kind}{f' (code {ended.code})' if ended.code else ''}{f', {ended.witness}' if ended.witness else ''}"
        if attempt >= job.retry.attempts:
            raise JobFailed(f"stage {job.name} ended {why}\n{ended.log_tail}".rstrip(), reason=str(ended.kind))
        context.display.warn(f"{job.name}: attempt {attempt} ended {why}; trying again")
    raise AssertionError("unreachable: the loop has no end of its own")
