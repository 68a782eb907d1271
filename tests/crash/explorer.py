"""Runs the scenario in a home of its own under a plan of kills, until it is through, and has the oracle look at what is left.

For: `record` (which points there are), `explore` (one plan), `Campaign` (many, side by side). Not for: what counts as a
violation (`oracle`), what is hooked (`hooks`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash import oracle

import tenure

HERE = Path(__file__).resolve().parent
SOURCE = Path(tenure.__file__).resolve().parent
MAX_CLIENTS = 6
"""Runs of the client after which a scenario that is still not through counts as stuck."""
CLIENT_MAX_S = 90.0
RECOVERY_MAX_S = 45.0
"""From the first kill until the scenario is through and shut down, at most. An undisturbed one takes about 3 s."""
GONE_MAX_S = 8.0
"""How soon after a shutdown nothing of the home may live any more."""
STOP = threading.Event()
"""Set to have every run under way end and clean up."""
LATE_S, LINGER_S = 4.0, 5.0
"""How late an order of a dead broker comes, and how long the client then stays for it."""
ROLES = ("client", "broker", "agent", "forkserver", "shim", "job")


class Stopped(Exception):
    """The exploration was interrupted."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A process ends itself by SIGKILL at the n-th hit of a point."""

    point: str
    n: int = 1
    late_s: float = 0.0
    """Above 0: what it was about to send arrives that much later all the same."""
    how: str = "kill"
    """``cut`` closes the stream that was about to be written to, ``stall`` stops the process for 2 s; nobody dies then."""

    def __str__(self) -> str:
        how = "" if self.how == "kill" else f"{self.how} "
        return f"{how}{self.point} #{self.n}" + f" late {self.late_s:g} s" * bool(self.late_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to go wrong in one run."""

    kills: tuple[Kill, ...] = ()
    """Each is armed once the one before it has happened."""
    control: str = ""
    """A protection that is taken out: the oracle must notice. See `hooks`."""
    fsync_s: float = 0.0
    """Every fsync and commit takes this much longer."""
    linger_s: float = 0.0
    """The client stays this much longer before it lets go of its last lease: time for what comes late."""

    def describe(self) -> str:
        """Return the plan in one line; equal for equal plans only."""
        parts = [self.control, f"fsync {self.fsync_s:g} s" * bool(self.fsync_s), " then ".join(map(str, self.kills))]
        return " ".join(part for part in parts if part) or "nothing"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one run came to."""

    plan: Plan
    fired: int = 0
    """How many of its kills happened: a point may not be reached this time."""
    violations: list[oracle.Violation] = field(default_factory=list)
    hits: Counter[str] = field(default_factory=Counter)
    clients: int = 0
    """How often the client had to be started."""
    wall_s: float = 0.0
    recovery_s: float = 0.0
    """From the first kill to the end of the scenario; 0 when nothing was killed."""
    litter: list[str] = field(default_factory=list)
    folder: str = ""
    """Kept when something was violated."""


def base_folder() -> str:
    """Return where homes go: memory, where there is some, because nothing here survives a power cut anyway."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


class Run:
    """One scenario in a folder of its own. Use as a context: leaving ends and removes all of it, whatever happened."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folder = Path(tempfile.mkdtemp(prefix="tx-", dir=base_folder()))
        self.home, self.journals = self.folder / "home", self.folder / "journals"
        self.trace = self.folder / "trace"
        self.plan_file = self.folder / "plan.json"
        self.keep = False

    def __enter__(self) -> Run:
        for folder in (self.journals, self.folder / "run", self.folder / "tmp"):
            folder.mkdir()
        kills = [{"point": kill.point, "n": kill.n, "late_s": kill.late_s, "how": kill.how} for kill in self.plan.kills]
        told = {"trace": str(self.trace), "source": str(SOURCE), "kills": kills}
        told |= {"control": self.plan.control, "fsync_s": self.plan.fsync_s}
        self.plan_file.write_text(json.dumps(told))
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(100):
            living = self.processes()
            if not living:
                break
            for pid in living:
                with _gone():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for group in oracle.groups_of(self.folder, self.leases()):
            with _gone():
                os.rmdir(group)
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if name in os.environ}
        return passed | {
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "TENURE_HOME": str(self.home),
            "TENURE_SHARES_FILE": str(self.folder / "shares.json"),
            "TENURE_CRASH": str(self.plan_file),
            "PYTHONPATH": os.pathsep.join([str(HERE / "hooks"), str(SOURCE.parent)]),
        }

    def processes(self) -> dict[int, str]:
        """Return pid -> command line of everything of this home that lives, whoever its parent is."""
        return oracle.processes_of(self.folder)

    def leases(self) -> set[str]:
        """Return the ids of all leases that any witness names."""
        return oracle.lease_ids(self.journals, self.home)

    def client(self) -> subprocess.CompletedProcess[str]:
        """Run the client to its end. A run that takes longer than CLIENT_MAX_S is killed: code 124."""
        argv = [sys.executable, str(HERE / "scenario.py"), str(self.home), str(self.journals), str(self.plan.linger_s)]
        with open(self.folder / "client.log", "a+") as log:
            begun = log.tell()
            process = subprocess.Popen(
                argv, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )
            try:
                code = _wait(process, CLIENT_MAX_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            log.seek(begun)
            return subprocess.CompletedProcess(argv, code, stdout=log.read())

    def wait_gone(self, timeout_s: float) -> dict[int, str]:
        """Return what still lives after at most `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while (living := self.processes()) and time.monotonic() < end_s:
            time.sleep(0.05)
        return living


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if STOP.is_set():
            raise Stopped
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)
    return 124


class _gone:
    """Suppress that something went by itself."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def explore(plan: Plan, *, keep: bool = False) -> Outcome:
    """Run the scenario under the plan to its end and have it judged. keep: leave the folder where something was violated."""
    outcome = Outcome(plan=plan)
    begun_s = time.monotonic()
    with Run(plan) as run:
        failures = []
        for _ in range(MAX_CLIENTS):
            outcome.clients += 1
            done = run.client()
            if done.returncode == 0:
                break
            failures.append((done.returncode, done.stdout[-1500:]))
        left = run.wait_gone(GONE_MAX_S)
        trace = oracle.Trace.read(run.trace)
        shut_s = oracle.last(run.journals / "client", "done")
        killed = 0
        while left and len(trace.kills) > killed and trace.kills[-1].at_s >= shut_s:
            # The broker or the client was killed while it shut down: what it left is told to leave by the next who asks.
            killed = len(trace.kills)
            outcome.clients += 1
            run.client()
            left = run.wait_gone(GONE_MAX_S)
            trace = oracle.Trace.read(run.trace)
        folders = oracle.lease_folders(run.home)
        if folders and not left:
            # An agent that was told to leave before it could forget: the next broker's first look must clear that away.
            outcome.clients += 1
            run.client()
            left = run.wait_gone(GONE_MAX_S)
        outcome.wall_s = time.monotonic() - begun_s
        outcome.fired = len({kill.number for kill in trace.kills})
        outcome.hits = trace.hits
        if trace.kills:
            outcome.recovery_s = max(0.0, oracle.last(run.journals / "client", "shut") - trace.kills[0].at_s)
        outcome.violations = oracle.judge(run, plan, trace, left=left, failures=failures, through=done.returncode == 0)
        if done.returncode == 0 and outcome.recovery_s - plan.linger_s > RECOVERY_MAX_S:
            late = f"it took {outcome.recovery_s:.1f} s from the kill to the end; the bound is {RECOVERY_MAX_S:g} s"
            outcome.violations.append(oracle.Violation("stuck", late))
        outcome.litter = oracle.litter(run.folder)
        if outcome.violations and keep:
            run.keep = True
            outcome.folder = str(run.folder)
    return outcome


def record(repeats: int = 2) -> tuple[dict[str, int], list[Outcome]]:
    """Return point -> how often it was hit (the least over the runs that hit it), and the undisturbed runs themselves."""
    outcomes = [explore(Plan(), keep=True) for _ in range(repeats)]
    points: dict[str, int] = {}
    for outcome in outcomes:
        for point, count in outcome.hits.items():
            points[point] = min(count, points.get(point, count))
    return points, outcomes


def singles(points: Mapping[str, int]) -> list[Plan]:
    """Return a plan for each point, at its first hit and at one in the middle; and for each order of the broker to an agent one
    in which the order arrives after its broker's death, when another one rules."""
    plans = [
        Plan(kills=(Kill(point, n),)) for point, count in sorted(points.items()) for n in sorted({1, max(1, (count + 1) // 2)})
    ]
    orders = [point for point in sorted(points) if re.match(r"broker\|send (?!answer)\w+\|before\|.*fleet/local", point)]
    plans += [Plan(kills=(Kill(point, max(1, points[point] // 2), LATE_S),), linger_s=LINGER_S) for point in orders]
    return plans


def faults(points: Mapping[str, int]) -> list[Plan]:
    """Return a plan for each message, at its first hit and at one in the middle, in which its stream is cut instead of anybody
    being killed, and one in which its sender stands still for a while: shorter than any term, so that nothing may change."""
    sends = [point for point in sorted(points) if re.match(r"\w+\|send [^|]*\|before|\w+\|send\|before", point)]
    return [
        Plan(kills=(Kill(point, n, how=how),))
        for point in sends
        for how in ("cut", "stall")
        for n in sorted({1, max(1, (points[point] + 1) // 2)} if how == "cut" else {1})
    ]


def recoveries(rows: Iterable[Mapping[str, Any]], points: Mapping[str, int]) -> list[Plan]:
    """Return a pair for each point that was met only after some kill: that kill, and then the point."""
    found: dict[str, Plan] = {}
    for row in rows:
        if len(row["kills"]) == 1 and row["fired"]:
            point, n, _, how = row["kills"][0]
            if how != "kill":
                continue
            for later in row["points"]:
                if later not in points:
                    found.setdefault(later, Plan(kills=(Kill(point, n), Kill(later, 1))))
    return [found[later] for later in sorted(found)]


def pairs(points: Mapping[str, int], later: Iterable[str], number: int, rng: random.Random) -> list[Plan]:
    """Return `number` random pairs. The second kill is one that is still to come after the first: a point whose first hit
    comes later in the recording, or one of `later`, those met only after some kill."""
    order = list(points)
    known = sorted(set(later) - set(points))
    plans = []
    for _ in range(number):
        place = rng.randrange(len(order))
        first = Kill(order[place], rng.randint(1, points[order[place]]))
        second = Kill(rng.choice([*order[place:], *known]), rng.randint(1, 2))
        plans.append(Plan(kills=(first, second)))
    return plans


def answered_first(points: Mapping[str, int]) -> list[Plan]:
    """Return the controls in which the broker answers before its changes are on disk, and dies in between."""
    commits = [point for point in sorted(points) if re.match(r"broker\|commit\|before\|.*op_request_gang", point)]
    return [Plan(control="answer_first", kills=(Kill(point, n),)) for point in commits[:1] for n in (1, 2)]


def unfenced(points: Mapping[str, int]) -> list[Plan]:
    """Return the controls in which an order of a dead broker comes late, and no agent looks at fences."""
    starts = [point for point in sorted(points) if re.match(r"broker\|send start\|before", point)]
    return [Plan(control="no_fence", kills=(Kill(starts[0], n, LATE_S),), linger_s=LINGER_S) for n in (2, 3)] if starts else []


@dataclass(slots=True)
class Tally:
    """What many runs came to."""

    injected: Counter[str] = field(default_factory=Counter)
    """Point -> kills that happened there."""
    hits: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    fired: int = 0
    """Runs in which all kills of the plan happened."""
    violations: list[dict[str, Any]] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    clients: Counter[int] = field(default_factory=Counter)
    by_kills: Counter[int] = field(default_factory=Counter)
    """How many kills a plan had -> how many runs in which all of them happened."""
    litter: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row of `as_row`."""
        self.runs += 1
        whole = row["fired"] == len(row["kills"])
        self.fired += whole
        self.by_kills[len(row["kills"])] += whole
        self.injected.update(kill[0] for kill in row["kills"][: row["fired"]] if kill[3] == "kill")
        self.hits.update(row["points"])
        self.litter += len(row["litter"])
        self.clients[row["clients"]] += 1
        if row["fired"]:
            self.recoveries_s.append(row["recovery_s"])
        self.violations += [
            {"kind": kind, "what": what, "plan": row["plan"], "folder": row["folder"]} for kind, what in row["violations"]
        ]


def as_row(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain data, one line of a progress file."""
    return {
        "plan": outcome.plan.describe(),
        "kills": [[kill.point, kill.n, kill.late_s, kill.how] for kill in outcome.plan.kills],
        "fired": outcome.fired,
        "violations": [[violation.kind, violation.what] for violation in outcome.violations],
        "points": sorted(outcome.hits),
        "clients": outcome.clients,
        "wall_s": round(outcome.wall_s, 3),
        "recovery_s": round(outcome.recovery_s, 3),
        "litter": outcome.litter,
        "folder": outcome.folder,
    }


def rows_of(progress: Path) -> list[dict[str, Any]]:
    """Return the rows of a progress file; none when there is no file."""
    return [json.loads(line) for line in progress.read_text().splitlines()] if progress.exists() else []


def campaign(
    plans: Sequence[Plan],
    progress: Path | None,
    *,
    side_by_side: int = 2,
    for_s: float = math.inf,
    enough: Callable[[Tally], bool] = lambda tally: False,
    keep: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Run the plans in order, some at a time, and return what they came to. for_s: start no further ones after that time;
    enough: nor once it says so.

    progress: each outcome is appended there at once; plans that are in it already are not run again. Interrupted (Ctrl-C, or a
    SIGTERM that the caller turns into KeyboardInterrupt), all runs under way are ended and cleaned up first.
    """
    tally, done = Tally(), Counter[str]()
    for row in rows_of(progress) if progress is not None else []:
        tally.add(row)
        done[row["plan"]] += 1
    todo = []
    for plan in plans:
        if done[plan.describe()]:
            done[plan.describe()] -= 1
        else:
            todo.append(plan)
    todo.reverse()
    end_s = time.monotonic() + for_s
    pool = ThreadPoolExecutor(side_by_side)
    running: set[Future[Outcome]] = set()
    try:
        while running or todo:
            if time.monotonic() >= end_s or enough(tally):
                todo.clear()
            while todo and len(running) < side_by_side:
                running.add(pool.submit(explore, todo.pop(), keep=keep))
            ended, running = wait(running, return_when=FIRST_COMPLETED) if running else (set(), running)
            for future in ended:
                row = as_row(future.result())
                tally.add(row)
                if progress is not None:
                    with progress.open("a") as out:
                        out.write(json.dumps(row) + "\n")
                for kind, what in row["violations"]:
                    say(f"VIOLATION {kind}: {what}\n    after {row['plan']}  {row['folder']}")
                if tally.runs % 20 == 0:
                    say(f"{tally.runs} of {len(plans)} runs, {len(tally.violations)} violations")
    except BaseException:
        STOP.set()
        for future in running:
            while not future.done():  # a second Ctrl-C must not disturb the cleaning up
                with contextlib.suppress(KeyboardInterrupt):
                    wait([future], timeout=1.0)
        pool.shutdown(cancel_futures=True)
        STOP.clear()
        raise
    pool.shutdown()
    return tally
