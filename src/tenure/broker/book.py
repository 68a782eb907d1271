"""The broker's present state: live leases and placement, changed only by what the ledger has taken down first.

Group commit: changes gather in a batch that goes to disk together, soon, and before anything that rests on them leaves the
broker (`durable`; `outbox` holds both doors). Should the disk refuse the batch, the state is read anew: none of it happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from tenure import wire
from tenure.decide.placement import Placement
from tenure.decide.queueing import FIFO, order_named
from tenure.errors import TenureError
from tenure.events import Event
from tenure.leases import Lease, LeaseState
from tenure.ledger import queries
from tenure.ledger.queries import Invocation
from tenure.ledger.store import Ledger, Transaction
from tenure.nodes import Node
from tenure.protocols import Clock
from tenure.usage import Usage

LOG = logging.getLogger("tenure.broker")
USAGE_EVERY_S = 2.0
"""Between two rollups of a lease; doubles with every USAGE_PER_STEP of them, so that a long lease stays small."""
USAGE_PER_STEP = 900

ROOM_AGAIN_S = 2.0
QUIET_S = 0.001
MAX_GATHER_S = 0.05
"""While several calls are being answered, a batch goes to disk when nothing has joined for QUIET_S, or after MAX_GATHER_S."""


class Book:
    """What every part of the broker reads. `transaction` is the only way to change it."""

    def __init__(self, ledger: Ledger, clock: Clock, *, order: str = FIFO.name) -> None:
        """order: by which order of the queue to grant. Raises SpecError for one that does not exist."""
        self.ledger, self.clock = ledger, clock
        self.placement = Placement(order=order_named(order))
        self.live: dict[str, Lease] = {}
        self.queue_until_s: dict[str, float] = {}
        self.busy: set[str] = set()
        """Leases with an attempt that has been ordered and has not been seen to end."""
        self.invocations: list[tuple[str, str, Invocation]] = []
        """(run id, stage, invocation) of those that ended since `invocations` last looked."""
        self.unwritable_since_s = float("inf")
        """CLOCK_BOOTTIME since when the ledger refuses writes (a full disk); infinite while it takes them."""
        self._refusals, self._refused_s = 0, 0.0
        self.usage: dict[str, Usage] = {}
        self.ended: Counter[tuple[str, str]] = Counter()
        """(tenant, end reason) -> leases that ended since this broker started; of a batch that was lost, too."""
        self._points: list[wire.UsagePoint] = []
        self._rollups: dict[str, tuple[int, float]] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.before_commit: Callable[[], None] = lambda: None
        """Called before a batch goes to disk: the last to add to it."""
        self.reloads = 0
        """How often a batch was lost and the state read anew: whoever keeps more than `Book` does looks at it."""
        self._batch: asyncio.Future[None] | None = None
        self.calls = 0
        """How many calls of clients are being answered."""
        ledger.on_lost = self._lost
        self._load()

    def _load(self) -> None:
        with self.ledger.reading() as connection:
            exited = queries.live_exits(connection)
            points = queries.live_usage_counts(connection)
            for lease, until in queries.live_leases(connection):
                self.live[lease.id] = lease
                self.queue_until_s[lease.id] = until
                if lease.attempt and (lease.id, lease.attempt) not in exited:
                    self.busy.add(lease.id)
                self._rollups[lease.id] = (points.get(lease.id, 0), 0.0)
        self._fold_live()

    def _fold_live(self) -> None:
        for lease in self.live.values():
            self.placement.apply(Event(seq=0, at_s=0.0, kind=f"lease.{lease.state}", who="broker", data={"lease": lease}))

    @property
    def order(self) -> str:
        """By which order of the queue leases are granted."""
        return self.placement.order.name

    def queue_by(self, order: str) -> None:
        """Grant by another order of the queue from now on. Raises SpecError for one that does not exist."""
        nodes, self.placement = self.placement.nodes(), Placement(order=order_named(order))
        self._fold_live()
        self._fold_nodes(nodes.values())
        self.wake()

    def _fold_nodes(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            for kind in ("node.up", f"node.{node.state}"):
                self.placement.apply(Event(seq=0, at_s=0.0, kind=kind, who="broker", node=node.name, data={"node": node}))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Give a ledger transaction; then take its events in and wake whoever waits. It is on disk once `durable` returns."""
        with self.ledger.part() as tx:
            yield tx
        for event in tx.events:
            self.placement.apply(event)
            if "lease" in event.data:
                self._take(event.data["lease"])
        self._gather()
        self.wake()

    # --- group commit ---

    def _gather(self) -> None:
        """Have what was written go to disk soon, with what others are about to write."""
        if self._batch is None:
            loop = asyncio.get_running_loop()
            self._batch = loop.create_future()
            if self.calls > 1:
                loop.call_later(QUIET_S, self._commit_when_quiet, self._batch, 1, loop.time() + MAX_GATHER_S)
            else:
                loop.call_soon(self._commit, self._batch)

    def _commit_when_quiet(self, batch: asyncio.Future[None], parts: int, end_s: float) -> None:
        loop = asyncio.get_running_loop()
        if batch is self._batch and self.ledger.uncommitted > parts and loop.time() < end_s:
            loop.call_later(QUIET_S, self._commit_when_quiet, batch, self.ledger.uncommitted, end_s)
        else:
            self._commit(batch)

    def _commit(self, batch: asyncio.Future[None] | None) -> None:
        for step in (self.before_commit, self.ledger.commit):
            if batch is None or batch is not self._batch:
                return  # it was lost
            try:
                step()
            except TenureError as error:
                LOG.error("%s: %s", type(error).__name__, error)
        if batch is not None and batch is self._batch:
            self._batch = None
            batch.set_result(None)

    async def durable(self) -> None:
        """Return once all that was written so far is on disk. Raises what kept it from being so: then none of it happened."""
        if self._batch is not None:
            await asyncio.shield(self._batch)

    def _lost(self, error: TenureError) -> None:
        """The disk refused a batch: go back to what it holds."""
        batch, self._batch = self._batch, None
        nodes = self.placement.nodes()
        self.placement = Placement(order=self.placement.order)
        for kept in (self.live, self.queue_until_s, self.busy, self._rollups, self.invocations):
            kept.clear()
        self._load()
        self._fold_nodes(nodes.values())
        self.reloads += 1
        if batch is not None:
            batch.set_exception(error)
            batch.exception()  # perhaps nobody waits for it
        self.wake()

    def _take(self, lease: Lease) -> None:
        if lease.state is LeaseState.ENDED:
            if lease.id in self.live:
                self.ended[lease.tenant, str(lease.end_reason)] += 1
            for kept in (self.live, self.queue_until_s, self.usage, self._rollups):
                kept.pop(lease.id, None)
            self.busy.discard(lease.id)
        else:
            self.live[lease.id] = lease

    def lease(self, lease_id: str) -> Lease:
        """Return a lease, live or ended. Raises NotFound."""
        if lease_id in self.live:
            return self.live[lease_id]
        with self.ledger.reading() as connection:
            return queries.get_lease(connection, lease_id)

    def view(self, lease_id: str) -> wire.LeaseView:
        """Return a lease with its exits and last known usage. Raises NotFound."""
        lease = self.lease(lease_id)
        with self.ledger.reading() as connection:
            exits = queries.lease_exits(connection, lease_id)
        usage = self.usage.get(lease_id) or (exits[-1].usage if exits else None)
        return wire.LeaseView(lease=lease, usage=usage, exits=exits)

    def note_usage(self, lease_id: str, usage: Usage) -> None:
        """Keep a lease's latest usage, and roll it up now and then."""
        self.usage[lease_id] = usage
        count, last_s = self._rollups.get(lease_id, (0, 0.0))
        now_s = self.clock.boot_s()
        if not last_s or now_s - last_s >= USAGE_EVERY_S * 2 ** (count // USAGE_PER_STEP):
            self._rollups[lease_id] = (count + 1, now_s)
            self._points.append(wire.UsagePoint(lease_id=lease_id, at_s=usage.at_s, usage=usage))

    def flush_usage(self) -> None:
        """Write the rollups gathered since the last call."""
        points, self._points = self._points, []
        if points:
            with self.transaction() as tx:
                queries.insert_usage(tx.connection, points)

    def watch_ledger(self) -> None:
        """Note since when the ledger refuses writes. What could not be written is tried again all the time, so that a while
        without a refusal means that there is room again; a single write that works does not, for a small one may fit."""
        now_s = self.clock.boot_s()
        if self.ledger.refusals > self._refusals:
            self._refusals, self._refused_s = self.ledger.refusals, now_s
            self.unwritable_since_s = min(self.unwritable_since_s, now_s)
        elif now_s - self._refused_s > ROOM_AGAIN_S:
            self.unwritable_since_s = float("inf")

    def wake(self) -> None:
        """Have everyone who waits for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout_s: float) -> None:
        """Return after the next change, or after the time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside; its TenureErrors are logged, since what it left undone is seen by the next look."""

        async def guarded() -> None:
            try:
                await work
            except TenureError as error:
                LOG.warning("%s: %s", type(error).__name__, error)
            except Exception:
                LOG.exception("the broker made a mistake")

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # of one that was cancelled before it began

    async def settle(self, timeout_s: float = 10.0) -> None:
        """Wait until everything spawned has finished, and what was written is on disk."""
        while self._tasks or self._batch:
            with contextlib.suppress(TenureError):
                await self.durable()
            if self._tasks:
                _, pending = await asyncio.wait(set(self._tasks), timeout=timeout_s)
                if pending:
                    return

    async def close(self) -> None:
        """Cancel what still runs beside, and write what was gathered."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TenureError):
            self.flush_usage()
        self._commit(self._batch)
