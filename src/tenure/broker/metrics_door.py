"""The door at which Prometheus reads the broker's metrics: ``GET /metrics`` over HTTP/1.1, on this machine's loopback address.

In a home of one's own it is open to whoever may connect to the port: names of tenants and what their leases use can be read
there, nothing can be changed. In one that all users share, who connects is looked up with the kernel (`uid_of`). Who wants it
from elsewhere puts a reverse proxy in front, with TLS and a password. Not here: what is said (`metrics`).
Bounded: connections (one too many is hung up on at once), the size of a request, how long it may take; one answer each.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable

from tenure.broker.book import LOG
from tenure.errors import Refused, SpecError
from tenure.meter.exposition import CONTENT_TYPE

HOST = "127.0.0.1"
MAX_CONNECTIONS = 16
MAX_REQUEST_BYTES = 8192
REQUEST_MAX_S = 5.0


class MetricsDoor:
    """Opens on a port, closes again. `text` is asked once per reading."""

    def __init__(self, text: Callable[[], bytes], *, may_read: Callable[[int], bool] = lambda uid: True) -> None:
        """may_read: whether a user of this machine, by its number, is told."""
        self._text, self._may_read = text, may_read
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        """0: it is closed."""

    async def open(self, port: int) -> None:
        """Listen on a port from now on, and no longer on another. Raises SpecError for none, Refused for one in use."""
        if not 1 <= port <= 65535:
            raise SpecError(f"the port for metrics must lie between 1 and 65535; found {port}")
        if port == self.port:
            return
        try:
            server = await asyncio.start_server(self._answer, HOST, port, limit=MAX_REQUEST_BYTES)
        except OSError as error:
            raise Refused(f"metrics cannot be read at {HOST}:{port}: {error.strerror}. Name another port.") from error
        await self.close()
        self._server, self.port = server, port
        LOG.info("metrics are read at http://%s:%d/metrics", HOST, port)

    async def close(self) -> None:
        """Listen no longer. Nothing happens when it does not."""
        server, self._server, self.port = self._server, None, 0
        if server is not None:
            server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            async with asyncio.timeout(REQUEST_MAX_S):
                uid = uid_of(writer.get_extra_info("peername"), writer.get_extra_info("sockname"))
                writer.write(await self._response(reader, may_read=self._may_read(uid)))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # it went away, or never said what it wants
        finally:
            self._open.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _response(self, reader: asyncio.StreamReader, *, may_read: bool) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large", b"the request is too long\n")
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path != b"/metrics":
            return _response("404 Not Found", b"metrics are at /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"metrics can only be read\n", "Allow: GET, HEAD\r\n")
        if not may_read:
            return _response("403 Forbidden", b"metrics are for root, admins of this home and the user prometheus\n")
        text = self._text()
        return _response("200 OK", text, f"Content-Type: {CONTENT_TYPE}\r\n", empty=method == b"HEAD")


def uid_of(peer: tuple[str, int], own: tuple[str, int]) -> int:
    """Return the user at the other end of a connection within this machine, as the kernel lists it (proc(5), /proc/net/tcp).

    peer, own: IPv4 address and port of either end. Returns -1 for one that is listed no more.
    """
    wanted = [f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}" for host, port in (peer, own)]
    with open("/proc/net/tcp") as listed:
        for line in listed:
            words = line.split()
            if words[1:3] == wanted:
                return int(words[7])
    return -1


def _response(status: str, body: bytes, fields: str = "", *, empty: bool = False) -> bytes:
    head = f"HTTP/1.1 {status}\r\n{fields}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if empty else body)
