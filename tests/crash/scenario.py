"""The client of the scenario: asks for everything once, keeps a journal of what it was answered, waits, shuts down.

``python scenario.py HOME JOURNALS LINGER_S``. Run again after it was killed it asks for the same things under the same keys.
Exit code 0 once all is done and the home is shut down; otherwise the error on stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.errors import IllegalChange, Unavailable
from tenure.jobs import Command
from tenure.leases import Lease, LeaseState
from tenure.nodes import Machine
from tenure.resources import Envelope
from tenure.runs import Run, RunState, Stage
from tenure.runtimes.groups import own_groups
from tenure.trials import Recommendation, Trial
from tenure.usage import summarize
from tenure.wire import GangMember, RequestGang

MIB = 1 << 20
NODES = ("a:0.5:200MiB", "b:0.5:200MiB")
JOB = Path(__file__).with_name("job.py")
RUN = "r1"
EVENTS = 3
WAIT_S = 40.0
NODE_BACK_MAX_S = 15.0
SMALL = Envelope(cpus=0.1, memory_bytes=32 * MIB, slot_s=40.0, total_s=120.0)
LARGER = Envelope(cpus=0.15, memory_bytes=40 * MIB, slot_s=40.0, total_s=120.0)
HALF = Envelope(cpus=0.2, memory_bytes=120 * MIB, slot_s=40.0, total_s=120.0)
"""More than half of a node's memory: a gang of two spans both."""


class Journal:
    """What the client was answered, one line each, outside the home."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "client", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, what: str, **fields) -> None:
        line = {"at_s": time.clock_gettime(time.CLOCK_BOOTTIME), "pid": os.getpid(), "what": what} | fields
        os.write(self._fd, json.dumps(line).encode() + b"\n")


def gang(client: BrokerClient, journal: Journal, name: str, envelope: Envelope, members: int, command: Command) -> list[str]:
    """Ask for a gang and note the ids that were promised."""
    wanted = tuple(GangMember(worker=worker, envelope=envelope, command=command) for worker in range(members))
    leases = client.request_gang(RequestGang(gang_id=name, run_id=RUN, stage=name, members=wanted, queue_s=WAIT_S))
    ids = [lease.id for lease in leases]
    journal.note("gang", gang=name, leases=ids)
    return ids


def wait(client: BrokerClient, journal: Journal, ids: list[str], until: str) -> None:
    """Wait for leases, a bounded time."""
    views = client.wait_leases(ids, until=until, timeout_s=WAIT_S)
    for view in views:
        lease = view.lease
        journal.note(until, lease=lease.id, state=lease.state, reason=lease.end_reason, fence=lease.fence)
        if until == "ended" and lease.state is not LeaseState.ENDED:
            raise SystemExit(f"lease {lease.id} ({lease.stage}) is still {lease.state} after {WAIT_S:g} s")


def patiently(ask: Callable[[], Lease]) -> Lease:
    """Ask again, a bounded time, while the lease's node is away: the broker says so instead of waiting for it."""
    end_s = time.monotonic() + NODE_BACK_MAX_S
    while True:
        try:
            return ask()
        except Unavailable:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)


def change(client: BrokerClient, journal: Journal, lease_id: str) -> None:
    """Renew and resize the sleeper; in a later run it may have been released already."""
    if client.lease(lease_id).lease.state in (LeaseState.DRAINING, LeaseState.ENDED):
        return
    renewed = patiently(lambda: client.renew(lease_id, 50.0))
    journal.note("renewed", lease=lease_id, ends_at_s=renewed.ends_at_s)
    resized = patiently(lambda: client.resize(lease_id, LARGER))
    held = group_bytes(f"tenure.{lease_id}.{resized.attempt}")
    journal.note("resized", lease=lease_id, memory_bytes=resized.envelope.memory_bytes, group_bytes=held)


def group_bytes(name: str) -> int | None:
    """Return the memory limit that the kernel holds for a control group; None where there is no such group."""
    with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as membership:
        groups = own_groups(mounts.read(), membership.read())
    for controller, file in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        try:
            return int(Path(groups.get(controller, "/none"), name, file).read_text())
        except (OSError, ValueError):
            continue
    return None


def main(home: Path, journals: Path, linger_s: float) -> None:
    """Ask, wait, linger, shut down."""
    journal = Journal(journals)
    jobs = str(journals / "jobs")

    def command(mode: str, seconds: float, **fields) -> Command:
        return Command(argv=(sys.executable, "-S", "-E", str(JOB), jobs, mode, str(seconds)), grace_s=2.0, **fields)

    journal.note("begun")
    start_broker(home, nodes=NODES)
    with connect(home, who="scenario") as client:
        status = client.status()
        journal.note("status", fence=status.fence)
        stages = tuple(Stage(name=name, kind="task") for name in ("sleep", "pair", "events"))
        run = Run(id=RUN, name="crash", tenant="default", job_file="", source="", stages=stages)
        journal.note("run", run=client.submit_run(run).id)
        sleeper = gang(client, journal, "sleep", SMALL, 1, command("sleep", 60.0))
        pair = gang(client, journal, "pair", HALF, 2, command("task", 0.15, expects_result=True))
        events = home / "runs" / RUN / "events" / "store" / "events"
        events.mkdir(parents=True, exist_ok=True)
        driven = gang(client, journal, "events", SMALL, 1, command("event", 0.02, on_event=True, expects_result=True))
        first = events / f"e{EVENTS - 1}.json"
        draft = first.with_name(f".first.{os.getpid()}")
        draft.write_text(json.dumps({"worker": 0, "left": EVENTS - 1}))
        try:
            os.link(draft, first)
        except FileExistsError:
            pass
        draft.unlink()
        client.nudge(RUN, "events")
        trial = Trial(
            id="t1", run_id=RUN, stage="pair", fingerprint="f", source="probe", configuration={"workers": 2},
            metrics={"round_s": summarize([1.0, 2.0])}, machine=Machine(cpu_model="x"),
        )  # fmt: skip
        client.record_trial(trial)
        journal.note("trial", trial=trial.id)
        client.record_recommendation(Recommendation(id="m1", run_id=RUN, stage="pair", goal="any", chosen=None, trials=("t1",)))
        journal.note("recommendation", recommendation="m1")
        wait(client, journal, sleeper, "active")
        try:
            change(client, journal, sleeper[0])
        except IllegalChange:
            if client.lease(sleeper[0]).lease.state not in (LeaseState.DRAINING, LeaseState.ENDED):
                raise
        wait(client, journal, pair, "ended")
        wait(client, journal, driven, "ended")
        time.sleep(linger_s)
        client.release(sleeper, why="the scenario is through with it")
        journal.note("released", lease=sleeper[0])
        wait(client, journal, sleeper, "ended")
        client.set_run(RUN, RunState.DONE)
        journal.note("done", fence=client.status().fence)
        client.shutdown()
        journal.note("shut")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
