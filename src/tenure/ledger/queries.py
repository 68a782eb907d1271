"""Every query of the ledger, one named function each, in SQL that SQLite and PostgreSQL share.

All take a connection inside a transaction. Functions that write say nothing of events: `store.Transaction` pairs them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, bindparam, func, insert, select

from tenure import codec, wire
from tenure.errors import NotFound
from tenure.events import Event
from tenure.leases import Lease, LeaseState
from tenure.ledger import dialect
from tenure.ledger import schema as t
from tenure.nodes import Node
from tenure.protocols import Exit
from tenure.runs import Run, RunState, Stage
from tenure.tenants import Policy
from tenure.trials import Recommendation, Trial
from tenure.usage import Usage

T = TypeVar("T")
Insert = dialect.Insert


def _text(noun: Any) -> str:
    return codec.to_json(noun).decode()


def _plain(text: str) -> str:
    """Return text without NUL, which PostgreSQL refuses; the last words of a job may hold one. (JSON writes it as \\u0000.)"""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _nouns(rows: Any, kind: type[T]) -> tuple[T, ...]:
    return tuple(codec.from_json(row[0], kind) for row in rows)


def _put(
    connection: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any], *, only_new: Mapping[str, Any] = {}
) -> None:
    """Write a row, over the one with the same key if there is one; `only_new` is left as it is then."""
    statement = _upsert(connection.dialect.name, table, tuple(key), tuple(values))
    connection.execute(statement, {**key, **values, **only_new})


@cache
def _upsert(dialect_name: str, table: Table, key: tuple[str, ...], values: tuple[str, ...]) -> Insert:
    # Made once: building a statement costs more than running it.
    statement = dialect.insert_into(dialect_name, table)
    return statement.on_conflict_do_update(index_elements=key, set_={name: statement.excluded[name] for name in values})


# --- events and fences ------------------------------------------------------------------------------------------------


_INSERT_EVENT, _INSERT_EXIT = insert(t.events), insert(t.exits)


def insert_event(connection: Connection, event: Event) -> Event:
    """Append an event and return it with its `seq`."""
    values = {
        "at_s": event.at_s, "kind": event.kind, "who": event.who, "why": _plain(event.why), "run_id": event.run_id,
        "stage": event.stage, "lease_id": event.lease_id, "node": event.node, "data": _text(event.data),
    }  # fmt: skip
    key = connection.execute(_INSERT_EVENT, values).inserted_primary_key
    return replace(event, seq=int(key[0]) if key else 0)


def events_after(
    connection: Connection, after_seq: int, *, run_id: str, max_events: int, tenant: str = ""
) -> tuple[Event, ...]:
    """Return events with a higher `seq`, oldest first. tenant: only those of its runs."""
    query = select(t.events).where(t.events.c.seq > after_seq).order_by(t.events.c.seq).limit(max_events)
    if run_id:
        query = query.where(t.events.c.run_id == run_id)
    if tenant:
        query = query.where(t.events.c.run_id.in_(_runs_of(tenant)))
    return tuple(Event(**{**row, "data": json.loads(row["data"])}) for row in connection.execute(query).mappings())


def last_fence(connection: Connection) -> int:
    """Return the highest fence handed out, 0 before the first."""
    return _number(connection, "fence")


def next_fence(connection: Connection) -> int:
    """Return and keep the next fence."""
    fence = last_fence(connection) + 1
    _put(connection, t.meta, {"key": "fence"}, {"value": str(fence)})
    return fence


def raise_fence(connection: Connection, fence: int) -> None:
    """Have the next fence be above this one; one that is already higher stays."""
    _put(connection, t.meta, {"key": "fence"}, {"value": str(max(fence, last_fence(connection)))})


def events_floor(connection: Connection) -> int:
    """Return the `seq` up to which events may be, or have been, deleted; 0 when none may."""
    return _number(connection, "events_floor")


def raise_events_floor(connection: Connection, seq: int) -> None:
    """Let events up to this `seq` be deleted; a floor that is already higher stays."""
    _put(connection, t.meta, {"key": "events_floor"}, {"value": str(max(seq, events_floor(connection)))})


def _number(connection: Connection, key: str) -> int:
    return int(connection.execute(select(t.meta.c.value).where(t.meta.c.key == key)).scalar() or 0)


def utc_offset(connection: Connection, boot_id: str) -> float | None:
    """Return UTC minus CLOCK_BOOTTIME as the brokers of this boot have counted it, None in the first of them."""
    found = str(connection.execute(select(t.meta.c.value).where(t.meta.c.key == "utc_offset")).scalar() or "")
    boot, _, offset_s = found.rpartition(" ")
    return float(offset_s) if boot == boot_id else None


def put_utc_offset(connection: Connection, boot_id: str, offset_s: float) -> None:
    """Keep it."""
    _put(connection, t.meta, {"key": "utc_offset"}, {"value": f"{boot_id} {offset_s!r}"})


def policies(connection: Connection) -> dict[str, Policy]:
    """Return the policy of each tenant that has one of its own, and of EVERYBODY else where it was set."""
    found = connection.execute(select(t.meta.c.value).where(t.meta.c.key == "policies")).scalar()
    made: dict[str, Policy] = codec.from_builtins(json.loads(found or "{}"), dict[str, Policy])
    return made


def put_policies(connection: Connection, kept: Mapping[str, Policy]) -> None:
    """Keep them."""
    _put(connection, t.meta, {"key": "policies"}, {"value": _text(dict(kept))})


# --- runs -------------------------------------------------------------------------------------------------------------


def put_run(connection: Connection, run: Run) -> None:
    """Write a run and its stages."""
    values = {
        "tenant": run.tenant, "state": str(run.state), "created_at_s": run.created_at_s,
        "body": _text(replace(run, stages=())),
    }  # fmt: skip
    _put(connection, t.runs, {"id": run.id}, values)
    for position, stage in enumerate(run.stages):
        _put_stage(connection, run.id, stage, position)


def _put_stage(connection: Connection, run_id: str, stage: Stage, position: int) -> None:
    values = {"position": position, "state": str(stage.state), "fingerprint": stage.fingerprint, "body": _text(stage)}
    _put(connection, t.stages, {"run_id": run_id, "name": stage.name}, values)


def put_stage(connection: Connection, run_id: str, stage: Stage) -> None:
    """Write one stage; one not yet known goes last. Raises NotFound without the run."""
    get_run(connection, run_id)
    here = t.stages.c.run_id == run_id
    position = connection.execute(select(t.stages.c.position).where(here, t.stages.c.name == stage.name)).scalar()
    if position is None:
        position = connection.execute(select(func.count()).select_from(t.stages).where(here)).scalar_one()
    _put_stage(connection, run_id, stage, position)


def set_run_state(connection: Connection, run_id: str, state: RunState) -> None:
    """Write a run's state. Raises NotFound."""
    put_run(connection, replace(get_run(connection, run_id), state=state))


def _runs_of(tenant: str) -> Select[Any]:
    return select(t.runs.c.id).where(t.runs.c.tenant == tenant)


def list_runs(
    connection: Connection, *, run_id: str = "", state: str = "", tenant: str = "", max_runs: int = 100
) -> tuple[Run, ...]:
    """Return runs with their stages, newest first; empty fields select all."""
    query = select(t.runs.c.body).order_by(t.runs.c.created_at_s.desc(), t.runs.c.id).limit(max_runs)
    if run_id:
        query = query.where(t.runs.c.id == run_id)
    if state:
        query = query.where(t.runs.c.state == state)
    if tenant:
        query = query.where(t.runs.c.tenant == tenant)
    return tuple(_with_stages(connection, run) for run in _nouns(connection.execute(query), Run))


def _with_stages(connection: Connection, run: Run) -> Run:
    query = select(t.stages.c.body).where(t.stages.c.run_id == run.id).order_by(t.stages.c.position)
    return replace(run, stages=_nouns(connection.execute(query), Stage))


def get_run(connection: Connection, run_id: str) -> Run:
    """Return a run. Raises NotFound."""
    found = list_runs(connection, run_id=run_id)
    if not found:
        raise NotFound(f'run {run_id!r} does not exist; list runs with "tenure runs"')
    return found[0]


# --- leases -----------------------------------------------------------------------------------------------------------

# Those asked for with every grant are built once: building takes longer than the answer.
_GANG = select(t.leases.c.body).where(t.leases.c.gang_id == bindparam("gang_id")).order_by(t.leases.c.worker, t.leases.c.id)
_LAST_ATTEMPT = select(func.max(t.leases.c.attempt)).where(
    *(t.leases.c[name] == bindparam(name) for name in ("run_id", "stage", "worker"))
)
_EXIT = select(t.exits.c.attempt).where(*(t.exits.c[name] == bindparam(name) for name in ("lease_id", "attempt")))


def put_lease(connection: Connection, lease: Lease, *, queue_until_s: float = 0.0) -> None:
    """Write a lease. queue_until_s: until when it may queue; kept as it was when 0."""
    values: dict[str, Any] = {
        "gang_id": lease.gang_id, "run_id": lease.run_id, "stage": lease.stage, "worker": lease.worker,
        "attempt": lease.attempt, "tenant": lease.tenant, "state": str(lease.state), "node": lease.node,
        "fence": lease.fence, "requested_at_s": lease.requested_at_s, "ended_at_s": lease.ended_at_s, "body": _text(lease),
    }  # fmt: skip
    until = {"queue_until_s": queue_until_s}
    if queue_until_s:
        _put(connection, t.leases, {"id": lease.id}, values | until)
    else:
        _put(connection, t.leases, {"id": lease.id}, values, only_new=until)


def get_lease(connection: Connection, lease_id: str) -> Lease:
    """Return a lease. Raises NotFound."""
    found = connection.execute(select(t.leases.c.body).where(t.leases.c.id == lease_id)).scalar()
    if found is None:
        raise NotFound(f'lease {lease_id!r} does not exist; list leases with "tenure leases"')
    return codec.from_json(found, Lease)


def gang_leases(connection: Connection, gang_id: str) -> tuple[Lease, ...]:
    """Return a gang's leases by worker number; none when nobody asked for it."""
    return _nouns(connection.execute(_GANG, {"gang_id": gang_id}), Lease)


def live_leases(connection: Connection) -> tuple[tuple[Lease, float], ...]:
    """Return every lease that has not ended with the UTC second until which it may queue, oldest first."""
    query = (
        select(t.leases.c.body, t.leases.c.queue_until_s)
        .where(t.leases.c.state != str(LeaseState.ENDED))
        .order_by(t.leases.c.requested_at_s, t.leases.c.gang_id, t.leases.c.worker)
    )
    return tuple((codec.from_json(body, Lease), until) for body, until in connection.execute(query))


def select_leases(connection: Connection, query: wire.ListLeases) -> tuple[Lease, ...]:
    """Return the leases that a client asks for, newest first."""
    rows = select(t.leases.c.body).order_by(t.leases.c.requested_at_s.desc(), t.leases.c.gang_id, t.leases.c.worker)
    for name in ("run_id", "stage", "tenant"):
        if value := getattr(query, name):
            rows = rows.where(t.leases.c[name] == value)
    if query.live:
        rows = rows.where(t.leases.c.state != str(LeaseState.ENDED))
    return _nouns(connection.execute(rows.limit(query.max_leases)), Lease)


def last_attempt(connection: Connection, run_id: str, stage: str, worker: int) -> int:
    """Return the highest attempt that any lease of this worker ever made, 0 for none."""
    asked = {"run_id": run_id, "stage": stage, "worker": worker}
    return int(connection.execute(_LAST_ATTEMPT, asked).scalar() or 0)


def insert_exit(connection: Connection, lease_id: str, attempt: int, end: Exit) -> bool:
    """Write an attempt's exit unless it is known; return whether it was new."""
    if connection.execute(_EXIT, {"lease_id": lease_id, "attempt": attempt}).scalar() is not None:
        return False
    values = {"lease_id": lease_id, "attempt": attempt, "kind": str(end.kind), "ended_at_s": end.ended_at_s}
    connection.execute(_INSERT_EXIT, {**values, "body": _text(end)})
    return True


def lease_exits(connection: Connection, lease_id: str) -> tuple[Exit, ...]:
    """Return the exits of a lease's attempts, in order; the last 100 of them."""
    query = select(t.exits.c.body).where(t.exits.c.lease_id == lease_id).order_by(t.exits.c.attempt.desc()).limit(100)
    return _nouns(connection.execute(query), Exit)[::-1]


def live_exits(connection: Connection) -> frozenset[tuple[str, int]]:
    """Return (lease id, attempt) of every exit of a lease that has not ended."""
    live = t.leases.c.state != str(LeaseState.ENDED)
    query = select(t.exits.c.lease_id, t.exits.c.attempt).join(t.leases, t.leases.c.id == t.exits.c.lease_id).where(live)
    return frozenset((lease_id, attempt) for lease_id, attempt in connection.execute(query))


# --- invocations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """An event of a stage that was started at least once."""

    name: str
    worker: int
    lease_id: str
    attempt: int
    """The last that was started for it."""
    starts: int
    failures: int
    """Abnormal ends under the present lease."""
    done: bool


def _invocations(connection: Connection, *where: ColumnElement[bool]) -> tuple[Invocation, ...]:
    c = t.invocations.c
    query = select(c.name, c.worker, c.lease_id, c.attempt, c.starts, c.failures, c.done).where(*where)
    rows = connection.execute(query).mappings()
    return tuple(Invocation(**{**row, "done": bool(row["done"])}) for row in rows)


def list_invocations(connection: Connection, run_id: str, stage: str) -> tuple[Invocation, ...]:
    """Return a stage's invocations."""
    return _invocations(connection, t.invocations.c.run_id == run_id, t.invocations.c.stage == stage)


def invocation_of(connection: Connection, lease_id: str, attempt: int) -> Invocation | None:
    """Return what one attempt of a lease was started for, None when for no event."""
    found = _invocations(connection, t.invocations.c.lease_id == lease_id, t.invocations.c.attempt == attempt)
    return found[0] if found else None


def put_invocation(connection: Connection, run_id: str, stage: str, made: Invocation, *, now_s: float) -> None:
    """Write an invocation."""
    values = {
        "worker": made.worker, "lease_id": made.lease_id, "attempt": made.attempt, "starts": made.starts,
        "failures": made.failures, "done": int(made.done), "at_s": now_s,
    }  # fmt: skip
    _put(connection, t.invocations, {"run_id": run_id, "stage": stage, "name": made.name}, values)


# --- usage, trials, recommendations, nodes ----------------------------------------------------------------------------


def insert_usage(connection: Connection, points: Collection[wire.UsagePoint]) -> None:
    """Append rollups."""
    rows = [{"lease_id": p.lease_id, "at_s": p.at_s, "body": _text(p.usage)} for p in points]
    if rows:
        connection.execute(insert(t.usage_points), rows)


def lease_usage(connection: Connection, lease_id: str, *, max_points: int = 10_000) -> tuple[wire.UsagePoint, ...]:
    """Return a lease's rollups, oldest first."""
    c = t.usage_points.c
    query = select(c.at_s, c.body).where(c.lease_id == lease_id).order_by(c.at_s, c.id).limit(max_points)
    rows = connection.execute(query)
    return tuple(wire.UsagePoint(lease_id=lease_id, at_s=at_s, usage=codec.from_json(body, Usage)) for at_s, body in rows)


def live_usage_counts(connection: Connection) -> dict[str, int]:
    """Return lease id -> how many rollups it has, for every lease that has not ended and has any."""
    points, live = t.usage_points.c, t.leases.c.state != str(LeaseState.ENDED)
    query = select(points.lease_id, func.count()).join(t.leases, t.leases.c.id == points.lease_id).where(live)
    return {row[0]: int(row[1]) for row in connection.execute(query.group_by(points.lease_id))}


def insert_trial(connection: Connection, trial: Trial) -> bool:
    """Keep a trial unless its id is known; return whether it was new."""
    if connection.execute(select(t.trials.c.id).where(t.trials.c.id == trial.id)).scalar() is not None:
        return False
    values = {
        "id": trial.id, "run_id": trial.run_id, "stage": trial.stage, "fingerprint": trial.fingerprint,
        "source": trial.source, "at_s": trial.at_s, "body": _text(trial),
    }  # fmt: skip
    connection.execute(insert(t.trials).values(**values))
    return True


def list_trials(connection: Connection, query: wire.ListTrials) -> tuple[Trial, ...]:
    """Return trials, oldest first."""
    rows = select(t.trials.c.body).order_by(t.trials.c.position)
    for name in ("fingerprint", "run_id"):
        if value := getattr(query, name):
            rows = rows.where(t.trials.c[name] == value)
    if query.tenant:
        rows = rows.where(t.trials.c.run_id.in_(_runs_of(query.tenant)))
    return _nouns(connection.execute(rows.limit(query.max_trials)), Trial)


def insert_recommendation(connection: Connection, made: Recommendation) -> bool:
    """Keep a recommendation unless its id is known; return whether it was new."""
    table = t.recommendations
    if connection.execute(select(table.c.id).where(table.c.id == made.id)).scalar() is not None:
        return False
    values = {"id": made.id, "run_id": made.run_id, "stage": made.stage, "at_s": made.at_s, "body": _text(made)}
    connection.execute(insert(table).values(**values))
    return True


def list_recommendations(connection: Connection, run_id: str, tenant: str = "") -> tuple[Recommendation, ...]:
    """Return a run's recommendations, oldest first; of all runs, or of a tenant's, when empty (at most 1000)."""
    table = t.recommendations
    query = select(table.c.body).order_by(table.c.position).limit(1000)
    if run_id:
        query = query.where(table.c.run_id == run_id)
    if tenant:
        query = query.where(table.c.run_id.in_(_runs_of(tenant)))
    return _nouns(connection.execute(query), Recommendation)


def put_node(connection: Connection, node: Node) -> None:
    """Write a node."""
    _put(connection, t.nodes, {"name": node.name}, {"state": str(node.state), "body": _text(node)})


def list_nodes(connection: Connection) -> tuple[Node, ...]:
    """Return every node ever seen, by name."""
    return _nouns(connection.execute(select(t.nodes.c.body).order_by(t.nodes.c.name)), Node)
