"""Async HTTP/1.1 connections on the running event loop (asyncio's own or uvloop): the same reading as the sync client's.

At most `MAX_CONNECTIONS` at a time, one request on each; more requests wait in order. All of it belongs to one loop.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import cast

from tenure.serve.http_client.blocking import Answered, Buffer
from tenure.serve.http_client.response import NotHttp, ResponseReader

MAX_CONNECTIONS = 64
_MAX_PARTS = 512
_SPARE = memoryview(bytearray(64))
"""Where bytes go that nobody asked for; never read."""


class Stream(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, connected: socket.socket) -> None:
        self.reader = ResponseReader()
        self.lost = False
        self.answered_s = 0.0
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the socket is closed."""
        self._socket = connected
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None

    async def exchange(self, parts: Sequence[Buffer], ends_at_s: float) -> tuple[bool, float]:
        """Write a request and read its answer into `reader`; see blocking.Connection. Returns whether it may be used again."""
        loop = asyncio.get_running_loop()
        answer = self._answer = loop.create_future()
        self.reader.start()
        timer = loop.call_at(ends_at_s, _expire, answer)
        try:
            self._write(parts)
            sent_s = time.perf_counter()
            await answer
        finally:
            timer.cancel()
            self._answer = None
        assert self._transport is not None
        head = self.reader.head
        written = self._transport.get_write_buffer_size() == 0
        return written and self.reader.clean and not self.lost and head is not None and head.keep_alive, sent_s

    def close(self) -> None:
        """Close the connection now, whatever is under way."""
        self.lost = True
        if self._transport is not None:
            self._transport.abort()

    def _write(self, parts: Sequence[Buffer]) -> None:
        """Hand over a request: with one system call as far as the kernel takes it, the rest through the loop."""
        transport = self._transport
        if self.lost or transport is None:
            raise ConnectionResetError("the connection was closed")
        try:
            sent = self._socket.sendmsg(parts[:_MAX_PARTS])
        except BlockingIOError:
            sent = 0
        except ConnectionError as error:
            self._ended(error)
            return
        for part in parts:
            size = len(part)
            if sent >= size:
                sent -= size
                continue
            transport.write(memoryview(part)[sent:] if sent else part)
            sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio. An event loop may ask once more after the last byte of an answer."""
        return _SPARE if self._answer is None or self._answer.done() else self.reader.buffer()

    def buffer_updated(self, count: int) -> None:
        """See asyncio."""
        answer, reader = self._answer, self.reader
        if answer is None or answer.done():
            self.close()  # nothing was asked: whatever this is, the connection can't be trusted any more
            return
        if not reader.began:
            self.answered_s = time.perf_counter()
        try:
            complete = reader.received(count)
        except Exception as error:  # told to whoever waits, where it is sorted
            answer.set_exception(error)
            return
        if complete:
            answer.set_result(None)

    def eof_received(self) -> bool:
        """See asyncio."""
        self._ended(None)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._ended(error)
        asyncio.get_running_loop().call_soon(_tell, self.gone)

    def _ended(self, error: Exception | None) -> None:
        self.lost = True
        answer = self._answer
        if answer is None or answer.done():
            return
        if self._read_left() or (error is None and self.reader.ended()):
            answer.set_result(None)
        else:
            reason = "the connection was closed before the answer was complete"
            answer.set_exception(error if isinstance(error, OSError) else ConnectionResetError(reason))

    def _read_left(self) -> bool:
        """Read what a server said before it hung up on a request that it had not read; return whether that is an answer.

        The loop itself gives up reading once writing has failed.
        """
        reader = self.reader
        try:
            while count := self._socket.recv_into(reader.buffer()):
                if reader.received(count):
                    return True
        except (OSError, ValueError, NotHttp):  # nothing is left, the socket is closed already, or it is no answer
            pass
        return False


class Streams:
    """Connections to one server on one loop."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[Stream] = []
        self._all: set[Stream] = set()
        self._free = MAX_CONNECTIONS
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def exchange(self, parts: Sequence[Buffer], timeout_s: float) -> Answered:
        """See blocking.Connections."""
        ends_at_s = asyncio.get_running_loop().time() + timeout_s
        await self._enter(ends_at_s)
        try:
            return await self._exchange(parts, ends_at_s)
        finally:
            self._leave()

    def close(self) -> None:
        """Begin to close every connection; who waits for an answer gets a ConnectionError."""
        for stream in self._all:
            stream.close()
        self._idle.clear()

    async def close_async(self) -> None:
        """Close every connection and see them closed."""
        self.close()
        leaving = [stream.gone for stream in self._all]
        if leaving:
            await asyncio.wait(leaving, timeout=1.0)

    async def _exchange(self, parts: Sequence[Buffer], ends_at_s: float) -> Answered:
        stream = None
        while self._idle and (stream is None or stream.lost):
            stream = self._idle.pop()
        kept = stream is not None and not stream.lost
        if stream is None or stream.lost:
            stream = await self._connected(ends_at_s)
        reusable = False
        try:
            try:
                reusable, sent_s = await stream.exchange(parts, ends_at_s)
            except ConnectionError:
                if not kept or stream.reader.began:
                    raise
                self._drop(stream)
                stream = await self._connected(ends_at_s)
                reusable, sent_s = await stream.exchange(parts, ends_at_s)
            head, body = stream.reader.head, stream.reader.body
            assert head is not None
            return head, body, sent_s, stream.answered_s
        finally:
            if reusable:
                self._idle.append(stream)
            else:
                self._drop(stream)

    async def _enter(self, ends_at_s: float) -> None:
        """Wait, in order of asking, for one of the places."""
        if self._free > 0:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        place = loop.create_future()
        self._waiting.append(place)
        timer = loop.call_at(ends_at_s, _expire, place)
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._leave()  # it was given the place, and is cancelled before it could use it
            raise
        finally:
            timer.cancel()

    def _leave(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def _drop(self, stream: Stream) -> None:
        stream.close()

    def _forget(self, stream: Stream, gone: asyncio.Future[None]) -> None:
        self._all.discard(stream)

    async def _connected(self, ends_at_s: float) -> Stream:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout_at(ends_at_s):
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            failed: OSError | None = None
            for family, kind, protocol, _, address in found:
                opened = socket.socket(family, kind, protocol)
                try:
                    opened.setblocking(False)
                    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    await loop.sock_connect(opened, address)
                    stream = Stream(opened)
                    await loop.create_connection(lambda made=stream: made, sock=opened)  # type: ignore[misc]
                except OSError as error:
                    opened.close()
                    failed = error
                except BaseException:
                    opened.close()
                    raise
                else:
                    self._all.add(stream)
                    stream.gone.add_done_callback(functools.partial(self._forget, stream))
                    return stream
        raise failed or OSError(f"{self._host} has no address")


def _tell(gone: asyncio.Future[None]) -> None:
    if not gone.done():
        gone.set_result(None)


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
