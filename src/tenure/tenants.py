"""A tenant: who holds leases, and what may be held and done in its name (its policy)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from enum import StrEnum

from tenure.errors import SpecError

EVERYBODY = "*"
"""In place of a tenant's name: all who have no policy of their own."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A person or a team."""

    name: str

    def __post_init__(self) -> None:
        check_name("tenant", self.name)


class Role(StrEnum):
    """What a user may do in a home that all users of a machine share; its owner, root, may do everything."""

    TENANT = "tenant"
    """See and touch its own."""
    ADMIN = "admin"
    """See and end everybody's leases, renew and resize them, set policies and roles, add and remove nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A user of the machine as a tenant of a shared home."""

    tenant: str
    uid: int
    """Of whom the name was when it was first seen: another user of that name is not let in."""
    role: Role = Role.TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantView:
    """A tenant and what it holds now."""

    member: Member
    leases: int = 0
    """Live; waiting ones and reservations among them, as for the two below."""
    cpus: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRole:
    """Have a user of this machine be an admin of a shared home, or a tenant as any other. Raises NotFound, Conflict."""

    tenant: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveTenant:
    """Have a name be free for another user of the machine. Raises NotFound, Conflict while it has live leases or runs."""

    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one tenant may hold, for how long, and what may be done to its leases. None: no bound, or never."""

    max_leases: int | None = None
    """Live at the same time, those that wait and reservations among them; so for the three below."""
    max_cpus: float | None = None
    max_memory_bytes: int | None = None
    max_gpus: float | None = None
    max_slot_s: float | None = None
    """Of one grant, and of one renewal by the holder."""
    max_total_s: float | None = None
    """Of one lease, all its renewals together."""
    max_ahead_s: float | None = 14 * 86400.0
    """How far ahead a reservation may begin."""
    guaranteed_s: float | None = None
    """How long a lease holds before it may be preempted within a slot. None: never; it then gives way at a slot's end only."""
    idle_shrink_s: float | None = None
    """After so long idle, a lease's CPU is cut to what little it uses; it gets it back when it works again."""
    idle_warn_s: float | None = None
    """After so long idle, its holder is told."""
    idle_reclaim_s: float | None = None
    """After so long idle, it is ended."""
    idle_chance: float | None = None
    """Earlier, when the chance that it is needed within 10 min is at most this, by the gaps of all leases of this home."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise SpecError(f"policy.{field.name} must be a number of at least 0, or left out; found {value!r}")
        steps = [step for step in (self.idle_shrink_s, self.idle_warn_s, self.idle_reclaim_s) if step is not None]
        if steps != sorted(steps):
            raise SpecError("an idle lease is first shrunk, then warned of, then reclaimed: these times must not decrease")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPolicy:
    """Have a policy hold for a tenant, or for EVERYBODY who has none of their own, from now on. None: its own no longer."""

    tenant: str
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if self.tenant != EVERYBODY:
            check_name("tenant", self.tenant)


def check_name(what: str, name: str) -> str:
    """Return the name, or raise SpecError: names are lower-case letters, digits, dot, dash, underscore; 1 to 63 of them."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"{what} name {name!r} is not allowed: use 1 to 63 of a-z 0-9 . _ - and start with a letter or digit")
    return name
