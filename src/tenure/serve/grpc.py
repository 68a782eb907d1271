"""The gRPC door: Open Inference Protocol v2 over HTTP/2 on the event loop, with one data plane behind it.

    grpc (accepting, time, what all connections share) ─► grpc_connection (calls) ─► http2 (frames)
                                                              └► codec_infer, grpc_service (messages)

Not here: ports and signals (`server`), running models (the data plane). Why not the gRPC library's server:
docs/decisions/0014-own-http2-door.md.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

from tenure.serve.accepting import Acceptor
from tenure.serve.codec_infer import AnswerWriter, RequestReader
from tenure.serve.faults import Overloaded
from tenure.serve.grpc_connection import GrpcConnection
from tenure.serve.grpc_request import Request
from tenure.serve.grpc_service import Service
from tenure.serve.grpc_status import DEADLINE_EXCEEDED, StatusError
from tenure.serve.limits import ROOM_SHARE, DoorLimits
from tenure.serve.plane import Plane

READ_BYTES = 256 << 10
MAX_STREAMS = 1024
"""Calls at a time on one connection."""
MAX_DOOR_STREAMS = 16_384
"""Calls at a time on all connections."""
MAX_UNSENT_BYTES = 256 << 20
"""Answers not taken by their clients, in all; past it, new requests are refused."""
MAX_CONNECTION_UNSENT_BYTES = 128 << 20
"""Answers not taken by one client; past it, its connection is closed."""
UNPACKING = 2
"""Compressed messages that are unpacked at a time, in turns with other work; the others wait, within the memory budget."""
TICK_S = 1.0


class GrpcDoor:
    """Serves gRPC on a socket."""

    def __init__(self, plane: Plane, *, limits: DoorLimits | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self.plane = plane
        self.now_s = now_s
        self.limits = limits if limits is not None else DoorLimits()
        self.service = Service(plane)
        self.reader = RequestReader()
        self.writer = AnswerWriter()
        self.max_streams = MAX_STREAMS
        self.max_door_streams = MAX_DOOR_STREAMS
        self.max_unsent_bytes = MAX_UNSENT_BYTES
        self.shared = memoryview(bytearray(READ_BYTES))
        """Where all connections read to, one after the other: nothing stays in it from one read to the next."""
        self.streams = 0
        """Calls that are open now."""
        self.unsent = 0
        """Answer bytes that clients have not taken."""
        self._full_since_s: float | None = None
        self.connections: dict[GrpcConnection, None] = {}
        """Those open, in the order in which they were opened."""
        self._dirty: list[GrpcConnection] = []
        self._acceptor: Acceptor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._work: set[asyncio.Task[None]] = set()
        self.unpacking = asyncio.Semaphore(UNPACKING)
        self._closing = False

    async def open(self, bound: socket.socket) -> None:
        """Start accepting on a bound, listening socket, which stays the caller's."""
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor(
            bound, lambda: GrpcConnection(self), most=self.limits.max_connections, open_now=lambda: len(self.connections)
        )
        self._timer = self._loop.call_later(TICK_S, self._tick)

    async def close(self, grace_s: float) -> None:
        """Stop accepting, ask clients to leave, wait up to `grace_s` for answers that are due, then close."""
        self._closing = True
        if self._acceptor is not None:
            self._acceptor.close()
        asked: dict[GrpcConnection, int] = {}
        for connection in list(self.connections):
            asked[connection] = connection.h2.acked
            connection.h2.go_away(last=False)
            connection.h2.ping()
            connection.flush()
        until_s = self.now_s() + grace_s
        while self.connections and self.now_s() < until_s:
            for connection in list(self.connections):
                # Calls sent before the client has heard of it are on their way until it answers the ping.
                if connection in asked and connection.h2.acked > asked[connection]:
                    del asked[connection]
                    connection.h2.go_away(last=True)
                    connection.flush()
                settled = connection not in asked or not connection.h2.settled
                if settled and not connection.h2.streams:
                    connection.transport.close()
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.transport.abort()
        for task in list(self._work):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.sleep(0)
        self.connections.clear()

    # For connections

    def admit(self, connection: GrpcConnection) -> bool:
        """Take a new connection in, unless the door is closing."""
        if self._closing:
            return False
        self.connections[connection] = None
        return True

    def dismiss(self, connection: GrpcConnection) -> None:
        """Forget a connection that is gone."""
        self.connections.pop(connection, None)
        self.unsent -= connection.unsent
        connection.unsent = 0
        if self._acceptor is not None:
            self._acceptor.resume()

    def account(self, connection: GrpcConnection, unsent: int) -> None:
        """Note how much of its answers a connection has not taken."""
        if unsent < connection.unsent or not unsent or not connection.unsent:
            connection.progress_s = self.now_s()
        self.unsent += unsent - connection.unsent
        connection.unsent = unsent
        if unsent > MAX_CONNECTION_UNSENT_BYTES:
            connection.transport.abort()

    def flush_soon(self, connection: GrpcConnection) -> None:
        """Write a connection's answers once all that are due in this iteration of the loop have gathered."""
        if not self._dirty:
            assert self._loop is not None
            self._loop.call_soon(self._flush)
        self._dirty.append(connection)

    def work(self, job: Coroutine[Any, Any, None], most: int = MAX_DOOR_STREAMS) -> None:
        """Run something that takes long. Raises Overloaded when `most` things are going on already."""
        if len(self._work) >= most:
            job.close()
            raise Overloaded(f"{most} loads, unloads or other long calls are being worked on already")
        task = asyncio.get_running_loop().create_task(job)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.flush()

    # Time

    def _tick(self) -> None:
        """Look after every connection; the one timer of the door."""
        assert self._loop is not None
        self.look_after(self.now_s())
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def look_after(self, now_s: float) -> None:
        """End what was kept waiting too long, make room for answers and for clients that wait to be accepted."""
        for connection in list(self.connections):
            self.look(connection, now_s)
        self.make_room(now_s)
        if self._acceptor is not None:
            if self._acceptor.some_wait():
                self.part_with_idle(now_s)
            self._acceptor.resume()

    def make_room(self, now_s: float) -> None:
        """Part with the client that takes least of its answers, once such clients have kept others out for a while."""
        if self.unsent <= self.max_unsent_bytes:
            self._full_since_s = None
        elif self._full_since_s is None:
            self._full_since_s = now_s
        elif now_s - self._full_since_s > self.limits.write_timeout_s / 3:
            max(self.connections, key=lambda connection: connection.unsent).transport.abort()

    def part_with_idle(self, now_s: float) -> None:
        """Close the connections that have been idle longest: others wait, and these can come back."""
        idle = [connection for connection in self.connections if connection.is_idle(now_s, TICK_S)]
        idle.sort(key=lambda connection: connection.last_seen_s)
        for connection in idle[: max(1, self.limits.max_connections // ROOM_SHARE)]:
            connection.leave()

    def look(self, connection: GrpcConnection, now_s: float) -> None:
        """End what a client has kept waiting longer than the limits say."""
        h2, limits = connection.h2, self.limits
        h2.refill(TICK_S)
        if connection.seen:
            connection.seen, connection.last_seen_s = False, now_s
        unsent = h2.held_bytes + connection.transport.get_write_buffer_size()
        self.account(connection, unsent)
        quiet_s = now_s - connection.last_seen_s
        if unsent and now_s - connection.progress_s > limits.write_timeout_s:
            connection.transport.abort()
        elif not h2.settled:
            if now_s - connection.opened_s > limits.head_timeout_s:
                connection.transport.abort()
        elif not (connection.kept or h2.midway):
            connection.stuck_s = None
        elif connection.stuck_s is None or connection.stuck_at != h2.frames:
            connection.stuck_s, connection.stuck_at = now_s, h2.frames
        elif now_s - connection.stuck_s > limits.head_timeout_s:
            connection.transport.abort()
        if quiet_s <= limits.idle_timeout_s / 2:
            connection.pinged = False
        elif not h2.streams:
            if quiet_s > limits.idle_timeout_s:
                connection.leave()
        elif not connection.pinged:  # calls are open and nothing comes: is anybody there?
            connection.pinged = True
            h2.ping()
            connection.flush()
        elif quiet_s > limits.idle_timeout_s:
            connection.transport.abort()
        for stream in list(h2.streams.values()):
            assert isinstance(stream, Request)
            if stream.remote_closed or stream.between_messages:
                continue
            allowed_s = min(limits.body_timeout_s, stream.plan.timeout_s or limits.body_timeout_s)
            if now_s - stream.began_s > allowed_s:
                connection.expire(stream, StatusError(DEADLINE_EXCEEDED, f"the request did not come within {allowed_s:g} s"))
