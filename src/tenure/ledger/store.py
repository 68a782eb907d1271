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

from tenure.errors import InternalError, Refused, TenureError
from tenure.events import Event
from tenure.leases import Lease
from tenure.ledger import dialect, migrate, queries
from tenure.ledger.address import Address
from tenure.nodes import Node
from tenure.protocols import Exit
from tenure.runs import Run, RunState, Stage


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

    def __init__(self, engine: Engine, address: Address, now_s: Callable[[], float], unlock: Callable[[], None]) -> None:
        self._engine, self._unlock = engine, unlock
        self.address, self._where = address, str(address)
        self.now_s = now_s
        """What stamps events; the broker puts a clock here that does not jump."""
        self._busy = False
        self._driver: Any = None
        self.on_hang_up: Callable[[str], None] = lambda why: None
        """Called when the database has hung up, before whoever used the connection hears of it: the ledger is held no more."""
        self._connection: Connection | None = None
        self._parts = 0
        self.commits = 0
        """How many batches were written to disk."""
        self.on_lost: Callable[[TenureError], None] = lambda error: None
        """Called when parts that had been left without an error were undone after all, with why."""
        self.refusals, self.refusal = 0, ""
        """How many transactions were refused for want of room or rights, and why the latest was."""
        dialect.listen_for_hang_up(
            engine, lambda cause: self.on_hang_up(f"the connection to the ledger {address} was lost: {cause}")
        )

    @classmethod
    def open(cls, at: Path | Address, *, now_s: Callable[[], float], who: str = "") -> Ledger:
        """Open or make the ledger, hold it alone until `close`, and bring its tables up to date.

        at: a SQLite file, or an address. who: how the holder is named to others, e.g. its home.
        Raises LedgerHeld when another process has it, CorruptData when it is damaged, Conflict when a newer Tenure wrote it,
        Unavailable when it is locked or cannot be opened, MissingExtra. In each case the ledger stays as it was.
        """
        address = at if isinstance(at, Address) else Address(path=at)
        if address.path is not None:
            address.path.parent.mkdir(parents=True, exist_ok=True)
        unlock = dialect.hold(address, who=who)
        try:
            ledger = cls(dialect.open_engine(address, who=who), address, now_s, unlock)
        except BaseException:
            unlock()
            raise
        try:
            with ledger.reading() as connection:
                ledger._driver = dialect.driver_of(connection)
                dialect.check_whole(connection)
            ledger._migrate()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def watch(self) -> None:
        """Call `on_hang_up` when the database hung up while nobody asked it anything. Costs a system call."""
        if not dialect.is_connected(self._driver):
            self.on_hang_up(f"the server of the ledger {self._where} has hung up")

    def close(self) -> None:
        """Let go of the ledger. What was not committed is undone."""
        self._let_go()
        self._engine.dispose()
        self._unlock()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Give a transaction: on disk on leaving, or nothing of it when anything raised. They do not nest."""
        with self.part() as tx:
            yield tx
        self.commit()

    @contextlib.contextmanager
    def part(self) -> Iterator[Transaction]:
        """Give a transaction that is on disk after the next `commit`, together with the parts before it (group commit).

        A body that raises undoes its own part only. A complaint of the database undoes them all: then `on_lost` is called.
        """
        with self._explained():
            connection = self._batch()
            savepoint = connection.begin_nested()
            try:
                yield Transaction(connection, self.now_s())
                savepoint.commit()
                self._parts += 1
            except DBAPIError:
                raise
            except BaseException:
                savepoint.rollback()
                if not self._parts:
                    self._let_go()  # an empty batch must not keep the database locked
                raise

    @property
    def uncommitted(self) -> int:
        """How many parts the next `commit` will write."""
        return self._parts

    def commit(self) -> None:
        """Write what has gathered; nothing happens when nothing has. What the database refuses is undone, all of it."""
        if self._connection is None:
            return
        with self._explained():
            self._connection.commit()
            self.commits += 1
            self._parts = 0
            self._let_go()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection for the reading functions of `queries`; it sees uncommitted parts too."""
        with self._explained():
            try:
                yield self._batch()
            finally:
                if not self._parts:
                    self._let_go()

    def _batch(self) -> Connection:
        """Return the connection of the open batch, begun now if there is none."""
        if self._connection is None:
            self._connection = self._engine.connect()
            self._connection.begin()
        return self._connection

    def _let_go(self) -> None:
        """Let go of the connection, and of what it has not committed."""
        connection, self._connection, self._parts = self._connection, None, 0
        if connection is not None:
            with contextlib.suppress(DBAPIError):
                connection.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        if self._busy:
            raise InternalError("a ledger transaction was begun inside another")
        self._busy = True
        lost: TenureError | None = None
        try:
            yield
        except DBAPIError as error:
            explained = dialect.explained(error, self._where)
            if isinstance(explained, Refused):
                self.refusals += 1
                self.refusal = str(explained)
            if self._parts:
                lost = explained
            self._let_go()
            raise explained from error
        finally:
            self._busy = False
            if lost is not None:
                self.on_lost(lost)

    def _migrate(self) -> None:
        with self._explained():
            connection = self._batch()
            migrate.bring_forward(connection, f"the ledger {self._where}")
            connection.commit()
            self._let_go()


__all__ = ["Ledger", "Transaction"]
