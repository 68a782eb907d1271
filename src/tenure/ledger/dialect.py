"""The one place that knows which database lies beneath: how to open it, how to lock it, how to read its complaints.

SQLite is embedded and durable here (WAL, synchronous=FULL); PostgreSQL takes the same tables and queries.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from tenure.errors import CorruptData, InternalError, Refused, TenureError, Unavailable

BUSY_TIMEOUT_S = 5.0
Insert = sqlite.Insert | postgresql.Insert


def open_engine(path: Path) -> Engine:
    """Return an engine on a SQLite file; made when missing. Nothing is read yet.

    One connection, used by one thread at a time: there is one writer, and it is also the reader.
    """
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=StaticPool,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={int(BUSY_TIMEOUT_S * 1000)}", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # sqlite3 would begin late and shared; taking the write lock at once makes read-then-write transactions safe.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def insert_into(name: str, table: Table) -> Insert:
    """Return an INSERT that knows ON CONFLICT, in the words of the database called `name`."""
    return sqlite.insert(table) if name == "sqlite" else postgresql.insert(table)


def check_whole(connection: Connection) -> None:
    """Raise CorruptData when the database's own check finds damage."""
    if connection.dialect.name == "sqlite":
        found = connection.execute(text("PRAGMA quick_check(1)")).scalar()
        if found != "ok":
            raise CorruptData(f"the ledger is damaged: {found}")


def forbid_changes(connection: Connection, table: str) -> None:
    """Have the database refuse UPDATE and DELETE on a table."""
    if connection.dialect.name != "sqlite":
        raise InternalError(f"append-only tables are not written yet for {connection.dialect.name}")
    for change in ("UPDATE", "DELETE"):
        connection.exec_driver_sql(
            f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )


def explained(error: DBAPIError, where: str) -> TenureError:
    """Return the database's error as one that says what to do. where: which ledger, for people."""
    cause = error.orig
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return Refused(f"the ledger {where} cannot grow: the disk is full. Free space there; nothing was changed.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(
            f"the ledger {where} is locked by another process for more than {BUSY_TIMEOUT_S:g} s; nothing was changed. "
            "End whatever has the file open, and try again."
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return CorruptData(
            f"the ledger {where} cannot be read: {cause}. It was left as it is: restore a backup, or move it away."
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM):
        return Unavailable(f"the ledger {where} cannot be opened or written: {cause}. Check the folder's owner and its disk.")
    return InternalError(f"the ledger {where} refused a query: {cause}")
