"""What one request costs the load generator's machine: requests per CPU second, ours and perf_analyzer's, equally honest.

World: `vision.same` (4 KB each way) served by `python -m tenure.serve`, 2,000 requests/s asked of it, constant arrivals, over
HTTP and over gRPC, by one generator at a time, in interleaved rounds: 5 of 4 s (--quick: 2 of 2 s).
- ours: `tenure bench load --rate 2000`, a process of its own.
- perf_analyzer --request-rate-range 2000 --async: the mode in which it, too, counts latency from the schedule. Its synchronous
  mode, which does not, is told in the details.
Counted: CPU seconds of the generator's processes (utime + stime of /proc) between two moments of the run, its start and its
report left out on both sides, by requests that the server says it answered between the same two moments.
Value: the smaller over the two doors of the median ratio ours / perf_analyzer of requests per CPU second.
Bars, all must hold: ratio >= 0.5 over both doors; issue delay (issued - due) of ours p99 <= 2 ms over both doors, in the
median round.
Checked before a figure counts: the server answered at least 90 % of the rate in the window (else, on a machine that is too
busy, the run is made again, up to three times in all), every request of ours was answered, the run of ours is as long as asked.
Control: one synchronous client over gRPC that works off the same schedule, what one writes in ten lines: its issue delay must
miss 2 ms.
Details: CPU microseconds per request of all, issue delay p50/p99/max of ours, latency p99 of both, and what 16 clients of ours
get through in a closed loop.
Not counted: several generators, TLS, networks.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import vision
from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from benchmarks.loading import begin, command, finish, load
from benchmarks.peers.processes import Served, together
from benchmarks.peers.programs.procs import cpu_s, tree
from benchmarks.serving import OURS, PATIENCE_S, serve, tool
from tenure.serve.client import Model
from tenure.serve.load.records import Outcome
from tenure.serve.load.schedule import constant
from tenure.serve.load.summary import figures

NAME = "load_cost"
BAR = ">= 0.5 x perf_analyzer's requests per CPU second at equal honesty; issue delay p99 <= 2 ms at 2,000 requests/s"
DOORS = ("http", "grpc")
RATE = 2_000
LEAST = 0.5
MOST_DELAY_MS = 2.0
TRIES = 3
AROUND_S = 2.0
"""Of a run before and after the window that counts."""


Process = subprocess.Popen[str] | subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run of a generator took, and how well it kept to its schedule."""

    per_cpu_s: float
    """Requests that the server answered per CPU second of the generator."""
    p99_ms: float
    delay_p50_ms: float = float("nan")
    delay_p99_ms: float = float("nan")
    delay_max_ms: float = float("nan")


def run(options: Options) -> Result:
    """Measure both in interleaved rounds."""
    rounds, window_s = (2, 2.0) if options.quick else (5, 4.0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with together(partial(serve, OURS, {"same": vision.same(scratch / "same.onnx")}, scratch)) as (served,):
            modes = ("async",) if options.quick else ("async", "sync")
            with contextlib.closing(Counter(served)) as counter:
                runs = {f"ours_{door}": partial(_ours, served, counter, door, window_s, scratch) for door in DOORS}
                runs |= {
                    f"{mode}_{door}": partial(_theirs, served, counter, door, mode, window_s)
                    for door in DOORS
                    for mode in modes
                }
                found = interleaved({name: partial(_again, one) for name, one in runs.items()}, rounds, seed=options.seed)
            control_ms = _synchronous(served, window_s)
            closed = {door: _closed(served, door, scratch) for door in DOORS}
    return _judged(found, control_ms, closed)


def _judged(found: dict[str, list[Cost]], control_ms: float, closed: dict[str, dict[str, float]]) -> Result:
    ratios = {
        door: [a.per_cpu_s / b.per_cpu_s for a, b in zip(found[f"ours_{door}"], found[f"async_{door}"], strict=True)]
        for door in DOORS
    }
    delays = {door: [cost.delay_p99_ms for cost in found[f"ours_{door}"]] for door in DOORS}
    missed = [
        f"{door}: {median(r):.2f} x perf_analyzer's requests per CPU second" for door, r in ratios.items() if median(r) < LEAST
    ]
    missed += [f"{door}: issue delay p99 {median(d):.2f} ms" for door, d in delays.items() if median(d) > MOST_DELAY_MS]
    control = Control(
        name="one synchronous client",
        value=control_ms,
        failed=control_ms > MOST_DELAY_MS,
        how=f"issue delay p99 of {control_ms:.3g} ms",
    )
    holds, why = judge(not missed, control)
    worst = min(DOORS, key=lambda door: median(ratios[door]))
    details: dict[str, float | None] = {}
    for name, costs in found.items():
        details[f"{name}_cpu_us"] = round(median([1e6 / cost.per_cpu_s for cost in costs]), 1)
        details[f"{name}_p99_ms"] = round(median([cost.p99_ms for cost in costs]), 3)
    for door in DOORS:
        ours = found[f"ours_{door}"]
        details[f"ratio_{door}"] = round(median(ratios[door]), 3)
        details[f"issue_delay_{door}_p50_ms"] = round(median([cost.delay_p50_ms for cost in ours]), 4)
        details[f"issue_delay_{door}_p99_ms"] = round(median(delays[door]), 4)
        details[f"issue_delay_{door}_max_ms"] = round(max(cost.delay_max_ms for cost in ours), 3)
        details |= {f"closed_{door}_{key}": round(value, 1) for key, value in closed[door].items()}
    return Result(
        value=median(ratios[worst]),
        spread=spread(ratios[worst]),
        unit="x perf_analyzer's requests per CPU second",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={
            "name": f"perf_analyzer --async over {worst}",
            "value": round(median([cost.per_cpu_s for cost in found[f"async_{worst}"]])),
            "unit": "requests per CPU second",
        },
        control=control,
        details={**details, "load_1min": os.getloadavg()[0], "cores": os.cpu_count()},
    )


class TooBusy(AssertionError):
    """The server did not get through the rate, so that the generators were asked for different things."""


class Counter:
    """Requests that a server says it has answered, over one connection of its own: it may be refused another under load."""

    def __init__(self, served: Served) -> None:
        self._connection = http.client.HTTPConnection(served.addresses["http"], timeout=PATIENCE_S)

    def __call__(self) -> int:
        """Return the count now."""
        self._connection.request("GET", "/v2/models/same/stats")
        (model,) = json.loads(self._connection.getresponse().read())["model_stats"]
        return int(model["inference_stats"]["success"]["count"])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _again(one: Callable[[], Cost]) -> Cost:
    """Make a run, again where the machine was too busy for it."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(TooBusy):
            return one()
        time.sleep(1.0)
    return one()


def _ours(served: Served, counter: Counter, door: str, window_s: float, scratch: Path) -> Cost:
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    seconds = window_s + 2 * AROUND_S
    argv = command(served, door, "same", "--rate", f"{RATE}", "--arrivals", "constant", "--time", f"{seconds}s")
    process = begin(argv, folder)
    try:
        per_cpu_s = _per_cpu_s(process, counter, window_s)
        found = finish(process, folder, seconds)
    finally:
        _end(process)
    record, summary = found.record, found.report.summary
    assert (record.outcome == Outcome.OK).all(), f"not all were answered: {summary.counts}"
    assert found.report.ended_s >= seconds - 2 / RATE, f"a run of {seconds} s ended after {found.report.ended_s} s"
    return Cost(
        per_cpu_s=per_cpu_s,
        p99_ms=_ms(summary.latency.percentiles_s["p99"]),
        delay_p50_ms=_ms(summary.issue_delay.percentiles_s["p50"]),
        delay_p99_ms=_ms(summary.issue_delay.percentiles_s["p99"]),
        delay_max_ms=_ms(summary.issue_delay.max_s),
    )


def _ms(seconds: float | None) -> float:
    assert seconds is not None
    return seconds * 1e3


def _theirs(served: Served, counter: Counter, door: str, mode: str, window_s: float) -> Cost:
    argv, env = tool("perf_analyzer")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        what = ["-m", "same", "-i", door, "-u", served.addresses[door], "--shape", f"x:{vision.SAME[0]}"]
        windows = ["-p", str(round((window_s + 2 * AROUND_S) / 3 * 1000)), "-s", "999", "-r", "3", "-f", str(table)]
        how = ["--request-rate-range", f"{RATE}", "--request-distribution", "constant", f"--{mode}"]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([*argv, *what, *windows, *how], env=env, stdout=quiet, stderr=quiet)
        try:
            per_cpu_s = _per_cpu_s(process, counter, window_s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(window_s + 20)
        finally:
            _end(process)
        if not table.exists():
            raise TooBusy(f"perf_analyzer told nothing over {door}, --{mode}")
        (row,) = csv.DictReader(table.read_text().splitlines())
    return Cost(per_cpu_s=per_cpu_s, p99_ms=float(row["p99 latency"]) / 1e3)


def _end(process: Process) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _per_cpu_s(process: Process, counter: Counter, window_s: float) -> float:
    """Return requests answered per CPU second of a generator, within a window in which it is at its rate."""
    until_s = time.monotonic() + PATIENCE_S
    before = counter()
    while counter() < before + RATE * 0.5:  # half a second's worth: past its start and its own warm-up
        assert time.monotonic() < until_s, "the generator did not begin"
        assert process.poll() is None, f"the generator ended with {process.returncode} before it began"
        time.sleep(0.02)
    pids = tree(process.pid)
    began_s, first, used_s = time.perf_counter(), counter(), cpu_s(pids)
    time.sleep(window_s)
    count, used_s, took_s = counter() - first, cpu_s(pids) - used_s, time.perf_counter() - began_s
    assert process.poll() is None, "the generator ended within the window"
    if count < 0.9 * RATE * took_s:
        raise TooBusy(f"only {count / took_s:.0f} of {RATE} requests/s were answered in the window")
    return count / used_s


def _synchronous(served: Served, seconds: float) -> float:
    """Return the p99 of the issue delay of one client that waits for each answer, milliseconds."""
    due_s = constant(RATE, seconds)
    delay_s = np.empty(len(due_s))
    x = np.zeros((1, *vision.SAME), np.float32)
    with Model(f"grpc://{served.addresses['grpc']}", "same") as model:
        model.predict(x)
        zero_s = time.perf_counter()
        for index, at_s in enumerate(due_s):
            time.sleep(max(0.0, zero_s + at_s - time.perf_counter()))
            delay_s[index] = time.perf_counter() - zero_s - at_s
            model.predict(x)
    return (figures(delay_s).percentiles_s["p99"] or 0.0) * 1e3


def _closed(served: Served, door: str, scratch: Path) -> dict[str, float]:
    """Return rate and CPU of 16 clients of ours."""
    found = load(served, door, "same", Path(tempfile.mkdtemp(dir=scratch)) / "run", 2.0, "--clients", "16")
    count = found.report.summary.counts["ok"]
    return {"per_s": found.report.summary.answered_per_s, "cpu_us": found.report.own.cpu_s / count * 1e6}
