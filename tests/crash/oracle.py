"""Recounts after a run from what cannot be mistaken: process table, groups, files, and the journals outside the home.

The ledger is read too, but only to be compared with those. Each thing found wrong is a `Violation` of one of `KINDS`.
Not for: making things go wrong (`explorer`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sqlite3
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenure.runtimes.groups import own_groups

if TYPE_CHECKING:
    from tests.crash.explorer import Plan, Run

KINDS = (
    "double grant",
    "leaked",
    "lost lease",
    "lost record",
    "fence",
    "stuck",
)
"""double grant: two at once under one lease or as one worker, run again after it was through, more on a node than it has.
leaked: a process, group or lease folder that stays. lost lease: an answered lease that is missing, changed its name, or
ended for a reason that the journals refute. lost record: an answered run, trial, recommendation, result or change that is not
there exactly once. fence: one that did not grow, or two brokers that answered at the same time. stuck: not through in time."""
OWN_DEATHS = frozenset({"shim", "job"})
"""Roles whose kill takes the job with it: its lease may end failed, or its event be started again."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that must not be."""

    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Killed:
    """A kill, or another fault, that happened."""

    number: int
    how: str
    at_s: float
    pid: int
    point: str

    @property
    def role(self) -> str:
        return self.point.split("|")[0]


@dataclass(slots=True)
class Trace:
    """What the hooks noted."""

    hits: Counter[str] = field(default_factory=Counter)
    kills: list[Killed] = field(default_factory=list)
    answers: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Broker pid -> when it sent an answer to a client."""

    @staticmethod
    def read(path: Path) -> Trace:
        """Read a trace; a missing one is empty."""
        trace = Trace()
        with contextlib.suppress(FileNotFoundError), path.open() as stream:
            for line in stream:
                at, pid, text = line.rstrip("\n").split(" ", 2)
                if text.startswith("FIRED "):
                    _, number, how, point = text.split(" ", 3)
                    trace.kills.append(Killed(int(number), how, float(at), int(pid), point))
                    continue
                trace.hits[text] += 1
                if text.startswith("broker|send answer"):
                    trace.answers[int(pid)].append(float(at))
        return trace


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return a journal's lines; none when nobody wrote."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []


def last(path: Path, what: str) -> float:
    """Return when a line of this kind was last written; infinite for never."""
    return max((line["at_s"] for line in read_journal(path) if line["what"] == what), default=float("inf"))


def processes_of(folder: Path) -> dict[int, str]:
    """Return pid -> command line of each living process whose environment names the folder; zombies and ourselves left out."""
    needle = os.fsencode(str(folder)) + b"/"
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as stream:
                if needle not in stream.read():
                    continue
            with open(f"/proc/{name}/stat") as stream:
                if stream.read().rpartition(")")[2].split()[0] in "ZX":
                    continue
            with open(f"/proc/{name}/cmdline", "rb") as stream:
                found[int(name)] = stream.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
    return found


def lease_ids(journals: Path, home: Path) -> set[str]:
    """Return every lease id that the client was told, a job found in its environment, or a node keeps a folder of."""
    found = {line["lease"] for name in ("client", "jobs") for line in read_journal(journals / name) if "lease" in line}
    found |= {lease for line in read_journal(journals / "client") for lease in line.get("leases", ())}
    return found | {path.name for path in lease_folders(home)}


def lease_folders(home: Path) -> list[Path]:
    """Return what the nodes still keep of leases."""
    return sorted(home.glob("nodes/*/leases/*"))


def groups_of(folder: Path, leases: set[str]) -> list[str]:
    """Return the control groups of these leases, and those that an agent of the folder made to try whether it may."""
    with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as membership:
        parents = set(own_groups(mounts.read(), membership.read()).values())
    pids = {line.split(" ", 2)[1] for line in _lines(folder / "trace")}
    found = []
    for parent in parents:
        with contextlib.suppress(OSError):
            for name in os.listdir(parent):
                match = re.fullmatch(r"tenure\.(.+)\.(\d+)", name)
                if match and (match[1] in leases or (match[1] == "probe" and match[2] in pids)):
                    found.append(f"{parent}/{name}")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def litter(folder: Path) -> list[str]:
    """Return small files that a kill left and nobody will miss: drafts that never got their name, sockets of the dead."""
    found = [str(path.relative_to(folder)) for path in (folder / "home").rglob("*.tmp")]
    found += [str(path.relative_to(folder)) for path in (folder / "home").glob(".socket-dir.*")]
    found += [str(path.relative_to(folder)) for path in (folder / "run").rglob("*.sock")]
    return sorted(found)


class Ledger:
    """What the ledger says, read by plain SQL."""

    def __init__(self, home: Path) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{home}/ledger.sqlite?mode=ro", uri=True)) as connection:

            def rows(query: str) -> list[tuple[Any, ...]]:
                return connection.execute(query).fetchall()

            self.leases = {row[0]: json.loads(row[1]) for row in rows("select id, body from leases")}
            self.exits = {(row[0], row[1]): row[2] for row in rows("select lease_id, attempt, kind from exits")}
            self.trials = Counter(row[0] for row in rows("select id from trials"))
            self.recommendations = Counter(row[0] for row in rows("select id from recommendations"))
            self.runs = {row[0]: row[1] for row in rows("select id, state from runs")}
            self.started = [
                json.loads(row[0])["fence"] for row in rows("select data from events where kind='broker.started' order by seq")
            ]
            self.granted = rows("select fence from leases where fence > 0")


def judge(
    run: Run, plan: Plan, trace: Trace, *, left: dict[int, str], failures: list[tuple[int, str]], through: bool
) -> list[Violation]:
    """Return everything that is wrong after a run. left: what still lives; failures: (code, output) of clients that failed."""
    killed_clients = sum(kill.role == "client" and kill.how == "kill" for kill in trace.kills)
    others = len(trace.kills) - killed_clients
    failed = [f for f in failures if f[0] != -9]
    stuck = Violation(
        "stuck",
        f"the client was not through ({len(failures)} failed runs): "
        + "; ".join(f"code {code}: {text.strip()[-400:]}" for code, text in failed[-2:]),
    )
    if not through:
        return [stuck]
    found = [stuck] if len(failed) > others else []
    found += [Violation("leaked", f"process {pid} still lives: {line}") for pid, line in left.items()]
    found += [Violation("leaked", f"group {group}") for group in groups_of(run.folder, run.leases())]
    found += [Violation("leaked", f"lease folder {path.relative_to(run.home)}") for path in lease_folders(run.home)]
    ledger = Ledger(run.home)
    client, jobs = read_journal(run.journals / "client"), read_journal(run.journals / "jobs")
    lossy = any(kill.role in OWN_DEATHS and kill.how == "kill" for kill in trace.kills)
    found += _doubles(ledger, jobs, lossy)
    found += _leases(ledger, client, jobs, lossy)
    found += _records(ledger, client)
    found += _fences(ledger, client, jobs, trace)
    return found


def _doubles(ledger: Ledger, jobs: list[dict[str, Any]], lossy: bool) -> list[Violation]:
    found = []
    starts = [line for line in jobs if line["what"] == "start"]
    for line in starts:
        if line["others"]:
            found.append(
                Violation("double grant", f"attempt {line['attempt']} of {line['stage']} found alive: {line['others']}")
            )
    through = Counter((line["stage"], line["worker"], line["event"]) for line in jobs if line["what"] == "through")
    begun = Counter((line["stage"], line["worker"], line["event"]) for line in starts)
    for key, count in begun.items():
        if count > 1 and not lossy:
            found.append(Violation("double grant", f"{key} was started {count} times, and no job or shim was killed"))
    for key, count in through.items():
        if count > 1 and not lossy:
            found.append(Violation("double grant", f"{key} was through {count} times"))
    found += _crowded(ledger, jobs)
    return found


def _crowded(ledger: Ledger, jobs: list[dict[str, Any]]) -> list[Violation]:
    """More running on a node at one moment than it has, by the journals' times and the envelopes asked for."""
    moments = []
    for line in jobs:
        lease = ledger.leases.get(line["lease"])
        if line["what"] == "start" and lease is not None:
            key = (line["lease"], line["attempt"])
            end = next((o["at_s"] for o in jobs if o["what"] == "through" and (o["lease"], o["attempt"]) == key), None)
            if end is not None:
                moments += [(line["at_s"], 1, lease), (end, -1, lease)]
    memory: Counter[str] = Counter()
    found = []
    for _, sign, lease in sorted(moments, key=lambda moment: moment[:2]):
        memory[lease["node"]] += sign * lease["envelope"]["memory_bytes"]
        if memory[lease["node"]] > 200 << 20:
            found.append(Violation("double grant", f"node {lease['node']} held {memory[lease['node']]} bytes at once"))
    return found


def _leases(ledger: Ledger, client: list[dict[str, Any]], jobs: list[dict[str, Any]], lossy: bool) -> list[Violation]:
    found = []
    promised: dict[str, list[str]] = {}
    for line in client:
        if line["what"] == "gang" and promised.setdefault(line["gang"], line["leases"]) != line["leases"]:
            found.append(Violation("lost lease", f"gang {line['gang']} was {promised[line['gang']]}, then {line['leases']}"))
    for gang, ids in promised.items():
        inside = sorted(lease_id for lease_id, lease in ledger.leases.items() if lease["gang_id"] == gang)
        if sorted(ids) != inside:
            found.append(Violation("lost lease", f"gang {gang} was promised {ids}, the ledger has {inside}"))
        fences = {ledger.leases[lease_id]["fence"] for lease_id in ids if lease_id in ledger.leases}
        if len(fences) > 1:
            found.append(Violation("lost lease", f"gang {gang} was not granted at once: fences {sorted(fences)}"))
    through = {line["lease"] for line in jobs if line["what"] == "through" and line["state"] == "done"}
    for lease_id, lease in ledger.leases.items():
        name, state, reason = lease["gang_id"], lease["state"], lease["end_reason"]
        if state != "ended":
            found.append(Violation("lost lease", f"lease of {name} is {state} after the shutdown"))
            continue
        wanted = "released" if name == "sleep" else "completed"
        if reason != wanted and not (lossy and reason == "failed"):
            did = "was through" if lease_id in through else "was not through"
            found.append(
                Violation(
                    "lost lease", f"lease of {name} ended {reason}, should be {wanted}; it {did}; {lease['end_detail'][:300]}"
                )
            )
        if reason == "completed" and lease_id not in through:
            found.append(Violation("lost lease", f"lease of {name} ended completed, but its job was never through"))
    return found


def _records(ledger: Ledger, client: list[dict[str, Any]]) -> list[Violation]:
    found = []
    for line in client:
        what = line["what"]
        if what == "run" and line["run"] not in ledger.runs:
            found.append(Violation("lost record", f"run {line['run']} was answered and is not there"))
        if what == "trial" and ledger.trials[line["trial"]] != 1:
            found.append(Violation("lost record", f"trial {line['trial']} is there {ledger.trials[line['trial']]} times"))
        if what == "recommendation" and ledger.recommendations[line["recommendation"]] != 1:
            found.append(
                Violation("lost record", f"recommendation is there {ledger.recommendations[line['recommendation']]} times")
            )
        if what == "renewed" and ledger.leases[line["lease"]]["ends_at_s"] < line["ends_at_s"] - 1e-3:
            found.append(Violation("lost record", f"a renewal to {line['ends_at_s']} was answered; the ledger has less"))
        if what == "resized":
            kept = ledger.leases[line["lease"]]["envelope"]["memory_bytes"]
            if kept != line["memory_bytes"]:
                found.append(
                    Violation("lost record", f"a resize to {line['memory_bytes']} was answered; the ledger has {kept}")
                )
            if line.get("group_bytes") not in (None, line["memory_bytes"]):
                found.append(
                    Violation(
                        "lost record", f"a resize to {line['memory_bytes']} was answered; the group has {line['group_bytes']}"
                    )
                )
    if any(line["what"] == "done" for line in client) and ledger.runs.get("r1") != "done":
        found.append(Violation("lost record", f"the run was set done and is {ledger.runs.get('r1')}"))
    return found


def _fences(ledger: Ledger, client: list[dict[str, Any]], jobs: list[dict[str, Any]], trace: Trace) -> list[Violation]:
    found = []
    if sorted(set(ledger.started)) != ledger.started:
        found.append(Violation("fence", f"brokers started with fences {ledger.started}"))
    told = [line["fence"] for line in client if line["what"] in ("status", "done")]
    if sorted(told) != told:
        found.append(Violation("fence", f"clients were told the fences {told}"))
    for line in jobs:
        lease = ledger.leases.get(line["lease"])
        if lease is None:
            found.append(Violation("lost lease", f"a job ran for lease {line['lease']}, which the ledger does not know"))
        elif line["fence"] != lease["fence"]:
            found.append(
                Violation("fence", f"a job of {lease['gang_id']} ran with fence {line['fence']}, not {lease['fence']}")
            )
    spans = sorted((min(times), max(times), pid) for pid, times in trace.answers.items())
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            found.append(Violation("fence", f"brokers {one} and {other} answered at the same time"))
    return found
