"""What the benchmarks of `tenure bench serve` share: MobileNetV2 with a free batch, an experiment under real leases.

Its home is its own and goes with it. Not here: what is measured (the benchmarks).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Options, Skip
from tenure import app, verbs
from tenure.experiments.bench import BenchSpec, bench_job_file
from tenure.experiments.context import RunContext
from tenure.experiments.flow import new_run
from tenure.experiments.stage_sweep import assemble
from tenure.experiments.sweep import Setting
from tenure.experiments.sweep_nodes import Bench
from tenure.jobs import Job
from tenure.protocols import SystemClock
from tenure.sweeps import Sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What an experiment is made of, ready to be run."""

    context: RunContext
    job: Job
    bench: Bench
    settings: tuple[Setting, ...]


def mobilenet(options: Options, path: Path) -> Path:
    """Write MobileNetV2 with a first dimension of any length; return the path. Raises Skip."""
    source = options.need_data("vision", "models", "mobilenet_v2_1.0_224_qdq.onnx")
    try:
        import onnx
    except ImportError as error:
        raise Skip("the package onnx is not installed") from error
    model = onnx.load(source)
    graph = model.graph
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    for place, constant in enumerate(graph.initializer):
        if constant.name in shapes:
            shape = onnx.numpy_helper.to_array(constant).copy()
            shape[0] = -1
            graph.initializer[place].CopyFrom(onnx.numpy_helper.from_array(shape, constant.name))
    del graph.value_info[:]
    onnx.save(model, path)
    return path


@contextlib.contextmanager
def experiment(options: Options, sweep: Sweep) -> Iterator[Experiment]:
    """Assemble an experiment in a home of its own; end everything of it."""
    images = options.need_data("vision", "images")
    with tempfile.TemporaryDirectory(prefix="tenure-bench-") as scratch:
        home = Path(scratch) / "home"
        home.mkdir()
        model = mobilenet(options, Path(scratch) / "mobilenet.onnx")
        spec = BenchSpec(model=model, examples=images, sweep=sweep, seed=options.seed)
        run, jobs = new_run(bench_job_file(spec), source=model, run_id=app.new_id("r"), now_s=SystemClock().utc_s())
        (job,) = jobs.stages
        try:
            with app.broker(home) as client:
                context = app._context(client, home, run, display=verbs.SilentDisplay())
                bench, settings = assemble(context, job, model)
                try:
                    yield Experiment(context=context, job=job, bench=bench, settings=settings)
                finally:
                    context.release_all(why="the benchmark is over")
        finally:
            verbs.down(home=home)
