"""Gangs that had to give way are asked for again by the broker itself, with what is left of their total time.

It happens in the transaction that writes the end of a gang's last lease, so that no crash comes in between, and its tenant's
quota holds as before. A gang that waits for events goes on with those that its workers left (told to leave, they save and name
the next one); another command begins anew. How often: `Lease.resumes`. Not here: who gives way (`giving_way`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tenure.broker.book import Book
from tenure.leases import EndReason, Lease, LeaseState
from tenure.ledger import queries
from tenure.ledger.store import Transaction
from tenure.resources import format_duration

QUEUE_S = 7 * 86400.0
"""How long a gang may wait for its next turn."""
LEAST_S = 1.0
"""With less of its total left it is not asked for again."""


class Resuming:
    """Asks again for what was preempted."""

    def __init__(self, book: Book, *, new_id: Callable[[], str]) -> None:
        self._book, self._new_id = book, new_id

    def ended(self, tx: Transaction, done: Lease) -> None:
        """Ask again for the gang of a lease whose end is being written, where it was the last and all of it was preempted."""
        if done.end_reason is not EndReason.PREEMPTED or not done.resumes:
            return
        gang = queries.gang_leases(tx.connection, done.gang_id) if done.gang_id else (done,)
        if any(member.end_reason is not EndReason.PREEMPTED or member.state is not LeaseState.ENDED for member in gang):
            return
        left_s = min(member.total_ends_at_s - member.ended_at_s for member in gang)
        if left_s < LEAST_S:
            return
        gang_id = _next_id(done.gang_id or done.id)
        for member in gang:
            self._ask(tx, member, gang_id, left_s)

    def _ask(self, tx: Transaction, member: Lease, gang_id: str, left_s: float) -> None:
        why = f"it gave way; asked for again with the {format_duration(max(1, round(left_s)))} left of its total"
        total_s = min(left_s, member.envelope.total_s)
        cpus = member.full_cpus or member.envelope.cpus
        lease = Lease(
            id=self._new_id(),
            run_id=member.run_id,
            stage=member.stage,
            worker=member.worker,
            gang_id=gang_id,
            tenant=member.tenant,
            envelope=replace(member.envelope, cpus=cpus, slot_s=min(member.envelope.slot_s, total_s), total_s=total_s),
            command=member.command,
            right_size=member.right_size,
            resumes=member.resumes - 1,
            goes_on=member.id,
            requested_at_s=tx.now_s,
        )
        until_s = tx.now_s + QUEUE_S
        tx.append(
            "lease.resumed", who="broker", why=why, run_id=member.run_id, stage=member.stage, lease_id=member.id,
            data={"as": lease.id, "resumes": lease.resumes},
        )  # fmt: skip
        tx.put_lease(lease, who="broker", why=why, queue_until_s=until_s)
        self._book.queue_until_s[lease.id] = until_s


def _next_id(gang_id: str) -> str:
    base, _, number = gang_id.rpartition("+")
    return f"{base}+{int(number) + 1}" if base and number.isdigit() else f"{gang_id}+1"
