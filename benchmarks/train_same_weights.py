"""Whether the weights are the same to the last bit for any number of workers and any deaths, and what that costs one worker.

Hashes: SHA-256 over the result's arrays, in the order of their names. Reference: the undisturbed run of one worker.
Simulated: 500 kill schedules (--quick: 60), their W in turn 1, 2, 3, 5, 8, 16. A NumPy network (8 inputs, 16 hidden, 3 classes,
momentum in the weights; 16 shards, 6 rounds, batch 96, noise from the shard's generator) is trained by the real handler in the
explorer (`tests/train/explorer.py`): each process is killed after an exponentially distributed number of file operations (mean
30, 100 or 300), before or after one or with half a file written; it is started again with the same event; half of
the schedules have slots of 4 s, a third zombies, a third stalls. Adding, gathering, checkpoints and evaluation are done by the
processes that are killed: counted is in how many schedules a process died at an operation on a slice of the sum, and on a
checkpoint.
Real: 12 runs (--quick: 2, W = 2 and 3), W in turn as above, of ``python -m tenure.train.worker`` processes (the same program,
which pauses 50 ms in each gradient, 12 rounds, a real folder). One at a time is ended by SIGKILL, 0.3 s apart in the mean,
until 2 W + 2 were killed or the run is over, and started again with the same event under a higher fence.
Cost: one worker, the handler in a process of its own with a store in the default place for temporary files, against a plain
loop in another: gradient of the whole batch in one call, update, nothing else; one BLAS thread both; 8 shards; 20 rounds
(--quick: 4) after 2 that warm up; 7 interleaved repeats (--quick: 2) in new processes; the mean round of each, the median over
repeats of the ratio (and of CPU time's, which is told, not judged). Programs, 32 samples per shard: a network 784-512-512-10
in NumPy; the conv net of `train_vs_ddp` without batch normalisation (whose statistics are of a shard, so that a plain loop
makes other updates) on CIFAR-10, when torch and the data are there: else it says why not. Told too, in full runs: the network
at 128 and 512 samples per shard. The value is the larger ratio at 32 of those measured.
Checked: the largest number of both contenders' weights agrees within 1e-3 (their bits differ: another order of adding).
Bars: all hashes equal; cost <= 1.3 for each program.
Control: a plain loop that adds each worker's shards in order and then the workers' sums: its weights after 6 rounds must differ
between W = 1 and 3.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
from tests.train.explorer import ROOT as STORE
from tests.train.explorer import Run, Schedule
from tests.train.memory_files import MemoryFiles

from benchmarks.harness import ROOT, Control, Options, Result, Skip, interleaved, judge, median, spread
from benchmarks.programs.small_net import Net
from tenure.train import tree
from tenure.train.events import Start
from tenure.train.handler import Context, handle
from tenure.train.programs import Arrays, Program, load_program
from tenure.train.records import read_arrays
from tenure.train.rounds import Rounds
from tenure.train.spec import TrainSpec, command, publish_event, start_event, write_spec
from tenure.train.store import Store

NAME = "train_same_weights"
BAR = "SHA-256 of weights equal for W in {1, 2, 3, 5, 8, 16} under 500 kill schedules; one worker <= 1.3 x a plain loop"
WORKERS = (1, 2, 3, 5, 8, 16)
SHARDS, ROUNDS, BATCH = 16, 6, 96
COST_SHARDS = 8
LIMIT = 1.3
PROGRAMS = ROOT / "benchmarks" / "programs"
BOUND_S = 300.0


def run(options: Options) -> Result:
    """Kill in simulation, kill real processes, time one worker beside a plain loop, show that other orders drift."""
    began = time.monotonic()
    wanted = _simulate(Schedule(seed=0, workers=1, shards=SHARDS, rounds=ROUNDS))["sha256"]
    killed = _killed(wanted, 60 if options.quick else 500, options.seed)
    real = _real(2 if options.quick else 12, options.seed)
    cost, further = _cost(options)
    drift = max(_drift(workers) for workers in (2, 3))
    control = Control(name="each worker's shards added first", value=drift, failed=drift > 0, how="largest relative drift")
    ratios = {name: median(found) for name, found in cost.items()}
    judged = {name: ratio for name, ratio in ratios.items() if name.endswith(" 32")}
    worst = max(judged, key=lambda name: judged[name])
    differ = [*killed["differ"], *real["differ"]]
    holds, why = judge(not differ and ratios[worst] <= LIMIT, control)
    missed = [f"{len(differ)} runs gave other weights"] if differ else []
    missed += [f"{name} takes {ratio:.2f} x a plain loop" for name, ratio in judged.items() if ratio > LIMIT]
    return Result(
        value=ratios[worst],
        spread=spread(cost[worst]),
        unit="x a plain loop",
        holds=holds,
        why=why and f"{why}: {'; '.join(missed)}",
        reference={"sha256": wanted},
        control=control,
        details={
            "cost_ratios": ratios,
            "cost_spread": {name: spread(found) for name, found in cost.items()},
            "cost_further": further,
            "simulated": killed,
            "real": real,
            "wall_s": round(time.monotonic() - began, 1),
            "load_1min": os.getloadavg()[0],
        },
    )


# --- simulated deaths -------------------------------------------------------------------------------------------------


def _schedule(number: int, seed: int) -> Schedule:
    rng = random.Random(f"same weights {seed} {number}")
    return Schedule(
        seed=number + 1000 * seed,
        workers=WORKERS[number % len(WORKERS)],
        shards=SHARDS,
        rounds=ROUNDS,
        policy=rng.choice(("walk", "pct")),
        exchange=rng.choice(("sharded", "sharded", "central")),
        kill_every=rng.choice((30, 100, 300)),
        stall_every=rng.choice((0, 0, 400)),
        zombies=rng.choice((0, 0, 0.3)),
        slot_s=rng.choice((float("inf"), 4.0)),
    )


def _simulate(schedule: Schedule) -> dict[str, Any]:
    """Run one schedule; return the hash of its weights, and what died where."""
    simulated = Run(schedule, Net(), max_steps=400_000)
    simulated.spec = dataclasses.replace(simulated.spec, batch=BATCH)
    simulated.go()
    assert not [text for text in simulated.failures if not text.startswith("StaleFence")], simulated.failures
    _, weights = read_arrays(STORE / "result", MemoryFiles(simulated.disk))
    return {
        "sha256": _sha256(weights),
        "workers": schedule.workers,
        "deaths": simulated.deaths,
        "at_a_sum": any(f"{STORE}/sums/" in path for path in simulated.died_at),
        "at_a_checkpoint": any(f"{STORE}/weights/" in path for path in simulated.died_at),
        "schedule": repr(schedule),
    }


def _killed(wanted: str, schedules: int, seed: int) -> dict[str, Any]:
    found: Counter[str] = Counter()
    by_workers: Counter[int] = Counter()
    differ: list[str] = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
        plans = [_schedule(number, seed) for number in range(schedules)]
        for number, each in enumerate(pool.imap_unordered(_simulate, plans), 1):
            by_workers[each["workers"]] += 1
            found.update({name: each[name] for name in ("deaths", "at_a_sum", "at_a_checkpoint")})
            if each["sha256"] != wanted:
                differ.append(each["schedule"])
            if number % 50 == 0:
                print(f"{number} of {schedules} schedules, {found['deaths']} deaths, {len(differ)} differ", flush=True)
    assert found["at_a_sum"], "nobody died while adding"
    assert found["at_a_checkpoint"], "nobody died while writing a checkpoint"
    return {
        "schedules": schedules,
        "deaths": found["deaths"],
        "schedules_with_a_death_at_a_sum": found["at_a_sum"],
        "schedules_with_a_death_at_a_checkpoint": found["at_a_checkpoint"],
        "schedules_by_workers": {str(workers): count for workers, count in sorted(by_workers.items())},
        "differ": differ,
    }


# --- real deaths ------------------------------------------------------------------------------------------------------


def _real(runs: int, seed: int) -> dict[str, Any]:
    order = (2, 3) if runs == 2 else [WORKERS[number % len(WORKERS)] for number in range(runs)]
    with tempfile.TemporaryDirectory() as folder:
        wanted, _ = _gang(Path(folder), 1, None)
    kills, differ = [], []
    for number, workers in enumerate(order):
        with tempfile.TemporaryDirectory() as folder:
            found, killed = _gang(Path(folder), workers, random.Random(f"real {seed} {number}"))
        kills.append(killed)
        if found != wanted:
            differ.append(f"real run {number} of {workers} workers")
        print(
            f"{workers} real workers, {killed} killed: the weights are {'the same' if found == wanted else 'OTHERS'}",
            flush=True,
        )
    assert sum(kills), "no real worker was killed"
    return {"runs": len(order), "workers": list(order), "sigkills": kills, "differ": differ}


def _gang(folder: Path, workers: int, kills: random.Random | None) -> tuple[str, int]:
    """Run real worker processes to their end, playing the broker; return the hash of the weights and how many were killed."""
    spec = TrainSpec(
        program="small_net.py:Net",
        folder=str(PROGRAMS),
        options={"pause_s": 0.05},
        shards=SHARDS,
        max_rounds=2 * ROUNDS,
        batch=BATCH,
        claim_period_s=2.0,
    )
    write_spec(folder, spec)
    publish_event(folder, start_event(workers))
    queues: dict[int, deque[Path]] = {worker: deque() for worker in range(workers)}
    live: dict[int, subprocess.Popen[bytes]] = {}
    known: set[Path] = set()
    fence = killed = 0
    until_s = time.monotonic() + BOUND_S
    kill_at_s = time.monotonic() + (kills.expovariate(1 / 0.3) if kills else BOUND_S)
    try:
        while live or any(queues.values()) or not known:
            assert time.monotonic() < until_s, f"{workers} real workers were not done within {BOUND_S:g} s"
            for path in sorted(set((folder / "store" / "events").glob("*.json")) - known):
                known.add(path)
                queues[json.loads(path.read_bytes())["worker"]].append(path)
            for worker, queue in queues.items():
                if worker in live and (status := live[worker].poll()) is not None:
                    assert status in (0, -signal.SIGKILL), f"worker {worker} ended with {status}"
                    if status == 0:
                        queue.popleft()
                    del live[worker]
                if worker not in live and queue:
                    fence += 1
                    live[worker] = _spawn(folder, worker, queue[0], fence)
            if kills and live and killed < 2 * workers + 2 and time.monotonic() >= kill_at_s:
                kills.choice(sorted(live.items()))[1].kill()
                killed += 1
                kill_at_s = time.monotonic() + kills.expovariate(1 / 0.3)
            time.sleep(0.01)
    finally:
        for process in live.values():
            process.kill()
            process.wait()
    _, weights = read_arrays(folder / "store" / "result")
    return _sha256(weights), killed


def _spawn(folder: Path, worker: int, event: Path, fence: int) -> subprocess.Popen[bytes]:
    mine = folder / "workers" / f"{worker}-{fence}"
    mine.mkdir(parents=True)
    env = _one_thread() | {
        "TENURE_RUN_DIR": str(folder),
        "TENURE_WORKER_DIR": str(mine),
        "TENURE_WORKER": str(worker),
        "TENURE_EVENT_FILE": str(event),
        "TENURE_FENCE": str(fence),
    }
    return subprocess.Popen(command().argv, env=env, stderr=subprocess.DEVNULL)


# --- the cost of one worker -------------------------------------------------------------------------------------------


def _cost(options: Options) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return program -> ratios of one worker's round to a plain loop's; and further figures, or why it was not measured."""
    rounds, repeats = (4, 2) if options.quick else (20, 7)
    found: dict[str, list[float]] = {}
    further: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("numpy 32", "conv 32") if options.quick else ("numpy 32", "conv 32", "numpy 128", "numpy 512"):
            try:
                told = _numpy_program() if name.startswith("numpy") else _conv_program(options, Path(folder))
            except Skip as reason:
                further[name] = f"not measured: {reason}"
                print(f"{name}: not measured: {reason}", flush=True)
                continue
            told |= {"max_rounds": rounds + 2, "per_shard": int(name.split()[1])}
            contenders = {way: functools.partial(_child, way, told) for way in ("worker", "plain")}
            timed = interleaved(contenders, repeats, seed=options.seed)
            pairs = list(zip(timed["worker"], timed["plain"], strict=True))
            apart = max(abs(worker["largest"] - plain["largest"]) / plain["largest"] for worker, plain in pairs)
            assert apart <= 1e-3, f"{name}: the contenders made different updates: {pairs[0]}"
            found[name], cpu = ([w[part] / p[part] for w, p in pairs] for part in ("round_s", "round_cpu_s"))
            plain_s = median([plain["round_s"] for plain in timed["plain"]])
            further[name] = {"cpu_ratio": median(cpu), "cpu_ratio_spread": spread(cpu), "plain_round_s": plain_s}
            print(f"{name}: one worker takes {median(found[name]):.3f} x a plain loop, {further[name]}", flush=True)
    return found, further


def _numpy_program() -> dict[str, Any]:
    options = {"sizes": "784-512-512-10", "examples": 6000, "rate": 0.01, "noise": 0.0}
    return {"program": "small_net.py:Net", "options": options, "inputs": {}}


def _conv_program(options: Options, folder: Path) -> dict[str, Any]:
    try:
        import torch  # noqa: F401  # heavy, and optional
    except ImportError:
        raise Skip("torch is not installed: pip install 'tenure[torch]'") from None
    from benchmarks.cifar import write_arrays

    images = write_arrays(options.need_data("images", "cifar10"), folder / "arrays", train_per_class=100, test_per_class=10)
    chosen = {"norm": False, "optimizer": "sgd", "rate": 0.02}
    return {"program": "cifar_conv.py:Net", "options": chosen, "inputs": {"images": str(images)}}


def _child(way: str, told: dict[str, Any]) -> dict[str, float]:
    """Run one contender in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.train_same_weights", way, json.dumps(told)]
    done = subprocess.run(argv, cwd=ROOT, env=_one_thread(), capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


class _Timed:
    """A program that notes when each of its updates was done, and the weights then."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.times_s: list[tuple[float, float]] = []
        """By the clock, and of CPU."""
        self.weights: Arrays = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """See Program."""
        self.weights = self._program.update(weights, summed, n, round_)
        self.times_s.append((time.perf_counter(), time.process_time()))
        return self.weights


def _contend(way: str, told: dict[str, Any]) -> dict[str, float]:
    """Train in this process, by a worker or a plain loop; return seconds per round after the first two."""
    batch = COST_SHARDS * told.pop("per_shard")
    spec = TrainSpec(folder=str(PROGRAMS), shards=COST_SHARDS, batch=batch, evaluate_every=10_000, **told)
    program: Any = _Timed(load_program(spec.program, PROGRAMS, spec.options))
    if way == "worker":
        with tempfile.TemporaryDirectory() as folder:
            context = Context(spec=spec, store=Store(Path(folder)), program=lambda: program, invoke=lambda event: None)
            assert handle(Start(workers=1), context).state == "done"
    else:
        rounds = Rounds(spec=dataclasses.replace(spec, shards=1), program=program)  # one shard: the whole batch
        weights = rounds.build()
        for round_ in range(spec.max_rounds):
            summed, _, n, _ = rounds.gradient(round_, 0, weights)
            weights = program.update(weights, summed, n, round_)
    begun, ended, timed = program.times_s[1], program.times_s[-1], len(program.times_s) - 2
    assert timed == spec.max_rounds - 2, f"{timed} rounds were timed, not {spec.max_rounds - 2}"
    round_s, round_cpu_s = ((after - before) / timed for before, after in zip(begun, ended, strict=True))
    largest = max(float(np.abs(values).max()) for values in program.weights.values() if values.size)
    return {"round_s": round_s, "round_cpu_s": round_cpu_s, "largest": largest}


# --- the control ------------------------------------------------------------------------------------------------------


def _drift(workers: int) -> float:
    """Return how far weights are from one worker's, relative to the largest, when each worker's shards are added first."""
    one, several = _by_worker(1), _by_worker(workers)
    largest = max(float(np.abs(values).max()) for values in one.values())
    return max(float(np.abs(values - several[name]).max()) for name, values in one.items()) / largest


def _by_worker(workers: int) -> Arrays:
    rounds = Rounds(spec=TrainSpec(program="small_net.py:Net", folder="/", shards=SHARDS, batch=BATCH, seed=5), program=Net())
    weights = rounds.build()
    for round_ in range(ROUNDS):
        total: Arrays = {}
        for worker in range(workers):
            own: Arrays = {}
            for shard in range(*tree.part(worker, workers, SHARDS)):
                _add(own, rounds.gradient(round_, shard, weights)[0])
            _add(total, own)
        weights = rounds.program.update(weights, total, BATCH, round_)
    return weights


def _add(total: Arrays, more: Arrays) -> None:
    for name, values in more.items():
        total[name] = total[name] + values if name in total else values


def _sha256(weights: Arrays) -> str:
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()


def _one_thread() -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}


if __name__ == "__main__":
    print(json.dumps(_contend(sys.argv[1], json.loads(sys.argv[2]))))
