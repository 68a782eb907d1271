"""What the ledger may let go of: how old each run is, and deletes in small steps, in SQL that both databases share.

Nothing of a lease that has not ended goes, and trials only when asked by age. Freed pages are used again; the file does not
shrink. Not here: when, how much, and the files of a run (`broker.retention`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, func, select

from tenure.leases import LeaseState
from tenure.ledger import queries
from tenure.ledger import schema as t
from tenure.runs import FINAL_RUN_STATES

_FINAL = frozenset(str(state) for state in FINAL_RUN_STATES)
_LIVE_LEASES = select(t.leases.c.id).where(t.leases.c.state != str(LeaseState.ENDED))


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRun:
    """A run, as far as retention needs to know it."""

    id: str
    begun_s: float
    last_s: float
    """UTC seconds of the last thing that is known to have happened in it."""
    over: bool
    """Whether it was written down as done, failed or cancelled."""
    live: bool
    """Whether a lease of it has not ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows that go, or went."""

    count: int = 0
    size_bytes: int = 0
    """Of their largest columns: what the database adds is not counted."""

    def __add__(self, other: Rows) -> Rows:
        return Rows(count=self.count + other.count, size_bytes=self.size_bytes + other.size_bytes)


def known_runs(connection: Connection) -> tuple[KnownRun, ...]:
    """Return every run, newest first; also those that only leases tell of."""
    c, e = t.leases.c, t.events.c
    live = {row[0] for row in connection.execute(select(c.run_id).where(c.state != str(LeaseState.ENDED)).distinct())}
    query = select(c.run_id, func.min(c.requested_at_s), func.max(c.ended_at_s)).group_by(c.run_id)
    by_lease = {run_id: (begun_s, ended_s) for run_id, begun_s, ended_s in connection.execute(query)}
    newest = select(e.at_s).where(e.run_id == t.runs.c.id).order_by(e.seq.desc()).limit(1).scalar_subquery()
    found = []
    for run_id, state, begun_s, event_s in connection.execute(
        select(t.runs.c.id, t.runs.c.state, t.runs.c.created_at_s, newest)
    ):
        _, ended_s = by_lease.pop(run_id, (0.0, 0.0))
        last_s = max(begun_s, ended_s, event_s or 0.0)
        found.append(KnownRun(id=run_id, begun_s=begun_s, last_s=last_s, over=state in _FINAL, live=run_id in live))
    for run_id, (begun_s, ended_s) in by_lease.items():
        last_s = max(begun_s, ended_s)
        found.append(KnownRun(id=run_id, begun_s=begun_s, last_s=last_s, over=True, live=run_id in live))
    return tuple(sorted(found, key=lambda run: (-run.begun_s, run.id)))


def has_live_lease(connection: Connection, run_id: str) -> bool:
    """Return whether a lease of the run has not ended."""
    query = select(t.leases.c.id).where(t.leases.c.run_id == run_id, t.leases.c.state != str(LeaseState.ENDED)).limit(1)
    return connection.execute(query).first() is not None


def run_rows(connection: Connection, run_id: str) -> Rows:
    """Return what the ledger holds of a run, events and trials left out."""
    return sum((_measured(connection, table, where) for table, where in _of_run(run_id)), Rows())


def forget_run(connection: Connection, run_id: str) -> Rows:
    """Delete what the ledger holds of a run, events and trials left out; return what went."""
    rows = run_rows(connection, run_id)
    for table, where in _of_run(run_id):
        connection.execute(delete(table).where(where))
    return rows


def _of_run(run_id: str) -> tuple[tuple[Table, ColumnElement[bool]], ...]:
    """Name a run's rows, table by table; leases last, since the others are found through them."""
    ids = select(t.leases.c.id).where(t.leases.c.run_id == run_id)
    return (
        (t.usage_points, t.usage_points.c.lease_id.in_(ids)),
        (t.exits, t.exits.c.lease_id.in_(ids)),
        (t.invocations, t.invocations.c.run_id == run_id),
        (t.recommendations, t.recommendations.c.run_id == run_id),
        (t.stages, t.stages.c.run_id == run_id),
        (t.runs, t.runs.c.id == run_id),
        (t.leases, t.leases.c.run_id == run_id),
    )


def old_events(connection: Connection, *, before_s: float, keep_runs: Collection[str]) -> Rows:
    """Return the events before a UTC second that may go: those of no live lease and of none of `keep_runs`."""
    return _measured(connection, t.events, _old_events(connection, before_s, keep_runs))


def delete_old_events(connection: Connection, *, before_s: float, keep_runs: Collection[str], max_rows: int) -> Rows:
    """Delete the oldest of those, at most `max_rows`; return what went. The floor rises to the newest that may go."""
    floor = _last_before(connection, t.events, "seq", before_s)
    if not floor:
        return Rows()
    queries.raise_events_floor(connection, floor)
    return _delete_some(connection, t.events, "seq", _old_events(connection, before_s, keep_runs), max_rows)


def _old_events(connection: Connection, before_s: float, keep_runs: Collection[str]) -> ColumnElement[bool]:
    c = t.events.c
    floor = _last_before(connection, t.events, "seq", before_s)
    return and_(c.seq <= floor, c.at_s < before_s, c.lease_id.not_in(_LIVE_LEASES), c.run_id.not_in(sorted(keep_runs)))


def old_usage(connection: Connection, *, before_s: float) -> Rows:
    """Return the rollups of ended leases before a UTC second."""
    return _measured(connection, t.usage_points, _old_usage(connection, before_s))


def delete_old_usage(connection: Connection, *, before_s: float, max_rows: int) -> Rows:
    """Delete the oldest of those, at most `max_rows`; return what went."""
    return _delete_some(connection, t.usage_points, "id", _old_usage(connection, before_s), max_rows)


def _old_usage(connection: Connection, before_s: float) -> ColumnElement[bool]:
    c = t.usage_points.c
    last = _last_before(connection, t.usage_points, "id", before_s)
    return and_(c.id <= last, c.at_s < before_s, c.lease_id.not_in(_LIVE_LEASES))


def old_trials(connection: Connection, *, before_s: float) -> Rows:
    """Return the trials measured before a UTC second."""
    return _measured(connection, t.trials, t.trials.c.at_s < before_s)


def delete_old_trials(connection: Connection, *, before_s: float, max_rows: int) -> Rows:
    """Delete the oldest of those, at most `max_rows`; return what went."""
    return _delete_some(connection, t.trials, "position", t.trials.c.at_s < before_s, max_rows)


def _measured(connection: Connection, table: Table, where: ColumnElement[bool]) -> Rows:
    column = table.c[{"events": "data", "invocations": "name"}.get(table.name, "body")]
    count, size = connection.execute(select(func.count(), func.sum(func.length(column))).where(where)).one()
    return Rows(count=int(count), size_bytes=int(size or 0))


def _delete_some(connection: Connection, table: Table, key: str, where: ColumnElement[bool], max_rows: int) -> Rows:
    keys = list(connection.execute(select(table.c[key]).where(where).order_by(table.c[key]).limit(max_rows)).scalars())
    some = table.c[key].in_(keys)
    rows = _measured(connection, table, some)
    connection.execute(delete(table).where(some))
    return rows


def _last_before(connection: Connection, table: Table, key: str, before_s: float) -> int:
    """Return the highest key of a row before a UTC second, 0 for none: a search by halves, since rows lie in order of time.

    Where the clock was set back it may return an earlier one: what it leaves goes with a later look.
    """
    column = table.c[key]
    low, high = connection.execute(select(func.min(column), func.max(column))).one()
    low, high = int(low or 1) - 1, int(high or 0)
    first = low
    while low < high:
        middle = (low + high + 1) // 2
        found = connection.execute(
            select(column, table.c.at_s).where(column <= middle, column > low).order_by(column.desc()).limit(1)
        ).first()
        if found is None or found[1] < before_s:
            low = middle
        else:
            high = int(found[0]) - 1
    return low if low > first else 0
