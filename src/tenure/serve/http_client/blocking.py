"""Sync HTTP/1.1 connections: plain sockets, one request at a time on each, idle ones kept for whoever asks next.

Every exchange ends by its deadline. An answer that begins before the request is all written (a refusal) is read at once,
so that neither side waits for the other.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from tenure.serve.http_client.response import Head, ResponseReader

Buffer = bytes | memoryview
Answered = tuple[Head, memoryview, float, float]
"""Head and body of an answer, when its request was written and when it began (perf_counter)."""
MAX_IDLE = 256
_MAX_PARTS = 512
"""Of one sendmsg; the kernel takes 1,024."""


class Connection:
    """One connected socket."""

    def __init__(self, host: str, port: int, ends_at_s: float) -> None:
        self._socket = socket.create_connection((host, port), timeout=max(0.001, ends_at_s - time.monotonic()))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._watched = 0
        self.reader = ResponseReader()
        self.kept = False
        """Whether it has answered before."""
        self.reusable = False
        self.sent_s = 0.0
        self._written = True

    def send(self, parts: Sequence[Buffer], ends_at_s: float) -> None:
        """Write a request. Raises TimeoutError past the deadline."""
        self.reader.start()
        self._written = self._write(parts, ends_at_s)
        self.sent_s = time.perf_counter()

    def receive(self, ends_at_s: float, *, late: bool = False) -> Answered:
        """Read the answer to what was sent. Raises OSError (TimeoutError past the deadline), NotHttp.

        late: other things have been done since it was sent, so that the answer may well be there.
        """
        reader = self.reader
        if not late:
            self._wait(select.POLLIN, ends_at_s)
        answered_s = time.perf_counter()
        while True:
            try:
                count = self._socket.recv_into(reader.buffer())
            except BlockingIOError:
                self._wait(select.POLLIN, ends_at_s)
                continue
            if not count:
                if reader.ended():
                    break
                raise ConnectionResetError("the connection was closed before the answer was complete")
            if reader.received(count):
                break
            if reader.began:
                self._wait(select.POLLIN, ends_at_s)
        assert reader.head is not None
        self.reusable = self._written and reader.clean and reader.head.keep_alive
        return reader.head, reader.body, self.sent_s, answered_s

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _write(self, parts: Sequence[Buffer], ends_at_s: float) -> bool:
        """Return whether all was written; False when the other side answered or closed before."""
        left = deque(parts)
        while left:
            try:
                count = self._socket.sendmsg(left if len(left) <= _MAX_PARTS else [*left][:_MAX_PARTS])
            except BlockingIOError:
                count = 0
            except ConnectionError:
                return False  # what it said before it closed may still be read
            while left and count >= len(left[0]):
                count -= len(left.popleft())
            if not left:
                break
            if count:
                left[0] = memoryview(left[0])[count:]
            if self._wait(select.POLLIN | select.POLLOUT, ends_at_s) & ~select.POLLOUT:
                return False
        return True

    def _wait(self, events: int, ends_at_s: float) -> int:
        if events != self._watched:
            self._poll.register(self._socket, events)
            self._watched = events
        left_s = ends_at_s - time.monotonic()
        found = self._poll.poll(left_s * 1000) if left_s > 0 else []
        if not found:
            raise TimeoutError
        return found[0][1]


class Pending(NamedTuple):
    """A request that was sent and whose answer has not been read."""

    connection: Connection
    parts: Sequence[Buffer]
    ends_at_s: float


class Connections:
    """Idle connections to one server, shared by threads."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: deque[Connection] = deque(maxlen=MAX_IDLE)
        self._closed = False

    def exchange(self, parts: Sequence[Buffer], timeout_s: float) -> Answered:
        """Send a request and return its answer.

        A kept connection that turns out closed before any answer is replaced once by a new one: inference changes
        nothing, so it may be sent again. Raises OSError, NotHttp.
        """
        return self._answer(*self.begin(parts, timeout_s))

    def begin(self, parts: Sequence[Buffer], timeout_s: float) -> Pending:
        """Send a request on a connection of its own, to `finish` or `abandon` later. Raises OSError."""
        ends_at_s = time.monotonic() + timeout_s
        connection = self._connection(ends_at_s)
        try:
            connection.send(parts, ends_at_s)
        except BaseException:
            connection.close()
            raise
        return Pending(connection, parts, ends_at_s)

    def finish(self, pending: Pending) -> Answered:
        """Return the answer to what was begun. Raises as exchange."""
        return self._answer(*pending, late=True)

    def abandon(self, pending: Pending) -> None:
        """Let nobody wait for an answer any more."""
        pending.connection.close()

    def _connection(self, ends_at_s: float) -> Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return Connection(self._host, self._port, ends_at_s)

    def _answer(self, connection: Connection, parts: Sequence[Buffer], ends_at_s: float, *, late: bool = False) -> Answered:
        try:
            try:
                found = connection.receive(ends_at_s, late=late)
            except ConnectionError:
                if not connection.kept or connection.reader.began:
                    raise
                connection.close()
                self._drop_idle()  # the others are as old as this one
                connection = Connection(self._host, self._port, ends_at_s)
                connection.send(parts, ends_at_s)
                found = connection.receive(ends_at_s)
        except BaseException:
            connection.close()
            raise
        if connection.reusable and not self._closed and len(self._idle) < MAX_IDLE:
            connection.kept = True
            self._idle.append(connection)
        else:
            connection.close()
        return found

    def close(self) -> None:
        """Close what is idle, and what is in use after its answer."""
        self._closed = True
        self._drop_idle()

    def _drop_idle(self) -> None:
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return
