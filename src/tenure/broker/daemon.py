"""The broker's life: one per home, its loop, and when it leaves. What it decides is in the other modules."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

from tenure import wire
from tenure.broker.attempts import Attempts
from tenure.broker.book import LOG, USAGE_EVERY_S, Book
from tenure.broker.expiry import Expiry
from tenure.broker.fences import check_not_older
from tenure.broker.giving_way import GivingWay
from tenure.broker.handlers import Handlers
from tenure.broker.idling import Idling
from tenure.broker.invocations import Invocations
from tenure.broker.metrics import Metrics
from tenure.broker.metrics_door import MetricsDoor
from tenure.broker.nodes import Nodes
from tenure.broker.outbox import Outbox
from tenure.broker.policies import Policies
from tenure.broker.queue import Queue
from tenure.broker.quota import Quotas
from tenure.broker.resuming import Resuming
from tenure.broker.retention import Retention
from tenure.broker.right_sizing import RightSizing
from tenure.broker.steady import SteadyClock
from tenure.broker.tenancy import Tenancy
from tenure.broker.workspaces import Workspaces
from tenure.decide.queueing import FIFO
from tenure.errors import Conflict, TenureError
from tenure.fleet.contract import Fleet
from tenure.homes import is_shared, socket_dir
from tenure.ledger import address, queries
from tenure.ledger.store import Ledger, Transaction
from tenure.protocols import Clock, SystemClock
from tenure.sockets import LineServer

P = ParamSpec("P")
Remember = Callable[[bool, str, int], None]
"""Takes down whether a broker is to stay, the order of its queue and the port of its metrics."""
TICK_S = 0.2
IDLE_S = 5.0
TERM_S = 60.0
PERSISTENT_TERM_S = 600.0
EXIT_LEDGER_LOST = 76
"""Exit code of a broker that lost its ledger's connection."""
AGENT_UP_MAX_S = 15.0
"""How long a broker that leaves waits for agents which it is starting."""


def _forget(_persistent: bool, _order: str, _metrics_port: int) -> None:
    """Take nothing down."""


class HomeHeld(Conflict):
    """Another broker holds this home."""


def _new_lease_id() -> str:
    return f"l-{secrets.token_hex(5)}"


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold the home's broker lock; the kernel lets go of it however the process ends. Raises HomeHeld when it is held."""
    home.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home / "broker.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise HomeHeld(f"home {home} already has a broker (pid {holder}); there is exactly one per home") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _logged(heard: Callable[P, None]) -> Callable[P, None]:
    """Return the function with its TenureErrors logged: what could not be written down now is found by the next look."""

    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            heard(*args, **kwargs)
        except TenureError as error:
            LOG.error("%s: %s", type(error).__name__, error)

    return guarded


class Broker:
    """All parts of one broker, put together. `tick` does what is due; tests call it with a clock of their own."""

    def __init__(
        self,
        ledger: Ledger,
        fleet: Fleet,
        *,
        home: Path,
        clock: Clock,
        persistent: bool = False,
        term_s: float = TERM_S,
        new_lease_id: Callable[[], str] = _new_lease_id,
        order: str = FIFO.name,
        remember: Remember = _forget,
        shared: bool = False,
    ) -> None:
        """shared: it serves all users of the machine, each as a tenant (`homes.share`)."""
        self.persistent, self._remember = persistent, remember
        self._clock = SteadyClock(clock)
        ledger.now_s = self._clock.utc_s
        self.book = Book(ledger, self._clock, order=order)
        with ledger.transaction() as tx:
            self._keep_time(tx)
            self.fence = tx.next_fence()
            tx.append("broker.started", who="broker", data={"fence": self.fence, "pid": os.getpid()})
        fleet = self.fleet = Outbox(self.book, fleet)
        self.tenancy = Tenancy(self.book, home=home, shared=shared)
        self.attempts = Attempts(
            self.book, fleet, home=home, tenancy=self.tenancy, resuming=Resuming(self.book, new_id=new_lease_id)
        )
        self.nodes = Nodes(
            self.book, fleet, fence=self.fence, term_s=term_s, on_up=self.attempts.compare, on_lost=self.attempts.lost
        )
        self.attempts.nodes = self.nodes
        self.policies = Policies(self.book)
        self.queue = Queue(self.book, self.attempts, self.policies, new_id=new_lease_id)
        self.giving_way = GivingWay(self.book, self.attempts, self.policies, quiet=shared)
        self.invocations = Invocations(self.book, self.attempts, self.tenancy, home=home)
        self.quotas = Quotas(self.book, self.attempts, self.tenancy, home=home)
        self.retention = Retention(self.book, fleet, home=home)
        self.workspaces = Workspaces(self.book)
        self.expiry = Expiry(self.book, self.tenancy, home=home)
        self.clients: Callable[[], int] = lambda: 0
        self.leaving = False
        self.metrics = Metrics(
            self.book,
            self.nodes,
            fence=self.fence,
            clients=lambda: self.clients(),
            proposed=lambda: self.right_sizing.proposed(),
        )
        self.metrics_door = MetricsDoor(self.metrics.text, may_read=self.tenancy.may_read_metrics)
        self.handlers = Handlers(
            self.book,
            fleet=fleet,
            nodes=self.nodes,
            queue=self.queue,
            attempts=self.attempts,
            invocations=self.invocations,
            retention=self.retention,
            quotas=self.quotas,
            policies=self.policies,
            giving_way=self.giving_way,
            tenancy=self.tenancy,
            fence=self.fence,
            persistent=lambda: self.persistent,
            clients=lambda: self.clients(),
            on_stay=self.stay,
            metrics_door=self.metrics_door,
            on_nodes=self._note,
            on_shutdown=self.leave,
        )
        self.idling = Idling(self.book, self.attempts, self.policies, self.tenancy, home=home, resize=self.handlers.resize)
        self.right_sizing = RightSizing(self.book, resize=self.handlers.resize)
        self._flushed_s = self._busy_s = clock.boot_s()
        fleet.listen(_logged(self.attempts.heard), _logged(self.nodes.cut))

    def _keep_time(self, tx: Transaction) -> None:
        """Go on with the UTC that live leases were granted by; without any, with the wall clock's."""
        boot_id = self._clock.boot_id()
        kept = queries.utc_offset(tx.connection, boot_id)
        if kept is not None and self.book.live:
            self._clock.offset_s = kept
        else:
            self._clock.follow()
            queries.put_utc_offset(tx.connection, boot_id, self._clock.offset_s)

    def _note(self) -> None:
        self._remember(self.persistent, self.book.order, self.metrics_door.port)

    async def stay(self) -> None:
        """Go on when nobody is left, until a shutdown, and have the nodes act for longer without word from here."""
        if not self.persistent:
            self.persistent = True
            self._note()
            await self.nodes.lengthen(PERSISTENT_TERM_S)

    def begin(self) -> None:
        """Count from now how long nobody has been here: nobody could come while the nodes were being reached."""
        self._busy_s = self.book.clock.boot_s()

    def leave(self) -> None:
        """Have the loop end."""
        self.leaving = True
        self.book.wake()

    def tick(self) -> None:
        """Do what is due. Whatever one part refuses is logged and tried again by the next tick."""
        now_s = self.book.clock.boot_s()
        for part in (
            self.book.watch_ledger,
            self.nodes.tick,
            self.attempts.tick,
            self.queue.tick,
            self.giving_way.tick,
            self.invocations.tick,
            self.quotas.tick,
            self.workspaces.tick,
            self.expiry.tick,
            self.idling.tick,
            self.right_sizing.tick,
            self.retention.tick,
        ):
            try:
                part()
            except TenureError as error:
                LOG.error("%s: %s", type(error).__name__, error)
        if now_s - self._flushed_s >= USAGE_EVERY_S:
            self._flushed_s = now_s
            with contextlib.suppress(TenureError):  # rollups are the one thing that may be lost: a full disk says so above
                self.book.flush_usage()
        if not self.book.live and self._clock.jumped():
            with contextlib.suppress(TenureError), self.book.transaction() as tx:
                self._keep_time(tx)
        if self.book.live or self.clients() or self.persistent:
            self._busy_s = now_s
        elif now_s - self._busy_s >= IDLE_S:
            LOG.info("nobody is left: leaving")
            self.leave()

    async def stop_agents(self) -> None:
        """Tell each agent without leases to leave; one that holds some stays until its term is over."""
        await self.nodes.settled(AGENT_UP_MAX_S)  # one that is just being started would hear of it from nobody
        held = {lease.node for lease in self.book.live.values() if lease.holds}
        for name in self.fleet.names():
            if name not in held and self.nodes.is_up(name):
                with contextlib.suppress(TenureError):
                    await self.fleet.call(name, "shutdown", wire.Nothing(), timeout_s=5.0)

    async def close(self) -> None:
        """Let go of everything; leases and agents stay as they are."""
        await self.metrics_door.close()
        await self.book.close()
        await self.fleet.close()


def _die(why: str) -> None:
    """End this process at once, as if killed: with the ledger's connection its lock is gone, and another broker may have it.

    Nobody gets an answer that came without the lock. Clients whose connection is cut start a broker anew.
    """
    LOG.error("%s; with it went the lock that made this the one broker: leaving", why)
    os._exit(EXIT_LEDGER_LOST)


async def serve(
    home: Path,
    fleet: Fleet,
    *,
    persistent: bool,
    clock: Clock | None = None,
    order: str = FIFO.name,
    metrics_port: int = 0,
    remember: Remember = _forget,
) -> int:
    """Be the home's broker until nobody is left, a shutdown is asked for, or a SIGTERM comes. The lock must be held.

    order: by which order of the queue to grant. metrics_port: where metrics are read, 0: nowhere. remember: called with whether
    it is to stay, that order and that port when one of them or its nodes change. Returns how many leases are left behind: after
    a SIGTERM they go on under their agents until a term is over.
    """
    clock = clock or SystemClock()
    ledger = Ledger.open(address.of_home(home), now_s=clock.utc_s, who=f"for {home}")
    ledger.on_hang_up = _die
    try:
        check_not_older(ledger, home)
        term_s = PERSISTENT_TERM_S if persistent else TERM_S
        broker = Broker(
            ledger,
            fleet,
            home=home,
            clock=clock,
            persistent=persistent,
            term_s=term_s,
            order=order,
            remember=remember,
            shared=is_shared(home),
        )
        return await answer(broker, home, metrics_port=metrics_port)
    finally:
        ledger.close()


async def answer(broker: Broker, home: Path, *, metrics_port: int = 0) -> int:
    """Answer the home's clients until the broker is to leave; return how many leases are left behind."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, broker.leave)
    # Requests queue when a node can't be reached, and the loop goes on trying: a broker that only answers is better than none.
    await broker.nodes.reach_all()
    path = socket_dir(home) / "broker.sock"
    server = LineServer(
        path,
        wire.BROKER_OPS,
        broker.handlers.table(),
        who="broker",
        fence=lambda: broker.fence,
        mode=0o666 if broker.tenancy.shared else 0o600,
    )
    broker.clients = lambda: len(server.connections)
    await server.start()
    if metrics_port:
        try:
            await broker.metrics_door.open(metrics_port)
        except TenureError as error:  # somebody else took the port since: a broker without metrics is better than none
            LOG.error("%s", error)
    broker.begin()
    try:
        while not broker.leaving:
            broker.book.ledger.watch()
            broker.tick()
            if not broker.leaving:
                await broker.book.changed(TICK_S)
        await asyncio.sleep(0.05)  # the answer to a shutdown is still to be sent
    finally:
        await server.close()
        await broker.stop_agents()
        left = len(broker.book.live)
        await broker.close()
    return left
