"""Retention: what is old goes by itself or by `tenure gc`: files of runs, rows of the ledger, logs. Trials stay unless asked.

Crash-safe by the order of steps. A folder leaves by one rename into ``trash/``; what lies there is gone, and is deleted in a
thread. A run that goes whole is renamed to ``trash/runs/<run>`` first, and whatever the ledger still lists of a run that lies
there goes before a broker answers anybody. Live leases are looked for again between the last await and the rename.

    runs/<run>/<stage>/store ──rename──► trash/files/<random> ──thread──► nothing
    runs/<run> ──rename──► trash/runs/<run> ──ledger's rows, then thread──► nothing
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenure.agent.start import is_agent_alive
from tenure.broker.book import LOG, Book
from tenure.errors import TenureError
from tenure.fleet.contract import Fleet
from tenure.ledger import retention as rows
from tenure.ledger.retention import KnownRun, Rows
from tenure.ledger.store import Transaction
from tenure.retention import CollectGarbage, Freed
from tenure.runtimes import procfs
from tenure.runtimes.acting import Actor, acting_as, owner_of

FIRST_S = 10.0
EVERY_S = 3600.0
LOGS_EVERY_S = 60.0
MAX_RUNS = 100
"""How many runs one pass by itself goes through, so that a broker's first pass after a long time stays short."""
MAX_ROWS = 500
"""In one transaction: others wait for it."""
MAX_ENTRIES = 2_000_000
"""Files looked at to tell a folder's size."""
MAX_LOG_BYTES = 8 << 20
ABANDONED_S = 30 * 86400.0
"""A run that was never written down as over counts as such when nothing of it has happened for so long."""
BULK = ("store", "workers", "logs")
"""Folders of a stage that go long before the run does; artefacts and the report stay with it."""


class Retention:
    """Cleans up after runs that are over."""

    def __init__(self, book: Book, fleet: Fleet, *, home: Path) -> None:
        self._book, self._fleet, self._home = book, fleet, home
        self._trash = home / "trash"
        self._one = asyncio.Lock()
        self._next_s = book.clock.boot_s() + FIRST_S
        self._next_logs_s = book.clock.boot_s() + LOGS_EVERY_S
        self._forgotten(self._unlist(book.ledger.transaction))

    def _unlist(self, transaction: Callable[[], AbstractContextManager[Transaction]]) -> list[str]:
        """Have the ledger no longer list runs whose removal was begun and not finished; return their ids."""
        begun = _names(self._trash / "runs")
        for run_id in begun:
            with transaction() as tx:
                if rows.run_rows(tx.connection, run_id).count and not rows.has_live_lease(tx.connection, run_id):
                    _forget(tx, run_id, "its removal was begun earlier")
        return begun

    def _forgotten(self, run_ids: Iterable[str]) -> None:
        """Let go of the files of runs that the ledger lists no more, on disk: until then they tell of the removal."""
        for run_id in run_ids:
            self._discard(self._trash / "runs" / run_id)

    def tick(self) -> None:
        """Begin what is due, beside."""
        now_s = self._book.clock.boot_s()
        if now_s >= self._next_logs_s:
            self._next_logs_s = now_s + LOGS_EVERY_S
            self._book.spawn(asyncio.to_thread(bound_logs, self._home))
        if now_s >= self._next_s and not self._one.locked():
            self._next_s = now_s + EVERY_S
            self._book.spawn(self._by_itself())

    async def _by_itself(self) -> None:
        freed = await self.collect(CollectGarbage(), max_runs=MAX_RUNS)
        for part in freed:
            if part.count:
                LOG.info("retention: %s: %d, %d bytes", part.kind, part.count, part.size_bytes)

    async def collect(self, asked: CollectGarbage, *, max_runs: int | None = None) -> tuple[Freed, ...]:
        """Remove what is older than asked, or with `dry_run` only say what would go. One at a time."""
        async with self._one:
            if not asked.dry_run and (begun := self._unlist(self._book.transaction)):
                await self._book.durable()
                self._forgotten(begun)
            now_s = self._book.clock.utc_s()
            with self._book.ledger.reading() as connection:
                runs = rows.known_runs(connection)
            past = [run for run in runs[asked.keep_runs :] if self._is_past(run, now_s)][::-1]
            whole = [run for run in past if now_s - run.last_s >= asked.forget_after_s][:max_runs]
            others = [run for run in past if asked.older_than_s <= now_s - run.last_s < asked.forget_after_s]
            going_on = [run.id for run in runs if not self._is_past(run, now_s)]
            freed = [
                await self._whole_runs(whole, asked.dry_run),
                await self._bulk(others, asked.dry_run, max_runs),
                await self._nodes(now_s - asked.older_than_s, asked.dry_run),
                *await self._rows(asked, now_s, going_on),
            ]
            if not asked.dry_run:
                await asyncio.to_thread(self._empty_trash)
            return tuple(freed)

    def _is_past(self, run: KnownRun, now_s: float) -> bool:
        return not run.live and (run.over or now_s - run.last_s >= ABANDONED_S)

    # --- files ---

    async def _whole_runs(self, runs: list[KnownRun], dry_run: bool) -> Freed:
        freed = Freed(kind="whole runs")
        for run in runs:
            folder = self._home / "runs" / run.id
            size = await asyncio.to_thread(_size, folder)
            with self._book.ledger.reading() as connection:
                held = rows.run_rows(connection, run.id)
            if not dry_run:
                if self._is_live(run.id):
                    continue
                self._remove_run(run.id, folder)
            freed = _more(freed, size + held.size_bytes, run.id)
        if runs and not dry_run:
            await self._book.durable()
            self._forgotten(freed.names)
        return freed

    def _remove_run(self, run_id: str, folder: Path) -> None:
        target = self._trash / "runs" / run_id
        target.parent.mkdir(parents=True, exist_ok=True)
        self._discard(target)  # of an earlier run of that name, which the ledger could not be rid of
        moved = False
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, target)
            moved = True
        try:
            with self._book.transaction() as tx:
                _forget(tx, run_id, "older than runs are kept")
        except TenureError:
            if moved:
                os.rename(target, folder)
            raise

    async def _bulk(self, runs: list[KnownRun], dry_run: bool, max_runs: int | None) -> Freed:
        freed = Freed(kind="stores, worker folders and logs of runs")
        for run in runs:
            if max_runs is not None and freed.count >= max_runs:
                break
            folders = await asyncio.to_thread(self._bulk_of, run.id)
            size = sum([await asyncio.to_thread(_size, folder) for folder in folders])
            if not folders or (not dry_run and self._is_live(run.id)):
                continue
            if not dry_run and (actor := owner_of(self._home / "runs" / run.id)):
                await asyncio.to_thread(_delete_as, actor, folders)  # where they are: its owner could have them lead elsewhere
            elif not dry_run:
                for folder in folders:
                    self._discard(folder)
            freed = _more(freed, size, run.id)
        return freed

    def _bulk_of(self, run_id: str) -> list[Path]:
        root = self._home / "runs" / run_id
        with acting_as(owner_of(root)):
            stages = [root / name for name in _names(root) if not (root / name).is_symlink()]
            return [stage / name for stage in stages for name in BULK if os.path.lexists(stage / name)]

    async def _nodes(self, before_s: float, dry_run: bool) -> Freed:
        """Remove the folders of nodes that are of this home no more, once nothing has been written there for long."""
        freed = Freed(kind="folders of nodes that are gone")
        known = {*self._fleet.names(), *(lease.node for lease in self._book.live.values())}
        for name in await asyncio.to_thread(_names, self._home / "nodes"):
            folder = self._home / "nodes" / name
            if name in known or await asyncio.to_thread(is_agent_alive, self._home, name):
                continue
            if await asyncio.to_thread(_changed_s, folder) > before_s:
                continue
            size = await asyncio.to_thread(_size, folder)
            if not dry_run and name not in self._fleet.names():
                self._discard(folder)
            freed = _more(freed, size, name)
        return freed

    def _is_live(self, run_id: str) -> bool:
        """Whether a lease of the run lives, or a command is at it."""
        return any(lease.run_id == run_id for lease in self._book.live.values()) or _is_locked(
            self._home / "runs" / run_id / "run.lock"
        )

    def _discard(self, path: Path) -> None:
        """Have a file or folder be gone, at once; the trash is emptied later."""
        files = self._trash / "files"
        files.mkdir(parents=True, exist_ok=True)
        files.chmod(0o711)  # what was a tenant's is deleted with that one's rights, by its name
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, files / secrets.token_hex(16))

    def _empty_trash(self) -> None:
        for name in _names(self._trash / "files"):
            path = self._trash / "files" / name
            if actor := owner_of(path):
                with acting_as(actor):
                    below = [path / each for each in _names(path)] if path.is_dir() and not path.is_symlink() else []
                _delete_as(actor, below)
            delete_tree(path) if actor is None else _remove_emptied(path)

    # --- rows ---

    async def _rows(self, asked: CollectGarbage, now_s: float, going_on: list[str]) -> list[Freed]:
        events = {"before_s": now_s - asked.events_older_than_s, "keep_runs": going_on}
        usage = {"before_s": now_s - asked.events_older_than_s}
        parts: list[tuple[str, Callable[..., Rows], Callable[..., Rows], dict[str, Any]]] = [
            ("events", rows.old_events, rows.delete_old_events, events),
            ("usage points", rows.old_usage, rows.delete_old_usage, usage),
        ]
        if asked.trials_older_than_s is not None:
            trials = {"before_s": now_s - asked.trials_older_than_s}
            parts.append(("trials", rows.old_trials, rows.delete_old_trials, trials))
        freed = []
        for kind, look, remove, which in parts:
            if asked.dry_run:
                with self._book.ledger.reading() as connection:
                    gone = look(connection, **which)
            else:
                gone = await self._delete(remove, which)
            freed.append(Freed(kind=kind, count=gone.count, size_bytes=gone.size_bytes))
        return freed

    async def _delete(self, remove: Callable[..., Rows], which: dict[str, Any]) -> Rows:
        total, more = Rows(), True
        while more:
            with self._book.transaction() as tx:
                gone = remove(tx.connection, **which, max_rows=MAX_ROWS)
            await self._book.durable()
            await asyncio.sleep(0)  # let others have their turn
            total, more = total + gone, gone.count == MAX_ROWS
        return total


def _forget(tx: Transaction, run_id: str, why: str) -> None:
    rows.forget_run(tx.connection, run_id)
    tx.append("run.removed", who="broker", why=why, run_id=run_id)


def _more(freed: Freed, size_bytes: int, name: str) -> Freed:
    return replace(freed, count=freed.count + 1, size_bytes=freed.size_bytes + size_bytes, names=(*freed.names, name))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    try:
        info = path.lstat()
    except OSError:
        return 0
    with acting_as(owner_of(path)):
        return procfs.disk_use(str(path), max_entries=MAX_ENTRIES) if stat.S_ISDIR(info.st_mode) else info.st_blocks * 512


def _delete_as(actor: Actor, paths: list[Path]) -> None:
    """Delete what is another user's with that user's rights: what it has open there it could move under our hands."""
    with acting_as(actor):
        for path in paths:
            delete_tree(path)


def _remove_emptied(path: Path) -> None:
    try:
        os.rmdir(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        LOG.warning("retention: %s could not be deleted yet: %s", path, error)


def _changed_s(folder: Path) -> float:
    """Return when something in a folder was last written or made, in UTC seconds."""
    return max([entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(folder)], default=folder.stat().st_mtime)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def delete_tree(path: Path) -> None:
    """Delete a file or folder, links as links, also where a job took the right to write away. What resists is logged."""

    def again(function: Callable[..., Any], name: str, error: Any) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(name), 0o700)
            if not os.path.islink(name):
                os.chmod(name, 0o700)
            function(name) if function in (os.unlink, os.rmdir) else shutil.rmtree(name, ignore_errors=True)

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=again)
    with contextlib.suppress(OSError):
        os.rmdir(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if os.path.lexists(path):
        LOG.warning("retention: %s could not be deleted yet", path)


def bound_logs(home: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Set the logs of broker, agents and shims aside as ``<log>.1`` once they are larger than this; one older is kept.

    Their writers append, so that a log cut to nothing goes on from its beginning. What is written while the last bytes are
    copied may be lost; nobody but people reads these.
    """
    nodes = home / "nodes"
    for path in (home / "broker.log", *(nodes / name / log for name in _names(nodes) for log in ("agent.log", "shims.log"))):
        with contextlib.suppress(OSError):
            if path.lstat().st_size > max_bytes:
                shutil.copyfile(path, path.with_name(f"{path.name}.1"))
                os.truncate(path, 0)
