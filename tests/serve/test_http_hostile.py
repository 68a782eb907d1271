"""The HTTP door against clients that are broken, slow or mean: bounds hold, others are served, nothing stays held."""

import asyncio
import gzip
import itertools
import json
import re
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.serve.limits import DoorLimits
from tenure.serve.tensors import TensorMetadata

from .fakes import FakePlane
from .http_door import X, get, head, json_request, raw_body, raw_request, run
from .models import Kind

WIDE = Kind(
    (TensorMetadata("x", "FP32", (-1, 4)),),
    (TensorMetadata("y", "UINT8", (-1,)),),
    lambda arrays: {"y": np.zeros(int(arrays["x"][0, 0]), np.uint8)},
)
"""Answers as many bytes as the input says."""


def served(reply):
    assert reply.status == 200
    np.testing.assert_array_equal(reply.array(np.float32), (X * 2).reshape(-1))
    return True


@pytest.mark.parametrize(
    "start",
    [
        b"POST /v2/mod",
        head(500, "Inference-Header-Content-Length: 100") + b"{",
        raw_request(np.ones((40_000, 4), np.float32))[:90_000],
        json_request()[:-4],
        head(None, "Transfer-Encoding: chunked") + b"5\r\nab",
        head(90, "Content-Encoding: gzip") + b"\x1f",
    ],
    ids=["head", "json", "tensor", "json-body", "chunks", "packed"],
)
def test_a_request_that_does_not_end_is_given_up_and_its_memory_freed(start):
    async def go(bench):
        wire = await bench.wire()
        wire.send(start)
        reply = await wire.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert "did not arrive" in reply.json["error"]
        assert bench.plane.held_bytes == 0
        served(await bench.ask(raw_request()))
        wire.close()

    run(go, limits=DoorLimits(head_timeout_s=0.08, body_timeout_s=0.08))


def test_who_claims_much_and_sends_little_loses_its_memory_early():
    async def go(bench):
        x = np.ones((40_000, 4), np.float32)
        slow, steady = await bench.wire(), await bench.wire()
        slow.send(raw_request(x)[:70_000])
        steady.send(raw_request(x)[:600_000])
        reply = await slow.reply()
        assert (reply.status, "did not arrive, or would not" in reply.json["error"]) == (408, True)
        assert bench.plane.held_bytes == x.nbytes
        steady.send(raw_request(x)[600_000:])
        assert (await steady.reply()).status == 200

    run(go, limits=DoorLimits(body_timeout_s=0.8, head_timeout_s=0.2))


def test_dripping_does_not_prolong_a_head():
    async def go(bench):
        wire = await bench.wire()

        async def drip():
            try:
                for byte in (raw_request()[:300] * 1000)[:100_000]:
                    wire.send(bytes([byte]))
                    await asyncio.sleep(0.01)
            except ConnectionError:
                pass

        dripping = asyncio.create_task(drip())
        assert (await wire.reply()).status == 408
        dripping.cancel()

    run(go, limits=DoorLimits(head_timeout_s=0.1))


def test_a_silent_connection_is_closed_and_one_that_waits_for_its_answer_is_not():
    async def go(bench):
        bench.plane.paused = True
        waiting, silent = await bench.wire(), await bench.wire()
        waiting.send(raw_request())
        assert await silent.ended() == b""
        served_once = await bench.wire()
        await bench.until(lambda: len(bench.plane.calls) == 1)
        bench.plane.resume()
        served(await waiting.reply())
        assert await waiting.ended() == b""
        assert await served_once.ended() == b""

    run(go, limits=DoorLimits(idle_timeout_s=0.1))


def test_a_client_that_does_not_read_is_closed_and_its_answer_freed():
    async def go(bench):
        wire = await bench.wire()
        wire.writer.transport.pause_reading()
        wire.send(raw_request(np.full((1, 4), 30e6, np.float32), path="/v2/models/wide/infer") * 3)
        await bench.until(lambda: bench.door.unsent_bytes > 1 << 20)
        assert len(bench.plane.calls) == 1  # what it sends meanwhile waits, unread
        await bench.until(lambda: bench.door.unsent_bytes == 0)
        wire.writer.transport.resume_reading()
        assert 0 < len(await wire.ended()) < 30e6

    run(go, plane=FakePlane("double", wide=WIDE), limits=DoorLimits(write_timeout_s=0.2))


def test_a_client_that_reads_late_gets_all_of_it():
    async def go(bench):
        wire = await bench.wire()
        wire.writer.transport.pause_reading()
        wire.send(raw_request(np.full((1, 4), 20e6, np.float32), path="/v2/models/wide/infer") + raw_request())
        await bench.until(lambda: bench.door.unsent_bytes > 1 << 20)
        wire.writer.transport.resume_reading()
        reply = await wire.reply()
        assert len(reply.array(np.uint8)) == 20_000_000
        assert not reply.array(np.uint8).any()
        served(await wire.reply())
        assert bench.door.unsent_bytes == 0

    run(go, plane=FakePlane("double", wide=WIDE))


def test_unsent_answers_have_a_bound_over_all_connections():
    async def go(bench):
        mean = []
        for _ in range(8):
            wire = await bench.wire()
            wire.writer.transport.pause_reading()
            wire.send(raw_request(np.full((1, 4), 20e6, np.float32), path="/v2/models/wide/infer"))
            mean.append(wire)
        await bench.until(lambda: len(bench.plane.calls) == 8)
        await bench.until(lambda: len(bench.door._connections) < 8 and bench.door.unsent_bytes <= 40e6)
        served(await bench.ask(raw_request()))

    run(go, plane=FakePlane("double", wide=WIDE), limits=DoorLimits(max_unsent_bytes=40_000_000))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_refused_at_the_limit_and_others_are_served_meanwhile(encoding):
    async def go(bench):
        content = bytes(200 << 20)
        bomb = gzip.compress(content, 9) if encoding == "gzip" else zlib.compress(content, 9)
        wire = await bench.wire()
        wire.send(head(len(bomb), f"Content-Encoding: {encoding}") + bomb)
        served(await bench.ask(raw_request()))
        reply = await wire.reply()
        assert (reply.status, "unpacked" in reply.json["error"]) == (413, True)
        served(await wire.ask(raw_request()))  # the rest was small: the connection stays

    run(go, limits=DoorLimits(max_request_bytes=32 << 20), plane=FakePlane("double", budget_bytes=256 << 20))


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"not packed", "unpacked"), (gzip.compress(b"{}")[:-3], "ends before"), (gzip.compress(b"{}") + b"more", "follow")],
)
def test_a_body_that_is_not_packed_as_it_says_is_refused(body, reason):
    async def go(bench):
        wire = await bench.wire()
        reply = await wire.ask(head(len(body), "Content-Encoding: gzip") + body)
        assert (reply.status, reason in reply.json["error"]) == (400, True)
        served(await wire.ask(raw_request()))

    run(go)


def test_a_chunked_body_past_the_limit_or_the_budget_is_refused():
    async def go(bench):
        chunk = b"%x\r\n%b\r\n" % (50_000, bytes(50_000))
        for budget, status in ((64 << 20, 413), (1 << 18, 429)):
            bench.plane.budget_bytes = budget
            kept = bench.plane.reserve(100_000, "other") if status == 429 else None
            wire = await bench.wire()
            wire.send(head(None, "Transfer-Encoding: chunked") + chunk * 40)
            reply = await wire.reply()
            assert (reply.status, reply.headers["connection"]) == (status, "close")
            if kept is not None:
                bench.plane.release(kept)

    run(go, limits=DoorLimits(max_request_bytes=1 << 20), plane=FakePlane("double", max_request_bytes=1 << 18))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (head(4, "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
        (head(4, "Content-Length: 5") + b"abcde", 400),
        (head(None, "Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (head(None, "Transfer-Encoding: gzip, chunked"), 501),
        (head(3, "Expect: tea"), 417),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", 431),
        (b"\r\n" * 10 + b"garbage\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_ends_the_connection_with_the_reason(request_, status):
    async def go(bench):
        wire = await bench.wire()
        reply = await wire.ask(request_ + raw_request())
        assert (reply.status, reply.headers["connection"], bool(reply.json["error"])) == (status, "close", True)
        assert await wire.ended() == b""  # nothing after it is taken for a request
        assert bench.plane.calls == []

    run(go)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head(3, "Content-Encoding: br") + b"abc", 415),
        (head(3, "Inference-Header-Content-Length: -1") + b"abc", 400),
        (head(3, path="/v2/%ff/infer") + b"abc", 400),
        (get("*", method="OPTIONS"), 400),
    ],
)
def test_a_request_whose_end_is_sure_is_refused_and_the_next_one_answered(request_, status):
    async def go(bench):
        wire = await bench.wire()
        for _ in range(2):
            reply = await wire.ask(request_ + raw_request())
            assert (reply.status, bool(reply.json["error"])) == (status, True)
            served(await wire.reply())

    run(go)


class Asked(FakePlane):
    """A plane that counts how often it was asked whether it is ready."""

    asked = 0

    @property
    def ready(self):
        self.asked += 1
        return True


def test_a_row_of_requests_that_are_answered_at_once_lets_others_in_between():
    async def go(bench):
        many, one = await bench.wire(), await bench.wire()
        served(await one.ask(raw_request()))
        many.send(get("/v2/health/ready") * 1000)
        served(await one.ask(raw_request()))
        assert bench.plane.asked < 500
        for _ in range(1000):
            assert (await many.reply()).json == {"ready": True}

    run(go, plane=Asked("double"))


def test_past_the_most_connections_new_ones_wait_to_be_accepted():
    async def go(bench):
        first = [await bench.wire() for _ in range(4)]
        for wire in first:
            served(await wire.ask(raw_request()))
        late = await bench.wire()  # the kernel has it, the door not yet
        late.send(raw_request())
        served(await first[0].ask(raw_request()))
        assert len(bench.door._connections) == 4
        first[0].close()
        served(await late.reply())

    run(go, limits=DoorLimits(max_connections=4))


def test_idle_connections_do_not_keep_others_out_for_long():
    async def go(bench):
        first = [await bench.wire() for _ in range(4)]
        for wire in first:
            served(await wire.ask(raw_request()))
        bench.plane.paused = True
        first[1].send(raw_request())  # busy ones stay
        late = await bench.wire()
        late.send(raw_request())
        assert await first[0].ended() == b""  # idle longest
        await bench.until(lambda: len(bench.plane.calls) == 6)
        bench.plane.resume()
        served(await first[1].reply())
        served(await late.reply())

    run(go, limits=DoorLimits(max_connections=4, head_timeout_s=0.2))


def test_idle_connections_that_keep_nobody_out_stay():
    async def go(bench):
        wires = [await bench.wire() for _ in range(4)]
        for wire in wires:
            served(await wire.ask(raw_request()))
        asked_s = bench.door.now_s
        await bench.until(lambda: bench.door.now_s > asked_s + 4 * bench.door.tick_s)
        for wire in wires:
            served(await wire.ask(raw_request()))

    run(go, limits=DoorLimits(max_connections=4, head_timeout_s=0.2))


def test_memory_past_the_budget_is_refused_at_once_and_then_free_again():
    async def go(bench):
        bench.plane.paused = True
        body = raw_request(np.ones((4096, 4), np.float32))
        wires = [await bench.wire() for _ in range(40)]
        for wire in wires:
            wire.send(body)
        await bench.until(lambda: len(bench.plane.calls) == 16)
        for wire in wires[16:]:
            reply = await wire.reply()
            assert (reply.status, "retry-after-ms" in reply.headers) == (429, True)
        bench.plane.resume()
        for wire in wires[:16]:
            assert (await wire.reply()).status == 200
        for wire in wires:
            served(await wire.ask(raw_request()))

    run(go, plane=FakePlane("double", budget_bytes=1 << 20))


def test_a_door_that_closes_answers_what_is_due_and_nothing_else():
    async def go(bench):
        idle, waiting = await bench.wire(), await bench.wire()
        served(await idle.ask(raw_request()))
        bench.plane.paused = True
        waiting.send(raw_request() + raw_request())
        await bench.until(lambda: len(bench.plane.calls) == 2)
        closing = asyncio.create_task(bench.door.close(20))
        assert await idle.ended() == b""
        late = await bench.wire()  # the listening socket is the caller's: it queues, and nobody accepts
        late.send(get("/v2"))
        bench.plane.resume()
        reply = await waiting.reply()
        served(reply)
        assert reply.headers["connection"] == "close"
        assert await waiting.ended() == b""
        await asyncio.wait_for(closing, 20)
        assert len(bench.plane.calls) == 2

    run(go)


VALID = [
    (raw_request(), 200),
    (json_request(), 200),
    (get("/v2/health/live"), 200),
    (get("/v2/models/absent"), 404),
    (raw_request(X[0]), 400),
    (head(len(raw_body()[0]), path="/v2/models/absent/infer") + raw_body()[0], 400),
    (head(None, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", 400),
    (
        head(len(gzip.compress(json_request().split(b"\r\n\r\n", 1)[1])), "Content-Encoding: gzip")
        + gzip.compress(json_request().split(b"\r\n\r\n", 1)[1]),
        200,
    ),
    (raw_request(path="/v2/models/picky/infer"), 200),
    (raw_request(-X, path="/v2/models/picky/infer"), 500),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(VALID), min_size=1, max_size=8), st.lists(st.integers(0, 4000), max_size=12))
def test_any_requests_in_a_row_cut_anywhere_are_answered_in_order(requests, cuts):
    stream = b"".join(request for request, _ in requests)
    bounds = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})

    async def go(bench):
        wire = await bench.wire()
        for start, stop in itertools.pairwise(bounds):
            await wire.drip(stream[start:stop], len(stream))
        for _, status in requests:
            assert (await wire.reply()).status == status

    run(go)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_streams_are_answered_or_refused_and_others_are_served(data):
    requests = data.draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=3))
    stream = bytearray(b"".join(request for request, _ in requests))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(stream) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "repeat"])):
            case "set":
                stream[at] = data.draw(st.integers(0, 255))
            case "cut":
                del stream[at : at + data.draw(st.integers(1, 40))]
            case "insert":
                stream[at:at] = data.draw(st.sampled_from([b"\r\n", b"\n", b" ", b"\0", b"0", b"-", b"[", b'"', b"9" * 30]))
            case "repeat":
                stream[at:at] = stream[at : at + data.draw(st.integers(1, 60))]
        if not stream:
            return

    async def go(bench):
        wire, other = await bench.wire(), await bench.wire()
        wire.send(bytes(stream))
        served(await other.ask(raw_request()))
        await asyncio.sleep(0)
        wire.writer.write_eof()
        answers = await wire.ended()
        for status in re.findall(rb"HTTP/1.1 ([0-9]{3}) ", answers):
            assert status[:1] in b"124" or status in (b"500", b"501", b"505"), answers
        assert b"the server failed" not in answers
        served(await other.ask(raw_request()))

    run(go)


def test_outputs_too_long_to_be_written_as_json_are_refused():
    async def go(bench):
        x = np.ones((300_000, 4), np.float32)
        wire = await bench.wire()
        body, length = raw_body(x, parameters={})
        reply = await wire.ask(head(len(body), f"Inference-Header-Content-Length: {length}") + body)
        assert (reply.status, "4800000 bytes, the limit is 4194304; ask for them raw" in reply.json["error"]) == (400, True)
        served(await wire.ask(raw_request()))

    run(go)


def test_numbers_that_lie_cost_nothing():
    async def go(bench):
        for size in (2**31, 2**47, 2**62, 10**14):
            tensor = {"name": "x", "datatype": "FP32", "shape": [size // 4, 4], "parameters": {"binary_data_size": size * 4}}
            content = json.dumps({"inputs": [tensor]}).encode()
            lines = f"Inference-Header-Content-Length: {len(content)}"
            reply = await bench.ask(head(len(content), lines) + content)
            assert reply.status == 400
            reply = await bench.ask(head(10**14, lines) + content)
            assert reply.status == 413
        reply = await bench.ask(head(5, "Inference-Header-Content-Length: 99999") + b"12345")
        assert reply.status == 400

    run(go)
