"""The HTTP door over a fake plane: inference both ways, however the bytes come in."""

import gzip
import json
import socket
import zlib

import numpy as np
import pytest

from tenure.errors import Unavailable
from tenure.serve.faults import ModelFailed, Overloaded
from tenure.serve.limits import DoorLimits
from tenure.serve.tensors import TensorMetadata

from .fakes import FakePlane
from .http_door import X, get, head, json_request, raw_body, raw_request, run
from .models import Kind


def doubled(reply, x=X):
    assert reply.status == 200, reply
    np.testing.assert_array_equal(reply.array(np.float32), (x * 2).reshape(-1))
    return True


@pytest.mark.parametrize("uv", [True, False])
def test_raw_tensors_are_answered_raw_again_and_again_on_one_connection(uv):
    async def go(bench):
        wire = await bench.wire()
        for factor in range(5):
            doubled(await wire.ask(raw_request(X * factor)), X * factor)
        reply = await wire.ask(raw_request(X[:1]))  # another shape: other heads
        doubled(reply, X[:1])
        assert reply.headers["content-type"] == "application/octet-stream"
        described = json.loads(reply.body[: int(reply.headers["inference-header-content-length"])])
        assert described["model_name"] == "double"
        assert described["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
        ]
        assert len(bench.plane.calls) == 6

    run(go, uv=uv)


@pytest.mark.parametrize("uv", [True, False])
def test_a_body_larger_than_one_read_goes_straight_to_its_buffer(uv):
    async def go(bench):
        x = np.random.default_rng(0).normal(size=(40_000, 4)).astype(np.float32)
        wire = await bench.wire()
        doubled(await wire.ask(raw_request(x)), x)
        doubled(await wire.ask(raw_request(X)))
        bench.plane.calls.clear()

    run(go, uv=uv)


def test_a_request_is_understood_wherever_it_is_cut():
    async def go(bench):
        request = raw_request()
        wire = await bench.wire()
        for cut in range(1, len(request)):
            await wire.drip(request[:cut], cut)
            await wire.drip(request[cut:], len(request))
            doubled(await wire.reply())
        await wire.drip(request)
        doubled(await wire.reply())

    run(go)


@pytest.mark.parametrize("uv", [True, False])
def test_requests_sent_ahead_are_answered_in_order_one_at_a_time(uv):
    async def go(bench):
        bench.plane.paused = True
        wire = await bench.wire()
        wire.send(b"".join(raw_request(X + i) for i in range(200)) + get("/v2/health/live") + json_request())
        await bench.until(lambda: len(bench.plane.calls) == 1)
        bench.plane.resume()
        for i in range(200):
            doubled(await wire.reply(), X + i)
        assert (await wire.reply()).json == {"live": True}
        assert (await wire.reply()).json["outputs"][0]["data"] == (X * 2).reshape(-1).tolist()

    run(go, uv=uv)


def test_json_is_answered_in_json_and_raw_only_where_asked():
    async def go(bench):
        reply = await bench.ask(json_request())
        assert reply.json["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [2, 4], "data": (X * 2).reshape(-1).tolist()}
        ]
        body, length = raw_body(outputs=[{"name": "y", "parameters": {"binary_data": False}}])
        reply = await bench.ask(head(len(body), f"Inference-Header-Content-Length: {length}") + body)
        assert reply.json["outputs"][0]["data"] == (X * 2).reshape(-1).tolist()
        body = json.loads(json_request().partition(b"\r\n\r\n")[2])
        body = json.dumps({**body, "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
        doubled(await bench.ask(head(len(body)) + body))

    run(go)


def test_long_json_is_worked_on_aside():
    async def go(bench):
        x = np.arange(400_000, dtype=np.float32).reshape(-1, 4)
        reply = await bench.ask(json_request(x.tolist(), shape=list(x.shape)))
        np.testing.assert_array_equal(reply.json["outputs"][0]["data"], (x * 2).reshape(-1))
        refused = await bench.ask(json_request(x.tolist()[:-1], shape=list(x.shape)))
        assert refused.status == 400
        wire = await bench.wire()
        wire.send(json_request(x.tolist(), shape=list(x.shape)))
        await bench.until(lambda: bench.plane.held_bytes > 0)
        wire.close()  # memory is given back all the same, which `run` checks

    run(go)


def test_ids_come_back_and_are_not_remembered():
    async def go(bench):
        wire = await bench.wire()
        for i in range(1500):
            reply = await wire.ask(raw_request(X, id=f"n{i}"))
            described = json.loads(reply.body[: int(reply.headers["inference-header-content-length"])])
            assert described["id"] == f"n{i}"
        assert not bench.door._known

    run(go)


def test_what_is_remembered_has_a_bound():
    async def go(bench):
        wire = await bench.wire()
        for i in range(1100):
            request = raw_request(X, f"X-N: {i}", outputs=[{"name": "y", "parameters": {"binary_data": True, "n": i}}])
            doubled(await wire.ask(request))
        assert len(bench.door._heads) == len(bench.door._known) == 1024

    run(go)


def test_priority_and_timeout_reach_the_call():
    async def go(bench):
        doubled(await bench.ask(raw_request(parameters={"binary_data_output": True, "priority": 2, "timeout": 1500})))
        call = bench.plane.calls[0]
        assert (call.priority, call.timeout_s) == (2, 0.0015)

    run(go)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("way", ["length", "chunked"])
def test_packed_and_chunked_bodies_mean_the_same(encoding, way):
    async def go(bench):
        x = np.zeros((30_000, 4), np.float32)
        body, length = raw_body(x)
        packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
        lines = [f"Inference-Header-Content-Length: {length}", f"Content-Encoding: {encoding}"]
        wire = await bench.wire()
        for _ in range(2):
            if way == "length":
                wire.send(head(len(packed), *lines) + packed)
            else:
                cut = len(packed) // 2
                pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (packed[:cut], packed[cut:]))
                await wire.drip(head(None, "Transfer-Encoding: chunked", *lines) + pieces + b"0\r\n\r\n", 50)
            doubled(await wire.reply(), x)

    run(go)


def test_a_long_chunked_body_grows_within_its_limit():
    async def go(bench):
        x = np.ones((50_000, 4), np.float32)
        body, length = raw_body(x)
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[at : at + 7000] for at in range(0, len(body), 7000)))
        lines = ("Transfer-Encoding: chunked", f"Inference-Header-Content-Length: {length}")
        doubled(await bench.ask(head(None, *lines) + pieces + b"0\r\n\r\n"), x)

    run(go)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_answers_are_packed_where_the_client_names_one_encoding(encoding):
    async def go(bench):
        for x in (np.ones((100, 4), np.float32), np.ones((50_000, 4), np.float32)):
            reply = await bench.ask(raw_request(x, f"Accept-Encoding: {encoding}"))
            assert reply.headers["content-encoding"] == encoding
            reply.body = gzip.decompress(reply.body) if encoding == "gzip" else zlib.decompress(reply.body)
            doubled(reply, x)
        assert "content-encoding" not in (await bench.ask(raw_request(X, "Accept-Encoding: gzip, deflate"))).headers

    run(go)


def test_who_asks_before_sending_is_told_to_go_on_once_there_is_room():
    async def go(bench):
        body, length = raw_body()
        wire = await bench.wire()
        wire.send(head(len(body), f"Inference-Header-Content-Length: {length}", "Expect: 100-continue"))
        assert (await wire.reply()).status == 100
        assert bench.plane.held_bytes == len(body)
        doubled(await wire.ask(body))
        bench.plane.budget_bytes = 10
        reply = await wire.ask(head(len(body), f"Inference-Header-Content-Length: {length}", "Expect: 100-continue"))
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert await wire.ended() == b""

    run(go)


def test_old_and_closing_clients_are_answered_as_they_ask():
    async def go(bench):
        wire = await bench.wire()
        reply = await wire.ask(raw_request(X, "Connection: close"))
        doubled(reply)
        assert reply.headers["connection"] == "close"
        assert await wire.ended() == b""
        wire = await bench.wire()
        old = raw_request(X, "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
        for _ in range(2):
            reply = await wire.ask(old)
            doubled(reply)
            assert reply.headers["connection"] == "keep-alive"
        doubled(await wire.ask(raw_request().replace(b"HTTP/1.1", b"HTTP/1.0")))
        assert await wire.ended() == b""
        assert (await bench.ask(b"\r\n" + get("/v2/health/live"))).status == 200

    run(go)


def test_a_thousand_outputs_are_written_together():
    names = tuple(TensorMetadata(f"y{n}", "FP32", (-1, 4)) for n in range(1100))
    wide = Kind((TensorMetadata("x", "FP32", (-1, 4)),), names, lambda arrays: {each.name: arrays["x"] for each in names})

    async def go(bench):
        wire = await bench.wire()
        for _ in range(2):
            reply = await wire.ask(raw_request(path="/v2/models/wide/infer"))
            assert (reply.array(np.float32).reshape(1100, 2, 4) == X).all()

    run(go, plane=FakePlane(wide=wide))


def test_what_goes_wrong_while_a_long_answer_is_written_is_told(caplog, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    async def go(bench):
        wire = await bench.wire()
        monkeypatch.setattr("tenure.serve.http_answers.pack", fail)
        reply = await wire.ask(raw_request(np.ones((40_000, 4), np.float32), "Accept-Encoding: gzip"))
        assert (reply.status, "ZeroDivisionError" in reply.json["error"]) == (500, True)
        doubled(await wire.ask(raw_request()))

    run(go)


def test_the_door_opens_on_ipv6():
    async def go(bench):
        doubled(await bench.ask(raw_request()))

    run(go, family=socket.AF_INET6)


def test_text_and_several_tensors_are_carried():
    async def go(bench):
        request = {"inputs": [{"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "héllo"]}]}
        body = json.dumps(request).encode()
        reply = await bench.ask(head(len(body), path="/v2/models/upper/infer") + body)
        assert reply.json["outputs"][0]["data"] == ["A", "HéLLO"]
        pair = [{"name": n, "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}} for n in "ab"]
        content = json.dumps({"inputs": pair, "parameters": {"binary_data_output": True}}).encode()
        body = content + np.array([5, 6, 1, 2]).tobytes()
        lines = (f"Inference-Header-Content-Length: {len(content)}",)
        reply = await bench.ask(head(len(body), *lines, path="/v2/models/sums/infer") + body)
        assert reply.array(np.int64).tolist() == [6, 8, 4, 4]

    run(go)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ModelFailed("it raised"), 500), (Unavailable("no instance"), 503), (Overloaded("full", retry_after_s=2.25), 429)],
)
def test_what_becomes_of_a_call_is_told_and_the_connection_stays(error, status):
    async def go(bench):
        wire = await bench.wire()
        for way in ("fail_with", "refuse_with"):
            setattr(bench.plane, way, error)
            reply = await wire.ask(raw_request())
            assert (reply.status, reply.json) == (status, {"error": str(error)})
            if status == 429:
                assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("3", "2250")
            setattr(bench.plane, way, None)
        doubled(await wire.ask(raw_request()))

    run(go)


def test_a_refused_body_is_forgotten_and_the_connection_stays():
    async def go(bench):
        wire = await bench.wire()
        x = np.ones((40_000, 4), np.float32)
        bench.plane.budget_bytes = 100_000
        for request in (raw_request(x), json_request(x.tolist(), shape=list(x.shape))):
            wire.send(request)
            reply = await wire.reply()
            assert reply.status == 413
        held = bench.plane.reserve(99_000, "other")
        for _ in range(3):
            reply = await wire.ask(raw_request(x[:5_000]) + raw_request(X))
            assert (reply.status, reply.headers["retry-after"], reply.headers["retry-after-ms"]) == (429, "1", "500")
            doubled(await wire.reply())
        bench.plane.release(held)
        doubled(await wire.ask(raw_request()))

    run(go)


def test_a_long_refused_body_is_not_read_to_its_end():
    async def go(bench):
        wire = await bench.wire()
        wire.send(head(50 << 20, "Inference-Header-Content-Length: 5") + b"x" * 1000)
        reply = await wire.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")
        assert await wire.ended() == b""

    run(go, limits=DoorLimits(max_request_bytes=1 << 20))


def test_a_client_that_leaves_has_its_call_cancelled():
    async def go(bench):
        bench.plane.paused = True
        for leave in (
            lambda wire: wire.close(),
            lambda wire: wire.writer.transport.abort(),
            lambda wire: wire.writer.write_eof(),
        ):
            wire = await bench.wire()
            wire.send(raw_request())
            await bench.until(lambda: bench.plane.held_bytes > 0)
            leave(wire)
            await bench.until(lambda: bench.plane.held_bytes == 0)
        assert len(bench.plane.cancelled) == 3

    run(go)


def test_a_client_that_leaves_within_a_body_gives_its_memory_back():
    async def go(bench):
        for part in (
            raw_request(np.ones((40_000, 4), np.float32))[:90_000],
            json_request([1] * 40_000)[:-5],
            head(50, "Content-Encoding: gzip"),
        ):
            wire = await bench.wire()
            wire.send(part)
            await bench.until(lambda: bench.plane.held_bytes > 0)
            wire.close()
            await bench.until(lambda: bench.plane.held_bytes == 0)

    run(go)


def test_shared_memory_stands_for_inputs_and_outputs():
    from multiprocessing.shared_memory import SharedMemory

    async def go(bench):
        region = SharedMemory(create=True, size=4096)
        try:
            np.frombuffer(region.buf, np.float32, 8)[:] = X.reshape(-1)
            body = json.dumps({"key": "/" + region.name, "byte_size": 4096}).encode()
            assert (await bench.ask(head(len(body), path="/v2/systemsharedmemory/region/r/register") + body)).status == 200
            place = {"shared_memory_region": "r", "shared_memory_byte_size": 32}
            tensor = {"name": "x", "datatype": "FP32", "shape": [2, 4], "parameters": place}
            wanted = {"name": "y", "parameters": {**place, "shared_memory_offset": 64}}
            request = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
            wire = await bench.wire()
            for lines in ([], [f"Inference-Header-Content-Length: {len(request)}"]) * 2:
                region.buf[64:96] = bytes(32)
                reply = await wire.ask(head(len(request), *lines) + request)
                assert reply.json["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2, 4]}]
                np.testing.assert_array_equal(np.frombuffer(region.buf, np.float32, 8, 64), (X * 2).reshape(-1))
            assert len(bench.door._known) == 1
        finally:
            region.close()
            region.unlink()

    run(go)


def test_a_door_that_fails_says_so_and_goes_on(caplog):
    async def go(bench):
        def fail(*_):
            raise ZeroDivisionError("our own mistake")

        reserve, bench.plane.reserve = bench.plane.reserve, fail
        reply = await bench.ask(raw_request())
        assert (reply.status, reply.json) == (500, {"error": "the server failed: ZeroDivisionError"})
        bench.plane.reserve = reserve
        doubled(await bench.ask(raw_request()))

    run(go)
    assert "our own mistake" in caplog.text


def test_a_head_that_cannot_be_read_is_told_why_though_the_request_before_wanted_no_body():
    async def go(bench):
        wire = await bench.wire()
        assert (await wire.ask(b"HEAD /v2 HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD")).status == 200
        reply = await wire.ask(b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n")
        assert reply.status == 400
        assert "content-length" in reply.json["error"]

    run(go)
