"""One HTTP/2 connection of a client: many requests at once, each one send of ready frames, their answers read over.

Of answers only the end counts: what they hold goes by unread. Source: RFC 9113 (frames, streams, windows).
Not here: what the frames of a call are (`grpc_message`), which connection is used (`grpc_wire`), the server's side (`http2`).
"""

from __future__ import annotations

import socket
import time
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import Protocol

from tenure.errors import Unavailable
from tenure.serve.http2_headers import Malformed
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
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)
from tenure.serve.load.grpc_message import Message, StatusReader
from tenure.serve.load.loop import Loop
from tenure.serve.load.records import Outcome

_DEFAULT_FRAME = 16_384
_LONGEST_FRAME = 1 << 20
_LAST_ID = 1 << 30
_SETTINGS_PAIR = 6
_TABLE_SIZE, _PUSH, _STREAMS, _WINDOW, _FRAME_SIZE = range(1, 6)


class Owner(Protocol):
    """What a connection shares with the others of its wire."""

    address: str
    loop: Loop
    scratch: bytearray
    view: memoryview


class Connection:
    """One HTTP/2 connection of a client."""

    def __init__(self, wire: Owner, opened: socket.socket) -> None:
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
        self._statuses = StatusReader()
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
        found = self._statuses.known.get(block)
        if found is None:
            try:
                found = self._statuses.read(block)
            except Malformed as error:
                self.lost(str(error))
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
            code = int.from_bytes(payload, "big")
            if code == REFUSED_STREAM and stream_id in self.streams:  # some count a stream for a while after its end
                self.max_streams = max(1, min(self.max_streams, len(self.streams) - 1))
            self._fail(stream_id, f"the server reset the stream (HTTP/2 error {code})", begun=code != REFUSED_STREAM)
        elif kind == GOAWAY:
            self.leaving = True
            last_id = int.from_bytes(payload[:4], "big") & MAX_WINDOW
            for later in [each for each in self.streams if each > last_id]:
                self._fail(later, "the server is leaving and did not take the request", begun=False)

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
                self._max_frame = max(_DEFAULT_FRAME, min(value, _LONGEST_FRAME))
            elif name == _WINDOW:
                for blocked in self._blocked.values():
                    blocked.window += value - self._first_window
                self._first_window = value
        self.settled = True
        self._out.append(frame(SETTINGS, ACK, 0))
        if self._blocked:
            self._pump()

    # The end

    def _fail(self, stream_id: int, reason: str, *, begun: bool = True) -> None:
        """End a request without an answer. begun: whether the server may have done something for it already."""
        index = self.streams.pop(stream_id, None)
        if index is not None:
            del self._ids[index]
            self._answered.discard(stream_id)
            self._blocked.pop(stream_id, None)
            if begun:
                self._wire.loop.fail(index, reason)
            else:
                self._wire.loop.send_again(index, reason)

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
