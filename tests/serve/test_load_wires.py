"""The load generator's connections against servers good, bad and broken: how each request ended is told as it was."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent import futures

import grpc
import hpack
import numpy as np
import pytest
from tests.serve.fakes import FakePlane
from tests.serve.grpc_peers import OpenDoor
from tests.serve.wire_server import WireServer

from tenure.errors import Unavailable
from tenure.serve import http2_send as h2
from tenure.serve import v2
from tenure.serve.http2_send import FRAME, PREFACE, frame
from tenure.serve.load import payload
from tenure.serve.load.columns import Columns
from tenure.serve.load.grpc_wire import GrpcWire
from tenure.serve.load.http_wire import HttpWire
from tenure.serve.load.loop import Loop
from tenure.serve.load.records import Outcome

TIMEOUT_S = 20.0


def run(wire, requests, due_s=(0.0,), *, timeout_s=TIMEOUT_S, max_in_flight=1000):
    """Send requests over a wire, one per due time; return the loop and its record."""
    columns = Columns(len(due_s))
    columns.begin(len(due_s))
    np.asarray(columns.due)[:] = due_s
    loop = Loop(
        wire,
        columns,
        requests,
        [index % len(requests) for index in range(len(due_s))],
        timeout_s=timeout_s,
        max_in_flight=max_in_flight,
    )
    try:
        wire.open(loop)
        loop.run_open(len(due_s))
    finally:
        wire.close()
        loop.close()
    return loop, columns.record(len(due_s))


def outcomes(record):
    return [Outcome(value).name for value in record.outcome]


def x(count=4):
    return {"x": np.arange(count, dtype=np.float32)}


def http(server, count=4, *, connections=1, json=False):
    wire = HttpWire("127.0.0.1", server.port, connections=connections, timeout_s=TIMEOUT_S)
    return wire, payload.http_requests(f"127.0.0.1:{server.port}", "same", [x(count)], json=json)


# HTTP


def test_http_requests_are_answered_on_kept_connections():
    with WireServer(lambda request: request.answer_same()) as server:
        loop, record = run(*http(server), due_s=np.linspace(0, 0.1, 50))
        assert outcomes(record) == ["OK"] * 50
        assert server.infers == 50
        assert server.connected <= 5
        assert (record.ended_s > record.issued_s).all()
        assert loop.reasons == {}


def test_http_opens_more_connections_when_all_are_busy_and_only_as_many_as_allowed():
    together = threading.Barrier(5)

    def wait(request):
        together.wait(TIMEOUT_S)
        request.answer_same()

    with WireServer(wait) as server:
        _, record = run(*http(server), due_s=np.zeros(10), max_in_flight=5)
        assert outcomes(record) == ["OK"] * 10
        assert server.connected == 5


def test_http_sends_the_tensors_raw_or_as_json():
    seen = []

    def answer(request):
        seen.append((request.fields["content-type"], request.header["inputs"][0]))
        request.answer()

    with WireServer(answer) as server:
        run(*http(server))
        run(*http(server, json=True))
    (raw_kind, raw), (json_kind, json) = seen
    assert raw_kind == "application/octet-stream"
    assert raw["parameters"] == {"binary_data_size": 16}
    assert json_kind == "application/json"
    assert json["data"] == [0.0, 1.0, 2.0, 3.0]


def test_http_refusals_are_failures_with_the_servers_words():
    with WireServer(lambda request: request.answer(429, {"error": "the queue is full"})) as server:
        loop, record = run(*http(server), due_s=np.zeros(3))
        assert outcomes(record) == ["FAILED"] * 3
        assert loop.reasons == {"HTTP 429: the queue is full": 3}


def test_http_answers_in_pieces_and_long_ones_are_read_to_their_end():
    def pieces(request):
        body = b"x" * 700_000
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for part in (head[:10], head[10:], body[:5], body[5:]):
            request.send(part)
            time.sleep(0.002)  # so that they come in several reads

    with WireServer(pieces) as server:
        loop, record = run(*http(server), due_s=np.linspace(0, 0.05, 4))
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"] * 4


@pytest.mark.parametrize("status", [200, 503])
def test_http_answers_of_unknown_length_end_where_they_say(status):
    body = b'{"error": "later"}'
    head = f"HTTP/1.1 {status} Said\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:4], body[4:])) + b"0\r\n\r\n"
    with WireServer(lambda request: request.send(head, chunks[:7], chunks[7:])) as server:
        loop, record = run(*http(server), due_s=[0.0, 0.05])
        assert outcomes(record) == (["OK"] * 2 if status == 200 else ["FAILED"] * 2)
        assert loop.reasons == ({} if status == 200 else {"HTTP 503: later": 2})


def test_http_an_answer_may_end_with_its_connection():
    def answer(request):
        request.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        return False

    with WireServer(answer) as server:
        _, record = run(*http(server), due_s=[0.0, 0.05, 0.1])
        assert outcomes(record) == ["OK"] * 3
        assert server.connected == 3


def test_http_interim_answers_are_not_the_answer():
    with WireServer(
        lambda request: request.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    ) as server:
        _, record = run(*http(server), due_s=[0.0, 0.02])
        assert outcomes(record) == ["OK"] * 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "closed before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "closed before the answer was complete"),
        (b"SSH-2.0\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc", "belong to none"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000, "longer than 65536 bytes"),
    ],
)
def test_http_answers_that_are_none_are_failures(said, reason):
    def answer(request):
        request.send(said)
        return False

    with WireServer(answer) as server:
        loop, record = run(*http(server))
        assert outcomes(record) == ["FAILED"]
        assert reason in next(iter(loop.reasons))


def test_http_a_request_on_a_connection_that_was_closed_meanwhile_is_sent_on_a_new_one():
    def answer(request):
        request.answer_same()
        return False  # without having said so

    with WireServer(answer) as server:
        _, record = run(*http(server), due_s=[0.0, 0.1, 0.2])
        assert outcomes(record) == ["OK"] * 3


def test_http_so_is_one_on_a_connection_that_was_opened_beforehand_and_given_up_by_the_server():
    with WireServer(lambda request: request.answer_same()) as server:
        wire, requests = http(server, connections=3)
        open_wire = wire.open

        def open_and_lose(loop):
            open_wire(loop)
            while server.connected < 3:
                time.sleep(0.001)
            server.drop()

        wire.open = open_and_lose
        loop, record = run(wire, requests, due_s=[0.0, 0.0, 0.0])
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"] * 3


def test_http_a_server_that_went_away_fails_each_request_and_ends_the_run():
    def leave(request):
        server.stop_listening()
        return False

    with WireServer(leave) as server:
        loop, record = run(*http(server), due_s=[0.0, 0.3, 0.4])
        assert outcomes(record) == ["FAILED"] * 3
        assert loop.reasons == {"Connection refused": 3}


def test_http_a_request_without_an_answer_times_out_and_its_connection_is_not_used_again():
    first = threading.Event()

    def answer(request):
        if not first.is_set():
            first.set()
            time.sleep(0.4)
        request.answer_same()

    with WireServer(answer) as server:
        _, record = run(*http(server), due_s=[0.0, 0.3], timeout_s=0.2)
        assert outcomes(record) == ["TIMED_OUT", "OK"]
        assert server.connected == 2
        assert record.ended_s[0] == pytest.approx(0.2, abs=0.1)


def test_http_long_requests_are_sent_as_the_server_takes_them():
    with WireServer(lambda request: request.answer(body=str(len(request.body)).encode())) as server:
        _, record = run(*http(server, 4_000_000), due_s=[0.0, 0.0])
        assert outcomes(record) == ["OK"] * 2


def test_http_an_early_refusal_of_a_long_request_is_its_answer():
    class Early(WireServer):
        def handle_unread(self, request):
            request.answer(413, {"error": "too long"})
            return True

    with Early(lambda request: None) as server:
        loop, record = run(*http(server, 8_000_000))
        assert outcomes(record) == ["FAILED"]
        reason = next(iter(loop.reasons))
        assert "413" in reason or "reset" in reason.lower() or "broken" in reason.lower()  # what TCP leaves of it


def test_nobody_there_is_said_before_the_run():
    for kind in (HttpWire, GrpcWire):
        with socket.create_server(("127.0.0.1", 0)) as bound:
            port = bound.getsockname()[1]
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port} cannot be reached"):
            run(kind("127.0.0.1", port, connections=1, timeout_s=5.0), [b""])


# gRPC


def grpc_to(port, count=4, *, connections=1, model="double", inputs=None):
    wire = GrpcWire("127.0.0.1", port, connections=connections, timeout_s=TIMEOUT_S)
    inputs = inputs or {"x": np.ones((1, count), np.float32)}
    return wire, payload.grpc_requests(f"127.0.0.1:{port}", model, [inputs])


@pytest.fixture
def door():
    opened = OpenDoor(FakePlane("double"))
    yield opened
    opened.close()


def test_grpc_requests_are_answered_by_our_own_door(door):
    loop, record = run(*grpc_to(door.port), due_s=np.linspace(0, 0.1, 100))
    assert loop.reasons == {}
    assert outcomes(record) == ["OK"] * 100
    assert len(door.plane.calls) == 100


def test_grpc_long_messages_wait_for_the_windows_to_open(door):
    loop, record = run(*grpc_to(door.port, inputs={"x": np.ones((150_000, 4), np.float32)}), due_s=np.zeros(6))
    assert loop.reasons == {}
    assert outcomes(record) == ["OK"] * 6


def test_grpc_refusals_are_failures_with_the_servers_words(door):
    loop, record = run(*grpc_to(door.port, model="nobody"))
    assert outcomes(record) == ["FAILED"]
    assert next(iter(loop.reasons)).startswith("gRPC status 5: ")


def test_grpc_a_request_that_is_given_up_is_cancelled_at_the_server(door):
    door.plane.paused = True
    _, record = run(*grpc_to(door.port), due_s=[0.0, 0.01], timeout_s=0.2)
    assert outcomes(record) == ["TIMED_OUT"] * 2
    door.until(lambda: len(door.plane.cancelled) == 2)
    door.run(door.plane.resume)


class Grpcio:
    """grpcio's own server: `answer` gets the request's bytes and the context."""

    def __init__(self, answer, **options):
        handler = grpc.unary_unary_rpc_method_handler(answer)
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=list(options.items()))
        handlers = {"ModelInfer": handler}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(v2.SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self._server.stop(0).wait(10)


def test_grpc_servers_of_the_c_core_are_spoken_to():
    with Grpcio(lambda message, context: message) as server:
        for count in (4, 300_000):
            loop, record = run(*grpc_to(server.port, count), due_s=np.linspace(0, 0.1, 20))
            assert loop.reasons == {}
            assert outcomes(record) == ["OK"] * 20


def test_grpc_errors_of_the_c_core_are_told_in_its_words():
    def answer(message, context):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full, 100 %")

    with Grpcio(answer) as server:
        loop, record = run(*grpc_to(server.port), due_s=np.zeros(5))
        assert outcomes(record) == ["FAILED"] * 5
        assert loop.reasons == {"gRPC status 8: the queue is full, 100 %": 5}


def test_grpc_no_more_streams_are_opened_than_the_server_takes():
    most = [0, 0]
    lock = threading.Lock()

    def answer(message, context):
        with lock:
            most[0] += 1
            most[1] = max(most)
        time.sleep(0.01)
        with lock:
            most[0] -= 1
        return message

    with Grpcio(answer, **{"grpc.max_concurrent_streams": 3}) as server:
        loop, record = run(*grpc_to(server.port), due_s=np.zeros(12))
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"] * 12
        assert most[1] <= 3
        assert loop.full_s > 0


class RawServer:
    """A gRPC server that sends the frames a test says: `talk(peer)` runs once per connection."""

    def __init__(self, talk, settings=b""):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._talk, self._settings = talk, settings
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self):
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, connection):
        connection.settimeout(10)
        with connection, contextlib.suppress(OSError, EOFError):
            peer = RawConnection(connection)
            assert peer.take(len(PREFACE)) == PREFACE
            peer.send(frame(h2.SETTINGS, 0, 0, self._settings))
            self._talk(peer)


class RawConnection:
    def __init__(self, connection):
        self.socket, self._kept, self.encoder = connection, b"", hpack.Encoder()

    def send(self, content):
        self.socket.sendall(content)

    def take(self, count):
        while len(self._kept) < count:
            found = self.socket.recv(1 << 16)
            if not found:
                raise EOFError
            self._kept += found
        taken, self._kept = self._kept[:count], self._kept[count:]
        return taken

    def request(self):
        """Read to the end of the next request; return its stream and the lengths of its DATA frames."""
        lengths = []
        while True:
            high, low, kind, flags, stream_id = FRAME.unpack(self.take(9))
            self.take(high << 8 | low)
            if kind == h2.DATA:
                lengths.append(high << 8 | low)
                if flags & h2.END_STREAM:
                    return stream_id, lengths

    def head(self, stream_id):
        block = self.encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
        return frame(h2.HEADERS, h2.END_HEADERS, stream_id, block)

    def tail(self, stream_id, status="0", flags=h2.END_HEADERS | h2.END_STREAM):
        return frame(h2.HEADERS, flags, stream_id, self.encoder.encode([("grpc-status", status)]))

    def answer(self, stream_id):
        return self.head(stream_id) + frame(h2.DATA, 0, stream_id, b"\0\0\0\0\1x") + self.tail(stream_id)


def test_grpc_answers_are_understood_however_they_are_cut():
    def talk(peer):
        while True:
            stream_id, _ = peer.request()
            for byte in peer.answer(stream_id):
                peer.send(bytes((byte,)))

    with RawServer(talk) as server:
        loop, record = run(*grpc_to(server.port), due_s=[0.0, 0.05, 0.1])
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"] * 3


def test_grpc_header_blocks_may_be_padded_or_come_in_several_frames():
    def talk(peer):
        stream_id, _ = peer.request()
        block = peer.encoder.encode([("grpc-status", "0"), ("x", "y" * 50)])
        padded = frame(h2.HEADERS, h2.PADDED | h2.END_STREAM, stream_id, b"\x03" + block[:5] + b"\0\0\0")
        peer.send(peer.head(stream_id) + frame(h2.DATA, 0, stream_id, b"\0\0\0\0\0") + padded)
        peer.send(frame(h2.CONTINUATION, h2.END_HEADERS, stream_id, block[5:]))
        peer.take(1 << 20)

    with RawServer(talk) as server:
        loop, record = run(*grpc_to(server.port))
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"]


def test_grpc_windows_and_frame_sizes_of_the_server_are_kept_to():
    seen = []

    def talk(peer):
        kinds = []
        while not kinds or kinds[-1] != h2.HEADERS:
            high, low, kind, _, stream_id = FRAME.unpack(peer.take(9))
            peer.take(high << 8 | low)
            kinds.append(kind)
        assert kinds == [h2.SETTINGS, h2.WINDOW_UPDATE, h2.SETTINGS, h2.HEADERS]
        taken = 0
        while taken < 40_000:  # in windows of 10,000 bytes
            high, low, kind, flags, _ = FRAME.unpack(peer.take(9))
            if kind == h2.DATA:
                seen.append(high << 8 | low)
                taken += high << 8 | low
                peer.take(high << 8 | low)
                if taken % 10_000 == 0 and not flags & h2.END_STREAM:
                    peer.send(frame(h2.WINDOW_UPDATE, 0, stream_id, (10_000).to_bytes(4, "big")))
        peer.send(peer.answer(stream_id))

    settings = (4).to_bytes(2, "big") + (10_000).to_bytes(4, "big")
    with RawServer(talk, settings) as server:
        wire, _ = grpc_to(server.port)
        message = payload.Message(payload.header_block("test"), b"x" * (40_000 - 5))
        loop, record = run(wire, [message])
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"]
        assert seen == [10_000] * 4


def test_grpc_pings_are_answered():
    answered = threading.Event()

    def talk(peer):
        stream_id, _ = peer.request()
        peer.send(frame(h2.PING, 0, 0, b"anybody?"))
        while True:
            high, low, kind, flags, _ = FRAME.unpack(peer.take(9))
            content = peer.take(high << 8 | low)
            if kind == h2.PING:
                assert flags & h2.ACK
                assert content == b"anybody?"
                answered.set()
                peer.send(peer.answer(stream_id))

    with RawServer(talk) as server:
        _, record = run(*grpc_to(server.port))
        assert outcomes(record) == ["OK"]
        assert answered.is_set()


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        (lambda peer, id: frame(h2.RST_STREAM, 0, id, (2).to_bytes(4, "big")), "reset the stream"),
        (lambda peer, id: peer.tail(id, "13"), "gRPC status 13"),
        (lambda peer, id: peer.head(id) + peer.tail(id), "holds no message"),
        (lambda peer, id: peer.head(id) + frame(h2.DATA, h2.END_STREAM, id, b"\0\0\0\0\0"), "without a gRPC status"),
        (lambda peer, id: frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, id, b"\x8d"), "but HTTP 404"),
        (lambda peer, id: frame(h2.HEADERS, h2.END_HEADERS, id, b"\xff\xff\xff\xff\xff\xff\xff"), "cannot be decoded"),
        (lambda peer, id: frame(h2.PING, 0, 0, b"x" * 20_000), "20000 bytes"),
        (lambda peer, id: b"", "closed before the answer was complete"),
    ],
)
def test_grpc_answers_that_are_none_are_failures(say, reason):
    def talk(peer):
        stream_id, _ = peer.request()
        peer.send(say(peer, stream_id))
        if say(peer, stream_id):
            peer.take(1 << 20)

    with RawServer(talk) as server:
        loop, record = run(*grpc_to(server.port))
        assert outcomes(record) == ["FAILED"]
        assert reason in next(iter(loop.reasons))


def test_grpc_a_server_that_leaves_gets_later_requests_on_a_new_connection():
    connections = []

    def talk(peer):
        connections.append(peer)
        stream_id, _ = peer.request()
        peer.send(frame(h2.GOAWAY, 0, 0, stream_id.to_bytes(4, "big") + bytes(4)))
        time.sleep(0.4)  # the next request is due meanwhile, long after the word has come
        peer.send(peer.answer(stream_id))

    with RawServer(talk) as server:
        loop, record = run(*grpc_to(server.port), due_s=[0.0, 0.3, 0.9])
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"] * 3
        assert len(connections) == 3


def test_grpc_what_the_server_refused_to_begin_with_is_sent_again_and_stays_issued_when_it_first_was():
    def talk(peer):
        for _ in range(3):
            refused, _ = peer.request()
            time.sleep(0.03)
            peer.send(frame(h2.RST_STREAM, 0, refused, h2.REFUSED_STREAM.to_bytes(4, "big")))
        peer.send(peer.answer(peer.request()[0]))

    with RawServer(talk) as server:
        loop, record = run(*grpc_to(server.port))
        assert loop.reasons == {}
        assert outcomes(record) == ["OK"]
        assert record.issue_delay_s[0] < 0.03
        assert record.service_s[0] > 0.09


def test_grpc_a_server_that_refuses_all_the_time_is_not_asked_for_ever():
    def talk(peer):
        while True:
            peer.send(frame(h2.RST_STREAM, 0, peer.request()[0], h2.REFUSED_STREAM.to_bytes(4, "big")))

    with RawServer(talk) as server:
        loop, record = run(*grpc_to(server.port))
        assert outcomes(record) == ["FAILED"]
        assert loop.reasons == {"the server reset the stream (HTTP/2 error 7)": 1}


def test_a_server_that_speaks_no_grpc_is_told_before_the_run():
    with WireServer(lambda request: None) as server, pytest.raises(Unavailable, match=r"does not speak gRPC"):
        run(*grpc_to(server.port))
