"""A serving stage that is searched: for each goal a few settings, each started as it says, loaded, and a trial in the ledger.

    searching: which next? ──► a node of its own: server with so many instances, threads, delay + applications ──► trial ──► …

What to measure next and what to take is `recommend.searching`'s; cells and their metrics are those of a sweep
(docs/bench-serve.md). Not here: leasing the choice (`stage_serve`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenure.experiments.architectures import held_options
from tenure.experiments.context import RunContext
from tenure.experiments.following import show_time
from tenure.experiments.search_report import disturbed
from tenure.experiments.stage_sweep import SLOT_S, Prepared, envelopes, prepare
from tenure.experiments.sweep import Setting, in_flight
from tenure.experiments.sweep_nodes import Bench, standing
from tenure.experiments.sweep_parties import PartyMeter
from tenure.experiments.sweep_run import WARM_S
from tenure.experiments.sweep_trials import trials_of
from tenure.jobs import Job
from tenure.meter.sample import NvmlSampler
from tenure.protocols import Launched
from tenure.recommend.choose import show
from tenure.recommend.search_words import words
from tenure.recommend.searching import SearchTunable
from tenure.recommend.tune import tune
from tenure.resources import Envelope
from tenure.trials import Configuration, Recommendation, Trial


def run_search(context: RunContext, job: Job, model: Path) -> tuple[Prepared, list[Recommendation]]:
    """Measure and choose for each goal of the stage; return what was sent, and the recommendations, recorded.

    Raises JobFailed, Refused or SpecError with the reason; what was measured stays recorded, and is not measured again.
    """
    assert job.search is not None
    context.step(job.name, "prepare", "pictures and right answers")
    prepared = prepare(model, context.inputs(job), job.search.as_sweep(), context.files.stage(job.name) / "search")
    context.close_step(job.name, "prepare", _prepared(prepared))
    near, *_ = envelopes(context.node, replace(job.search.as_sweep(), architectures=("simple",)))
    searched = _Searched(context, job, model, prepared, near)
    trials = searched.measured()
    return prepared, [searched.recommended(n, trials) for n in range(len(searched.tunable.goals))]


class _Searched:
    """One model of one stage, and how its settings are measured."""

    def __init__(self, context: RunContext, job: Job, model: Path, prepared: Prepared, near: Envelope) -> None:
        """near: all that is free of the node: the server and its applications share it."""
        self._context, self._job, self._model, self._prepared, self._near = context, job, model, prepared, near
        self._numbers = itertools.count(1)
        self.tunable = SearchTunable(
            job,
            replace(context.node.capacity, cpus=near.cpus, memory_bytes=near.memory_bytes),
            context.prices,
            next(stage.fingerprint for stage in context.run.stages if stage.name == job.name),
            self._probe,
            fixed_batch=prepared.fixed_batch,
            told=lambda text: context.display.warn(f"{job.name}: {text}"),
        )

    def measured(self) -> tuple[Trial, ...]:
        """Return the trials to choose from: known ones of this fingerprint, and what was still missing."""
        context, job, tunable = self._context, self._job, self.tunable
        assert job.search is not None
        many = f"{len(tunable.configurations())} settings, at most {job.search.trials * len(tunable.goals)} trials"
        within = f", none begins after {show_time(job.search.max_s)}" if job.search.max_s else ""
        context.step(job.name, "search", many + within)
        known = context.client.trials(fingerprint=tunable.fingerprint)
        trials = tune(
            tunable,
            known,
            context.client.record_trial,
            progress=context.progress,
            max_probes=tunable.max_probes,
            max_s=job.search.max_s,
            now=context.clock.boot_s,
        )
        if told := disturbed([trial for trial in trials if trial.run_id == context.run.id]):
            context.display.warn(f"{job.name}: {told}")
        names = {words(configuration) for configuration in tunable.configurations()}
        old = sum(words(trial.configuration) in names for trial in known)
        before = f", {old} known before" if old else ""
        context.close_step(job.name, "search", f"{many}: {len(trials) - len(known)} made{before}; every answer right")
        return trials

    def _probe(self, configuration: Configuration) -> Iterator[Trial]:
        """Start what a configuration says, on a node of its own, load it, end it. Raises JobFailed, Refused."""
        context, job, search = self._context, self._job, self._job.search
        assert search is not None
        told: dict[str, Any] = {name: configuration[name] for name in Setting.__dataclass_fields__ if name in configuration}
        setting = Setting(**told, data="memory")
        number = next(self._numbers)
        bench = Bench(
            name=context.run.name,
            model=self._model,
            examples=replace(self._prepared.examples, files=()),
            launch=context.launch(job.name),
            workdir=context.files.stage(job.name) / "search" / str(number),
            near=self._near,
            options=held_options(job.server, configuration),
            renew=self._renew,
        )
        places = in_flight(search.as_sweep(), setting)
        with contextlib.ExitStack() as stack:
            meter = stack.enter_context(PartyMeter(NvmlSampler if context.node.machine.gpus else None))
            nodes = stack.enter_context(standing(bench, [setting], meter))
            nodes.run(setting, repeat=-1, order=-1, seconds=WARM_S, in_flight=places, probes=False)
            cells = [
                nodes.run(setting, repeat=repeat, order=repeat, seconds=search.cell_s, in_flight=places)
                for repeat in range(search.repeats)
            ]
            (trial,) = trials_of(
                cells,
                prepare_model_s=nodes.prepare_model_s,
                server_start_s=nodes.server_start_s,
                make_trial=self._trial,
                seed=job.seed,
                note=lambda setting: f"{places} requests in flight." if setting.interaction == "async" else "",
            )
        found = trial.metrics
        rate, p99 = show("images_per_s", found["images_per_s"].mean), show("p99_s", found["p99_s"].mean)
        context.close_step(job.name, f"trial {number}", f"{words(configuration)}: {rate}, p99 {p99}")
        yield trial

    def _trial(self, **fields: Any) -> Trial:
        return self._context.trial(stage=self._job.name, fingerprint=self.tunable.fingerprint, **{**fields, "source": "probe"})

    def _renew(self, launched: Launched) -> None:
        self._context.client.renew(launched.lease_id, SLOT_S)

    def recommended(self, number: int, trials: tuple[Trial, ...]) -> Recommendation:
        """Return and record the choice for one goal."""
        context, job, goal = self._context, self._job, self.tunable.goals[number]
        context.step(job.name, "recommend", goal.name)
        found = self.tunable.recommend(
            goal, trials, id=context.new_id("rec"), run_id=context.run.id, stage=job.name, now_s=context.clock.utc_s()
        )
        context.client.record_recommendation(found)
        if found.thin:
            context.display.warn(f"{job.name}: {goal.name}: {found.thin}")
        context.close_step(job.name, "recommend", f"{goal.name}: {found.why}")
        return found


def _prepared(prepared: Prepared) -> str:
    skipped = prepared.skipped
    many = f"{len(prepared.examples.files)} pictures, decoded beforehand" if prepared.examples.files else "the examples"
    return f"{many}{f'; {len(skipped)} cannot be decoded, such as {skipped[0]}' if skipped else ''}"
