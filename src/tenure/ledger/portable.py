"""A backup: one file that holds a ledger whatever database it lies in, so that it can be restored into either.

A gzip file of JSON lines, UTF-8 (docs/decisions/0009-one-portable-backup.md):

    {"tenure_backup": 1, "schema": "0002", "made_at_s": …, "tenure": "0.1.0", "rows": {"events": 3, …}}
    {"table": "events", "columns": ["seq", "at_s", …]}
    [1, 1700000000.0, …]                                    one line per row, in the order of the primary key
    …
    {"end": 3, "sha256": "…"}                               how many rows, and the sum over every byte before this line

Written and read in a stream: memory is bounded by one row. Not here: who may make or restore one, and when (`broker.ledgers`).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from tenure import __version__
from tenure.errors import Conflict, CorruptData, NotFound, Refused
from tenure.ledger import dialect, migrate
from tenure.ledger.address import Address
from tenure.wire import Backup

VERSION = 1
MAX_LINE_BYTES = 256 << 20
"""A longer line is taken for damage."""
ROWS_AT_ONCE = 500
_ALEMBIC = "alembic_version"


def write_backup(at: Address, file: Path, *, now_s: float, force: bool = False) -> Backup:
    """Write what a ledger holds now, while others go on writing, and return what was written.

    The file appears whole, synced, readable by its owner only, or not at all. force: replace one that is there.
    Raises Conflict when the file is there or a newer Tenure wrote the ledger, NotFound when there is no ledger or no folder,
    Refused when the disk is full, and what the database complains of.
    """
    if file.exists() and not force:
        raise Conflict(f"{file} exists; it was left as it is. Choose another name, or --force.")
    engine = dialect.reading_engine(at)
    try:
        with engine.begin() as connection, _published(file, force=force) as stream:
            return _write(connection, stream, file, what=f"the ledger {at}", now_s=now_s)
    except DBAPIError as error:
        raise dialect.explained(error, str(at)) from error
    finally:
        engine.dispose()


def _write(connection: Connection, stream: BinaryIO, file: Path, *, what: str, now_s: float) -> Backup:
    schema = migrate.revision_of(connection)
    if not schema:
        raise NotFound(f"{what} holds nothing yet: there is nothing to back up")
    migrate.check_known(schema, what)
    inspector = sa.inspect(connection)
    names = sorted(name for name in inspector.get_table_names() if name != _ALEMBIC)
    tables = {name: sa.table(name, *(sa.column(c["name"]) for c in inspector.get_columns(name))) for name in names}
    rows = {
        name: int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())
        for name, table in tables.items()
    }
    seen = hashlib.sha256()
    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0, compresslevel=6) as packed:

        def say(line: Any) -> None:
            data = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            seen.update(data)
            packed.write(data)

        say({"tenure_backup": VERSION, "schema": schema, "made_at_s": now_s, "tenure": __version__, "rows": rows})
        for name, table in tables.items():
            say({"table": name, "columns": [column.name for column in table.columns]})
            key = inspector.get_pk_constraint(name)["constrained_columns"]
            query = sa.select(table).order_by(*(table.c[column] for column in key))
            for row in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query):
                say(list(row))
        total, digest = sum(rows.values()), seen.hexdigest()
        say({"end": total, "sha256": digest})
    return Backup(path=str(file), schema=schema, made_at_s=now_s, rows=rows, sha256=digest)


@contextlib.contextmanager
def _published(file: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Give a stream whose content takes the file's name, synced, on leaving without an error."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError as error:
        raise NotFound(f"the folder {file.parent} does not exist; make it, or name another") from error
    except OSError as error:
        raise Refused(f"the backup {file} cannot be written: {error.strerror}. Nothing was left behind.") from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if force:
            os.replace(draft, file)
        else:
            os.link(draft, file)
        sync_folder(file.parent)
    except FileExistsError as error:
        raise Conflict(f"{file} exists; it was left as it is. Choose another name, or --force.") from error
    except OSError as error:
        raise Refused(f"the backup {file} cannot be written: {error.strerror}. Nothing was left behind.") from error
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a backup, with the table and columns it belongs to."""

    table: str
    columns: tuple[str, ...]
    values: tuple[Any, ...]


def verify(file: Path) -> Backup:
    """Read a backup to its end; return what it holds. Raises CorruptData, NotFound, Conflict for a newer format or schema."""
    head: dict[str, Any] = {}
    counted: dict[str, int] = {}
    for item in _items(file):
        if isinstance(item, Row):
            counted[item.table] = counted.get(item.table, 0) + 1
        else:
            head = item
    wanted = {name: count for name, count in head["rows"].items() if count}
    if counted != wanted:
        raise CorruptData(f"the backup {file} says it has rows {wanted}; found {counted}. Take another one.")
    migrate.check_known(head["schema"], f"the backup {file}")
    return Backup(path=str(file), schema=head["schema"], made_at_s=head["made_at_s"], rows=head["rows"], sha256=head["sha256"])


def load(file: Path, connection: Connection) -> None:
    """Insert every row of a backup into the empty tables of its own schema, and go on numbering above them."""
    inspector = sa.inspect(connection)
    known = {name: {c["name"] for c in inspector.get_columns(name)} for name in inspector.get_table_names()}
    rows = (item for item in _items(file) if isinstance(item, Row))
    for (name, columns), group in groupby(rows, key=lambda row: (row.table, row.columns)):
        if not set(columns) <= known.get(name, set()):
            raise CorruptData(f"the backup {file} has a table {name} ({', '.join(columns)}) that its schema does not have")
        table = sa.table(name, *(sa.column(column) for column in columns))
        while batch := [dict(zip(columns, row.values, strict=True)) for row in islice(group, ROWS_AT_ONCE)]:
            connection.execute(sa.insert(table), batch)
    for name in known:
        for column in inspector.get_columns(name):
            if isinstance(column["type"], sa.Integer) and inspector.get_pk_constraint(name)["constrained_columns"] == [
                column["name"]
            ]:
                dialect.go_on_numbering(connection, name, column["name"])


def _items(file: Path) -> Iterator[dict[str, Any] | Row]:
    """Give the header, every row, and the header again with ``sha256`` once the sum was found right."""
    seen, total = hashlib.sha256(), 0
    table = ""
    columns: tuple[str, ...] = ()
    head: dict[str, Any] = {}
    try:
        with gzip.open(file, "rb") as packed:
            while True:
                line = packed.readline(MAX_LINE_BYTES)
                if not line.endswith(b"\n"):
                    raise CorruptData(f"the backup {file} ends in the middle; take another one")
                item = json.loads(line)
                if isinstance(item, list):
                    total += 1
                    yield Row(table=table, columns=columns, values=tuple(item))
                elif not head:
                    head = _checked_header(item, file)
                    yield head
                elif "table" in item:
                    table, columns = str(item["table"]), tuple(map(str, item["columns"]))
                else:
                    if (item["end"], item["sha256"]) != (total, seen.hexdigest()):
                        raise CorruptData(f"the backup {file} does not have the sum it says; take another one")
                    yield head | {"sha256": item["sha256"]}
                    if packed.readline(1):
                        raise CorruptData(f"the backup {file} goes on after its end; take another one")
                    return
                seen.update(line)
    except FileNotFoundError as error:
        raise NotFound(f"the backup {file} does not exist") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{file} is no backup, or a damaged one: {error}. Take another one.") from error
    except OSError as error:
        raise Refused(f"the backup {file} cannot be read: {error.strerror}") from error


def _checked_header(item: dict[str, Any], file: Path) -> dict[str, Any]:
    if item["tenure_backup"] != VERSION:
        raise Conflict(f"the backup {file} has format {item['tenure_backup']}; this Tenure reads {VERSION}. Use a newer one.")
    return {"schema": str(item["schema"]), "made_at_s": float(item["made_at_s"]), "rows": dict(item["rows"])}
