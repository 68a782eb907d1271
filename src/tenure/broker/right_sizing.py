"""Right-sizing: what leases use is watched, what fits better is proposed, and applied where the holder agreed to it.

Watched are leases asked for with `right_size`; what fits, `decide.right_size` says, from windows of WINDOW_S. A proposal is an
event and a metric; with `apply` it goes through the broker's resize, which refuses what the node or a quota has no room for,
and less memory than is in use. A bound that grew, by whomever, makes what was seen below it worth nothing: windows are gathered
anew, as after a broker's death. Not here: leases that rest (`idling`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from tenure import wire
from tenure.broker.book import LOG, Book
from tenure.decide.right_size import Proposal, UseHistory, right_size
from tenure.errors import TenureError
from tenure.leases import Lease, LeaseState, RightSize
from tenure.resources import Envelope

WINDOW_S = 30.0
LOOK_EVERY_S = 1.0

Resize = Callable[[wire.Resize, str], Awaitable[Lease]]


@dataclass(slots=True)
class _Watched:
    attempt: int
    envelope: Envelope
    history: UseHistory = field(default_factory=lambda: UseHistory(WINDOW_S))
    told: Envelope | None = None
    """What was proposed last, while it still fits better than what the lease has."""
    resizing: bool = False


class RightSizing:
    """Watches the leases whose holders want it."""

    def __init__(self, book: Book, *, resize: Resize) -> None:
        self._book, self._resize = book, resize
        self._watched: dict[str, _Watched] = {}
        self._looked_s = float("-inf")

    def proposed(self) -> Mapping[str, Envelope]:
        """Return what is proposed now, by lease id."""
        return {lease_id: watched.told for lease_id, watched in self._watched.items() if watched.told is not None}

    def tick(self) -> None:
        """Take in what leases used, and propose or apply what follows."""
        now_s = self._book.clock.boot_s()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        wanted = {
            lease.id: lease
            for lease in self._book.live.values()
            if lease.right_size is not RightSize.OFF and lease.state is LeaseState.ACTIVE and not lease.full_cpus
        }
        for lease_id in self._watched.keys() - self._book.live.keys():
            del self._watched[lease_id]
        for lease_id, lease in wanted.items():
            usage = self._book.usage.get(lease_id)
            if usage is None:
                continue
            watched = self._watched.get(lease_id)
            if watched is None or watched.attempt != lease.attempt or _grew(watched.envelope, lease.envelope):
                watched = self._watched[lease_id] = _Watched(attempt=lease.attempt, envelope=lease.envelope)
            watched.envelope = lease.envelope
            if watched.history.take(usage) and not watched.resizing:
                self._judge(lease, watched)

    def _judge(self, lease: Lease, watched: _Watched) -> None:
        found = right_size(watched.history.windows, lease.envelope)
        before, watched.told = watched.told, found.envelope if found is not None else None
        if found is None:
            return
        if before is None or _differs(before, found.envelope):
            with self._book.transaction() as tx:
                data = {"cpus": found.envelope.cpus, "memory_bytes": found.envelope.memory_bytes, "risk": found.risk}
                why = f"{found.envelope.describe()} would fit better: {found.why}"
                tx.put_lease(lease, kind="lease.right_size", who="broker", why=why, data=data)
        if lease.right_size is RightSize.APPLY:
            self._book.spawn(self._apply(lease, watched, found))

    async def _apply(self, lease: Lease, watched: _Watched, found: Proposal) -> None:
        watched.resizing = True
        try:
            await self._resize(wire.Resize(lease_id=lease.id, envelope=found.envelope), f"broker: {found.why}")
            watched.told = None
        except TenureError as error:  # it has what it had; the next window is judged anew
            LOG.info("lease %s is not right-sized: %s", lease.id, error)
        finally:
            watched.resizing = False


def _grew(before: Envelope, now: Envelope) -> bool:
    return now.memory_bytes > before.memory_bytes or now.cpus > before.cpus


def _differs(before: Envelope, now: Envelope) -> bool:
    """Return whether a proposal is another one: small changes of it are not worth an event each."""
    return abs(now.memory_bytes - before.memory_bytes) > 0.05 * before.memory_bytes or abs(now.cpus - before.cpus) > 0.1
