"""What whoever keeps a home does with it, as functions: up, down, remove what is old, back up, restore, tenants and policies.

The verbs of `tenure.verbs` that belong to a home as a whole. Not here: what the holder of a lease does (`leasing`), how any of
it is done (`tenure.broker`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenure import app
from tenure.broker import sharing
from tenure.broker.client import connect, start_broker
from tenure.errors import NotFound, SpecError, TenureError, Unavailable
from tenure.nodes import Node
from tenure.resources import format_duration
from tenure.retention import CollectGarbage, Freed
from tenure.tenants import Policy, Role, TenantView, check_name
from tenure.wire import Backup

if TYPE_CHECKING:
    from tenure.broker.ledgers import Restored

Home = str | Path | None
RETENTION = CollectGarbage()
"""What a broker removes by itself, and `gc` unless told otherwise."""


def up(
    *,
    home: Home = None,
    node: str = "local",
    cpus: float | None = None,
    memory: int | None = None,
    gpus: int | None = None,
    gpu_memory: int = 0,
    gpu_model: str = "",
    ledger: str = "",
    order: str = "",
    metrics_port: int = 0,
    shared: bool = False,
) -> Node:
    """Have a broker and a node of this machine that stay until `down`; return the node. Doing it again changes nothing.

    A broker that answers, also one that a run started for itself, gets the node added and stays from then on. cpus, memory
    (bytes): offer only this part of the machine; one alone brings the same share of the other, neither offers all that other
    agents have left. gpus: offer so many of the machine's devices, default all that nobody offers; on a machine without any,
    leases count so many declared ones, of this model and memory (bytes), and nothing holds them. ledger: URL of the PostgreSQL
    database that is the home's ledger from now on; default $TENURE_LEDGER, else as before. order: by which order of the queue
    to grant from now on; default: as before, at first ``fifo``. metrics_port: where Prometheus reads metrics from now on,
    ``http://127.0.0.1:PORT/metrics``; 0: as before, at first nowhere.
    shared: have the home serve all users of this machine, each as a tenant of its own, from now on (root alone can); by default
    one that everybody finds. See docs/tenants.md.
    Raises SpecError, Unavailable, Refused with who holds the machine, Conflict when the node exists with
    another part or the home has another ledger.
    """
    found_home = sharing.share(home) if shared else app.find_home(home)
    check_name("node", node)
    if ledger := ledger or os.environ.get("TENURE_LEDGER", ""):
        from tenure.broker import ledgers  # SQL comes with it

        ledgers.choose(found_home, ledger)
    start_broker(found_home, persistent=True)
    with app.broker(found_home) as client:
        try:
            made = client.add_node(
                node,
                cpus=cpus,
                memory_bytes=memory,
                gpus=gpus,
                gpu_memory_bytes=gpu_memory,
                gpu_model=gpu_model,
                order=order,
                metrics_port=metrics_port,
            )
            if shared:
                sharing.settle(client)
            return made
        except TenureError:
            left = client.status()
            if not (left.nodes or left.unreached or left.leases):  # it was started for this node alone
                client.shutdown()
            raise


def down(*, home: Home = None, node: str = "") -> bool:
    """End every lease of the home, its agents and its broker. Returns False when no broker answered.

    node: take only this node out: its leases, with the others of their gangs, are released, its agent ends, its part of the
    machine is free. Raises NotFound for an unknown node, Unavailable when it takes longer than a minute.
    """
    try:
        client = connect(app.find_home(home), start=False, who="cli:down")
    except Unavailable:
        return False
    try:
        if node:
            found = client.status()
            names = sorted({*(known.name for known in found.nodes), *found.unreached})
            if node not in names:
                raise NotFound(f"node {node!r} does not exist; this home has {', '.join(names) or 'none'}")
            client.remove_node(node)
        else:
            client.shutdown()
    finally:
        client.close()
    return True


def gc(
    *,
    home: Home = None,
    older_than_s: float = RETENTION.older_than_s,
    forget_after_s: float = RETENTION.forget_after_s,
    keep_runs: int = RETENTION.keep_runs,
    events_older_than_s: float = RETENTION.events_older_than_s,
    trials_older_than_s: float | None = None,
    dry_run: bool = False,
) -> tuple[Freed, ...]:
    """Remove what is old and return it by kind; with dry_run only say what would go. See docs/retention.md.

    The defaults are what a broker does by itself every hour. Nothing of a live run or lease ever goes; trials only when
    asked. Raises SpecError when keep_runs is negative or forget_after_s is less than older_than_s.
    """
    if keep_runs < 0:
        raise SpecError(f"the number of runs to keep must not be negative; found {keep_runs}")
    if forget_after_s < older_than_s:
        raise SpecError(
            f"whole runs cannot go earlier than their stores, worker folders and logs: found {format_duration(forget_after_s)} "
            f"and {format_duration(older_than_s)}"
        )
    asked = CollectGarbage(
        older_than_s=older_than_s,
        forget_after_s=forget_after_s,
        keep_runs=keep_runs,
        events_older_than_s=events_older_than_s,
        trials_older_than_s=trials_older_than_s,
        dry_run=dry_run,
    )
    with app.broker(app.find_home(home)) as client:
        return client.collect_garbage(asked)


def backup(file: str | Path, *, home: Home = None, force: bool = False) -> Backup:
    """Write what the home's ledger holds to one checked file, while leases and broker go on; return what was written.

    force: replace the file when it is there. Raises Conflict, NotFound, Refused.
    """
    from tenure.broker import ledgers  # SQL comes with it

    return ledgers.backup(app.find_home(home), Path(file).expanduser().absolute(), force=force)


def restore(file: str | Path, *, home: Home = None, ledger: str = "", force: bool = False) -> Restored:
    """Have the home's ledger hold what a backup holds. Only while no broker of the home lives.

    ledger: URL of the PostgreSQL database, or ``ledger.sqlite`` for the home's own file, that is its ledger from now on;
    default $TENURE_LEDGER, else where it is. force: move a ledger with runs or leases aside. Raises CorruptData, Conflict.
    """
    from tenure.broker import ledgers  # SQL comes with it

    to = ledger or os.environ.get("TENURE_LEDGER", "")
    return ledgers.restore(app.find_home(home), Path(file).expanduser().absolute(), to=to, force=force)


def tenants(*, home: Home = None) -> tuple[TenantView, ...]:
    """Return who has what in a home that all users of a machine share; to a tenant, itself alone."""
    with app.broker(app.find_home(home)) as client:
        return client.tenants()


def set_role(tenant: str, role: str, *, home: Home = None) -> None:
    """Have a user of this machine be an ``admin`` of a shared home, or a ``tenant`` as any other. For admins.

    Raises NotFound for no such user, Conflict in a home that is not shared, Refused, SpecError.
    """
    if role not in tuple(Role):
        raise SpecError(f"a role is {' or '.join(Role)}; found {role!r}")
    with app.broker(app.find_home(home)) as client:
        client.set_role(check_name("tenant", tenant), Role(role))


def remove_tenant(tenant: str, *, home: Home = None) -> None:
    """Have the name of a user who is gone be free for another. Raises NotFound, Conflict while something of it is kept."""
    with app.broker(app.find_home(home)) as client:
        client.remove_tenant(check_name("tenant", tenant))


def policies(*, home: Home = None) -> dict[str, Policy]:
    """Return the policies that were set, by tenant; under ``*`` that of everybody who has none of their own."""
    with app.broker(app.find_home(home)) as client:
        return client.policies()


def set_policy(tenant: str, *, home: Home = None, unset: bool = False, **changes: Any) -> Policy | None:
    """Change what a tenant may hold (``*``: everybody without an own policy); return what now holds for it alone.

    changes: fields of Policy; those left out stay. unset: take its own policy away first. Raises SpecError.
    """
    with app.broker(app.find_home(home)) as client:
        known = Policy() if unset else client.policies().get(tenant, Policy())
        policy = None if unset and not changes else replace(known, **changes)
        client.set_policy(tenant, policy)
        return policy
