"""Whether anything is granted twice, leaked or lost when any process of the system is killed at any of its effects.

World: the scenario of `tests/crash/scenario.py` in a fresh home with two agents, each with a fixed small part of the machine: a
run, a gang of two over two nodes, a lease driven by three events, one that is renewed, resized and released, a trial, a
recommendation, a shutdown. Client, broker, agents, fork servers and shims are the real programs as real processes; a hook layer
that they know nothing of (`tests/crash/hooks`) notes each commit, each file made, renamed, linked or removed, each lock, write
and fsync, each process started or signalled and each message sent, before and after it happens: these are the points.
Counted: runs of the scenario in which a process ends itself by SIGKILL at a point: every point of two undisturbed runs at its
first hit and at one in the middle; every order of the broker once more such that it arrives after the broker's death, under its
successor; every point first met in recovery from some kill, as that kill and then the point; and random pairs, the second armed
by the first, until in 1,000 both kills happened. Besides, for each message: its stream is cut, or its sender stands still for
2 s, and nothing may change. After each the client is run until it is through and the home is shut down. Then the oracle
(`tests/crash/oracle.py`) recounts from the process table, the control groups, the files and the journals that jobs and client
keep outside the home. The value is the number of violations; their kinds, the recovery times and the table of points with how
often each was injected (``results/crash_points.tsv``) go with it.
Checked: an undisturbed run has no violation; every role has points; at least 95 % of the single faults really happened (a
point that depends on timing may not be met again).
Controls, each of which must be noticed: the broker answers before its changes are on disk (`Book.durable` taken out) and is
killed before they are; no agent looks at fences (`Agent._check_broker` and the runtime's `_check_fence` taken out) when a
start order of a dead broker arrives late.
--quick: a seeded sample of singles and pairs for 20 s, and both controls.
Interrupted, it says what it had, ends and removes all it started; run again with the same seed and source, it goes on.
Not counted: power cuts (a kill keeps the page cache), clocks, disks that fill up; these have tests of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from tests.crash import explorer
from tests.crash.explorer import ROLES, Tally

from benchmarks.harness import ROOT, Control, Options, Result, judge, median

NAME = "crash_points"
BAR = "kills at every hooked point and 1,000 random pairs: 0 double grants, 0 leaks, 0 lost leases, trials or results"
PAIRS = 1000
QUICK_S = 20.0
LEAST_FIRED = 0.95
RESULTS = Path(__file__).resolve().parent / "results"
SIDE_BY_SIDE = 2 * (os.cpu_count() or 1)
"""Half of a run is waiting: for an interpreter to start, for a job to end, for a bound to pass."""


def run(options: Options) -> Result:
    """Record, kill singly, kill in pairs, show that the controls are noticed."""
    RESULTS.mkdir(exist_ok=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    begun_s = time.monotonic()
    points, undisturbed = explorer.record()
    for outcome in undisturbed:
        assert not outcome.violations, f"an undisturbed run has violations: {outcome.violations}"
    missing = set(ROLES) - {point.split("|")[0] for point in points}
    assert not missing, f"no point was recorded for {sorted(missing)}"
    rng = random.Random(options.seed)
    print(f"{len(points)} points, {sum(points.values())} hits in a run")
    if options.quick:
        tally, numbers = _sample(points, rng)
    else:
        tally, numbers = _all(points, rng, options.seed)
    control = _controls(points, each=1 if options.quick else 2)
    found = Counter(violation["kind"] for violation in tally.violations)
    holds, why = judge(not tally.violations, control)
    for violation in tally.violations[:20]:
        print(f"{violation['kind']}: {violation['what']}\n    after {violation['plan']}")
    _write_table(points, tally)
    recoveries = sorted(tally.recoveries_s) or [0.0]
    return Result(
        value=float(len(tally.violations)),
        spread=None,
        unit="violations",
        holds=holds,
        why=why,
        control=control,
        details=numbers
        | {
            "points": len(points),
            "points_met": len({*points, *tally.hits}),
            "points_injected": len(tally.injected),
            "injected_by_role": dict(sorted(_by(tally.injected, 0).items())),
            "injected_by_kind": dict(sorted(_by(tally.injected, 1).items())),
            "runs": tally.runs,
            "runs_with_all_kills": tally.fired,
            "violations_by_kind": dict(found),
            "violations": tally.violations[:50],
            "recovery_median_s": median(recoveries),
            "recovery_p99_s": recoveries[min(len(recoveries) - 1, int(0.99 * len(recoveries)))],
            "recovery_max_s": recoveries[-1],
            "recovery_limit_s": explorer.RECOVERY_MAX_S,
            "clients_needed": {str(count): runs for count, runs in sorted(tally.clients.items())},
            "small_files_left": tally.litter,
            "wall_s": round(time.monotonic() - begun_s, 1),
            "side_by_side": SIDE_BY_SIDE,
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "homes_in": explorer.base_folder(),
            "table": "benchmarks/results/crash_points.tsv",
        },
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _sample(points: dict[str, int], rng: random.Random) -> tuple[Tally, dict[str, Any]]:
    """Run as many plans as QUICK_S allows: singles and pairs in turn, both in a random order."""
    singles = [plan for plan in explorer.singles(points) if not plan.linger_s]
    rng.shuffle(singles)
    plans = [plan for both in zip(singles, explorer.pairs(points, (), len(singles), rng), strict=True) for plan in both]
    tally = explorer.campaign(plans, None, side_by_side=SIDE_BY_SIDE, for_s=QUICK_S, say=print)
    return tally, {"singles": tally.by_kills[1], "pairs": tally.by_kills[2]}


def _all(points: dict[str, int], rng: random.Random, seed: int) -> tuple[Tally, dict[str, Any]]:
    """Run every plan, going on where an interrupted run with the same seed and source stopped."""
    stem = f"crash_points.{seed}.{_source_digest()}"
    kept, progress, paired = (RESULTS / f"{stem}.{part}" for part in ("points", "progress", "pairs"))
    if kept.exists():
        points.clear()
        points.update(json.loads(kept.read_text()))
    kept.write_text(json.dumps(points))
    singles, faults = explorer.singles(points), explorer.faults(points)
    print(f"{len(singles)} singles, {len(faults)} cuts and stalls, {SIDE_BY_SIDE} side by side; progress in {progress}")
    try:
        explorer.campaign([*singles, *faults], progress, side_by_side=SIDE_BY_SIDE, say=print)
        rows = [row for row in explorer.rows_of(progress) if len(row["kills"]) == 1]
        directed = explorer.recoveries(rows, points)
        later = {point for row in rows for point in row["points"]} - set(points)
        print(f"{len(directed)} points met in recovery, then random pairs until {PAIRS} have killed twice")
        explorer.campaign([*singles, *faults, *directed], progress, side_by_side=SIDE_BY_SIDE, say=print)
        pairs = explorer.campaign(
            explorer.pairs(points, later, 3 * PAIRS, rng),
            paired,
            side_by_side=SIDE_BY_SIDE,
            enough=lambda tally: tally.by_kills[2] >= PAIRS,
            say=print,
        )
    except KeyboardInterrupt:
        print(f"interrupted; what was done is in {progress} and {paired}")
        raise
    tally = Tally()
    for row in [*explorer.rows_of(progress), *explorer.rows_of(paired)]:
        tally.add(row)
    once = sum(row["fired"] for row in rows)
    assert once >= LEAST_FIRED * len(rows), f"only {once} of {len(rows)} single faults happened"
    assert pairs.by_kills[2] >= PAIRS, f"only {pairs.by_kills[2]} of {pairs.runs} pairs killed twice"
    for path in (progress, paired, kept):
        path.replace(RESULTS / f"crash_points{path.suffix}")  # the next run begins anew
    return tally, {
        "singles": len(singles),
        "cuts_and_stalls": len(faults),
        "pairs_of_recovery": len(directed),
        "pairs": pairs.by_kills[2],
        "pairs_tried": pairs.runs,
    }


def _controls(points: dict[str, int], *, each: int) -> Control:
    """Take one protection out at a time, in `each` runs; it fails when all of them were noticed."""
    caught: dict[str, int] = {}
    for name, plans in (("answer_first", explorer.answered_first(points)), ("no_fence", explorer.unfenced(points))):
        assert plans, f"the control {name} has no point to be killed at"
        tally = explorer.campaign(plans[:each], None, side_by_side=SIDE_BY_SIDE)
        caught[name] = len(tally.violations)
        for violation in tally.violations[:2]:
            print(f"control {name} noticed: {violation['kind']}: {violation['what'][:160]}")
    return Control(
        name="answers before the disk has them; fences not looked at",
        value=float(min(caught.values())),
        failed=all(caught.values()),
        how=", ".join(f"{name}: {count} violations" for name, count in caught.items()),
    )


def _by(injected: Counter[str], part: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for point, count in injected.items():
        found[point.split("|")[part].split(" ")[0]] += count
    return found


def _write_table(points: dict[str, int], tally: Tally) -> None:
    lines = ["role\tkind\tphase\twhere\thits in a run\truns that met it\tinjected"]
    for point in sorted({*points, *tally.hits}):
        role, kind, phase, where = point.split("|")
        lines.append(f"{role}\t{kind}\t{phase}\t{where}\t{points.get(point, 0)}\t{tally.hits[point]}\t{tally.injected[point]}")
    (RESULTS / "crash_points.tsv").write_text("\n".join(lines) + "\n")


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests" / "crash").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
