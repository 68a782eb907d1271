"""HTTP/1.1 as the load generator speaks it: a request is one send of ready bytes, its answer is read over and not kept.

One request at a time on a connection, as many connections as requests are in flight. They are opened before the run; when all
of them are busy more are opened. Answers' heads are understood by `http_client.response`, whose
memory of heads makes the second of a kind free.
"""

from __future__ import annotations

import os
import socket
from errno import EINPROGRESS
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import Any

import httptools

from tenure.errors import Unavailable
from tenure.serve.http_client.response import Head, NotHttp, parse_head
from tenure.serve.http_client.v2json import told_error
from tenure.serve.load.loop import Loop
from tenure.serve.load.records import Outcome

SCRATCH_BYTES = 256 << 10
MAX_HEAD_BYTES = 64 << 10
_OVER = EPOLLHUP | EPOLLERR


class HttpWire:
    """Connections to one HTTP server. See `loop.Wire`."""

    def __init__(self, host: str, port: int, *, connections: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self._connections = connections
        self._address: Any = None
        self._family = socket.AF_INET
        self.scratch = bytearray(SCRATCH_BYTES)
        self.view = memoryview(self.scratch)
        self.idle: list[_Connection] = []
        self.all: set[_Connection] = set()
        self.in_flight: dict[int, _Connection] = {}
        self.loop: Loop

    def open(self, loop: Loop) -> None:
        """See Wire."""
        self.loop = loop
        for _ in range(self._connections):
            if self._address is None:
                opened = connected(self._host, self._port, self._timeout_s)
                self._address, self._family = opened.getpeername(), opened.family
            else:
                opened = socket.socket(self._family, socket.SOCK_STREAM)
                opened.settimeout(self._timeout_s)
                try:
                    opened.connect(self._address)
                except OSError as error:
                    opened.close()
                    raise Unavailable(
                        f"http://{self._host}:{self._port} took {len(self.all)} of {self._connections} connections: {error}"
                    ) from error
            self.idle.append(_Connection(self, opened, kept=True))

    def try_send(self, index: int, request: bytes) -> bool:
        """See Wire."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if connection.fd >= 0:
                connection.send(index, request)
                return True
        self.begin(index, request)
        return True

    def begin(self, index: int, request: bytes) -> None:
        """Send a request on a connection that is yet to be made."""
        try:
            opened = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError as error:
            self.loop.fail(index, f"no connection: {error.strerror}")
            return
        opened.setblocking(False)
        code = opened.connect_ex(self._address)
        if code not in (0, EINPROGRESS):
            opened.close()
            self.loop.fail(index, f"no connection: {os.strerror(code)}")
            return
        _Connection(self, opened).send_later(index, request)

    def give_up(self, index: int) -> None:
        """See Wire. HTTP/1.1 has no other way to call a request off than to close its connection."""
        connection = self.in_flight.pop(index, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """See Wire."""
        for connection in list(self.all):
            connection.close()


class _Connection:
    """One connection and the request on it."""

    __slots__ = (
        "_chunks",
        "_head",
        "_index",
        "_kept",
        "_left",
        "_over",
        "_request",
        "_rest",
        "_waited",
        "_wire",
        "fd",
        "socket",
    )

    def __init__(self, wire: HttpWire, opened: socket.socket, *, kept: bool = False) -> None:
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire, self.socket, self.fd = wire, opened, opened.fileno()
        self._index = -1
        self._request = b""
        self._rest: memoryview | None = None
        """Of the request, what the kernel has not taken yet."""
        self._head: Head | None = None
        self._left = 0
        """Bytes of the answer's body that are still to come."""
        self._kept = b""
        """The start of a head of which the rest has not come, or of an answer that tells a failure."""
        self._chunks: _Chunks | None = None
        self._waited = kept
        """Whether it was open before its request came, so that the server may have closed it meanwhile."""
        self._over = False
        """Whether it is to be closed after the answer that is read now."""
        wire.all.add(self)
        wire.loop.watch(self.fd, self.ready)

    def send(self, index: int, request: bytes) -> None:
        self._index, self._request = index, request
        self._wire.in_flight[index] = self
        try:
            sent = self.socket.send(request)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._lost(str(error.strerror))
            return
        if sent < len(request):
            self._rest = memoryview(request)[sent:]
            self._wire.loop.expect(self.fd, EPOLLIN | EPOLLOUT)

    def send_later(self, index: int, request: bytes) -> None:
        """Send a request as soon as the connection is made."""
        self._index, self._request = index, request
        self._wire.in_flight[index] = self
        self._rest = memoryview(request)
        self._wire.loop.expect(self.fd, EPOLLIN | EPOLLOUT)

    def ready(self, events: int) -> None:
        """Write what is left of the request, read what has come of the answer."""
        if events & EPOLLOUT and self._rest is not None:
            self._write()
        if not events & (EPOLLIN | _OVER) or self.fd < 0:
            return
        wire = self._wire
        before = len(self._kept) if self._head is None else 0
        if before:
            wire.scratch[:before] = self._kept
        try:
            size = self.socket.recv_into(wire.view[before:] if before else wire.scratch)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(str(error.strerror))
            return
        if not size:
            self._ended()
        elif self._index < 0:
            self.close()  # nothing was asked: whatever this is, the connection can't be trusted any more
        elif self._head is None:
            self._kept = b""
            self._read_head(before + size)
        else:
            self._read_body(size)

    def _write(self) -> None:
        assert self._rest is not None
        try:
            sent = self.socket.send(self._rest)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(str(error.strerror))
            return
        self._rest = self._rest[sent:]
        if not self._rest:
            self._rest = None
            self._wire.loop.expect(self.fd, EPOLLIN)

    def _read_head(self, size: int) -> None:
        wire = self._wire
        scratch, view = wire.scratch, wire.view
        end = scratch.find(b"\r\n\r\n", 0, size) + 4
        if end < 4:
            self._kept = bytes(view[:size])
            if size > MAX_HEAD_BYTES:
                self._broken(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
            return
        try:
            head = parse_head(bytes(view[:end]))
        except NotHttp as error:
            self._broken(str(error))
            return
        if head.status < 200:  # an interim answer: the real one follows
            rest = bytes(view[end:size])
            scratch[: len(rest)] = rest
            if rest:
                self._read_head(len(rest))
            return
        self._head = head
        if head.length is None:
            self._chunks = _Chunks()
            self._feed(view[:size])
            return
        self._left = left = head.length - size + end
        if left < 0:
            self._broken("bytes came after the answer that belong to none")
        elif head.status != 200:
            self._kept = bytes(view[end:size])
            if not left:
                self._refused()
        elif not left:
            self._done()

    def _read_body(self, size: int) -> None:
        if self._chunks is not None:
            self._feed(self._wire.view[:size])
            return
        self._left -= size
        if self._left < 0:
            self._broken("bytes came after the answer that belong to none")
            return
        assert self._head is not None
        refused = self._head.status != 200
        if refused and len(self._kept) < MAX_HEAD_BYTES:
            self._kept += self._wire.view[:size]
        if not self._left:
            if refused:
                self._refused()
            else:
                self._done()

    def _feed(self, data: memoryview) -> None:
        assert self._chunks is not None
        assert self._head is not None
        try:
            self._chunks.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._broken(f"the answer is not HTTP/1.1: {error}")
            return
        if self._chunks.complete:
            self._whole()

    def _whole(self) -> None:
        """All of an answer of unknown length is there."""
        assert self._chunks is not None
        assert self._head is not None
        if self._head.status == 200:
            self._done()
        else:
            self._kept = self._chunks.start
            self._refused()

    def _done(self) -> None:
        """The request was answered."""
        index, self._index = self._index, -1
        self._wire.loop.finish(index, Outcome.OK)
        self._free(index)

    def _refused(self) -> None:
        assert self._head is not None
        index, self._index = self._index, -1
        status, words = f"HTTP {self._head.status}", str(told_error(self._head, memoryview(self._kept)))
        self._wire.loop.fail(index, (words if words.startswith(status) else f"{status}: {words}")[:200])
        self._free(index)

    def _free(self, index: int) -> None:
        wire, head = self._wire, self._head
        del wire.in_flight[index]
        if self._rest is None and not self._over and head is not None and head.keep_alive:
            self._head, self._chunks, self._waited = None, None, True
            if self._kept:
                self._kept = b""
            wire.idle.append(self)
        else:
            self.close()

    def _ended(self) -> None:
        """The server has closed the connection."""
        if self._chunks is not None and self._head is not None and not self._head.chunked:
            self._over = True
            self._whole()  # such an answer goes on until there
        else:
            self._lost("the connection was closed before the answer was complete")

    def _lost(self, reason: str) -> None:
        """The connection is gone. A request on a kept one that was closed before any answer is sent once more, on a new one."""
        index, request = self._index, self._request
        again = self._waited and self._head is None and not self._kept
        self.close()
        if index < 0:
            return
        self._wire.in_flight.pop(index, None)
        if again:
            self._wire.begin(index, request)
        else:
            self._wire.loop.fail(index, reason)

    def _broken(self, reason: str) -> None:
        index = self._index
        self.close()
        self._wire.in_flight.pop(index, None)
        self._wire.loop.fail(index, reason)

    def close(self) -> None:
        """Close it, whatever is under way."""
        if self.fd >= 0:
            self._wire.loop.unwatch(self.fd)
            self.fd = -1
            self._index = -1
            self.socket.close()
            self._wire.all.discard(self)


class _Chunks:
    """An answer whose length is not told beforehand."""

    def __init__(self) -> None:
        self.complete = False
        self.start = b""
        """Of the body, for the words of a failure."""
        self.parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        if len(self.start) < MAX_HEAD_BYTES:
            self.start += body

    def on_message_complete(self) -> None:
        self.complete = True


def connected(host: str, port: int, timeout_s: float) -> socket.socket:
    """Return a connected socket. Raises Unavailable."""
    try:
        return socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise Unavailable(f"{host}:{port} cannot be reached: {error}") from error
