"""gRPC as the load generator speaks it: HTTP/2 with many requests on few connections, each one send of ready frames.

    request ── template of its frames, the stream's number written in ──► socket
    answer  ── HEADERS, DATA, HEADERS ──► its last header block, known by its bytes ──► ended so

What an answer holds is counted and not kept. The server is asked to keep no table of headers, so that equal blocks mean the
same and are decoded once. Not here: the server's side (`http2`).
Sources: RFC 9113 (frames, windows), RFC 7541 (header blocks), gRPC over HTTP/2 (message prefix, status).
"""

from __future__ import annotations

import socket
import time
from errno import EINPROGRESS
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import Any
from urllib.parse import unquote

import hpack

from tenure.errors import Unavailable
from tenure.serve import v2
from tenure.serve.codec_infer import encode_varint
from tenure.serve.http2_send import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    FRAME,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    MAX_BLOCK,
    MAX_WINDOW,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)
from tenure.serve.load.http_wire import SCRATCH_BYTES, connected
from tenure.serve.load.loop import Loop
from tenure.serve.load.records import Outcome

_DEFAULT_FRAME = 16_384
_LAST_ID = 1 << 30
_KNOWN_BLOCKS = 64
_KNOWN_BYTES = 512
_SETTINGS_PAIR = 6
_TABLE_SIZE, _PUSH, _STREAMS, _WINDOW, _FRAME_SIZE = 1, 2, 3, 4, 5


class Message:
    """One request, as a gRPC message, and its frames ready to be sent."""

    __slots__ = ("_block", "_templates", "body", "nbytes")

    def __init__(self, block: bytes, message: bytes) -> None:
        self._block = block
        self.body = b"\0" + len(message).to_bytes(4, "big") + message
        self.nbytes = len(self.body)
        self._templates: dict[int, tuple[bytearray, tuple[int, ...]]] = {}

    def headers(self, stream_id: int) -> bytes:
        """Return the frame that opens a stream."""
        return frame(HEADERS, END_HEADERS, stream_id, self._block)

    def template(self, max_frame: int) -> tuple[bytearray, tuple[int, ...]]:
        """Return all frames of a stream, and where in them its number belongs."""
        found = self._templates.get(max_frame)
        if found is None:
            frames, places = bytearray(self.headers(0)), [5]
            for at in range(0, self.nbytes, max_frame):
                part = self.body[at : at + max_frame]
                places.append(len(frames) + 5)
                frames += frame(DATA, END_STREAM if at + max_frame >= self.nbytes else 0, 0, part)
            found = self._templates[max_frame] = (frames, tuple(places))
        return found


def header_block(authority: str) -> bytes:
    """Return the header block of ModelInfer, which changes no table: literals without indexing, RFC 7541, 6.2.2."""
    named = {
        b":path": f"/{v2.SERVICE}/ModelInfer".encode(),
        b":authority": authority.encode(),
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"user-agent": b"tenure-load",
    }
    block = b"\x83\x86"  # :method POST and :scheme http, from the static table
    for name, value in named.items():
        block += b"\x00" + _string(name) + _string(value)
    return block


class GrpcWire:
    """Connections to one gRPC server. See `loop.Wire`."""

    def __init__(self, host: str, port: int, *, connections: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self.address = f"grpc://{host}:{port}"
        self._connections = connections
        self._address: Any = None
        self._family = socket.AF_INET
        self.scratch = bytearray(SCRATCH_BYTES)
        self.view = memoryview(self.scratch)
        self._all: list[Connection] = []
        self._turn = 0
        self.loop: Loop

    def open(self, loop: Loop) -> None:
        """See Wire."""
        self.loop = loop
        for _ in range(self._connections):
            opened = connected(self._host, self._port, self._timeout_s)
            self._address, self._family = opened.getpeername(), opened.family
            connection = Connection(self, opened)
            self._all.append(connection)
            connection.settle(self._timeout_s)

    def try_send(self, index: int, request: Message) -> bool:
        """See Wire. The connections take turns."""
        connections = self._all
        for _ in connections:
            self._turn = turn = (self._turn + 1) % len(connections)
            connection = connections[turn]
            if connection.leaving:
                connection = connections[turn] = self._replaced(connection)
            if len(connection.streams) < connection.max_streams:
                connection.send(index, request)
                return True
        return False

    def _replaced(self, old: Connection) -> Connection:
        opened = socket.socket(self._family, socket.SOCK_STREAM)
        opened.setblocking(False)
        code = opened.connect_ex(self._address)
        connection = Connection(self, opened)
        if code not in (0, EINPROGRESS):
            connection.lost(f"no connection: {OSError(code, '').strerror or code}")
        return connection

    def give_up(self, index: int) -> None:
        """See Wire."""
        for connection in self._all:
            if connection.give_up(index):
                return

    def close(self) -> None:
        """See Wire."""
        for connection in self._all:
            connection.close()


class Connection:
    """One HTTP/2 connection of a client."""

    def __init__(self, wire: GrpcWire, opened: socket.socket) -> None:
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wire, self._socket, self.fd = wire, opened, opened.fileno()
        self.streams: dict[int, int] = {}
        """The request on each stream."""
        self._ids: dict[int, int] = {}
        """The stream of each request."""
        self._answered: set[int] = set()
        """Streams of which a message has begun to come."""
        self.max_streams = 100
        """Until the server has said how many it takes."""
        self.leaving = False
        """Whether nothing more is to be sent here."""
        self.settled = False
        self._next_id = 1
        self._window = FIRST_WINDOW
        self._first_window = FIRST_WINDOW
        self._max_frame = _DEFAULT_FRAME
        self._blocked: dict[int, _Blocked] = {}
        self._taken = 0
        """Bytes of answers since the connection's window was last opened."""
        self._skip = 0
        """Bytes that are left of a DATA frame."""
        self._kept = b""
        self._block: list[bytes] = []
        self._block_id = self._block_flags = 0
        self._decoder = hpack.Decoder()
        self._known: dict[bytes, tuple[int, str]] = {}
        self._out: list[bytes] = [
            PREFACE,
            frame(SETTINGS, 0, 0, b"".join(_setting(*pair) for pair in ((_TABLE_SIZE, 0), (_PUSH, 0), (_WINDOW, MAX_WINDOW)))),
            frame(WINDOW_UPDATE, 0, 0, (MAX_WINDOW - FIRST_WINDOW).to_bytes(4, "big")),
        ]
        wire.loop.watch(self.fd, self.ready, EPOLLIN | EPOLLOUT)
        self._writing = True

    def settle(self, timeout_s: float) -> None:
        """Wait for the server's settings. Raises Unavailable."""
        ends_at_s = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        try:
            self.ready(EPOLLOUT)
            while not self.settled and not self.leaving and (left_s := ends_at_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                self.ready(EPOLLIN | EPOLLOUT)
        finally:
            if self.fd >= 0:
                self._socket.setblocking(False)
        if not self.settled:
            raise Unavailable(f"{self._wire.address} does not speak gRPC (HTTP/2 with prior knowledge): no settings came")

    # Sending

    def send(self, index: int, message: Message) -> None:
        """Open a stream for a request and send as much of it as the windows take."""
        stream_id = self._next_id
        self._next_id = stream_id + 2
        if stream_id >= _LAST_ID:
            self.leaving = True
        self.streams[stream_id] = index
        self._ids[index] = stream_id
        if message.nbytes > self._window or message.nbytes > self._first_window or self._blocked:
            self._out.append(message.headers(stream_id))
            self._blocked[stream_id] = _Blocked(memoryview(message.body), self._first_window)
            self._pump()
            self._write()
            return
        self._window -= message.nbytes
        frames, places = message.template(self._max_frame)
        name = stream_id.to_bytes(4, "big")
        for at in places:
            frames[at : at + 4] = name
        if self._out:
            self._out.append(bytes(frames))
            self._write()
            return
        try:
            sent = self._socket.send(frames)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.lost(str(error.strerror))
            return
        if sent < len(frames):
            self._out.append(bytes(memoryview(frames)[sent:]))
            self._watch_writing(True)

    def give_up(self, index: int) -> bool:
        """Cancel a request; return whether it was here."""
        stream_id = self._ids.pop(index, 0)
        if not stream_id:
            return False
        del self.streams[stream_id]
        self._answered.discard(stream_id)
        self._blocked.pop(stream_id, None)
        self._out.append(frame(RST_STREAM, 0, stream_id, CANCEL.to_bytes(4, "big")))
        self._write()
        return True

    def _pump(self) -> None:
        """Frame what the windows take of the requests that wait for them."""
        for stream_id, blocked in list(self._blocked.items()):
            while blocked.body and (room := min(len(blocked.body), blocked.window, self._window, self._max_frame)) > 0:
                part, blocked.body = blocked.body[:room], blocked.body[room:]
                blocked.window -= room
                self._window -= room
                self._out.append(frame(DATA, 0 if blocked.body else END_STREAM, stream_id, bytes(part)))
            if not blocked.body:
                del self._blocked[stream_id]

    def _write(self) -> None:
        out = self._out
        if out and self.fd >= 0:
            data = out[0] if len(out) == 1 else b"".join(out)
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.lost(str(error.strerror))
                return
            self._out = [data[sent:]] if sent < len(data) else []
        self._watch_writing(bool(self._out))

    def _watch_writing(self, wanted: bool) -> None:
        if wanted != self._writing and self.fd >= 0:
            self._writing = wanted
            self._wire.loop.expect(self.fd, EPOLLIN | EPOLLOUT if wanted else EPOLLIN)

    # Reading

    def ready(self, events: int) -> None:
        """Write what waits, read what has come."""
        if events & EPOLLOUT:
            self._write()
        if not events & (EPOLLIN | EPOLLHUP | EPOLLERR) or self.fd < 0:
            return
        wire = self._wire
        scratch, kept = wire.scratch, len(self._kept)
        if kept:
            scratch[:kept] = self._kept
            self._kept = b""
        try:
            size = self._socket.recv_into(wire.view[kept:] if kept else scratch)
        except BlockingIOError:
            self._kept = bytes(wire.view[:kept])
            return
        except OSError as error:
            self.lost(str(error.strerror))
            return
        if not size:
            self.lost("the connection was closed before the answer was complete")
            return
        self._receive(kept + size)
        if self._out:
            self._write()

    def _receive(self, end: int) -> None:
        wire, unpack = self._wire, FRAME.unpack_from
        scratch, view, at = wire.scratch, wire.view, self._skip
        if at > end:
            self._skip = at - end
            return
        self._skip = 0
        while end - at >= 9:
            high, low, kind, flags, stream_id = unpack(scratch, at)
            length = high << 8 | low
            stop = at + 9 + length
            if kind == DATA:
                self._data(length, flags, stream_id)
                if stop > end:
                    self._skip = stop - end
                    return
            else:
                if length > MAX_BLOCK:
                    self.lost(f"the server sent a frame of {length} bytes that is no part of an answer's body")
                    return
                if stop > end:
                    break
                if kind == HEADERS and flags & END_HEADERS and not flags & (PADDED | HAS_PRIORITY):
                    self._headers(stream_id, bytes(view[at + 9 : stop]), flags)
                else:
                    self._other(kind, flags, stream_id, bytes(view[at + 9 : stop]))
            if self.fd < 0:
                return
            at = stop
        self._kept = bytes(view[at:end]) if at < end else b""

    def _data(self, length: int, flags: int, stream_id: int) -> None:
        self._taken += length
        if self._taken > MAX_WINDOW // 2:
            self._out.append(frame(WINDOW_UPDATE, 0, 0, self._taken.to_bytes(4, "big")))
            self._taken = 0
        if stream_id in self.streams:
            if length:
                self._answered.add(stream_id)
            if flags & END_STREAM:
                self._fail(stream_id, "the answer ended without a gRPC status")

    def _headers(self, stream_id: int, block: bytes, flags: int) -> None:
        found = self._known.get(block)
        if found is None:
            found = self._decoded(block)
            if found is None:
                return
        if not flags & END_STREAM:
            return
        index = self.streams.pop(stream_id, None)
        if index is None:
            return  # given up meanwhile
        del self._ids[index]
        status, reason = found
        if self._blocked:
            self._blocked.pop(stream_id, None)
        if status == 0 and stream_id in self._answered:
            self._answered.discard(stream_id)
            self._wire.loop.finish(index, Outcome.OK)
        else:
            self._answered.discard(stream_id)
            self._wire.loop.fail(index, reason if status else "the answer holds no message")

    def _decoded(self, block: bytes) -> tuple[int, str] | None:
        """Return gRPC status (-1: none) and, where it isn't 0, the reason in words; None when the connection is lost."""
        entries = self._decoder.header_table.dynamic_entries
        before = len(entries), entries[0] if entries else None
        try:
            fields = {bytes(name): bytes(value) for name, value in self._decoder.decode(block, raw=True)}
        except (hpack.HPACKError, IndexError, ValueError) as error:
            self.lost(f"a header block cannot be decoded: {error}")
            return None
        told = fields.get(b"grpc-status", b"-1")
        status = int(told) if told.isdigit() else -1
        reason = unquote(fields.get(b"grpc-message", b"").decode(errors="replace"))
        if status < 0:
            reason = f"no gRPC status came, but HTTP {fields.get(b':status', b'?').decode(errors='replace')}"
        found = (status, "" if status == 0 else f"gRPC status {status}: {reason}"[:200])
        entries = self._decoder.header_table.dynamic_entries
        if (len(entries), entries[0] if entries else None) != before:
            self._known.clear()
        elif len(block) <= _KNOWN_BYTES and not 0x20 <= block[0] < 0x40:  # a block that begins so also sizes the table
            if len(self._known) >= _KNOWN_BLOCKS:
                self._known.clear()
            self._known[block] = found
        return found

    def _other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind in (HEADERS, CONTINUATION):
            self._long_headers(kind, flags, stream_id, payload)
        elif kind == WINDOW_UPDATE and len(payload) == 4:
            more = int.from_bytes(payload, "big") & MAX_WINDOW
            if not stream_id:
                self._window += more
            elif stream_id in self._blocked:
                self._blocked[stream_id].window += more
            if self._blocked:
                self._pump()
        elif kind == SETTINGS:
            self._settings(flags, payload)
        elif kind == PING and not flags & ACK:
            self._out.append(frame(PING, ACK, 0, payload))
        elif kind == RST_STREAM and len(payload) == 4:
            self._fail(stream_id, f"the server reset the stream (HTTP/2 error {int.from_bytes(payload, 'big')})")
        elif kind == GOAWAY:
            self.leaving = True
            last_id = int.from_bytes(payload[:4], "big") & MAX_WINDOW
            for later in [each for each in self.streams if each > last_id]:
                self._fail(later, "the server is leaving and did not take the request")

    def _long_headers(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Take a header block that is padded or comes in several frames."""
        if kind == HEADERS:
            start, stop = 0, len(payload)
            if flags & PADDED:
                start, stop = 1, stop - payload[0]
            self._block, self._block_flags = [payload[start + (5 if flags & HAS_PRIORITY else 0) : stop]], flags
        else:
            self._block.append(payload)
        if sum(map(len, self._block)) > MAX_BLOCK:
            self.lost(f"the server sent a header block of more than {MAX_BLOCK} bytes")
        elif flags & END_HEADERS:
            self._headers(stream_id, b"".join(self._block), self._block_flags)

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            return
        if not self.settled:
            self.max_streams = MAX_WINDOW  # what the protocol says where the server says nothing
        for at in range(0, len(payload) - _SETTINGS_PAIR + 1, _SETTINGS_PAIR):
            name, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if name == _STREAMS:
                self.max_streams = value
            elif name == _FRAME_SIZE:
                self._max_frame = max(_DEFAULT_FRAME, min(value, 1 << 20))
            elif name == _WINDOW:
                for blocked in self._blocked.values():
                    blocked.window += value - self._first_window
                self._first_window = value
        self.settled = True
        self._out.append(frame(SETTINGS, ACK, 0))
        if self._blocked:
            self._pump()

    # The end

    def _fail(self, stream_id: int, reason: str) -> None:
        index = self.streams.pop(stream_id, None)
        if index is not None:
            del self._ids[index]
            self._answered.discard(stream_id)
            self._blocked.pop(stream_id, None)
            self._wire.loop.fail(index, reason)

    def lost(self, reason: str) -> None:
        """The connection is gone, and what was on it has failed."""
        self.close()
        for stream_id in list(self.streams):
            self._fail(stream_id, reason)

    def close(self) -> None:
        """Close it, whatever is under way."""
        self.leaving = True
        if self.fd >= 0:
            self._wire.loop.unwatch(self.fd)
            self.fd = -1
            self._socket.close()


class _Blocked:
    """A request that is longer than the windows are open."""

    __slots__ = ("body", "window")

    def __init__(self, body: memoryview, window: int) -> None:
        self.body = body
        self.window = window


def _setting(name: int, value: int) -> bytes:
    return name.to_bytes(2, "big") + value.to_bytes(4, "big")


def _string(value: bytes) -> bytes:
    """Return a literal of a header block, not Huffman-coded (RFC 7541, 5.2)."""
    if len(value) < 127:
        return bytes((len(value),)) + value
    return b"\x7f" + encode_varint(len(value) - 127) + value
