"""A serving stage that is an experiment: every setting of its sweep, again and again in one random order, then its trials.

What is measured, and how each figure is defined, stands in docs/bench-serve.md. Not here: running the cells (`sweep_run`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tenure.decide.repeats import errors, in_words, paired_with_first
from tenure.errors import Refused, SpecError, Unavailable
from tenure.experiments import links, netns
from tenure.experiments.contenders import find_contenders
from tenure.experiments.context import RunContext
from tenure.experiments.following import show_time
from tenure.experiments.sweep import Contender, Setting, places, settings
from tenure.experiments.sweep_forecast import with_forecasts
from tenure.experiments.sweep_nodes import Bench
from tenure.experiments.sweep_run import measure_sweep
from tenure.jobs import Job
from tenure.links import parse_link
from tenure.nodes import Node
from tenure.protocols import Launched
from tenure.resources import Envelope
from tenure.serve.client import Model
from tenure.serve.load.orders import Examples
from tenure.serve.pixels import BadImage, Preparation, pictures_in, preparation_for, read_into
from tenure.serve.tensors import ModelMetadata
from tenure.sweeps import Sweep
from tenure.trials import Trial

SLOT_S = 120.0
"""Of both leases, which are renewed while the experiment lives: when it is killed, they end within this time."""
TOTAL_S = 7 * 86400.0
DISK_BYTES = 1 << 30
MAX_EXAMPLES_BYTES = 2 << 30
CHECK_ROWS = 32
"""Rows that the model is asked at once, in this process, to know the right answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is sent and what must come back, as files; and what the model's shape allows."""

    examples: Examples
    fixed_batch: int
    """0: any."""
    answer_bytes: int
    """Of one image: all outputs of the model."""
    skipped: tuple[str, ...] = ()
    """Pictures that can't be decoded, each with its reason."""


def run_sweep(context: RunContext, job: Job, model: Path, *, contenders: Sequence[Contender] = ()) -> tuple[Trial, ...]:
    """Run the stage; return its trials, which are recorded. Raises JobFailed, Refused or SpecError with the reason."""
    assert job.sweep is not None
    bench, planned = assemble(context, job, model, contenders=contenders)
    sweep, x = job.sweep, np.load(bench.examples.inputs, mmap_mode="r")
    least_s = len(planned) * job.sweep.repeats * job.sweep.visits * job.sweep.cell_s
    within = f", but begins no repeat that would end after {show_time(job.sweep.max_s)}" if job.sweep.max_s else ""
    many = f"{len(planned)} settings, {job.sweep.repeats} repeats, at least {show_time(least_s)}{within}"
    context.close_step(job.name, "plan", many)
    context.step(job.name, "measure", many)
    trials = measure_sweep(
        bench,
        job.sweep,
        planned,
        seed=job.seed,
        make_trial=lambda **fields: _trial(context, job, **fields),
        record=context.client.record_trial,
        progress=context.progress,
        gpu=bool(context.node.machine.gpus),
        now=context.clock.boot_s,
        foretell=lambda made: with_forecasts(
            made,
            bench.link,
            image_bytes=x[:1].nbytes,
            answer_bytes=bench.answer_bytes,
            in_flight=lambda batch: places(sweep, batch),
            tcp=links.tcp,
        ),
    )
    context.close_step(job.name, "measure", _closing(trials))
    return trials


def assemble(
    context: RunContext, job: Job, model: Path, *, contenders: Sequence[Contender] = ()
) -> tuple[Bench, tuple[Setting, ...]]:
    """Prepare pictures and right answers; return what is measured, by which means, and its settings."""
    sweep = job.sweep
    assert sweep is not None
    context.step(job.name, "prepare", "pictures and right answers")
    folder = context.files.stage(job.name) / "experiment"
    prepared = prepare(model, context.inputs(job), sweep, folder)
    rows = len(np.load(prepared.examples.expected, mmap_mode="r"))
    skipped = f"; {len(prepared.skipped)} can't be decoded, such as {prepared.skipped[0]}" if prepared.skipped else ""
    context.close_step(job.name, "prepare", f"{rows} {'pictures' if prepared.examples.files else 'examples'}{skipped}")
    for note in _left_out(sweep, prepared):
        context.display.warn(f"{job.name}: {note}")
    link = parse_link(sweep.link)
    contenders = contenders or _contenders(context, job, model, prepared)
    planned = settings(
        sweep,
        files=bool(prepared.examples.files),
        fixed_batch=prepared.fixed_batch,
        far_link=_far_link(sweep),
        contenders=contenders,
    )
    near, far, apart = envelopes(context.node, sweep)
    bench = Bench(
        name=context.run.name,
        model=model,
        examples=prepared.examples,
        launch=context.launch(job.name),
        workdir=folder,
        near=near,
        far=far,
        options=job.server,
        renew=lambda launched: _renew(context, launched),
        contenders=contenders,
        undisturbed=sweep.undisturbed,
        link=link,
        apart=apart,
        answer_bytes=prepared.answer_bytes,
    )
    return bench, planned


def _contenders(context: RunContext, job: Job, model: Path, prepared: Prepared) -> tuple[Contender, ...]:
    """Return the servers that the sweep names. Raises as `find_contenders`."""
    assert job.sweep is not None
    if not job.sweep.against:
        return ()
    with Model(str(model)) as alone:
        ours = alone.metadata()
    found = find_contenders(
        job.sweep.against,
        model.stem,
        ours,
        largest_batch=prepared.fixed_batch or max(job.sweep.batches),
        warn=lambda text: context.display.warn(f"{job.name}: {text}"),
    )
    names = ", ".join(f"{one.name} over {' and '.join(one.targets)}" for one in found)
    context.close_step(job.name, "prepare", f"against {names}")
    return found


def _far_link(sweep: Sweep) -> str:
    """Return what will join the two nodes. Raises Unavailable where a declared link cannot be made."""
    link = parse_link(sweep.link)
    if "distributed" in sweep.architectures and (why_not := netns.available()):
        if link.shapes:
            raise Unavailable(f"the declared link {link} cannot be made: {why_not}")
        return "loopback"
    return str(link) or "netns"


def prepare(model: Path, inputs: dict[str, Path], sweep: Sweep, folder: Path) -> Prepared:
    """Write the examples and the answers that the model gives in this process. Raises SpecError, NotFound, JobFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    with Model(str(model)) as alone:
        metadata = alone.metadata()
        first = metadata.inputs[0].shape[0] if metadata.inputs and metadata.inputs[0].shape else 0
        fixed = first if first > 0 else 0
        files: list[str] = []
        skipped: list[str] = []
        if "images" in inputs:
            how = _how(metadata, sweep)
            x = np.zeros((sweep.images, *how.shape), how.dtype)
            for path in pictures_in(inputs["images"]):
                if len(files) == sweep.images:
                    break
                try:
                    read_into(x[len(files)], path, how)
                except BadImage as error:
                    skipped.append(f"{Path(path).name}: {error}")
                else:
                    files.append(path)
            if not files:
                raise SpecError(
                    f"{inputs['images']} has no picture that can be decoded: {'; '.join(skipped[:3]) or 'it is empty'}"
                )
            x = x[: len(files)]
        elif "x" in inputs:
            x = np.load(inputs["x"], mmap_mode="r", allow_pickle=False)[: sweep.images]
        else:
            raise SpecError("an experiment needs inputs.images, a folder of pictures, or inputs.x, an .npy file of examples")
        if x.nbytes > MAX_EXAMPLES_BYTES:
            raise SpecError(f"{len(x)} examples take {x.nbytes} bytes; at most {MAX_EXAMPLES_BYTES}: lower sweep.images")
        expected, answer_bytes = _answers(alone, x, fixed)
    np.save(folder / "x.npy", x)
    np.save(folder / "expected.npy", expected)
    examples = Examples(
        inputs=str((folder / "x.npy").resolve()),
        expected=str((folder / "expected.npy").resolve()),
        files=tuple(files),
        normalise=sweep.normalise,  # type: ignore[arg-type]
        crop=sweep.crop,
        size=sweep.size,
        metadata=metadata,
    )
    return Prepared(examples=examples, fixed_batch=fixed, answer_bytes=answer_bytes, skipped=tuple(skipped))


def _how(metadata: ModelMetadata, sweep: Sweep) -> Preparation:
    """Return how pictures become the model's input. Raises SpecError, saying where it is to be said."""
    try:
        return preparation_for(metadata, normalise=sweep.normalise or None, crop=sweep.crop, size=sweep.size)  # type: ignore[arg-type]
    except SpecError as error:
        raise SpecError(f"{error} (--normalise, --size; in a job file sweep.normalise, sweep.size)") from error


def _answers(model: Model, x: Any, fixed: int) -> tuple[Any, int]:
    """Return the answers in this process, labels where the model gives some, else its first output; and all outputs' bytes."""
    rows, size_bytes = fixed or CHECK_ROWS, 0
    parts: list[Any] = []
    for start in range(0, len(x), rows):
        part = np.ascontiguousarray(x[start : start + rows])
        if fixed and len(part) < fixed:
            part = np.concatenate([part, np.zeros((fixed - len(part), *part.shape[1:]), part.dtype)])
        answers, _ = model.predict_timed(part)
        size_bytes = sum(array.nbytes for array in answers.values()) // len(part)
        whole = [array for array in answers.values() if array.dtype.kind in "iu"]
        parts.append((whole or list(answers.values()))[0][: len(x) - start])
    return np.concatenate(parts), size_bytes


def envelopes(node: Node, sweep: Sweep) -> tuple[Envelope, Envelope | None, Envelope | None]:
    """Return the leases of the server's node, of the client's where something is distributed, and of each server where they
    have leases of their own: then the server's node is shared out evenly among them and its applications. Raises Refused.
    """
    cpus = round(node.capacity.cpus - node.held_cpus, 3)
    memory_bytes = (node.capacity.memory_bytes - node.held_memory_bytes) // 10 * 9
    if cpus < 0.1 or memory_bytes < 256 << 20:
        raise Refused(
            f'leases hold all of node {node.name}: "tenure leases --live" lists them, "tenure release LEASE" ends one'
        )
    distributed = "distributed" in sweep.architectures
    if distributed and sweep.client_cpus >= cpus:
        raise SpecError(f"sweep.client_cpus is {sweep.client_cpus:g}; {cpus:g} cores are free for both nodes")
    far_cpus = (sweep.client_cpus or cpus / 2) if distributed else 0.0
    far_bytes = memory_bytes // 4 if distributed else 0

    def envelope(cores: float, size_bytes: int) -> Envelope:
        return Envelope(cpus=cores, memory_bytes=size_bytes, disk_bytes=DISK_BYTES, slot_s=SLOT_S, total_s=TOTAL_S)

    near = envelope(cpus - far_cpus, memory_bytes - far_bytes)
    far = envelope(far_cpus, far_bytes) if distributed else None
    if "container" not in sweep.runtimes:
        return near, far, None
    parts = len(sweep.runtimes) + 1
    part = envelope(round(near.cpus / parts - 0.0005, 3), near.memory_bytes // parts)
    return part, far, part


def _renew(context: RunContext, launched: Launched) -> None:
    context.client.renew(launched.lease_id, SLOT_S)


def _trial(context: RunContext, job: Job, **fields: Any) -> Trial:
    """Return a trial of this stage, with how bounds were held where its server ran."""
    made = context.trial(stage=job.name, fingerprint=_fingerprint(context, job), **fields)
    runtime = str(made.configuration.get("runtime", "process"))
    return made if runtime == "process" else replace(made, bounds=context.node.bounds.get(runtime, {}))


def _fingerprint(context: RunContext, job: Job) -> str:
    return next(stage.fingerprint for stage in context.run.stages if stage.name == job.name)


def _left_out(sweep: Sweep, prepared: Prepared) -> list[str]:
    """Return what of the sweep is not measured, and why."""
    found = []
    if prepared.fixed_batch and (others := [batch for batch in sweep.batches if batch != prepared.fixed_batch]):
        found.append(
            f"batch {', '.join(map(str, others))} left out: the model takes {prepared.fixed_batch} at a time; export it with a "
            "first dimension of any length to have batches"
        )
    if "files" in sweep.data and not prepared.examples.files:
        found.append("nothing is read from files: the examples are an array (inputs.x), not pictures (inputs.images)")
    return found


def _closing(trials: Sequence[Trial]) -> str:
    best = max(trials, key=lambda trial: trial.metrics["images_per_s"].mean)
    found = best.metrics["images_per_s"]
    factors = best.configuration
    what = " ".join(str(factors[name]) for name in ("architecture", "transport", "interaction") if factors[name] != "none")
    told = errors(paired_with_first(trials))
    return (
        f"{len(trials)} settings, {found.n} repeats, every answer right; fastest: {what}, batch {factors['batch']}, from "
        f"{factors['data']}: {found.mean:,.1f} ± {found.standard_error:.1f} images/s{f'; {in_words(told)}' if told else ''}"
    )
