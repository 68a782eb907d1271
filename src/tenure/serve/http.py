"""The HTTP door: accepts connections, holds them against limits, and knows what they share. Open Inference Protocol v2.

    HttpDoor ── http_connection (one client) ── http1 (grammar), http_bodies, http_requests, http_routes, codec_http

Raw HTTP/1.1 on the event loop (uvloop or asyncio), no server framework: those cost a small request more than all the rest.
One timer holds all connections against their time limits. Not here: running models (`plane`), the process (`server`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tenure.errors import Unavailable
from tenure.serve.accepting import Acceptor
from tenure.serve.codec_http import Template, decode_request
from tenure.serve.http1 import Head, parse_head
from tenure.serve.http_connection import Connection
from tenure.serve.http_requests import MAX_DIRECT_BYTES, Known
from tenure.serve.http_routes import infer_target
from tenure.serve.limits import ROOM_SHARE, DoorLimits
from tenure.serve.plane import Buffer, Plane

_SCRATCH_BYTES = 64 << 10
_MAX_KNOWN = 1024
_MAX_KNOWN_BYTES = 4 << 10
"""Of one head or JSON that is remembered: 2 × 1024 × 4 KiB in all."""
_T = TypeVar("_T")


class HttpDoor:
    """HTTP/1.1 over one data plane."""

    def __init__(self, plane: Plane, *, limits: DoorLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.plane = plane
        self.limits = limits or DoorLimits()
        self.scratch = bytearray(_SCRATCH_BYTES)
        self.scratch_view = memoryview(self.scratch)
        self.leaving = False
        """Set while the door closes: answers tell clients to leave."""
        self.unsent_bytes = 0
        """Answers that wait for their clients to read."""
        self.now_s = clock()
        """Read once per tick: no request asks for the time."""
        times = (
            self.limits.head_timeout_s,
            self.limits.body_timeout_s,
            self.limits.idle_timeout_s,
            self.limits.write_timeout_s,
        )
        self.tick_s = min(1.0, min(times) / 4)
        self._clock = clock
        self._connections: dict[Connection, None] = {}
        """In the order they were opened, which is the order to leave in among those idle equally long."""
        self._heads: dict[bytes, Head] = {}
        self._known: dict[tuple[tuple[str, str], bytes], Known] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._acceptor: Acceptor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._changed = asyncio.Event()

    async def open(self, bound: socket.socket) -> None:
        """Start accepting on a bound, listening socket, which stays the caller's."""
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor(
            bound, lambda: Connection(self), most=self.limits.max_connections, open_now=lambda: len(self._connections)
        )
        self._tick()

    async def close(self, grace_s: float) -> None:
        """Stop accepting, tell connections to leave, wait for the answers that are due, at most `grace_s`; then close all."""
        self.leaving = True
        if self._acceptor is not None:
            self._acceptor.close()
        for connection in list(self._connections):
            connection.leave()
        try:
            async with asyncio.timeout(grace_s):
                while self._connections or self._tasks:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        for connection in list(self._connections):
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    # What connections use

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop the door was opened on."""
        assert self._loop is not None, "connections exist only while the door is open"
        return self._loop

    def reserve(self, nbytes: int) -> Buffer:
        """`plane.reserve` for this door. Raises TooLarge, Overloaded."""
        return self.plane.reserve(nbytes, "http")

    def joined(self, connection: Connection) -> None:
        """Count a connection that has been made."""
        self._connections[connection] = None
        if self.leaving:
            connection.leave()

    def left(self, connection: Connection) -> None:
        """Forget a connection that is no more."""
        self._connections.pop(connection, None)
        if self._acceptor is not None:
            self._acceptor.resume()
        self._changed.set()

    def head(self, raw: bytes) -> Head:
        """Return a request's head, parsed or remembered. Raises BadMessage."""
        found = self._heads.get(raw)
        if found is None:
            found = parse_head(raw)
            found.target = infer_target(found.path) if found.method == "POST" and found.refused is None else None
            json_length = found.length if found.json_length is None else found.json_length
            found.direct = (
                found.target is not None
                and json_length <= min(found.length, MAX_DIRECT_BYTES)
                and found.length <= self.limits.max_request_bytes
                and not (found.expects or found.encoding or found.chunked)
            )
            _remember(self._heads, raw, found, len(raw))
        return found

    def known(self, target: tuple[str, str], content: bytes) -> Known | None:
        """Return what the JSON of a request says, decoded or remembered; None: tensors are in it. Raises InputRefused."""
        found = self._known.get((target, content))
        if found is None:
            template = decode_request(content)
            if not isinstance(template, Template):
                return None
            found = Known(target, content, template)
            if not template.id:  # an id is new each time: remembering it would push out what is worth it
                _remember(self._known, (target, content), found, len(content))
        return found

    def relieve(self, *, more_bytes: int) -> None:
        """Count unsent bytes, and close the connections whose answers are stuck longest until all is within its bound."""
        self.unsent_bytes += more_bytes
        excess = self.unsent_bytes - self.limits.max_unsent_bytes
        if excess <= 0:
            return
        for connection in sorted((c for c in self._connections if c.unsent_bytes), key=lambda c: c.since_s):
            if excess <= 0:
                break
            excess -= connection.unsent_bytes
            connection.abort()

    def start(self, work: Awaitable[None]) -> None:
        """Run something that has to be waited for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Run long work on bytes in the door's one thread."""
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "http-door")
        return await self.loop.run_in_executor(self._thread, work)

    def reserve_from_thread(self, nbytes: int) -> Buffer:
        """`plane.reserve` for the door's thread. Raises TooLarge, Overloaded, Unavailable."""
        asked: concurrent.futures.Future[Buffer] = concurrent.futures.Future()

        def answer() -> None:
            if not asked.set_running_or_notify_cancel():
                return
            try:
                asked.set_result(self.reserve(nbytes))
            except BaseException as error:
                asked.set_exception(error)

        try:
            self.loop.call_soon_threadsafe(answer)
            return asked.result(30)
        except (RuntimeError, TimeoutError) as error:
            asked.cancel()
            raise Unavailable("the server is about to leave") from error

    def release_from_thread(self, buffer: Buffer) -> None:
        """`plane.release` for the door's thread."""
        try:
            self.loop.call_soon_threadsafe(self.plane.release, buffer)
        except RuntimeError:
            pass  # the loop is closed: so is the plane

    # Time

    def _tick(self) -> None:
        self.now_s = self._clock()
        for connection in list(self._connections):
            connection.check(self.now_s)
        if self._acceptor is not None:
            if self._acceptor.some_wait():
                self._make_room()
            self._acceptor.resume()
        self._timer = self.loop.call_later(self.tick_s, self._tick)

    def _make_room(self) -> None:
        """Close the connections that have been idle longest: others wait, and these can come back."""
        idle = sorted((c for c in self._connections if c.is_idle(self.tick_s)), key=lambda c: c.since_s)
        for connection in idle[: max(1, self.limits.max_connections // ROOM_SHARE)]:
            connection.leave()


def _remember(cache: dict[Any, Any], key: Any, found: Any, size_bytes: int) -> None:
    """Keep something, in place of the oldest when the cache is full."""
    if size_bytes > _MAX_KNOWN_BYTES:
        return
    if len(cache) >= _MAX_KNOWN:
        del cache[next(iter(cache))]
    cache[key] = found
