"""A load generator's percentiles while the server stands still one second in every four, beside the analytic truth.

World: `vision.same` (4 KB each way) served by `python -m tenure.serve`; all its processes are frozen by SIGSTOP for 1 s and
go on by SIGCONT for 3 s, again and again; the moments at which the signals were sent are kept. Our generator, a process of its
own (`tenure bench load`), asks for 100 requests/s over HTTP and over gRPC, arrivals constant and Poisson, for 12 s (--quick:
constant only, 8 s, one round; else three).
Truth, per due request: a request due at t inside a freeze that ends at b is answered at b, any other at once; to both comes
what the server takes when nothing is frozen (median service time of the same run's requests that no freeze touched, about a
millisecond). p50, p90, p99 by nearest rank over all requests due after the warm-up cut, none left out.
Bar: p50, p90 and p99 of every run within max(5 %, 5 ms) of the truth. Value: the largest error, as share of what is allowed.
Also, all must hold:
- INVALID whenever the generator was the bottleneck, planted: 2 connections for a server that is frozen; a rate that no single
  core can send; the generator itself frozen for 0.4 s of 2. Each over both doors (--quick: one).
- No false alarm in 50 (--quick: 10) runs of 1 s: 100 to 500 requests/s, both doors, a healthy server and one that is
  frozen 0.3 s of the second.
Checked before a figure counts: every due request is in the record once, none is answered before it was issued, all were
answered; the truth's p99 lies above 800 ms, so that there was something to hide.
Control: the same schedule sent by four threads that each wait for their answer and time it from their own send, which is what
perf_analyzer does by default: must miss the truth's p99.
Reference: perf_analyzer, --sync and --async, at the same rate and against the same freezes (told where it is installed;
--quick: left out).
Not counted: servers on other machines, freezes shorter than the issue delay.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import vision
from benchmarks.harness import ROOT, Control, Options, Result, Skip, judge, median, spread
from benchmarks.loading import (
    Freezer,
    Loaded,
    begin,
    begun,
    command,
    finish,
    frozen_for,
    load,
    near_freeze,
    still_to_freeze_s,
)
from benchmarks.peers.processes import Served, together
from benchmarks.serving import OURS, PATIENCE_S, Dialogue, serve, tool
from tenure.errors import TenureError
from tenure.serve.client import Model
from tenure.serve.load.records import Outcome
from tenure.serve.load.schedule import constant

NAME = "load_frozen_server"
BAR = "p50, p90, p99 within max(5 %, 5 ms) of the truth; INVALID whenever planted; no false alarm in 50"
DOORS = ("http", "grpc")
RATE = 100
FROZEN_S, RUNNING_S = 1.0, 3.0
WARM_UP_S = 0.5
PERCENTS = (50, 90, 99)
SHARE, LEAST_S = 0.05, 5e-3
TIMEOUT_S = 30
DRAINED_S = 0.5
"""After a freeze, requests count as touched by it for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Measured and true percentiles of one run, seconds, in the order of PERCENTS."""

    found_s: tuple[float, ...]
    true_s: tuple[float, ...]

    @property
    def error(self) -> float:
        """The largest difference, as share of what is allowed."""
        return max(abs(f - t) / max(SHARE * t, LEAST_S) for f, t in zip(self.found_s, self.true_s, strict=True))


def run(options: Options) -> Result:
    """Freeze, measure, compare."""
    rounds, seconds, alarms = (1, 8.0, 10) if options.quick else (3, 12.0, 50)
    kinds = ("constant",) if options.quick else ("constant", "poisson")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with together(partial(serve, OURS, {"same": vision.same(scratch / "same.onnx")}, scratch)) as (served,):
            compared: dict[str, list[Compared]] = {}
            for number in range(rounds):
                for kind in kinds:
                    for door in DOORS:
                        seed = options.seed + number
                        found = _compared(served, door, kind, seconds, seed, scratch / f"{number}-{kind}-{door}")
                        compared.setdefault(f"{door}_{kind}", []).append(found)
            control = _naive(served, seconds)
            planted = _planted(served, scratch, DOORS[:1] if options.quick else DOORS)
            false = _false_alarms(served, alarms)
            peers = {} if options.quick else _perf_analyzer(served)
    return _judged(compared, control, planted, false, alarms, peers)


def _judged(
    compared: dict[str, list[Compared]],
    control: Compared,
    planted: dict[str, str],
    false: list[str],
    alarms: int,
    peers: dict[str, float],
) -> Result:
    errors = [found.error for each in compared.values() for found in each]
    missed = [
        f"{name}: {found.found_s} for a true {found.true_s} s" for name, e in compared.items() for found in e if found.error > 1
    ]
    missed += [f"not told INVALID: {name}" for name, reason in planted.items() if not reason]
    missed += [f"{len(false)} of {alarms} good runs were told INVALID: {false[0]}"] if false else []
    p99 = PERCENTS.index(99)
    off_s = abs(control.found_s[p99] - control.true_s[p99])
    failed = off_s > max(SHARE * control.true_s[p99], LEAST_S)
    how = f"p99 of {control.found_s[p99] * 1e3:.3g} ms for a true {control.true_s[p99] * 1e3:.3g} ms"
    told = Control(name="timed from the send, four synchronous clients", value=control.error, failed=failed, how=how)
    holds, why = judge(not missed, told)
    details: dict[str, object] = {}
    for name, each in compared.items():
        for at, percent in enumerate(PERCENTS):
            details[f"{name}_p{percent}_ms"] = round(median([found.found_s[at] for found in each]) * 1e3, 2)
            details[f"{name}_p{percent}_true_ms"] = round(median([found.true_s[at] for found in each]) * 1e3, 2)
    details |= {f"control_p{percent}_ms": round(control.found_s[at] * 1e3, 2) for at, percent in enumerate(PERCENTS)}
    details |= {"planted": planted, "false_alarms": len(false), "good_runs": alarms, "load_1min": os.getloadavg()[0]}
    return Result(
        value=max(errors),
        spread=spread(errors),
        unit="of the error allowed, worst run",
        holds=holds,
        why="; ".join(missed) if missed and told.failed else why,
        reference={"name": "perf_analyzer --sync", "value": peers.get("sync_p99_ms"), "unit": "ms p99 at the same freezes"},
        control=told,
        details={**details, **{f"perf_analyzer_{name}": value for name, value in peers.items()}},
    )


def _compared(served: Served, door: str, kind: str, seconds: float, seed: int, folder: Path) -> Compared:
    """Run our generator against a server that freezes, and work out what it must have found."""
    options = ("--rate", f"{RATE}", "--arrivals", kind, "--warm-up", f"{WARM_UP_S}s", "--timeout", f"{TIMEOUT_S}s")
    with Freezer(served.pid, FROZEN_S, RUNNING_S) as freezer:
        found = load(served, door, "same", folder, seconds, *options, "--seed", f"{seed}")
    report, record = found.report, found.record
    _check(found)
    assert report.verdict.valid, f"a run against a frozen server was told INVALID: {report.verdict.reasons}"
    due_s = record.due_s + report.zero_s
    service_s = record.service_s[~near_freeze(due_s, freezer.freezes, DRAINED_S)]
    true_s = still_to_freeze_s(due_s, freezer.freezes) + float(np.median(service_s))
    compared = Compared(found_s=_percentiles(record.latency_s(TIMEOUT_S)), true_s=_percentiles(true_s))
    assert compared.true_s[PERCENTS.index(99)] > 0.8, f"the server was not frozen long enough: true p99 {compared.true_s[-1]} s"
    return compared


def _check(found: Loaded) -> None:
    """Assert that nothing is missing, moved or made up."""
    record, report = found.record, found.report
    assert len(record) == report.summary.due > 0
    assert (record.outcome == Outcome.OK).all(), f"not all were answered: {report.summary.counts} {report.reasons}"
    assert (record.issued_s >= record.due_s).all(), "a request was issued before it was due"
    if report.plan.arrivals == "constant":
        wanted = constant(RATE, report.plan.seconds)
        assert np.array_equal(record.due_s, wanted[wanted >= report.measured_from_s]), "the schedule was not kept"


def _percentiles(values_s: np.ndarray) -> tuple[float, ...]:
    ordered = np.sort(values_s)
    return tuple(float(ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]) for percent in PERCENTS)


def _naive(served: Served, seconds: float) -> Compared:
    """Send the constant schedule by four threads that wait for their answers and time them from their own sends."""
    due_s = constant(RATE, seconds)
    latency_s = np.full(len(due_s), np.nan)
    taking, following = threading.Lock(), iter(range(len(due_s)))
    x = np.zeros((1, *vision.SAME), np.float32)
    with Freezer(served.pid, FROZEN_S, RUNNING_S) as freezer:
        zero_s = time.perf_counter()

        def work() -> None:
            with Model(f"http://{served.addresses['http']}", "same", shm=False) as model:
                while True:
                    with taking:
                        index = next(following, None)
                    if index is None:
                        return
                    time.sleep(max(0.0, zero_s + due_s[index] - time.perf_counter()))
                    sent_s = time.perf_counter()
                    model.predict(x)
                    latency_s[index] = time.perf_counter() - sent_s

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    at_s = due_s + zero_s
    outside_s = float(np.median(latency_s[~near_freeze(at_s, freezer.freezes, DRAINED_S)]))
    true_s = still_to_freeze_s(at_s, freezer.freezes) + outside_s
    return Compared(found_s=_percentiles(latency_s), true_s=_percentiles(true_s))


def _planted(served: Served, scratch: Path, doors: Sequence[str]) -> dict[str, str]:
    """Return the first reason that each planted bottleneck was told INVALID for; empty where it was not."""
    found: dict[str, str] = {}

    def note(name: str, loaded: Loaded) -> None:
        reasons = loaded.report.verdict.reasons
        found[name] = reasons[0] if reasons else ""

    for door in doors:
        place = scratch / f"planted-{door}"
        with Freezer(served.pid, FROZEN_S, 1.0):
            few = ("--rate", f"{RATE}", "--max-in-flight", "2", "--connections", "2", "--timeout", f"{TIMEOUT_S}s")
            note(f"{door}, 2 in flight", load(served, door, "same", place / "few", 4.0, *few))
        note(f"{door}, 200,000/s", load(served, door, "same", place / "fast", 0.5, "--rate", "200000", "--timeout", "2s"))
        folder = place / "held"
        process = begin(command(served, door, "same", "--rate", f"{RATE}", "--time", "2s"), folder)
        begun(folder)
        time.sleep(0.8)
        with frozen_for(process, 0.4):
            pass
        note(f"{door}, generator frozen", finish(process, folder, 2.0))
    return found


def _false_alarms(served: Served, runs: int) -> list[str]:
    """Return why good runs were told INVALID."""
    told = []
    with Dialogue("load generator", sys.executable, ROOT / "benchmarks" / "programs" / "load_runs.py", {}) as generator:
        for number in range(runs):
            door, rate = DOORS[number % 2], (100.0, 200.0, 350.0, 500.0)[number // 2 % 4]
            url = f"{door}://{served.addresses[door]}"
            plan = {"url": url, "model": "same", "rate_per_s": rate, "seconds": 1.0, "seed": number}
            frozen = Freezer(served.pid, 0.3, 0.7) if number % 4 > 1 else contextlib.nullcontext()
            with frozen:
                found = generator.ask(plan)
            told += [] if found["valid"] else [f"{url} at {rate:g}/s: {'; '.join(found['reasons'])}"]
    return told


def _perf_analyzer(served: Served) -> dict[str, float]:
    """Return what perf_analyzer tells of the same freezes, milliseconds; nothing where it can't be had."""
    told: dict[str, float] = {}
    try:
        argv, env = tool("perf_analyzer")
    except (Skip, TenureError):
        return told
    for mode in ("sync", "async"):
        with tempfile.TemporaryDirectory() as folder, Freezer(served.pid, FROZEN_S, RUNNING_S):
            table = Path(folder) / "table.csv"
            what = ["-m", "same", "-i", "http", "-u", served.addresses["http"], "--shape", f"x:{vision.SAME[0]}"]
            how = ["--request-rate-range", f"{RATE}", f"--{mode}", "-p", "4000", "-s", "999", "-r", "3", "-f", str(table)]
            how += ["--max-threads", "4"] if mode == "sync" else []
            subprocess.run([*argv, *what, *how], env=env, capture_output=True, timeout=60 + PATIENCE_S, check=False)
            if table.exists():
                (row,) = csv.DictReader(table.read_text().splitlines())
                told |= {f"{mode}_p{percent}_ms": float(row[f"p{percent} latency"]) / 1e3 for percent in PERCENTS}
    return told
