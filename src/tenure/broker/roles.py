"""Which operation is for whom: one table, RULES, over `wire.BROKER_OPS`. An operation without a rule is refused to all.

The owner of a home may do everything; it is the only caller in a home of one's own. In a shared home a rule first says who may
ask at all, then what of the arguments: others' leases and runs do not exist for a tenant, with the same words as for what
never existed, and what it lists is narrowed to its own. What comes back is narrowed again, and names of others' leases in
it are covered: of others a tenant learns that a node is busy.

Commands inside a lease are its tenant's and root's alone, admins' not: a lease runs as its tenant.
Not here: who somebody is (`tenancy`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tenure import wire
from tenure.broker.book import Book
from tenure.broker.tenancy import Caller, Tenancy
from tenure.errors import Conflict, NotFound, Refused, SpecError, TenureError
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import EndReason, Lease
from tenure.ledger import members as rows
from tenure.sockets import Connection, Handler
from tenure.tenants import EVERYBODY, Policy, Role, TenantView

LEAST_PORT = 1024
"""Below it a port is root's to give, and an engine would give it."""
MAX_EXECS = 4
"""Commands of one tenant inside its leases at the same time."""
MAX_WAITS = 256
"""Waits of one tenant for its leases at the same time: each looks again at every change."""
MAX_ROWS = 10_000
"""Told to a tenant at once: nobody else is answered meanwhile."""
OTHER = "another's"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*-[0-9a-f]{10,12}(?![\w-])")
"""Ids that Tenure draws, of leases, runs and gangs."""
_COUNTS = ("max_runs", "max_leases", "max_events", "max_trials")
_BY_HOLDER = (EndReason.RELEASED, EndReason.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Who may ask for an operation of a shared home, besides its owner."""

    least: Role | None = Role.TENANT
    """None: nobody."""
    admit: Callable[[Roles, Any, Caller], Any] = lambda roles, args, caller: args
    """Return the arguments, narrowed where they select. Raises Refused, NotFound."""
    show: Callable[[Roles, Any, Caller], Any] = lambda roles, result, caller: result
    """Return what the caller is to see of the result."""
    at_once: int = 0
    """How many of one tenant may be under way; 0: no bound of its own."""


class Roles:
    """Holds the rules over the broker's handlers."""

    def __init__(self, book: Book, tenancy: Tenancy) -> None:
        self._book, self._tenancy = book, tenancy
        self._under_way: Counter[tuple[str, str]] = Counter()

    def guarded(self, name: str, handler: Handler) -> Handler:
        """Return the handler of an operation for those who may ask for it; what one raises is told as one may know it."""

        async def guard(args: Any, client: Connection) -> Any:
            rule = RULES.get(name)
            if rule is None:
                raise Refused(f"{name} is refused: no rule says who may ask for it")
            caller = self._tenancy.caller(client)
            if caller.is_owner:
                return await handler(self._owners(args), client)
            if rule.least is None or (rule.least is Role.ADMIN and caller.role is not Role.ADMIN):
                who = "root" if rule.least is None else "an admin (tenure tenants list)"
                raise Refused(f"{name} is for {who} of this home; you are {caller.tenant}, {caller.role}")
            key = (caller.tenant, name)
            if rule.at_once and self._under_way[key] >= rule.at_once:
                raise Refused(f"{name} is refused: {rule.at_once} of yours are under way; wait for one of them")
            self._under_way[key] += 1
            try:
                return rule.show(self, await handler(rule.admit(self, args, caller), client), caller)
            except TenureError as error:
                raise self._told(error, caller) from None
            finally:
                self._under_way[key] -= 1

        return guard

    def _owners(self, args: Any) -> Any:
        """Return what root may ask for in a shared home: not in the name of another user, whose rights its files would have."""
        tenant = args.run.tenant if isinstance(args, wire.SubmitRun) else getattr(args, "tenant", "")
        if self._tenancy.shared and isinstance(args, (wire.SubmitRun, wire.RequestGang)):
            self._tenancy.check_not_user(tenant)
            self._tenancy.note(tenant, 0)
        return args

    # --- own and others' ---

    def lease(self, lease_id: str, caller: Caller, *, strict: bool = False) -> Lease:
        """Return a lease that a caller may touch; strict: only its tenant. Raises NotFound, as for one that does not exist."""
        lease = self._book.lease(lease_id)
        if lease.tenant != caller.tenant and (strict or not caller.sees_all):
            if caller.sees_all:
                raise Refused(f"lease {lease_id} is of tenant {lease.tenant}: only that one, or root, runs something in it")
            raise NotFound(f'lease {lease_id!r} does not exist; list leases with "tenure leases"')
        return lease

    def run(self, run_id: str, caller: Caller) -> str:
        """Return the id of a run of the caller's own. Raises NotFound."""
        with self._book.ledger.reading() as connection:
            tenant = rows.tenant_of_run(connection, run_id)
        if tenant is None or tenant != caller.tenant:
            raise NotFound(f'run {run_id!r} does not exist; list runs with "tenure runs"')
        return run_id

    def claim(self, run_id: str, caller: Caller) -> None:
        """Take a run's id for a caller. Raises Conflict for one that another has, or had."""
        with self._book.ledger.reading() as connection:
            tenant = rows.tenant_of_run(connection, run_id)
            left = tenant is None and rows.is_left_of_run(connection, run_id)
        if left or tenant not in (None, caller.tenant):
            raise Conflict(f"the run id {run_id!r} is taken; use another one")
        self._tenancy.note(caller.tenant, caller.uid)
        self._tenancy.make_run(run_id, caller.tenant)
        self._tenancy.make_volume(caller.tenant)

    def gang(self, gang_id: str, caller: Caller) -> None:
        """Raise Conflict for a gang's id that another has."""
        with self._book.ledger.reading() as connection:
            if rows.tenants_of_gang(connection, gang_id) - {caller.tenant}:
                raise Conflict(f"the gang id {gang_id!r} is taken; use another one")

    def volume(self, caller: Caller) -> None:
        """Have the caller's home volume."""
        self._tenancy.note(caller.tenant, caller.uid)
        self._tenancy.make_volume(caller.tenant)

    # --- what is told ---

    def covered(self, text: str, caller: Caller, *known: str) -> str:
        """Return a text without the ids of others' leases, runs and gangs. known: ids that may stay."""
        mine = {*known, *self._own_ids(caller)}
        return _ID.sub(lambda found: found[0] if found[0] in mine else OTHER, text)

    def _own_ids(self, caller: Caller) -> set[str]:
        own = [lease for lease in self._book.live.values() if lease.tenant == caller.tenant]
        return {word for lease in own for word in (lease.id, lease.run_id, lease.gang_id)}

    def _told(self, error: TenureError, caller: Caller) -> TenureError:
        if not caller.sees_all:
            known = _ID.findall(str(error)) if isinstance(error, (NotFound, SpecError)) else []  # what it said itself
            error.args = (self.covered(str(error), caller, *known),)
            for name, value in vars(error).items():
                if isinstance(value, dict):
                    setattr(error, name, {key: self.covered(str(why), caller) for key, why in value.items()})
        return error


# --- arguments ------------------------------------------------------------------------------------------------------------


def _own_lease(roles: Roles, args: Any, caller: Caller) -> Any:
    roles.lease(args.lease_id, caller)
    return args


def _own_lease_alone(roles: Roles, args: Any, caller: Caller) -> Any:
    roles.lease(args.lease_id, caller, strict=True)
    return args


def _own_leases(roles: Roles, args: Any, caller: Caller) -> Any:
    for lease_id in args.lease_ids:
        roles.lease(lease_id, caller)
    return args


def _release(roles: Roles, args: wire.Release, caller: Caller) -> wire.Release:
    if args.reason not in _BY_HOLDER:
        raise Refused(f"a holder's leases end {' or '.join(_BY_HOLDER)}; found {args.reason}")
    return _own_leases(roles, args, caller)  # type: ignore[no-any-return]


def _own_run(roles: Roles, args: Any, caller: Caller) -> Any:
    roles.run(args.run_id, caller)
    return args


def _own_trial(roles: Roles, args: wire.RecordTrial, caller: Caller) -> wire.RecordTrial:
    roles.run(args.trial.run_id, caller)
    return args


def _own_recommendation(roles: Roles, args: wire.RecordRecommendation, caller: Caller) -> wire.RecordRecommendation:
    roles.run(args.recommendation.run_id, caller)
    return args


def _only_own(roles: Roles, args: Any, caller: Caller) -> Any:
    if caller.sees_all:
        return args
    name = next((name for name in _COUNTS if hasattr(args, name)), "")
    return replace(args, tenant=caller.tenant, **({name: min(getattr(args, name), MAX_ROWS)} if name else {}))


def _tenant_of(said: str, caller: Caller) -> str:
    if said not in ("", "default", caller.tenant):
        raise Refused(f"you are tenant {caller.tenant}, and ask in the name of {said}; leave the tenant out")
    return caller.tenant


def _submit(roles: Roles, args: wire.SubmitRun, caller: Caller) -> wire.SubmitRun:
    run = args.run
    if not run.id or run.id in (".", "..") or run.id.startswith(".") or "/" in run.id or "\0" in run.id or len(run.id) > 128:
        raise SpecError(f"run id {run.id!r} is not allowed: it names a folder (1 to 128 characters, no slash, no dot first)")
    tenant = _tenant_of(run.tenant, caller)
    roles.claim(run.id, caller)
    return replace(args, run=replace(run, tenant=tenant))


def _request(roles: Roles, args: wire.RequestGang, caller: Caller) -> wire.RequestGang:
    tenant = _tenant_of(args.tenant, caller)
    roles.run(args.run_id, caller)
    roles.gang(args.gang_id, caller)
    for member in args.members:
        _check_command(member.command, args.secrets)
    return replace(args, tenant=tenant)


def _check_command(command: Command, secrets: Mapping[str, str]) -> None:
    """Raise Refused for what only root's own jobs may have."""
    if command.runtime not in ("process", "container"):
        raise Refused(f"the runtime {command.runtime} runs nothing as a tenant's own user; use process or container")
    if command.runtime == "process" and command.image:
        raise Refused("the root of an image is made by root from a folder that you may change: run the image in a container")
    if command.network != "host":
        raise Refused(f"a network namespace of this machine is root's to give; leave network {command.network!r} out")
    if low := sorted(port for port in command.ports.values() if 0 < port < LEAST_PORT):
        raise Refused(f"ports below {LEAST_PORT} are root's to give; found {low[0]}")
    if missing := sorted(set(command.secrets) - set(secrets)):
        raise Refused(f"the secret {missing[0]} did not come with the request: have the variable in your own environment")


# --- results --------------------------------------------------------------------------------------------------------------


def _own_status(roles: Roles, result: wire.Status, caller: Caller) -> wire.Status:
    result = replace(result, tenant=caller.tenant, role=caller.role)
    if caller.sees_all:
        return result
    own = sum(lease.tenant == caller.tenant for lease in roles._book.live.values())
    unreached = dict.fromkeys(result.unreached, "it cannot be reached")
    return replace(result, leases=own, clients=0, unreached=unreached)


def _covered_lease(roles: Roles, lease: Lease, caller: Caller) -> Lease:
    if caller.sees_all:
        return lease
    return replace(lease, end_detail=roles.covered(lease.end_detail, caller, lease.id, lease.run_id, lease.gang_id))


def _show_lease(roles: Roles, result: Lease, caller: Caller) -> Lease:
    return _covered_lease(roles, result, caller)


def _show_leases(roles: Roles, result: tuple[Lease, ...], caller: Caller) -> tuple[Lease, ...]:
    return tuple(_covered_lease(roles, lease, caller) for lease in result if caller.sees_all or lease.tenant == caller.tenant)


def _show_view(roles: Roles, result: wire.LeaseView, caller: Caller) -> wire.LeaseView:
    return replace(result, lease=_covered_lease(roles, result.lease, caller))


def _show_views(roles: Roles, result: tuple[wire.LeaseView, ...], caller: Caller) -> tuple[wire.LeaseView, ...]:
    return tuple(_show_view(roles, view, caller) for view in result if caller.sees_all or view.lease.tenant == caller.tenant)


def _show_events(roles: Roles, result: tuple[Event, ...], caller: Caller) -> tuple[Event, ...]:
    if caller.sees_all:
        return result
    return tuple(_covered_event(roles, event, caller) for event in result)


def _covered_event(roles: Roles, event: Event, caller: Caller) -> Event:
    data: Any = dict(event.data)
    lease = data.get("lease")
    known = (event.lease_id, event.run_id, str((lease or {}).get("gang_id", "")))
    if lease:
        data["lease"] = {**lease, "end_detail": roles.covered(str(lease.get("end_detail", "")), caller, *known)}
    return replace(event, why=roles.covered(event.why, caller, *known), data=data)


def _own_policies(roles: Roles, result: Mapping[str, Policy], caller: Caller) -> Mapping[str, Policy]:
    return {name: policy for name, policy in result.items() if caller.sees_all or name in (caller.tenant, EVERYBODY)}


def _own_tenant(roles: Roles, result: tuple[TenantView, ...], caller: Caller) -> tuple[TenantView, ...]:
    return tuple(view for view in result if caller.sees_all or view.member.tenant == caller.tenant)


def _have_volume(roles: Roles, args: wire.Nothing, caller: Caller) -> wire.Nothing:
    roles.volume(caller)
    return args


_ADMIN = Rule(least=Role.ADMIN)
_OWNER = Rule(least=None)
RULES: Mapping[str, Rule] = {
    "status": Rule(show=_own_status),
    "add_node": _ADMIN,
    "remove_node": _ADMIN,
    "submit_run": Rule(admit=_submit),
    "set_stage": Rule(admit=_own_run),
    "set_run": Rule(admit=_own_run),
    "runs": Rule(admit=_only_own),
    "request_gang": Rule(admit=_request, show=_show_leases),
    "wait_leases": Rule(admit=_own_leases, show=_show_views, at_once=MAX_WAITS),
    "lease": Rule(admit=_own_lease, show=_show_view),
    "leases": Rule(admit=_only_own, show=_show_leases),
    "renew": Rule(admit=_own_lease, show=_show_lease),
    "resize": Rule(admit=_own_lease, show=_show_lease),
    "release": Rule(admit=_release),
    "exec": Rule(admit=_own_lease_alone, at_once=MAX_EXECS),
    "open_session": Rule(admit=_own_lease_alone, at_once=MAX_EXECS),
    "live": Rule(show=_show_views),
    "set_policy": _ADMIN,
    "policies": Rule(show=_own_policies),
    "tenants": Rule(show=_own_tenant),
    "set_role": _ADMIN,
    "remove_tenant": _ADMIN,
    "home_volume": Rule(admit=_have_volume),
    "nudge": Rule(admit=_own_run),
    "events": Rule(admit=_only_own, show=_show_events),
    "usage": Rule(admit=_own_lease),
    "record_trial": Rule(admit=_own_trial),
    "trials": Rule(admit=_only_own),
    "record_recommendation": Rule(admit=_own_recommendation),
    "recommendations": Rule(admit=_only_own),
    "collect_garbage": _ADMIN,
    "backup": _OWNER,
    "shutdown": _ADMIN,
}
"""`backup` writes where its caller says, as root; `exec` and `open_session` run as the lease's tenant: none is an admin's."""
