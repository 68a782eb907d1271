"""Whether ten epochs over cached features cost one pass through the frozen part, the head's own time, and next to nothing else.

World: CIFAR-10 images of the data folder (uint8 32 x 32 x 3), 100 per class to train and 20 held out (--quick: 40 and 10). The
frozen part is MobileNetV2 with its real weights (ONNX file of the data folder), cut before its classifier, images enlarged to
96 x 96, one thread; the head a softmax layer in NumPy with Adam, batches of 100, 10 epochs, evaluated once per epoch; shards 2.
Timed, each in a new folder without a cache, interleaved, 9 repeats (--quick: 2), after one warm-up that is thrown away:
- cached: the handler of a training worker with one worker, in this process, from its start event to the result. The frozen
  part fills the cache first (chunks, checksums, assembling) and each round reads the memory-mapped features.
- pass: the frozen part alone over the same images in the same batches, results kept in memory. Nothing written.
- head: the same handler with the same program on features that are handed over as arrays in memory: the head's own time.
Median CPU time and wall time of each; judged: CPU seconds (one thread; wall time is told too).
The value is (cached - head) / pass. Bar: <= 1.01.
Checked: cached and head end with the same weights, bit by bit; the accuracy is above 0.5; the frozen part was given each image
once; a second cached run in the same folder's cache gives the frozen part no image at all.
Control: without cache, each round's examples go through the frozen part anew (head, the same 10 epochs); it must miss the bar.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.cifar import write_arrays
from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from tenure.train.events import Start
from tenure.train.features import Frozen
from tenure.train.handler import Context, handle
from tenure.train.programs import Arrays, load_arrays, load_program
from tenure.train.records import read_arrays
from tenure.train.spec import TrainSpec
from tenure.train.store import Store

NAME = "train_frozen_once"
BAR = "10 epochs over cached features: CPU time <= 1.01 x one pass through the frozen part + the head's own time"
SHARE = 1.01
EPOCHS, ROUND, BATCH, SIDE = 10, 100, 50, 96
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


class Counting:
    """A frozen part that counts the images it is given."""

    def __init__(self, features: Callable[..., Any]) -> None:
        self.features, self.seen = features, 0

    def __call__(self, images: Any) -> Any:
        """Return their features."""
        self.seen += len(images)
        return self.features(images)


class InMemory:
    """The head on features that are handed over, or, with a frozen part, that are computed anew in each round."""

    def __init__(self, head: Any, data: tuple[Arrays, Arrays], features: Callable[..., Any] = lambda x: x) -> None:
        self.head, self.arrays, self.features = head, data, features
        self.build, self.update = head.build, head.update

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """See Program."""
        return self.arrays

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> Any:
        """See Program."""
        return self.head.gradient(weights, {**batch, "x": self.features(batch["x"])}, rng)

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """See Program."""
        return float(self.head.evaluate(weights, {**held_out, "x": self.features(held_out["x"])}))


class World:
    """Images, the model, and a folder for each run."""

    def __init__(self, options: Options, root: Path) -> None:
        self.root, self.runs = root, 0
        self.model = options.need_data("vision", "models", "mobilenet_v2_1.0_224_qdq.onnx")
        train, test = (40, 10) if options.quick else (100, 20)
        source = options.need_data("images", "cifar10")
        self.inputs = {"images": str(write_arrays(source, root / "images", train_per_class=train, test_per_class=test))}
        self.images = load_arrays(self.inputs)
        self.count = sum(len(part["x"]) for part in self.images)
        self.seed = options.seed
        self.weights: dict[str, Arrays] = {}
        self.accuracy = 0.0

    def program(self) -> Any:
        """Return the example's program, its frozen part counted."""
        # The model's file is the user's: the example finds it by its absolute path.
        program: Any = load_program("cifar10_frozen_program.py:Photos", EXAMPLES, {"model": str(self.model), "side": SIDE})
        program._features = Counting(program._features)
        return program

    def train(self, name: str, program: Any) -> tuple[float, float]:
        """Train with one worker in a new folder; return CPU and wall seconds."""
        self.runs += 1
        folder = self.root / f"run-{self.runs}"
        rounds = EPOCHS * len(self.images[0]["x"]) // ROUND
        spec = TrainSpec(
            program="frozen.py:Photos",
            folder=str(folder),
            inputs=self.inputs,
            shards=2,
            batch=ROUND,
            seed=self.seed,
            max_rounds=rounds,
            evaluate_every=rounds // EPOCHS,
        )
        cpu_began, began = time.process_time(), time.perf_counter()
        context = Context(spec=spec, store=Store(folder / "store"), program=lambda: program, invoke=lambda event: None)
        outcome = handle(Start(workers=1), context)
        took = time.process_time() - cpu_began, time.perf_counter() - began
        assert outcome.state == "done", outcome
        header, self.weights[name] = read_arrays(folder / "store" / "result")
        self.accuracy = header.meta["accuracy"]
        return took

    def cached(self, *, home: Path | None = None, expected: int = -1) -> tuple[float, float]:
        """Train with the cache, empty unless `home` names one that is filled."""
        program = self.program()
        os.environ["TENURE_HOME"] = str(home or self.root / f"home-{self.runs}")
        took = self.train("cached", program)
        expected = self.count if expected < 0 else expected
        assert program._features.seen == expected, (program._features.seen, expected)
        return took

    def passed(self) -> tuple[float, float]:
        """Let the frozen part see each image once, and nothing else."""
        features = self.program()._features
        cpu_began, began = time.process_time(), time.perf_counter()
        kept = [
            features(np.array(part["x"][at : at + BATCH])) for part in self.images for at in range(0, len(part["x"]), BATCH)
        ]
        assert sum(map(len, kept)) == self.count
        return time.process_time() - cpu_began, time.perf_counter() - began


def run(options: Options) -> Result:
    """Measure the three, then the control once."""
    names = ("OMP_NUM_THREADS", "TENURE_HOME")
    before = {name: os.environ.get(name) for name in names}
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        # NumPy is loaded already: its pool would spin on the other core, and count.
        with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
            return _measure(World(options, Path(folder)), options)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _measure(world: World, options: Options) -> Result:
    filled = world.root / "filled"
    world.cached(home=filled)
    world.cached(home=filled, expected=0)  # a second run computes nothing
    program: Frozen = world.program()
    os.environ["TENURE_HOME"] = str(filled)
    in_memory = tuple({name: np.array(values) for name, values in part.items()} for part in program.data(world.inputs))
    head = program.head
    contenders = {
        "cached": world.cached,
        "pass": world.passed,
        "head": lambda: world.train("head", InMemory(head, (in_memory[0], in_memory[1]))),
    }
    found = interleaved(contenders, 2 if options.quick else 9, seed=options.seed, warm_up=1)
    assert all(np.array_equal(values, world.weights["head"][name]) for name, values in world.weights["cached"].items())
    assert world.accuracy > 0.5, world.accuracy
    anew = world.program()._features
    control_s, _ = world.train("anew", InMemory(head, world.images, anew))
    cpu_s = {name: [cpu for cpu, _ in each] for name, each in found.items()}
    ratios = [(c - h) / p for c, h, p in zip(cpu_s["cached"], cpu_s["head"], cpu_s["pass"], strict=True)]
    uncached = (control_s - median(cpu_s["head"])) / median(cpu_s["pass"])
    control = Control(
        name="without cache", value=uncached, failed=uncached > SHARE, how=f"{anew.seen} images for {world.count}; bar {SHARE}"
    )
    value = (median(cpu_s["cached"]) - median(cpu_s["head"])) / median(cpu_s["pass"])
    holds, why = judge(value <= SHARE, control)
    return Result(
        value=value,
        spread=spread(ratios),
        unit="x",
        holds=holds,
        why=why,
        reference={"pass_cpu_s": median(cpu_s["pass"]), "head_cpu_s": median(cpu_s["head"])},
        control=control,
        details={
            "images": world.count,
            "accuracy": world.accuracy,
            "cached_cpu_s": median(cpu_s["cached"]),
            "wall_s": {name: median([wall for _, wall in each]) for name, each in found.items()},
            "ratios": ratios,
        },
    )
