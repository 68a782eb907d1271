"""What the benchmarks of the load generator share: running it as a process of its own, and freezing a server.

Not here: what is measured (`load_frozen_server`, `load_cost`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.processes import Served
from benchmarks.peers.programs.procs import tree
from benchmarks.serving import PATIENCE_S, environment
from tenure.serve.load.columns import read_record
from tenure.serve.load.records import Record
from tenure.serve.load.report import RECORD_FOLDER, LoadReport, read_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What one run of our generator left."""

    report: LoadReport
    record: Record
    """After the warm-up."""


def command(served: Served, door: str, model: str, *options: str) -> list[str]:
    """Return the command line that loads a model of a server through one of its doors."""
    url = f"{door}://{served.addresses[door]}"
    return [sys.executable, "-m", "tenure.cli", "bench", "load", url, "--model", model, *options]


def begin(argv: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start the generator; its report and record go to a new folder."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*argv, "--out", str(folder), "--json"], env=environment(), stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], folder: Path, seconds: float) -> Loaded:
    """Wait for the generator and return what it found. Asserts that it ended by itself."""
    try:
        out, error = process.communicate(timeout=seconds + PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"the generator did not end within {seconds + PATIENCE_S:g} s") from None
    assert process.returncode in (0, 1), f"the generator ended with {process.returncode}: {error.strip()[-600:]}"
    told = json.loads(out)
    assert "error" not in told, f"the generator failed: {told['error']}"
    report = read_report(folder)
    record = read_record(folder / RECORD_FOLDER)
    return Loaded(report=report, record=record.where(record.due_s >= report.measured_from_s))


def load(served: Served, door: str, model: str, folder: Path, seconds: float, *options: str) -> Loaded:
    """Run our generator once and return what it found."""
    argv = command(served, door, model, "--time", f"{seconds}s", *options)
    return finish(begin(argv, folder), folder, seconds)


def begun(folder: Path) -> None:
    """Wait until the generator has laid down its schedule. Asserts that it does."""
    until_s = time.monotonic() + PATIENCE_S
    while not (folder / RECORD_FOLDER / "due_s.npy").exists():
        assert time.monotonic() < until_s, "the generator did not begin"
        time.sleep(0.01)


class Freezer:
    """Freezes all processes of a server for a while, again and again. `freezes`: begin and end of each, by perf_counter."""

    def __init__(self, pid: int, frozen_s: float, running_s: float) -> None:
        self._pids, self._frozen_s, self._running_s = tree(pid), frozen_s, running_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.freezes: list[tuple[float, float]] = []

    def _work(self) -> None:
        while not self._over.wait(self._running_s):
            began_s = time.perf_counter()
            self._signal(signal.SIGSTOP)
            self._over.wait(self._frozen_s)
            self._signal(signal.SIGCONT)
            self.freezes.append((began_s, time.perf_counter()))

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def __enter__(self) -> Freezer:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._over.set()
        self._thread.join()
        self._signal(signal.SIGCONT)


@contextlib.contextmanager
def frozen_for(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Freeze one process we started for a while."""
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def still_to_freeze_s(at_s: np.ndarray, freezes: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return for moments by perf_counter how long each has to wait for the end of the freeze it lies in; 0 outside."""
    wait_s = np.zeros(len(at_s))
    for began_s, ended_s in freezes:
        inside = (at_s >= began_s) & (at_s < ended_s)
        wait_s[inside] = ended_s - at_s[inside]
    return wait_s


def near_freeze(at_s: np.ndarray, freezes: Sequence[tuple[float, float]], after_s: float) -> np.ndarray:
    """Return which moments lie in a freeze, shortly before it, or up to `after_s` after its end."""
    near = np.zeros(len(at_s), dtype=bool)
    for began_s, ended_s in freezes:
        near |= (at_s >= began_s - 0.05) & (at_s < ended_s + after_s)
    return near
