"""Frames, streams and the writing half of HTTP/2 as a gRPC server uses it: what is sent, and what the windows keep here.

Not here: reading (`http2`). Sources: RFC 9113, 5.2 (flow control), 6 (frames), 7 (error codes).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from tenure.serve.http2_headers import Head

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FIRST_WINDOW = 65_535
"""Bytes a stream may send before it has been given room: the protocol's default, of which nothing is kept unasked."""
CONNECTION_WINDOW = 1 << 30
MAX_FRAME = 1 << 20
"""Longest DATA frame taken. Bodies come in few frames, and are copied piece by piece: no frame is ever held whole."""
MAX_WINDOW = (1 << 31) - 1
MAX_BLOCK = 16 << 10
"""Longest header block, and longest frame other than DATA."""
MAX_CONTROL = 10_000
"""Frames that ask for work and give none (PING, SETTINGS, empty DATA), between two calls of `refill`."""
MAX_RESETS = 2_000
"""Streams that a peer may open and reset in a burst; `refill` gives some back."""

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED = range(6)
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = range(6, 12)

FRAME = struct.Struct(">HBBBL")
PAIR = struct.Struct(">LL")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id) + payload


class Fault(Exception):
    """The peer broke the protocol: the connection is over."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Stream:
    """One request and its answer. Handlers add what they need in a subclass."""

    __slots__ = ("head", "held", "id", "recv_window", "remote_closed", "send_window", "trailers")

    def __init__(self, id: int, head: Head, send_window: int) -> None:
        self.id = id
        self.head = head
        self.recv_window = FIRST_WINDOW
        self.send_window = send_window
        self.remote_closed = False
        """Whether the peer has sent all it will."""
        self.held: deque[memoryview] | None = None
        """Answer bytes that no window was open for."""
        self.trailers: bytes | None = None
        """What ends the answer, once what is held is out."""


class Handler(Protocol):
    """What a connection calls; it raises nothing. `data` is for the duration of the call."""

    def make_stream(self, id: int, head: Head, send_window: int) -> Stream | None:
        """Return the stream of a new request; None refuses it (the peer may try again elsewhere)."""
        ...

    def opened(self, stream: Stream) -> None:
        """A request's header has come; its body follows unless `remote_closed`."""
        ...

    def data(self, stream: Stream, data: memoryview, start: int, stop: int, last: bool) -> None:
        """Body bytes data[start:stop] have come; `last`: no more will."""
        ...

    def reset(self, stream: Stream) -> None:
        """The stream has ended before it was answered: the peer gave up, or broke the protocol on it."""
        ...

    def closed(self, stream: Stream) -> None:
        """The stream is gone, for whatever reason."""
        ...


class Sender:
    """The writing half of a connection. `out` gathers what is to be written."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.streams: dict[int, Stream] = {}
        self.out: list[bytes] = []
        self.held_bytes = 0
        """Answer bytes kept because the peer's windows are shut."""
        self.last_id = 0
        self._goaway_id = MAX_WINDOW
        self._send_window = 65_535
        self._peer_window = 65_535
        self._peer_frame = 16_384
        self._shrunk = b""
        self._blocked: dict[int, Stream] = {}

    def open_window(self, stream: Stream, nbytes: int) -> None:
        """Let the peer send up to `nbytes` more on a stream; does nothing where it may already."""
        more = min(nbytes, MAX_WINDOW) - stream.recv_window
        if more > 0:
            stream.recv_window += more
            self.out.append(frame(WINDOW_UPDATE, 0, stream.id, more.to_bytes(4, "big")))

    def respond(self, stream: Stream, block: bytes, parts: Sequence[bytes | memoryview], nbytes: int, trailers: bytes) -> None:
        """Answer in one go: header block, body (`parts`, `nbytes` together), trailer block. Ends the stream."""
        if nbytes > stream.send_window or nbytes > self._send_window or self._shrunk:
            self.send_headers(stream, block)
            self.send_data(stream, parts)
            self.send_trailers(stream, trailers)
            return
        id = stream.id
        stream.send_window -= nbytes
        self._send_window -= nbytes
        head, tail = len(block), len(trailers)
        if nbytes <= self._peer_frame:
            body: Sequence[bytes | memoryview] = (FRAME.pack(nbytes >> 8, nbytes & 0xFF, DATA, 0, id), *parts)
        else:
            body = self._framed(id, parts, nbytes)
        self.out.append(
            b"".join(
                (
                    FRAME.pack(head >> 8, head & 0xFF, HEADERS, END_HEADERS, id),
                    block,
                    *body,
                    FRAME.pack(tail >> 8, tail & 0xFF, HEADERS, END_HEADERS | END_STREAM, id),
                    trailers,
                )
            )
        )
        self._close(stream)

    def _framed(self, id: int, parts: Sequence[bytes | memoryview], nbytes: int) -> list[bytes | memoryview]:
        """Return a body cut into DATA frames, uncopied."""
        pieces: list[bytes | memoryview] = []
        room = 0
        for part in parts:
            if not len(part):
                continue
            view, at = memoryview(part).cast("B"), 0
            while at < len(view):
                if not room:
                    room = min(nbytes, self._peer_frame)
                    nbytes -= room
                    pieces.append(FRAME.pack(room >> 8, room & 0xFF, DATA, 0, id))
                size = min(room, len(view) - at)
                pieces.append(view[at : at + size])
                at += size
                room -= size
        return pieces

    def send_headers(self, stream: Stream, block: bytes, *, last: bool = False) -> None:
        """Send a header block; `last` ends the stream."""
        if self._shrunk:
            block, self._shrunk = self._shrunk + block, b""
        self.out.append(frame(HEADERS, END_HEADERS | (END_STREAM if last else 0), stream.id, block))
        if last:
            self._close(stream)

    def send_data(self, stream: Stream, parts: Sequence[bytes | memoryview]) -> None:
        """Send body bytes as far as the windows are open, and keep a copy of the rest."""
        body = memoryview(parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts))
        if not stream.held:
            body = self._send(stream, body)
        if body:
            if stream.held is None:
                stream.held = deque()
            stream.held.append(body)
            self.held_bytes += len(body)
            self._blocked[stream.id] = stream

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """End the stream with a trailer block, after what is kept of its body."""
        if stream.held:
            stream.trailers = block
        else:
            self.send_headers(stream, block, last=True)

    def drop(self, stream: Stream) -> None:
        """Forget a stream of which nothing more will be read or written."""
        self._forget(stream)
        self._handler.reset(stream)

    def end_stream(self, stream: Stream, code: int) -> None:
        """Reset a stream."""
        self.out.append(frame(RST_STREAM, 0, stream.id, code.to_bytes(4, "big")))
        self.drop(stream)

    def ping(self) -> None:
        """Ask the peer for a sign of life; `acked` counts the answers."""
        self.out.append(frame(PING, 0, 0, b"tenure\0\0"))

    def go_away(self, *, last: bool) -> None:
        """Ask the peer to open no more streams; `last`: later ones are ignored from here on."""
        if last:
            self._goaway_id = self.last_id
        self.out.append(frame(GOAWAY, 0, 0, PAIR.pack(self._goaway_id, NO_ERROR)))

    def _send(self, stream: Stream, body: memoryview) -> memoryview:
        """Send what the windows take; return the rest."""
        room = min(len(body), stream.send_window, self._send_window)
        if room <= 0:
            return body
        self.out.append(b"".join(self._framed(stream.id, (body[:room],), room)))
        stream.send_window -= room
        self._send_window -= room
        return body[room:]

    def _pump(self) -> None:
        """Send what was kept, a stream after the other, one that got little first."""
        for stream in list(self._blocked.values()):
            held = stream.held
            while held:
                before = len(held[0])
                rest = self._send(stream, held[0])
                self.held_bytes -= before - len(rest)
                if rest:
                    held[0] = rest
                    break
                held.popleft()
            if not held:
                del self._blocked[stream.id]
                if stream.trailers is not None:
                    self.send_headers(stream, stream.trailers, last=True)
            if self._send_window <= 0:
                break

    def _close(self, stream: Stream) -> None:
        """The answer is out. A peer that is still sending is told that the rest is not wanted."""
        self._forget(stream)
        if not stream.remote_closed:
            self.out.append(frame(RST_STREAM, 0, stream.id, NO_ERROR.to_bytes(4, "big")))

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        self._handler.closed(stream)
        if stream.held:
            self.held_bytes -= sum(map(len, stream.held))
            stream.held = None
            self._blocked.pop(stream.id, None)
