"""What serving costs over calling the model in one's own process: ResNet-50, one client, one request at a time.

World: `vision.resnet50` (float32, random weights) behind ours, and in the full form behind Triton's core too; two threads for a
run, spinning off on all sides. A client process holds the same model in ONNX Runtime and a client library; it makes pairs of
calls, in-process and served, in an order drawn per pair, so that both meet the same minute. Efficiency of a pair: in-process
time / served time. Inputs are 602,112 bytes an image, answers 4,000 bytes.
Ways: our client over http (binary tensors), grpc and shm; batch 1 and 8. Reported beside them, never judged: tritonclient over
http, grpc and system shared memory against ours, and against Triton.
Rounds: 15 of 4 pairs at batch 1 and 2 at batch 8 for each way (--quick: 3 rounds of 3 and 1, ours alone), ways shuffled by the
seed, after two calls of each to warm up. Under load: a program beside it computes on every core, in a session of its own as
somebody else's work would be, and ends by itself; batch 1, 40 pairs a way (--quick: 6).
Value: the median efficiency over http at batch 1.
Bars, all must hold. Median efficiency: http and shm >= 0.97 at batch 1 and 8, grpc >= 0.95 at batch 1 and 0.97 at 8; the lower
bound of its 90 % interval (bootstrap of the median, 2,000 draws) at most 0.04 below these. CPU time of the server's processes
per image <= 1.03 x that of the in-process calls, each way and batch, summed over the rounds. Under load: median >= 0.9.
Checked before a figure counts: each way's answers at batch 1 and 8 agree with the in-process ones (1e-3 relative).
Control: the same server asked with the numbers written out in JSON must miss 0.97 at batch 1.
Not counted: several clients (serve_requests), start-up, files and decoding (serve_files_to_labels).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import vision
from benchmarks.harness import Control, Options, Result, judge, median, spread
from benchmarks.peers import homes, triton
from benchmarks.peers.processes import Served, together
from benchmarks.serving import OURS, Dialogue, serve

NAME = "serve_transport_tax"
BAR = "ResNet-50 served >= 0.97 x in-process over HTTP and shm (gRPC 0.95 at batch 1), CPU <= 1.03 x; >= 0.9 on loaded cores"
WAYS = ("http", "grpc", "shm")
ROWS = (1, 8)
BARS = {("http", 1): 0.97, ("http", 8): 0.97, ("grpc", 1): 0.95, ("grpc", 8): 0.97, ("shm", 1): 0.97, ("shm", 8): 0.97}
BELOW = 0.04
CPU_BAR = 1.03
LOADED_BAR = 0.9
THREADS = 2
_PROGRAM = Path(__file__).parent / "peers" / "programs" / "paired.py"
_BURN = """
import os, sys, time
until = time.monotonic() + float(sys.argv[2])
for _ in range(int(sys.argv[1]) - 1):
    if os.fork() == 0:
        break
while time.monotonic() < until:
    pass
"""


@dataclass(slots=True)
class Pairs:
    """What was seen of one way at one batch."""

    efficiency: list[float] = field(default_factory=list)
    served_ms: list[float] = field(default_factory=list)
    server_cpu_s: float = 0.0
    in_process_cpu_s: float = 0.0

    @property
    def cpu_ratio(self) -> float:
        """Server CPU over in-process CPU, summed."""
        return self.server_cpu_s / self.in_process_cpu_s


class Client(Dialogue):
    """A client process that makes pairs of calls with one server."""

    def __init__(self, python: Path | str, file: Path, served: Served, ways: Sequence[str], seed: int) -> None:
        told = {"file": str(file), "name": file.stem, "addresses": dict(served.addresses), "pid": served.pid}
        told |= {"threads": THREADS, "ways": list(ways), "seed": seed, "rows": max(ROWS)}
        super().__init__(f"client of {served.name}", python, _PROGRAM, told)
        self.server, self.ways = served.name, tuple(ways)

    def measure(self, way: str, rows: int, pairs: int, into: Pairs) -> None:
        """Make so many pairs and add what was seen."""
        told = self.ask({"way": way, "rows": rows, "pairs": pairs})
        into.efficiency += [here_s / served_s for here_s, served_s in told["pairs"]]
        into.served_ms += [1000 * served_s for _, served_s in told["pairs"]]
        into.server_cpu_s += told["server_cpu_s"]
        into.in_process_cpu_s += told["in_process_cpu_s"]


def run(options: Options) -> Result:
    """Measure all ways in interleaved rounds, then under load."""
    rounds, pairs, loaded_pairs = (3, {1: 3, 8: 1}, 6) if options.quick else (15, {1: 4, 8: 2}, 40)
    names = (OURS,) if options.quick else (OURS, "triton")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        file = vision.resnet50(scratch / "resnet50.onnx", seed=options.seed)
        starts = (lambda name=name: serve(name, {"resnet50": file}, scratch, threads=THREADS, rows=8) for name in names)
        with together(*starts) as servers:
            found, loaded, naive = measure(servers, file, rounds, pairs, loaded_pairs, options.seed)
    return judged(found, loaded, naive, options.seed)


def measure(
    servers: tuple[Served, ...], file: Path, rounds: int, pairs: dict[int, int], loaded_pairs: int, seed: int
) -> tuple[dict[tuple[str, int], Pairs], dict[str, Pairs], Pairs]:
    """Return what was seen: by way and rows, under load by way, and of the control."""
    others = tuple(f"triton_{way}" for way in WAYS)
    ours = Client(sys.executable, file, servers[0], (*WAYS, "json"), seed)
    clients = [ours]
    if len(servers) > 1:
        home = triton.install(homes.default_root())
        clients += [Client(homes.python(home), file, served, others, seed) for served in servers]
    rng = random.Random(seed)
    found: dict[tuple[str, int], Pairs] = {}
    loaded = {way: Pairs() for way in WAYS}
    naive = Pairs()
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(client)
        turns = [(client, way, rows) for client in clients for way in client.ways if way != "json" for rows in ROWS]
        for _ in range(rounds):
            rng.shuffle(turns)
            for client, way, rows in turns:
                label = way if client is ours else f"{client.server}_by_{way}"
                count = pairs[rows] if client is ours else max(1, pairs[rows] // 2)
                client.measure(way, rows, count, found.setdefault((label, rows), Pairs()))
            ours.measure("json", 1, 1, naive)
        with_load(ours, loaded, loaded_pairs)
    return found, loaded, naive


def with_load(ours: Client, loaded: dict[str, Pairs], pairs: int) -> None:
    """Make pairs while as many processes as there are cores compute; they end by themselves after a while."""
    limit_s = 10 + 1.5 * pairs
    # In a session of its own, as somebody else's work is: the kernel shares the cores by session first (autogroup), so the
    # in-process calls and the server, in whatever session, both get their half.
    burner = subprocess.Popen([sys.executable, "-c", _BURN, str(os.cpu_count()), str(limit_s)], start_new_session=True)
    ends_at_s = time.monotonic() + limit_s
    try:
        for _ in range(pairs // 2):
            for way, into in loaded.items():
                ours.measure(way, 1, 2, into)
        assert time.monotonic() < ends_at_s, f"the load ended after {limit_s} s, before the measurement did"
    finally:
        os.killpg(burner.pid, signal.SIGKILL)
        burner.wait()


def lower_bound(values: Sequence[float], seed: int) -> float:
    """Return the 5th percentile of the median's bootstrap distribution: the lower end of its 90 % interval."""
    rng = np.random.default_rng(seed)
    draws = rng.choice(np.asarray(values), size=(2000, len(values)))
    return float(np.quantile(np.median(draws, axis=1), 0.05))


def judged(found: dict[tuple[str, int], Pairs], loaded: dict[str, Pairs], naive: Pairs, seed: int) -> Result:
    """Turn the pairs into a verdict."""
    missed: list[str] = []
    for (way, rows), bar in BARS.items():
        seen = found[way, rows]
        middle, low = median(seen.efficiency), lower_bound(seen.efficiency, seed)
        if middle < bar or low < bar - BELOW:
            missed.append(f"{way} at batch {rows}: {middle:.3f}, at least {low:.3f} (bars {bar}, {bar - BELOW:.2f})")
        if seen.cpu_ratio > CPU_BAR:
            missed.append(f"{way} at batch {rows}: {seen.cpu_ratio:.3f} x the CPU time")
    missed += [
        f"{way} on loaded cores: {median(seen.efficiency):.3f}"
        for way, seen in loaded.items()
        if median(seen.efficiency) < LOADED_BAR
    ]
    value = median(naive.efficiency)
    control = Control(name="numbers written out in JSON", value=value, failed=value < 0.97, how=f"{value:.2f} of in-process")
    holds, why = judge(not missed, control)
    details: dict[str, Any] = {}
    for (way, rows), seen in found.items():
        details |= as_details(f"{way}_batch_{rows}", seen, seed)
    for way, seen in loaded.items():
        details |= as_details(f"{way}_loaded", seen, seed)
    best = [median(seen.efficiency) for (way, rows), seen in found.items() if way.startswith("triton_by") and rows == 1]
    return Result(
        value=median(found["http", 1].efficiency),
        spread=spread(found["http", 1].efficiency),
        unit="x in-process, batch 1 over HTTP",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": "Triton core, its best way at batch 1", "value": max(best), "unit": "x in-process"} if best else {},
        control=control,
        details={**details, "load_1min": os.getloadavg()[0], "cores": os.cpu_count()},
    )


def as_details(name: str, seen: Pairs, seed: int) -> dict[str, float]:
    """Return the figures of one way under one name."""
    return {
        f"{name}_efficiency": round(median(seen.efficiency), 4),
        f"{name}_efficiency_spread": round(spread(seen.efficiency), 4),
        f"{name}_efficiency_low": round(lower_bound(seen.efficiency, seed), 4),
        f"{name}_served_ms": round(median(seen.served_ms), 2),
        f"{name}_cpu_ratio": round(seen.cpu_ratio, 4),
        f"{name}_pairs": len(seen.efficiency),
    }
