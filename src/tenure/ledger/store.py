"""Opening the ledger, and changing it: every change of state goes down in one transaction with the event that tells it.

Not here: the queries themselves (`queries`), what differs between databases (`dialect`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from tenure.errors import Conflict, CorruptData, InternalError, Refused
from tenure.events import Event
from tenure.leases import Lease
from tenure.ledger import dialect, queries
from tenure.nodes import Node
from tenure.protocols import Exit
from tenure.runs import Run, RunState, Stage

MIGRATIONS = Path(__file__).parent / "migrations"


class Transaction:
    """Changes that become true together. Made by `Ledger.transaction`; `events` holds what will have happened, with nouns."""

    def __init__(self, connection: Connection, now_s: float) -> None:
        self.connection = connection
        """For the functions of `queries`."""
        self.now_s = now_s
        self.events: list[Event] = []

    def append(
        self,
        kind: str,
        *,
        who: str,
        why: str = "",
        run_id: str = "",
        stage: str = "",
        lease_id: str = "",
        node: str = "",
        data: Mapping[str, Any] | None = None,
    ) -> Event:
        """Append an event and return it with its place in the ledger."""
        event = Event(
            seq=0, at_s=self.now_s, kind=kind, who=who, why=why, run_id=run_id, stage=stage, lease_id=lease_id, node=node,
            data=data or {},
        )  # fmt: skip
        event = queries.insert_event(self.connection, event)
        self.events.append(event)
        return event

    def put_lease(
        self,
        lease: Lease,
        *,
        kind: str = "",
        who: str,
        why: str = "",
        queue_until_s: float = 0.0,
        data: Mapping[str, Any] | None = None,
    ) -> Event:
        """Write a lease and the event that tells it. kind: default ``lease.<state>``. queue_until_s: kept when 0."""
        queries.put_lease(self.connection, lease, queue_until_s=queue_until_s)
        return self.append(
            kind or f"lease.{lease.state}",
            who=who,
            why=why,
            run_id=lease.run_id,
            stage=lease.stage,
            lease_id=lease.id,
            node=lease.node,
            data={"lease": lease, **(data or {})},
        )

    def put_exit(self, lease: Lease, attempt: int, end: Exit, *, who: str, why: str = "") -> bool:
        """Write an attempt's exit once and return whether it was new."""
        if not queries.insert_exit(self.connection, lease.id, attempt, end):
            return False
        data = {"attempt": attempt, "kind": str(end.kind), "code": end.code, "signal": end.signal}
        self.put_lease(lease, kind="lease.exited", who=who, why=why, data=data)
        return True

    def put_run(self, run: Run, *, who: str, why: str = "") -> None:
        """Write a run with its stages."""
        queries.put_run(self.connection, run)
        self.append(f"run.{run.state}", who=who, why=why, run_id=run.id)

    def put_stage(self, run_id: str, stage: Stage, *, who: str) -> None:
        """Write one stage of a run. Raises NotFound when the run does not exist."""
        queries.put_stage(self.connection, run_id, stage)
        self.append(f"stage.{stage.state}", who=who, why=stage.detail, run_id=run_id, stage=stage.name)

    def put_run_state(self, run_id: str, state: RunState, *, who: str, why: str = "") -> None:
        """Write a run's state. Raises NotFound."""
        queries.set_run_state(self.connection, run_id, state)
        self.append(f"run.{state}", who=who, why=why, run_id=run_id)

    def put_node(self, node: Node, *, kind: str, who: str, why: str = "") -> None:
        """Write a node as it now is. kind: ``node.up``, ``node.unreachable`` or ``node.lost``."""
        queries.put_node(self.connection, node)
        self.append(kind, who=who, why=why, node=node.name, data={"node": node})

    def next_fence(self) -> int:
        """Return a number above every one returned before, in this life of the broker or an earlier one."""
        return queries.next_fence(self.connection)


class Ledger:
    """An open ledger. Raises TenureError of the kind that says what to do when the database complains."""

    def __init__(self, engine: Engine, where: str, now_s: Callable[[], float]) -> None:
        self._engine, self._where = engine, where
        self.now_s = now_s
        """What stamps events; the broker puts a clock here that does not jump."""
        self._busy = False
        self.refusals, self.refusal = 0, ""
        """How many transactions were refused for want of room or rights, and why the latest was."""

    @classmethod
    def open(cls, path: Path, *, now_s: Callable[[], float]) -> Ledger:
        """Open or make the ledger and bring its tables up to date.

        Raises CorruptData when the file is damaged, Conflict when a newer Tenure wrote it, Unavailable when it is locked
        or cannot be opened. In each case the file stays as it was.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = cls(dialect.open_engine(path), str(path), now_s)
        try:
            with ledger.reading() as connection:
                dialect.check_whole(connection)
            ledger._migrate()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Give a transaction: written on leaving, or not at all when anything raised. They do not nest."""
        with self._begin() as connection:
            yield Transaction(connection, self.now_s())

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection for the reading functions of `queries`."""
        with self._begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _begin(self) -> Iterator[Connection]:
        if self._busy:
            raise InternalError("a ledger transaction was begun inside another")
        self._busy = True
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            explained = dialect.explained(error, self._where)
            if isinstance(explained, Refused):
                self.refusals += 1
                self.refusal = str(explained)
            raise explained from error
        finally:
            self._busy = False

    def _migrate(self) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)
        with self._begin() as connection:
            present = MigrationContext.configure(connection).get_current_revision()
            if present == script.get_current_head():
                return
            if present is not None and present not in {step.revision for step in script.walk_revisions()}:
                raise Conflict(
                    f"the ledger {self._where} has schema {present}, which this Tenure does not know (it knows up to "
                    f"{script.get_current_head()}): a newer version wrote it. Use that version, or restore a backup."
                )
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise CorruptData(f"the ledger {self._where} could not be brought up to date: {error}") from error


__all__ = ["Ledger", "Transaction"]
