"""Whether anything in training has an effect twice, or is missing, in whatever order processes go on and wherever they die.

Explored: 100,000 interleavings (--quick: 400) of the real handler, slot, exchange and store, run as greenlets over a disk in
memory (`tests/train/explorer.py`). Each is a schedule drawn from its number: 2 or 3 workers, 3 to 5 shards, 2 or 3 rounds of a
program of a few floats, both exchanges; a random walk, or priorities that change at random points; deaths at file operations
(before, after, in the middle of a write; every 40, 120 or 400 operations in the mean, or none), at sleeps and invocations; the
same event again under a higher fence; zombies; stalls of up to three claim periods; clocks that are off, fast, slow or stand
still; slots; a second generation with 1 to 3 workers in the middle; files cut off or changed; everything killed at once
with what was not forced to disk torn; a loss that becomes NaN; LINKs whose answer is lost.
An effect, a double effect, a double start: as `tests/train/oracle.py` defines them. Missing: no result, no record of a round, a
failure that nobody names, a run that does not end within 40,000 operations and 900 s of its time.
Raced: 1,000 times (--quick: 20) eight real processes publish the same claim, slices, record, checkpoint and result of a real
store at the same time (`tests/train/races.py`), in new folders: by turns of at most 100 (--quick: 10) in the default place for
temporary files and on /dev/shm (memory), where there is one.
Replaced: in 500 runs (--quick: 20) of three workers whoever is to add a slice, by turn or claim, dies at any operation from
when it is due until it is published, and then, in half of them, whoever claimed it too (`tests/train/replacement.py`).
Measured: claim periods from the last death to the takeover, in the run's time. An observer looks every 0.02 periods and a few
operations, so the bound is one period and two such looks: it sees the claim one look late, and its lapse another.
The value is the number of double and missing effects, explored and raced. Double starts are counted, and each count is compared
with one made beside the store's own.
Bars: 0; every dead claimer replaced within its bound.
Controls: the explorer must notice each of four protocols with one protection taken out (`tests/train/mutants.py`) within 200
schedules, among them the study's "count == W, then start"; in full runs that one must also have several starters in some of the
real races.
Interrupted, a full run goes on where it stopped, with the same seed and source (``results/train_exactly_once.*.progress``).
Not counted: power cuts on a real disk, NFS, more than three workers at once (random deaths with up to 16:
`train_same_weights`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.train.explorer import Schedule
from tests.train.mutants import MUTANTS
from tests.train.oracle import Oracle
from tests.train.races import PROCESSES, Tally, compete
from tests.train.replacement import MAX_PERIODS, idle_periods

from benchmarks.harness import ROOT, Control, Options, Result, judge

NAME = "train_exactly_once"
BAR = "100,000 interleavings, 1,000 races of 8 processes: 0 double or missing effects; dead claimer replaced in a claim period"

INTERLEAVINGS, RACES, DEAD = 100_000, 1000, 500
QUICK = (400, 20, 20)
CHUNK = 100
MUTANT_SCHEDULES = 200
RACES_AT_ONCE = 100
MEMORY = Path("/dev/shm")
RESULTS = Path(__file__).resolve().parent / "results"
_COUNTED = ("steps", "deaths", "zombies", "double_starts")
_oracle = Oracle()
"""Of this process: what undisturbed runs gave is computed once."""


def run(options: Options) -> Result:
    """Race, let claimers die, take protections out, explore."""
    began = time.monotonic()
    interleavings, races, dead = QUICK if options.quick else (INTERLEAVINGS, RACES, DEAD)
    RESULTS.mkdir(exist_ok=True)
    first = options.seed * INTERLEAVINGS
    starts = range(first, first + interleavings, CHUNK)
    progress = RESULTS / f"{NAME}.{options.seed}.{_source_digest()}.progress"
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(os.cpu_count() or 1) as pool:
        noticed = dict(pool.imap_unordered(_notice, MUTANTS))
        print(f"protocols without a protection, noticed after so many schedules: {noticed}", flush=True)
        idle = [periods for periods in pool.imap_unordered(idle_periods, range(dead), 10) if periods is not None]
        print(f"{len(idle)} dead claimers were replaced after {max(idle):.3f} claim periods at most", flush=True)
        total = Counter[str]()
        wrong: list[str] = []
        for number, row in enumerate(_explored(pool, starts, None if options.quick else progress), 1):
            total.update(row["counts"])
            wrong += row["wrong"]
            if number % 50 == 0 or number == len(starts):
                print(f"{number * CHUNK} of {interleavings} interleavings: {dict(total)}, {len(wrong)} wrong", flush=True)
    tally = _race(races)
    for text in [*wrong, *tally.wrong][:20]:
        print(text)
    starters = tally.several_starters
    control = Control(
        name="count == W, and three protocols with one protection taken out",
        value=float(noticed["count == W"] or 0),
        failed=all(noticed.values()) and (options.quick or starters > 0),
        how=f"schedules until noticed: {noticed}; races of {tally.races} with several starters: {starters}",
    )
    found = len(wrong) + len(tally.wrong)
    holds, why = judge(not found and max(idle) <= MAX_PERIODS, control)
    progress.unlink(missing_ok=True)
    return Result(
        value=float(found),
        spread=None,
        unit="double or missing effects",
        holds=holds,
        why=why,
        control=control,
        details={
            "interleavings": total["runs"],
            "operations": total["steps"],
            "deaths": total["deaths"],
            "zombies": total["zombies"],
            "double_starts_explored": total["double_starts"],
            "faults": {name: total[name] for name in ("rotten", "refused by fence", "failed as it must", "superseded")},
            "violations": [*wrong, *tally.wrong][:50],
            "races": tally.races,
            "race_processes": PROCESSES,
            "publications_raced": tally.publications,
            "double_starts_raced": tally.double_starts,
            "races_with_several_starters_of_count_w": starters,
            "dead_claimers": len(idle),
            "replaced_after_claim_periods_max": max(idle),
            "replaced_after_claim_periods_bound": MAX_PERIODS,
            "interleavings_per_cpu_s": round(total["runs"] / max(1e-9, total["cpu_ms"] / 1000), 1),
            "wall_s": round(time.monotonic() - began, 1),
            "load_1min": os.getloadavg()[0],
        },
    )


def _explored(pool: Any, starts: Iterable[int], progress: Path | None) -> Iterator[dict[str, Any]]:
    """Yield what came of each chunk, from the progress file where an earlier run had it."""
    done: dict[int, dict[str, Any]] = {}
    if progress is not None and progress.exists():
        for line in progress.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else it was being written when the run ended
                row = json.loads(line)
                done[row["first"]] = row
        progress.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
        print(f"{len(done)} chunks of {CHUNK} are in {progress}", flush=True)
    yield from done.values()
    for row in pool.imap_unordered(_explore, [start for start in starts if start not in done]):
        if progress is not None:
            with open(progress, "a") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def _explore(first: int) -> dict[str, Any]:
    """Explore one chunk; return its counts, and what was wrong with the schedule that replays it."""
    began = time.process_time()
    counts: Counter[str] = Counter()
    wrong = []
    for seed in range(first, first + CHUNK):
        schedule = Schedule.draw(seed)
        explored, found = _oracle.explore(schedule)
        wrong += [f"{text} | {schedule}" for text in found]
        counts["runs"] += 1
        counts.update({name: getattr(explored, name) for name in _COUNTED})
        counts["rotten"] += len(explored.rotten)
        counts["refused by fence"] += sum(text.startswith("StaleFence") for text in explored.failures)
        counts["failed as it must"] += any(text.startswith("JobFailed") for text in explored.failures)
        counts["superseded"] += sum("superseded" in outcome.why for outcome in explored.outcomes)
    counts["cpu_ms"] = int(1000 * (time.process_time() - began))
    return {"first": first, "counts": counts, "wrong": wrong}


def _notice(mutant: str) -> tuple[str, int]:
    """Return after how many schedules the protocol without a protection was noticed; 0: not at all."""
    for seed in range(MUTANT_SCHEDULES):
        schedule = Schedule.draw(seed)
        _oracle.expected(schedule)
        with MUTANTS[mutant]():
            _, wrong = _oracle.explore(schedule)
        if wrong:
            return mutant, seed + 1
    return mutant, 0


def _race(races: int) -> Tally:
    total = Tally()
    places = itertools.cycle([None, MEMORY] if MEMORY.is_dir() else [None])
    at_once = min(RACES_AT_ONCE, -(-races // 2))
    while total.races < races:
        with tempfile.TemporaryDirectory(dir=next(places)) as folder:
            tally = compete(Path(folder), min(at_once, races - total.races))
        for name in ("races", "publications", "double_starts", "several_starters", "wall_s"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        total.wrong += tally.wrong
        print(f"{total.races} of {races} races, {total.double_starts} double starts, {len(total.wrong)} wrong", flush=True)
    return total


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src" / "tenure" / "train").rglob("*.py"), *(ROOT / "tests" / "train").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
