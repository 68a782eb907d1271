"""A node's agent: does the broker's orders through the runtime, tells it what happens, and holds the node's term.

For: `orders.AGENT_OPS` and the `attempt` notes. Not for: deciding who gets what (`decide`), starting the agent (`start`).

The term is counted on CLOCK_BOOTTIME. Unrenewed, the agent stops its leases when it runs out (their shims do so too, should
the agent be dead), and leaves once nothing runs. Exits are heard of through the shims' pidfds, not by asking around.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tenure import orders, wire
from tenure.agent.gpus import GpuGuard
from tenure.agent.sessions import Sessions
from tenure.errors import Conflict, NotFound, StaleFence, TenureError
from tenure.frames import OpenSession, SessionAt
from tenure.meter.machine import machine
from tenure.nodes import TERM_GRACE_S, Node
from tenure.protocols import Clock, ExitKind, RuntimeHandle
from tenure.resources import Capacity
from tenure.runtimes.pidfds import open_pidfd
from tenure.runtimes.procfs import is_alive
from tenure.runtimes.several import Runtimes
from tenure.runtimes.state import read_json, term_file, write_json
from tenure.sockets import Connection, LineServer

T = TypeVar("T")
NOTE_EVERY_S = 1.0
STAYING_TERM_S = 300.0
"""A term of so long comes from a broker that is there to stay: what first leases would wait for is made ahead of them."""
_MAX_ORDERS = 16
_MAX_EXECS = 32


class Agent:
    """One node's agent. Runs until `shutdown`, or until its term is over and nothing runs."""

    def __init__(
        self,
        node: str,
        socket: Path,
        runtimes: Runtimes,
        *,
        state_dir: Path,
        capacity: Capacity,
        clock: Clock,
        term_s: float,
        guard: GpuGuard | None = None,
    ) -> None:
        """guard: of the devices that leases are looked at on; None: there are none to look at."""
        self._guard = guard
        self._node, self._runtime, self._capacity, self._clock = node, runtimes, capacity, clock
        self._state_dir = state_dir
        self._broker_fence = int((read_json(state_dir / "broker.json") or {}).get("fence", 0))
        self._term_s, self._term_ends_s = term_s, self._kept_term_s()
        if self._term_ends_s <= clock.boot_s():
            self._set_term(term_s, clock.boot_s() + term_s)
        self._fences: dict[Connection, int] = {}
        self._ordering: Connection | None = None
        """The latest connection that a broker gave a term on: what is still under way on an older one is refused."""
        self._under_way: set[asyncio.Future[Any]] = set()
        self._watched: dict[int, RuntimeHandle] = {}
        self._left = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._orders = ThreadPoolExecutor(_MAX_ORDERS, thread_name_prefix="order")
        self._execs = ThreadPoolExecutor(_MAX_EXECS, thread_name_prefix="exec")
        self._sessions = Sessions(socket.parent)
        self._over = asyncio.Event()
        self._prepared = False
        handlers: dict[str, Callable[[Any, Connection], Awaitable[Any]]] = {
            "describe": self._describe,
            "term": self._term,
            "start": self._start,
            "renew": self._renew,
            "resize": self._resize,
            "stop": self._stop,
            "attempts": self._attempts,
            "forget": self._forget,
            "exec": self._exec,
            "open_session": self._open_session,
            "shutdown": self._shutdown,
        }
        self._server = LineServer(
            socket,
            orders.AGENT_OPS,
            handlers,
            who=f"agent {node}",
            on_close=self._hung_up,
        )

    async def run(self) -> None:
        """Serve until the end, then leave nothing running that the term no longer covers."""
        for lease_id in self._runtime.known():
            with contextlib.suppress(TenureError):  # one unreadable lease must not keep the node down
                await self._adopt(lease_id)
        await self._server.start()
        beat = asyncio.ensure_future(self._beat())
        if self._guard is not None:
            self._guard.start()
        try:
            await self._over.wait()
        finally:
            beat.cancel()
            if self._guard is not None:
                self._guard.close()
            await asyncio.gather(beat, *self._tasks, return_exceptions=True)
            await self._server.close()
            self._left = len(self._watched)
            for fd in list(self._watched):
                self._unwatch(fd)
            self._orders.shutdown()
            self._execs.shutdown(cancel_futures=True)
            self._sessions.close()
            self._runtime.close()

    @property
    def holds(self) -> bool:
        """Whether attempts were left running: their shims go on, and so must what they rely on."""
        return self._left > 0

    def _hung_up(self, connection: Connection) -> None:
        self._fences.pop(connection, None)

    def end(self) -> None:
        """Stop every attempt and leave (also on SIGTERM)."""
        self._spawn(self._end_all("the agent was told to leave"))

    # --- orders ---

    async def _describe(self, _args: wire.Nothing, _connection: Connection) -> Node:
        names, bounds, confinement = await self._do(self._runtime.describe)
        return Node(
            name=self._node,
            capacity=self._capacity,
            machine=await self._do(machine),
            runtimes=names,
            bounds=bounds,
            confinement=confinement,
            term_s=self._term_s,
        )

    async def _term(self, args: orders.NodeTerm, connection: Connection) -> orders.BootTime:
        if args.broker_fence < self._broker_fence:
            raise StaleFence(
                f"node {self._node} refused a term: broker fence {args.broker_fence} is older than {self._broker_fence}, "
                "which it obeys; end this broker"
            )
        if args.broker_fence > self._broker_fence:
            self._broker_fence = args.broker_fence
            write_json(self._state_dir / "broker.json", {"fence": args.broker_fence}, sync=True)
        if connection not in self._fences:
            self._ordering = connection
        self._fences[connection] = args.broker_fence
        ends_s = self._clock.boot_s() + args.term_s
        if args.term_s >= STAYING_TERM_S and not self._prepared:
            self._prepared = True
            self._orders.submit(self._runtime.prepare)
        self._set_term(args.term_s, min(ends_s, args.ends_boot_s) if args.boot_id == self._clock.boot_id() else ends_s)
        return orders.BootTime(boot_s=self._clock.boot_s(), utc_s=self._clock.utc_s(), boot_id=self._clock.boot_id())

    async def _start(self, args: orders.AgentStart, connection: Connection) -> RuntimeHandle:
        self._check_broker(connection)
        if self._clock.boot_s() >= self._term_ends_s or self._over.is_set():
            raise Conflict(f"node {self._node} refused to start lease {args.spec.lease_id}: its term is over; renew it first")
        start = self._begin(lambda: self._runtime.start(args.runtime, args.spec))
        start.add_done_callback(self._started)
        return await asyncio.shield(start)

    def _started(self, start: asyncio.Future[RuntimeHandle]) -> None:
        """Watch what was started, also when who ordered it has hung up meanwhile."""
        if not start.cancelled() and start.exception() is None:
            self._watch(start.result())

    async def _renew(self, args: orders.AgentRenew, connection: Connection) -> None:
        self._check_broker(connection)
        runtime, lease_id = self._runtime, args.lease_id
        order = self._begin(
            lambda: runtime.renew(runtime.attach(lease_id), deadline_boot_s=args.deadline_boot_s, fence=args.fence)
        )
        await asyncio.shield(order)

    async def _resize(self, args: orders.AgentResize, connection: Connection) -> None:
        self._check_broker(connection)
        runtime, lease_id = self._runtime, args.lease_id
        await asyncio.shield(self._begin(lambda: runtime.resize(runtime.attach(lease_id), args.envelope, fence=args.fence)))

    async def _stop(self, args: orders.AgentStop, connection: Connection) -> None:
        self._check_broker(connection)
        runtime, lease_id = self._runtime, args.lease_id
        order = self._begin(
            lambda: runtime.stop(runtime.attach(lease_id), grace_s=args.grace_s, fence=args.fence, kind=args.kind, why=args.why)
        )
        await asyncio.shield(order)

    async def _attempts(self, _args: wire.Nothing, _connection: Connection) -> tuple[orders.AttemptView, ...]:
        if self._under_way:  # "nothing runs" must not be said of what is just being started
            await asyncio.wait(set(self._under_way))
        return await self._do(lambda: tuple(view for lease_id in self._runtime.known() for view in self._views(lease_id)))

    async def _forget(self, args: wire.LeaseRef, connection: Connection) -> None:
        self._check_broker(connection)
        await self._do(self._runtime.forget, args.lease_id)

    async def _exec(self, args: wire.Exec, _connection: Connection) -> wire.ExecResult:
        handle = await self._do(self._runtime.attach, args.lease_id)
        loop = asyncio.get_running_loop()
        code, output = await loop.run_in_executor(
            self._execs, lambda: self._runtime.exec(handle, args.argv, timeout_s=args.timeout_s)
        )
        return wire.ExecResult(code=code, output=output.decode("utf-8", "replace"))

    async def _open_session(self, args: OpenSession, _connection: Connection) -> SessionAt:
        def begin() -> SessionAt:
            handle = self._runtime.attach(args.lease_id)
            alive = partial(is_alive, handle.pid, handle.start_ticks)
            return self._sessions.open(
                lambda: self._runtime.session(handle, args.argv, window=args.window),
                lease_id=args.lease_id,
                uid=args.uid,
                alive=alive,
                timeout_s=args.timeout_s or None,
            )

        return await asyncio.get_running_loop().run_in_executor(self._execs, begin)

    async def _shutdown(self, _args: wire.Nothing, connection: Connection) -> None:
        self._check_broker(connection)
        self.end()

    def _check_broker(self, connection: Connection) -> None:
        fence = self._fences.get(connection)
        if fence is not None and fence < self._broker_fence:
            raise StaleFence(f"node {self._node} obeys the broker with fence {self._broker_fence}; not {fence}: end this one")
        if fence is not None and connection is not self._ordering:
            raise StaleFence(f"node {self._node} has a newer connection to its broker; this order came on an older one")

    def _begin(self, order: Callable[[], T]) -> asyncio.Future[T]:
        """Do an order to its end, whether or not who gave it stays to hear of it."""
        future = asyncio.get_running_loop().run_in_executor(self._orders, order)
        self._under_way.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._under_way.discard(future)
        if not future.cancelled():
            future.exception()  # looked at: whoever asked may have hung up, and is told nothing then

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._orders, work, *args)

    # --- attempts ---

    def _views(self, lease_id: str) -> list[orders.AttemptView]:
        try:
            handle = self._runtime.attach(lease_id)
            ended = self._runtime.wait(handle, 0.0)
            usage = ended.usage if ended else self._runtime.usage(handle)
        except NotFound:
            return []  # forgotten meanwhile
        if ended is None and self._guard is not None:
            usage = self._guard.with_use(handle, usage)
        return [orders.AttemptView(handle=handle, usage=usage, exit=ended)]

    async def _adopt(self, lease_id: str) -> None:
        for view in await self._do(self._views, lease_id):
            if view.exit is None:
                self._watch(view.handle)

    def _watch(self, handle: RuntimeHandle) -> None:
        fd = open_pidfd(handle.pid, handle.start_ticks)
        if fd is None:
            self._spawn(self._tell(handle.lease_id))
            return
        self._watched[fd] = handle
        asyncio.get_running_loop().add_reader(fd, self._ended, fd)

    def _ended(self, fd: int) -> None:
        handle = self._unwatch(fd)
        self._spawn(self._tell(handle.lease_id))

    def _unwatch(self, fd: int) -> RuntimeHandle:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        return self._watched.pop(fd)

    async def _tell(self, lease_id: str) -> None:
        for view in await self._do(self._views, lease_id):
            await self._server.notify_all("attempt", view)

    async def _tell_usage(self) -> None:
        """Tell what all that runs uses. How one ended is told by `_tell`, as soon as its shim has left."""
        for handle, usage in await self._do(self._runtime.samples, tuple(self._watched.values())):
            if handle in self._watched.values():
                seen = self._guard.with_use(handle, usage) if self._guard else usage
                await self._server.notify_all("attempt", orders.AttemptView(handle=handle, usage=seen))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- term ---

    def _kept_term_s(self) -> float:
        """Return when the term ends that an earlier agent of this node was given; shims go by it, so this one does too."""
        kept = read_json(term_file(self._state_dir)) or {}
        return float(kept.get("ends_boot_s", 0.0)) if kept.get("boot_id") == self._clock.boot_id() else 0.0

    def _set_term(self, term_s: float, ends_boot_s: float) -> None:
        self._term_s, self._term_ends_s = term_s, ends_boot_s
        write_json(term_file(self._state_dir), {"ends_boot_s": self._term_ends_s, "boot_id": self._clock.boot_id()})

    async def _beat(self) -> None:
        """About once a second: tell usage, and look whether the term is over."""
        while True:
            await asyncio.sleep(max(0.01, min(NOTE_EVERY_S, self._term_ends_s - self._clock.boot_s())))
            with contextlib.suppress(TenureError, OSError):
                if self._clock.boot_s() >= self._term_ends_s:
                    await self._end_term()
                    continue
                if self._guard is not None:
                    self._guard.watch(tuple(self._watched.values()))
                if self._server.connections:
                    await self._tell_usage()

    async def _end_term(self) -> None:
        await self._stop_attempts(f"the node's term of {self._term_s:g} s ended without word from the broker")
        if self._clock.boot_s() >= self._term_ends_s and not self._watched:
            self._over.set()

    async def _end_all(self, why: str) -> None:
        await self._stop_attempts(why)
        self._over.set()

    async def _stop_attempts(self, why: str) -> None:
        """Stop every attempt and wait for their ends, a bounded time: shims end what is left in any case."""
        for handle in list(self._watched.values()):
            with contextlib.suppress(TenureError):
                await self._do(self._stop_one, handle, why)
        deadline_s = self._clock.boot_s() + TERM_GRACE_S + 5.0
        while self._watched and self._clock.boot_s() < deadline_s:
            await asyncio.sleep(0.02)

    def _stop_one(self, handle: RuntimeHandle, why: str) -> None:
        fence = self._runtime.newest_fence(handle.lease_id)
        self._runtime.stop(handle, grace_s=TERM_GRACE_S, fence=fence, kind=ExitKind.STOPPED, why=why)
