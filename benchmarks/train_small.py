"""How soon sixteen trivial tasks are through, each under a lease of its own, and what an idle training worker weighs.

World: a broker and one agent with two cores, both up, the fork server warm, the strongest confinement found here (its
sentence is in the details), the ledger a SQLite file. A task is a Python process that computes a square and prints it; its
envelope (1/8 core, 64 MiB, 30 s) is enforced, its lease, attempt and exit are rows of the ledger. One client asks for the
sixteen one by one.
Measured: wall time from the first request until the client holds the sixteenth exit: median of 10 rounds (--quick: 4), one to
warm up. In the same rounds, for the details: the sixteen asked for at once, as one gang.
Second: a training worker (two of a stage of 16 shards, NumPy program, tiny data), waiting for the other one, which is held
back by its program: anonymous + shared + kernel memory as the envelope counts it (the lease's own figure), and RSS of its
process, which counts file pages too; the higher of three looks.
Third: from the order to a worker's first gradient in hand: both as CLOCK_BOOTTIME, told by the runtime's note to the worker and
by the program; median over both workers of 5 stages (--quick: 2).
Bars: sixteen in 1 s; idle worker 30 MB of envelope memory; first NumPy step after 0.5 s. All must hold.
Checked: sixteen different leases, each `completed` with its exit record and the right square as its output; both workers of
every stage `completed`, with its result.
Reference: Lithops 3.8 on its local host, 0.5 to 10 s (noted on a machine of this kind; not run here).
Control: each task under a shim that is a fresh interpreter, one after the other: it must miss the first bar.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.jobs import Command
from tenure.leases import EndReason
from tenure.meter.machine import capacity
from tenure.resources import Envelope
from tenure.runs import RunFiles
from tenure.train import spec as train
from tenure.wire import GangMember, LeaseView, RequestGang

NAME = "train_small"
BAR = "16 trivial tasks under leases of their own in 1 s; an idle training worker 30 MB; its first NumPy step after 0.5 s"
TASKS = 16
TASKS_LIMIT_S, IDLE_LIMIT_BYTES, STEP_LIMIT_S = 1.0, 30e6, 0.5
WAIT_S = 60.0
LOOKS = 3
MIB = 1 << 20
_NAIVE = "import subprocess, sys, tenure.runtimes.shim; sys.exit(subprocess.call([sys.executable, '-c', 'print(7 * 7)']))"
_PROGRAM = """
import os, time
import numpy as np

class Tiny:
    def __init__(self, go):
        self.go = go
    def data(self, inputs):
        x = np.arange(64, dtype=np.float32).reshape(16, 4)
        return {"x": x}, {"x": x}
    def build(self, seed):
        return {"w": np.zeros(4, np.float32)}
    def gradient(self, weights, batch, rng):
        summed = {"w": batch["x"].sum(axis=0) @ np.eye(4, dtype=np.float32)}
        if not os.path.exists(note := os.environ["TENURE_WORKER_DIR"] + "/first"):
            open(note, "w").write(f"{time.clock_gettime(time.CLOCK_BOOTTIME) - float(os.environ['TENURE_STARTED_BOOT_S'])}")
        while os.environ["TENURE_WORKER"] == "1" and not os.path.exists(self.go):
            time.sleep(0.05)
        return summed, 0.0, len(batch["x"])
    def update(self, weights, summed, n, round_):
        return {"w": weights["w"] + summed["w"]}
    def evaluate(self, weights, held_out):
        return 0.0
"""


def run(options: Options) -> Result:
    """Measure tasks, gang and control in interleaved rounds; then the training workers, stage by stage."""
    rounds, stages = (4, 2) if options.quick else (10, 5)
    with tempfile.TemporaryDirectory(prefix="small-") as folder, _own_broker(Path(folder)) as client:
        node = client.status().nodes[0]
        contenders: dict[str, Callable[[], float]] = {
            "tasks": lambda: tasks(client, gang=False),
            "gang": lambda: tasks(client, gang=True),
            "naive": naive,
        }
        found = interleaved(contenders, rounds, seed=options.seed, warm_up=1)
        looks = [idle_worker(client, Path(folder), number) for number in range(stages)]
    steps = [seconds for look in looks for seconds in look["first_s"]]
    idle = max(look["memory_bytes"] for look in looks)
    value, naive_s = median(found["tasks"]), median(found["naive"])
    control = Control(
        name="a fresh interpreter as each shim",
        value=naive_s,
        failed=naive_s > TASKS_LIMIT_S,
        how=f"bar {TASKS_LIMIT_S} s",
    )
    holds, why = judge(
        value <= TASKS_LIMIT_S and idle <= IDLE_LIMIT_BYTES and median(steps) <= STEP_LIMIT_S,
        control,
    )
    return Result(
        value=value,
        spread=spread(found["tasks"]),
        unit="s",
        holds=holds,
        why=why,
        reference={"name": "Lithops 3.8, local host (noted)", "value": 0.5, "highest": 10.0, "unit": "s"},
        control=control,
        details={
            "tasks_s": found["tasks"],
            "gang_s": median(found["gang"]),
            "idle_memory_bytes": idle,
            "idle_rss_bytes": max(look["rss_bytes"] for look in looks),
            "idle_limit_bytes": IDLE_LIMIT_BYTES,
            "first_step_s": median(steps),
            "first_step_spread_s": spread(steps),
            "first_step_limit_s": STEP_LIMIT_S,
            "confinement": node.confinement["process"],
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
        },
    )


@contextlib.contextmanager
def _own_broker(folder: Path) -> Iterator[BrokerClient]:
    """A broker, an agent with two cores, sockets and shares of its own; all ended afterwards."""
    before = dict(os.environ)
    os.environ.update(TENURE_SHARES_FILE=str(folder / "shares.json"), XDG_RUNTIME_DIR=str(folder))
    try:
        cpus = min(2.0, capacity().cpus)
        start_broker(folder / "home", persistent=True, nodes=(f"small:{cpus:g}:2GiB",))
        with connect(folder / "home") as client:
            try:
                yield client
            finally:
                client.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


_numbers = itertools.count()


def tasks(client: BrokerClient, *, gang: bool) -> float:
    """Return the seconds that TASKS tasks take, asked for one by one or as one gang."""
    batch = next(_numbers)
    envelope = Envelope(cpus=1 / 8, memory_bytes=64 * MIB, slot_s=30.0, total_s=30.0)
    members = [
        GangMember(
            worker=number,
            envelope=envelope,
            command=Command(argv=(sys.executable, "-c", f"print({number} ** 2)")),
        )
        for number in range(TASKS)
    ]
    gangs = [members] if gang else [[member] for member in members]
    began_s = time.perf_counter()
    ids = [
        lease.id
        for number, asked in enumerate(gangs)
        for lease in client.request_gang(
            RequestGang(gang_id=f"g{batch}-{number}", run_id=f"tasks-{batch}", stage="map", members=tuple(asked))
        )
    ]
    views = client.wait_leases(ids, timeout_s=WAIT_S)
    took_s = time.perf_counter() - began_s
    assert len(set(ids)) == TASKS
    for view in views:
        assert view.lease.end_reason is EndReason.COMPLETED, f"{view.lease.end_reason}: {view.lease.end_detail}"
        (end,) = view.exits
        assert end.log_tail.split() == [str(view.lease.worker**2)], end
    return took_s


def naive() -> float:
    """Return the seconds that TASKS tasks take, each with a shim that has to be started first."""
    began_s = time.perf_counter()
    for _ in range(TASKS):
        done = subprocess.run([sys.executable, "-c", _NAIVE], check=True, stdout=subprocess.PIPE)
        assert done.stdout.split() == [b"49"]
    return time.perf_counter() - began_s


def idle_worker(client: BrokerClient, folder: Path, number: int) -> dict[str, Any]:
    """Run a stage of two workers, the second held back; return how soon both took a step, and what the first weighs."""
    (folder / "tiny.py").write_text(_PROGRAM)
    go, files = folder / f"go-{number}", RunFiles(folder / "home", f"train-{number}")
    spec = train.TrainSpec(program="tiny.py:Tiny", folder=str(folder), options={"go": str(go)}, shards=TASKS, max_rounds=1)
    train.write_spec(files.stage("train"), spec)
    train.publish_event(files.stage("train"), train.start_event(2))
    envelope = Envelope(cpus=1.0, memory_bytes=128 * MIB, slot_s=60.0, total_s=60.0)
    members = tuple(GangMember(worker=worker, envelope=envelope, command=train.command()) for worker in range(2))
    leases = client.request_gang(RequestGang(gang_id=f"t{number}", run_id=files.run_id, stage="train", members=members))
    client.nudge(files.run_id, "train")
    notes = [files.worker("train", worker, 1) / "first" for worker in range(2)]
    first = leases[0].id
    _until(lambda: all(note.exists() for note in notes), client, first)
    memory, rss, at_s = [], [], 0.0
    while len(memory) < LOOKS:
        usage = _until(lambda seen_s=at_s: (u := client.lease(first).usage) and u.at_s > seen_s and u, client, first)
        at_s = usage.at_s
        memory.append(usage.memory_bytes)
        rss.append(_rss_bytes(folder / "home" / "nodes" / "small" / "leases" / first))
    go.touch()
    for view in client.wait_leases([lease.id for lease in leases], timeout_s=WAIT_S):
        assert view.lease.end_reason is EndReason.COMPLETED, f"{view.lease.end_reason}: {view.lease.end_detail}"
    assert (files.store("train") / "result").exists()
    first_s = [float(note.read_text()) for note in notes]
    return {"first_s": first_s, "memory_bytes": max(memory), "rss_bytes": max(rss)}


def _until(condition: Callable[[], Any], client: BrokerClient, lease_id: str) -> Any:
    """Poll until the condition gives something true, and return it; the lease must live meanwhile."""
    end_s = time.monotonic() + WAIT_S
    while not (value := condition()):
        view: LeaseView = client.lease(lease_id)
        assert not view.lease.ended_at_s, f"the worker ended {view.lease.end_reason}: {view.lease.end_detail}"
        assert time.monotonic() < end_s, "a training worker was not ready in time"
        time.sleep(0.05)
    return value


def _rss_bytes(lease: Path) -> int:
    """Return the resident set of a lease's job (proc(5), statm), file pages included."""
    pid = json.loads((lease / "shim.json").read_bytes())["job_pid"]
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
