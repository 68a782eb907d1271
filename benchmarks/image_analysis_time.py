"""How long the analysis of the largest engine's service takes.

Service: PyTorch with the perceptron of `benchmarks.image_models` in our server.
Measured: wall time of `tenure image analyse` of that service with the product's own exercise, by the command line, from start
to exit: trace, exercise, import and ELF analysis, hashes, lock file written. 3 times (--quick: once), files in the page cache
(one start of the service before). CPU time of the whole tree beside it.
Bar: median at most 60 s (`value`, seconds).
Checked: the lock holds libtorch_cpu.so, the model and every file of three held-out runs of `benchmarks.image_grammar`, by
living those in the root form; a quick analysis that makes a useless closure does not count.
Control: the same analysis with files merely opened kept: its closure must fail that check.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import Control, Options, Result, Skip, judge, median, spread
from benchmarks.image_grammar import Run, Served, draw
from benchmarks.image_player import Life, Outcome, differences, live
from tenure.closures import Closure, FileKind, Reason, Why
from tenure.images.lock import read_lock
from tenure.images.tree import make_tree
from tenure.runtimes.rooted import why_no_root

NAME = "image_analysis_time"
BAR = "the analysis of a PyTorch service takes at most 60 s"
LIMIT_S = 60.0
ENGINE, KIND = "torch", "perceptron"
REPEATS, HELD_OUT_RUNS = 3, 3


def run(options: Options) -> Result:
    """Analyse, check the closure by living in it, see the control fail."""
    builds.need_tools()
    if why := builds.available(ENGINE) or why_no_root():
        raise Skip(why)
    with builds.workshop() as folder:
        model = models.write(folder / "models", ENGINE, KIND, seed=options.seed)
        served = next(each for each in models.service(ENGINE).models if each.name == KIND)
        runs = list(itertools.islice(_held_out(), HELD_OUT_RUNS))
        expected = {run.number: live(lambda run: builds.in_process(ENGINE, model, run), run, served) for run in runs}
        figures = [_analyse(model, folder, number) for number in range(1 if options.quick else REPEATS)]
        closure = read_lock(folder / "found-0" / builds.LOCK)
        _check_files(closure, model)
        told = {run.number: differences(expected[run.number], _in(closure, folder / "whole", run, served)) for run in runs}
        assert not any(told.values()), f"from its closure the service answers otherwise: {told}"
        opened = replace(closure, files=tuple(file for file in closure.files if not _only_looked_at(file.reasons)))
        spared = not differences(expected[runs[0].number], _in(opened, folder / "opened", runs[0], served))
    walls, cpus = [wall for wall, _ in figures], [cpu for _, cpu in figures]
    how = f"without the {len(closure.files) - len(opened.files)} files merely looked at, run {runs[0].number} differs"
    control = Control(name="files merely opened", value=None, failed=not spared, how="it did without" if spared else how)
    value = median(walls)
    holds, why = judge(value <= LIMIT_S, control)
    return Result(
        value=value,
        spread=spread(walls),
        unit="s",
        holds=holds,
        why=why,
        control=control,
        details={
            "cpu_s": round(median(cpus), 2),
            "files": sum(file.kind is FileKind.FILE for file in closure.files),
            "size_bytes": closure.size_bytes,
            "walls_s": [round(wall, 2) for wall in walls],
            "held_out_runs": [run.number for run in runs],
        },
    )


def _held_out() -> Iterator[Run]:
    service = models.service(ENGINE)
    return (run for number in itertools.count() if (run := draw(service, number)).start.model == KIND)


def _analyse(model: Path, folder: Path, number: int) -> tuple[float, float]:
    """Return wall and CPU seconds of one analysis by the command line."""
    before, begun_s = _children_cpu_s(), time.monotonic()
    builds.tenure(["image", "analyse", "--out", str(folder / f"found-{number}"), "serve", str(model)], folder / "home")
    return time.monotonic() - begun_s, _children_cpu_s() - before


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _check_files(closure: Closure, model: Path) -> None:
    paths = {file.path for file in closure.files}
    assert any(path.endswith("/libtorch_cpu.so") for path in paths), "the closure lacks libtorch_cpu.so"
    assert os.path.realpath(model) in paths, "the closure lacks the model"


def _only_looked_at(reasons: tuple[Reason, ...]) -> bool:
    return {reason.kind for reason in reasons} == {Why.STATTED}


def _in(closure: Closure, tree: Path, run: Run, served: Served) -> Outcome:
    """Live a run in a tree of a closure; the tree is made when it is missing."""
    if not tree.exists():
        make_tree(closure, tree)
    start = run.start
    words = ["--threads", str(start.threads), "--instances", str(start.instances), "--max-delay-ms", str(start.delay_ms)]
    words += [] if start.warm_up else ["--no-warmup"]
    model = closure.program[closure.program.index("--model") + 1]
    argv = [closure.program[0], "-m", "tenure.serve", "--model", model, *words]
    within = [sys.executable, "-I", str(builds.PROGRAMS / "in_root.py"), str(tree), closure.workdir]
    return live(lambda _: Life([*within, *argv], dict(closure.env)), run, served)
