"""How many bytes two workers need to train a conv net together, with local steps and a codec, and what it costs in accuracy.

World: `programs/cifar_small.py` (156,298 parameters, batch normalisation), CIFAR-10 images of the data folder decoded to uint8
arrays: 25,000 to train with and 5,000 held out (--quick: 4,000 and 1,000); Adam of the torch adapter with its defaults (0.001,
never lowered). Two workers, each a process with one thread, take 32 examples each per step. 10 passes over the training
images (--quick: 6), whole rounds only; every contender that has two workers processes the same number of samples, in the
same order. Five seeds (--quick: two) of weights and order; the order of the contenders is shuffled.
Contenders, all with `same_result = false` and the handler's own code from start to result:
- every: an exchange after each step, no codec (the reference);
- fewer: `local_steps = 40, codec = "int8"`, outer rate 0.7 and momentum 0.9, which are the defaults (DiLoCo's);
- alone: one worker with its half of each batch, and no other (the control).
Counted: every byte that `Files` reads from or writes to the store in both processes, from the first weights to the result:
nodes, sums, checkpoints, records, claims, plans; the details tell them apart. Listing names and looking whether a file is there
have no bytes.
Accuracy: the share of the held-out images that the result's weights classify rightly, evaluated once, at the end.
Value: the median over the seeds of bytes(every) / bytes(fewer). Second, in the details: the median of accuracy(every) -
accuracy(fewer) of the same seed, in points; below zero, fewer is the better one.
Bars: at least 100 x fewer bytes, and at most 0.5 points lost. Both must hold. Held-out images are the same for all, so that
differences between contenders are finer than the 0.7 points that 5,000 images give for one; --quick has no such
precision, and its seeds tell of the code only.
Checked before a figure counts: every worker ended `done`; rounds and samples are those asked for; every round's mean loss is
a number; nothing is in quarantine; no worker began anew.
Control: `alone` must miss the bar of accuracy: what the exchange brings is more than 0.5 points.
Not counted: wall time (train_vs_ddp); it is in the details, for both contenders.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.cifar import write_arrays
from benchmarks.harness import ROOT, Control, Options, Result, judge, median, spread
from tenure.train.context import Context
from tenure.train.events import Start, TrainEvent, Work
from tenure.train.files import Files
from tenure.train.handler import handle
from tenure.train.programs import load_program
from tenure.train.progress import read_progress
from tenure.train.spec import TrainSpec
from tenure.train.store import Store
from tenure.train.worker import THREAD_VARIABLES

NAME = "train_communication"
BAR = "local steps and 8 bit: >= 100 x fewer bytes than an exchange after every step, at most 0.5 points of accuracy lost"
FEWER, LOST_POINTS = 100.0, 0.5
WORKERS, EXAMPLES = 2, 32
LOCAL_STEPS = 40
WAIT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one stage came to."""

    bytes: int
    by_kind: dict[str, int]
    """The same bytes by folder of the store."""
    accuracy: float
    seconds: float


class CountingFiles(Files):
    """Counts the bytes that are read and written, by the folder of the store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes: Counter[str] = Counter()

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        """See Files."""
        found = super().read(path, offset, size)
        self.bytes[self._kind(path)] += len(found)
        return found

    def _write(self, temp: Path, pieces: Iterable[bytes | memoryview], durable: bool) -> None:
        super()._write(temp, self._counted(self._kind(temp), pieces), durable)

    def _counted(self, kind: str, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            self.bytes[kind] += len(piece)
            yield piece

    def _kind(self, path: Path) -> str:
        return path.relative_to(self.root).parts[0] if path.parent != self.root else "others"


def run(options: Options) -> Result:
    """Train every seed in each of the ways."""
    seeds = [options.seed + number for number in range(2 if options.quick else 5)]
    images, held_out, passes = (400, 100, 6) if options.quick else (2500, 500, 10)
    source = options.need_data("images", "cifar10")
    rng = random.Random(options.seed)
    found: dict[str, list[Trained]] = {"every": [], "fewer": [], "alone": []}
    with tempfile.TemporaryDirectory() as name, _processes() as pool:
        folder = Path(name)
        data = write_arrays(source, folder / "data", train_per_class=images, test_per_class=held_out)
        exchanges = 10 * images * passes // (WORKERS * EXAMPLES * LOCAL_STEPS)
        ways: dict[str, dict[str, Any]] = {
            "every": {"max_rounds": exchanges * LOCAL_STEPS},
            "fewer": {"max_rounds": exchanges, "local_steps": LOCAL_STEPS, "codec": "int8"},
            "alone": {"max_rounds": exchanges * LOCAL_STEPS, "workers": 1},
        }
        for seed in seeds:
            for way in rng.sample(sorted(ways), len(ways)):
                found[way].append(_train(pool, folder / f"{way}-{seed}", data, seed, **ways[way]))
                print(f"seed {seed} {way}: {found[way][-1]}", flush=True)
    return _judged(found, seeds, exchanges)


def _judged(found: dict[str, list[Trained]], seeds: list[int], exchanges: int) -> Result:
    every, fewer, alone = found["every"], found["fewer"], found["alone"]
    ratios = [a.bytes / b.bytes for a, b in zip(every, fewer, strict=True)]
    lost = [100 * (a.accuracy - b.accuracy) for a, b in zip(every, fewer, strict=True)]
    lost_alone = [100 * (a.accuracy - b.accuracy) for a, b in zip(every, alone, strict=True)]
    control = Control(
        name="one worker with its half of each batch",
        value=median(lost_alone),
        failed=median(lost_alone) > LOST_POINTS,
        how=f"points of accuracy lost; bar {LOST_POINTS}",
    )
    holds, why = judge(median(ratios) >= FEWER and median(lost) <= LOST_POINTS, control)
    return Result(
        value=median(ratios),
        spread=spread(ratios),
        unit="x",
        holds=holds,
        why=why,
        reference={"name": "an exchange after every step", "value": median([t.bytes for t in every]), "unit": "bytes"},
        control=control,
        details={
            "lost_points": median(lost),
            "lost_points_spread": spread(lost),
            "lost_points_limit": LOST_POINTS,
            "lost_points_by_seed": lost,
            "ratio_by_seed": ratios,
            "seeds": seeds,
            "exchanges": exchanges,
            **{f"{way}_accuracy_by_seed": [t.accuracy for t in trained] for way, trained in found.items()},
            **{f"{way}_bytes": median([t.bytes for t in trained]) for way, trained in found.items()},
            **{f"{way}_bytes_by_kind_first_seed": trained[0].by_kind for way, trained in found.items()},
            **{f"{way}_s": median([t.seconds for t in trained]) for way, trained in found.items()},
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
        },
    )


def _train(pool: ProcessPoolExecutor, folder: Path, data: Path, seed: int, *, workers: int = WORKERS, **mode: Any) -> Trained:
    """Train one stage to its end, check it, and return what it came to."""
    spec = TrainSpec(
        program="cifar_small.py:Net",
        folder=str(ROOT / "benchmarks" / "programs"),
        inputs={"images": str(data)},
        shards=workers,
        batch=workers * EXAMPLES,
        seed=seed,
        evaluate_every=1_000_000,
        same_result=False,
        claim_period_s=WAIT_S,
        **mode,
    )
    began = time.monotonic()
    waiting = [pool.submit(work, folder, asdict(spec), workers, worker) for worker in range(workers)]
    counted: Counter[str] = Counter()
    for future in waiting:
        counted.update(future.result())
    seconds = time.monotonic() - began
    progress = read_progress(folder / "store")
    steps = spec.max_rounds * max(1, spec.local_steps)
    assert progress.state == "done", f"{folder.name}: the stage is {progress.state}: {progress.why}"
    assert progress.round == len(progress.losses) == spec.max_rounds, f"{folder.name}: {progress.round} rounds"
    assert sum(progress.examples) == steps * spec.batch, f"{folder.name}: {sum(progress.examples)} samples"
    assert all(math.isfinite(loss) for loss in progress.losses), f"{folder.name}: a loss is no number"
    assert not progress.quarantined, f"{folder.name}: {progress.quarantined} files in quarantine"
    assert not list((folder / "store" / "anew").iterdir()), f"{folder.name}: a worker began anew"
    assert progress.accuracy is not None, f"{folder.name}: no accuracy"
    return Trained(bytes=counted.total(), by_kind=dict(counted), accuracy=progress.accuracy, seconds=seconds)


def work(folder: Path, spec_data: dict[str, Any], workers: int, worker: int) -> Counter[str]:
    """Play one worker's part of a stage, in a process of the pool. Returns the bytes that it read and wrote, by kind."""
    spec, files = TrainSpec(**spec_data), CountingFiles(folder / "store")
    store = Store(folder / "store", worker=worker, fence=1, files=files)
    event: TrainEvent = Start(workers=workers) if worker == 0 else Work(workerno=worker, workers=workers)
    until = time.monotonic() + WAIT_S
    while worker and store.latest_generation() < 0:  # a broker would start this worker when worker 0 says so
        assert time.monotonic() < until, "worker 0 did not begin"
        time.sleep(0.01)
    outcome = handle(
        event,
        Context(
            spec=spec,
            store=store,
            program=lambda: load_program(spec.program, Path(spec.folder), spec.options),
            invoke=lambda following: None,
        ),
    )
    assert outcome.state == "done", f"worker {worker} ended {outcome}"
    return files.bytes


@contextmanager
def _processes() -> Iterator[ProcessPoolExecutor]:
    """Give a process per worker, each with one thread for arithmetic."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
