"""A virtual clock under the broker's own deciders: a trace of jobs is run on a fleet, and every wait and restart is counted.

Nothing of placement or queueing is written here. The simulation makes the events a ledger would hold (`lease.requested`,
`lease.active`, `lease.ended` ...), hands them to `decide.placement.Placement`, and does what its plan says. What the trace
knows and a broker does not (how long a job will take) never reaches a decider: an event carries the lease alone and, where
the trace has one, the estimate.

    arrival ──► requested ──► plan ──► active ──► slot over ──► renewed (goes on) │ ended, requested again (gives way)
                                          └────► work done ──► ended

Work that a job has done is kept when it gives way; each start after the first costs `Policy.restart_s` of its lease.
Deterministic: the seed only settles in which order jobs of the same second come (0: the trace's).
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenure.decide.placement import Grant, Placement, Plan
from tenure.decide.queueing import order_named
from tenure.decide.rules import rule_named
from tenure.errors import SpecError
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.nodes import Node
from tenure.resources import Envelope

_COMMAND = Command(argv=("simulated",))
_FOREVER_S = 3650 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceJob:
    """One job of a trace: a gang of equal members that run together or not at all."""

    id: str
    tenant: str
    submit_s: float
    """Seconds from the trace's start."""
    envelope: Envelope
    """Of each member; its `slot_s` and `total_s` are the policy's to set."""
    members: int = 1
    duration_s: float
    """Seconds of service it needs, without restarts. No decider sees it."""
    estimate_s: float | None = None
    """What its owner says it will take; None: says nothing."""

    def __post_init__(self) -> None:
        if self.members < 1 or self.submit_s < 0 or self.duration_s <= 0:
            raise SpecError(
                f"job {self.id}: members >= 1, submit_s >= 0 and duration_s > 0 are needed; found {self.members}, "
                f"{self.submit_s!r}, {self.duration_s!r}"
            )


Trace = Sequence[TraceJob]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is tried."""

    order: str = "fifo"
    """Whose turn it is: a name of `decide.queueing.ORDERS`."""
    placement: str = "tenure"
    """Which node: a name of `decide.rules.RULES`."""
    slot_s: float = 3600.0
    """How long one lease may live before it renews or gives way."""
    restart_s: float = 60.0
    """What each start after the first costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """What became of one job. Times are seconds from the trace's start."""

    id: str
    tenant: str
    submit_s: float
    gpus: float
    """Of all members together."""
    duration_s: float
    """Service it needs, as the trace has it."""
    first_start_s: float | None
    """None: it never started."""
    end_s: float | None
    restarts: int
    dropped: str = ""
    """Why the fleet could never hold it; empty: it could."""

    @property
    def completion_s(self) -> float | None:
        """Seconds from submission to completion, None while it has not completed."""
        return None if self.end_s is None else self.end_s - self.submit_s


@dataclass(frozen=True, slots=True)
class Sample:
    """The fleet at one moment."""

    at_s: float
    allocated: float
    """Share of the fleet's GPUs that leases hold (of its CPUs, when it has no GPU)."""
    waiting: int
    """Jobs that wait."""
    waiting_amount: float
    """GPUs (CPUs, in a fleet without any) that they ask for."""
    fragmentation: float
    """Share of what is free that lies on nodes with too little of it for the largest waiting member; 0 when none waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run of a trace under a policy."""

    policy: Policy
    seed: int
    jobs: tuple[JobOutcome, ...]
    """In the trace's order."""
    series: tuple[Sample, ...]


Progress = Callable[[float, int, int], None]
"""Called now and then with the virtual time in seconds, the jobs completed or dropped, and all jobs."""


def simulate(
    trace: Trace,
    fleet: Sequence[Node],
    policy: Policy,
    *,
    seed: int = 0,
    sample_each_s: float | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run a trace on a fleet to its end. Raises SpecError for two jobs of one id or a fleet without nodes.

    sample_each_s: at least so far apart are the samples of the series; None: a slot.
    """
    simulation = Simulation(trace, fleet, policy, seed=seed, sample_each_s=sample_each_s)
    while simulation.step():
        if progress is not None and simulation.steps % 1000 == 0:
            progress(simulation.now_s, simulation.finished, len(trace))
    return simulation.outcome()


@dataclass(slots=True)
class _Live:
    """A job that has come and not gone."""

    job: TraceJob
    left_s: float
    """Seconds the present lease still had to run when it began, its restart cost included."""
    leases: tuple[Lease, ...] = ()
    attempt: int = 0
    began_s: float = 0.0
    """Start of the present lease."""
    first_start_s: float | None = None
    ends_s: float = 0.0


class Simulation:
    """One run of a trace, step by step. Pickles between steps, so that a long one can be laid down and taken up again."""

    def __init__(
        self, trace: Trace, fleet: Sequence[Node], policy: Policy, *, seed: int = 0, sample_each_s: float | None = None
    ) -> None:
        if not fleet:
            raise SpecError("a simulation needs at least one node; found none")
        if len({job.id for job in trace}) != len(trace):
            raise SpecError("two jobs of the trace have the same id; ids must differ")
        self.policy, self.seed, self.now_s, self.steps, self.finished = policy, seed, 0.0, 0, 0
        self._sample_each_s = policy.slot_s if sample_each_s is None else sample_each_s
        self._trace, self._fleet = tuple(trace), tuple(fleet)
        self._placement = Placement(rule=rule_named(policy.placement), order=order_named(policy.order))
        tie = list(range(len(trace)))
        if seed:
            random.Random(seed).shuffle(tie)
        self._arrivals = sorted(range(len(trace)), key=lambda i: (trace[i].submit_s, tie[i]), reverse=True)
        self._live: dict[str, _Live] = {}
        self._waiting: dict[str, _Live] = {}
        self._ends: list[tuple[float, str, int]] = []
        self._outcomes: dict[str, JobOutcome] = {}
        self._series: list[Sample] = []
        self._seq = 0
        for node in fleet:
            self._tell("node.up", node=node.name, data={"node": node})

    def step(self) -> bool:
        """Go to the next moment at which something happens, and do what the plan says. Return whether there was one."""
        moments = [self._trace[self._arrivals[-1]].submit_s] if self._arrivals else []
        moments += [self._ends[0][0]] if self._ends else []
        if not moments:
            return False
        self.now_s = min(moments)
        self.steps += 1
        ending = self._take_ends()
        while self._arrivals and self._trace[self._arrivals[-1]].submit_s <= self.now_s:
            job = self._trace[self._arrivals.pop()]
            live = self._live[job.id] = _Live(job=job, left_s=job.duration_s)
            self._request(live)
        self._do(ending)
        return True

    def outcome(self) -> Outcome:
        """Return what is known by now."""
        jobs = tuple(
            self._outcomes.get(job.id) or _so_far(self._live.get(job.id) or _Live(job=job, left_s=0.0)) for job in self._trace
        )
        return Outcome(policy=self.policy, seed=self.seed, jobs=jobs, series=tuple(self._series))

    # --- what happens ---

    def _tell(self, kind: str, data: Mapping[str, Any], *, node: str = "") -> None:
        self._seq += 1
        self._placement.apply(Event(seq=self._seq, at_s=self.now_s, kind=kind, who="broker", node=node, data=data))

    def _request(self, live: _Live) -> None:
        job, gang = live.job, f"{live.job.id}/{live.attempt}"
        envelope = replace(job.envelope, slot_s=self.policy.slot_s, total_s=_FOREVER_S)
        live.leases = tuple(
            Lease(
                id=f"{gang}/{worker}",
                run_id=job.id,
                stage="job",
                worker=worker,
                gang_id=gang,
                tenant=job.tenant,
                envelope=envelope,
                command=_COMMAND,
                requested_at_s=self.now_s,
            )
            for worker in range(job.members)
        )
        self._waiting[job.id] = live
        said = {} if job.estimate_s is None else {"estimate_s": job.estimate_s}
        for lease in live.leases:
            self._tell("lease.requested", {"lease": lease, **said})

    def _take_ends(self) -> list[_Live]:
        """End what has completed by now; return the jobs whose slot is over."""
        ending = []
        while self._ends and self._ends[0][0] <= self.now_s:
            _, name, attempt = heapq.heappop(self._ends)
            live = self._live.get(name)
            if live is None or live.attempt != attempt or live.ends_s > self.now_s:
                continue
            if self.now_s >= live.began_s + live.left_s:
                self._end(live, EndReason.COMPLETED)
                self._finish(live)
            else:
                ending.append(live)
        return ending

    def _do(self, ending: Sequence[_Live]) -> None:
        plan = self._placement.plan(self.now_s, ending=[lease.id for live in ending for lease in live.leases])
        renewed, gave_way = set(plan.renewals), False
        for live in ending:
            if live.leases[0].id in renewed:
                self._renew(live)
                continue
            gave_way = True
            live.left_s += live.began_s - self.now_s + self.policy.restart_s
            self._end(live, EndReason.EXPIRED)
            live.attempt += 1
            self._request(live)
        self._grant(plan)
        if gave_way:  # there may be room elsewhere for one that could not stay
            self._grant(self._placement.plan(self.now_s))
        over = not self._arrivals and not self._live
        if over or not self._series or self.now_s - self._series[-1].at_s >= self._sample_each_s:
            self._series.append(self._sample())

    def _grant(self, plan: Plan) -> None:
        for lack in plan.impossible:
            live = self._waiting.get(_job_of(lack.lease_id))
            if live is not None:
                self._drop(live, "; ".join(f"{node}: {why}" for node, why in sorted(lack.reasons.items())))
        gangs: dict[str, dict[str, Grant]] = {}
        for grant in plan.grants:
            gangs.setdefault(_job_of(grant.lease_id), {})[grant.lease_id] = grant
        for name, where in gangs.items():
            self._start(self._waiting.pop(name), where)

    def _start(self, live: _Live, where: Mapping[str, Grant]) -> None:
        ends_s = self._slot_end_s()
        live.leases = tuple(
            replace(
                lease,
                state=LeaseState.ACTIVE,
                node=where[lease.id].node,
                devices=where[lease.id].devices,
                starts_at_s=self.now_s,
                ends_at_s=ends_s,
                total_ends_at_s=self.now_s + _FOREVER_S,
            )
            for lease in live.leases
        )
        live.began_s = self.now_s
        live.first_start_s = self.now_s if live.first_start_s is None else live.first_start_s
        for lease in live.leases:
            self._tell("lease.active", {"lease": lease})
        self._schedule(live, ends_s)

    def _renew(self, live: _Live) -> None:
        ends_s = self._slot_end_s()
        live.leases = tuple(replace(lease, ends_at_s=ends_s) for lease in live.leases)
        for lease in live.leases:
            self._tell("lease.renewed", {"lease": lease})
        self._schedule(live, ends_s)

    def _schedule(self, live: _Live, slot_end_s: float) -> None:
        live.ends_s = min(slot_end_s, live.began_s + live.left_s)
        heapq.heappush(self._ends, (live.ends_s, live.job.id, live.attempt))

    def _slot_end_s(self) -> float:
        """Slots end together, so that room for a gang comes up; a rest shorter than a tenth is added to the next."""
        slot_s = self.policy.slot_s
        end_s = (math.floor(self.now_s / slot_s) + 1) * slot_s
        return end_s if end_s - self.now_s >= 0.1 * slot_s else end_s + slot_s

    def _end(self, live: _Live, reason: EndReason) -> None:
        live.leases = tuple(
            replace(lease, state=LeaseState.ENDED, end_reason=reason, ended_at_s=self.now_s) for lease in live.leases
        )
        for lease in live.leases:
            self._tell("lease.ended", {"lease": lease})

    def _drop(self, live: _Live, why: str) -> None:
        del self._waiting[live.job.id]
        self._end(live, EndReason.CANCELLED)
        self._finish(live, why)

    def _finish(self, live: _Live, why: str = "") -> None:
        self.finished += 1
        self._outcomes[live.job.id] = replace(_so_far(live), end_s=None if why else self.now_s, dropped=why)
        del self._live[live.job.id]

    # --- for people ---

    def _sample(self) -> Sample:
        by_gpu = any(node.capacity.gpus for node in self._fleet)
        total, free = 0.0, []
        for node in self._fleet:
            amount = len(node.capacity.gpus) if by_gpu else node.capacity.cpus
            room, total = self._placement.taken(node.name), total + amount
            free.append(amount - (sum(share for share, _ in room.devices.values()) if by_gpu else room.cpus))
        asked = [
            (live.job.envelope.gpus if by_gpu else live.job.envelope.cpus, live.job.members) for live in self._waiting.values()
        ]
        all_free, largest = sum(free), max((need for need, _ in asked), default=0.0)
        return Sample(
            at_s=self.now_s,
            allocated=1 - all_free / total,
            waiting=len(asked),
            waiting_amount=sum(need * members for need, members in asked),
            fragmentation=sum(amount for amount in free if amount < largest) / all_free if all_free > 1e-6 else 0.0,
        )


def _job_of(lease_id: str) -> str:
    return lease_id.rsplit("/", 2)[0]


def _so_far(live: _Live) -> JobOutcome:
    job = live.job
    return JobOutcome(
        id=job.id,
        tenant=job.tenant,
        submit_s=job.submit_s,
        gpus=job.envelope.gpus * job.members,
        duration_s=job.duration_s,
        first_start_s=live.first_start_s,
        end_s=None,
        restarts=live.attempt,
    )
