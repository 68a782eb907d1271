"""The gRPC door against peers that break rules, dawdle or never read; time is the test's own."""

import asyncio
import socket
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure.serve import http2_send as wire
from tenure.serve import v2
from tenure.serve.codec_infer import encode_varint
from tenure.serve.grpc import TICK_S
from tenure.serve.http2_send import FIRST_WINDOW, PREFACE, frame
from tenure.serve.limits import DoorLimits
from tenure.serve.tensors import TensorMetadata

from .fakes import FakePlane
from .grpc_peers import OpenDoor, RawPeer, framed, infer, row
from .models import KINDS, Kind

WIDE = Kind(
    (TensorMetadata("x", "FP32", (-1, 100_000)),), (TensorMetadata("y", "FP32", (-1, 100_000)),), lambda i: {"y": i["x"]}
)
LIMITS = DoorLimits(max_request_bytes=8 << 20, max_connections=8)
BODY = infer(np.zeros((1, 100_000), np.float32), model="wide")


@pytest.fixture(scope="module")
def plane():
    return FakePlane(*KINDS, wide=WIDE)


@pytest.fixture(scope="module")
def shared(plane):
    door = OpenDoor(plane, LIMITS)
    yield door
    door.close()


@pytest.fixture
def door(shared, plane):
    plane.paused, plane.budget_bytes = False, 64 << 20
    plane.calls.clear()
    plane.cancelled.clear()
    yield shared
    shared.until(lambda: not shared.door.connections)
    assert plane.held_bytes == 0
    assert shared.door.streams == shared.door.unsent == 0


def answers(door):
    """Whether somebody else is served."""
    with RawPeer(door.port) as peer:
        peer.request(1, infer(row(2)))
        content = peer.until(wire.DATA, 1)
        assert v2.ModelInferResponse.FromString(content[5:]).raw_output_contents[0] == row(4).tobytes()
        assert peer.status(1)["grpc-status"] == "0"


def test_the_body_of_a_call_past_the_budget_is_not_even_sent(door, plane):
    plane.budget_bytes = 100_000
    with RawPeer(door.port) as peer:
        content = framed(BODY)
        peer.send(peer.headers(1) + frame(wire.DATA, 0, 1, content[:1000]))
        assert peer.status(1)["grpc-status"] == "8"
        assert int.from_bytes(peer.until(wire.RST_STREAM, 1), "big") == wire.NO_ERROR
        plane.budget_bytes = 64 << 20
        peer.send(peer.headers(3) + frame(wire.DATA, 0, 3, content[:FIRST_WINDOW]))
        room = int.from_bytes(peer.until(wire.WINDOW_UPDATE, 3), "big")
        assert room == len(content) - FIRST_WINDOW
        assert door.run(lambda: plane.held_bytes) >= len(content) - 5
        peer.send(frame(wire.DATA, wire.END_STREAM, 3, content[FIRST_WINDOW:]))
        peer.send(
            frame(wire.WINDOW_UPDATE, 0, 3, struct.pack(">L", 1 << 20))
            + frame(wire.WINDOW_UPDATE, 0, 0, struct.pack(">L", 1 << 20))
        )
        assert peer.status(3)["grpc-status"] == "0"


@pytest.mark.parametrize("piece", [1, 3, 50])
def test_a_message_may_come_in_any_pieces(door, piece):
    with RawPeer(door.port) as peer:
        content = framed(infer(row(7), id="x" * 200))
        frames = [frame(wire.DATA, 0, 1, content[at : at + piece]) for at in range(0, len(content), piece)]
        peer.send(peer.headers(1) + b"".join(frames) + frame(wire.DATA, wire.END_STREAM, 1))
        assert v2.ModelInferResponse.FromString(peer.until(wire.DATA, 1)[5:]).raw_output_contents[0] == row(14).tobytes()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "3", "without a message"),
        (b"\0\0", "3", "inside a message"),
        (b"\0\0\0\0\x09abc", "3", "inside a message"),
        (framed(b"") + framed(b""), "3", "more than one message"),
        (framed(b"\x0a"), "3", "not a ModelInferRequest"),
        (b"\0\xff\xff\xff\xff", "8", "4294967295 bytes"),
        (framed(b"", flag=1), "13", "no grpc-encoding"),
        (framed(b"", flag=7), "13", "compression flag 7"),
    ],
)
def test_a_malformed_body_ends_the_call_and_not_the_connection(door, content, code, words):
    with RawPeer(door.port) as peer:
        peer.send(peer.headers(1) + frame(wire.DATA, wire.END_STREAM, 1, content))
        status = peer.status(1)
        assert status["grpc-status"] == code
        assert words in status["grpc-message"].replace("%20", " ")
        peer.request(3, infer(row()))
        assert peer.status(3)["grpc-status"] == "0"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ([("grpc-timeout", "soon")], "3"),
        ([("grpc-timeout", "123456789S")], "3"),
        ([("grpc-encoding", "snappy")], "12"),
    ],
)
def test_headers_that_are_not_understood_are_refused(door, fields, code):
    with RawPeer(door.port) as peer:
        peer.send(peer.headers(1, *fields, end=True))
        assert peer.status(1)["grpc-status"] == code


def test_what_is_http_but_no_grpc_gets_an_http_status(door):
    with RawPeer(door.port) as peer:
        fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), ("content-type", "application/grpc")]
        peer.send(frame(wire.HEADERS, 5, 1, peer.encoder.encode(fields)))
        assert peer.status(1)[":status"] == "405"
        fields = [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-type", "text/html")]
        peer.send(frame(wire.HEADERS, 5, 3, peer.encoder.encode(fields)))
        assert peer.status(3)[":status"] == "415"


@pytest.mark.parametrize("content", [b"\x1f\x8b garbage", b"not compressed at all", b""])
def test_content_that_is_not_compressed_as_it_says_is_refused(door, content):
    with RawPeer(door.port) as peer:
        peer.send(peer.headers(1, ("grpc-encoding", "gzip")) + frame(wire.DATA, wire.END_STREAM, 1, framed(content, flag=1)))
        assert peer.status(1)["grpc-status"] == "3"


def test_others_are_served_while_messages_that_unpack_to_much_are_unpacked(door, plane):
    content = zlib.compress(BODY.SerializeToString() + b"\x42" + encode_varint(7 << 20) + bytes(7 << 20))  # an unknown field
    with RawPeer(door.port) as peer:
        for id in range(1, 41, 2):
            peer.send(
                peer.headers(id, ("grpc-encoding", "deflate")) + frame(wire.DATA, wire.END_STREAM, id, framed(content, flag=1))
            )
        door.until(lambda: door.door._work)
        answers(door)
        assert door.run(lambda: len(door.door._work)) > 1
        peer.send(frame(wire.RST_STREAM, 0, 39, b"\0\0\0\x08"))
        peer.status(1)
    door.until(lambda: not door.door._work)


def test_http1_is_told_what_this_port_speaks(door):
    with RawPeer(door.port, greet=False) as peer:
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert peer.ended() == wire.PROTOCOL_ERROR


def test_a_connection_that_goes_away_takes_its_calls_along(door, plane):
    plane.paused = True
    with RawPeer(door.port) as peer:
        peer.request(1, infer(row()))
        peer.send(peer.headers(3) + frame(wire.DATA, 0, 3, framed(BODY)[:2000]))
        door.until(lambda: len(plane.calls) == 1 and plane.held_bytes > 100_000)
    door.until(lambda: plane.cancelled == plane.calls and plane.held_bytes == 0)


def test_a_reset_call_is_cancelled_and_its_buffer_freed(door, plane):
    plane.paused = True
    with RawPeer(door.port) as peer:
        peer.request(1, infer(row()))
        peer.send(peer.headers(3) + frame(wire.DATA, 0, 3, framed(BODY)[:2000]))
        door.until(lambda: len(plane.calls) == 1 and plane.held_bytes > 100_000)
        for id in (1, 3):
            peer.send(frame(wire.RST_STREAM, 0, id, b"\0\0\0\x08"))
        door.until(lambda: plane.held_bytes == 0)
        assert plane.cancelled == plane.calls
        plane.paused = False
        peer.request(5, infer(row()))
        assert peer.status(5)["grpc-status"] == "0"


def test_a_body_that_dawdles_loses_its_buffer(door, plane):
    with RawPeer(door.port) as peer:
        peer.send(peer.headers(1) + frame(wire.DATA, 0, 1, framed(BODY)[:2000]))
        door.until(lambda: plane.held_bytes > 100_000)
        door.pass_time(LIMITS.body_timeout_s - 1)
        assert plane.held_bytes > 100_000
        door.pass_time(2)
        assert plane.held_bytes == 0
        assert peer.status(1)["grpc-status"] == "4"


@pytest.mark.parametrize("content", [b"", PREFACE[:10], PREFACE, PREFACE + frame(wire.SETTINGS, 0, 0)[:5]])
def test_a_peer_that_never_says_what_it_wants_is_closed(door, content):
    with RawPeer(door.port, greet=False) as peer:
        peer.send(content)
        door.until(lambda: door.door.connections)
        for _ in range(3):
            door.pass_time(LIMITS.head_timeout_s / 2 + 1)
        peer.ended()


def test_a_header_block_that_never_ends_closes_the_connection(door):
    with RawPeer(door.port) as peer:
        peer.send(frame(wire.HEADERS, 0, 1, b"\x83"))
        door.until(lambda: any(c.h2.midway for c in door.door.connections))
        for _ in range(4):
            door.pass_time(LIMITS.head_timeout_s / 2 + 1)
        peer.ended()


def test_an_idle_connection_is_asked_to_leave(door):
    with RawPeer(door.port) as peer:
        peer.until(wire.SETTINGS)
        door.until(lambda: any(c.h2.settled for c in door.door.connections))
        door.pass_time(1)
        door.pass_time(LIMITS.idle_timeout_s + 1)
        assert peer.ended() == wire.NO_ERROR


def test_a_silent_peer_with_a_call_open_is_asked_whether_it_is_there_and_left_if_it_does_not_answer(door, plane):
    plane.paused = True
    stream = f"/{v2.SERVICE}/ModelStreamInfer"
    with RawPeer(door.port) as alive, RawPeer(door.port) as gone:
        for peer in (alive, gone):
            peer.send(peer.headers(1, path=stream) + frame(wire.DATA, 0, 1, framed(infer(row()))))
        door.until(lambda: len(plane.calls) == 2)
        door.pass_time(1)
        door.pass_time(LIMITS.idle_timeout_s / 2 + 2)
        for peer in (alive, gone):
            question = peer.until(wire.PING)
        alive.send(frame(wire.PING, wire.ACK, 0, question))
        door.until(lambda: any(c.h2.acked for c in door.door.connections))
        door.pass_time(1)
        door.pass_time(LIMITS.idle_timeout_s / 2)
        assert gone.ended() is None
        plane.paused = False
        door.run(plane.resume)
        assert alive.until(wire.DATA, 1)


def fill(door, peer, wanted_bytes):
    """Have answers held that the peer has no window for; return the next stream."""
    id, unsent, content = 1, door.door.unsent, framed(BODY)
    while door.door.unsent <= wanted_bytes:
        peer.send(peer.headers(id) + frame(wire.DATA, 0, id, content[:FIRST_WINDOW]))
        peer.until(wire.WINDOW_UPDATE, id)
        peer.send(frame(wire.DATA, wire.END_STREAM, id, content[FIRST_WINDOW:]))
        door.until(lambda before=unsent: door.door.unsent > before)
        id, unsent = id + 2, door.door.unsent
    return id


def test_a_peer_whose_window_stays_shut_is_refused_more_and_then_closed(door):
    with RawPeer(door.port, settings=b"\0\4\0\0\0\0") as peer:
        id = fill(door, peer, 8 << 20)
        peer.request(id, infer(row()))
        assert peer.status(id)["grpc-status"] == "8"
        answers(door)
        door.pass_time(LIMITS.write_timeout_s + 1)
        peer.ended()


def test_slow_readers_that_keep_others_out_are_left_one_by_one(door, monkeypatch):
    monkeypatch.setattr(door.door, "max_unsent_bytes", 2 << 20)
    shut = b"\0\4\0\0\0\0"
    with RawPeer(door.port, settings=shut) as most, RawPeer(door.port, settings=shut) as less:
        fill(door, less, 500_000)
        fill(door, most, 2 << 20)
        with RawPeer(door.port) as other:
            other.request(1, infer(row()))
            assert other.status(1)["grpc-status"] == "8"
        door.pass_time(1)
        for _ in range(2):
            door.pass_time(LIMITS.write_timeout_s / 3 - 1)
            less.send(frame(wire.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"))
            assert less.until(wire.DATA, 1)
        most.ended()
        answers(door)


def test_a_peer_that_never_reads_is_not_read_from_and_then_closed(door):
    with RawPeer(door.port, receive_bytes=4096) as peer:
        peer.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):  # its pings are answered until nothing more goes out; then they stay unread
            flood(door, peer)
        assert door.run(lambda: max(c.transport.get_write_buffer_size() for c in door.door.connections)) < 4 << 20
        answers(door)
        door.pass_time(1)
        door.pass_time(LIMITS.write_timeout_s + 1)
        door.until(lambda: not door.door.connections)


def flood(door, peer):
    for _ in range(3000):
        peer.send(frame(wire.PING, 0, 0, b"12345678") * 1000)
        door.run(lambda: [connection.h2.refill(1.0) for connection in door.door.connections])


def test_past_the_bound_new_connections_wait_until_another_leaves(door):
    peers = [RawPeer(door.port) for _ in range(LIMITS.max_connections)]
    door.until(lambda: len(door.door.connections) == LIMITS.max_connections)
    with RawPeer(door.port) as late:
        late.request(1, infer(row()))
        answered = [door.run(lambda: len(door.door.connections)) for _ in range(20)]
        assert set(answered) == {LIMITS.max_connections}
        peers.pop().socket.close()
        assert late.status(1)["grpc-status"] == "0"
    for peer in peers:
        peer.socket.close()


def test_idle_connections_do_not_keep_others_out_for_long(door, plane):
    peers = [RawPeer(door.port) for _ in range(LIMITS.max_connections)]
    for peer in peers:
        peer.request(1, infer(row()))
        assert peer.status(1)["grpc-status"] == "0"
    door.pass_time(1.0)  # what came until now is seen
    plane.paused = True
    peers[1].request(3, infer(row(3)))  # busy ones stay
    door.until(lambda: len(plane.calls) == LIMITS.max_connections + 1)
    with RawPeer(door.port) as late:
        late.request(1, infer(row(5)))
        door.until(lambda: door.door._acceptor.some_wait())
        door.pass_time(2 * TICK_S)
        assert int.from_bytes(peers[0].until(wire.GOAWAY)[:4], "big") == 1  # idle longest, the first opened
        assert peers[0].ended() is None
        door.until(lambda: len(plane.calls) == LIMITS.max_connections + 2)
        plane.paused = False
        door.run(plane.resume)
        assert peers[1].status(3)["grpc-status"] == "0"
        assert late.status(1)["grpc-status"] == "0"
    for peer in peers:
        peer.socket.close()


def test_idle_connections_that_keep_nobody_out_stay(door):
    peers = [RawPeer(door.port) for _ in range(LIMITS.max_connections)]
    for id in (1, 3):
        for peer in peers:
            peer.request(id, infer(row()))
            assert peer.status(id)["grpc-status"] == "0"
        door.pass_time(TICK_S)  # what came until now is seen
        door.pass_time(10 * TICK_S)
    for peer in peers:
        peer.socket.close()


frames = st.builds(
    frame,
    st.integers(0, 10),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 3, 5, 4]),
    st.one_of(st.binary(max_size=80), st.just(framed(infer(row())))),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(frames, st.binary(max_size=30)), max_size=8).map(b"".join), st.booleans())
def test_whatever_comes_in_the_door_stays_up_and_keeps_nothing(door, plane, content, opened):
    with RawPeer(door.port) as peer:
        try:
            peer.send((peer.headers(1) if opened else b"") + content)
            peer.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        peer.ended()
    door.until(lambda: not door.door.connections)
    assert plane.held_bytes == 0
    assert door.door.streams == 0
    answers(door)


def test_a_door_that_closes_finishes_what_it_has_taken_on_and_tells_its_peers(plane):
    plane.paused = True
    plane.calls.clear()
    door = OpenDoor(plane, LIMITS)
    with RawPeer(door.port) as busy, RawPeer(door.port) as idle:
        busy.request(1, infer(row(3)))
        idle.until(wire.SETTINGS)
        door.until(lambda: len(plane.calls) == 1 and len(door.door.connections) == 2)
        closing = asyncio.run_coroutine_threadsafe(door.door.close(1e9), door.loop)
        for peer in (busy, idle):
            first = peer.until(wire.GOAWAY)
            assert int.from_bytes(first[:4], "big") == 2**31 - 1
            peer.send(frame(wire.PING, wire.ACK, 0, peer.until(wire.PING)))
        assert int.from_bytes(idle.until(wire.GOAWAY)[:4], "big") == 0
        assert idle.ended() is None
        assert int.from_bytes(busy.until(wire.GOAWAY)[:4], "big") == 1
        plane.paused = False
        door.loop.call_soon_threadsafe(plane.resume)
        assert v2.ModelInferResponse.FromString(busy.until(wire.DATA, 1)[5:]).raw_output_contents[0] == row(6).tobytes()
        assert busy.status(1)["grpc-status"] == "0"
        closing.result(20)
    door.close()
