"""Training through a shared folder beside torch DDP: samples per CPU-second and samples per second, two workers.

World: `programs/cifar_conv.py` with batch normalisation (262,026 parameters), CIFAR-10 training images of the data folder
decoded once to uint8 arrays (25,000; --quick: 5,000), SGD, rate 0.02, momentum 0.9, cross entropy. A step is 512 examples:
8 parts of 64, accumulated, then one update. Two workers take 4 parts each. One thread per process in every contender.
Contenders, each a fresh pair of processes, in interleaved rounds (5; --quick: 2) whose order is shuffled by the seed:
- tenure: two `python -m tenure.train.worker`, started by this module as a broker would (no broker, no lease: their costs are
  other benchmarks'), `shards = 8, batch = 512, same_result = false`, exchange in its fast mode, the folder on this machine;
- ddp: two processes, torch DistributedDataParallel over gloo on the loopback, `no_sync` for the first three of four parts;
- ddp with memory kept: the same with malloc's thresholds as Tenure sets them in its workers, told beside the bars: what is left
  of the difference is not malloc's;
- plain: two processes at once that know nothing of each other, each a loop over its own 4 parts and its own update.
All read the same memory-mapped arrays, permuted anew for each pass, convert a part with the same rule (uint8 / 255, channels
first, their order in memory kept) and call the same module and torch.optim.SGD. DDP and plain take the examples of a part
by one index, as Tenure does.
Counted: 24 steps (--quick: 6) after 4 to warm up: wall time from the end of the 4th step to the end of the last, and in the
same span the CPU time of both processes, all threads. Start-up, imports, the last checkpoint and evaluation are not counted:
the stage evaluates in its last round only and stops one step after the span. Tenure's processes are watched from outside
(the round's record for the time, /proc/PID/stat for CPU, 10 ms ticks); the others tell their own clocks.
Value: the median over rounds of Tenure's samples per CPU-second over DDP's in the same round. Also, by medians of ratios in
the same round: samples/s over DDP's, and samples/s over plain's.
Bars: >= 1.0, >= 0.95 and >= 0.9. All must hold.
Checked before a figure counts: every process ended well; every contender made the steps it claims; the mean training loss
of the last steps is below the first step's in all, and Tenure's is within a tenth of DDP's (both follow the same rule).
Control: the same stage cut into 256 shards of 2 examples, which must miss the samples per CPU-second: accumulation that is
too fine pays for calls and exchange. Run once a round, as the others.
Not counted: accuracy (train_communication), two machines (the folder and the loopback are both local here).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cifar import write_arrays
from benchmarks.harness import ROOT, Control, Options, Result, interleaved, judge, median, spread
from tenure.train.spec import TrainSpec, command, publish_event, start_event, write_spec
from tenure.train.store import round_name

NAME = "train_vs_ddp"
BAR = "two workers >= 1.0 x torch DDP in samples per CPU-second, >= 0.95 x in samples/s, >= 0.9 x two plain processes"
BATCH, SHARDS, WARM_UP = 512, 8, 4
FINE_SHARDS = 256
RATE, MOMENTUM = 0.02, 0.9
PATIENCE_S = 240.0
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Span:
    """What the counted steps of one contender took."""

    samples_per_s: float
    samples_per_cpu_s: float
    losses: tuple[float, ...]
    """Mean loss of each step, the warm-up included."""


def run(options: Options) -> Result:
    """Measure Tenure, DDP, two plain processes and the control in interleaved rounds."""
    source = options.need_data("images", "cifar10")
    steps, repeats = (6, 2) if options.quick else (24, 5)
    with tempfile.TemporaryDirectory() as folder:
        arrays = write_arrays(source, Path(folder) / "arrays", train_per_class=500 if options.quick else 2500)
        world = World(Path(folder), arrays, steps, options.seed)
        contenders: dict[str, Callable[[], Span]] = {
            "tenure": lambda: world.tenure(SHARDS),
            "ddp": lambda: world.torch("ddp"),
            "ddp_memory_kept": lambda: world.torch("ddp", keep_memory=True),
            "plain": lambda: world.torch("plain"),
            "fine": lambda: world.tenure(FINE_SHARDS),
        }
        found = interleaved(contenders, repeats, seed=options.seed)
    check(found, WARM_UP + steps)
    cpu = ratios(found, "tenure", "ddp", "samples_per_cpu_s")
    speed = ratios(found, "tenure", "ddp", "samples_per_s")
    plain = ratios(found, "tenure", "plain", "samples_per_s")
    fine = median(ratios(found, "fine", "ddp", "samples_per_cpu_s"))
    how = f"{FINE_SHARDS} shards of {BATCH // FINE_SHARDS} examples: {fine:.2f} x DDP's samples per CPU-second"
    control = Control(name="accumulation that is too fine", value=fine, failed=fine < 1.0, how=how)
    holds, why = judge(median(cpu) >= 1.0 and median(speed) >= 0.95 and median(plain) >= 0.9, control)
    return Result(
        value=median(cpu),
        spread=spread(cpu),
        unit="x DDP's samples per CPU-second",
        holds=holds,
        why=why,
        reference={"name": "torch DDP over gloo", "value": rate(found["ddp"], "samples_per_cpu_s"), "unit": "samples/CPU-s"},
        control=control,
        details={
            "samples_per_s_over_ddp": median(speed),
            "samples_per_s_over_ddp_spread": spread(speed),
            "samples_per_cpu_s_over_ddp_memory_kept": median(ratios(found, "tenure", "ddp_memory_kept", "samples_per_cpu_s")),
            "samples_per_s_over_ddp_memory_kept": median(ratios(found, "tenure", "ddp_memory_kept", "samples_per_s")),
            "samples_per_s_over_plain": median(plain),
            "samples_per_s_over_plain_spread": spread(plain),
            "samples_per_cpu_s_over_plain": median(ratios(found, "tenure", "plain", "samples_per_cpu_s")),
            **{f"{name}_samples_per_s": rate(spans, "samples_per_s") for name, spans in found.items()},
            **{f"{name}_samples_per_cpu_s": rate(spans, "samples_per_cpu_s") for name, spans in found.items()},
            "steps": steps,
            "repeats": repeats,
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
        },
    )


def ratios(found: dict[str, list[Span]], name: str, other: str, figure: str) -> list[float]:
    """Return one contender's figure over another's, round by round."""
    return [getattr(a, figure) / getattr(b, figure) for a, b in zip(found[name], found[other], strict=True)]


def rate(spans: list[Span], figure: str) -> float:
    """Return the median of a figure."""
    return median([getattr(span, figure) for span in spans])


def check(found: dict[str, list[Span]], steps: int) -> None:
    """Assert that everybody made the steps, learned, and that Tenure learned as DDP did."""
    late = {}
    for name, spans in found.items():
        for span in spans:
            assert len(span.losses) >= steps, f"{name} made {len(span.losses)} of {steps} steps"
            late[name] = sum(span.losses[steps - 4 : steps]) / 4
            assert late[name] < span.losses[0], f"{name} did not learn: loss {span.losses[0]}, later {late[name]}"
    assert abs(late["tenure"] / late["ddp"] - 1) < 0.1, f"losses differ: {late}"


class World:
    """Starts the contenders, each as two fresh processes with one thread each."""

    def __init__(self, folder: Path, arrays: Path, steps: int, seed: int) -> None:
        self._folder, self._arrays, self._steps, self._seed = folder, arrays, steps, seed
        self._count = 0
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def tenure(self, shards: int) -> Span:
        """Train a stage with two workers, and watch its rounds and processes."""
        last = WARM_UP + self._steps
        stage_dir = self._fresh()
        options = {"optimizer": "sgd", "rate": RATE, "momentum": MOMENTUM}
        spec = TrainSpec(
            program="cifar_conv.py:Net",
            folder=str(ROOT / "benchmarks" / "programs"),
            inputs={"images": str(self._arrays)},
            options=options,
            shards=shards,
            batch=BATCH,
            seed=self._seed,
            max_rounds=last + 1,
            evaluate_every=last + 1,
            same_result=False,
        )
        write_spec(stage_dir, spec)
        publish_event(stage_dir, start_event(2))
        events = stage_dir / "store" / "events"
        live: dict[str, subprocess.Popen[bytes]] = {}
        marks: list[tuple[float, float]] = []
        until = time.monotonic() + PATIENCE_S
        try:
            while len(marks) < 2 or any(process.poll() is None for process in live.values()):
                assert time.monotonic() < until, f"the stage was not done within {PATIENCE_S} s"
                for path in events.glob("*.json") if len(live) < 2 else ():
                    if path.name not in live:
                        live[path.name] = self._worker(stage_dir, path)
                assert not any(process.poll() for process in live.values()), "a worker failed"
                if len(marks) < 2 and (stage_dir / "store" / round_name((WARM_UP, last)[len(marks)])).exists():
                    marks.append((time.perf_counter(), sum(cpu_s(process.pid) for process in live.values())))
                time.sleep(0.004)
        finally:
            end(live.values())
        paths = [stage_dir / "store" / round_name(number) for number in range(1, last + 1)]
        records = [json.loads(path.read_bytes())["data"] for path in paths]
        wall_s = records[-1]["at_s"] - records[WARM_UP - 1]["at_s"]
        samples = self._steps * BATCH
        return Span(samples / wall_s, samples / (marks[1][1] - marks[0][1]), tuple(record["loss"] for record in records))

    def torch(self, mode: str, *, keep_memory: bool = False) -> Span:
        """Train with two processes of `torch_pair`. keep_memory: malloc keeps what a step frees, as in Tenure's workers."""
        env = {**self._env, **(_KEEP_MEMORY if keep_memory else {})}
        folder = self._fresh()
        told = {"arrays": str(self._arrays), "seed": self._seed, "shard": BATCH // SHARDS, "parts": SHARDS // 2}
        told |= {"warm_up": WARM_UP, "steps": self._steps, "rate": RATE, "momentum": MOMENTUM}
        argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.programs.torch_pair", mode]
        pair = [
            subprocess.Popen([*argv, str(rank), str(folder), json.dumps(told)], env=env, cwd=ROOT, stdout=subprocess.PIPE)
            for rank in range(2)
        ]
        try:
            outs = [process.communicate(timeout=PATIENCE_S)[0] for process in pair]
        finally:
            end(pair)
        assert not any(process.returncode for process in pair), f"a process of {mode} failed"
        found: list[dict[str, Any]] = [json.loads(out.splitlines()[-1]) for out in outs]
        samples = self._steps * BATCH
        losses = tuple(sum(pair) / 2 for pair in zip(*(one["losses"] for one in found), strict=True))
        per_s = sum(samples / 2 / one["wall_s"] for one in found)
        return Span(per_s, samples / sum(one["cpu_s"] for one in found), losses)

    def _worker(self, stage_dir: Path, event: Path) -> subprocess.Popen[bytes]:
        worker = str(json.loads(event.read_bytes())["worker"])
        folder = stage_dir / "workers" / worker / "1"
        folder.mkdir(parents=True)
        env = {**self._env, "TENURE_RUN_DIR": str(stage_dir), "TENURE_WORKER_DIR": str(folder), "TENURE_WORKER": worker}
        env |= {"TENURE_EVENT_FILE": str(event), "TENURE_FENCE": "1"}
        with open(folder / "log", "wb") as log:
            return subprocess.Popen(command().argv, env=env, stderr=log)

    def _fresh(self) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return folder


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a live process, all threads, user and system (proc(5), stat fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def end(processes: Any) -> None:
    """Kill what still runs, and collect all."""
    for process in processes:
        process.kill()
        process.wait()
