"""A lease: one envelope on one node for one (run, stage, worker) and tenant, and the states it may pass through.

    requested ──► reserved | queued ──► granting ──► active ⇄ resizing
        │              │        │           │          │
        └──────────────┴────────┴───────────┴──► draining ──► ended (with an end reason)

Pure: `changed` gives the next lease or raises; only the broker writes one down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from tenure.errors import IllegalChange, SpecError
from tenure.jobs import Command
from tenure.resources import DeviceShare, Envelope


class LeaseState(StrEnum):
    """Where a lease is in its life."""

    REQUESTED = "requested"
    RESERVED = "reserved"
    QUEUED = "queued"
    GRANTING = "granting"
    ACTIVE = "active"
    RESIZING = "resizing"
    DRAINING = "draining"
    ENDED = "ended"


class EndReason(StrEnum):
    """Why a lease ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Not renewed."""
    OUT_OF_TIME = "out_of_time"
    """Its total time was spent."""
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_DISK = "out_of_disk"
    RECLAIMED_IDLE = "reclaimed_idle"
    PREEMPTED = "preempted"
    NODE_LOST = "node_lost"


class RightSize(StrEnum):
    """What is to come of a lease's use, when it speaks for another envelope."""

    OFF = "off"
    PROPOSE = "propose"
    """An event and a metric say so."""
    APPLY = "apply"
    """It is resized."""


_S = LeaseState
LEGAL_CHANGES: Mapping[LeaseState, frozenset[LeaseState]] = {
    _S.REQUESTED: frozenset({_S.RESERVED, _S.QUEUED, _S.GRANTING, _S.ENDED}),
    _S.RESERVED: frozenset({_S.QUEUED, _S.GRANTING, _S.ENDED}),
    _S.QUEUED: frozenset({_S.GRANTING, _S.ENDED}),
    _S.GRANTING: frozenset({_S.ACTIVE, _S.QUEUED, _S.DRAINING, _S.ENDED}),
    _S.ACTIVE: frozenset({_S.RESIZING, _S.DRAINING, _S.ENDED}),
    _S.RESIZING: frozenset({_S.ACTIVE, _S.DRAINING, _S.ENDED}),
    _S.DRAINING: frozenset({_S.ENDED}),
    _S.ENDED: frozenset(),
}
"""Which state may follow which. A renewal changes times only and keeps the state."""

HOLDING = frozenset({_S.GRANTING, _S.ACTIVE, _S.RESIZING, _S.DRAINING})
"""States in which the lease's envelope is taken from its node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A bounded grant. Times are UTC seconds; 0 means not yet set."""

    id: str
    run_id: str
    stage: str
    """Name of the run's stage."""
    worker: int = 0
    """Number within the gang, from 0."""
    gang_id: str = ""
    """Leases with the same gang are granted together or not at all."""
    tenant: str = "default"
    envelope: Envelope
    command: Command
    """What runs inside; a command with `on_event` waits for events and may run many times."""
    full_cpus: float = 0.0
    """CPUs that it had before they were cut for idleness, and gets back when it works again; 0 when they were not."""
    right_size: RightSize = RightSize.OFF
    """As its holder wants it."""
    resumes: int = 0
    """How often it is asked for again when it had to give way to others."""
    goes_on: str = ""
    """Id of the preempted lease that this one goes on with."""
    state: LeaseState = LeaseState.REQUESTED
    attempt: int = 0
    """How often something was started inside; the worker folder of a start is ``workers/<worker>/<attempt>``."""
    node: str = ""
    devices: tuple[DeviceShare, ...] = ()
    fence: int = 0
    """Grows with every grant; the node refuses orders with an older one."""
    requested_at_s: float = 0.0
    starts_at_s: float = 0.0
    ends_at_s: float = 0.0
    """End of the present slot, moved by renewal, never past `total_ends_at_s`."""
    total_ends_at_s: float = 0.0
    ended_at_s: float = 0.0
    end_reason: EndReason | None = None
    """Of one that is active: what it will end as with its slot, since its renewal was refused (`preempted`)."""
    end_detail: str = ""
    """What is known about the end, for people: exit code, peak memory, the kernel's own counter."""

    @property
    def holds(self) -> bool:
        """Whether the envelope is taken from the node."""
        return self.state in HOLDING

    @property
    def held_s(self) -> float:
        """Seconds between grant and end; 0 while it has not ended or never started."""
        return max(0.0, self.ended_at_s - self.starts_at_s) if self.ended_at_s and self.starts_at_s else 0.0


def changed(lease: Lease, state: LeaseState, **fields: Any) -> Lease:
    """Return the lease in its next state. Raises IllegalChange unless `LEGAL_CHANGES` allows it.

    fields: further fields to set. An end needs `end_reason` and `ended_at_s`.
    """
    if state not in LEGAL_CHANGES[lease.state]:
        allowed = ", ".join(sorted(LEGAL_CHANGES[lease.state])) or "nothing: it is final"
        raise IllegalChange(f"lease {lease.id} cannot go from {lease.state} to {state}; allowed: {allowed}")
    if state is LeaseState.ENDED and not (fields.get("end_reason") and fields.get("ended_at_s")):
        raise SpecError(f"lease {lease.id} cannot end without a reason and a time")
    return replace(lease, state=state, **fields)


def granted(lease: Lease, *, node: str, devices: tuple[DeviceShare, ...], fence: int, now_s: float) -> Lease:
    """Return the lease as granted on a node: first slot starts now. Raises IllegalChange when it may not be."""
    return changed(
        lease,
        LeaseState.GRANTING,
        node=node,
        devices=devices,
        fence=fence,
        starts_at_s=now_s,
        ends_at_s=now_s + lease.envelope.slot_s,
        total_ends_at_s=now_s + lease.envelope.total_s,
    )


def renewed(lease: Lease, *, for_s: float, now_s: float) -> Lease:
    """Return the lease with its slot end moved to `now_s + for_s`, never past its total and never earlier than it was.

    Raises IllegalChange when the lease is not active or its total is spent.
    """
    if lease.state not in (LeaseState.GRANTING, LeaseState.ACTIVE, LeaseState.RESIZING):
        raise IllegalChange(f"lease {lease.id} is {lease.state}; only an active lease can be renewed")
    if now_s >= lease.total_ends_at_s:
        raise IllegalChange(f"lease {lease.id} has spent its total time; request a new one")
    ends_at_s = min(max(lease.ends_at_s, now_s + for_s), lease.total_ends_at_s)
    return replace(lease, ends_at_s=ends_at_s)
