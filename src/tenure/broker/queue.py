"""The queue: gangs asked for, granted when `decide` finds room, given up when their time is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tenure import wire
from tenure.broker.attempts import Attempts
from tenure.broker.book import Book
from tenure.broker.policies import Policies
from tenure.decide.packing import Packing, shortage
from tenure.decide.placement import Grant, Plan
from tenure.decide.reserving import is_ahead, reach_s
from tenure.errors import Conflict, NoPlacement, Refused, SpecError
from tenure.leases import EndReason, Lease, LeaseState, changed, granted
from tenure.ledger import queries
from tenure.resources import format_duration
from tenure.tenants import check_name

MAX_LIVE_LEASES = 20_000
MAX_QUEUE_S = 7 * 86400.0


class Queue:
    """Takes requests in and grants them."""

    def __init__(self, book: Book, attempts: Attempts, policies: Policies, *, new_id: Callable[[], str]) -> None:
        self._book, self._attempts, self._policies, self._new_id = book, attempts, policies, new_id
        self._asked = False
        book.before_commit = self._answer_asked
        self._noted: Plan | None = None

    async def request(self, asked: wire.RequestGang) -> tuple[Lease, ...]:
        """Write a gang's request down, once per gang id, and grant it when there is room; return the leases once on disk.

        Requests that come together are planned together and go to disk together.

        Raises NoPlacement (reason per node) when the nodes could not hold it even if idle (while one of them has never been
        reached it queues instead), Refused past MAX_LIVE_LEASES, Conflict when the gang id was used for something else,
        SpecError for a request that makes no sense.
        """
        known = self._known(asked)
        if known:
            return known
        _check(asked)
        if len(self._book.live) + len(asked.members) > MAX_LIVE_LEASES:
            raise Refused(
                f"gang {asked.gang_id} refused: {len(self._book.live)} leases are live, the limit is {MAX_LIVE_LEASES}. "
                "Wait until some have ended, or release some."
            )
        if self._book.placement.nodes() and not self._attempts.nodes.unseen():
            reasons = self._book.placement.what_if([member.envelope for member in asked.members], idle=True)
            if reasons:
                raise NoPlacement(_cannot_hold(asked), reasons)
        now_s = self._book.clock.utc_s()
        self._policies.admit(asked, now_s)
        begins_s = asked.starts_at_s if asked.starts_at_s > now_s else 0.0
        until_s = max(now_s, begins_s) + asked.queue_s
        places = self._reserve(asked, begins_s, now_s) if begins_s else ()
        with self._book.transaction() as tx:
            for number, member in enumerate(asked.members):
                lease = Lease(
                    id=self._new_id(),
                    run_id=asked.run_id,
                    stage=asked.stage,
                    worker=member.worker,
                    gang_id=asked.gang_id,
                    tenant=asked.tenant,
                    envelope=member.envelope,
                    command=member.command,
                    right_size=asked.right_size,
                    resumes=asked.resumes,
                    requested_at_s=now_s,
                )
                who = f"tenant:{asked.tenant}"
                tx.put_lease(lease, who=who, why=member.envelope.describe(), queue_until_s=until_s)
                if begins_s:
                    node, devices = places[number]
                    lease = changed(lease, LeaseState.RESERVED, node=node, devices=devices, starts_at_s=begins_s)
                    tx.put_lease(lease, who="broker", why=f"room on {node} is kept from then on")
                self._book.queue_until_s[lease.id] = until_s
        self._asked = True
        await self._book.durable()
        return self._known(asked)

    def _reserve(self, asked: wire.RequestGang, begins_s: float, now_s: float) -> Packing:
        """Return where a gang will have room from then on. Raises Refused when it will not."""
        envelopes = [member.envelope for member in asked.members]
        for_s = max(reach_s(member) for member in asked.members)
        ahead = self._book.placement.ahead(now_s)
        places = ahead.place(envelopes, begins_s, for_s)
        if places is None:
            full = "; ".join(
                f"node {name}: {shortage(room, envelopes[0], word='free then') or 'not for all of them together'}"
                for name, room in ahead.rooms(begins_s, for_s).items()
            )
            raise Refused(
                f"gang {asked.gang_id} refused: no node will have room for it from then on for {format_duration(for_s)} "
                f"({full or 'no node is up'}). Choose another time, or ask for less."
            )
        return places

    def _answer_asked(self) -> None:
        """Grant what was asked for since the last commit; what keeps it from being granted now may pass while it queues."""
        if self._asked:
            self._asked = False
            self.tick()

    def _known(self, asked: wire.RequestGang) -> tuple[Lease, ...]:
        with self._book.ledger.reading() as connection:
            known = queries.gang_leases(connection, asked.gang_id)
        if known and (known[0].run_id, known[0].stage, len(known)) != (asked.run_id, asked.stage, len(asked.members)):
            raise Conflict(
                f"gang {asked.gang_id} exists with {len(known)} leases of run {known[0].run_id} stage {known[0].stage}; "
                f"this request has {len(asked.members)} for run {asked.run_id} stage {asked.stage}. Use a new gang id."
            )
        return known

    def tick(self) -> None:
        """Give up what queued too long, and grant what has room."""
        waiting = [lease for lease in self._book.live.values() if not lease.holds]
        if not waiting:
            return
        now_s = self._book.clock.utc_s()
        plan = self._book.placement.plan(now_s)
        late = [
            lease for lease in waiting if now_s >= self._book.queue_until_s.get(lease.id, 0.0) and not is_ahead(lease, now_s)
        ]
        going = {grant.lease_id for grant in plan.grants}
        never = {
            lack.lease_id: "; ".join(f"node {node}: {why}" for node, why in sorted(lack.reasons.items()))
            for lack in plan.impossible
        }
        for lease in late:
            if lease.id not in going:
                why = plan.waiting.get(lease.id) or never.get(lease.id, "no room")
                self._attempts.end(lease, EndReason.CANCELLED, f"queued for {now_s - lease.requested_at_s:g} s: {why}")
        if not self._attempts.nodes.unseen():
            for lease_id, why in never.items():
                if lease_id in self._book.live:
                    self._attempts.end(self._book.live[lease_id], EndReason.CANCELLED, f"no node can hold it: {why}")
        gangs: dict[str, list[Grant]] = {}
        for grant in plan.grants:
            gangs.setdefault(self._book.live[grant.lease_id].gang_id or grant.lease_id, []).append(grant)
        for grants in gangs.values():
            self._grant(grants, now_s)
        if plan is not self._noted:
            self._note(plan.waiting)
            self._noted = plan

    def _note(self, waiting: Mapping[str, str]) -> None:
        """Write down of those that wait for the first time that they do, and for what."""
        live = self._book.live
        new = [lease_id for lease_id in waiting if lease_id in live and live[lease_id].state is LeaseState.REQUESTED]
        if new:
            with self._book.transaction() as tx:
                for lease_id in new:
                    tx.put_lease(changed(live[lease_id], LeaseState.QUEUED), who="broker", why=waiting[lease_id])

    def _grant(self, grants: list[Grant], now_s: float) -> None:
        """Grant a gang: one fence, one transaction, then the orders."""
        started = []
        with self._book.transaction() as tx:
            fence = tx.next_fence()
            for grant in grants:
                lease = self._book.live[grant.lease_id]
                lease = granted(lease, node=grant.node, devices=grant.devices, fence=fence, now_s=now_s)
                if not lease.command.on_event:
                    lease = replace(lease, attempt=self._attempts.next_attempt(tx, lease))
                    started.append(lease.id)
                tx.put_lease(lease, who="broker", why=f"placed on {grant.node}")
                if lease.command.on_event:
                    tx.put_lease(changed(lease, LeaseState.ACTIVE), who="broker", why="holds its envelope and waits for events")
        for lease_id in started:
            self._attempts.order(lease_id)


def _cannot_hold(asked: wire.RequestGang) -> str:
    wants = {member.envelope.describe() for member in asked.members}
    leases = f"{len(asked.members)} leases of" if len(asked.members) > 1 else "a lease of"
    return (
        f"gang {asked.gang_id} (run {asked.run_id}, stage {asked.stage}) refused: {leases} {' and '.join(sorted(wants))} "
        "would not fit even on idle nodes. Ask for less."
    )


def _check(asked: wire.RequestGang) -> None:
    check_name("tenant", asked.tenant)
    for what, name in (("run", asked.run_id), ("stage", asked.stage), ("gang", asked.gang_id)):
        if not name or name in (".", "..") or "/" in name or "\0" in name or len(name) > 128:
            raise SpecError(f"{what} id {name!r} is not allowed: it names a folder (1 to 128 characters, no slash)")
    if not 1 <= len(asked.members) <= 256:
        raise SpecError(f"gang {asked.gang_id} must have 1 to 256 members; found {len(asked.members)}")
    workers = [member.worker for member in asked.members]
    if len(set(workers)) != len(workers) or min(workers) < 0:
        raise SpecError(f"gang {asked.gang_id}: worker numbers must be different and not negative; found {workers}")
    if not 0 <= asked.resumes <= 1000:
        raise SpecError(f"gang {asked.gang_id}: resumes must lie between 0 and 1,000; found {asked.resumes}")
    if not 0 <= asked.queue_s <= MAX_QUEUE_S:
        raise SpecError(f"gang {asked.gang_id}: queue_s must lie between 0 and {MAX_QUEUE_S:g}; found {asked.queue_s!r}")
