"""What watching costs: 8 processes watched at 10 Hz among 300 others.

World: 300 processes asleep, and 8 more, each the root of a tree of its own: one burns CPU, one holds 64 MiB, six sleep. All are
children of one helper process and are ended by it. The watcher runs in the benchmark's process.
Measured: CPU time (user + system, CLOCK_THREAD_CPUTIME_ID) of the watching thread over the wall time it watched, as a share of
one core; opening the samplers counts. 5 repeats of 6 s (--quick: 3 of 3 s), median and interquartile range.
Checked in every repeat before a figure counts: at least 300 others exist; every party got at least 80 % of its readings; the
CPU seen of the burner is within 10 % + 0.05 s of the count of the scheduler (/proc/<pid>/schedstat); the holder shows 64 to
96 MiB; sleepers show less than 0.05 cores.
Control: the same readings by a full scan with psutil.process_iter, parents resolved for the whole machine, in the same
interleaved rounds: it must miss the bar.
Not counted: interpreter start, the processes watched.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from tenure.meter.sample import ProcessTreeSampler
from tenure.meter.watch import Watcher, WatchSummary

NAME = "meter_overhead"
BAR = "8 processes watched among 300 others at 10 Hz cost at most 0.01 of one core"
LIMIT_CORES = 0.01
PERIOD_S = 0.1
OTHERS = 300
WATCHED = 8
HELD_BYTES = 64 << 20

_HELPER = f"""
import os, signal, sys, time
others, watched, held = {OTHERS}, {WATCHED}, {HELD_BYTES}
pids = []
def burn():
    while True:
        end = time.process_time() + 0.02
        while time.process_time() < end: pass
        time.sleep(0.08)
def hold():
    data = bytearray(b'x') * held
    signal.pause()
def child(body):
    pid = os.fork()
    if pid == 0:
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the helper
        os.close(0)
        try: body()
        finally: os._exit(0)
    pids.append(pid)
    return pid
named = [child(burn), child(hold)] + [child(signal.pause) for _ in range(watched - 2)]
for _ in range(others): child(signal.pause)
print(*named, flush=True)
sys.stdin.read()
for pid in pids: os.kill(pid, signal.SIGKILL)
for pid in pids: os.waitpid(pid, 0)
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """One repeat: cost of the watching, and what was seen."""

    cores: float
    wall_s: float


def run(options: Options) -> Result:
    """Measure the watcher and the naive scan in interleaved rounds."""
    repeats, span_s = (3, 3.0) if options.quick else (5, 6.0)
    with world() as pids:
        contenders: dict[str, Callable[[], Reading]] = {
            "watcher": lambda: watch(pids, span_s),
            "psutil scan": lambda: scan(pids, span_s / 2),
        }
        readings = interleaved(contenders, repeats, seed=options.seed)
    cores = {name: [reading.cores for reading in found] for name, found in readings.items()}
    value, naive = median(cores["watcher"]), median(cores["psutil scan"])
    control = Control(name="psutil scan", value=naive, failed=naive > LIMIT_CORES, how=f"bar {LIMIT_CORES} of one core")
    holds, why = judge(value <= LIMIT_CORES, control)
    return Result(
        value=value,
        spread=spread(cores["watcher"]),
        unit="cores",
        holds=holds,
        why=why,
        reference={"name": "psutil scan", "value": naive, "spread": spread(cores["psutil scan"]), "unit": "cores"},
        control=control,
        details={
            "cores_each": cores["watcher"],
            "watched": WATCHED,
            "others": OTHERS,
            "period_s": PERIOD_S,
            "wall_s_each": [reading.wall_s for reading in readings["watcher"]],
        },
    )


@contextmanager
def world() -> Iterator[list[int]]:
    """Start the helper; give the pids of the 8, burner first, holder second. Everything ends with the block."""
    helper = subprocess.Popen([sys.executable, "-c", _HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert helper.stdin is not None
    assert helper.stdout is not None
    try:
        pids = [int(word) for word in helper.stdout.readline().split()]
        assert len(pids) == WATCHED, f"the helper started {len(pids)} processes to watch"
        children = len(psutil.Process(helper.pid).children())
        assert children >= OTHERS + WATCHED, f"only {children} processes exist"
        wait_held(pids[1])
        yield pids
    finally:
        helper.stdin.close()
        try:
            helper.wait(20)
        finally:
            helper.kill()
            helper.wait()
            helper.stdout.close()


def wait_held(pid: int) -> None:
    """Wait until the holder has touched its memory, 20 s at most."""
    end_s = time.monotonic() + 20
    while psutil.Process(pid).memory_info().rss < HELD_BYTES:
        assert time.monotonic() < end_s, "the holder did not fill its memory"
        time.sleep(0.02)


def watch(pids: list[int], span_s: float) -> Reading:
    """Watch for span_s; check what was seen; give the cost of the watching thread, opening the samplers included."""
    begun_s, opening = time.monotonic(), time.thread_time()
    watcher = Watcher({str(pid): ProcessTreeSampler(pid) for pid in pids}, period_s=PERIOD_S)
    opened_s = time.thread_time() - opening
    burnt = process_cpu_s(pids[0])
    with watcher:
        threading.Event().wait(span_s)
    burnt = process_cpu_s(pids[0]) - burnt
    wall_s = time.monotonic() - begun_s
    check([watcher.summary(str(pid)) for pid in pids], burnt, span_s)
    return Reading((watcher.overhead_s + opened_s) / wall_s, wall_s)


def check(seen: list[WatchSummary], burnt_s: float, span_s: float) -> None:
    """Assert that the readings are right."""
    burner, holder, *sleepers = seen
    for summary in seen:
        assert not summary.lost, summary.lost
        assert summary.samples >= 0.8 * span_s / PERIOD_S, f"only {summary.samples} readings in {span_s} s"
    assert burnt_s > 0.02 * span_s, f"the burner got only {burnt_s} s of CPU"
    assert abs(burner.cpu_s - burnt_s) <= 0.1 * burnt_s + 0.05, f"burner: seen {burner.cpu_s} s, truly {burnt_s} s"
    assert HELD_BYTES <= holder.memory_max_bytes <= 1.5 * HELD_BYTES, f"holder: seen {holder.memory_max_bytes} bytes"
    assert all(summary.cpu_cores_mean < 0.05 for summary in sleepers), "a sleeper seems to run"


def process_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a single-threaded process by the scheduler's own count: not by what is tested here."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def scan(pids: list[int], span_s: float) -> Reading:
    """Do the naive thing at the same rate: list every process with parent, CPU and memory, then sum up the trees."""
    begun_s, cpu = time.monotonic(), time.thread_time()
    due_s = begun_s
    while time.monotonic() - begun_s < span_s:
        table = {p.info["pid"]: p.info for p in psutil.process_iter(["pid", "ppid", "cpu_times", "memory_info"])}
        seen = {
            pid: sum(info["memory_info"].rss for info in table.values() if pid in (info["pid"], info["ppid"])) for pid in pids
        }
        assert seen[pids[1]] >= HELD_BYTES
        due_s = max(due_s + PERIOD_S, time.monotonic())
        time.sleep(max(0.0, due_s - time.monotonic()))
    wall_s = time.monotonic() - begun_s
    return Reading((time.thread_time() - cpu) / wall_s, wall_s)
