"""A serving stage: measure the architectures, recommend one per goal, lease the winner and use it as its users will.

How architectures are measured is in `architectures`; which one wins is decided in `recommend.serving`. The distributed
architecture is measured and reported, but not a candidate: it has its clients on another node, and a lease is on one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import Conflict, JobFailed, NotFound, Refused, SpecError
from tenure.experiments.architectures import (
    DRAIN_S,
    INTERACTIONS,
    TRANSPORTS,
    Served,
    door,
    held_options,
    measure_clients,
    measure_serving,
    server_command,
)
from tenure.experiments.context import RunContext, undisturbed
from tenure.experiments.foreground import Listening, answered, look
from tenure.experiments.foreground_image import served_names
from tenure.experiments.image_command import image_command, is_image
from tenure.experiments.image_forms import keep_run
from tenure.experiments.stage_search import run_search
from tenure.experiments.stage_sweep import run_sweep
from tenure.jobs import Command, Job, ServeGoal
from tenure.leases import LeaseState
from tenure.protocols import Exit, ExitKind, Launched, LaunchRequest
from tenure.recommend.observe import compare
from tenure.recommend.serving import ServeTunable
from tenure.recommend.tune import tune
from tenure.resources import Envelope, show_bytes
from tenure.serve.client import Model
from tenure.serve.repository import ModelFiles
from tenure.sockets import free_port
from tenure.trials import Candidate, Configuration, Recommendation, Trial

BATCHES = (1, 8, 32)
MEASURE_S = 600.0
"""Slot of what is measured: a bound for a hanging server, far above what a measurement takes."""


def run_serve(context: RunContext, job: Job) -> None:
    """Run the stage. Raises JobFailed, Refused or SpecError with the reason; what was measured stays recorded."""
    model = context.resolve(job.model)
    if not model.exists():
        raise SpecError(f"stage {job.name}: model {model} does not exist; model is a path or stage:file")
    inputs = context.inputs(job)
    if context.listening is None:  # nothing is measured in the foreground, and reading a large repository takes time
        context.set_stage(job.name, fingerprint=context.fingerprint(job, inputs={**inputs, "model": model}))
    if job.envelope is not None:
        _serve_until_ended(context, job, model, job.envelope)
        return
    if job.sweep is not None:
        run_sweep(context, job, model)
        return
    if job.search is not None:
        _searched(context, job, model)
        return
    if "x" not in inputs:
        raise SpecError(
            f'stage {job.name} needs inputs.x, an .npy file of examples to measure with, as in "prepare:x_test.npy"'
        )
    service = _Service(context, job, model, inputs["x"])
    trials = service.measured()
    _leased(service, [service.recommend(goal, trials) for goal in job.serve_goals])


def _searched(context: RunContext, job: Job, model: Path) -> None:
    """Search, and lease what was chosen where a goal says so."""
    prepared, recommendations = run_search(context, job, model)
    service = _Service(context, job, model, Path(prepared.examples.inputs), Path(prepared.examples.expected))
    _leased(service, recommendations)


def _leased(service: _Service, recommendations: Sequence[Recommendation]) -> None:
    """Lease the winner of each goal that asks for it. Raises JobFailed when nothing meets a goal."""
    context, job = service.context, service.job
    if context.until == "done":
        for goal, recommendation in zip(job.serve_goals, recommendations, strict=bool(job.serve_goals)):
            if goal.lease and recommendation.chosen is not None:
                service.lease(goal, recommendation.chosen)
    if unmet := [recommendation.goal for recommendation in recommendations if recommendation.chosen is None]:
        raise JobFailed(f"stage {job.name}: nothing that was measured meets {'; '.join(unmet)}. The report shows by how much.")


@dataclass(frozen=True, slots=True)
class _Service:
    """One model of one stage, and the examples it is measured with."""

    context: RunContext
    job: Job
    model: Path
    x: Path
    expected: Path | None = None
    """What the model answers; None: asked in this process, once."""

    @property
    def fingerprint(self) -> str:
        return next(stage.fingerprint for stage in self.context.run.stages if stage.name == self.job.name)

    def served(self, clients: int = 1, server: Envelope | None = None) -> Served:
        """Return how to measure with so many clients at once; all of it has to fit the node beside the server."""
        capacity = self.context.node.capacity
        memory_bytes = min(1 << 30, capacity.memory_bytes // (2 * (clients + 1)))
        generous = Envelope(cpus=capacity.cpus / 2, memory_bytes=memory_bytes, slot_s=MEASURE_S, total_s=MEASURE_S)
        server = server or generous
        app = replace(generous, cpus=min(generous.cpus, (capacity.cpus - server.cpus) / clients))
        return Served(
            name=self.context.run.name,
            model=self.model,
            inputs=self.x,
            expected=self._expected(),
            launch=self.context.launch(self.job.name),
            workdir=self.context.files.stage(self.job.name) / "load",
            app=app,
            server=server,
            options=self.job.server,
            seed=self.job.seed,
            repeats=self.job.probe.repeats,
        )

    def _expected(self) -> Path:
        """Write what the model answers in this process, once: every other answer is checked against it."""
        if self.expected is not None:
            return self.expected
        path = self.context.files.stage(self.job.name) / "expected.npy"
        if not path.exists():
            with Model(str(self.model)) as model:
                answers, _ = model.predict_timed(np.load(self.x, mmap_mode="r"))
            # Labels where the model gives some; else its first output, compared within a tolerance.
            whole = [array for array in answers.values() if array.dtype.kind in "iu"]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, whole[0] if whole else next(iter(answers.values())))
        return path

    # --- measure and recommend ---

    def tunable(self) -> ServeTunable:
        """Return the stage's goals as something to be tuned: the architectures of one node."""
        places = [("simple", "none", "in-process"), *(("microservice", transport, "loopback") for transport in TRANSPORTS)]
        candidates: list[Configuration] = [
            {"architecture": architecture, "transport": transport, "link": link, "interaction": interaction, "batch": batch}
            for (architecture, transport, link), interaction, batch in itertools.product(places, INTERACTIONS, BATCHES)
        ]
        node = self.context.node
        return ServeTunable(
            self.job, node.capacity, self.context.prices, self.fingerprint, self._probe, configurations=candidates
        )

    def measured(self) -> tuple[Trial, ...]:
        """Return the trials to choose from: known ones of this fingerprint, and what was still missing."""
        context, job = self.context, self.job
        context.step(job.name, "measure", "three architectures, sync and async")
        known = [t for t in context.client.trials(fingerprint=self.fingerprint) if _candidate(t)]
        trials = tune(
            self.tunable(),
            known,
            context.client.record_trial,
            progress=context.progress,
            max_s=job.probe.max_s,
            now=context.clock.boot_s,
        )
        line = f"{len(trials) - len(known)} new trials, {len(known)} known before"
        rates = {
            name: max((t.metrics["images_per_s"].mean for t in trials if t.configuration["architecture"] == name), default=0.0)
            for name in ("simple", "microservice")
        }
        text = ", ".join(f"{name} up to {rate:,.0f} images/s" for name, rate in rates.items() if rate)
        context.close_step(job.name, "measure", f"{line}; every answer right; {text}")
        return trials

    def _probe(self, configuration: Configuration) -> Iterator[Trial]:
        """Measure one client on all architectures at once, interleaved; or one configuration with several clients."""
        clients = int(configuration["clients"])
        if clients > 1:
            yield measure_clients(
                self.served(clients),
                configuration,
                clients=clients,
                source="probe",
                **self._means(),
            )
            return
        made = measure_serving(self.served(), batches=BATCHES, **self._means())
        yield from (trial for trial in made if _candidate(trial))

    def _means(self) -> Mapping[str, Any]:
        """Return what every measurement is handed: how a trial is made and kept, and whom to tell."""

        def make_trial(**fields: Any) -> Trial:
            return self.context.trial(stage=self.job.name, fingerprint=self.fingerprint, **fields)

        record = self.context.client.record_trial
        return {"make_trial": make_trial, "record": record, "progress": self.context.progress}

    def recommend(self, goal: ServeGoal, trials: tuple[Trial, ...]) -> Recommendation:
        """Return and record what to lease for one goal."""
        context, job = self.context, self.job
        context.step(job.name, "recommend", goal.name)
        recommendation = self.tunable().recommend(
            goal, trials, id=context.new_id("rec"), run_id=context.run.id, stage=job.name, now_s=context.clock.utc_s()
        )
        context.client.record_recommendation(recommendation)
        if recommendation.thin:
            context.display.warn(f"{job.name}: {goal.name}: {recommendation.thin}")
        context.close_step(job.name, "recommend", f"{goal.name}: {recommendation.why}")
        return recommendation

    # --- lease ---

    def lease(self, goal: ServeGoal, chosen: Candidate) -> None:
        """Lease the winner, answer one request through the public client, load it as the goal says, end it."""
        context, job = self.context, self.job
        assert chosen.envelope is not None
        architecture = str(chosen.configuration["architecture"])
        context.step(job.name, "lease + serve", f"{goal.name}: {architecture}, {chosen.envelope.describe()}")
        if architecture == "simple":
            served = replace(self.served(goal.clients), app=chosen.envelope)
            observed = measure_clients(served, chosen.configuration, clients=goal.clients, **self._means())
            line = f"{goal.clients} leases of {chosen.envelope.describe()}"
        else:
            served = self.served(goal.clients, server=chosen.envelope)
            command = _server(context, replace(job, server=held_options(job.server, chosen.configuration)), self.model)
            server = served.launch(LaunchRequest(name="server", command=command, envelope=chosen.envelope))
            try:
                answered_ms = self._ask(server, str(chosen.configuration["transport"]))
                observed = measure_clients(
                    served,
                    chosen.configuration,
                    clients=goal.clients,
                    server=server,
                    **self._means(),
                )
            finally:
                ended = server.stop()
            drained = "drained and ended cleanly" if (ended.result or {}).get("state") == "done" else f"ended {ended.kind}"
            line = f"the public client's answer was right after {answered_ms:.1f} ms; the server {drained}"
        metrics = observed.metrics
        context.close_step(
            job.name,
            "lease + serve",
            f"{goal.name}: {goal.clients} client{'s' if goal.clients > 1 else ''} at "
            f"{metrics['images_per_s'].mean:,.0f} images/s, p99 {metrics['p99_s'].mean * 1e3:.1f} ms, "
            f"{show_bytes(metrics['memory_bytes'].mean)} in all; {line}",
        )
        for row in compare(chosen.predictions, observed.metrics):
            if row.missed:
                context.display.warn(f"{job.name}: {goal.name}: {row.sentence}")

    def _ask(self, server: Launched, transport: str) -> float:
        """Ask the leased server one thing through the public client; return milliseconds. Raises JobFailed when it is wrong."""
        clock = self.context.clock
        one = np.load(self.x, mmap_mode="r")[:1]
        wanted = np.load(self._expected(), mmap_mode="r")[:1]
        with Model(f"{transport}://{server.endpoints[door(transport)]}", self.context.run.name) as model:
            model.wait_ready()
            model.metadata()
            began_s = clock.boot_s()
            answers, _ = model.predict_timed(one)
            took_s = clock.boot_s() - began_s
        if not any(array.shape == wanted.shape and np.allclose(array, wanted, atol=1e-4) for array in answers.values()):
            raise JobFailed(f"the leased server answers {answers!r} where the model in process answers {wanted!r}")
        return took_s * 1e3


def _candidate(trial: Trial) -> bool:
    return trial.configuration.get("architecture") != "distributed"


def _names(job: Job, model: Path, server: Launched) -> Sequence[str]:
    """Return the names of the models that are served; of an image, whatever the server says, none without a door."""
    if not is_image(job):
        return list(ModelFiles(model).scan())
    return served_names(server.endpoints["http"]) if "http" in server.endpoints else ()


def _server(context: RunContext, job: Job, model: Path) -> Command:
    """Return the server's command: both doors, on the job file's ports, with its environment. Raises SpecError."""
    if is_image(job):
        return image_command(job)
    doors = dict.fromkeys(TRANSPORTS, 0)
    if unknown := set(job.ports) - set(doors):
        raise SpecError(f"stage {job.name}: a server has no port {sorted(unknown)[0]!r}; it has: {', '.join(doors)}")
    name = context.run.name if context.listening is None else ""  # in the foreground models go by the names of their files
    ports, options = {**doors, **job.ports}, job.server
    if job.runtime == "container":  # it listens on all of its own network; what is published of that is our loopback's port
        ports, options = {door: port or free_port() for door, port in ports.items()}, replace(options, host="0.0.0.0")
    command = replace(server_command(model, name=name, ports=ports, options=options), env=job.env, secrets=job.secrets)
    if job.runtime != "container":
        return command
    return replace(command, runtime=job.runtime, image=job.image, mounts={str(model): f"{model}:ro"})


def _serve_until_ended(context: RunContext, job: Job, model: Path, envelope: Envelope) -> None:
    """Serve under the envelope that the job file gives, slot after slot, until its total is spent or the lease is released.

    Ctrl-C interrupts the run; in the foreground it is how serving ends well. Raises JobFailed when the server ends by itself.
    """
    context.step(job.name, "lease", envelope.describe())
    began_s = context.clock.boot_s()
    server = _started(context, job, model, envelope)
    ready_s = context.clock.boot_s() - began_s if server.endpoints else 0.0
    where = ", ".join(f"{name}://{address}" for name, address in server.endpoints.items())
    what = context.run.name if context.listening is None else str(model)
    doing = f"serving {what} at {where}" if where else f"running {what}"
    context.close_step(job.name, "lease", f"{doing}; Ctrl-C ends the lease")
    told = ""
    try:
        if context.listening is not None:
            _tell(context, job, look(server.lease_id, server.endpoints, _names(job, model, server)))
        context.step(job.name, "serve", envelope.describe())
        ended = _held(context, server, envelope, doing)
    except KeyboardInterrupt:
        if context.listening is None:
            raise
        with undisturbed():
            context.progress("answering what was accepted, then leaving")
            told = answered(server.endpoints)
            ended = server.stop()
    if is_image(job):
        keep_run(context, job, server.lease_id, ready_s=ready_s, ended=ended)
    if ended.kind not in (ExitKind.COMPLETED, ExitKind.STOPPED, ExitKind.OUT_OF_TIME):
        raise JobFailed(
            f"stage {job.name}: {doing} ended {ended.kind}: {ended.witness}\n{ended.log_tail}".rstrip(),
            reason=str(ended.kind),
        )
    if context.listening is not None and (ended.result or {}).get("drained") is False:
        raise JobFailed(f"stage {job.name}: some requests that the server had accepted were not answered within {DRAIN_S:g} s")
    held_s = ended.ended_at_s - ended.started_at_s
    line = f"{f'served at {where}' if where else 'ran'} for {held_s:.1f} s; ended {ended.kind}{told}"
    if (used := ended.usage) is not None:
        line += f"; {used.cpu_s:.1f} CPU-s, peak memory {show_bytes(used.peak_memory_bytes)} of {envelope.describe()}"
    context.close_step(job.name, "serve", line)
    if is_image(job) and "http" not in server.endpoints and ended.log_tail:
        context.close_step(job.name, "output", ended.log_tail)


def _started(context: RunContext, job: Job, model: Path, envelope: Envelope) -> Launched:
    """Launch the server. Raises JobFailed; when its memory was too little, with what to do about it."""
    command = _server(context, job, model)
    try:
        return context.launch(job.name)(LaunchRequest(name="server", command=command, envelope=envelope))
    except JobFailed as error:
        if error.reason != ExitKind.OUT_OF_MEMORY:
            raise
        given = show_bytes(envelope.memory_bytes)
        remedy = "--memory" if context.listening is not None else "memory in its envelope"
        raise JobFailed(
            f"{given} of memory is too little for {model.name} and its server: give it more ({remedy})\n{error}",
            reason=error.reason,
        ) from error


def _tell(context: RunContext, job: Job, listening: Listening) -> None:
    """Say what is served and how to call it; to whoever asked, too."""
    for model in listening.models:
        context.close_step(job.name, "model", model.describe())
    known = next((model for model in listening.models if not model.problem), None)
    if known is not None:
        context.close_step(job.name, "try", known.curl)
        context.close_step(job.name, "try", known.python)
    assert context.listening is not None
    context.listening(listening)


def _held(context: RunContext, server: Launched, envelope: Envelope, doing: str) -> Exit:
    """Renew the lease slot after slot and show what is used, until the server has ended; return how."""
    ended = None
    renew_s = 0.0
    while ended is None:
        usage = server.usage()
        context.progress(f"{doing}; {show_bytes(usage.memory_bytes)}, {usage.cpu_s:.1f} CPU-s; Ctrl-C ends the lease")
        lease = context.client.lease(server.lease_id).lease
        due = context.clock.boot_s() >= renew_s  # counted since boot: UTC may be set meanwhile, here or on the broker's side
        if lease.state is LeaseState.ACTIVE and due and lease.ends_at_s < lease.total_ends_at_s:
            renew_s = context.clock.boot_s() + envelope.slot_s / 4
            # It ends just now, and is waited for; or it is others' turn, and it serves to the end of its slot.
            with contextlib.suppress(Conflict, NotFound, Refused):
                context.client.renew(server.lease_id, envelope.slot_s)
        ended = server.wait(min(1.0, envelope.slot_s / 8))
    return ended
