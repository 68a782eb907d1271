"""Who asks, and whose what is, in a home that root shares with all users of a machine (`homes`).

A tenant is a user of the machine, by the kernel's word at the socket, never by what a client says. Its jobs run as that user;
the folders of its runs and its home volume are that user's. In a home of one's own there is one caller, its owner, whose
tenants are names it gives.
Not here: which operation is for whom (`roles`).
"""

from __future__ import annotations

import contextlib
import os
import pwd
from dataclasses import dataclass, replace
from pathlib import Path

from tenure.broker.book import Book
from tenure.errors import Conflict, NotFound, Refused, SpecError
from tenure.ledger import members as rows
from tenure.runs import RunFiles
from tenure.runtimes.acting import Actor, actor_of
from tenure.sockets import Connection
from tenure.tenants import Member, RemoveTenant, Role, SetRole, TenantView, check_name

_NOT_USERS = ("default", "root")
"""Tenants of root's own: a user of that name gets another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. `is_owner`: the user whose broker this is, who may do everything."""

    uid: int
    tenant: str
    role: Role
    is_owner: bool = False

    @property
    def sees_all(self) -> bool:
        """Whether others' leases are shown to it."""
        return self.is_owner or self.role is Role.ADMIN


def tenant_name(uid: int) -> str:
    """Return the tenant that a user is: its name, or ``uid-N`` where the name could be taken for something else."""
    with contextlib.suppress(KeyError, SpecError):
        name = check_name("tenant", pwd.getpwuid(uid).pw_name)
        if name not in _NOT_USERS and not name.startswith("uid-"):
            return name
    return f"uid-{uid}"


class Tenancy:
    """The tenants of a home."""

    def __init__(self, book: Book, *, home: Path, shared: bool) -> None:
        self._book, self._home, self.shared = book, home, shared
        self._reloads = -1
        self._members: dict[str, Member] = {}

    # --- who asks ---

    def caller(self, client: Connection | None) -> Caller:
        """Return who is at the other end of a connection; None is the broker itself. Raises Refused for who has no say here."""
        if client is None or client.uid == os.geteuid() or (client.uid == 0 and not self.shared):
            return Caller(uid=os.geteuid(), tenant="", role=Role.ADMIN, is_owner=True)
        if not self.shared:
            raise Refused("this home serves its owner alone; set TENURE_HOME to one of your own")
        name = tenant_name(client.uid)
        known = self.known().get(name, Member(tenant=name, uid=client.uid))
        if known.uid != client.uid:
            raise Refused(
                f"the tenant {name} is another user of that name (uid {known.uid}; you are uid {client.uid}). "
                f'An admin can make the name free: "tenure tenants remove {name}"'
            )
        return Caller(uid=client.uid, tenant=name, role=known.role)

    def may_read_metrics(self, uid: int) -> bool:
        """Whether a user may read everybody's figures: root, admins, and the user that a packaged Prometheus runs as."""
        if not self.shared or uid == os.geteuid():
            return True
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            return False
        known = self.known().get(tenant_name(uid))
        return name == "prometheus" or (known is not None and known.uid == uid and known.role is Role.ADMIN)

    def who(self, client: Connection | None, tenant: str) -> str:
        """Return for the record who does something to what is a tenant's."""
        caller = self.caller(client)
        if not self.shared or caller.tenant == tenant:
            return f"tenant:{tenant}"
        return "root" if caller.is_owner else f"admin:{caller.tenant}"

    # --- tenants ---

    def known(self) -> dict[str, Member]:
        """Return the tenants that were seen or given a role, by name."""
        if self._reloads != self._book.reloads:
            with self._book.ledger.reading() as connection:
                self._members = rows.members(connection)
            self._reloads = self._book.reloads
        return self._members

    def _keep(self, kept: dict[str, Member], kind: str, *, who: str, why: str) -> None:
        with self._book.transaction() as tx:
            rows.put_members(tx.connection, kept)
            tx.append(kind, who=who, why=why)
        self._members = kept

    def note(self, tenant: str, uid: int) -> None:
        """Take down which user a tenant is, once. Raises Refused for a name that another has."""
        known = self.known().get(tenant)
        if known is None:
            why = f"tenant {tenant} is uid {uid}"
            self._keep(self.known() | {tenant: Member(tenant=tenant, uid=uid)}, "tenant.seen", who="broker", why=why)
        elif known.uid != uid:
            raise Refused(f"the tenant {tenant} is the user with uid {known.uid}; run it as that user, or name another tenant")

    def set_role(self, asked: SetRole, *, who: str) -> None:
        """Give a user a role. Raises NotFound for no user of this machine, Conflict in a home that is not shared."""
        self._check_shared()
        known = self.known().get(asked.tenant)
        if known is None:
            with contextlib.suppress(KeyError, ValueError):
                name = asked.tenant
                uid = int(name.removeprefix("uid-")) if name.startswith("uid-") else pwd.getpwnam(name).pw_uid
                known = Member(tenant=asked.tenant, uid=uid) if tenant_name(uid) == asked.tenant else None
        if known is None or known.uid == 0:
            raise NotFound(f"{asked.tenant!r} is no user of this machine who could be given a role (root has every right)")
        made = self.known() | {asked.tenant: replace(known, role=asked.role)}
        self._keep(made, "tenant.role", who=who, why=f"{asked.tenant} is {asked.role} from now on")

    def remove(self, asked: RemoveTenant, *, who: str) -> None:
        """Make a name free. Raises NotFound, Conflict while something of it is kept: a next user of the name would have it."""
        self._check_shared()
        if asked.tenant not in self.known():
            raise NotFound(f'tenant {asked.tenant!r} is not known here; "tenure tenants list" has those that are')
        with self._book.ledger.reading() as connection:
            holds = rows.has_anything(connection, asked.tenant)
        volume = self.volume(asked.tenant)
        if holds or volume.exists():
            left = f"its home volume {volume}" if volume.exists() else 'runs ("tenure gc --forget-after 0s --keep-runs 0")'
            raise Conflict(
                f"tenant {asked.tenant} still has {left}: whoever has the name next would have it. Remove that first"
            )
        kept = {name: member for name, member in self.known().items() if name != asked.tenant}
        self._keep(kept, "tenant.removed", who=who, why=f"the name {asked.tenant} is free")

    def check_not_user(self, tenant: str) -> None:
        """Raise Refused for a tenant that is a user of this machine: only that one runs something in its name."""
        with contextlib.suppress(KeyError):
            uid = pwd.getpwnam(tenant).pw_uid
            if uid != os.geteuid() and tenant_name(uid) == tenant:
                raise Refused(f"tenant {tenant} is a user of this machine: run it as that user, with sudo -u {tenant}")

    def views(self) -> tuple[TenantView, ...]:
        """Return the tenants with what they hold, by name."""
        found = []
        live = list(self._book.live.values())
        names = {*self.known(), *(lease.tenant for lease in live)}
        for name in sorted(names):
            mine = [lease.envelope for lease in live if lease.tenant == name]
            member = self.known().get(name, Member(tenant=name, uid=os.geteuid()))
            memory = sum(envelope.memory_bytes for envelope in mine)
            cpus = sum(envelope.cpus for envelope in mine)
            found.append(TenantView(member=member, leases=len(mine), cpus=cpus, memory_bytes=memory))
        return tuple(found)

    def _check_shared(self) -> None:
        if not self.shared:
            raise Conflict(
                'this home serves its owner alone; "tenure up --shared", as root, has one for all users of the machine'
            )

    # --- whose is what ---

    def user_of(self, tenant: str) -> str:
        """Return the user that a tenant's jobs run as; empty: the broker's own. Raises Refused for one that is no more."""
        known = self.known().get(tenant) if self.shared else None
        if known is None or known.uid == os.geteuid():
            return ""
        with contextlib.suppress(KeyError):
            name = pwd.getpwuid(known.uid).pw_name
            if tenant_name(known.uid) == tenant:
                return name
        raise Refused(f"the user with uid {known.uid}, who was tenant {tenant}, is no more on this machine")

    def actor_of(self, tenant: str) -> Actor | None:
        """Return whose rights count where a tenant may write; None: our own. Raises Refused."""
        return actor_of(self.user_of(tenant))

    def volume(self, tenant: str) -> Path:
        """Return where a tenant's home volume lies."""
        return self._home / "homes" / check_name("tenant", tenant)

    def make_volume(self, tenant: str) -> Path:
        """Have a tenant's home volume; return it."""
        place = self.volume(tenant)
        if (actor := self.actor_of(tenant)) is not None:
            make_folder(place, actor)
        else:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        return place

    def make_run(self, run_id: str, tenant: str) -> None:
        """Have a run's folder, where it is to be a tenant's own; other runs make theirs themselves."""
        if (actor := self.actor_of(tenant)) is not None:
            make_folder(RunFiles(self._home, run_id).root, actor)


def make_folder(place: Path, actor: Actor) -> None:
    """Make a folder of an actor's own in one of ours. Raises Conflict when one is there that is another's."""
    with contextlib.suppress(OSError):
        if place.lstat().st_uid == os.geteuid():
            os.rmdir(place)  # empty: its maker died before it was given away
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        if place.lstat().st_uid != actor.uid or place.is_symlink():
            raise Conflict(f"{place} is there already and belongs to another user; use another name") from None
        return
    os.chown(place, actor.uid, actor.gid, follow_symlinks=False)  # nobody else can write the folder it lies in
