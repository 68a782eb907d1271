"""The HTTP door of a real server: the protocol's two encodings, and everything that must be refused."""

import http.client
import json
import random
import socket

import numpy as np
import pytest

pytestmark = pytest.mark.real


def exchange(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(server.http, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def infer(server, body, headers=None, model="digits"):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return exchange(server, "POST", f"/v2/models/{model}/infer", body, headers)


def json_request(x, **changes):
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist(), **changes}
    return {"id": "7", "inputs": [tensor]}


def binary_request(x, size=None, length=None, **changes):
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), **changes}
    tensor["parameters"] = {"binary_data_size": x.nbytes if size is None else size}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return header + x.tobytes(), {"Inference-Header-Content-Length": str(len(header) if length is None else length)}


def test_health_metadata_and_metrics_answer(server):
    assert exchange(server, "GET", "/v2/health/live")[0] == 200
    assert exchange(server, "GET", "/v2/health/ready")[0] == 200
    assert json.loads(exchange(server, "GET", "/v2")[2])["name"] == "tenure"
    assert exchange(server, "GET", "/v2/models/digits/versions/1/ready")[0] == 200
    found = json.loads(exchange(server, "GET", "/v2/models/digits")[2])
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]
    assert found["platform"] == "onnxruntime_onnx"
    assert b"# TYPE tenure_infer_requests_total counter" in exchange(server, "GET", "/metrics")[2]


def test_json_tensors_are_answered_in_json(server, digits):
    status, _, body = infer(server, json_request(digits.x[:4]))
    answer = json.loads(body)
    assert (status, answer["id"], answer["model_name"]) == (200, "7", "digits")
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["label"]["data"] == digits.label[:4].tolist()
    np.testing.assert_allclose(outputs["probability"]["data"], digits.probability[:4].ravel(), atol=1e-5)


def test_flat_json_data_means_the_same_as_nested(server, digits):
    flat = json_request(digits.x[:2], data=digits.x[:2].ravel().tolist())
    assert infer(server, flat)[2] == infer(server, json_request(digits.x[:2]))[2]


def test_raw_tensors_are_answered_raw(server, digits):
    status, headers, body = infer(server, *binary_request(digits.x))
    length = int(headers["inference-header-content-length"])
    outputs = json.loads(body[:length])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in outputs]
    assert status == 200
    assert len(body) == length + sum(sizes)
    np.testing.assert_array_equal(np.frombuffer(body[length : length + sizes[0]], np.int64), digits.label)


def test_one_output_may_be_asked_raw_and_another_in_json(server, digits):
    request = json_request(digits.x[:2])
    request["outputs"] = [{"name": "probability", "parameters": {"binary_data": True}}, {"name": "label"}]
    status, headers, body = infer(server, request)
    outputs = json.loads(body[: int(headers["inference-header-content-length"])])["outputs"]
    assert status == 200
    assert [("data" in output, output["name"]) for output in outputs] == [(False, "probability"), (True, "label")]


@pytest.mark.parametrize(
    ("model", "datatype", "data"),
    [
        ("same_int64", "INT64", [-(2**63), 0, 2**63 - 1]),
        ("same_string", "BYTES", ["", "pelé", "x" * 300]),
        ("same_bool", "BOOL", [True, False]),
        ("same_float16", "FP16", [0.5, -2.0]),
        ("same_uint8", "UINT8", [0, 255]),
    ],
)
def test_each_datatype_comes_back_unchanged(server, model, datatype, data):
    request = {"inputs": [{"name": "x", "datatype": datatype, "shape": [len(data)], "data": data}]}
    status, _, body = infer(server, request, model=model)
    assert (status, json.loads(body)["outputs"][0]["data"]) == (200, data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "y"}, "takes the inputs x"),
        ({"datatype": "FP64"}, "must be FP32"),
        ({"datatype": "FLOAT"}, "supported"),
        ({"shape": [2, 15]}, "elements"),
        ({"shape": [2, 2, 8]}, "must have shape"),
        ({"shape": [-2, -16]}, "lengths must be >= 0"),
        ({"shape": [2**62, 2**62]}, "elements"),
        ({"shape": "many"}, "not v2 JSON"),
        ({"data": None}, "needs"),
        ({"data": [["a"] * 16] * 2}, "not FP32"),
        ({"data": [[1.0] * 16, [1.0]]}, "not a regular array"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_with_the_reason(server, digits, change, reason):
    status, _, body = infer(server, json_request(digits.x[:2], **change))
    assert status == 400
    assert reason in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("model", "datatype", "data"),
    [("same_int64", "INT64", [1.5]), ("same_uint8", "UINT8", [300]), ("same_uint8", "UINT8", [-1]), ("same_bool", "BOOL", [2])],
)
def test_values_that_would_change_are_refused(server, model, datatype, data):
    request = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1], "data": data}]}
    assert infer(server, request, model=model)[0] == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"inputs": 3}', b"[" * 100_000, b'{"inputs": []}'])
def test_a_body_that_is_no_request_is_refused(server, body):
    assert infer(server, body)[0] == 400


@pytest.mark.parametrize(
    "change",
    [{"size": 2**40}, {"size": -1}, {"size": 10}, {"length": 10**9}, {"length": 3}, {"shape": [2**40, 16]}, {"shape": [1, 16]}],
)
def test_raw_tensors_whose_claims_do_not_match_are_refused(server, digits, change):
    assert infer(server, *binary_request(digits.x, **change))[0] == 400


def test_raw_strings_that_lie_about_their_lengths_are_refused(server):
    for raw in (b"\xff\xff\xff\xff", b"\x01\x00\x00\x00", b"\x00\x00\x00\x00\x00"):
        tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
        header = json.dumps({"inputs": [tensor]}).encode()
        found = infer(server, header + raw, {"Inference-Header-Content-Length": str(len(header))}, model="same_string")
        assert found[0] == 400


def test_raw_booleans_other_than_0_and_1_are_refused(server):
    for raw, status in ((b"\x00\x01", 200), (b"\x00\x02", 400)):
        tensor = {"name": "x", "datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}}
        header = json.dumps({"inputs": [tensor]}).encode()
        found = infer(server, header + raw, {"Inference-Header-Content-Length": str(len(header))}, model="same_bool")
        assert found[0] == status


def test_unknown_models_versions_outputs_and_methods_are_named(server, digits):
    assert infer(server, json_request(digits.x[:1]), model="nothing")[0] == 404
    assert exchange(server, "GET", "/v2/models/digits/versions/9")[0] == 404
    assert exchange(server, "GET", "/elsewhere")[0] == 404
    status, headers, _ = exchange(server, "GET", "/v2/models/digits/infer")
    assert (status, headers["allow"]) == (405, "POST")
    request = json_request(digits.x[:1])
    request["outputs"] = [{"name": "colour"}]
    assert infer(server, request)[0] == 400


def test_a_body_above_the_limit_is_refused_unread(server):
    with socket.create_connection(tuple(server.http.split(":")), timeout=20) as raw:
        raw.sendall(b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_above_the_limit_is_refused(server):
    def chunks():
        for _ in range(40):
            yield b" " * 50_000

    try:
        status = infer_chunked(server, chunks())
    except ConnectionError:
        return  # refused while still being sent: the server closed first
    assert status == 413


def infer_chunked(server, chunks):
    connection = http.client.HTTPConnection(server.http, timeout=20)
    try:
        connection.request("POST", "/v2/models/digits/infer", chunks, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        return connection.getresponse().status
    finally:
        connection.close()


def test_mutated_requests_are_answered_or_refused_and_never_a_server_error(server, digits):
    body, headers = binary_request(digits.x[:2])
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    start = (head + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n").encode()
    chance = random.Random(11)
    for _ in range(300):
        sent = bytearray(start + body)
        for _ in range(chance.randint(1, 4)):
            sent[chance.randrange(len(sent))] = chance.randrange(256)
        with socket.create_connection(tuple(server.http.split(":")), timeout=20) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)  # a length that was raised ends here
            answer = raw.recv(4096)
            assert not answer or answer[9:10] in (b"2", b"4"), answer
    assert infer(server, json_request(digits.x[:1]))[0] == 200


def test_a_client_that_leaves_within_its_body_harms_nobody(server, digits):
    with socket.create_connection(tuple(server.http.split(":")), timeout=20) as raw:
        raw.sendall(b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{")
    assert infer(server, json_request(digits.x[:1]))[0] == 200
