"""Attempts: starting a lease's command on its node, and seeing to what follows when it has ended.

Every step is written down before it is ordered; `compare` brings ledger and node together again after either was away.
Not here: what an attempt is started with (`starting`), what its end makes of the lease (`decide.ends`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tenure import orders, wire
from tenure.broker.book import LOG, Book
from tenure.broker.nodes import Nodes
from tenure.broker.resuming import Resuming
from tenure.broker.secrets import Secrets
from tenure.broker.starting import StartSpecs
from tenure.broker.tenancy import Tenancy
from tenure.decide.ends import describe_exit, is_normal, reason_after
from tenure.errors import Conflict, NotFound, StaleFence, TenureError, Unavailable
from tenure.fleet.contract import Fleet
from tenure.leases import EndReason, Lease, LeaseState, changed
from tenure.ledger import queries
from tenure.ledger.queries import Invocation
from tenure.ledger.store import Transaction
from tenure.protocols import Exit, ExitKind

STOP_AGAIN_S = 5.0


class Attempts:
    """Starts and ends what runs inside leases."""

    def __init__(
        self,
        book: Book,
        fleet: Fleet,
        *,
        home: Path,
        tenancy: Tenancy,
        resuming: Resuming,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._book, self._fleet, self._resuming = book, fleet, resuming
        self.secrets = Secrets(book)
        self._specs = StartSpecs(home, tenancy=tenancy, secrets=self.secrets, environ=environ)
        self.nodes: Nodes
        self._starting: set[str] = set()
        self._stopped_s: dict[str, float] = {}
        self._told_s: dict[str, float] = {}
        """Lease -> the slot end that its node was last told, and confirmed."""
        self._not_started: dict[str, str] = {}
        """Lease -> why its node did not start the last attempt."""
        self._renewing: dict[str, asyncio.Lock] = {}
        self.resizing: set[str] = set()
        """Leases whose resize is under way in this broker."""

    # --- start ---

    def next_attempt(self, tx: Transaction, lease: Lease) -> int:
        """Return the attempt number to come: one per worker of a stage, so that no two ever share a folder."""
        return queries.last_attempt(tx.connection, lease.run_id, lease.stage, lease.worker) + 1

    def order(self, lease_id: str, event_file: str = "") -> None:
        """Start the attempt that was written down for a lease. Returns at once."""
        self._book.busy.add(lease_id)
        self._starting.add(lease_id)
        self._book.spawn(self._start(lease_id, self._book.live[lease_id].attempt, event_file))

    async def _start(self, lease_id: str, attempt: int, event_file: str) -> None:
        lease = self._book.live.get(lease_id)
        if lease is None or lease.attempt != attempt:
            self._starting.discard(lease_id)
            return
        now_s = self._book.clock.utc_s()
        if now_s >= lease.ends_at_s:
            self._starting.discard(lease_id)
            late = Exit(kind=ExitKind.OUT_OF_TIME, witness="its slot was over before it could be started", ended_at_s=now_s)
            self.ended(lease_id, attempt, late)
            return
        try:
            deadline_s, boot_id = self.nodes.deadline(lease.node, lease.ends_at_s - self._book.clock.utc_s())
            spec = self._specs.of(lease, deadline_boot_s=deadline_s, boot_id=boot_id, event_file=event_file)
            args = orders.AgentStart(runtime=lease.command.runtime, spec=spec)
            handle = await self._fleet.call(lease.node, "start", args, timeout_s=30.0)
        except TenureError as error:
            if isinstance(error, (Unavailable, Conflict)) and not isinstance(error, StaleFence):
                LOG.warning("lease %s: not started: %s", lease.id, error)  # `compare` finds out, and starts it again
                self._not_started[lease.id] = str(error)
                return
            end = Exit(kind=ExitKind.FAILED, code=127, witness=f"could not be started: {error}")
            self.ended(lease.id, lease.attempt, replace(end, ended_at_s=self._book.clock.utc_s()))
            return
        finally:
            self._starting.discard(lease.id)
        self._told_s[lease.id] = lease.ends_at_s
        self._not_started.pop(lease.id, None)
        self._runs(lease.id, handle.attempt, handle.pid)
        self._tell_slot(lease.id)

    def _runs(self, lease_id: str, attempt: int, pid: int) -> None:
        lease = self._book.live.get(lease_id)
        if lease is None or lease.attempt != attempt:
            return
        if lease.state is LeaseState.DRAINING:
            self._book.spawn(self._stop(lease))
            return
        if lease_id not in self._book.busy:
            return  # its end was heard of before its start
        data = {"attempt": attempt, "pid": pid}
        with self._book.transaction() as tx:
            if lease.state is LeaseState.GRANTING:
                lease = changed(lease, LeaseState.ACTIVE)
                tx.put_lease(lease, who=f"agent:{lease.node}")
            tx.put_lease(lease, kind="lease.started", who=f"agent:{lease.node}", data=data)

    async def renew(self, lease: Lease) -> None:
        """Have a lease's node hold the slot that is written down. Raises what the node answers; `compare` tells it again."""
        # One at a time, each with the slot as it is by then: an order that passes an older one would be undone by it.
        async with self._renewing.setdefault(lease.id, asyncio.Lock()):
            lease = self._book.live.get(lease.id, lease)
            deadline_s, _ = self.nodes.deadline(lease.node, lease.ends_at_s - self._book.clock.utc_s())
            order = orders.AgentRenew(lease_id=lease.id, fence=lease.fence, deadline_boot_s=deadline_s)
            await self._fleet.call(lease.node, "renew", order)
            self._told_s[lease.id] = lease.ends_at_s

    def _tell_slot(self, lease_id: str) -> None:
        """Renew again on the node when the slot has moved and the node has not confirmed it."""
        lease = self._book.live.get(lease_id)
        if lease is not None and lease.state is not LeaseState.DRAINING and self._told_s.get(lease_id) != lease.ends_at_s:
            self._book.spawn(self.renew(lease))

    # --- hearing of attempts ---

    def heard(self, node: str, view: orders.AttemptView) -> None:
        """Take in what a node says of one attempt, unasked or asked."""
        handle = view.handle
        lease = self._book.live.get(handle.lease_id)
        if lease is None or lease.node != node or handle.attempt > lease.attempt or handle.fence < lease.fence:
            # Granted by nobody who still holds: an attempt of an ended lease, or one that another broker's grant replaced.
            self._book.spawn(self._clear_away(node, view))
            return
        if handle.attempt < lease.attempt:
            return
        if view.usage is not None:
            self._book.note_usage(lease.id, view.usage)
        if view.exit is not None:
            self.ended(lease.id, handle.attempt, view.exit)

    async def _clear_away(self, node: str, view: orders.AttemptView) -> None:
        if view.exit is None:
            stop = orders.AgentStop(lease_id=view.handle.lease_id, fence=view.handle.fence, grace_s=5.0)
            await self._fleet.call(node, "stop", stop)
        else:
            await self._fleet.call(node, "forget", wire.LeaseRef(lease_id=view.handle.lease_id))

    async def compare(self, node: str) -> None:
        """Bring the ledger and a node together: adopt what runs, record what ended, start or end what is missing."""
        before = {
            lease.id: lease
            for lease in self._book.live.values()
            if lease.node == node and lease.holds and lease.id not in self._starting
        }
        views = {view.handle.lease_id: view for view in await self._fleet.call(node, "attempts", wire.Nothing())}
        for view in views.values():
            if view.handle.lease_id not in self._starting:
                self.heard(node, view)
        for lease in before.values():
            if self._book.live.get(lease.id) is not lease or lease.id in self._starting:
                continue  # it moved on while the node was asked
            view = views.get(lease.id)
            if view is not None and view.exit is None and view.handle.attempt != lease.attempt:
                # An order that was given up as lost has been done after all: it must end before the next attempt begins.
                await self._clear_away(node, view)
            elif view is not None and view.handle.attempt == lease.attempt:
                if view.exit is None:
                    self._adopt(lease, view)
            else:
                self._missing(lease)

    def _adopt(self, lease: Lease, view: orders.AttemptView) -> None:
        self._book.busy.add(lease.id)
        if lease.state is LeaseState.GRANTING:
            self._runs(lease.id, lease.attempt, view.handle.pid)
        elif lease.state is LeaseState.DRAINING:
            self._book.spawn(self._stop(lease))
        elif lease.state is LeaseState.RESIZING and lease.id not in self.resizing:
            self._book.spawn(self._settle_resize(lease))
        self._tell_slot(lease.id)

    async def _settle_resize(self, lease: Lease) -> None:
        """End a resize whose outcome nobody heard: the lease keeps what it holds meanwhile, the larger in each respect."""
        order = orders.AgentResize(lease_id=lease.id, fence=lease.fence, envelope=lease.envelope)
        await self._fleet.call(lease.node, "resize", order)
        now = self._book.live.get(lease.id)
        if now is not None and now.state is LeaseState.RESIZING:
            with self._book.transaction() as tx:
                tx.put_lease(changed(now, LeaseState.ACTIVE), who="broker", why="the outcome of its resize was not heard")

    def _missing(self, lease: Lease) -> None:
        """Nothing runs where something should, or nothing was meant to."""
        if lease.state is LeaseState.DRAINING:
            self.end(lease, lease.end_reason or EndReason.RELEASED, lease.end_detail)
        elif lease.state is LeaseState.GRANTING and self._book.clock.utc_s() >= lease.ends_at_s:
            last = self._not_started.pop(lease.id, "it never got the order")
            self.end(lease, EndReason.FAILED, f"node {lease.node} could not start it within its first slot: {last}")
        elif lease.state is LeaseState.GRANTING:
            why = self._not_started.pop(lease.id, "the node never got the first order")
            with self._book.transaction() as tx:
                again = replace(lease, attempt=self.next_attempt(tx, lease))
                tx.put_lease(again, who="broker", why=f"started again: {why}")
            self.order(lease.id)
        elif lease.id in self._book.busy:
            why = self._not_started.pop(lease.id, "")
            witness = f"node {lease.node} {'did not start' if why else 'no longer knows'} attempt {lease.attempt}"
            end = Exit(kind=ExitKind.FAILED, witness=f"{witness}: {why}" if why else witness)
            self.ended(lease.id, lease.attempt, replace(end, ended_at_s=self._book.clock.utc_s()))

    # --- ends ---

    def ended(self, lease_id: str, attempt: int, end: Exit) -> None:
        """Record an attempt's exit once, and go on: the lease ends, or waits for its next event."""
        lease = self._book.live.get(lease_id)
        if lease is None or lease.attempt != attempt:
            return
        node = lease.node
        with self._book.transaction() as tx:
            if not tx.put_exit(lease, attempt, end, who=f"agent:{node}", why=describe_exit(end)):
                return
            if end.usage is not None:
                point = wire.UsagePoint(lease_id=lease_id, at_s=end.usage.at_s, usage=end.usage)
                queries.insert_usage(tx.connection, [point])
            if lease.state is LeaseState.GRANTING:
                lease = changed(lease, LeaseState.ACTIVE)
                tx.put_lease(lease, who=f"agent:{node}", why="ended before its start was answered")
            made = self._note_invocation(tx, lease, attempt, is_normal(lease, end)) if lease.command.on_event else None
            failures = made.failures if made else 0
            reason, detail = reason_after(lease, end, failures=failures, now_s=self._book.clock.utc_s())
            if reason is not None:
                done = changed(lease, LeaseState.ENDED, end_reason=reason, end_detail=detail, ended_at_s=tx.now_s)
                tx.put_lease(done, who="broker" if lease.state is LeaseState.DRAINING else f"agent:{node}", why=detail)
                self._resuming.ended(tx, done)
        self._book.busy.discard(lease_id)
        if made is not None:
            self._book.invocations.append((lease.run_id, lease.stage, made))
        self._book.wake()
        if reason is None:
            return
        self._forget(lease)
        if lease.command.on_event and reason is not EndReason.COMPLETED and lease.state is not LeaseState.DRAINING:
            for other in list(self._book.live.values()):
                if other.gang_id == lease.gang_id:
                    self.drain(other, EndReason.FAILED, f"worker {lease.worker} of its gang ended {reason}: {detail}")

    def _note_invocation(self, tx: Transaction, lease: Lease, attempt: int, normal: bool) -> Invocation | None:
        made = queries.invocation_of(tx.connection, lease.id, attempt)
        if made is not None:
            made = replace(made, done=normal, failures=made.failures + (not normal))
            queries.put_invocation(tx.connection, lease.run_id, lease.stage, made, now_s=tx.now_s)
        return made

    def drain(self, lease: Lease, reason: EndReason, why: str, *, who: str = "broker") -> None:
        """End a lease: what waits ends now, what runs is asked to leave and ends when it has. Returns at once."""
        lease = self._book.live.get(lease.id, lease)
        if lease.state in (LeaseState.DRAINING, LeaseState.ENDED):
            return
        if not lease.holds or lease.id not in self._book.busy:
            self.end(lease, reason, why, who=who)
            return
        with self._book.transaction() as tx:
            lease = changed(lease, LeaseState.DRAINING, end_reason=reason, end_detail=why)
            tx.put_lease(lease, who=who, why=why)
        self._book.spawn(self._stop(lease))

    def end(self, lease: Lease, reason: EndReason, why: str, *, who: str = "broker") -> None:
        """Write a lease's end; nothing of it runs."""
        with self._book.transaction() as tx:
            over = changed(lease, LeaseState.ENDED, end_reason=reason, end_detail=why, ended_at_s=tx.now_s)
            if lease.state is LeaseState.RESERVED:
                over = replace(over, starts_at_s=0.0)  # it was to begin then, and never held
            tx.put_lease(over, who=who, why=why)
            self._resuming.ended(tx, over)
        if lease.node:
            self._forget(lease)

    async def _stop(self, lease: Lease) -> None:
        self._stopped_s[lease.id] = self._book.clock.boot_s()
        kind = ExitKind.OUT_OF_DISK if lease.end_reason is EndReason.OUT_OF_DISK else ExitKind.STOPPED
        order = orders.AgentStop(
            lease_id=lease.id, fence=lease.fence, grace_s=lease.command.grace_s, kind=kind, why=lease.end_detail
        )
        try:
            await self._fleet.call(lease.node, "stop", order)
        except (NotFound, StaleFence) as error:
            now = self._book.live.get(lease.id)
            if lease.id not in self._starting and now is not None and now.state is LeaseState.DRAINING:
                LOG.info("lease %s: nothing to stop: %s", lease.id, error)
                self.end(now, now.end_reason or EndReason.RELEASED, now.end_detail)

    def _forget(self, lease: Lease) -> None:
        self._stopped_s.pop(lease.id, None)
        self._told_s.pop(lease.id, None)
        self._not_started.pop(lease.id, None)
        self._renewing.pop(lease.id, None)
        if lease.attempt and self.nodes.is_up(lease.node):
            self._book.spawn(self._fleet.call(lease.node, "forget", wire.LeaseRef(lease_id=lease.id)))

    def lost(self, node: str) -> None:
        """End every lease of a node that is lost."""
        for lease in list(self._book.live.values()):
            if lease.node == node and lease.holds:
                reason = lease.end_reason if lease.state is LeaseState.DRAINING else None
                reason = reason or EndReason.NODE_LOST
                self.end(lease, reason, f"node {node} was lost: not heard of for its term and margin")

    def tick(self) -> None:
        """Stop again what did not hear it, and end what sits idle past its total."""
        now_s, utc_s = self._book.clock.boot_s(), self._book.clock.utc_s()
        for lease in list(self._book.live.values()):
            if (
                lease.state is LeaseState.DRAINING
                and now_s - self._stopped_s.get(lease.id, now_s - STOP_AGAIN_S) >= STOP_AGAIN_S
            ):
                self._book.spawn(self._stop(lease))
            idle = lease.state is LeaseState.ACTIVE and lease.id not in self._book.busy
            if idle and utc_s >= lease.total_ends_at_s:
                self.end(lease, EndReason.OUT_OF_TIME, f"its total of {lease.envelope.total_s:g} s is spent")
