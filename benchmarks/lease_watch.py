"""What watching 50 leases once a second costs, from the kernel's counters to the text that Prometheus reads.

World: a home with a broker and one agent, both real processes, their metrics endpoint open. 50 leases whose programs sleep,
each with its shim; on the process runtime, and in containers where a Docker Engine can be run (tests/docker_engine.py; else
the details say why not, and the process runtime's figure is the value).
Watching is: the agent reads every lease about once a second (CPU, memory, disk, processes) and tells the broker; the broker
takes it in and rolls it up; a client reads all of it from the metrics endpoint once a second.
Measured: CPU time (user + system, all threads, /proc/<pid>/schedstat of every task) of broker and agent together over a span
with the 50 leases and the reader, minus the same span of the same home with no lease and no reader (their idle loop), as a
share of one core. 3 spans of 15 s each way (--quick: 1 of 8 s); the value is the median with leases minus the median without.
The engine's own processes (dockerd, containerd) are in the details, counted in the same spans; so are the shims. A shim looks
at its lease's memory ten times a second to hold bounds and to know the peak, and writes down once a second what the lease uses,
whether or not anybody looks; the agent reads that. What a shim takes for it is not in the value: the details have it.
Bar: less than 0.01 of one core.
Checked in every span with leases before a figure counts: all 50 leases are active at both ends; each was read at least once
per 1.5 s (the times of its readings as the endpoint shows them); one more lease that burns a fifth of a core is seen to use
within 10 % + 0.1 s of the count of the scheduler; one more that holds 64 MiB shows 64 to 96 MiB.
Control: the same 50 trees read once a second by psutil's scan of the machine, from one thread; it must miss the bar.
Not counted: starting and ending the leases; the reader's own time (Prometheus is another's program); the two checked leases'
reading is counted, though they are more than 50.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from tests import docker_engine

from benchmarks.harness import Control, Options, Result, judge, median, spread
from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.jobs import Command, RuntimeName
from tenure.resources import Envelope
from tenure.wire import GangMember, RequestGang

NAME = "lease_watch"
BAR = "watching 50 leases at 1 Hz, endpoint read at 1 Hz, costs less than 0.01 of one core"
LIMIT_CORES = 0.01
LEASES = 50
STALE_S = 1.5
HELD_BYTES = 64 << 20
MIB = 1 << 20
START_MAX_S = 240.0
_BURN = """
import time
while True:
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass
    time.sleep(0.08)
"""
_HOLD = f"import time\ndata = bytearray(b'x') * {HELD_BYTES}\ntime.sleep(3600)"


@dataclass(frozen=True, slots=True)
class Span:
    """CPU seconds per second within one span."""

    broker: float
    agent: float
    shims: float
    engine: float

    @property
    def watching(self) -> float:
        """What the bar speaks of, as a share of one core."""
        return self.broker + self.agent


def run(options: Options) -> Result:
    """Measure on the process runtime, and in containers where an engine can be run and there is time for it."""
    spans, span_s = (1, 8.0) if options.quick else (3, 15.0)
    found = {"process": measure("process", spans, span_s)}
    missing = "--quick takes the process runtime only" if options.quick else docker_engine.why_absent()
    if not missing:
        with docker_engine.running() as engine:
            os.environ["DOCKER_HOST"] = f"unix://{engine.socket}"
            found["container"] = measure("container", spans, span_s)
    judged = found.get("container", found["process"])
    control = Control(
        name="psutil scan", value=judged.scan, failed=judged.scan > LIMIT_CORES, how=f"bar {LIMIT_CORES} of one core"
    )
    holds, why = judge(judged.value < LIMIT_CORES, control)
    return Result(
        value=judged.value,
        spread=spread([span.watching for span in judged.watched]),
        unit="cores",
        holds=holds,
        why=why,
        reference={"name": "the same home without leases", "value": median([s.watching for s in judged.idle]), "unit": "cores"},
        control=control,
        details={
            "runtimes": {name: each.details() for name, each in found.items()},
            "containers_missing": missing,
            "leases": LEASES,
            "load_1min": os.getloadavg()[0],
        },
    )


@dataclass(slots=True)
class Found:
    """What was measured on one runtime."""

    idle: list[Span] = field(default_factory=list)
    watched: list[Span] = field(default_factory=list)
    scan: float = 0.0

    @property
    def value(self) -> float:
        """Share of one core that the leases add."""
        return median([span.watching for span in self.watched]) - median([span.watching for span in self.idle])

    def details(self) -> dict[str, object]:
        """Return all figures, in cores."""
        parts = {
            f"{state}_{part}_cores": [round(getattr(span, part), 5) for span in spans]
            for state, spans in (("idle", self.idle), ("watched", self.watched))
            for part in ("broker", "agent", "shims", "engine")
        }
        return {"value_cores": self.value, "psutil_scan_cores": self.scan, **parts}


def measure(runtime: RuntimeName, spans: int, span_s: float) -> Found:
    """Alternate spans without and with leases."""
    found = Found()
    with home() as (client, port):
        for _ in range(spans):
            found.idle.append(span(client, span_s))
            leases = begin(client, runtime)
            checks = Reader(port, leases)
            with checks.reading():
                time.sleep(3.0)  # what starting left to do is done
                checks.begin()
                found.watched.append(span(client, span_s))
                checks.end(span_s)
            if not found.scan:
                found.scan = scan(span_s / 2)
            client.release(leases)
            client.wait_leases(leases, until="ended", timeout_s=60.0)
            time.sleep(2.0)
    return found


@contextlib.contextmanager
def home() -> Iterator[tuple[BrokerClient, int]]:
    """Give a client of a home with one node, and the port of its metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TENURE_SHARES_FILE"] = f"{folder}/shares"  # other agents of this machine have nothing to do with it
        start_broker(Path(folder) / "home", persistent=True)
        with connect(Path(folder) / "home", start=False) as client:
            try:
                client.add_node("local", cpus=1.0, memory_bytes=4096 * MIB, metrics_port=port)
                yield client, port
            finally:
                client.shutdown()
                time.sleep(1.0)


def begin(client: BrokerClient, runtime: RuntimeName) -> list[str]:
    """Have the leases run: the burner, the holder, and 50 that sleep; return their ids in this order."""

    def member(worker: int, *argv: str, cpus: float = 0.01, mib: int = 48) -> GangMember:
        envelope = Envelope(cpus=cpus, memory_bytes=mib * MIB, disk_bytes=16 * MIB, slot_s=900.0, total_s=900.0)
        return GangMember(worker=worker, envelope=envelope, command=Command(argv=argv, runtime=runtime))

    python = "python3" if runtime == "container" else sys.executable
    members = (
        member(0, python, "-S", "-c", _BURN, cpus=0.3),
        member(1, python, "-S", "-c", _HOLD, cpus=0.1, mib=128),
        *(member(number, "sleep", "3600") for number in range(2, LEASES + 2)),
    )
    gang = f"watched-{time.monotonic_ns()}"
    asked = client.request_gang(RequestGang(gang_id=gang, run_id=gang, stage="s", members=members, queue_s=30.0))
    ids = [lease.id for lease in sorted(asked, key=lambda lease: lease.worker)]
    end_s = time.monotonic() + START_MAX_S
    while any(view.lease.state != "active" for view in client.wait_leases(ids, until="active", timeout_s=30.0)):
        assert time.monotonic() < end_s, f"the leases were not active within {START_MAX_S:g} s"
    return ids


# --- what is read ---


class Reader:
    """Reads the endpoint once a second, as Prometheus would, and holds what it reads against the truth."""

    def __init__(self, port: int, leases: list[str]) -> None:
        self._url, self._leases = f"http://127.0.0.1:{port}/metrics", leases
        self._over = threading.Event()
        self._times: dict[str, set[float]] = {lease: set() for lease in leases}
        self._failed: list[str] = []
        self._burnt_s = self._seen_s = 0.0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read until the end."""
        thread = threading.Thread(target=self._read_all)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(20)

    def _read_all(self) -> None:
        while not self._over.wait(1.0):
            try:
                for lease, at_s in self.values("tenure_lease_sample_timestamp_seconds").items():
                    self._times.setdefault(lease, set()).add(at_s)
            except OSError as error:
                self._failed.append(str(error))

    def values(self, name: str) -> dict[str, float]:
        """Return one metric by lease."""
        with urllib.request.urlopen(self._url, timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {s.labels["lease"]: s.value for f in families for s in f.samples if s.name == name}

    def begin(self) -> None:
        """Check what is there, and take down the burner's counts."""
        self._check_there()
        self._times = {lease: set() for lease in self._leases}
        self._burnt_s = burnt_s()
        self._seen_s = self.values("tenure_lease_cpu_seconds_total")[self._leases[0]]

    def end(self, span_s: float) -> None:
        """Assert that all of it was read, often enough and rightly."""
        seen_s = self.values("tenure_lease_cpu_seconds_total")[self._leases[0]] - self._seen_s
        burnt = burnt_s() - self._burnt_s
        self._check_there()
        assert not self._failed, self._failed
        fewest = min(len(times) for times in self._times.values())
        assert fewest >= int(span_s / STALE_S), f"a lease was read {fewest} times in {span_s} s"
        assert burnt > 0.05 * span_s, f"the burner got only {burnt} s of CPU"
        # Its reading is up to a second old at both ends.
        assert abs(seen_s - burnt) <= 0.1 * burnt + 0.1 + 0.3, f"burner: seen {seen_s} s, truly {burnt} s"
        held = self.values("tenure_lease_memory_bytes")[self._leases[1]]
        assert HELD_BYTES <= held <= 1.5 * HELD_BYTES, f"holder: seen {held} bytes"

    def _check_there(self) -> None:
        there = self.values("tenure_lease_memory_bytes")
        missing = [lease for lease in self._leases if lease not in there]
        assert not missing, f"{len(missing)} leases are not told of"


# --- what it costs ---


def span(client: BrokerClient, span_s: float) -> Span:
    """Return the CPU that everybody took per second for so long."""
    before, begun_s = counts(client), time.monotonic()
    time.sleep(span_s)
    after, took_s = counts(client), time.monotonic() - begun_s
    return Span(*((after[part] - before[part]) / took_s for part in ("broker", "agent", "shims", "engine")))


def counts(client: BrokerClient) -> dict[str, float]:
    """Return CPU seconds so far by the scheduler's own count."""
    agent = agent_pid(client)
    shims = [p for p in psutil.Process(agent).children(recursive=True) if "python" in p.name() and not is_job(p)]
    engines = [p.pid for p in psutil.process_iter(["name"]) if p.info["name"] in ("dockerd", "containerd")]
    return {
        "broker": cpu_s(int((client.home / "broker.lock").read_text())),
        "agent": cpu_s(agent),
        "shims": sum(cpu_s(shim.pid) for shim in shims),
        "engine": sum(cpu_s(pid) for pid in engines),
    }


def is_job(process: psutil.Process) -> bool:
    """Return whether a process is the burner or the holder."""
    return bool({_BURN, _HOLD} & set(process.cmdline()))


def agent_pid(client: BrokerClient) -> int:
    """Return the agent of the home."""
    wanted = {"tenure.agent", str(client.home)}
    return next(p.pid for p in psutil.process_iter(["cmdline"]) if wanted <= set(p.info["cmdline"] or ()))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of all threads of a process; 0 for one that is gone."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def burnt_s() -> float:
    """Return the CPU seconds of the burner."""
    burners = [p.pid for p in psutil.process_iter(["cmdline"]) if _BURN in (p.info["cmdline"] or ())]
    assert len(burners) == 1, f"{len(burners)} burners run"
    return cpu_s(burners[0])


def scan(span_s: float) -> float:
    """Do the naive thing at the same rate from one thread; return its share of one core."""
    begun_s, cpu = time.monotonic(), time.thread_time()
    while time.monotonic() - begun_s < span_s:
        table = {p.info["pid"]: p.info for p in psutil.process_iter(["pid", "ppid", "name", "cpu_times", "memory_info"])}
        sleepers = [info for info in table.values() if info["name"] == "sleep"]
        assert len(sleepers) >= LEASES, f"only {len(sleepers)} sleepers were found"
        time.sleep(1.0)
    return (time.thread_time() - cpu) / (time.monotonic() - begun_s)
