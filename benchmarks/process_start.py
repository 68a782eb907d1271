"""What a lease's confinement adds to a short command, and how soon after the order the command runs.

World: the process runtime with the strongest means found here (its sentence is in the details), state in a fresh folder, the
fork server warm. Reference: `subprocess.run` of the same command, bare.
Measured: wall time from the order to the exit record in hand (`start` + `wait`) of `/bin/true`, minus the bare command's, both
in interleaved rounds: 60 rounds (--quick: 20) after 3 to warm up; the value is the difference of the medians. Second: from the
order to the command's own first instructions, told by `date +%s%N` (CLOCK_REALTIME, one machine); median.
Bars: at most 10 ms added, and at most 50 ms from order to running. Both must hold.
Checked in every round: the exit is `completed`, the shim is gone, `date` said a time between order and record.
Control: a naive shim, a fresh interpreter per command that imports the shim and runs it: it must miss the 10 ms.
Orders come one at a time to an idle server: each contender is preceded by a pause of 50 ms, not counted.
Not counted: the start of the fork server, forgetting the lease. The load of the machine is in the details: both sides suffer
from it, the one with more steps more.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from tenure.protocols import Exit, ExitKind, StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.process import ProcessRuntime

NAME = "process_start"
BAR = "confinement adds at most 10 ms to a short command; it runs at most 50 ms after the order"
ADDED_LIMIT_S = 0.010
RUNNING_LIMIT_S = 0.050
PAUSE_S = 0.05
_NAIVE = "import subprocess, sys, tenure.runtimes.shim; sys.exit(subprocess.call(['/bin/true']))"


def run(options: Options) -> Result:
    """Measure the runtime, the bare command and the naive shim in interleaved rounds."""
    rounds = 20 if options.quick else 60
    with tempfile.TemporaryDirectory() as folder:
        runtime = ProcessRuntime(Path(folder) / "state")
        try:
            world = World(runtime, Path(folder))
            contenders: dict[str, Callable[[], float]] = {
                "bare": bare,
                "runtime": world.whole,
                "running": world.running,
                "naive": naive,
            }
            found = interleaved({name: rested(call) for name, call in contenders.items()}, rounds, seed=options.seed, warm_up=3)
            confinement = runtime.confinement()
        finally:
            runtime.close()
    plain = median(found["bare"])
    added, running, naive_added = (
        median(found[name]) - base for name, base in (("runtime", plain), ("running", 0), ("naive", plain))
    )
    control = Control(
        name="a fresh interpreter per shim",
        value=naive_added,
        failed=naive_added > ADDED_LIMIT_S,
        how=f"bar {ADDED_LIMIT_S} s added",
    )
    holds, why = judge(added <= ADDED_LIMIT_S and running <= RUNNING_LIMIT_S, control)
    return Result(
        value=added,
        spread=spread(found["runtime"]),
        unit="s",
        holds=holds,
        why=why,
        reference={"name": "subprocess.run", "value": plain, "spread": spread(found["bare"]), "unit": "s"},
        control=control,
        details={
            "running_s": running,
            "running_limit_s": RUNNING_LIMIT_S,
            "added_limit_s": ADDED_LIMIT_S,
            "least_added_s": min(found["runtime"]) - min(found["bare"]),
            "rounds": rounds,
            "confinement": confinement,
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
        },
    )


def rested(call: Callable[[], float]) -> Callable[[], float]:
    """Return the call with a pause before it."""

    def paused() -> float:
        time.sleep(PAUSE_S)
        return call()

    return paused


class World:
    """Starts commands under leases of their own, and checks how they ended."""

    def __init__(self, runtime: ProcessRuntime, folder: Path) -> None:
        self._runtime, self._folder = runtime, folder
        self._clock = SystemClock()
        self._numbers = itertools.count()

    def _spec(self, *argv: str) -> StartSpec:
        name = f"start-{os.getpid()}-{next(self._numbers)}"
        worker = self._folder / name
        return StartSpec(
            lease_id=name,
            fence=1,
            attempt=1,
            argv=argv,
            workdir=str(worker),
            worker_dir=str(worker),
            log_path=f"{worker}.log",
            envelope=Envelope(),
            deadline_boot_s=self._clock.boot_s() + 60,
            boot_id=self._clock.boot_id(),
        )

    def _end(self, spec: StartSpec) -> Exit:
        handle = self._runtime.start(spec)
        ended = self._runtime.wait(handle, 30)
        assert ended is not None, "the command did not end within 30 s"
        assert ended.kind is ExitKind.COMPLETED, f"the command ended {ended.kind}: {ended.witness}"
        assert not procfs.is_alive(handle.pid, handle.start_ticks), "its shim outlived the record"
        return ended

    def whole(self) -> float:
        """Return the seconds from the order to the record of `/bin/true`."""
        spec = self._spec("/bin/true")
        begun_s = time.perf_counter()
        self._end(spec)
        took_s = time.perf_counter() - begun_s
        self._runtime.forget(spec.lease_id)
        return took_s

    def running(self) -> float:
        """Return the seconds from the order until the command itself tells the time."""
        spec = self._spec("/bin/date", "+%s%N")
        begun_s = time.time()
        ended = self._end(spec)
        told_s = int(Path(spec.log_path).read_text()) / 1e9
        assert begun_s <= told_s <= ended.ended_at_s, f"date told {told_s}, outside {begun_s} to {ended.ended_at_s}"
        self._runtime.forget(spec.lease_id)
        return told_s - begun_s


def bare() -> float:
    """Return the seconds that `/bin/true` takes without a lease."""
    begun_s = time.perf_counter()
    subprocess.run(["/bin/true"], check=True)
    return time.perf_counter() - begun_s


def naive() -> float:
    """Return the seconds of `/bin/true` under a shim that is a fresh interpreter."""
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", _NAIVE], check=True)
    return time.perf_counter() - begun_s
