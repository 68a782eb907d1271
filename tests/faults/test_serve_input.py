"""Requests that are wrong in every way that a table can hold, over both doors: a reason each, and nobody else notices."""

import json
import math
import socket
import struct
import time

import numpy as np
import psutil
import pytest
from tests.serve.conftest import Server

from tenure.serve import v2
from tenure.serve.client import Model

from .serving import WIDTH, ask_http, instances, loads, write_scaled

grpc = pytest.importorskip("grpc")
pytestmark = pytest.mark.real
ROW_BYTES = WIDTH * 4
HUGE = 2**63 - 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all; at the end it is the same, with the same processes behind it."""
    folder = tmp_path_factory.mktemp("input")
    (folder / "models").mkdir()
    write_scaled(folder / "models" / "one.onnx", 1.0)
    started = Server(folder / "models", folder / "w", "--threads", "1", "--max-request-bytes", "1000000")
    before = [instance.pid for instance in instances(started, "one")]
    yield started
    assert [instance.pid for instance in instances(started, "one")] == before
    assert started.end() == 0


@pytest.fixture(autouse=True)
def _still_right(server):
    """After each test both doors answer a right request right."""
    yield
    x = np.arange(WIDTH, dtype=np.float32).reshape(1, -1)
    for kind, address in server.endpoints.items():
        with Model(f"{kind}://{address}", "one", shm=False) as model:
            np.testing.assert_array_equal(model.predict(x), x)


def tensor(**changes):
    return {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], **changes}


WRONG = {
    "an unknown input": tensor(name="z"),
    "no such type": tensor(datatype="FP31"),
    "another type": tensor(datatype="INT32"),
    "another rank": tensor(shape=[WIDTH]),
    "another width": tensor(shape=[1, WIDTH + 1]),
    "more rows than data": tensor(shape=[2, WIDTH]),
    "a negative length": tensor(shape=[-1, WIDTH]),
    "a product that overflows": tensor(shape=[2**62, WIDTH]),
    "a product that overflows to what was sent": tensor(shape=[2**61 + 1, WIDTH]),
    "a length of 2^63 - 1": tensor(shape=[HUGE, WIDTH]),
    "a thousand dimensions": tensor(shape=[1] * 1000),
    "no dimension": tensor(shape=[]),
    "nothing, of lengths that no array has": tensor(shape=[0, 2**62, 2**62]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_that_does_not_fit_is_refused_with_a_reason_by_json(what, server):
    body = json.dumps({"inputs": [{**WRONG[what], "data": [1.0] * WIDTH}]}).encode()
    status, found, _ = ask_http(server, "POST", "/v2/models/one/infer", body)
    assert (status, bool(found["error"])) == (400, True)


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_that_does_not_fit_is_refused_with_a_reason_in_raw_bytes(what, server):
    text = json.dumps({"inputs": [{**WRONG[what], "parameters": {"binary_data_size": ROW_BYTES}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    status, found, _ = ask_http(server, "POST", "/v2/models/one/infer", text + bytes(ROW_BYTES), headers.items())
    assert (status, bool(found["error"])) == (400, True)


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_that_does_not_fit_is_refused_with_a_reason_by_grpc(what, server):
    wrong = WRONG[what]
    one = v2.ModelInferRequest.InferInputTensor(name=wrong["name"], datatype=wrong["datatype"], shape=wrong["shape"])
    code, told = call(server, v2.ModelInferRequest(model_name="one", inputs=[one], raw_input_contents=[bytes(ROW_BYTES)]))
    assert code is grpc.StatusCode.INVALID_ARGUMENT, told
    assert told


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**32, 0, 10**15, 2**32], [0, WIDTH + 1], [HUGE, 0]])
def test_an_empty_tensor_of_impossible_lengths_is_refused_by_every_encoding(shape, server):
    typed = {"name": "x", "datatype": "FP32", "shape": shape}
    one = v2.ModelInferRequest.InferInputTensor(**typed)
    for message in (
        v2.ModelInferRequest(model_name="one", inputs=[one]),
        v2.ModelInferRequest(model_name="one", inputs=[one], raw_input_contents=[b""]),
    ):
        code, told = call(server, message)
        assert code is grpc.StatusCode.INVALID_ARGUMENT, told
    text = json.dumps({"inputs": [{**typed, "parameters": {"binary_data_size": 0}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    assert ask_http(server, "POST", "/v2/models/one/infer", text, headers.items())[0] == 400
    assert ask_http(server, "POST", "/v2/models/one/infer", json.dumps({"inputs": [{**typed, "data": []}]}).encode())[0] == 400


def call(server, message):
    with grpc.insecure_channel(server.grpc) as channel:
        ask = channel.unary_unary(f"/{v2.SERVICE}/ModelInfer", lambda found: found.SerializeToString(), lambda data: data)
        try:
            return grpc.StatusCode.OK, ask(message, timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()


@pytest.mark.parametrize("size", [-1, 0, ROW_BYTES - 1, ROW_BYTES + 1, 10**15, 2**63, "32", None, 32.0, True])
def test_a_binary_size_that_is_not_what_was_sent_is_refused(size, server):
    text = json.dumps({"inputs": [tensor(parameters={"binary_data_size": size})]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    status, found, _ = ask_http(server, "POST", "/v2/models/one/infer", text + bytes(ROW_BYTES), headers.items())
    assert (status, bool(found["error"])) == (400, True)


def test_nan_infinities_and_denormals_pass_bit_by_bit_over_both_doors(server):
    bits = [0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x00000001, 0x80000000, 0x7F7FFFFF, 0x00800000]
    x = np.array(bits, np.uint32).view(np.float32).reshape(1, WIDTH)
    for kind, address in server.endpoints.items():
        with Model(f"{kind}://{address}", "one", shm=False) as model:
            assert math.isnan(model.predict(x)[0, 0])
            np.testing.assert_array_equal(model.predict(x).view(np.uint32)[0, 2:], np.array(bits[2:], np.uint32))


def pss_bytes(server):
    tree = [psutil.Process(server.process.pid)]
    tree += tree[0].children(recursive=True)
    return sum(process.memory_full_info().pss for process in tree)


def first_line(address, data, *, wait_s=5.0):
    """Send bytes; return the first line of what comes, and after how many seconds."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as link:
        began_s = time.monotonic()
        link.sendall(data)
        return link.recv(4096).split(b"\r\n")[0], time.monotonic() - began_s


@pytest.mark.parametrize("length", [10**9, 10**15, 2**63, 10**30])
def test_a_huge_claimed_length_is_refused_at_once_and_costs_no_memory(length, server):
    before = pss_bytes(server)
    head = b"POST /v2/models/one/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
    for _ in range(20):
        line, took_s = first_line(server.http, head)
        assert line.split()[1] in (b"413", b"400")
        assert took_s < 2
    assert pss_bytes(server) - before < 8 << 20


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name, value):
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


def grpc_status_of(server, data):
    """Send one call's DATA as it is; return what its trailers say, as bytes."""
    usual = {":method": "POST", ":scheme": "http", ":path": f"/{v2.SERVICE}/ModelInfer", "content-type": "application/grpc"}
    block = b"".join(literal(name.encode(), value.encode()) for name, value in usual.items()) + literal(b"te", b"trailers")
    host, _, port = server.grpc.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as link:
        link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, data))
        seen = b""
        while b"grpc-status" not in seen:
            more = link.recv(4096)
            assert more, seen
            seen += more
    return seen


@pytest.mark.parametrize("claimed", [2**32 - 1, 2**31, 1_000_001 + (1 << 20)])
def test_a_message_that_claims_more_than_is_allowed_is_refused_at_once(claimed, server):
    before = pss_bytes(server)
    for _ in range(10):
        assert b"grpc-status\x018" in grpc_status_of(server, struct.pack(">BI", 0, claimed) + b"x" * 50)
    assert pss_bytes(server) - before < 8 << 20


@pytest.mark.parametrize(
    "payload",
    [
        b"\x0a\xff\xff\xff\xff\x0f" + b"one",  # a name of 4 GB
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x2a\x04\x1a\xff\xff\x7f",  # a shape that is longer than its tensor
        b"\x3a" * 500,
        b"\x2b" * 3000,  # groups in groups
        b"\x2a\x80" * 2000,
    ],
)
def test_protobuf_whose_lengths_lie_is_refused(payload, server):
    assert b"grpc-status\x013" in grpc_status_of(server, struct.pack(">BI", 0, len(payload)) + payload)


def test_bad_requests_by_the_hundred_do_not_slow_others_down(server):
    body = json.dumps({"inputs": [tensor(shape=[2**62, WIDTH], data=[1.0])]}).encode()
    with loads(server, "one") as others:
        for _ in range(200):
            assert ask_http(server, "POST", "/v2/models/one/infer", body)[0] == 400
        for load in others:
            load.more()
    for load in others:
        assert load.errors == []
        assert load.right(1.0)
        assert load.slowest_s < 2
