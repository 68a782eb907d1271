"""Whose turn it is: a fold over leases that keeps the waiting gangs in order. Not here: whether there is room (`placement`).

An `Order` is one way to queue. First come, first served needs nothing but the time of the request. The others go by *service*:
what a job (a stage of a run) has been given so far, times a power of its gang's part of the fleet. Few jobs are long, and how
long one will be shows in how long it has been: whoever has had least goes first, and at the end of its slot a gang gives way to
those that have had less than half of what it has. Where owners say how long a job will take, the expected service per
completion takes the place of what it has had (`estimates`).

Three rules stand above that order, in this turn:
- who waits for a first lease longer than `first_lease_s` goes first, the longest waiting before the rest, and what does not fit
  holds back all behind it;
- a tenant that holds less than its floor, a part of an equal share among the tenants with work, goes before those above theirs;
- gangs of a run that already holds a lease go before others, since making them wait for newcomers would have both wait for
  each other.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from typing import TYPE_CHECKING

from tenure.errors import SpecError
from tenure.leases import EndReason, Lease, LeaseState
from tenure.resources import Capacity, Envelope

if TYPE_CHECKING:
    from .estimates import Estimates

MAX_REMEMBERED = 50_000
"""Jobs between two leases whose service is remembered; the one that has not been heard of for longest is forgotten first."""
WIDTH_POWER = 0.7
"""How much a gang's width weighs against its service: 1 would count GPU-hours, 0 hours."""
STAY = 0.5
"""A gang that runs counts as having had this part of its service: only who has had less than that takes its place."""
TAIL = 0.5
"""Run times nobody says anything of: P(X > x) falls with this power of x, so one more completion costs service / TAIL."""
FRESH_S = 600.0
"""Service that every job counts as having had, so that among new ones the width decides."""
_GOES_ON = frozenset({EndReason.EXPIRED, EndReason.PREEMPTED, EndReason.NODE_LOST, EndReason.RECLAIMED_IDLE})
"""Ends of a lease after which the job may ask for another."""
WAITING = frozenset({LeaseState.REQUESTED, LeaseState.RESERVED, LeaseState.QUEUED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One way to queue."""

    name: str
    means: str
    """In words."""
    backfill: bool = False
    """Whether those behind a gang without room may go before it."""
    by_service: bool = False
    """Whether the least service goes first, instead of the oldest request."""
    gives_way: bool = False
    """Whether a gang whose slot is over may have to make room."""
    floor: float = 0.0
    """Part, up to 1, of an equal share of the fleet; a tenant that holds less than that goes before those that hold more."""
    first_lease_s: float = math.inf
    """How long a job may wait for its first lease before it goes first."""
    estimates: bool = False
    """Whether what owners say about run times counts."""


FIFO = Order(name="fifo", means="first come, first served; who waits for room holds back those behind")
FAIR = Order(
    name="fair",
    means="least service first, by estimates where there are some; half an equal share per tenant; who waited 12 h goes first",
    backfill=True,
    by_service=True,
    gives_way=True,
    floor=0.5,
    first_lease_s=12 * 3600.0,
    estimates=True,
)
ORDERS: Mapping[str, Order] = {
    order.name: order
    for order in (
        FIFO,
        Order(name="backfill", means="first come, first served; who fits goes before who does not", backfill=True),
        Order(
            name="las",
            means="least attained service first, whoever asks and whatever was estimated",
            backfill=True,
            by_service=True,
            gives_way=True,
        ),
        FAIR,
    )
}
"""By name."""


def order_named(name: str) -> Order:
    """Return an order by name. Raises SpecError that lists those there are."""
    if name not in ORDERS:
        raise SpecError(f"no order of the queue is called {name!r}; there are: {', '.join(ORDERS)}")
    return ORDERS[name]


Amounts = tuple[int, int, int]
"""CPUs and GPUs in millionths, memory in bytes, in the order CPUs, memory, GPUs: whole numbers add up whatever the order."""


def amounts(envelope: Envelope) -> Amounts:
    """Return what of the fleet an envelope takes."""
    return round(envelope.cpus * 1e6), envelope.memory_bytes, round(envelope.gpus * 1e6)


@dataclass(slots=True)
class Gang:
    """Leases that are granted together or not at all, and wait, or whose slot is over."""

    id: str
    job: tuple[str, str]
    """Run and stage."""
    tenant: str
    requested_at_s: float
    members: dict[str, Lease] = field(default_factory=dict)
    part: float = 0.0
    """Of the fleet: the largest of its parts of CPUs, memory and GPUs."""
    rank: float = 0.0
    ending: bool = False
    """It runs, and its slot is over."""
    overdue: bool = False
    """It has waited too long for its first lease."""

    def is_reserved(self) -> bool:
        """Return whether room was promised to it, now or later."""
        return not self.ending and all(lease.state is LeaseState.RESERVED for lease in self.members.values())

    def in_turn(self) -> list[Lease]:
        """Return the members by worker."""
        leases = list(self.members.values())
        return sorted(leases, key=lambda lease: (lease.worker, lease.id)) if len(leases) > 1 else leases


@dataclass(slots=True)
class _Job:
    served_s: float = 0.0
    """By leases that have ended, summed over workers."""
    workers: int = 1
    """The most that held a lease, or waited for one, at the same time."""
    holding: dict[str, float] = field(default_factory=dict)
    """Lease -> when it began."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Gang -> leases of it that wait."""
    estimate_s: float | None = None

    def had_s(self, now_s: float) -> float:
        """Return the service it has had, per worker."""
        return (self.served_s + sum(now_s - began_s for began_s in self.holding.values())) / self.workers


@dataclass(slots=True)
class _Tenant:
    leases: int = 0
    """That wait or are held."""
    amounts: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Held."""


class Queue:
    """The waiting gangs in order, kept up to date lease by lease."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._gangs: dict[str, Gang] = {}
        self._running: Counter[str] = Counter()  # run -> leases held
        # The rest only where service decides.
        self._total: Amounts = (0, 0, 0)
        self._sorted: list[tuple[float, float, str]] = []  # (rank, requested at, gang)
        self._stale = False  # whether ranks have to be worked out anew
        self._first: dict[str, float] = {}  # gangs whose job was never served -> requested at, oldest first
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._tenants: dict[str, _Tenant] = {}  # those with a lease that waits or is held
        self._estimates: Estimates | None = None

    def resize(self, capacities: Iterable[Capacity]) -> None:
        """Take in what the fleet now is."""
        total = [0, 0, 0]
        for capacity in capacities:
            total[0] += round(capacity.cpus * 1e6)
            total[1] += capacity.memory_bytes
            total[2] += 1_000_000 * len(capacity.gpus)
        self._total, self._stale = (total[0], total[1], total[2]), True

    def put(self, lease: Lease, was: Lease | None, estimate_s: float | None = None) -> None:
        """Take in a lease as it now is. was: as it was, None when it was not known. estimate_s: what its owner says."""
        if was is not None and was.state in WAITING:
            self._leave(was)
        for known, change in ((was, -1), (lease, 1)):
            if known is not None and known.holds:
                self._hold(known, change)
        if self.order.by_service:
            self._serve(lease, estimate_s)
        if lease.state in WAITING:
            self._enter(lease)

    def turns(self, now_s: float, ending: Sequence[Gang] = ()) -> list[Gang]:
        """Return the gangs that wait, and those that run and whose slot is over, in the order in which they are served."""
        if not self.order.by_service:
            if len(self._gangs) == 1:
                return list(self._gangs.values())
            return sorted(self._gangs.values(), key=lambda g: (g.job[0] not in self._running, g.requested_at_s, g.id))
        if self._stale:
            self._sort_anew()
        gangs = [self._gangs[name] for _, _, name in self._sorted]
        first = self._overdue(now_s) + [gang for gang in gangs if not gang.overdue and gang.job[0] in self._running]
        if ending:
            gangs = list(merge(gangs, sorted(ending, key=_by_rank), key=_by_rank))
        if first:
            before = {gang.id for gang in first}
            gangs = [gang for gang in gangs if gang.id not in before]
        competing = self.order.floor and len(self._tenants) > 1
        return first + (self._by_floor(first, gangs, ending) if competing else gangs)

    def running(self, name: str, leases: Sequence[Lease], now_s: float) -> Gang:
        """Return a gang that runs and whose slot is over, with its rank."""
        lease = leases[0]
        gang = Gang(name, (lease.run_id, lease.stage), lease.tenant, lease.requested_at_s, ending=True)
        gang.members = {member.id: member for member in leases}
        if self.order.by_service:
            gang.part = self._part(gang)
            gang.rank = STAY * self._rank(gang, self._jobs[gang.job].had_s(now_s))
        return gang

    # --- what is held and waits ---

    def _hold(self, lease: Lease, change: int) -> None:
        self._running[lease.run_id] += change
        if not self._running[lease.run_id]:
            del self._running[lease.run_id]
        if self.order.by_service:
            held = self._tenants.setdefault(lease.tenant, _Tenant())
            for kind, amount in enumerate(amounts(lease.envelope)):
                held.amounts[kind] += change * amount
            self._count(lease, change)

    def _count(self, lease: Lease, change: int) -> None:
        tenant = self._tenants.setdefault(lease.tenant, _Tenant())
        tenant.leases += change
        if not tenant.leases:
            del self._tenants[lease.tenant]

    def _serve(self, lease: Lease, estimate_s: float | None) -> None:
        key = (lease.run_id, lease.stage)
        job = self._jobs.pop(key, None)
        if job is None:
            if lease.state is LeaseState.ENDED:
                return
            job = _Job()
            self._forget_one()
        self._jobs[key] = job  # the last heard of comes last
        if self.order.estimates and estimate_s not in (None, job.estimate_s):
            job.estimate_s = estimate_s
            self._sort_again(job)
        if lease.holds:
            job.holding[lease.id] = lease.starts_at_s
            if len(job.holding) > job.workers:
                job.workers = len(job.holding)
                self._sort_again(job)
            return
        began_s = job.holding.pop(lease.id, None)
        if lease.state is not LeaseState.ENDED:
            return
        if began_s is not None:
            job.served_s += max(0.0, lease.ended_at_s - began_s)
            self._sort_again(job)
        if not job.holding and not job.waiting and lease.end_reason not in _GOES_ON:
            del self._jobs[key]
            if lease.end_reason is EndReason.COMPLETED and job.estimate_s is not None:
                self._stale |= self._known().learn(took_s=job.served_s / job.workers, estimate_s=job.estimate_s)

    def _forget_one(self) -> None:
        if len(self._jobs) < MAX_REMEMBERED:
            return
        for key, job in self._jobs.items():
            if not job.holding and not job.waiting:
                del self._jobs[key]
                return

    def _enter(self, lease: Lease) -> None:
        name = lease.gang_id or lease.id
        gang = self._gangs.get(name)
        if gang is None:
            gang = self._gangs[name] = Gang(name, (lease.run_id, lease.stage), lease.tenant, lease.requested_at_s)
        elif self.order.by_service:
            self._unsort(gang)
        gang.members[lease.id] = lease
        gang.requested_at_s = min(gang.requested_at_s, lease.requested_at_s)
        if self.order.by_service:
            self._count(lease, 1)
            job = self._jobs[gang.job]
            job.waiting[name] += 1
            self._sort(gang)
            if len(gang.members) > job.workers:
                job.workers = len(gang.members)
                self._sort_again(job)
            if not job.served_s and not job.holding:
                self._first.setdefault(name, gang.requested_at_s)

    def _leave(self, lease: Lease) -> None:
        gang = self._gangs[lease.gang_id or lease.id]
        if self.order.by_service:
            self._unsort(gang)
            self._count(lease, -1)
            job = self._jobs[gang.job]
            job.waiting[gang.id] -= 1
            if not job.waiting[gang.id]:
                del job.waiting[gang.id]
        del gang.members[lease.id]
        if not gang.members:
            del self._gangs[gang.id]
            self._first.pop(gang.id, None)
        elif self.order.by_service:
            self._sort(gang)

    # --- order ---

    def _sort(self, gang: Gang) -> None:
        job = self._jobs[gang.job]
        gang.part = self._part(gang)
        gang.rank = self._rank(gang, job.served_s / job.workers)
        insort(self._sorted, _by_rank(gang))

    def _unsort(self, gang: Gang) -> None:
        del self._sorted[bisect_left(self._sorted, _by_rank(gang))]

    def _sort_again(self, job: _Job) -> None:
        """What the job has had has changed, and with it the rank of its other gangs that wait."""
        for name in job.waiting:
            self._unsort(self._gangs[name])
            self._sort(self._gangs[name])

    def _sort_anew(self) -> None:
        self._sorted, self._stale = [], False
        for gang in self._gangs.values():
            self._sort(gang)

    def _part(self, gang: Gang) -> float:
        sums = [sum(column) for column in zip(*[amounts(lease.envelope) for lease in gang.members.values()], strict=True)]
        return self._share(sums)

    def _share(self, sums: Sequence[int]) -> float:
        return max((amount / total for amount, total in zip(sums, self._total, strict=True) if total), default=0.0)

    def _rank(self, gang: Gang, had_s: float) -> float:
        estimate_s = self._jobs[gang.job].estimate_s
        if estimate_s is None:
            service_s = (had_s + FRESH_S) / TAIL
        else:
            service_s = self._known().service_per_completion_s(estimate_s, had_s)
        return service_s * math.pow(max(gang.part, 1e-9), WIDTH_POWER)

    def _known(self) -> Estimates:
        if self._estimates is None:
            from .estimates import Estimates  # brings NumPy and SciPy, which a fleet without estimates has no use for

            self._estimates = Estimates()
        return self._estimates

    def _overdue(self, now_s: float) -> list[Gang]:
        late = []
        for name, requested_at_s in self._first.items():
            if now_s - requested_at_s < self.order.first_lease_s:
                break
            gang = self._gangs[name]
            gang.overdue = True
            late.append(gang)
        return late

    def _by_floor(self, before: Sequence[Gang], gangs: Sequence[Gang], ending: Sequence[Gang]) -> list[Gang]:
        """Return first those with which their tenant stays within its floor, then the rest, each in order."""
        floor = self.order.floor / len(self._tenants)
        used = {name: list(tenant.amounts) for name, tenant in self._tenants.items()}
        for gang in ending:
            for lease in gang.members.values():
                used[gang.tenant] = [a - b for a, b in zip(used[gang.tenant], amounts(lease.envelope), strict=True)]
        shares = {tenant: self._share(sums) for tenant, sums in used.items()}
        for gang in before:
            shares[gang.tenant] += gang.part
        below: list[Gang] = []
        above: list[Gang] = []
        for gang in gangs:
            with_it = shares[gang.tenant] + gang.part
            if with_it <= floor + 1e-9:
                shares[gang.tenant] = with_it
                below.append(gang)
            else:
                above.append(gang)
        return below + above


def _by_rank(gang: Gang) -> tuple[float, float, str]:
    return gang.rank, gang.requested_at_s, gang.id
