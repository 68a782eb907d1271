"""Records of a run in, verdict out: whether the figures are the server's or the generator's, and whether they prove a goal.

VALID says that the generator did what it was asked: every request was issued when it was due, nothing of its own held them
back. Then, and only then, the latencies are the server's, good or bad. INVALID names each reason, what was found, what to do.
Whether a goal is met is another question, answered beside it (LoadGen's VALID is our VALID with the goal met).
Pure: columns in, nothing read or timed. Not here: the bounds themselves (`decide.verdicts`), how a run is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tenure.decide.rate_search import Probe
from tenure.decide.verdicts import GoalAnswer, LatencyGoal, Percentile, answer_goal, clustering_of, percentiles
from tenure.serve.load.records import Outcome, OwnUse, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """From where on the generator, not the server, is what was measured."""

    percents: tuple[float, ...] = (50.0, 90.0, 99.0)
    """The percentiles reported, each of which is protected."""
    late_s: float = 5e-3
    """Delays of issuing up to this are no matter ..."""
    late_share: float = 0.05
    """... nor are those up to this share of the percentile looked at."""
    max_cpu_share: float = 0.9
    """Of the cores that the generator could use. Above it, answers wait for the generator to read them."""
    max_full_share: float = 0.01
    """Of the run in which due requests waited for one of the generator's own connections."""
    early_s: float = 1e-3
    """A request issued so long before it was due was moved."""


DEFAULT = Rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one run is worth."""

    valid: bool
    reasons: tuple[str, ...]
    """Why it is INVALID; empty when it is VALID."""
    notes: tuple[str, ...]
    """What a reader should know of a VALID run too."""
    percentiles: Mapping[str, Percentile]
    """Of the latency from the due time, under names such as ``p99``; their intervals reckon with clusters."""
    goal: str = ""
    answer: GoalAnswer | None = None
    """Of a goal, by MLPerf's rule, which takes requests as independent; None without a goal or a request."""
    cautious: GoalAnswer | None = field(default=None)
    """The same with late requests counted by clusters: `open` where only more requests would tell."""

    @property
    def word(self) -> str:
        """VALID or INVALID."""
        return "VALID" if self.valid else "INVALID"


def judge(
    record: Record,
    *,
    timeout_s: float,
    own: OwnUse | None = None,
    goal: LatencyGoal | None = None,
    rules: Rules = DEFAULT,
) -> Verdict:
    """Return the verdict on the requests of a run, its warm-up already cut.

    own: what the generator used meanwhile; None: not known, which is noted.
    """
    if not len(record):
        return Verdict(valid=False, reasons=("no request was due after the warm-up; run for longer",), notes=(), percentiles={})
    latency_s = record.latency_s(timeout_s)
    found = percentiles(latency_s, rules.percents)
    reasons = [*_late(record, found, rules), *_moved(record, rules), *_bound(own, rules)]
    answer = cautious = None
    if goal is not None:
        over = (latency_s > goal.limit_s) | (record.outcome != Outcome.OK)
        count, clustering = int(np.count_nonzero(over)), clustering_of(np.where(over, np.inf, latency_s), goal.limit_s)
        answer = answer_goal(len(record), count, goal.percent)
        cautious = answer_goal(len(record), count, goal.percent, clustering=clustering)
    return Verdict(
        valid=not reasons,
        reasons=tuple(reasons),
        notes=tuple(_notes(record, own, goal, timeout_s, found, answer, cautious)),
        percentiles=found,
        goal=str(goal) if goal is not None else "",
        answer=answer,
        cautious=cautious,
    )


def probe_of(verdict: Verdict, rate_per_s: float) -> Probe:
    """Return what a judged run with a goal tells the search for the highest rate."""
    found = verdict.cautious
    if found is None:
        return Probe(
            rate_per_s=rate_per_s, requests=0, over=0, invalid="; ".join(verdict.reasons) or "it was judged without a goal"
        )
    return Probe(
        rate_per_s=rate_per_s,
        requests=found.requests,
        over=found.over,
        clustering=found.clustering,
        invalid="; ".join(verdict.reasons),
    )


def _late(record: Record, found: Mapping[str, Percentile], rules: Rules) -> list[str]:
    """Return why its own delays may have moved a percentile: more requests were late than lie above it."""
    delay_s = np.nan_to_num(record.issue_delay_s, nan=np.inf)
    worst = ""
    for name, one in found.items():
        late_s = max(rules.late_s, rules.late_share * one.value_s)
        late = int(np.count_nonzero(delay_s > late_s))
        room = max(1.0, len(record) * (1 - one.percent / 100))  # a single one proves nothing
        if late > room:
            worst = (
                f"the generator was late: {late:,} of {len(record):,} requests were issued more than {late_s * 1e3:.3g} ms "
                f"after they were due, and {name} is the server's alone only up to {int(room):,}. Lower the rate, give the "
                "generator more of the CPU, or send from several machines"
            )
    return [worst] if worst else []


def _moved(record: Record, rules: Rules) -> list[str]:
    reasons = []
    early = int(np.count_nonzero(record.issue_delay_s < -rules.early_s))
    if early:
        reasons.append(
            f"the schedule was not kept: {early:,} of {len(record):,} requests were issued more than "
            f"{rules.early_s * 1e3:g} ms before they were due. That is a fault of the generator: report it"
        )
    dropped = record.count(Outcome.DROPPED)
    if dropped:
        reasons.append(
            f"the generator left out {dropped:,} of {len(record):,} due requests (they count as timed out). "
            "Lower the rate, or let more requests be in flight"
        )
    return reasons


def _bound(own: OwnUse | None, rules: Rules) -> list[str]:
    if own is None:
        return []
    reasons = []
    if own.cpu_share > rules.max_cpu_share:
        reasons.append(
            f"the generator was out of CPU: it used {own.cpu_share:.0%} of the {own.cores:g} core(s) it can use, "
            f"{rules.max_cpu_share:.0%} is its limit. Lower the rate, or send from several processes or machines"
        )
    if own.full_s > rules.max_full_share * own.wall_s:
        reasons.append(
            f"the generator's own bound held requests back: for {own.full_s:.3g} s of {own.wall_s:.3g} s due requests waited "
            f"because {own.max_in_flight:,} were in flight, its limit. Allow more in flight"
        )
    return reasons


def _notes(
    record: Record,
    own: OwnUse | None,
    goal: LatencyGoal | None,
    timeout_s: float,
    found: Mapping[str, Percentile],
    answer: GoalAnswer | None,
    cautious: GoalAnswer | None,
) -> list[str]:
    notes = []
    bad = len(record) - record.count(Outcome.OK)
    if bad == len(record):
        notes.append("no request was answered rightly: the figures are the timeout's")
    elif bad:
        names = ", ".join(
            f"{record.count(outcome):,} {outcome.name.lower().replace('_', ' ')}"
            for outcome in Outcome
            if outcome != Outcome.OK and record.count(outcome)
        )
        notes.append(f"requests without a right answer count as {timeout_s:g} s at least: {names}")
    if goal is not None and goal.limit_s >= timeout_s:
        notes.append(
            f"requests were given up after {timeout_s:g} s and count as over the limit of {goal}, which some might have met. "
            "Set a timeout above the limit"
        )
    for name, one in found.items():
        if one.high_s is None:
            notes.append(f"{name} is not bounded from above by {len(record):,} requests: run for longer")
    if answer is not None and cautious is not None and cautious.answer != answer.answer:
        notes.append(
            f"latencies hang together: {cautious.clustering:.0f} requests tell as much as one independent one, and counted so "
            f"the goal is {cautious.answer}, not {answer.answer}. Run for longer to be sure"
        )
    if own is None:
        notes.append("what the generator itself used is not known, so it is not checked that it was not the bottleneck")
    return notes
