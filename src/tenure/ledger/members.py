"""Queries about the users of a machine as tenants of a shared home, and about whose a name already is."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sqlalchemy import Connection, exists, select

from tenure import codec
from tenure.ledger import schema as t
from tenure.ledger.queries import _put, _text
from tenure.tenants import Member


def members(connection: Connection) -> dict[str, Member]:
    """Return tenant -> who it is, of those that were seen or given a role."""
    found = connection.execute(select(t.meta.c.value).where(t.meta.c.key == "members")).scalar()
    made: dict[str, Member] = codec.from_builtins(json.loads(found or "{}"), dict[str, Member])
    return made


def put_members(connection: Connection, kept: Mapping[str, Member]) -> None:
    """Keep them."""
    _put(connection, t.meta, {"key": "members"}, {"value": _text(dict(kept))})


def tenant_of_run(connection: Connection, run_id: str) -> str | None:
    """Return whose a run is; None for one that is not there."""
    found = connection.execute(select(t.runs.c.tenant).where(t.runs.c.id == run_id)).scalar()
    return None if found is None else str(found)


def tenants_of_gang(connection: Connection, gang_id: str) -> set[str]:
    """Return whose leases were asked for under a gang's id."""
    return {str(row[0]) for row in connection.execute(select(t.leases.c.tenant).where(t.leases.c.gang_id == gang_id))}


def is_left_of_run(connection: Connection, run_id: str) -> bool:
    """Return whether anything says that there was a run of this id: what is left of it is its tenant's."""
    tables = (t.runs, t.events, t.leases, t.trials, t.recommendations)
    return any(
        connection.execute(select(exists().where((table.c.id if table is t.runs else table.c.run_id) == run_id))).scalar()
        for table in tables
    )


def has_anything(connection: Connection, tenant: str) -> bool:
    """Return whether a tenant has runs or leases, ended ones included."""
    tables = (t.runs, t.leases)
    return any(connection.execute(select(exists().where(table.c.tenant == tenant))).scalar() for table in tables)
