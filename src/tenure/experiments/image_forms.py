"""What is known of an image's forms on a node, kept as trials: what its builder measured, and what each run of it showed.

    image.json ──► a probe trial per form, once ─┐
    a run of it ──► an observed trial            ├─► ledger ──► `facts` ──► `decide.forms`: which form to run

Trials are found by image and class of machine, whatever the image's name. A build has no broker to tell: what it measured
waits in image.json until the image is run. Not here: choosing, running.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tenure.decide.forms import FormChoice, FormFacts
from tenure.errors import TenureError
from tenure.experiments.context import RunContext
from tenure.experiments.image_command import RUNTIMES, form_of
from tenure.forms import Form, FormRecord, ImageManifest
from tenure.images.store import read_image
from tenure.jobs import Job, fingerprint
from tenure.nodes import Machine, Node
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.trials import Candidate, Prediction, Recommendation, Scalar, Trial
from tenure.usage import Summary, summarize

_WELL = (ExitKind.COMPLETED, ExitKind.STOPPED, ExitKind.OUT_OF_TIME)


def form_fingerprint(manifest: ImageManifest, machine: Machine) -> str:
    """Return the fingerprint of trials that say something about this image's forms on this kind of machine."""
    return fingerprint({"kind": "image", "image": manifest.id, "machine": machine.machine_class})


def facts(manifest: ImageManifest, node: Node, trials: Sequence[Trial] = ()) -> tuple[FormFacts, ...]:
    """Return what is known of each form that the image has. trials: of `form_fingerprint`; those of others are left out.

    How long it takes to start is the median of what runs of it took, under a lease; where there was none, what was measured
    when it was built, without one.
    """
    found, mine = [], form_fingerprint(manifest, node.machine)
    for form, record in manifest.forms.items():
        of_form = [trial for trial in trials if trial.fingerprint == mine and trial.configuration.get("form") == form]
        runs = [trial.metrics for trial in of_form if trial.source == "observed"]
        starts = [metrics["cold_start_s"].median for metrics in runs if "cold_start_s" in metrics]
        peaks = [metrics["peak_memory_bytes"].maximum for metrics in runs if "peak_memory_bytes" in metrics]
        there = RUNTIMES[form] in node.runtimes
        found.append(
            FormFacts(
                form=form,
                size_bytes=record.size_bytes,
                cold_start_s=statistics.median(starts) if starts else record.cold_start_s,
                memory_floor_bytes=record.memory_floor_bytes,
                peak_memory_bytes=int(max(peaks)) if peaks else None,
                cannot="" if there else f'node {node.name} has not the runtime {RUNTIMES[form]}: "tenure doctor" says why',
            )
        )
    return tuple(found)


def record_built(context: RunContext, job: Job, manifest: ImageManifest) -> None:
    """Record what the image's builder measured, unless it is known: the same figures are the same trials."""
    for form, record in manifest.forms.items():
        trial = _trial(context, job, manifest, form, "probe", _metrics(record), {})
        told = repr((trial.fingerprint, form.value, record.size_bytes, record.cold_start_s, record.memory_floor_bytes))
        context.client.record_trial(replace(trial, id=f"t-{hashlib.sha256(told.encode()).hexdigest()[:16]}"))


def keep_run(context: RunContext, job: Job, lease_id: str, *, ready_s: float, ended: Exit) -> None:
    """Record what a run that ended well showed of its form, and what its builder measured. A broker that takes none is told.

    ready_s: from when its lease was asked for until it listened; 0: it never does.
    """
    if ended.kind not in _WELL:
        return
    try:
        manifest, lease = read_image(Path(job.image)).manifest, context.client.lease(lease_id).lease
        record_built(context, job, manifest)
        waited_s = max(0.0, lease.starts_at_s - lease.requested_at_s)
        trial = observed(context, job, manifest, lease.envelope, ready_s=ready_s - waited_s, ended=ended)
        context.client.record_trial(trial)
    except TenureError as error:
        context.display.warn(f"{job.name}: what this run showed of the form {form_of(job.runtime)} is not kept: {error}")


def observed(
    context: RunContext, job: Job, manifest: ImageManifest, envelope: Envelope, *, ready_s: float, ended: Exit
) -> Trial:
    """Return what a run showed of its form. ready_s: from its grant until it listened; not above 0: not known."""
    form = form_of(job.runtime)
    metrics = {"size_bytes": summarize([float(manifest.forms[form].size_bytes)])}
    if ready_s > 0:
        metrics["cold_start_s"] = summarize([ready_s])
    if ended.usage is not None and ended.usage.peak_memory_bytes:
        metrics["peak_memory_bytes"] = summarize([float(ended.usage.peak_memory_bytes)])
    held: dict[str, Scalar] = {"cpus": envelope.cpus, "memory_bytes": envelope.memory_bytes}
    return _trial(context, job, manifest, form, "observed", metrics, held)


def form_recommendation(
    context: RunContext, job: Job, choice: FormChoice, *, goal: str, trials: Sequence[Trial]
) -> Recommendation:
    """Return a choice of a form as the ledger keeps it, with the start that is expected of it where runs have shown some.

    trials: all that are known of the image. The interval is from the quickest to the slowest start that was seen: of n starts
    and one more, in no order that matters, the last lies between them with probability (n - 1) / (n + 1).
    """
    runs = [trial for trial in trials if trial.source == "observed" and trial.configuration.get("form") == choice.form]
    starts = [trial.metrics["cold_start_s"].median for trial in runs if "cold_start_s" in trial.metrics]
    predictions = {}
    if len(starts) > 1:
        level = (len(starts) - 1) / (len(starts) + 1)
        predictions["cold_start_s"] = Prediction(
            value=statistics.median(starts), low=min(starts), high=max(starts), level=level
        )
    chosen = Candidate(configuration={"form": str(choice.form)}, envelope=job.envelope, predictions=predictions)
    return Recommendation(
        id=context.new_id("rec"),
        run_id=context.run.id,
        stage=job.name,
        goal=goal,
        chosen=chosen,
        trials=tuple(trial.id for trial in trials),
        why=choice.describe(),
        thin=choice.thin,
        at_s=context.clock.utc_s(),
    )


# --- helpers ---


def _metrics(record: FormRecord) -> dict[str, Summary]:
    measured = {
        "size_bytes": record.size_bytes,
        "cold_start_s": record.cold_start_s,
        "memory_floor_bytes": record.memory_floor_bytes,
    }
    return {name: summarize([float(value)]) for name, value in measured.items() if value is not None}


def _trial(
    context: RunContext,
    job: Job,
    manifest: ImageManifest,
    form: Form,
    source: str,
    metrics: Mapping[str, Summary],
    held: Mapping[str, Scalar],
) -> Trial:
    served: dict[str, Scalar] = {"architecture": "microservice"} if manifest.door else {}
    runtime = RUNTIMES[form]
    trial = context.trial(
        stage=job.name,
        fingerprint=form_fingerprint(manifest, context.node.machine),
        source=source,
        configuration={**served, "form": form.value, **held},
        metrics=metrics,
        note=context.node.confinement.get(runtime, ""),
    )
    return replace(trial, bounds=context.node.bounds.get(runtime, {}))
