"""Whether our load generator and judge come to MLPerf LoadGen's verdict on the same schedule and the same server.

World: 50 cases (--quick: 6). A case is a seeded virtual-latency server, a latency goal at p99, and a schedule. LoadGen 6.0.17,
scenario Server, draws the schedule (Poisson, 600 or 1,000 per second, 1,500 to 2,500 requests, its seed drawn), sends it to the
server in its own process and gives its verdict (its `result_validity`: percentile, number of requests and early stopping
at 99 % confidence).
The due times are then read from its trace and replayed by `tenure.serve.load`, as a recorded schedule over HTTP on this
machine, against the same virtual server in a process of its own; the records are judged by `tenure.serve.load.judge`.
The virtual server computes nothing: the i-th request to arrive is answered a seeded time later. Five kinds, ten cases each:
- `log_normal`: independent latencies around 40 ms, sigma 0.4;
- `two_ways`: 97 % around 30 ms, 3 % around 120 ms;
- `wandering`: log-normal around 40 ms whose logarithm is an AR(1), 0.95 from request to request;
- `queue`: one server in order of arrival, service times exponential, 60 to 90 % busy, and 40 ms on top: the schedule shows;
- `frozen`: as `log_normal`, but nothing is answered during 0.15 s of each 0.8 s: what was due then is answered at its end.
The goal's bound is drawn 5 to 60 % above or below the p99 of a simulation of the server in virtual time, half each. A case in
which LoadGen's own p99, or the order statistic at which its early stopping turns, came to lie within 5 % of the bound is drawn
again (`redrawn` in the details). So is one in which LoadGen's p99 lies more than 2 % from that of the virtual server in virtual
time with LoadGen's schedule: something disturbed the referee (`disturbed`). Both servers' programs ask for real-time priority:
a server on another machine would not be disturbed by what runs here either.
Same verdict: LoadGen VALID where ours is VALID (the generator was not the bottleneck) and the goal is met, and INVALID where
ours is VALID and the goal is not met with confidence. An INVALID of ours that says the generator was the bottleneck is no
agreement; it is retried once, as a user is told to, and counted in the details.
Counts: the share of cases with the same verdict, and |ours ÷ LoadGen's - 1| of p99.
Bar: 50 of 50 (--quick: 6 of 6), and p99 within 3 % in each case. Value: cases with the same verdict; spread: 0.
Checked: LoadGen sent as many requests as it was asked for, the replayed schedule is LoadGen's to the microsecond, every request
of it is in our record, none dropped or failed.
Also in the details: the judge alone on LoadGen's own latencies (no generator between) must agree in all cases too; p99's
largest and median difference, and both sides' from the virtual time's; issue delay p99 of both.
Control: the same schedule and server in virtual time, sent by 4 threads that each wait for their answer and time it from their
own send, as perf_analyzer does by default: it must give another verdict, or a p99 off by more than 3 %, in a case.
Left out: token latencies, scenarios other than Server, networks.
"""

from __future__ import annotations

import heapq
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.harness import Control, Options, Result, judge, median
from benchmarks.peers import homes
from benchmarks.peers.programs.virtual_latency import KINDS, VirtualServer
from tenure.decide.verdicts import LatencyGoal, answer_goal, least_requests
from tenure.serve.load.judge import Verdict
from tenure.serve.load.judge import judge as judge_run
from tenure.serve.load.plan import LoadPlan
from tenure.serve.load.records import Outcome, Record
from tenure.serve.load.runner import LoadRun, Target

NAME = "load_vs_loadgen"
BAR = "LoadGen's schedule replayed: the same verdict in 50 of 50 cases at least 5 % from the bound, p99 within 3 %"
PERCENT = 99.0
NEAR = 0.05
P99_BAR = 0.03
REFEREE_BAR = 0.02
TIMEOUT_S = 10.0
THREADS = 4
MAX_REDRAWN = 4
"""Cases drawn again at most, per case that is wanted."""
PATIENCE_S = 60.0
PROGRAMS = Path(__file__).parent / "peers" / "programs"
_LATENCY = re.compile(r'"name":"Latency".*?"ts":([\d.]+).*?"issue_delay":(-?\d+),"issue_to_done":(\d+)')

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What LoadGen and ours are given."""

    kind: str
    seed: int
    rate_per_s: float
    requests: int
    limit_s: float

    @property
    def server(self) -> dict[str, object]:
        """The arguments of its virtual server."""
        return {"kind": self.kind, "seed": self.seed, "requests": self.requests, "rate_per_s": self.rate_per_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Referee:
    """What LoadGen made of a case."""

    valid: bool
    p99_s: float
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One case, both sides."""

    case: Case
    referee: Referee
    ours: Verdict
    issue_delay_p99_s: float
    retried: int
    virtual_p99_s: float
    synchronous_p99_s: float
    synchronous_agrees: bool

    @property
    def same(self) -> bool:
        """Whether ours comes to LoadGen's verdict."""
        return agrees(self.referee.valid, self.ours)

    @property
    def p99_error(self) -> float:
        """How far our p99 is from LoadGen's, relative."""
        return self.ours.percentiles["p99"].value_s / self.referee.p99_s - 1


def run(options: Options) -> Result:
    """Draw, run, replay, compare."""
    home = peers.peer("loadgen").install(homes.default_root())
    cases = 6 if options.quick else 50
    rng = np.random.default_rng(options.seed)
    found: list[Compared] = []
    redrawn = disturbed = 0
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < cases:
            case = draw(rng, len(found))
            referee = loadgen(homes.python(home), case, Path(folder) / f"case{len(found) + redrawn + disturbed}")
            off = abs(referee.p99_s / nearest_rank(simulate(case, referee.record.due_s)) - 1) > REFEREE_BAR
            if off or near(referee, case.limit_s):
                disturbed, redrawn = disturbed + off, redrawn + (not off)
                again = disturbed + redrawn
                assert again <= MAX_REDRAWN * cases, (
                    f"{redrawn} cases lay within 5 % of their bound, {disturbed} were disturbed"
                )
                continue
            found.append(compare(case, referee, Path(folder)))
    return judged(found, redrawn, disturbed)


def draw(rng: np.random.Generator, place: int) -> Case:
    """Return a case whose bound lies above or below the p99 of its server in virtual time."""
    kind, rate, requests = KINDS[place % len(KINDS)], float(rng.choice([600, 1_000])), int(rng.integers(1_500, 2_501))
    seed = int(rng.integers(2**31))
    case = Case(kind=kind, seed=seed, rate_per_s=rate, requests=requests, limit_s=1.0)
    p99_s = nearest_rank(simulate(case, np.cumsum(rng.exponential(1 / rate, requests))))
    factor = 1 + float(rng.uniform(NEAR, 0.6))
    above = (place // len(KINDS) + place) % 2 == 0
    return Case(kind=kind, seed=seed, rate_per_s=rate, requests=requests, limit_s=p99_s * factor if above else p99_s / factor)


def simulate(case: Case, due_s: Floats, *, threads: int = 0) -> Floats:
    """Return the latencies of a schedule in virtual time; threads: of a synchronous generator that times from its sends."""
    server = VirtualServer(**case.server)
    if not threads:
        return np.array([server.answer_s(at) - at for at in due_s.tolist()])
    free, latencies = [0.0] * threads, []
    for at in due_s.tolist():
        sent_s = max(at, heapq.heappop(free))
        ended_s = server.answer_s(sent_s)
        heapq.heappush(free, ended_s)
        latencies.append(ended_s - sent_s)
    return np.array(latencies)


def nearest_rank(latencies_s: Floats) -> float:
    """Return p99."""
    return float(np.sort(latencies_s)[int(np.ceil(PERCENT / 100 * len(latencies_s))) - 1])


def loadgen(python: Path, case: Case, folder: Path) -> Referee:
    """Run LoadGen on a case, and return its verdict and its record from its logs."""
    folder.mkdir()
    told = {
        "server": case.server,
        "rate_per_s": case.rate_per_s,
        "requests": case.requests,
        "schedule_seed": case.seed,
        "limit_s": case.limit_s,
        "folder": str(folder),
    }
    argv = [str(python), str(PROGRAMS / "loadgen_server.py"), json.dumps(told)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, f"LoadGen failed: {done.stderr[-300:]}"
    result = {}
    for line in (folder / "mlperf_log_detail.txt").read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        result[entry["key"]] = entry["value"]
    trace = (folder / "mlperf_log_trace.json").read_text()
    rows = np.array([[float(part) for part in match.groups()] for match in _LATENCY.finditer(trace)])
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    assert len(rows) == result["result_query_count"] == case.requests, f"LoadGen logged {len(rows)} of {case.requests} requests"
    due_s = (rows[:, 0] - rows[0, 0]) * 1e-6
    issued_s = due_s + rows[:, 1] * 1e-9
    return Referee(
        valid=result["result_validity"] == "VALID",
        p99_s=result["result_99.00_percentile_latency_ns"] * 1e-9,
        record=Record(due_s, issued_s, issued_s + rows[:, 2] * 1e-9, np.zeros(len(rows), dtype=np.uint8)),
    )


def near(referee: Referee, limit_s: float) -> bool:
    """Return whether LoadGen's p99, or the latency at which its early stopping turns, lies within 5 % of the bound."""
    latencies_s = np.sort(referee.record.latency_s(TIMEOUT_S))
    over = 0
    while least_requests(over + 1, PERCENT) <= len(latencies_s):
        over += 1
    return any(abs(at / limit_s - 1) < NEAR for at in (referee.p99_s, float(latencies_s[-1 - over])))


def compare(case: Case, referee: Referee, folder: Path) -> Compared:
    """Replay a case by our generator, and once more when it was itself in the way."""
    schedule = folder / "schedule.npy"
    np.save(schedule, referee.record.due_s)
    goal = LatencyGoal(percent=PERCENT, limit_s=case.limit_s)
    replayed, ours = replay(case, referee, schedule, goal)
    retried = int(not ours.valid)
    if retried:
        replayed, ours = replay(case, referee, schedule, goal)
    synchronous = simulate(case, referee.record.due_s, threads=THREADS)
    over = int((synchronous > case.limit_s).sum())
    return Compared(
        case=case,
        referee=referee,
        ours=ours,
        issue_delay_p99_s=nearest_rank(replayed.measured.issue_delay_s),
        retried=retried,
        virtual_p99_s=nearest_rank(simulate(case, referee.record.due_s)),
        synchronous_p99_s=nearest_rank(synchronous),
        synchronous_agrees=(answer_goal(len(synchronous), over, PERCENT).answer == "met") == referee.valid,
    )


def replay(case: Case, referee: Referee, schedule: Path, goal: LatencyGoal) -> tuple[LoadRun, Verdict]:
    """Send a schedule to a case's server by our generator, check the record, and judge it."""
    with serving(case) as port:
        plan = LoadPlan(
            url=f"http://127.0.0.1:{port}", model="virtual", schedule=str(schedule), timeout_s=TIMEOUT_S, connections=256
        )
        replayed = Target(plan).run(plan)
    check(replayed, referee)
    return replayed, judge_run(replayed.measured, timeout_s=TIMEOUT_S, own=replayed.own, goal=goal)


@contextmanager
def serving(case: Case) -> Iterator[int]:
    """Serve a case's virtual server over HTTP, and give its port."""
    argv = [sys.executable, str(PROGRAMS / "virtual_http.py"), json.dumps(case.server)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["port"]
        finally:
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def check(replayed: LoadRun, referee: Referee) -> None:
    """Assert that the schedule was LoadGen's, and that every request was answered."""
    record = replayed.record
    assert len(record) == len(referee.record), f"{len(record)} requests in the record, {len(referee.record)} in the schedule"
    assert np.abs(record.due_s - referee.record.due_s).max() < 1e-6, "the replayed schedule is not LoadGen's"
    assert record.count(Outcome.OK) == len(record), f"not all requests were answered: {replayed.reasons}"


def agrees(referee_valid: bool, ours: Verdict) -> bool:
    """Return whether ours says the same: VALID with the goal met, or VALID with the goal not met."""
    return ours.valid and ours.answer is not None and (ours.answer.answer == "met") == referee_valid


def judged(found: list[Compared], redrawn: int, disturbed: int) -> Result:
    """Turn the cases into a verdict."""
    same = sum(each.same for each in found)
    errors = [abs(each.p99_error) for each in found]
    for each in found:
        alone = judge_run(
            each.referee.record, timeout_s=TIMEOUT_S, goal=LatencyGoal(percent=PERCENT, limit_s=each.case.limit_s)
        )
        assert alone.answer is not None
        assert (alone.answer.answer == "met") == each.referee.valid, f"the judge alone differs from LoadGen on {each.case}"
    off = [abs(each.synchronous_p99_s / each.referee.p99_s - 1) for each in found]
    fooled = sum(not each.synchronous_agrees for each in found)
    control = Control(
        name=f"{THREADS} threads that time from their own send",
        value=max(off),
        failed=fooled > 0 or max(off) > P99_BAR,
        how=f"another verdict in {fooled} of {len(found)} cases, p99 off by up to {max(off):.0%}",
    )
    missed = [
        f"{each.case.kind} (seed {each.case.seed}): LoadGen {'VALID' if each.referee.valid else 'INVALID'}, "
        f"ours {each.ours.word}, goal {each.ours.answer.answer if each.ours.answer else '-'}"
        for each in found
        if not each.same
    ]
    missed += [
        f"p99 off by {error:.1%} in {each.case.kind}" for each, error in zip(found, errors, strict=True) if error > P99_BAR
    ]
    holds, why = judge(not missed, control)
    answers = [each.ours.answer.answer for each in found if each.ours.answer is not None]
    return Result(
        value=float(same),
        spread=0.0,
        unit=f"of {len(found)} cases with LoadGen's verdict",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={
            "name": "MLPerf LoadGen 6.0.17",
            "value": float(sum(each.referee.valid for each in found)),
            "unit": f"of {len(found)} VALID",
        },
        control=control,
        details={
            "redrawn": redrawn,
            "disturbed": disturbed,
            "retried": sum(each.retried for each in found),
            "answers": {answer: answers.count(answer) for answer in ("met", "open", "missed")},
            "p99_error_max": round(max(errors), 4),
            "p99_error_median": round(median(errors), 4),
            "p99_over_virtual_max": round(
                max(abs(each.ours.percentiles["p99"].value_s / each.virtual_p99_s - 1) for each in found), 4
            ),
            "loadgen_p99_over_virtual_max": round(max(abs(each.referee.p99_s / each.virtual_p99_s - 1) for each in found), 4),
            "issue_delay_p99_ms": round(median([each.issue_delay_p99_s for each in found]) * 1e3, 3),
            "loadgen_issue_delay_p99_ms": round(
                median([nearest_rank(each.referee.record.issue_delay_s) for each in found]) * 1e3, 3
            ),
            "p99_error_by_kind": {
                kind: round(max(abs(each.p99_error) for each in found if each.case.kind == kind), 4) for kind in KINDS
            },
        },
    )
