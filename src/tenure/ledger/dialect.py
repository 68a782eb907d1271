"""The one place that knows which database lies beneath: how to open it, how to hold it alone, how to read its complaints.

SQLite is embedded and durable here (WAL, synchronous=FULL); PostgreSQL takes the same tables and queries. Either way a ledger
is open in one process at a time, over one connection. What keeps others out is a locked file beside the SQLite file, an
advisory lock of the connection's own session in PostgreSQL. That lock lives and dies with the connection, so a lost one is
never made anew: who had it must end, and whoever comes next takes the lock (docs/decisions/0010-one-connection-one-lock.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import sqlite3
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, StaticPool

from tenure.errors import (
    Conflict,
    CorruptData,
    InternalError,
    MissingExtra,
    NotFound,
    Refused,
    SpecError,
    TenureError,
    Unavailable,
)
from tenure.ledger.address import Address

LOG = logging.getLogger("tenure.ledger")
BUSY_TIMEOUT_S = 5.0
Insert = sqlite.Insert | postgresql.Insert
"""How long to wait for somebody else's lock, and for a holder that was killed to be noticed."""
CONNECT_TIMEOUT_S = 10.0
STATEMENT_TIMEOUT_S = 30.0
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""Seconds, seconds, times: a peer that went without a word is noticed after 25 s, on either side."""
_LOCK_CLASS = 0x7E47E
_MAX_APPLICATION_NAME_BYTES = 63


class LedgerHeld(Conflict):
    """Another process has the ledger open."""


# --- opening ----------------------------------------------------------------------------------------------------------


def hold(address: Address, *, who: str = "") -> Callable[[], None]:
    """Keep every other process from opening a ledger; return what lets go of it. Raises LedgerHeld with who has it.

    who: how others are told about the holder, beside its pid and host.

    A PostgreSQL ledger is held by the connection of `open_engine` itself; nothing is left to do here.
    """
    if address.path is None:
        return lambda: None
    path = address.path.resolve()  # homes that reach one file by different links meet at one lock
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_nlink > 1:
            raise Conflict(f"the ledger {path} has more than one name (hard links); SQLite would damage it. Remove the others.")
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"the ledger {path} cannot be held: {error}. Check the folder's owner and its disk.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock is held all the same, only its holder stays unnamed
            os.pwrite(descriptor, _own_name(who).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 1024, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise LedgerHeld(f"the ledger {path} is held by another process ({holder}); there is one broker per ledger") from error
    return lambda: os.close(descriptor)


def open_engine(address: Address, *, who: str = "") -> Engine:
    """Return an engine on a ledger; a SQLite file is made when missing. Nothing is read yet.

    One connection, used by one thread at a time: there is one writer, and it is also the reader. A PostgreSQL one is held
    alone from the first use on, or that raises LedgerHeld; who: how others are told about the holder.
    Raises MissingExtra when the driver is not installed.
    """
    return _open_postgresql(address, who) if address.path is None else _open_sqlite(address.path)


def reading_engine(address: Address) -> Engine:
    """Return an engine for reading beside the one that writes: each transaction sees what was true when it began."""
    if address.path is None:
        connect = _postgresql_connect(address, "backup")
        return create_engine("postgresql+psycopg://", poolclass=NullPool, creator=connect, isolation_level="REPEATABLE READ")
    if not address.path.exists():
        raise NotFound(f"there is no ledger {address} yet")
    engine = create_engine(_sqlite_url(address.path), poolclass=NullPool, connect_args=_SQLITE_ARGUMENTS)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


_SQLITE_ARGUMENTS = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False, "isolation_level": None}


def _sqlite_url(path: Path) -> URL:
    return URL.create("sqlite", database=str(path))


def _open_sqlite(path: Path) -> Engine:
    engine = create_engine(
        _sqlite_url(path), poolclass=StaticPool, connect_args={**_SQLITE_ARGUMENTS, "timeout": BUSY_TIMEOUT_S}
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


def _open_postgresql(address: Address, who: str) -> Engine:
    connect = _postgresql_connect(address, who)
    made: list[Any] = []

    def connect_once() -> Any:
        if made:
            raise Unavailable(
                f"the connection to the ledger {address} was lost, and with it the lock that made this its one broker. "
                "Another broker has to take it: try again."
            )
        made.append(connect())
        return made[0]

    engine = create_engine("postgresql+psycopg://", poolclass=StaticPool, creator=connect_once)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        _take_advisory_lock(connection, address)
        if connection.execute("SHOW synchronous_commit").fetchone()[0] == "off":
            connection.execute("SET synchronous_commit = on")
        if connection.execute("SHOW fsync").fetchone()[0] == "off":
            LOG.warning("the server of the ledger %s runs with fsync off: a power cut may lose what was granted", address)
        connection.commit()

    return engine


def _take_advisory_lock(connection: Any, address: Address) -> None:
    """Lock the schema for this session. The server needs a moment to notice that a holder was killed; it is given."""
    if connection.execute("SELECT current_schema()").fetchone()[0] is None:
        connection.close()
        raise Unavailable(f"the ledger {address}: its search_path names no schema that exists. Make it, or name another.")
    end_s = time.monotonic() + BUSY_TIMEOUT_S
    lock = f"{_LOCK_CLASS}, hashtext(current_schema())"
    while not connection.execute(f"SELECT pg_try_advisory_lock({lock})").fetchone()[0]:
        if time.monotonic() > end_s:
            found = connection.execute(
                "SELECT a.application_name, a.client_addr FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
                "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database()) "
                f"AND l.classid = {_LOCK_CLASS} AND l.objid = hashtext(current_schema())::oid"
            ).fetchone()
            holder = f"{found[0]}, from {found[1] or 'this machine'}" if found else "a process that has just let go of it"
            connection.close()
            raise LedgerHeld(f"the ledger {address} is held by another process ({holder}); there is one broker per ledger")
        connection.commit()
        time.sleep(0.05)


def _postgresql_connect(address: Address, who: str) -> Callable[[], Any]:
    try:
        import psycopg  # an extra: most ledgers are a file
    except ImportError as error:
        raise MissingExtra("psycopg", "postgres", "A ledger on PostgreSQL") from error
    url = make_url(address.url)
    bounds = {
        "statement_timeout": int(STATEMENT_TIMEOUT_S * 1000),
        "lock_timeout": int(BUSY_TIMEOUT_S * 1000),
        **{f"tcp_{name}": value for name, value in KEEPALIVES.items()},
    }
    given = {name: value for name, value in url.query.items() if isinstance(value, str)}
    options = " ".join([*(f"-c {name}={value}" for name, value in bounds.items()), given.pop("options", "")])
    arguments: dict[str, Any] = {
        "target_session_attrs": "read-write",
        "connect_timeout": int(CONNECT_TIMEOUT_S),
        "application_name": _cut(_own_name(who), _MAX_APPLICATION_NAME_BYTES),
        "tcp_user_timeout": int(STATEMENT_TIMEOUT_S * 1000),
        **KEEPALIVES,
        **url.translate_connect_args(username="user", database="dbname"),
        **given,
        "options": options.strip(),
    }

    def connect() -> Any:
        end_s = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                return psycopg.connect(**arguments)
            except psycopg.OperationalError as error:
                # A server that is just starting, or was started again, takes a moment; what else it says will not change.
                passes = "refused" in str(error) or "starting up" in str(error) or "No such file" in str(error)
                if not passes or time.monotonic() > end_s:
                    raise
                time.sleep(0.2)

    return connect


def _own_name(who: str) -> str:
    return f"tenure pid {os.getpid()} on {socket.gethostname()} {who}".strip()


def _cut(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def listen_for_hang_up(engine: Engine, heard: Callable[[BaseException], None]) -> None:
    """Have `heard` called when a statement or a commit finds the connection broken, before anybody else hears of it."""

    @event.listens_for(engine, "handle_error")
    def _listen(context: ExceptionContext) -> None:
        if context.is_disconnect:
            heard(context.original_exception)


def is_connected(driver: Any) -> bool:
    """Return whether the other end of a driver's connection is still there, without asking it anything (so at any time)."""
    if isinstance(driver, sqlite3.Connection):
        return True
    if driver.closed:
        return False
    gone = select.poll()
    gone.register(driver.fileno(), select.POLLRDHUP)
    return not gone.poll(0)


def driver_of(connection: Connection) -> Any:
    """Return the driver's own connection, for `is_connected`."""
    return connection.connection.driver_connection


# --- tables -----------------------------------------------------------------------------------------------------------


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
    if connection.dialect.name == "sqlite":
        for change in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    connection.exec_driver_sql(
        f"CREATE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    for change in ("UPDATE", "DELETE", "TRUNCATE"):
        connection.exec_driver_sql(
            f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} EXECUTE FUNCTION {table}_refuse()"
        )


def allow_deletes_up_to(connection: Connection, table: str, column: str, key: str) -> None:
    """Have the database take DELETE of rows whose column is at most the value of a key in `meta` (0 when there is none)."""
    floor = f"(SELECT CAST(value AS BIGINT) FROM meta WHERE key = '{key}')"
    above = f"OLD.{column} > coalesce({floor}, 0)"
    reason = f"{table} is append-only above its floor"
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"DROP TRIGGER {table}_no_delete")
        connection.exec_driver_sql(
            f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} WHEN {above} BEGIN SELECT RAISE(ABORT, '{reason}'); END"
        )
        return
    connection.exec_driver_sql(f"DROP TRIGGER {table}_no_delete ON {table}")
    connection.exec_driver_sql(
        f"CREATE FUNCTION {table}_refuse_above_floor() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF {above} THEN RAISE EXCEPTION '{reason}'; END IF; RETURN OLD; END $$"
    )
    connection.exec_driver_sql(
        f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {table}_refuse_above_floor()"
    )


def go_on_numbering(connection: Connection, table: str, column: str) -> None:
    """Have the next row of a table that numbers its rows come after those that were inserted with their numbers."""
    highest = f"(SELECT coalesce(max({column}), 0) FROM {table})"
    if table == "events":
        highest = _above_floor(connection, highest)
    if connection.dialect.name != "sqlite":
        sequence = f"pg_get_serial_sequence('{table}', '{column}')"
        connection.exec_driver_sql(f"SELECT setval({sequence}, {highest} + 1, false)")
    elif table == "events":  # the only one whose numbers are never given twice; the others go on by themselves
        connection.exec_driver_sql("DELETE FROM sqlite_sequence WHERE name = 'events'")
        connection.exec_driver_sql(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('events', {highest})")


def _above_floor(connection: Connection, highest: str) -> str:
    """Return the larger of a number and the floor of events: what was deleted below it does not come again."""
    larger = "max" if connection.dialect.name == "sqlite" else "greatest"
    return f"{larger}({highest}, coalesce((SELECT CAST(value AS BIGINT) FROM meta WHERE key = 'events_floor'), 0))"


def set_aside(connection: Connection, tables: Collection[str], name: str) -> None:
    """Move tables, and what belongs to them, out of the way into a PostgreSQL schema of that name, made now."""
    connection.exec_driver_sql(f'CREATE SCHEMA "{name}"')
    for table in tables:
        connection.exec_driver_sql(f'ALTER TABLE "{table}" SET SCHEMA "{name}"')
    found = connection.exec_driver_sql(
        "SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace "
        "WHERE n.nspname = current_schema() AND p.proname IN ('events_refuse', 'events_refuse_above_floor')"
    )
    for (function,) in found.all():
        connection.exec_driver_sql(f'ALTER FUNCTION {function} SET SCHEMA "{name}"')


# --- complaints -------------------------------------------------------------------------------------------------------


def explained(error: DBAPIError, where: str) -> TenureError:
    """Return the database's error as one that says what to do. where: which ledger, for people."""
    state = getattr(error.orig, "sqlstate", None)
    if isinstance(error.orig, sqlite3.Error):
        return _explained_sqlite(error.orig, where)
    return _explained_postgresql(error, str(state or ""), where)


def _explained_sqlite(cause: sqlite3.Error, where: str) -> TenureError:
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


def _explained_postgresql(error: DBAPIError, state: str, where: str) -> TenureError:
    """Source of the codes: PostgreSQL 15 documentation, appendix A."""
    cause = " ".join(str(error.orig).split())
    if state == "53100":
        return Refused(f"the ledger {where} cannot grow: its server's disk is full. Free space there; nothing was changed.")
    if state in ("55P03", "57014", "40P01", "40001"):
        return Unavailable(f"the ledger {where} is locked or too slow: {cause}; nothing was changed. Try again.")
    if state in ("XX001", "XX002"):
        return CorruptData(f"the ledger {where} cannot be read: {cause}. It was left as it is: restore a backup.")
    if state == "3D000" or (not state and "does not exist" in cause and "database" in cause):
        return Unavailable(f"the ledger {where}: {cause}. Make the database (createdb), or name another with --ledger.")
    if state.startswith("28") or (not state and ("authentication" in cause or "password" in cause)):
        return Unavailable(
            f"the ledger {where} lets nobody in: {cause}. Check user and password; ~/.pgpass is where it looks for the latter."
        )
    if state == "42501":
        return Unavailable(f"the ledger {where} refuses: {cause}. Give the user the right to make and write tables there.")
    if state.startswith("22") or state == "54000":
        return SpecError(f"the ledger {where} cannot hold a value: {cause}. Nothing was changed.")
    if error.connection_invalidated or not state or state[:2] in ("08", "57", "53", "25"):
        return Unavailable(f"the ledger {where} does not answer: {cause}. Look whether its server runs and can be reached.")
    return InternalError(f"the ledger {where} refused a query: {cause}")
