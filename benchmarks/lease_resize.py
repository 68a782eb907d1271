"""How long a running container's new CPU and memory take, and whether anything dies of it.

World: an engine of the benchmark's own; one container lease whose job holds 64 MiB and counts. Each resize asks the runtime
(`ContainerRuntime.resize`) for one of two envelopes in turn, CPU and memory both different: 0.5 cpus with 128 MiB, 1.5 with
384.
Measured: wall time of the call, which returns when the kernel holds the new bounds: 1,000 resizes (--quick: 60).
Bar: the 99th percentile below 200 ms, and 0 deaths. The value is the 99th percentile; median and highest are in the details.
Checked: after every 20th, the kernel's memory limit and CPU quota are those asked for, and the engine's own record too; at
the end the job is the process that was started, has counted all the time, and ends as ordered. A refusal would be counted as
a death.
Control: a resize by restart (stop, start again with the new envelope), as where limits can't be changed live: it must miss
the bar.
"""

from __future__ import annotations

import os
import statistics
import time

from benchmarks.containers import MIB, World, world
from benchmarks.harness import Control, Options, Result, judge, median, spread
from tenure.errors import TenureError
from tenure.protocols import ExitKind, RuntimeHandle
from tenure.resources import Envelope
from tenure.runtimes.confine import Confinement
from tenure.runtimes.state import read_json

NAME = "lease_resize"
BAR = "CPU and memory of a running container change in less than 200 ms (99th percentile); 0 deaths in 1,000 resizes"
LIMIT_S = 0.2
ENVELOPES = (Envelope(cpus=0.5, memory_bytes=128 * MIB), Envelope(cpus=1.5, memory_bytes=384 * MIB))
JOB = (
    "import itertools, time\nx = bytearray(64 << 20); x[::4096] = b'x' * len(x[::4096])\n"
    "for n in itertools.count():\n    print(n, flush=True); time.sleep(0.05)"
)


def run(options: Options) -> Result:
    """Resize one lease again and again, then a few by restart."""
    number = 60 if options.quick else 1000
    with world() as here:
        handle = here.start("python3", "-S", "-c", JOB, envelope=ENVELOPES[1])
        first = here.container(handle)["State"]["Pid"]
        took_s, deaths = [], 0
        for turn in range(number):
            begun_s = time.perf_counter()
            try:
                here.runtime.resize(handle, ENVELOPES[turn % 2], fence=1)
            except TenureError:
                deaths += 1
            took_s.append(time.perf_counter() - begun_s)
            if turn % 20 == 19:
                _check(here, handle, ENVELOPES[turn % 2])
        assert here.runtime.wait(handle, 0) is None, "the lease has ended"
        assert here.container(handle)["State"]["Pid"] == first, "it is another process"
        counted = len(here.runtime.logs(handle).splitlines())
        assert counted > 10, f"the job counted to {counted} only"
        ended = here.end(handle)
        deaths += ended.kind is not ExitKind.STOPPED
        restarts_s = [_restart(here, turn) for turn in range(5)]
    value = statistics.quantiles(took_s, n=100)[98]
    naive = median(restarts_s)
    control = Control(name="resize by restart", value=naive, failed=naive >= LIMIT_S, how=f"bar {LIMIT_S} s")
    holds, why = judge(value < LIMIT_S and deaths == 0, control)
    return Result(
        value=value,
        spread=spread(took_s),
        unit="s",
        holds=holds,
        why=why,
        control=control,
        details={
            "resizes": number,
            "deaths": deaths,
            "median_s": median(took_s),
            "highest_s": max(took_s),
            "load_1min": os.getloadavg()[0],
        },
    )


def _check(here: World, handle: RuntimeHandle, envelope: Envelope) -> None:
    """Assert that kernel and engine hold the envelope."""
    note = read_json(here.runtime.state_dir / "leases" / handle.lease_id / "container.json")
    assert note is not None
    groups = Confinement.from_plan(note["groups"])
    assert groups.limit_bytes() == envelope.memory_bytes, f"the kernel holds {groups.limit_bytes()} bytes"
    said = here.container(handle)["HostConfig"]
    assert (said["Memory"], said["CpuQuota"]) == (envelope.memory_bytes, round(envelope.cpus * 100_000)), said


def _restart(here: World, turn: int) -> float:
    lease = f"restart-{turn}"
    handle = here.start("python3", "-S", "-c", JOB, lease=lease, envelope=ENVELOPES[1])
    begun_s = time.perf_counter()
    here.end(handle)
    again = here.start("python3", "-S", "-c", JOB, lease=lease, envelope=ENVELOPES[0])
    took_s = time.perf_counter() - begun_s
    here.end(again)
    return took_s
