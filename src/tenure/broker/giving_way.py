"""Giving way: leases that make room for those whose turn it is, by the order of the queue (`las`, `fair`).

    at a renewal          its turn or not? ──► renewed, or refused: it goes on to its slot's end and ends there, preempted
    within a slot         only past the time that its tenant's policy guarantees: SIGTERM, the grace, and its room is free

A gang that waits for events has slots of its own making, one after the other: it may be asked from the end of its first slot
on, unless its policy says otherwise. Who gives way, and to whom, `decide` says. Gangs leave whole, and nobody else is asked
while they leave: their room is to be had first. A job that was preempted may ask again; what it has had counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tenure.broker.attempts import Attempts
from tenure.broker.book import Book
from tenure.broker.policies import Policies
from tenure.decide.placement import Plan
from tenure.decide.reserving import is_ahead
from tenure.leases import EndReason, Lease, LeaseState

LOOK_EVERY_S = 1.0


class GivingWay:
    """Asks gangs to leave when it is others' turn."""

    def __init__(self, book: Book, attempts: Attempts, policies: Policies, *, quiet: bool = False) -> None:
        """quiet: those who give way are not told to whom."""
        self._book, self._attempts, self._policies, self._quiet = book, attempts, policies, quiet
        self._looked_s = float("-inf")

    def tick(self) -> None:
        """Have those give way whose guaranteed time is over and whose room others are to have now."""
        boot_s, now_s = self._book.clock.boot_s(), self._book.clock.utc_s()
        if not self._book.placement.order.gives_way or boot_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = boot_s
        if not self._anyone_waits(now_s) or any(_is_leaving(lease) for lease in self._book.live.values()):
            return
        ending = [
            lease
            for gang in self._gangs()
            if all(lease.state is LeaseState.ACTIVE and now_s >= self._preemptible_s(lease) for lease in gang)
            for lease in gang
        ]
        if not ending:
            return
        plan = self._book.placement.plan(now_s, ending=[lease.id for lease in ending])
        for lease in ending:
            if lease.id not in plan.renewals:
                self._attempts.drain(lease, EndReason.PREEMPTED, self._why(plan))

    def refuses(self, lease: Lease) -> str:
        """Return why a lease is not to be renewed now, for others whose turn it is; "" when it is its own turn.

        What is refused is written down: unless a later renewal is granted, it ends preempted with its slot.
        """
        now_s = self._book.clock.utc_s()
        gang = [other for other in self._book.live.values() if other.holds and _gang(other) == _gang(lease)]
        if not self._book.placement.order.gives_way or not self._anyone_waits(now_s) or any(map(_is_leaving, gang)):
            return ""
        plan = self._book.placement.plan(now_s, ending=[member.id for member in gang])
        if lease.id in plan.renewals or lease.id not in {member.id for member in gang}:
            return ""
        why = self._why(plan)
        new = [member for member in gang if member.end_reason is None]
        if new:
            with self._book.transaction() as tx:
                for member in new:
                    marked = replace(member, end_reason=EndReason.PREEMPTED, end_detail=why)
                    tx.put_lease(marked, kind="lease.gives_way", who="broker", why=why)
        return why

    def _anyone_waits(self, now_s: float) -> bool:
        return any(not lease.holds and not is_ahead(lease, now_s) for lease in self._book.live.values())

    def _gangs(self) -> list[list[Lease]]:
        gangs: dict[str, list[Lease]] = {}
        for lease in self._book.live.values():
            if lease.holds:
                gangs.setdefault(_gang(lease), []).append(lease)
        return list(gangs.values())

    def _preemptible_s(self, lease: Lease) -> float:
        guaranteed_s = self._policies.of(lease.tenant).guaranteed_s
        if guaranteed_s is None:
            guaranteed_s = lease.envelope.slot_s if lease.command.on_event else math.inf
        return lease.starts_at_s + guaranteed_s

    def _why(self, plan: Plan) -> str:
        if self._quiet:
            return f"gives way to others, whose turn it is by the order {self._book.order}"
        gangs: Sequence[str] = list(dict.fromkeys(_gang(self._book.live[grant.lease_id]) for grant in plan.grants))
        others = f" and {len(gangs) - 1} more" if len(gangs) > 1 else ""
        return f"gives way to {gangs[0]}{others}, whose turn it is by the order {self._book.order}" if gangs else "gives way"


def _gang(lease: Lease) -> str:
    return lease.gang_id or lease.id


def _is_leaving(lease: Lease) -> bool:
    return lease.state is LeaseState.DRAINING and lease.end_reason is EndReason.PREEMPTED
