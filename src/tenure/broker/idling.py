"""Idle leases: their CPU is cut, their holder is told, they are ended, as their tenant's policy says (`decide.idle` decides).

Looked at every LOOK_EVERY_S, from the usage that nodes tell; a lease that nothing was heard of is not judged. What was cut
comes back as soon as the lease works again and its node has room. Leases that wait for events are left alone: between two of
them they are meant to rest. After a broker's death idle times are counted anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tenure import wire
from tenure.broker.attempts import Attempts
from tenure.broker.book import Book
from tenure.broker.expiry import tell_inside
from tenure.broker.policies import Policies
from tenure.broker.tenancy import Tenancy
from tenure.decide.idle import Chances, Past, Step, due, is_busy
from tenure.leases import EndReason, Lease, LeaseState
from tenure.resources import format_duration
from tenure.usage import Usage

LOOK_EVERY_S = 10.0
MINUTE_S = 60.0
SHRUNK_CPUS = 0.1
"""What an idle lease keeps: enough for a notebook to answer, and for work that begins again to show."""

Resize = Callable[[wire.Resize, str], Awaitable[Lease]]


@dataclass(slots=True)
class _Seen:
    sample: Usage
    busy_s: float
    """CLOCK_BOOTTIME when it was last busy, or first seen."""
    warned: bool = False
    resizing: bool = False
    worked: bool = True
    """Whether it was busy within the present minute."""
    past: Past = field(default_factory=Past)


class Idling:
    """Applies what tenants' policies say of idle leases."""

    def __init__(
        self, book: Book, attempts: Attempts, policies: Policies, tenancy: Tenancy, *, home: Path, resize: Resize
    ) -> None:
        self._book, self._attempts, self._policies, self._home, self._resize = book, attempts, policies, home, resize
        self._tenancy = tenancy
        self._seen: dict[str, _Seen] = {}
        self._chances = Chances()
        self._looked_s = self._minute_s = book.clock.boot_s()

    def tick(self) -> None:
        """Look at all leases when it is time to."""
        now_s = self._book.clock.boot_s()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        for gone in self._seen.keys() - self._book.live.keys():
            self._chances.learn(self._seen.pop(gone).past.left())
        watched = [lease for lease in self._book.live.values() if _is_watched(lease) and lease.id in self._book.usage]
        for lease in watched:
            self._look(lease, self._book.usage[lease.id], now_s)
        if now_s - self._minute_s >= MINUTE_S:
            self._minute_s = now_s
            self._minute()
        for lease in watched:
            if self._book.live.get(lease.id) is lease and lease.state is LeaseState.ACTIVE:
                self._act(lease, self._seen[lease.id], now_s)

    def _look(self, lease: Lease, usage: Usage, now_s: float) -> None:
        seen = self._seen.get(lease.id)
        if seen is None:
            self._seen[lease.id] = _Seen(sample=usage, busy_s=now_s)
        elif usage.at_s <= seen.sample.at_s or is_busy(seen.sample, usage):
            # Nothing new was heard: nobody knows, so it is not counted as idle.
            seen.busy_s, seen.warned, seen.worked, seen.sample = now_s, False, True, usage
        else:
            seen.sample = usage

    def _minute(self) -> None:
        others = sum(seen.worked for seen in self._seen.values()) / max(1, len(self._seen))
        for seen in self._seen.values():
            self._chances.learn(seen.past.observe(seen.worked, others))
            seen.worked = False

    def _act(self, lease: Lease, seen: _Seen, now_s: float) -> None:
        policy, idle_s = self._policies.of(lease.tenant), now_s - seen.busy_s
        chance = None
        if policy.idle_chance is not None and seen.past.idle_min:
            others = sum(other.worked for other in self._seen.values()) / max(1, len(self._seen))
            chance = self._chances.chance(seen.past.known(others))
        step = due(policy, idle_s, chance)
        if not idle_s and lease.full_cpus and not seen.resizing:
            self._book.spawn(self._set_cpus(lease, seen, lease.full_cpus, 0.0, "it works again"))
        if step is Step.NONE:
            return
        idle = f"CPU and GPU were idle for {format_duration(round(idle_s))}"
        if step is Step.RECLAIM:
            foretold = "" if chance is None else f"; chance that it is needed within 10 min: {chance:.0%}"
            self._attempts.drain(lease, EndReason.RECLAIMED_IDLE, idle + foretold)
            return
        if step is Step.WARN and not seen.warned:
            seen.warned = True
            self._warn(lease, idle, policy.idle_reclaim_s, idle_s)
        if policy.idle_shrink_s is not None and not lease.full_cpus and lease.envelope.cpus > SHRUNK_CPUS and not seen.resizing:
            self._book.spawn(self._set_cpus(lease, seen, SHRUNK_CPUS, lease.envelope.cpus, idle))

    def _warn(self, lease: Lease, idle: str, reclaim_s: float | None, idle_s: float) -> None:
        text = idle
        if reclaim_s is not None:
            text += f"; it ends in {format_duration(max(1, round(reclaim_s - idle_s)))} unless something computes"
        with self._book.transaction() as tx:
            tx.put_lease(lease, kind="lease.idle", who="broker", why=text)
        tell_inside(self._home, self._tenancy, lease, text, now_s=self._book.clock.utc_s())

    async def _set_cpus(self, lease: Lease, seen: _Seen, cpus: float, full_cpus: float, why: str) -> None:
        """Resize a lease and keep what it had before; refused for want of room, it is tried again by a later look."""
        seen.resizing = True
        try:
            resized = await self._resize(
                wire.Resize(lease_id=lease.id, envelope=replace(lease.envelope, cpus=cpus)), f"broker: {why}"
            )
            now = self._book.live.get(resized.id)
            if now is not None and now.state is LeaseState.ACTIVE:
                kind = "lease.shrunk" if full_cpus else "lease.grown"
                with self._book.transaction() as tx:
                    tx.put_lease(replace(now, full_cpus=full_cpus), kind=kind, who="broker", why=why)
        finally:
            seen.resizing = False


def _is_watched(lease: Lease) -> bool:
    return lease.state in (LeaseState.ACTIVE, LeaseState.RESIZING) and not lease.command.on_event
