"""Which ledger a home has: choosing it, backing it up, restoring it. While no broker of the home lives, or through it.

Not here: the format of a backup (`ledger.portable`), how a database is opened (`ledger.dialect`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, func, inspect, select
from sqlalchemy.exc import DBAPIError

from tenure.broker.client import connect
from tenure.broker.daemon import HomeHeld, home_lock
from tenure.broker.fences import highest_seen
from tenure.errors import Conflict, TenureError, Unavailable
from tenure.events import Event
from tenure.ledger import address, dialect, migrate, portable, queries, schema
from tenure.ledger.address import Address
from tenure.ledger.store import Ledger
from tenure.protocols import SystemClock
from tenure.wire import Backup

HISTORY = (schema.runs, schema.leases, schema.trials, schema.recommendations)
"""A ledger without a row in these was never used."""
FENCE_JUMP = 1 << 20
"""How far above every fence that is known here a restored ledger goes on: a training store or an agent elsewhere may have seen
newer ones. More grants than this between two backups would take years; the numbers last for billions of restores."""


def choose(home: Path, url: str) -> None:
    """Have the home's ledger lie in a PostgreSQL database from now on; nothing happens when it does already.

    It is opened first, and knows then what fences the home's agents have seen. Raises SpecError for another kind of URL,
    Conflict when a broker lives or the present ledger holds anything, and what opening either raises: nothing has changed then.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    wanted = Address.parse(url)
    if wanted == address.of_home(home):
        return
    try:
        with home_lock(home):
            present = address.of_home(home)
            if holds_anything(present, home):
                raise Conflict(
                    f"the ledger {present} of home {home} already holds runs or leases; it was not changed for {wanted}. "
                    f'To move it: "tenure backup FILE", then "tenure restore FILE --ledger URL".'
                )
            made = Ledger.open(wanted, now_s=SystemClock().utc_s, who=f"for {home}")
            try:
                with made.transaction() as tx:
                    queries.raise_fence(tx.connection, highest_seen(home))
            finally:
                made.close()
            address.remember(home, wanted)
    except HomeHeld as error:
        raise Conflict(
            f"a broker of home {home} lives, with the ledger {address.of_home(home)}; it was not changed for {wanted}. "
            'End it with "tenure down" first.'
        ) from error


def backup(home: Path, file: Path, *, force: bool = False) -> Backup:
    """Write what the home's ledger holds to a file that `restore` reads: by its broker when one answers, else here.

    file: absolute. force: replace a file that is there. Raises as `portable.write_backup`; Conflict when a broker lives that
    does not answer.
    """
    home = home.resolve()
    try:
        client = connect(home, start=False, who="cli:backup")
    except Unavailable:
        return _backup_alone(home, file, force=force)
    with client:
        return client.backup(str(file), force=force)


def _backup_alone(home: Path, file: Path, *, force: bool) -> Backup:
    at = address.of_home(home)
    with _alone(home, at):
        return portable.write_backup(at, file, now_s=SystemClock().utc_s(), force=force)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A ledger that was restored."""

    backup: Backup
    ledger: str
    """Where it lies now."""
    aside: str
    """Where the ledger lies that was there before; empty when there was none, or none that was ever used."""
    fence: int
    """Every fence handed out before is below this one."""


def restore(home: Path, file: Path, *, to: str = "", force: bool = False) -> Restored:
    """Have the home's ledger hold what a backup holds, brought up to date, and nothing else.

    The backup is verified before anything is touched. to: URL of the PostgreSQL database that is the home's ledger from now
    on, or `address.FILE` for a file of the home; by default where it lies now. force: move a ledger that was ever used aside.
    Fences go on far above every one that the home, its agents or its runs remember (`FENCE_JUMP`), so that agents obey the
    next broker. Raises CorruptData, NotFound, Conflict (a living broker, a used ledger, a newer backup), SpecError, Refused.
    """
    home = home.resolve()
    held = portable.verify(file)
    at = _address(home, to)
    with _alone(home, at):
        fence = highest_seen(home) + FENCE_JUMP
        if at.path is not None:
            aside, fence = _restore_file(at.path, file, held, fence, force=force)
        else:
            aside, fence = _restore_database(at, file, held, fence, home, force=force)
        address.remember(home, at)
    return Restored(backup=held, ledger=str(at), aside=aside, fence=fence)


def _address(home: Path, to: str) -> Address:
    if not to:
        return address.of_home(home)
    return Address(path=home / address.FILE) if to == address.FILE else Address.parse(to)


@contextlib.contextmanager
def _alone(home: Path, at: Address) -> Iterator[None]:
    """Keep every broker out: of the home, and of the ledger when that is a file."""
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(home_lock(home))
            held.callback(dialect.hold(at, who=f"for {home}"))
            yield
    except HomeHeld as error:
        raise Conflict(f'{error}. It does not answer, or must not live meanwhile: end it with "tenure down".') from error


def holds_anything(at: Address, home: Path) -> bool:
    """Return whether a ledger was ever used. It must be nobody's; one that does not exist is not made."""
    if at.path is not None and not at.path.exists():
        return False
    ledger = Ledger.open(at, now_s=SystemClock().utc_s, who=f"for {home}")
    try:
        with ledger.reading() as connection:
            return _is_used(connection)
    finally:
        ledger.close()


def _is_used(connection: Connection) -> bool:
    tables = set(inspect(connection).get_table_names())
    return any(
        connection.execute(select(func.count()).select_from(table)).scalar_one() for table in HISTORY if table.name in tables
    )


def _check_unused(used: bool, at: Address, force: bool) -> None:
    if used and not force:
        raise Conflict(f"the ledger {at} already holds runs or leases; it was left as it is. --force moves it aside.")


def _restore_file(path: Path, file: Path, held: Backup, fence: int, *, force: bool) -> tuple[str, int]:
    """Build the ledger under another name; it takes the place of the old one, which has got a second name before, at once."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    at, draft, used = Address(path=path), path.with_name(f"{path.name}.restoring"), False
    if path.exists():
        try:
            used, before = _look(at)
            fence = max(fence, before + FENCE_JUMP)
        except TenureError:
            if not force:
                raise
            used = True  # nobody can tell
        _check_unused(used, at, force)
    for name in _files(draft):
        name.unlink(missing_ok=True)
    fence = _build(Address(path=draft), file, held, fence)
    aside = path.with_name(f"{path.name}.before-{_stamp()}")
    if path.exists():
        for old, kept in zip(_files(path), _files(aside), strict=True):
            if old.exists():
                os.link(old, kept)
        for journal in _files(path)[1:]:
            journal.unlink(missing_ok=True)
    os.replace(draft, path)
    portable.sync_folder(path.parent)
    return (str(aside) if aside.exists() else ""), fence


def _restore_database(at: Address, file: Path, held: Backup, fence: int, home: Path, *, force: bool) -> tuple[str, int]:
    """Do all of it in one transaction; the old tables go to a schema of their own."""
    engine = dialect.open_engine(at, who=f"for {home}")
    try:
        with engine.begin() as connection:
            ours = {*schema.metadata.tables, "alembic_version"}
            tables = [name for name in inspect(connection).get_table_names() if name in ours]
            _check_unused(_is_used(connection), at, force)
            aside = f"tenure_before_{_stamp()}" if tables else ""
            if aside:
                fence = max(fence, queries.last_fence(connection) + FENCE_JUMP)
                dialect.set_aside(connection, tables, aside)
            fence = _fill(connection, at, file, held, fence)
        return (f"schema {aside}" if aside else ""), fence
    except DBAPIError as error:
        raise dialect.explained(error, str(at)) from error
    finally:
        engine.dispose()


def _look(at: Address) -> tuple[bool, int]:
    """Return whether a ledger file was ever used, and its last fence. Raises what is wrong with it."""
    engine = dialect.open_engine(at)
    try:
        with engine.begin() as connection:
            dialect.check_whole(connection)
            has_meta = inspect(connection).has_table("meta")
            return _is_used(connection), queries.last_fence(connection) if has_meta else 0
    except DBAPIError as error:
        raise dialect.explained(error, str(at)) from error
    finally:
        engine.dispose()


def _build(at: Address, file: Path, held: Backup, fence: int) -> int:
    engine = dialect.open_engine(at)
    try:
        with engine.begin() as connection:
            return _fill(connection, at, file, held, fence)
    except DBAPIError as error:
        raise dialect.explained(error, str(at)) from error
    finally:
        engine.dispose()


def _fill(connection: Connection, at: Address, file: Path, held: Backup, fence: int) -> int:
    """Make the tables and load them; return the fence above which they go on: the backup's own may be higher still."""
    what, now_s = f"the ledger {at}", SystemClock().utc_s()
    migrate.bring_forward(connection, what, to=held.schema)
    portable.load(file, connection)
    migrate.bring_forward(connection, what)
    queries.raise_fence(connection, max(fence, queries.last_fence(connection) + FENCE_JUMP))
    made = datetime.fromtimestamp(held.made_at_s, UTC).isoformat(timespec="seconds")
    why = f"holds what it held at {made}"
    queries.insert_event(connection, Event(seq=0, at_s=now_s, kind="ledger.restored", who="cli:restore", why=why))
    return queries.last_fence(connection)


def _files(path: Path) -> tuple[Path, Path, Path]:
    """Return the files of a SQLite ledger: itself, then what SQLite keeps beside it while it is open, or was not closed."""
    return path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
