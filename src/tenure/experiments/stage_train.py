"""A training stage: measure with probes, recommend, lease a gang, train in bounded workers, export.

Training itself is in `train`; here its workers are put under leases and watched. A probe is the same training in a folder
of its own, stopped after some rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenure.broker.launch import next_of
from tenure.errors import CorruptData, JobFailed, SpecError
from tenure.experiments.context import RunContext
from tenure.experiments.following import Following, told_end
from tenure.experiments.machine_load import disturbance, load_metrics, watch_machine
from tenure.jobs import Command, Job
from tenure.leases import Lease
from tenure.protocols import LaunchRequest
from tenure.recommend.observe import compare
from tenure.recommend.training import TrainTunable, recommend_training
from tenure.recommend.tune import tune
from tenure.resources import Envelope, format_duration, show_bytes
from tenure.train import spec as train
from tenure.train.files import Files
from tenure.train.progress import ProgressReader, TrainProgress, measure
from tenure.train.store import read_document
from tenure.trials import Candidate, Configuration, Recommendation, Scalar, Trial
from tenure.usage import Summary, summarize
from tenure.wire import GangMember, LeaseView, RequestGang

POLL_S = 0.25
PROBE_SLOT_S = 120.0


def run_train(context: RunContext, job: Job) -> None:
    """Run the stage. Raises JobFailed, Refused or SpecError with the reason; what was measured stays recorded."""
    inputs = context.inputs(job)
    program_file = context.resolve(job.program.partition(":")[0])
    if not program_file.is_file():
        raise SpecError(f"stage {job.name}: program file {program_file} does not exist; program reads file.py:Name")
    fingerprint = context.fingerprint(job, sources=(program_file,), inputs=inputs)
    context.set_stage(job.name, fingerprint=fingerprint)
    spec = train.TrainSpec(
        program=job.program,
        folder=str(context.folder),
        inputs={name: str(path) for name, path in inputs.items()},
        options=job.options,
        shards=job.shards,
        batch=job.batch,
        seed=job.seed,
        goal_accuracy=job.train_goal.accuracy if job.train_goal else 0.0,
        max_rounds=job.max_rounds,
        evaluate_every=job.evaluate_every,
        same_result=job.same_result,
        exchange=job.exchange,
        local_steps=job.local_steps,
        codec=job.codec,
        outer_rate=job.outer_rate,
        outer_momentum=job.outer_momentum,
    )
    chosen = _given(job) if job.envelope is not None else _recommended(context, job, spec, fingerprint)
    if context.until == "recommend":
        return
    chosen = _asked_for(context, chosen)
    kept = [t for t in context.client.trials(run_id=context.run.id) if t.stage == job.name and t.source == "observed"]
    if not kept or not (context.files.store(job.name) / "result").exists():  # else only the export is missing
        observed = _train(context, job, spec, fingerprint, chosen)
        _compare(context, job, chosen, observed)
    _export(context, job)


def _given(job: Job) -> Candidate:
    assert job.envelope is not None
    workers = job.workers or 1
    configuration: dict[str, Scalar] = {"workers": workers, "cpus": job.envelope.cpus}
    return Candidate(configuration=configuration, envelope=job.envelope, leases=workers)


def _asked_for(context: RunContext, chosen: Candidate) -> Candidate:
    """Return the candidate with as many workers as the user asked for; what was predicted for another number goes."""
    if context.workers in (0, chosen.leases):
        return chosen
    envelope = chosen.envelope
    if chosen.predictions and envelope is not None:  # a recommended total is made for the recommended workers
        envelope = replace(envelope, total_s=envelope.total_s * max(1.0, chosen.leases / context.workers))
    rounds = {name: value for name, value in chosen.predictions.items() if name == "rounds"}  # the same for any workers
    configuration = {**chosen.configuration, "workers": context.workers}
    return replace(chosen, configuration=configuration, envelope=envelope, leases=context.workers, predictions=rounds)


# --- measure and recommend --------------------------------------------------------------------------------------------


def _recommended(context: RunContext, job: Job, spec: train.TrainSpec, fingerprint: str) -> Candidate:
    earlier = _kept_recommendation(context, job)
    if earlier is not None and earlier.chosen is not None:
        context.close_step(job.name, "recommend", f"kept from before: {earlier.why}")
        return earlier.chosen
    known = context.client.trials(fingerprint=fingerprint)
    context.step(job.name, "measure", f"{len(known)} trials of this job are known" if known else "probing")
    tunable = TrainTunable(
        job=job,
        capacity=context.node.capacity,
        prices=context.prices,
        fingerprint=fingerprint,
        probe=lambda configuration: _probe(context, job, spec, fingerprint, configuration),
    )
    trials = tune(
        tunable,
        known,
        context.client.record_trial,
        progress=context.progress,
        max_s=job.probe.max_s,
        now=context.clock.boot_s,
    )
    made = len(trials) - len(known)
    context.close_step(job.name, "measure", f"{made} probe trials made, {len(known)} known before: {_in_short(trials)}")
    context.step(job.name, "recommend", "weighing configurations")
    recommendation = recommend_training(
        tunable,
        trials,
        id=context.new_id("rec"),
        run_id=context.run.id,
        stage=job.name,
        now_s=context.clock.utc_s(),
    )
    context.client.record_recommendation(recommendation)
    if recommendation.thin:
        context.display.warn(f"{job.name}: {recommendation.thin}")
    if recommendation.chosen is None:
        raise JobFailed(f"stage {job.name}: no configuration meets the goal {recommendation.goal}. {recommendation.why}")
    context.close_step(job.name, "recommend", recommendation.why)
    return recommendation.chosen


def _kept_recommendation(context: RunContext, job: Job) -> Recommendation | None:
    """Return what this run chose before it was interrupted: a resumed run keeps its gang's size."""
    kept = [r for r in context.client.recommendations(run_id=context.run.id) if r.stage == job.name]
    return kept[-1] if kept else None


def _in_short(trials: Sequence[Trial]) -> str:
    first = next((trial for trial in trials if trial.source == "probe"), None)
    if first is None:
        return "nothing"
    metrics = first.metrics
    return (
        f"{metrics['shard_s'].mean * 1e3:.0f} ms a shard, {metrics['combine_s'].mean * 1e3:.0f} ms a combine, "
        f"peak {show_bytes(metrics['peak_memory_bytes'].maximum)}"
    )


def _probe(
    context: RunContext, job: Job, spec: train.TrainSpec, fingerprint: str, configuration: Configuration
) -> Iterator[Trial]:
    """Train for some rounds under a generous envelope, in a folder of its own, and yield the trial."""
    workers, cpus, rounds = int(configuration["workers"]), float(configuration["cpus"]), int(configuration["rounds"])
    text = f"probe: {workers} worker{'s' if workers > 1 else ''} × {cpus:g} cpu, {rounds} rounds"
    stage = f"{job.name}.probe.{context.new_id('p')}"
    envelope = Envelope(
        cpus=cpus,
        memory_bytes=min(job.probe.memory_bytes, context.node.capacity.memory_bytes // max(1, workers)),
        slot_s=PROBE_SLOT_S,
        total_s=2 * PROBE_SLOT_S,
    )
    probe_spec = replace(spec, stop_at_round=rounds, goal_accuracy=0.0)
    progress, views, metrics = _run_gang(context, job, stage, probe_spec, envelope, workers, before=f"{text}: ")
    yield context.trial(
        stage=job.name,
        fingerprint=fingerprint,
        source="probe",
        configuration=configuration,
        metrics={**metrics, "time_s": summarize([_span_s([view.lease for view in views])])},
        seed=job.seed,
        curves=_curves(progress),
        note=stage,
    )


# --- lease and train --------------------------------------------------------------------------------------------------


def _train(context: RunContext, job: Job, spec: train.TrainSpec, fingerprint: str, chosen: Candidate) -> Trial:
    assert chosen.envelope is not None
    workers = chosen.leases
    text = f"{workers} lease{'s' if workers > 1 else ''} of {chosen.envelope.describe()}"
    context.step(job.name, "lease + train", text)
    expected = chosen.predictions.get("rounds")
    progress, _, metrics = _run_gang(
        context, job, job.name, spec, chosen.envelope, workers, expected=round(expected.value) if expected else 0
    )
    goal = job.train_goal.accuracy if job.train_goal else 0.0
    accuracy = progress.accuracy or 0.0
    if accuracy < goal:
        raise JobFailed(
            f"stage {job.name}: accuracy {accuracy:.2%} after {progress.round} rounds; the goal is {goal:.2%}. "
            "Raise max_rounds, or change the program."
        )
    # A run that was interrupted held more than one gang: all of them count.
    gangs: dict[str, list[Lease]] = {}
    for lease in context.client.leases(run_id=context.run.id, stage=job.name):
        if lease.command.on_event and lease.starts_at_s:
            gangs.setdefault(lease.gang_id, []).append(lease)
    time_s = sum(_span_s(gang) for gang in gangs.values())
    cost_usd = sum(context.prices.cost_usd(lease.envelope, lease.held_s) for gang in gangs.values() for lease in gang)
    trial = context.trial(
        stage=job.name,
        fingerprint=fingerprint,
        source="observed",
        configuration={**chosen.configuration, "rounds": progress.round},
        metrics={
            **metrics,
            "time_s": summarize([time_s]),
            "cost_usd": summarize([cost_usd]),
            "rounds": summarize([float(progress.round)]),
            "accuracy": summarize([accuracy]),
        },
        seed=job.seed,
        curves=_curves(progress),
    )
    context.client.record_trial(trial)
    peak = show_bytes(trial.metrics["peak_memory_bytes"].maximum)
    context.close_step(
        job.name,
        "lease + train",
        f"{accuracy:.2%} on held-out data after {progress.round} rounds in {time_s:.1f} s with {text}; "
        f"peak {peak} per worker, ${cost_usd:.6f}",
    )
    return trial


def _span_s(gang: Sequence[Lease]) -> float:
    """Return the seconds from the gang's grant to its last end."""
    return max(lease.ended_at_s for lease in gang) - min(lease.starts_at_s for lease in gang)


def _run_gang(
    context: RunContext,
    job: Job,
    stage: str,
    spec: train.TrainSpec,
    envelope: Envelope,
    workers: int,
    *,
    expected: int = 0,
    before: str = "",
) -> tuple[TrainProgress, tuple[LeaseView, ...], dict[str, Summary]]:
    """Train in one gang of leases until all have ended; return what the store and the leases say, and the trial's metrics.

    expected: rounds that the goal is predicted to take, 0 when nobody knows. before: stands before the live figures.
    """
    folder, store = context.files.stage(stage), context.files.store(stage)
    train.write_spec(folder, spec)
    command: Command = train.command(job.env)
    command = replace(command, secrets=job.secrets)
    event = train.next_start_event(folder, workers)
    members = tuple(GangMember(worker=w, envelope=envelope, command=command) for w in range(workers))
    train.publish_event(folder, event)
    leases = context.client.request_gang(
        RequestGang(
            gang_id=context.new_id("g"),
            run_id=context.run.id,
            stage=stage,
            tenant=context.run.tenant,
            members=members,
            resumes=job.retry.preempted,
        )
    )
    ids = tuple(lease.id for lease in leases)
    context.client.nudge(context.run.id, stage)
    reader, following = ProgressReader(store), _following(context, spec, envelope, expected)
    with watch_machine(context.node.machine) as watcher:
        views: tuple[LeaseView, ...] = ()
        while not views or not all(view.lease.ended_at_s for view in views):
            views = context.client.wait_leases(ids, until="ended", timeout_s=POLL_S)
            progress, now_s = reader.read(), context.clock.utc_s()
            torn, new = Files().names(store / "quarantine"), _new_in_plan(store, event["generation"])
            for sentence in following.news(progress, views, now_s, torn=torn, new=new):
                context.display.warn(f"{stage}: {sentence}")
            context.display.progress(before + following.line(progress, views, now_s), following.done(progress))
            if went_on := next_of(context.client, [view.lease for view in views]):
                why = views[0].lease.end_detail
                context.display.warn(f"{stage}: preempted: {why}. It goes on from its newest round when its turn has come")
                ids, views = went_on, ()
    progress = reader.read()
    if failed := told_end(stage, views):
        raise JobFailed(failed[0], reason=failed[1])
    if not progress.round:
        raise JobFailed(f"stage {stage}: the workers ended without finishing a round; see {context.files.logs(stage)}")
    own_cpu_s = sum(ended.usage.cpu_s for view in views for ended in view.exits if ended.usage)
    load = load_metrics(watcher, own_cpu_s=own_cpu_s)
    if disturbed := disturbance(load):
        context.display.warn(f"{stage}: {disturbed}")
    return progress, tuple(views), {**_metrics(progress, tuple(views)), **load}


def _following(context: RunContext, spec: train.TrainSpec, envelope: Envelope, expected: int) -> Following:
    rounds, are = spec.last_round, "of"
    if spec.goal_accuracy:
        rounds, are = (min(expected, rounds), "of about") if expected else (rounds, "of at most")
    return Following(envelope=envelope, prices=context.prices, rounds=rounds, rounds_are=are)


def _new_in_plan(store: Path, generation: int) -> str:
    """Return what this generation's plan says of another program or other data; nothing before it is there."""
    try:
        return str((read_document(store / "plans" / f"{generation:04d}.json") or {}).get("new", ""))
    except CorruptData:
        return ""  # its workers find that too, and say so


def _curves(progress: TrainProgress) -> dict[str, tuple[float, ...]]:
    return {
        "accuracy": progress.accuracies,
        "round": tuple(float(count) for count in progress.accuracy_rounds),
        "loss": progress.losses,
    }


def _metrics(progress: TrainProgress, views: tuple[LeaseView, ...]) -> dict[str, Any]:
    """Return the trial's metrics: times from the store's records, memory from the leases."""
    metrics = {name: summarize(values) for name, values in measure(progress).items() if values}
    peaks = [float(max((e.usage.peak_memory_bytes for e in view.exits if e.usage), default=0)) for view in views if view.exits]
    metrics["peak_memory_bytes"] = summarize(peaks)
    return metrics


def _compare(context: RunContext, job: Job, chosen: Candidate, observed: Trial) -> None:
    for row in compare(chosen.predictions, observed.metrics):
        if row.missed:
            context.display.warn(f"{job.name}: {row.sentence}")


# --- export -----------------------------------------------------------------------------------------------------------


def _export(context: RunContext, job: Job) -> None:
    context.step(job.name, "export", "weights, predictions, ONNX")
    envelope = Envelope(cpus=1, memory_bytes=job.probe.memory_bytes, slot_s=120, total_s=120)
    command = Command(argv=(sys.executable, "-m", "tenure.train.export"), expects_result=True)
    launched = context.launch(job.name)(LaunchRequest(name="export", command=command, envelope=envelope))
    ended = launched.wait(150.0) or launched.stop()
    if not ended.result or ended.result.get("state") != "done":
        raise JobFailed(f"stage {job.name}: the export ended {ended.kind}\n{ended.log_tail}", reason=str(ended.kind))
    artefacts: Path = context.files.artefacts(job.name)
    left = {path.name: path.name for path in sorted(artefacts.iterdir()) if path.is_file()}
    context.artefacts[job.name] = left
    context.set_stage(job.name, artefacts=left)
    held = format_duration(round(ended.ended_at_s - ended.started_at_s, 1))
    equal = ended.result["equal"]
    note = ended.result["note"] if equal is None else f"same labels on {equal:.2%} of held-out data"
    context.close_step(job.name, "export", f"{', '.join(left)} in {held}; {note}")
