"""HTTP/2 by the RFC, without sockets: frames in, calls and frames out, and the peer that breaks the rules."""

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serve import http2_send as wire
from tenure.serve.http2 import Connection
from tenure.serve.http2_headers import HeaderReader, Malformed
from tenure.serve.http2_send import FIRST_WINDOW, FRAME, PREFACE, Stream, frame

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/a/B"), ("te", "trailers"), ("x", "y")]
SETTINGS = frame(wire.SETTINGS, 0, 0)


class Handler:
    def __init__(self):
        self.events = []
        self.body = {}

    def make_stream(self, id, head, send_window):
        return Stream(id, head, send_window)

    def opened(self, stream):
        self.events.append(("opened", stream.id, stream.head.path, stream.remote_closed))

    def data(self, stream, data, start, stop, last):
        self.body[stream.id] = self.body.get(stream.id, b"") + bytes(data[start:stop])
        if last:
            self.events.append(("ended", stream.id))

    def reset(self, stream):
        self.events.append(("reset", stream.id))

    def closed(self, stream):
        self.events.append(("closed", stream.id))


class Peer:
    """A client's end: sends frames, reads what came back."""

    def __init__(self, *, greet=True, **options):
        self.handler = Handler()
        self.connection = Connection(self.handler, **options)
        self.encoder = hpack.Encoder()
        self.kept = b""
        self.connection.out.clear()
        if greet:
            self.send(PREFACE + SETTINGS)
            self.frames()

    def send(self, content, piece=None):
        for at in range(0, len(content), piece or max(1, len(content))):
            data = bytearray(self.kept + content[at : at + (piece or len(content))])
            used = self.connection.receive(memoryview(data), len(data))
            self.kept = bytes(data[used:])

    def headers(self, id, fields=REQUEST, flags=wire.END_HEADERS):
        return frame(wire.HEADERS, flags, id, self.encoder.encode(fields))

    def request(self, id, body=b"", piece=None):
        self.send(self.headers(id) + frame(wire.DATA, wire.END_STREAM, id, body), piece)

    def frames(self):
        content, found = b"".join(self.connection.out), []
        self.connection.out.clear()
        while content:
            high, low, kind, flags, id = FRAME.unpack_from(content)
            end = 9 + (high << 8 | low)
            found.append((kind, flags, id, content[9:end]))
            content = content[end:]
        return found

    def fault(self):
        (kind, _, _, payload) = self.frames()[-1]
        assert kind == wire.GOAWAY
        assert self.connection.fault is not None
        return int.from_bytes(payload[4:8], "big")


def reset_code(frames, id):
    return next(int.from_bytes(payload, "big") for kind, _, sid, payload in frames if (kind, sid) == (wire.RST_STREAM, id))


@pytest.mark.parametrize("piece", [None, 1, 2, 7, 100])
def test_a_request_is_understood_however_its_bytes_are_cut(piece):
    peer = Peer(greet=False)
    padded = frame(wire.DATA, wire.PADDED, 1, b"\x04abc\0\0\0\0")
    peer.send(PREFACE + SETTINGS, piece)
    peer.send(peer.headers(1) + padded + frame(wire.DATA, 0, 1, b"d" * 300), piece)
    peer.send(frame(wire.DATA, wire.PADDED | wire.END_STREAM, 1, b"\x02\0\0"), piece)
    assert peer.handler.body[1] == b"abc" + b"d" * 300
    assert peer.handler.events == [("opened", 1, b"/a/B", False), ("ended", 1)]
    assert peer.connection.fault is None


def test_a_header_block_may_come_in_pieces_and_with_priority():
    peer = Peer()
    block = peer.encoder.encode(REQUEST)
    flags = wire.HAS_PRIORITY | wire.PADDED | wire.END_STREAM
    peer.send(frame(wire.HEADERS, flags, 1, b"\x03" + b"\0" * 5 + block[:4] + b"\0" * 3))
    peer.send(frame(wire.CONTINUATION, 0, 1, block[4:9]) + frame(wire.CONTINUATION, wire.END_HEADERS, 1, block[9:]))
    assert peer.handler.events == [("opened", 1, b"/a/B", True)]


def test_repeated_headers_are_looked_up_until_the_table_changes():
    reader, encoder = HeaderReader(1 << 14), hpack.Encoder()
    blocks = [encoder.encode(REQUEST) for _ in range(3)]
    reader.read(blocks[0])
    assert not reader.known  # it filled the table
    assert reader.read(blocks[1]) is reader.known[blocks[2]]
    changed = encoder.encode([*REQUEST[:2], (":path", "/other"), *REQUEST[3:]])
    assert reader.read(changed).path == b"/other"
    assert blocks[2] not in reader.known  # the same bytes mean something else now
    for index in range(20):
        reader.read(hpack.Encoder().encode([(":method", "POST", True), (f"k{index}", "v", True)]))
    assert len(reader.known) <= 8


def test_a_table_emptied_by_an_entry_too_large_for_it_is_a_change():
    reader, encoder = HeaderReader(1 << 14), hpack.Encoder()
    reader.read(encoder.encode(REQUEST))
    known = encoder.encode(REQUEST)
    reader.read(known)
    reader.read(encoder.encode([("huge", "x" * 5000)]))
    assert known not in reader.known
    with pytest.raises(Malformed):
        reader.read(known)


def test_an_answer_goes_out_at_once_where_the_windows_are_open():
    peer = Peer()
    peer.request(1, b"hi")
    stream = peer.connection.streams[1]
    peer.connection.respond(stream, b"\x88", [b"ab", memoryview(b"cd")], 4, b"\x89")
    assert len(peer.connection.out) == 1
    assert peer.frames() == [
        (wire.HEADERS, wire.END_HEADERS, 1, b"\x88"),
        (wire.DATA, 0, 1, b"abcd"),
        (wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, b"\x89"),
    ]
    assert not peer.connection.streams
    assert peer.handler.events[-1] == ("closed", 1)


def test_an_answer_before_the_body_has_ended_tells_the_peer_to_stop():
    peer = Peer()
    peer.send(peer.headers(1))
    peer.connection.send_trailers(peer.connection.streams[1], b"\x88")
    assert reset_code(peer.frames(), 1) == wire.NO_ERROR
    peer.send(frame(wire.DATA, wire.END_STREAM, 1, b"late"))
    assert peer.connection.fault is None
    assert 1 not in peer.handler.body


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40_000), st.integers(0, 200_000), st.lists(st.integers(1, 50_000), max_size=20))
def test_no_answer_ever_exceeds_the_windows_and_all_of_it_comes_once_they_open(first, size, updates):
    peer = Peer()
    peer.send(frame(wire.SETTINGS, 0, 0, b"\0\4" + first.to_bytes(4, "big")))
    peer.request(1)
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    peer.connection.respond(peer.connection.streams[1], b"\x88", [body], size, b"\x89")
    found, stream_room, room = b"", first, 65_535
    for more in [0, *updates, size + 1]:
        if more:
            payload = more.to_bytes(4, "big")
            peer.send(frame(wire.WINDOW_UPDATE, 0, 1, payload) + frame(wire.WINDOW_UPDATE, 0, 0, payload))
            stream_room, room = stream_room + more, room + more
        frames = peer.frames()
        sent = b"".join(payload for kind, _, _, payload in frames if kind == wire.DATA)
        assert all(len(payload) <= 16_384 for kind, _, _, payload in frames if kind == wire.DATA)
        stream_room, room, found = stream_room - len(sent), room - len(sent), found + sent
        assert min(stream_room, room) >= 0
        assert peer.connection.held_bytes == size - len(found)
        if frames and frames[-1][1] & wire.END_STREAM and frames[-1][0] == wire.HEADERS:
            break
    assert found == body
    assert not peer.connection.streams


def test_a_stream_gets_room_when_the_handler_gives_it_and_not_before():
    peer = Peer()
    peer.send(peer.headers(1) + frame(wire.DATA, 0, 1, b"x" * FIRST_WINDOW))
    stream = peer.connection.streams[1]
    assert stream.recv_window == 0
    assert peer.frames() == []
    peer.connection.open_window(stream, 1000)
    assert peer.frames() == [(wire.WINDOW_UPDATE, 0, 1, (1000).to_bytes(4, "big"))]
    peer.send(frame(wire.DATA, 0, 1, b"x" * 1001))
    assert reset_code(peer.frames(), 1) == wire.FLOW_CONTROL_ERROR
    assert peer.handler.events[-1] == ("reset", 1)


def test_pings_and_settings_are_answered():
    peer = Peer()
    peer.send(frame(wire.PING, 0, 0, b"12345678") + frame(wire.SETTINGS, 0, 0, b"\0\5\0\1\0\0"))
    assert peer.frames() == [(wire.PING, wire.ACK, 0, b"12345678"), (wire.SETTINGS, wire.ACK, 0, b"")]
    peer.connection.ping()
    peer.send(frame(wire.PING, wire.ACK, 0, b"tenure\0\0"))
    assert peer.connection.acked == 1


def test_a_smaller_table_of_the_peer_is_acknowledged_in_the_next_header_block():
    peer = Peer()
    peer.send(frame(wire.SETTINGS, 0, 0, b"\0\1\0\0\0\0"))
    peer.frames()
    for id, expected in ((1, b"\x20\x88"), (3, b"\x88")):
        peer.request(id)
        peer.connection.respond(peer.connection.streams[id], b"\x88", [b""], 0, b"\x89")
        assert peer.frames()[0][3] == expected


def test_streams_past_the_bound_are_refused_and_the_connection_goes_on():
    peer = Peer(max_streams=2)
    for id in (1, 3, 5):
        peer.send(peer.headers(id))
    assert reset_code(peer.frames(), 5) == wire.REFUSED_STREAM
    assert len(peer.connection.streams) == 2
    assert peer.connection.fault is None


def test_after_the_last_goaway_later_streams_are_ignored():
    peer = Peer()
    peer.send(peer.headers(1))
    peer.connection.go_away(last=True)
    peer.send(peer.headers(3))
    assert list(peer.connection.streams) == [1]


def test_rapid_resets_and_floods_end_the_connection():
    peer = Peer()
    for id in range(1, 2 * wire.MAX_RESETS + 9, 2):
        peer.send(peer.headers(id) + frame(wire.RST_STREAM, 0, id, b"\0\0\0\x08"))
    assert peer.fault() == wire.ENHANCE_YOUR_CALM
    peer = Peer()
    peer.send(frame(wire.PING, 0, 0, b"12345678") * (wire.MAX_CONTROL + 1))
    assert peer.fault() == wire.ENHANCE_YOUR_CALM
    peer = Peer()
    for _ in range(3):
        peer.send(frame(wire.PING, 0, 0, b"12345678") * (wire.MAX_CONTROL // 2))
        peer.connection.refill(1.0)
    assert peer.connection.fault is None


BROKEN = {
    "another protocol": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", wire.PROTOCOL_ERROR, False),
    "no settings first": (PREFACE + frame(wire.PING, 0, 0, b"12345678"), wire.PROTOCOL_ERROR, False),
    "no settings before a request": (PREFACE + frame(wire.HEADERS, 5, 1, b"\x83"), wire.PROTOCOL_ERROR, False),
    "an even stream": (frame(wire.HEADERS, 5, 2, b"\x83"), wire.PROTOCOL_ERROR, True),
    "stream zero": (frame(wire.HEADERS, 5, 0, b"\x83"), wire.PROTOCOL_ERROR, True),
    "data on an idle stream": (frame(wire.DATA, 0, 1, b"x"), wire.PROTOCOL_ERROR, True),
    "a window update on an idle stream": (frame(wire.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), wire.PROTOCOL_ERROR, True),
    "a reset of an idle stream": (frame(wire.RST_STREAM, 0, 1, b"\0\0\0\1"), wire.PROTOCOL_ERROR, True),
    "a window update of nothing": (frame(wire.WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), wire.PROTOCOL_ERROR, True),
    "a window too wide": (frame(wire.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), wire.FLOW_CONTROL_ERROR, True),
    "a window update too long": (frame(wire.WINDOW_UPDATE, 0, 0, b"\0\0\0\0\1"), wire.FRAME_SIZE_ERROR, True),
    "a ping too short": (frame(wire.PING, 0, 0, b"1"), wire.FRAME_SIZE_ERROR, True),
    "a ping on a stream": (frame(wire.PING, 0, 1, b"12345678"), wire.PROTOCOL_ERROR, True),
    "settings of a strange size": (frame(wire.SETTINGS, 0, 0, b"12345"), wire.FRAME_SIZE_ERROR, True),
    "settings on a stream": (frame(wire.SETTINGS, 0, 1), wire.PROTOCOL_ERROR, True),
    "a frame size too small": (frame(wire.SETTINGS, 0, 0, b"\0\5\0\0\0\1"), wire.PROTOCOL_ERROR, True),
    "an initial window too wide": (frame(wire.SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"), wire.FLOW_CONTROL_ERROR, True),
    "a push": (frame(wire.PUSH_PROMISE, 4, 1, b"\0\0\0\2"), wire.PROTOCOL_ERROR, True),
    "a continuation of nothing": (frame(wire.CONTINUATION, 4, 1, b"\x83"), wire.PROTOCOL_ERROR, True),
    "an interrupted header": (frame(wire.HEADERS, 0, 1, b"\x83") + SETTINGS, wire.PROTOCOL_ERROR, True),
    "a header interrupted by data": (frame(wire.HEADERS, 0, 1, b"\x83") + frame(wire.DATA, 0, 1), wire.PROTOCOL_ERROR, True),
    "an index out of the table": (frame(wire.HEADERS, 5, 1, b"\xff\xff\x03"), wire.COMPRESSION_ERROR, True),
    "a truncated literal": (frame(wire.HEADERS, 5, 1, b"\x40\x05ab"), wire.COMPRESSION_ERROR, True),
    "a header list too long": (
        frame(wire.HEADERS, 5, 1, b"\x40\1a\x7f\xa1\x1f" + b"x" * 4000 + b"\xbe" * 8),
        wire.COMPRESSION_ERROR,
        True,
    ),
    "a table resized over and over": (
        frame(wire.HEADERS, 5, 1, b"\x20\x3f\xe1\x1f" * 2 + b"\x83"),
        wire.COMPRESSION_ERROR,
        True,
    ),
    "padding beyond the frame": (frame(wire.HEADERS, 13, 1, b"\x09\x83"), wire.PROTOCOL_ERROR, True),
    "a frame too long": (b"\x00\x40\x01\x04\0\0\0\0\0", wire.FRAME_SIZE_ERROR, True),
    "a data frame too long": (b"\x10\x00\x01\x00\0\0\0\0\1", wire.FRAME_SIZE_ERROR, True),
    "a header in many pieces": (
        frame(wire.HEADERS, 0, 1, b"\x83") + frame(wire.CONTINUATION, 0, 1) * 17,
        wire.ENHANCE_YOUR_CALM,
        True,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_peer_that_breaks_the_protocol_is_told_why_and_left(name):
    content, code, greet = BROKEN[name]
    peer = Peer(greet=greet)
    peer.send(content)
    assert peer.fault() == code
    peer.send(peer.headers(9))
    assert ("opened", 9, b"/a/B", False) not in peer.handler.events


@pytest.mark.parametrize(
    "fields",
    [
        REQUEST[1:],
        [*REQUEST, (":path", "/late")],
        [REQUEST[0], *REQUEST],
        [*REQUEST, ("connection", "close")],
        [*REQUEST[:3], ("te", "gzip")],
        [*REQUEST[:3], (":strange", "x")],
    ],
)
def test_a_malformed_request_is_reset_and_the_connection_goes_on(fields):
    peer = Peer()
    peer.send(peer.headers(1, fields))
    assert reset_code(peer.frames(), 1) == wire.PROTOCOL_ERROR
    peer.send(peer.headers(3))
    assert peer.handler.events == [("opened", 3, b"/a/B", False)]


def test_a_body_after_its_end_and_headers_out_of_place_reset_the_stream():
    peer = Peer()
    peer.request(1)
    peer.send(frame(wire.DATA, 0, 1, b"more"))
    assert reset_code(peer.frames(), 1) == wire.STREAM_CLOSED
    peer.send(peer.headers(3) + peer.headers(3))
    assert reset_code(peer.frames(), 3) == wire.PROTOCOL_ERROR
    peer.send(peer.headers(5) + peer.headers(5, [("t", "1")], wire.END_HEADERS | wire.END_STREAM))
    assert peer.handler.events[-1] == ("ended", 5)


frames = st.builds(
    frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 1, 2, 3, 5, 2**31 - 1]),
    st.one_of(st.binary(max_size=60), st.just(b"\0" * 4), st.just(b"\0" * 8), st.just(hpack.Encoder().encode(REQUEST))),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(frames, st.binary(max_size=20)), max_size=12).map(b"".join), st.sampled_from([None, 1, 13]))
def test_no_bytes_raise_or_make_it_keep_more_than_a_frame(content, piece):
    peer = Peer()
    peer.send(peer.headers(1))
    peer.send(content, piece)
    assert len(peer.kept) <= wire.MAX_BLOCK + 9
    assert sum(map(len, peer.connection.out)) <= 100 * (len(content) + 100)
