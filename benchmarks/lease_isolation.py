"""Whether what runs in a container lease gets out of it, and what it costs a neighbour.

World: an engine of the benchmark's own; two tenants, alice (attacker) and bob (a web server with a published port); services
of this machine listening everywhere, on loopback, over UDP and on an abstract socket; a secret file of this machine.
Attempts: all of tests/attacks.py from inside one lease (socket of the engine, other tenant, services of the machine, files,
devices, mounts, namespaces, system calls, more processes than the bound, memory files), and four that aim at the lease's own
bounds: a memory bomb, a filled disk, a flood of output, a daemon that ignores SIGTERM past its deadline.
Value: attempts that succeed. Bar: 0 of at least 25.
Checked: that every attempt reported, that bob's server and the machine's services answer whoever may ask, and that the leases
of the four end for the reason they must.
Neighbour: a lease that repeats a fixed piece of work of about 1 ms and tells its 99th percentile per 0.4 s; beside it a lease
that spins, forks, churns memory and writes to disk, resting and working in turn: 20 pairs of phases of 1.5 s (--quick: 6).
Each lease has a processor of its own: Tenure sets no such sets yet, so the benchmark has the engine set them.
Second bar: the median of the pairs' ratios, beside over alone, at most 1.2. Needs two processors.
For the details, to tell causes apart: the same ratio of the work's own CPU time (what the hardware shares: caches, memory, a
core's two threads), and how often a second others took the processor from it; and all of it again, 6 pairs, with what of the
benchmark, the engine and the shims may be moved kept on the noise's processor. A processor in a cpuset is not the lease's
alone: everything that is in no cpuset runs there too, and must when the noise fills the other.
Control: the same attempts in a privileged container on the machine's network with the socket mounted, as root, without
limits: some must succeed.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import attacks
from tests.targets import SERVER, services_of_this_machine, targets_of

from benchmarks.containers import CLOCK, MIB, TENANT, World, world
from benchmarks.harness import Control, Options, Result, judge, median, spread
from tenure.protocols import ExitKind, RuntimeHandle
from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.container_network import LABEL

NAME = "lease_isolation"
BAR = "0 of at least 25 attempts get out of a container; a neighbour's p99 on its own processor rises to at most 1.2 x (median)"
LEAST = 25
RATIO_LIMIT = 1.2
PIDS = 64
MEMORY = 256 * MIB
WINDOW_S = 0.4
PHASE_S = 1.5
"""The noise rests and works in turn, by the machine's own clock, which both leases see."""
SETTLE_S = 0.2
"""At the beginning of a phase: work that was begun in the one before."""
CAPABILITIES = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
]
NEIGHBOUR = (
    "import hashlib, json, resource, time\nblock = b'x' * (1 << 20)\n"
    "def lost(): return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw\n"
    "while True:\n    end, took, cpu, before = time.monotonic() + 0.4, [], [], lost()\n    begun = time.monotonic()\n"
    "    while time.monotonic() < end:\n        at, of = time.perf_counter(), time.thread_time()\n"
    "        hashlib.sha1(block).digest(); cpu.append(time.thread_time() - of); took.append(time.perf_counter() - at)\n"
    "    took.sort(); cpu.sort(); rank = int(len(took) * 0.99); ended = time.monotonic()\n"
    "    print(json.dumps([begun, ended, took[rank], cpu[rank], (lost() - before) / (ended - begun)]), flush=True)\n"
)
NOISE = (
    "import os, subprocess, time\n"
    f"def turn():\n    while int(time.monotonic() / {PHASE_S}) % 2 == 0: time.sleep(0.01)\n"
    "def spin(): sum(range(10000))\n"
    "def churn():\n    x = bytearray(48 << 20); x[::4096] = b'x' * len(x[::4096])\n"
    "def write():\n    with open('noise', 'wb') as f: f.write(b'x' * (1 << 20)); f.flush(); os.fsync(f.fileno())\n"
    "def forks(): subprocess.run(['/bin/true'])\n"
    "for work in (spin, spin, spin, churn, churn, write, forks):\n"
    "    if os.fork() == 0:\n        while True: turn(); work()\n"
    "print('noisy', flush=True)\nos.wait()"
)
BOMBS = {
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 24))", ExitKind.OUT_OF_MEMORY),
    "filled disk": ("f = open('fill', 'wb')\nwhile True: f.write(b'x' * (1 << 20)); f.flush()", ExitKind.OUT_OF_DISK),
    "flood of output": ("while True: print('x' * 1000)", ExitKind.OUT_OF_DISK),
    "daemon past its deadline": (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0: os.setsid()\ntime.sleep(600)",
        ExitKind.OUT_OF_TIME,
    ),
}


def run(options: Options) -> Result:
    """Attack, bomb, listen to the neighbour, and attack from a container that is not confined."""
    with world() as here:
        victim = here.start("python3", "-S", "-c", SERVER, tenant="bob", lease="victim", ports={"http": 7000})
        _until(lambda: b"listening" in here.runtime.logs(victim), "bob's server listens")
        # The attacker's network must be there before its targets can be named.
        here.end(here.start("true"), stop=False)
        with services_of_this_machine() as services:
            targets = _targets(here, services)
            found = _attack(here, targets)
            open_found = _attack_unconfined(here, targets)
        here.end(victim)
        ends = {name: _bomb(here, code, kind) for name, (code, kind) in BOMBS.items()}
        pairs = _neighbour(here, 6 if options.quick else 20)
        apart = [] if options.quick else _neighbour(here, 6, apart=True)
    escaped = sorted(name for name, entry in found.items() if entry["escaped"]) + sorted(
        n for n, held in ends.items() if not held
    )
    number = len(found) + len(ends)
    assert number >= LEAST, f"only {number} attempts were made"
    assert set(found) == set(open_found), "the control made other attempts"
    succeeded = sorted(name for name, entry in open_found.items() if entry["escaped"])
    control = Control(
        name="a privileged container on the machine's network with the socket mounted and no limits",
        value=len(succeeded),
        failed=bool(succeeded),
        how=", ".join(succeeded),
    )
    ratios = [beside.p99_s / alone.p99_s for alone, beside in pairs]
    ratio = median(ratios) if ratios else None
    holds, why = judge(not escaped and (ratio is None or ratio <= RATIO_LIMIT), control)
    return Result(
        value=len(escaped),
        spread=0.0,
        unit="attempts that succeed",
        holds=holds,
        why=f"succeeded: {', '.join(escaped)}" if escaped else why,
        control=control,
        details={
            "attempts": number,
            "neighbour_ratio": ratio,
            "neighbour_ratio_spread": spread(ratios) if ratios else None,
            "neighbour_alone_p99_s": median([alone.p99_s for alone, _ in pairs]) if pairs else None,
            "neighbour_causes": _causes(pairs),
            "neighbour_with_the_rest_kept_off": _causes(apart),
            "pairs": len(pairs),
            "outcomes": {name: entry["why"] or "no" for name, entry in sorted(found.items())},
            "load_1min": os.getloadavg()[0],
        },
    )


def _targets(here: World, services: dict[str, Any]) -> dict[str, Any]:
    ours = json.loads(here.engine.ask("GET", "/networks")[1])
    (name,) = [each["Name"] for each in ours if LABEL in (each["Labels"] or {}) and each["Name"].endswith(f"-{TENANT}")]
    targets = targets_of(here.engine, name, here.folder, here.name("victim")) | services
    folders = {"other_folder": str(here.folder / "workers/victim"), "state": str(here.folder / "state")}
    return targets | folders | {"other_published": 7000, "pids": PIDS, "memory": MEMORY}


def _attack(here: World, targets: dict[str, Any]) -> dict[str, Any]:
    envelope = Envelope(cpus=1.0, memory_bytes=MEMORY, disk_bytes=64 * MIB)
    words = ("python3", "-S", "-c", attacks.program())
    handle = here.start(*words, lease="attacker", envelope=envelope, env={"TARGETS": json.dumps(targets)}, pids_max=PIDS)
    ended = here.runtime.wait(handle, 120)
    assert ended is not None, "the attempts did not end"
    assert ended.kind is ExitKind.COMPLETED, f"the attempts ended {ended.kind}: {ended.witness}"
    found = attacks.outcomes(here.runtime.logs(handle, max_bytes=1 << 20).decode())
    here.end(handle, stop=False)
    return found


def _attack_unconfined(here: World, targets: dict[str, Any]) -> dict[str, Any]:
    """Make the same attempts where nothing holds them: the control."""
    image = here.container(here.runtime.attach("victim"))["Config"]["Image"]
    socket = str(here.engine.socket)
    body: dict[str, Any] = {
        "Image": image,
        "Entrypoint": ["python3", "-S", "-c", attacks.program()],
        "User": "0:0",
        "Env": [f"TARGETS={json.dumps(targets)}"],
    }
    open_host = {"NetworkMode": "host", "Binds": [f"{socket}:/var/run/docker.sock", f"{socket}:{socket}"]}
    # A machine that lacks a capability itself (a virtual machine without CAP_SYS_RESOURCE) makes no privileged container: the
    # same by its parts then.
    by_parts = {"CapAdd": _own_capabilities(), "SecurityOpt": ["seccomp=unconfined"], "MaskedPaths": [], "ReadonlyPaths": []}
    for rights in ({"Privileged": True}, by_parts):
        here.engine.ask("DELETE", "/containers/unconfined?force=1")
        status, said = here.engine.ask("POST", "/containers/create?name=unconfined", body | {"HostConfig": open_host | rights})
        assert status == 201, said
        status, said = here.engine.ask("POST", "/containers/unconfined/start")
        if status == 204:
            break
    assert status == 204, said
    _until(lambda: not here.engine.inspect("unconfined")["State"]["Running"], "the control's attempts end", 120)
    lines = here.engine.ask("GET", "/containers/unconfined/logs?stdout=1")[1]
    here.engine.ask("DELETE", "/containers/unconfined?force=1&v=1")
    pieces = []
    while len(lines) >= 8:  # Docker Engine API, "Stream format"
        size = int.from_bytes(lines[4:8], "big")
        pieces.append(lines[8 : 8 + size])
        lines = lines[8 + size :]
    return attacks.outcomes(b"".join(pieces).decode())


def _own_capabilities() -> list[str]:
    """Return the names of the capabilities that this process may have itself (capabilities(7), by number)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = int(next(line for line in lines if line.startswith("CapBnd")).split()[1], 16)
    return [name for number, name in enumerate(CAPABILITIES) if held >> number & 1]


def _bomb(here: World, code: str, kind: ExitKind) -> bool:
    """Return whether the lease ended for the reason it must, and nothing of it runs."""
    envelope = Envelope(cpus=1.0, memory_bytes=64 * MIB, disk_bytes=32 * MIB)
    late = kind is ExitKind.OUT_OF_TIME
    spec = here.spec("python3", "-S", "-c", code, envelope=envelope, grace_s=0.5)
    handle = here.runtime.start(spec)
    if late:
        here.runtime.renew(handle, deadline_boot_s=CLOCK.boot_s() + 1.0, fence=1)
    ended = here.end(handle, stop=False)
    left = [each for each in here.engine.containers() if each["Labels"].get("tenure.lease") == spec.lease_id]
    return ended.kind is kind and not left


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What the neighbour tells of one phase."""

    p99_s: float
    p99_cpu_s: float
    """Of the same pieces of work, what they took of the processor."""
    lost_per_s: float
    """How often others took the processor from it."""


def _causes(pairs: list[tuple[Heard, Heard]]) -> dict[str, float] | None:
    if not pairs:
        return None
    return {
        "ratio": median([beside.p99_s / alone.p99_s for alone, beside in pairs]),
        "cpu_ratio": median([beside.p99_cpu_s / alone.p99_cpu_s for alone, beside in pairs]),
        "lost_per_s_alone": median([alone.lost_per_s for alone, _ in pairs]),
        "lost_per_s_beside": median([beside.lost_per_s for _, beside in pairs]),
    }


def _neighbour(here: World, number: int, *, apart: bool = False) -> list[tuple[Heard, Heard]]:
    """Return what the neighbour tells alone and beside the noise, in pairs, each on its own processor; none where there is one.

    apart: keep engine, shims and the benchmark on the noise's processor meanwhile.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        return []
    quiet = here.start("python3", "-S", "-c", NEIGHBOUR, tenant="bob", lease="neighbour")
    noisy = here.start("python3", "-S", "-c", NOISE, lease="noise", pids_max=PIDS)
    for lease, processor in (("neighbour", processors[0]), ("noise", processors[1])):
        _order(here, f"/containers/{here.name(lease)}/update", {"CpusetCpus": str(processor)})
    _until(lambda: b"noisy" in here.runtime.logs(noisy), "the noise begins")
    moved = _keep_on(processors[1], _ours(here, [quiet, noisy])) if apart else {}
    time.sleep((2 * number + 2) * PHASE_S)
    _put_back(moved)
    windows = [json.loads(line) for line in here.runtime.logs(quiet, max_bytes=4 << 20).decode().splitlines()]
    here.end(noisy)
    here.end(quiet)
    phases: dict[int, list[list[float]]] = {}
    for begun, ended, *heard in windows:
        phase = int(begun / PHASE_S)
        if begun - phase * PHASE_S >= SETTLE_S and int(ended / PHASE_S) == phase:
            phases.setdefault(phase, []).append(heard)
    means = {phase: _mean(found) for phase, found in phases.items()}
    pairs = [(means[phase], means[phase + 1]) for phase in sorted(means) if phase % 2 == 0 and phase + 1 in means]
    assert len(pairs) >= number, f"the neighbour told of {len(pairs)} pairs of phases only"
    return pairs[-number:]


def _mean(found: list[list[float]]) -> Heard:
    p99_s, p99_cpu_s, lost_per_s = (statistics.mean(column) for column in zip(*found, strict=True))
    return Heard(p99_s=p99_s, p99_cpu_s=p99_cpu_s, lost_per_s=lost_per_s)


def _ours(here: World, handles: list[RuntimeHandle]) -> set[int]:
    """Return the processes of this benchmark that are in no container: its own, the shims', the engine's."""
    found = {os.getpid(), here.runtime.fork_server_pid, *(handle.pid for handle in handles)}
    for pid in tuple(found - {os.getpid()}):
        found.update(procfs.descendants(pid))
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and str(here.engine.folder).encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.add(int(entry))
    return found


def _keep_on(processor: int, pids: set[int]) -> dict[int, set[int]]:
    """Have every thread of these run on one processor; return where each might run before."""
    before: dict[int, set[int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in (int(name) for name in os.listdir(f"/proc/{pid}/task")):
                before[task] = os.sched_getaffinity(task)
                os.sched_setaffinity(task, {processor})
    return before


def _put_back(before: dict[int, set[int]]) -> None:
    for task, processors in before.items():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(task, processors)


def _order(here: World, path: str, body: object = None) -> None:
    status, said = here.engine.ask("POST", path, body)
    assert status < 300, f"{path}: {status}, {said!r}"


def _until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
