"""Whether a training worker leaves in time, whatever its slot and its steps, and how much of the slot it uses.

World: the process runtime with its real shims: SIGKILL comes at the slot's end, without grace. The worker is `python -m
tenure.train.worker` on a stage of its own; a small driver starts the event of its next slot as the broker does, with the same
slot again. Slots of 2, 5, 10, 30 and 60 s (--quick: 2, 5, 10 and 20), steps of 10, 100 and 700 ms: each pair is a case. A
step is one shard's gradient: a matrix product, then sleep, so that the three cases of one slot length can run beside each
other on two cores. Its length follows the clock: base x (1.3 + 0.3 sin(2 pi t / 7 s)) x a random 0.9 to 1.1, as on a machine
with neighbours. 8 shards a round; slots of up to 10 s follow each other for 20 s (--quick: 10 s), longer ones twice each
(--quick: once). A slot too short for its start and one step has no share.
Measured, by the program itself (CLOCK_BOOTTIME of each step's begin and end, in a file), never by the code under test: start
= order to first step's begin; used = first step's begin to last step's end; share = used / (slot - start). Publishing and
combining between two steps count as used; steps whose result never came into the store, or came twice, do not: their time is
taken off.
Bars: no slot killed by its deadline, and in each slot a share of at least 0.97, or no more left over than the longest step of
its case. Value: the least share over the slots that do not hold by the second way (1 when all do).
Checked: every slot's exit is `completed` with `state: continue`; the next one goes on with the round and shard at which it
stopped, which follows from the count of steps.
Control: the study's way, as many steps per slot as fitted into the first one (there: 68 in 15 minutes), with the same steps,
in slots of 5 s: it must be killed, or leave more than 3 % and a step.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Control, Options, Result, judge
from tenure.protocols import Exit, ExitKind, StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes.process import ProcessRuntime
from tenure.train import spec as train
from tenure.train.store import Store

NAME = "train_slots"
BAR = "slots of 2 to 60 s: none killed by its deadline, 97 % of slot - start in steps, or within one step"
SHARE_LIMIT = 0.97
SHARDS = 8
STEPS_S = (0.01, 0.1, 0.7)
_PROGRAM = """
import math, os, random, time
import numpy as np

def boot_s():
    return time.clock_gettime(time.CLOCK_BOOTTIME)

rng, square = random.Random(os.getpid()), np.ones((64, 64), np.float32)

def step(base_s):
    began_s = boot_s()
    length_s = base_s * (1.3 + 0.3 * math.sin(2 * math.pi * began_s / 7)) * rng.uniform(0.9, 1.1)
    square @ square
    time.sleep(max(0.0, began_s + length_s - boot_s()))
    with open(os.environ["TENURE_WORKER_DIR"] + "/steps", "a") as log:
        log.write(f"{began_s!r} {boot_s()!r}\\n")

class Steps:
    def __init__(self, step_s):
        self.step_s = step_s
    def data(self, inputs):
        x = np.ones((64, 4), np.float32)
        return {"x": x}, {"x": x}
    def build(self, seed):
        return {"w": np.zeros(4, np.float32)}
    def gradient(self, weights, batch, rng):
        step(self.step_s)
        return {"w": batch["x"].sum(axis=0)}, 0.0, len(batch["x"])
    def update(self, weights, summed, n, round_):
        return {"w": weights["w"] + summed["w"]}
    def evaluate(self, weights, held_out):
        return 0.0
"""
_FIXED = """
import json, os, sys
sys.path.insert(0, os.environ["STEPS_FOLDER"])
from steps import boot_s, step
count_file, base_s, slot_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
if os.path.exists(count_file):
    for _ in range(int(open(count_file).read())):
        step(base_s)
else:
    ends_s, count = float(os.environ["TENURE_STARTED_BOOT_S"]) + 0.97 * slot_s, 0
    while boot_s() + 1.1 * 1.6 * base_s < ends_s:
        step(base_s)
        count += 1
    open(count_file, "w").write(str(count))
"""


@dataclass(slots=True)
class Slot:
    """What one slot was: seconds."""

    killed: bool
    start_s: float
    used_s: float
    left_s: float
    longest_s: float


@dataclass(slots=True)
class Case:
    """One length of slots with one length of steps."""

    slot_s: float
    step_s: float
    slots: list[Slot] = field(default_factory=list)
    repeated: int = 0
    """Steps that are not in the store, or twice."""
    error: str = ""

    def share(self, slot: Slot) -> float:
        """Return the share of slot - start spent in steps; steps done in vain count for nothing."""
        lost_s = self.repeated * self.step_s / max(1, len(self.slots))
        return (slot.used_s - lost_s) / (self.slot_s - slot.start_s)

    def holds(self, slot: Slot) -> bool:
        """Return whether the slot was used, but for 3 % or one step."""
        longest_s = max(slot.longest_s for slot in self.slots)
        return not slot.killed and (self.share(slot) >= SHARE_LIMIT or self._within_one_step(slot, longest_s))

    def _within_one_step(self, slot: Slot, longest_s: float) -> bool:
        return slot.left_s <= longest_s and not self.repeated


def run(options: Options) -> Result:
    """Run the cases, short slots first, and the control beside them."""
    lengths = (2.0, 5.0, 10.0, 20.0) if options.quick else (2.0, 5.0, 10.0, 30.0, 60.0)
    control_case = Case(slot_s=5.0, step_s=0.1)
    with tempfile.TemporaryDirectory(prefix="slots-") as folder:
        (Path(folder) / "steps.py").write_text(_PROGRAM)
        runtime = ProcessRuntime(Path(folder) / "state")
        world = World(runtime, Path(folder))
        cases: list[Case] = []
        try:
            for slot_s in lengths:
                batch = [Case(slot_s=slot_s, step_s=step_s) for step_s in STEPS_S]
                work: list[Callable[[], None]] = [lambda case=case: world.train(case, quick=options.quick) for case in batch]
                if not cases:
                    work.append(lambda: world.fixed(control_case))
                _at_once(work)
                cases += batch
        finally:
            runtime.close()
    errors = [case.error for case in cases if case.error]
    assert not errors, errors[0]
    slots = [(case, slot) for case in cases for slot in case.slots]
    killed = sum(slot.killed for _, slot in slots)
    short = [case.share(slot) for case, slot in slots if not slot.killed and not case._within_one_step(slot, _longest(case))]
    missed = [(case, slot) for case, slot in slots if not case.holds(slot)]
    control_killed = sum(slot.killed for slot in control_case.slots)
    control = Control(
        name="as many steps in every slot as fitted into the first",
        value=min(control_case.share(slot) for slot in control_case.slots),
        failed=any(not control_case.holds(slot) for slot in control_case.slots),
        how=f"{control_killed} of {len(control_case.slots)} slots killed",
    )
    holds, why = judge(not missed, control)
    return Result(
        value=min(short, default=1.0),
        spread=None,
        unit="share",
        holds=holds,
        why=why,
        control=control,
        details={
            "slots": len(slots),
            "killed": killed,
            "missed": [_told(case, slot) for case, slot in missed],
            "cases": [
                {
                    "slot_s": case.slot_s,
                    "step_s": case.step_s,
                    "slots": len(case.slots),
                    "least_share": min(case.share(slot) for slot in case.slots),
                    "most_left_s": max(slot.left_s for slot in case.slots),
                    "longest_step_s": _longest(case),
                    "start_s": max(slot.start_s for slot in case.slots),
                    "repeated_steps": case.repeated,
                }
                for case in cases
            ],
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
        },
    )


def _longest(case: Case) -> float:
    return max(slot.longest_s for slot in case.slots)


def _told(case: Case, slot: Slot) -> dict[str, Any]:
    return {
        "slot_s": case.slot_s,
        "step_s": case.step_s,
        "share": case.share(slot),
        "left_s": slot.left_s,
        "killed": slot.killed,
    }


def _at_once(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class World:
    """Starts slots under the runtime, one after the other for each case."""

    def __init__(self, runtime: ProcessRuntime, folder: Path) -> None:
        self._runtime, self._folder, self._clock = runtime, folder, SystemClock()
        self._numbers = itertools.count()

    def train(self, case: Case, *, quick: bool) -> None:
        """Run the case's slots. What goes wrong is left in `case.error`: this is a thread."""
        try:
            follow_s = 10.0 if quick else 20.0
            self._train(case, slots=math.ceil(follow_s / case.slot_s) if case.slot_s <= 10 else 1 if quick else 2)
        except Exception as error:
            case.error = f"slots of {case.slot_s:g} s, steps of {case.step_s:g} s: {type(error).__name__}: {error}"

    def _train(self, case: Case, *, slots: int) -> None:
        stage = self._folder / f"stage-{case.slot_s:g}-{case.step_s:g}"
        spec = train.TrainSpec(
            program="steps.py:Steps",
            folder=str(self._folder),
            options={"step_s": case.step_s},
            shards=SHARDS,
            max_rounds=1_000_000,
            evaluate_every=1_000_000,
        )
        train.write_spec(stage, spec)
        train.publish_event(stage, train.start_event(1))
        events, done, steps = stage / "store" / "events", set(), 0
        while len(case.slots) < slots:
            event = min(set(events.glob("[!.]*.json")) - done, key=lambda path: path.stat().st_mtime_ns)
            argv = (sys.executable, "-m", "tenure.train.worker")
            end, slot, seen = self._slot(case, argv, TENURE_RUN_DIR=str(stage), TENURE_EVENT_FILE=str(event), TENURE_WORKER="0")
            case.slots.append(slot)
            steps += seen
            if slot.killed:
                continue  # the same event again, as the broker does
            if "its slot is too short" in str((end.result or {}).get("error")):
                break  # true, or the training would have gone on: a start and a step take longer than the slot
            assert end.kind is ExitKind.COMPLETED, f"{end.kind}: {end.witness}\n{end.log_tail}"
            assert (end.result or {}).get("state") == "continue", end.result
            done.add(event)
        case.repeated = steps - _shards_published(stage / "store")
        assert case.repeated >= 0, f"{-case.repeated} shards in the store that nobody computed"

    def fixed(self, case: Case) -> None:
        """Run the control: the first slot counts its steps, the others do as many."""
        count = self._folder / "count"
        argv = (sys.executable, "-c", _FIXED, str(count), str(case.step_s), str(case.slot_s))
        for _ in range(5):
            _, slot, _ = self._slot(case, argv, STEPS_FOLDER=str(self._folder))
            if count.exists() and slot.used_s:
                case.slots.append(slot)
        del case.slots[0]  # it was the one that counted

    def _slot(self, case: Case, argv: tuple[str, ...], **env: str) -> tuple[Exit, Slot, int]:
        name = f"slots-{os.getpid()}-{next(self._numbers)}"
        worker = self._folder / name
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        spec = StartSpec(
            lease_id=name,
            fence=1,
            attempt=1,
            argv=argv,
            env={
                **env,
                **threads,
                "PYTHONPATH": str(ROOT / "src"),
                "PATH": os.environ["PATH"],
                "TENURE_WORKER_DIR": str(worker),
                "TENURE_LEASE_FILE": str(worker / "lease.json"),
                "TENURE_FENCE": name.rpartition("-")[2],
            },
            workdir=str(worker),
            worker_dir=str(worker),
            log_path=f"{worker}.log",
            envelope=Envelope(cpus=1.0, memory_bytes=256 << 20),
            deadline_boot_s=self._clock.boot_s() + case.slot_s,
            boot_id=self._clock.boot_id(),
            grace_s=0.0,
        )
        ordered_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        handle = self._runtime.start(spec)
        end = self._runtime.wait(handle, case.slot_s + 30)
        assert end is not None, "a slot outlived its deadline by 30 s"
        log = worker / "steps"
        lines = log.read_text().splitlines() if log.exists() else []
        steps = [(float(began), float(ended)) for began, ended in map(str.split, lines)]
        self._runtime.forget(name)
        first, last = (steps[0][0], steps[-1][1]) if steps else (spec.deadline_boot_s, spec.deadline_boot_s)
        slot = Slot(
            killed=end.kind is ExitKind.OUT_OF_TIME,
            start_s=first - ordered_s,
            used_s=last - first,
            left_s=spec.deadline_boot_s - last,
            longest_s=max((ended - began for began, ended in steps), default=0.0),
        )
        return end, slot, len(steps)


def _shards_published(root: Path) -> int:
    """Return how many shards' gradients came into the store: all of the summed rounds, and what the next one has of nodes."""
    store = Store(root, worker=1)
    finished = store.newest_sum() + 1
    return finished * SHARDS + sum(last - first for first, last in store.pairs("nodes", finished))
