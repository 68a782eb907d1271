"""The highest rate at which a server meets a latency goal: runs at the rates that `decide.rate_search` names, until it is done.

Each probe is an open-loop run like any other, with a schedule of its own seed; one that is INVALID counts as no answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from tenure.decide.rate_search import Probe, RateSearch, Step, next_step
from tenure.decide.verdicts import LatencyGoal
from tenure.serve.load.judge import probe_of
from tenure.serve.load.loop import INTERRUPTED
from tenure.serve.load.plan import LoadPlan
from tenure.serve.load.report import RECORD_FOLDER, REPORT_FILE, LoadReport, new_folder, report
from tenure.serve.load.runner import LoadRun, Target, Warmth
from tenure.serve.processes import write_json

SEARCH_FILE = "search.json"
GUESS_CLIENTS = 4
GUESS_S = 1.0
_FIRST_SHARE = 0.5
"""Of what a closed loop gets through, the first rate tried."""


class Runs(Protocol):
    """What a search needs of a `Target`."""

    def warm_up(self) -> Warmth:
        """See Target."""
        ...

    def run(self, plan: LoadPlan, folder: Path | None = None) -> LoadRun:
        """See Target."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReport:
    """What a search came to."""

    goal: str
    met_per_s: float
    """Highest rate proven to meet the goal; 0: none."""
    missed_per_s: float | None
    """Lowest rate proven to miss it; None: none."""
    open_per_s: tuple[float, ...]
    """Rates between them at which so many requests prove neither."""
    why: str
    """Why the search ended."""
    confidence: float
    """That no rate called met misses the goal and none called missed meets it."""
    probes: tuple[LoadReport, ...]
    """In the order they ran."""
    seconds: float

    @property
    def report(self) -> LoadReport | None:
        """The last valid run at the rate that was found; None where none was."""
        at = [each for each in self.probes if each.plan.rate_per_s == self.met_per_s and each.verdict.valid]
        return at[-1] if at else None


def search(
    plan: LoadPlan,
    goal: LatencyGoal,
    *,
    max_s: float = 300.0,
    least_s: float = 5.0,
    folder: Path | None = None,
    told: Callable[[LoadReport], None] = lambda _: None,
    target: Runs | None = None,
) -> SearchReport:
    """Search the highest rate at which a model meets a goal.

    plan: of one probe; its rate and length are the search's. max_s: no probe begins after so long. least_s: a probe lasts so
    long at least, for a queue needs time to show. folder: a new one, for every probe's report and record. told: each probe's
    report as it comes. target: what runs them; None: the plan's own server.
    Raises Unavailable, NotFound, SpecError, ModelFailed before the first probe.
    """
    new_folder(folder)
    began_s = time.monotonic()
    target = target or Target(plan)
    warmth = target.warm_up()
    rates = RateSearch(goal=goal, start_per_s=_first_rate(target, plan), least_s=least_s)
    probes: list[Probe] = []
    reports: list[LoadReport] = []
    while not (step := next_step(rates, probes)).done:
        if time.monotonic() - began_s > max_s:
            step = replace(step, why=f"the search was given {max_s:g} s")
            break
        number = len(probes)
        probe = _probe(plan, step, number)
        place = None if folder is None else folder / f"probe-{number + 1:02d}"
        run = target.run(probe, None if place is None else place / RECORD_FOLDER)
        found = report(run, warmth, goal)
        if place is not None:
            write_json(place / REPORT_FILE, msgspec.to_builtins(found))
        reports.append(found)
        probes.append(probe_of(found.verdict, probe.rate_per_s))
        told(found)
        if run.stopped.startswith(INTERRUPTED):
            step = replace(next_step(rates, probes), why=INTERRUPTED)
            break
    done = SearchReport(
        goal=str(goal),
        met_per_s=step.met_per_s,
        missed_per_s=None if math.isinf(step.missed_per_s) else step.missed_per_s,
        open_per_s=step.open_per_s,
        why=step.why,
        confidence=rates.confidence,
        probes=tuple(reports),
        seconds=time.monotonic() - began_s,
    )
    if folder is not None:
        write_json(folder / SEARCH_FILE, msgspec.to_builtins(done))
    return done


def _first_rate(target: Runs, plan: LoadPlan) -> float:
    """Return a rate to begin with, from a second of a closed loop: no figure of the search."""
    closed = replace(plan, rate_per_s=0.0, clients=GUESS_CLIENTS, seconds=GUESS_S, warmup_s=0.0)
    run = target.run(closed)
    if run.stopped.startswith(INTERRUPTED):
        raise KeyboardInterrupt
    return max(1.0, round(_FIRST_SHARE * len(run.record) / max(run.ended_s, 1e-9), 1))


def _probe(plan: LoadPlan, step: Step, number: int) -> LoadPlan:
    rate = step.rate_per_s
    warmup_s = plan.warmup_s if plan.warmup_s is not None else min(2.0, 0.1 * step.requests / rate)
    return replace(
        plan,
        rate_per_s=rate,
        clients=0,
        schedule="",
        seconds=step.requests / rate + warmup_s,
        warmup_s=warmup_s,
        seed=plan.seed + number,
    )
