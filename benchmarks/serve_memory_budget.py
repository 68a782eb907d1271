"""Memory of a server that 256 clients talk to at once, with a budget and without.

World: `vision.resnet50` (float32, 602,112 bytes a request, batches of at most 8 rows joined by the server) behind ours with
`--memory-budget 32MiB` (53 requests), a fresh server for each measurement, two threads, spinning off. First three requests of
8 rows, one after the other; the proportional set size (PSS) of the server's process tree is then the base. Then 256 clients,
each with a connection of its own and one request of one image at a time, over HTTP or over gRPC (`programs/many_clients`): a
client that is refused waits as long as the server says (up to a fifth longer) and sends again. PSS is read every 0.2 s.
Rounds: 2 of 20 s for each door with and without budget (--quick: 1 of 5 s), order shuffled by the seed. Without: a budget of
8 GiB, which 256 clients cannot fill.
Value: the largest of the peaks with a budget, over what it may be: base + 64 MB + 5 %, either door, any round.
Bars, all must hold for each door: value <= 1.0; no request is lost: each ends in a right answer or in an explicit 429 or
RESOURCE_EXHAUSTED with the time to wait, none is left unanswered at the end; answers/s >= 0.95 x those without the budget
(medians over the rounds; from the end of a batch to the end of a batch).
Checked: every answer is that of its client's image (eight images take turns), so rows of a batch are never mixed up.
Control: the server without a budget must break the memory bar, on each door.
Told beside them: refusals and their hints, p99 with all tries; in the full form Triton's core with the same clients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import vision
from benchmarks.harness import ROOT, Control, Options, Result, interleaved, judge, median, spread
from benchmarks.peers.processes import Served
from benchmarks.peers.programs.procs import pss_bytes, tree
from benchmarks.serving import OURS, ask, environment, serve, v2_binary

NAME = "serve_memory_budget"
BAR = "256 clients: peak <= (after warm-up at full batch) + 64 MB + 5 %, nothing lost, >= 0.95 x the rate without a budget"
CLIENTS, ROWS, IMAGES, THREADS = 256, 8, 8, 2
BUDGET, OFF = "32MiB", "8GiB"
EXTRA_BYTES, EXTRA_SHARE = 64 * 10**6, 0.05
RATE_BAR = 0.95
DOORS = ("http", "grpc")
PATIENCE_S = 150.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """What one measurement saw."""

    base_bytes: int
    peak_bytes: int
    told: dict[str, Any]
    """What the clients told."""

    @property
    def over_bar(self) -> float:
        """The peak over what it may be."""
        return self.peak_bytes / (self.base_bytes * (1 + EXTRA_SHARE) + EXTRA_BYTES)


class PeakReader:
    """Reads the PSS of a process tree until left, and keeps the highest."""

    def __init__(self, pid: int, every_s: float = 0.2) -> None:
        self.peak_bytes = 0
        self._pid, self._every_s, self._left = pid, every_s, threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._left.set()
        self._thread.join()

    def _read(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, pss_bytes(tree(self._pid)))
            if self._left.wait(self._every_s):
                return


def run(options: Options) -> Result:
    """Measure both doors with and without a budget in interleaved rounds."""
    repeats, seconds = (1, 5.0) if options.quick else (2, 20.0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        file = vision.resnet50(scratch / "resnet50.onnx", seed=options.seed)
        write_images(file, scratch, options.seed)
        contenders: dict[str, Callable[[], Crowd]] = {}
        for door in DOORS:
            contenders[f"{door}_limited"] = partial(crowd, OURS, door, scratch, seconds, options.seed, BUDGET)
            contenders[f"{door}_off"] = partial(crowd, OURS, door, scratch, seconds, options.seed, OFF)
            if not options.quick:
                contenders[f"{door}_triton"] = partial(crowd, "triton", door, scratch, seconds, options.seed, OFF)
        found = interleaved(contenders, repeats, seed=options.seed)
    return judged(found, repeats)


def write_images(file: Path, scratch: Path, seed: int) -> None:
    """Write the images that take turns, and the model's answers."""
    import onnxruntime  # the reference that every answer is compared with

    images = vision.images(IMAGES, seed=seed)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    np.save(scratch / "images.npy", images)
    np.save(scratch / "answers.npy", session.run(["y"], {"x": images})[0])


def crowd(name: str, door: str, scratch: Path, seconds: float, seed: int, budget: str) -> Crowd:
    """Start a server, warm it up at full batch, let the clients come; return memory and what they saw."""
    options = ("--memory-budget", budget, "--max-batch-rows", str(ROWS)) if name == OURS else ()
    models = {"resnet50": scratch / "resnet50.onnx"}
    with serve(name, models, scratch, *options, threads=THREADS, rows=ROWS) as served:
        whole = v2_binary("resnet50", np.load(scratch / "images.npy")[:ROWS])
        for _ in range(3):
            ask(served, whole)
        base_bytes = max(pss_bytes(tree(served.pid)) for _ in range(3))
        with PeakReader(served.pid) as reader:
            told = clients(served, door, scratch, seconds, seed, drain=budget == BUDGET)
        assert served.process.poll() is None, f"{name} ended: {served.last_words()}"
        return Crowd(base_bytes, max(base_bytes, reader.peak_bytes), told)


def clients(served: Served, door: str, scratch: Path, seconds: float, seed: int, *, drain: bool) -> dict[str, Any]:
    """Run the clients in a process of their own and return what they told."""
    told: dict[str, Any] = {"door": door, "address": served.addresses[door], "name": "resnet50", "clients": CLIENTS}
    told |= {"seconds": seconds, "seed": seed, "drain": drain}
    told |= {"images": str(scratch / "images.npy"), "answers": str(scratch / "answers.npy")}
    argv = [sys.executable, "-m", "benchmarks.programs.many_clients", json.dumps(told)]
    try:
        done = subprocess.run(
            argv, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the clients over {door} did not end within {seconds + PATIENCE_S:g} s") from None
    assert done.returncode == 0, f"the clients over {door} failed: {done.stderr.strip()[-400:]}"
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["answered"], f"{served.name} answered nobody over {door}; lost: {seen['lost']}"
    assert seen["per_s"], f"{served.name} answered too slowly over {door} for a rate: {seen['answered']} in {seconds:g} s"
    assert not seen["wrong"], f"{seen['wrong']} answers of {served.name} over {door} were another image's"
    return seen


def judged(found: dict[str, list[Crowd]], repeats: int) -> Result:
    """Turn the measurements into a verdict."""
    missed: list[str] = []
    details: dict[str, Any] = {}
    worst = max(seen.over_bar for door in DOORS for seen in found[f"{door}_limited"])
    for door in DOORS:
        limited, off = found[f"{door}_limited"], found[f"{door}_off"]
        over = max(seen.over_bar for seen in limited)
        rate = median([seen.told["per_s"] for seen in limited]) / median([seen.told["per_s"] for seen in off])
        lost = sum((sum(seen.told["lost"].values()) + seen.told["unfinished"]) for seen in limited)
        silent = sum(seen.told["refused_without_hint"] for seen in limited)
        details |= {f"{door}_rate_over_off": round(rate, 4), f"{door}_lost": lost}
        missed += [f"{door}: peak {over:.2f} x what it may be"] if over > 1 else []
        missed += [f"{door}: {lost} requests lost ({lost_reasons(limited)})"] if lost else []
        missed += [f"{door}: {silent} refusals without the time to wait"] if silent else []
        missed += [f"{door}: {rate:.3f} x the rate without a budget"] if rate < RATE_BAR else []
    for name, crowds in found.items():
        details |= as_details(name, crowds)
    without = min(seen.over_bar for door in DOORS for seen in found[f"{door}_off"])
    control = Control(
        name="no budget", value=without, failed=without > 1, how=f"peak {without:.2f} x what it may be, on the better door"
    )
    holds, why = judge(not missed, control)
    return Result(
        value=worst,
        spread=spread([seen.over_bar for door in DOORS for seen in found[f"{door}_limited"]]),
        unit="x the memory allowed",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": "ours without a budget", "value": without, "unit": "x the memory allowed"},
        control=control,
        details={**details, "rounds": repeats, "load_1min": os.getloadavg()[0], "cores": os.cpu_count()},
    )


def lost_reasons(crowds: list[Crowd]) -> str:
    """Return why requests were lost, the first few."""
    reasons = [f"{count} x {reason}" for seen in crowds for reason, count in seen.told["lost"].items()]
    unfinished = sum(seen.told["unfinished"] for seen in crowds)
    return "; ".join([*reasons[:3], *([f"{unfinished} never ended"] if unfinished else [])])


def as_details(name: str, crowds: list[Crowd]) -> dict[str, Any]:
    """Return the figures of one contender under its name."""
    return {
        f"{name}_base_mb": round(median([seen.base_bytes / 1e6 for seen in crowds]), 1),
        f"{name}_peak_mb": round(max(seen.peak_bytes / 1e6 for seen in crowds), 1),
        f"{name}_growth": round(max(seen.peak_bytes / seen.base_bytes for seen in crowds), 3),
        f"{name}_per_s": round(median([seen.told["per_s"] for seen in crowds]), 2),
        f"{name}_p99_s": round(median([seen.told["p99_s"] for seen in crowds]), 2),
        f"{name}_answered": sum(seen.told["answered"] for seen in crowds),
        f"{name}_refused": sum(seen.told["refused"] for seen in crowds),
        f"{name}_hint_s": round(median([seen.told["hints_s"] for seen in crowds]), 3),
    }
