"""Policies: what each tenant may hold, for how long. Asked before a request, a renewal or a resize; kept in the ledger.

A request past a quota is refused at once, not queued: it would wait for its own tenant. Not here: whether there is room
(`decide.placement`), what may be done to leases that are held (`giving_way`, `idling`).
"""

from __future__ import annotations

from collections.abc import Iterable

from tenure import wire
from tenure.broker.book import Book
from tenure.errors import Refused
from tenure.leases import Lease
from tenure.ledger import queries
from tenure.resources import Envelope, format_duration, show_bytes
from tenure.tenants import EVERYBODY, Policy, SetPolicy

TOLERANCE = 1e-9
_NONE = Policy()


class Policies:
    """The tenants' policies, as they are now."""

    def __init__(self, book: Book) -> None:
        self._book, self._reloads = book, -1
        self._kept: dict[str, Policy] = {}

    def known(self) -> dict[str, Policy]:
        """Return those that were set, by tenant; EVERYBODY for who has none of their own."""
        if self._reloads != self._book.reloads:
            with self._book.ledger.reading() as connection:
                self._kept = queries.policies(connection)
            self._reloads = self._book.reloads
        return self._kept

    def of(self, tenant: str) -> Policy:
        """Return what holds for a tenant."""
        known = self.known()
        return known.get(tenant) or known.get(EVERYBODY) or _NONE

    def set(self, asked: SetPolicy, *, who: str) -> None:
        """Write one down. What is held already stays held."""
        kept = {name: policy for name, policy in self.known().items() if name != asked.tenant}
        if asked.policy is not None:
            kept[asked.tenant] = asked.policy
        with self._book.transaction() as tx:
            queries.put_policies(tx.connection, kept)
            data = {"tenant": asked.tenant, "policy": asked.policy}
            tx.append("policy.set", who=who, why=f"of tenant {asked.tenant}", data=data)
        self._kept = kept

    def admit(self, asked: wire.RequestGang, now_s: float) -> None:
        """Raise Refused for a request that its tenant's policy does not allow."""
        policy = self.of(asked.tenant)
        what = f"gang {asked.gang_id} refused"
        for member in asked.members:
            _check_time(what, "slot", member.envelope.slot_s, policy.max_slot_s, asked.tenant)
            _check_time(what, "total", member.envelope.total_s, policy.max_total_s, asked.tenant)
        if asked.starts_at_s:
            _check_time(what, "time until it begins", asked.starts_at_s - now_s, policy.max_ahead_s, asked.tenant)
        self._check_quota(what, asked.tenant, [member.envelope for member in asked.members], but="")

    def admit_renewal(self, lease: Lease, for_s: float) -> None:
        """Raise Refused for a renewal by the holder that its tenant's policy does not allow."""
        _check_time(f"renewal of lease {lease.id} refused", "time", for_s, self.of(lease.tenant).max_slot_s, lease.tenant)

    def admit_resize(self, lease: Lease, envelope: Envelope) -> None:
        """Raise Refused for a resize past the tenant's quota."""
        if (envelope.cpus, envelope.memory_bytes) > (lease.envelope.cpus, lease.envelope.memory_bytes) or (
            envelope.memory_bytes > lease.envelope.memory_bytes
        ):
            self._check_quota(f"resize of lease {lease.id} refused", lease.tenant, [envelope], but=lease.id)

    def _check_quota(self, what: str, tenant: str, wanted: Iterable[Envelope], *, but: str) -> None:
        policy, wanted = self.of(tenant), list(wanted)
        mine = [lease.envelope for lease in self._book.live.values() if lease.tenant == tenant and lease.id != but]
        sums = (
            ("leases", policy.max_leases, len(mine), len(wanted), "g"),
            ("cpus", policy.max_cpus, sum(e.cpus for e in mine), sum(e.cpus for e in wanted), "g"),
            ("gpus", policy.max_gpus, sum(e.gpus for e in mine), sum(e.gpus for e in wanted), "g"),
        )
        for name, limit, has, wants, style in sums:
            if limit is not None and has + wants > limit + TOLERANCE:
                raise Refused(
                    f"{what}: tenant {tenant} has {has:{style}} {name}, waiting ones included, and asks for {wants:{style}}; "
                    f"its quota is {limit:{style}}. Release something, or ask for less."
                )
        has, wants = sum(e.memory_bytes for e in mine), sum(e.memory_bytes for e in wanted)
        if policy.max_memory_bytes is not None and has + wants > policy.max_memory_bytes:
            raise Refused(
                f"{what}: tenant {tenant} has {show_bytes(has)} of memory, waiting leases included, and asks for "
                f"{show_bytes(wants)}; its quota is {show_bytes(policy.max_memory_bytes)}. Release something, or ask for less."
            )


def _check_time(what: str, name: str, asked_s: float, limit_s: float | None, tenant: str) -> None:
    if limit_s is not None and asked_s > limit_s + TOLERANCE:
        raise Refused(
            f"{what}: its {name} of {format_duration(round(asked_s, 3))} is past what tenant {tenant} may have, "
            f"{format_duration(limit_s)}. Ask for less."
        )
