"""One client's connection to the gRPC door: its socket, by asyncio's buffered protocol, and what it has not taken yet.

Bytes are read to one buffer that all connections share, and from there to where they belong, or straight to that place.
Not here: what the bytes mean (`http2`, `grpc_calls`), accepting and time (`grpc`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tenure.serve.grpc_calls import Calls
from tenure.serve.grpc_request import Request

if TYPE_CHECKING:
    from tenure.serve.grpc import GrpcDoor

DIRECT_BYTES = 16 << 10
"""From here on, what is missing of a DATA frame is read from the socket straight to its buffer."""

JOIN_BYTES = 64 << 10
"""Up to here, answers are joined to be written at once: copying them costs less than handing them on one by one."""


class GrpcConnection(Calls, asyncio.BufferedProtocol):
    """Protocol of one connection."""

    def __init__(self, door: GrpcDoor) -> None:
        super().__init__(door)
        self.transport: Any = None
        self.kept = b""
        """The start of a frame of which the rest has not come."""
        self.seen = True
        """Whether bytes came since the door last looked."""
        self.paused = False
        """Whether the peer does not read what is sent to it."""
        self.pinged = False
        """Whether the peer, which has been silent, was asked whether it is still there."""
        self.opened_s = self.last_seen_s = self.progress_s = door.now_s()
        self.unsent = 0
        self.dirty = False
        self.stuck_s: float | None = None
        """Since when the door has seen the same frame unfinished, and after how many others."""
        self.stuck_at = 0
        self._direct: Request | None = None

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self.transport = transport
        if self._door.admit(self):
            transport.set_write_buffer_limits(high=256 << 10)
            self.flush()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio. Whatever waited here is cancelled."""
        self._door.dismiss(self)
        self.abandon()

    def pause_writing(self) -> None:
        """See asyncio. A peer that does not read is not read from."""
        self.paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """See asyncio."""
        self.paused = False
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio: the door's shared buffer, or where the missing part of a long DATA frame belongs."""
        h2 = self.h2
        if h2.data_left >= DIRECT_BYTES:
            stream = h2.data_stream
            if stream is not None and h2.streams.get(stream.id) is stream:
                assert isinstance(stream, Request)
                room = min(h2.data_left, stream.stop - stream.at)
                if stream.view is not None and room >= DIRECT_BYTES:
                    self._direct = stream
                    return stream.view[stream.at : stream.at + room]
        self._direct = None
        shared, kept = self._door.shared, len(self.kept)
        if kept:
            shared[:kept] = self.kept
            return shared[kept:]
        return shared

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self.seen = True
        stream = self._direct
        if stream is not None:
            self._direct = None
            stream.at += nbytes
            last = self.h2.advance(nbytes)
            if last or stream.at == stream.stop:
                self.take(stream, self._door.shared, 0, 0, last)
        else:
            shared = self._door.shared
            end = len(self.kept) + nbytes
            used = self.h2.receive(shared, end)
            self.kept = bytes(shared[used:end]) if used < end else b""
        self.flush()

    def eof_received(self) -> bool:
        """See asyncio: a peer that sends nothing more gets nothing more."""
        return False

    def flush(self) -> None:
        """Write what has gathered."""
        self.dirty = False
        out, transport = self.h2.out, self.transport
        if transport.is_closing():
            out.clear()
            return
        if out:
            if len(out) == 1:
                transport.write(out[0])
            elif sum(map(len, out)) < JOIN_BYTES:
                transport.write(b"".join(out))
            else:
                transport.writelines(out)
            out.clear()
        unsent = self.h2.held_bytes + transport.get_write_buffer_size()
        if unsent or self.unsent:
            self._door.account(self, unsent)
        if self.h2.fault is not None:
            transport.close()

    def is_idle(self, now_s: float, for_s: float) -> bool:
        """Whether no call is open here, nothing has come for so long, and nothing is half read or not yet taken."""
        quiet = not self.seen and now_s - self.last_seen_s >= for_s
        return quiet and not (self.h2.streams or self.kept or self.h2.midway or self.unsent)

    def leave(self) -> None:
        """Tell the client which calls were taken on, and close: it may come back, and has lost none."""
        self.h2.go_away(last=True)
        self.flush()
        self.transport.close()

    def mark(self) -> None:
        """See Calls."""
        if not self.dirty:
            self.dirty = True
            self._door.flush_soon(self)
