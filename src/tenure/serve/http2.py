"""The server's side of HTTP/2 as gRPC uses it: bytes in, calls to a handler and bytes out. No sockets, no clock, no gRPC.

    owner ── receive(bytes) ──► Connection ── opened / data / reset ──► handler
    owner ◄── out: list of bytes ── respond / send_* / reset ◄───────── handler

What one peer can make it keep is bounded: one header block, `max_streams` streams, and answers its windows do not take.
Windows of streams open when the handler says so (`open_window`), for it knows whether there is memory for a body.
Not offered: push, priorities (read and ignored), extended CONNECT. Sources: RFC 9113 (frames, streams, flow control),
RFC 7541 (header compression, done by the hpack library).
"""

from __future__ import annotations

import struct

from tenure.serve.http2_headers import HeaderReader, Malformed
from tenure.serve.http2_send import (
    ACK,
    COMPRESSION_ERROR,
    CONNECTION_WINDOW,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    MAX_BLOCK,
    MAX_CONTROL,
    MAX_FRAME,
    MAX_RESETS,
    MAX_WINDOW,
    PADDED,
    PAIR,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Fault,
    Handler,
    Sender,
    Stream,
    frame,
)

_SETTING = struct.Struct(">HL")


class Connection(Sender):
    """State of one connection. `fault` is set when nothing more is to be read."""

    def __init__(self, handler: Handler, *, max_streams: int = 1024) -> None:
        super().__init__(handler)
        self._max_streams = max_streams
        self.fault: Fault | None = None
        self.greeted = self.settled = False
        """Whether the peer's preface, and its first SETTINGS, have come."""
        self.frames = 0
        """Frames other than DATA so far."""
        self.acked = 0
        """PING frames of ours that the peer has answered."""
        self._reader = HeaderReader(MAX_BLOCK)
        self._blocks = self._reader.known
        self._partial: list[bytes] = []
        self._partial_id = self._partial_flags = self._partial_bytes = 0
        self._recv_window = CONNECTION_WINDOW
        self._control = MAX_CONTROL
        self._resets = MAX_RESETS
        self.data_left = 0
        """Body bytes of the DATA frame being read that have not come yet."""
        self.data_stream: Stream | None = None
        """Whose they are; None: nobody wants them."""
        self._data_last = False
        self._pad_left = 0
        settings = ((3, max_streams), (5, MAX_FRAME), (6, MAX_BLOCK))
        self.out.append(frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in settings)))
        self.out.append(frame(WINDOW_UPDATE, 0, 0, (CONNECTION_WINDOW - 65_535).to_bytes(4, "big")))

    # Reading

    def receive(self, data: memoryview, end: int) -> int:
        """Take data[:end]; return how much was used. The rest starts the next call's data. Sets `fault` on a wrong peer."""
        try:
            return self._receive(data, end)
        except Fault as fault:
            self.fail(fault)
            return end

    def fail(self, fault: Fault) -> None:
        """End the connection, giving the reason."""
        if self.fault is None:
            self.fault = fault
            self.out.append(frame(GOAWAY, 0, 0, PAIR.pack(self.last_id, fault.code) + str(fault).encode()[:200]))

    def _receive(self, data: memoryview, end: int) -> int:
        at = 0
        if not self.greeted:
            if data[: min(end, 24)] != PREFACE[:end]:
                raise Fault(PROTOCOL_ERROR, "this port speaks gRPC (HTTP/2 with prior knowledge); the preface is another")
            if end < 24:
                return 0
            self.greeted, at = True, 24
        while self.fault is None:
            if self.data_left or self._pad_left:
                stop = min(end, at + self.data_left)
                if stop > at or self._pad_left:
                    at = self._more_data(data, at, stop, end)
                if at >= end:
                    return at
                continue
            if end - at < 9:
                return at
            high, low, kind, flags, stream_id = FRAME.unpack_from(data, at)
            length = high << 8 | low
            if kind == DATA:
                start = at + 9
                if flags & PADDED:
                    if end <= start:
                        return at
                    start += 1
                stream = self._data_frame(length, flags, stream_id, data[at + 9] if flags & PADDED else -1)
                stop = start + self.data_left
                at = start
                if stop + self._pad_left <= end:  # the usual case: the frame is here whole
                    at = stop + self._pad_left
                    self.data_left = self._pad_left = 0
                    self.data_stream = None
                    if stream is not None:
                        if self._data_last:
                            stream.remote_closed = True
                        self._handler.data(stream, data, start, stop, self._data_last)
                continue
            if length > MAX_BLOCK:
                raise Fault(FRAME_SIZE_ERROR, f"a frame of type {kind} has {length} bytes; at most {MAX_BLOCK} are taken")
            if end - at - 9 < length:
                return at
            at += 9
            self.frames += 1
            if kind == HEADERS and not self._partial_id:
                self._headers_frame(data[at : at + length], flags, stream_id)
            elif kind == WINDOW_UPDATE and length == 4 and self.settled and not self._partial_id:
                self._window_update(stream_id, int.from_bytes(data[at : at + 4], "big") & MAX_WINDOW)
            else:
                self._other(kind, flags, stream_id, bytes(data[at : at + length]))
            at += length
        return end

    def _data_frame(self, length: int, flags: int, stream_id: int, pad: int) -> Stream | None:
        """Account for a DATA frame whose first bytes are here; set what its payload is for."""
        if length > MAX_FRAME:
            raise Fault(FRAME_SIZE_ERROR, f"a DATA frame has {length} bytes; at most {MAX_FRAME} are taken")
        if pad >= length:
            raise Fault(PROTOCOL_ERROR, "a DATA frame is padded beyond its end")
        if self._partial_id or not self.settled:
            raise Fault(PROTOCOL_ERROR, "a DATA frame came where another had to")
        self._recv_window -= length
        if self._recv_window < CONNECTION_WINDOW // 2:
            if self._recv_window < 0:
                raise Fault(FLOW_CONTROL_ERROR, "more was sent than the connection's window allows")
            self.out.append(frame(WINDOW_UPDATE, 0, 0, (CONNECTION_WINDOW - self._recv_window).to_bytes(4, "big")))
            self._recv_window = CONNECTION_WINDOW
        stream = self.streams.get(stream_id)
        if not length:
            self._spend_control()
        if stream is None:
            if stream_id > self.last_id or not stream_id & 1:
                raise Fault(PROTOCOL_ERROR, f"DATA on stream {stream_id}, which was never opened")
        elif stream.remote_closed:
            self.end_stream(stream, STREAM_CLOSED)
            stream = None
        else:
            stream.recv_window -= length
            if stream.recv_window < 0:
                self.end_stream(stream, FLOW_CONTROL_ERROR)
                stream = None
            elif pad >= 0:  # padding takes window and no memory: given back at once
                self.open_window(stream, stream.recv_window + pad + 1)
        self.data_stream = stream
        self.data_left = length if pad < 0 else length - 1 - pad
        self._pad_left = max(pad, 0)
        self._data_last = bool(flags & END_STREAM)
        return stream

    def _more_data(self, data: memoryview, at: int, stop: int, end: int) -> int:
        """Hand on data[at:stop] of a DATA frame that comes in pieces, skip its padding; return where that ends."""
        stream = self.data_stream
        if stop > at:
            last = self.advance(stop - at)
            if stream is not None and self.streams.get(stream.id) is stream:
                self._handler.data(stream, data, at, stop, last)
        if not self.data_left and self._pad_left:
            skipped = min(end - stop, self._pad_left)
            self._pad_left -= skipped
            stop += skipped
            if not self._pad_left and self._data_last and stream is not None and self.streams.get(stream.id) is stream:
                stream.remote_closed = True
                self._handler.data(stream, data, stop, stop, True)
        return stop

    def advance(self, nbytes: int) -> bool:
        """Count body bytes of the DATA frame being read as taken; return whether the stream's body ends with them.

        For an owner that reads them from the socket to where they belong, `data_left` at most.
        """
        self.data_left -= nbytes
        last = self._data_last and not self.data_left and not self._pad_left
        if last and self.data_stream is not None:
            self.data_stream.remote_closed = True
        return last

    def _headers_frame(self, payload: memoryview, flags: int, stream_id: int) -> None:
        start, stop = 0, len(payload)
        if flags & PADDED:
            if not stop or payload[0] >= stop:
                raise Fault(PROTOCOL_ERROR, "a HEADERS frame is padded beyond its end")
            start, stop = 1, stop - payload[0]
        if flags & HAS_PRIORITY:
            start += 5
        if start > stop:
            raise Fault(FRAME_SIZE_ERROR, "a HEADERS frame ends inside its fields")
        if not stream_id & 1:
            raise Fault(PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")
        block = bytes(payload[start:stop])
        if flags & END_HEADERS:
            self._headers(stream_id, block, bool(flags & END_STREAM))
        else:
            self._partial, self._partial_id, self._partial_flags, self._partial_bytes = [block], stream_id, flags, len(block)

    def _headers(self, stream_id: int, block: bytes, last: bool) -> None:
        head = self._blocks.get(block)
        if head is None:
            if not self.settled:
                raise Fault(PROTOCOL_ERROR, "the first frame must be SETTINGS")
            try:
                head = self._reader.read(block)
            except Malformed as error:
                raise Fault(COMPRESSION_ERROR, str(error)) from error
        if stream_id <= self.last_id:
            self._trailers_came(stream_id, last)
            return
        self.last_id = stream_id
        if stream_id > self._goaway_id:
            return
        stream = None
        if head.error:
            self.out.append(frame(RST_STREAM, 0, stream_id, PROTOCOL_ERROR.to_bytes(4, "big")))
            self._spend_reset()
            return
        if len(self.streams) < self._max_streams:
            stream = self._handler.make_stream(stream_id, head, self._peer_window)
        if stream is None:
            self.out.append(frame(RST_STREAM, 0, stream_id, REFUSED_STREAM.to_bytes(4, "big")))
            self._spend_reset()
            return
        self.streams[stream_id] = stream
        stream.remote_closed = last
        self._handler.opened(stream)

    def _trailers_came(self, stream_id: int, last: bool) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        if stream.remote_closed or not last:
            self.end_stream(stream, STREAM_CLOSED if stream.remote_closed else PROTOCOL_ERROR)
        else:
            stream.remote_closed = True
            self._handler.data(stream, memoryview(b""), 0, 0, True)

    def _other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Take a frame that is neither body nor, usually, header."""
        if self._partial_id:
            self._continuation(kind, flags, stream_id, payload)
        elif not self.settled and (kind != SETTINGS or flags & ACK):
            raise Fault(PROTOCOL_ERROR, "the first frame must be SETTINGS")
        elif kind == RST_STREAM:
            if len(payload) != 4 or not stream_id:
                raise Fault(FRAME_SIZE_ERROR if stream_id else PROTOCOL_ERROR, "a RST_STREAM frame is malformed")
            if stream_id > self.last_id:
                raise Fault(PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which was never opened")
            self._spend_reset()
            stream = self.streams.get(stream_id)
            if stream is not None:
                self.drop(stream)
        elif kind == SETTINGS:
            self._settings(flags, stream_id, payload)
        elif kind == PING:
            if len(payload) != 8 or stream_id:
                raise Fault(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "a PING frame is malformed")
            if flags & ACK:
                self.acked += 1
            else:
                self.out.append(frame(PING, ACK, 0, payload))
            self._spend_control()
        elif kind == WINDOW_UPDATE:
            raise Fault(FRAME_SIZE_ERROR, "a WINDOW_UPDATE frame must have 4 bytes")
        elif kind in (PUSH_PROMISE, CONTINUATION):
            raise Fault(PROTOCOL_ERROR, "a frame came that a client does not send here")
        elif kind == PRIORITY and len(payload) != 5:
            raise Fault(FRAME_SIZE_ERROR, "a PRIORITY frame must have 5 bytes")
        else:  # GOAWAY of the peer: it opens nothing more, its streams are answered. Unknown kinds are to be ignored
            self._spend_control()

    def _continuation(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind != CONTINUATION or stream_id != self._partial_id:
            raise Fault(PROTOCOL_ERROR, "a header block was interrupted by another frame")
        self._partial_bytes += len(payload)
        if self._partial_bytes > MAX_BLOCK or len(self._partial) > 16:
            raise Fault(ENHANCE_YOUR_CALM, f"a header block is longer than {MAX_BLOCK} bytes or in more than 16 pieces")
        self._partial.append(payload)
        if flags & END_HEADERS:
            block, self._partial, self._partial_id = b"".join(self._partial), [], 0
            self._headers(stream_id, block, bool(self._partial_flags & END_STREAM))

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) % 6 or (flags & ACK and payload):
            raise Fault(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "a SETTINGS frame is malformed")
        self._spend_control()
        if flags & ACK:
            return
        for name, value in _SETTING.iter_unpack(payload):
            if name == 1 and value < 4096:
                self._shrunk = b"\x20"  # we never index: say that our table is empty, as a smaller one asks for
            elif (name == 2 and value > 1) or (name == 5 and not 16_384 <= value < 1 << 24):
                raise Fault(PROTOCOL_ERROR, f"SETTINGS value {value} is not allowed for setting {name}")
            elif name == 4:
                if value > MAX_WINDOW:
                    raise Fault(FLOW_CONTROL_ERROR, f"an initial window of {value} bytes is above {MAX_WINDOW}")
                change, self._peer_window = value - self._peer_window, value
                for stream in list(self.streams.values()):
                    stream.send_window += change
                    if stream.send_window > MAX_WINDOW:
                        raise Fault(FLOW_CONTROL_ERROR, f"SETTINGS opened the window of stream {stream.id} too far")
            elif name == 5:
                self._peer_frame = min(value, MAX_FRAME)
        self.settled = True
        self.out.append(frame(SETTINGS, ACK, 0))
        self._pump()

    def _window_update(self, stream_id: int, more: int) -> None:
        if not stream_id:
            self._send_window += more
            if not more or self._send_window > MAX_WINDOW:
                raise Fault(PROTOCOL_ERROR if not more else FLOW_CONTROL_ERROR, "a WINDOW_UPDATE is out of range")
            if self._blocked:
                self._pump()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self.last_id or not stream_id & 1:
                raise Fault(PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {stream_id}, which was never opened")
            return
        stream.send_window += more
        if not more or stream.send_window > MAX_WINDOW:
            self.end_stream(stream, FLOW_CONTROL_ERROR if more else PROTOCOL_ERROR)
        elif stream.held:
            self._pump()

    @property
    def midway(self) -> bool:
        """Whether the rest of a header block, or of a DATA frame that nobody wants, is still to come."""
        left, stream = self.data_left or self._pad_left, self.data_stream
        return bool(self._partial_id or (left and (stream is None or self.streams.get(stream.id) is not stream)))

    def _spend_control(self) -> None:
        self._control -= 1
        if self._control < 0:
            raise Fault(ENHANCE_YOUR_CALM, "too_many_pings or other frames without content")

    def _spend_reset(self) -> None:
        self._resets -= 1
        if self._resets < 0:
            raise Fault(ENHANCE_YOUR_CALM, f"more than {MAX_RESETS} streams were reset or refused in a burst")

    def refill(self, seconds: float) -> None:
        """Let time pass for what is limited by rate."""
        self._control = MAX_CONTROL
        self._resets = min(MAX_RESETS, self._resets + int(200 * seconds))
