"""Checks of a server with Triton's own clients, unchanged; run by the interpreter that has them, not by pytest.

Argument: a JSON object: http, grpc (addresses), limit_bytes (of one request), models (names served beside `digits`). Prints a
JSON list ["check", "ok" or what went wrong] a line, as each ends; `test_peers` reads them. `digits` is the linear classifier of
`conftest`: x [n,16] FP32 -> label [n] INT64, probability [n,5] FP32.
"""

import asyncio
import json
import queue
import sys
import traceback

import numpy as np
import tritonclient.grpc as grpc_lib
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_lib
import tritonclient.http.aio as http_aio
import tritonclient.utils.shared_memory as shm
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

PATIENCE_S = 20
TOLD = {}
x = np.random.default_rng(5).normal(size=(6, 16)).astype(np.float32)
LIBS = {"http": http_lib, "grpc": grpc_lib}
CHECKS = {}
HTTP_STATUS = {"absent": ("404", "400", "503"), "wrong": ("400",), "region": ("404", "400"), "large": ("413", "400")}
GRPC_STATUS = {
    "absent": ("NOT_FOUND", "UNAVAILABLE"),
    "wrong": ("INVALID_ARGUMENT",),
    "region": ("NOT_FOUND", "INVALID_ARGUMENT"),
    "large": ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"),
}


def check(function):
    """Register a check that is given a door."""
    for door in LIBS:
        CHECKS[f"{function.__name__} over {door}"] = lambda door=door: function(door)
    return function


def check_once(function):
    """Register a check that is of one door alone."""
    CHECKS[function.__name__] = function
    return function


def client_of(door):
    if door == "http":
        return http_lib.InferenceServerClient(
            TOLD["http"], concurrency=4, connection_timeout=PATIENCE_S, network_timeout=PATIENCE_S
        )
    return grpc_lib.InferenceServerClient(TOLD["grpc"])


def tensor(lib, array, name="x", datatype="FP32", **binary):
    made = lib.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **binary)
    return made


def expected():
    """Return label and probability as one plain request has them: what every other way must agree with."""
    if "answer" not in TOLD:
        found = client_of("grpc").infer("digits", [tensor(grpc_lib, x)])
        TOLD["answer"] = found.as_numpy("label"), found.as_numpy("probability")
        assert TOLD["answer"][0].shape == (6,)
        assert np.allclose(TOLD["answer"][1].sum(1), 1, atol=1e-5)
    return TOLD["answer"]


def agrees(result):
    label, probability = expected()
    assert np.array_equal(result.as_numpy("label"), label), result.as_numpy("label")
    assert np.allclose(result.as_numpy("probability"), probability, atol=1e-6)


def refused(call, door, kind):
    """Assert that a call is refused with the status for this kind of mistake."""
    error = error_of(call)
    status, wanted = str(error.status()), (HTTP_STATUS if door == "http" else GRPC_STATUS)[kind]
    assert any(word in status for word in wanted), f"status {status}, message {error.message()}"
    assert error.message(), "an error without a message"


def error_of(call):
    try:
        call()
    except InferenceServerException as error:
        return error
    raise AssertionError("it was accepted")


def as_json(found):
    """Return a protobuf message as a dict; what HTTP gave is JSON already."""
    from google.protobuf import json_format

    return found if isinstance(found, dict | list) else json_format.MessageToDict(found, preserving_proto_field_name=True)


@check
def health(door):
    client = client_of(door)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")


@check_once
def an_absent_model_is_not_ready_over_http():
    assert not client_of("http").is_model_ready("absent")


@check
def metadata(door):
    client = client_of(door)
    server = as_json(client.get_server_metadata())
    assert server["name"]
    assert server["version"]
    wanted = {"binary_tensor_data", "statistics", "model_repository", "model_configuration", "system_shared_memory"}
    assert wanted <= set(server["extensions"]), server["extensions"]
    model = as_json(client.get_model_metadata("digits"))
    assert model["name"] == "digits"
    assert model["versions"] == ["1"], model["versions"]
    (taken,) = model["inputs"]
    assert (taken["name"], taken["datatype"], [int(n) for n in taken["shape"]]) == ("x", "FP32", [-1, 16])
    assert {output["name"]: output["datatype"] for output in model["outputs"]} == {"label": "INT64", "probability": "FP32"}
    refused(lambda: client.get_model_metadata("absent"), door, "absent")


@check
def config(door):
    found = as_json(client_of(door).get_model_config("digits"))
    found = found.get("config", found)
    assert found["name"] == "digits"
    (taken,) = found["input"]
    assert (taken["name"], taken["data_type"]) == ("x", "TYPE_FP32")
    dims = [int(n) for n in taken["dims"]]
    assert dims == ([16] if int(found.get("max_batch_size", 0)) > 0 else [-1, 16]), found


@check
def statistics(door):
    client = client_of(door)

    def counted():
        (found,) = as_json(client.get_inference_statistics("digits"))["model_stats"]
        assert found["name"] == "digits"
        return int(found.get("inference_count", 0)), int(found["inference_stats"]["success"].get("count", 0)), found

    rows, requests, _ = counted()
    client.infer("digits", [tensor(LIBS[door], x)])
    more_rows, more_requests, found = counted()
    assert (more_rows - rows, more_requests - requests) == (6, 1)
    assert int(found["execution_count"]) >= 1
    for part in ("queue", "compute_input", "compute_infer", "compute_output"):
        assert int(found["inference_stats"][part]["count"]) >= 1, found["inference_stats"]
    assert int(found["inference_stats"]["compute_infer"]["ns"]) > 0
    assert as_json(client.get_inference_statistics())["model_stats"]


@check
def infer_all_outputs(door):
    result = client_of(door).infer("digits", [tensor(LIBS[door], x)], request_id="seven")
    agrees(result)
    response = result.get_response()
    assert (response["id"] if door == "http" else response.id) == "seven"


@check
def infer_with_outputs_named(door):
    lib = LIBS[door]
    wanted = [lib.InferRequestedOutput("probability")]
    found = client_of(door).infer("digits", [tensor(lib, x)], model_version="1", outputs=wanted)
    assert np.allclose(found.as_numpy("probability"), expected()[1], atol=1e-6)
    assert found.as_numpy("label") is None


@check_once
def infer_with_json_tensors_over_http():
    client = client_of("http")
    for sent, wanted in ((False, False), (False, True), (True, False)):
        outputs = [http_lib.InferRequestedOutput(name, binary_data=wanted) for name in ("label", "probability")]
        agrees(client.infer("digits", [tensor(http_lib, x, binary_data=sent)], outputs=outputs))


@check_once
def infer_with_typed_contents_over_grpc():
    client = client_of("grpc")
    stub = service_pb2_grpc.GRPCInferenceServiceStub(client._channel)
    request = service_pb2.ModelInferRequest(model_name="digits")
    taken = request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    taken.contents.fp32_contents.extend(x.reshape(-1).tolist())
    found = stub.ModelInfer(request, timeout=PATIENCE_S)
    names = [output.name for output in found.outputs]
    label = np.frombuffer(found.raw_output_contents[names.index("label")], np.int64)
    assert np.array_equal(label, expected()[0])


@check
def infer_with_other_types(door):
    arrays = {
        "same_int64": ("INT64", np.array([-1, 2**62, 0], np.int64)),
        "same_string": ("BYTES", np.array([b"one", b"", "zwei \u00e4".encode()], np.object_)),
        "same_bool": ("BOOL", np.array([True, False, True])),
        "same_float16": ("FP16", np.array([0.5, -2, 65504], np.float16)),
        "same_uint8": ("UINT8", np.array([0, 255, 7], np.uint8)),
    }
    for name, (datatype, array) in arrays.items():
        if name in TOLD["models"]:
            found = client_of(door).infer(name, [tensor(LIBS[door], array, datatype=datatype)]).as_numpy("y")
            assert np.array_equal(found, array), (name, found)


@check
def request_compression(door):
    client, lib = client_of(door), LIBS[door]
    for way in ("gzip", "deflate"):
        if door == "http":
            options = {"request_compression_algorithm": way, "response_compression_algorithm": way}
        else:
            options = {"compression_algorithm": way}
        agrees(client.infer("digits", [tensor(lib, x)], **options))


@check
def priority_and_timeout(door):
    client, lib = client_of(door), LIBS[door]
    agrees(client.infer("digits", [tensor(lib, x)], priority=1, timeout=10_000_000))
    agrees(client.infer("digits", [tensor(lib, x)], parameters={"tag": "mine", "count": 3, "yes": True}))


@check
def many_at_once(door):
    client, lib = client_of(door), LIBS[door]
    if door == "http":
        waiting = [client.async_infer("digits", [tensor(lib, x)]) for _ in range(16)]
        for one in waiting:
            agrees(one.get_result())
        return
    answers = queue.Queue()
    for _ in range(16):
        client.async_infer("digits", [tensor(lib, x)], lambda result, error: answers.put((result, error)))
    for _ in range(16):
        result, error = answers.get(timeout=PATIENCE_S)
        assert error is None, error
        agrees(result)


@check
def system_shared_memory(door):
    client, lib, name = client_of(door), LIBS[door], f"region_{door}"
    region = shm.create_shared_memory_region(name, f"/{name}", 4096)
    try:
        shm.set_shared_memory_region(region, [x])
        client.register_system_shared_memory(name, f"/{name}", 4096)
        listed = as_json(client.get_system_shared_memory_status())
        listed = listed if isinstance(listed, list) else list(listed["regions"].values())
        assert [(one["name"], one["key"]) for one in listed if one["name"] == name] == [(name, f"/{name}")], listed
        taken = lib.InferInput("x", list(x.shape), "FP32")
        taken.set_shared_memory(name, x.nbytes)
        agrees(client.infer("digits", [taken]))
        label, probability = (lib.InferRequestedOutput(each) for each in ("label", "probability"))
        label.set_shared_memory(name, 48, 1024)
        probability.set_shared_memory(name, 120, 2048)
        client.infer("digits", [taken], outputs=[label, probability])
        assert np.array_equal(shm.get_contents_as_numpy(region, np.int64, [6], 1024), expected()[0])
        assert np.allclose(shm.get_contents_as_numpy(region, np.float32, [6, 5], 2048), expected()[1], atol=1e-6)
        past = lib.InferInput("x", list(x.shape), "FP32")
        past.set_shared_memory(name, x.nbytes, 4096 - 16)
        refused(lambda: client.infer("digits", [past]), door, "wrong")
        client.unregister_system_shared_memory(name)
        refused(lambda: client.infer("digits", [taken]), door, "region")
    finally:
        client.unregister_system_shared_memory(name)
        shm.destroy_shared_memory_region(region)
    refused(lambda: client.register_system_shared_memory("none", "/absent-region", 64), door, "region")


@check
def repository(door):
    client, lib, name = client_of(door), LIBS[door], "same_uint8"
    if name not in TOLD["models"]:
        return
    array = np.array([1, 2], np.uint8)

    def states():
        listed = as_json(client.get_model_repository_index())
        listed = listed if isinstance(listed, list) else listed["models"]
        return {one["name"]: one.get("state", "") for one in listed}

    assert states()["digits"] == "READY"
    client.unload_model(name)
    assert states().get(name, "") != "READY"
    assert states()["digits"] == "READY"
    refused(lambda: client.get_model_metadata(name), door, "absent")
    client.load_model(name)
    assert states()[name] == "READY"
    found = client.infer(name, [tensor(lib, array, datatype="UINT8")]).as_numpy("y")
    assert np.array_equal(found, array)
    assert error_of(lambda: client.load_model("absent")).message()


@check
def mistakes_are_told(door):
    client, lib = client_of(door), LIBS[door]
    refused(lambda: client.infer("absent", [tensor(lib, x)]), door, "absent")
    refused(lambda: client.infer("digits", [tensor(lib, x)], model_version="99"), door, "absent")
    refused(lambda: client.infer("digits", [tensor(lib, x[:, :7])]), door, "wrong")
    refused(lambda: client.infer("digits", [tensor(lib, x.astype(np.float64), datatype="FP64")]), door, "wrong")
    refused(lambda: client.infer("digits", [tensor(lib, x, name="z")]), door, "wrong")
    unknown = [lib.InferRequestedOutput("absent")]
    refused(lambda: client.infer("digits", [tensor(lib, x)], outputs=unknown), door, "wrong")
    agrees(client.infer("digits", [tensor(lib, x)]))


@check
def a_request_too_large_is_refused(door):
    if TOLD["limit_bytes"]:
        rows = np.zeros((TOLD["limit_bytes"] // 64 + 1, 16), np.float32)
        refused(lambda: client_of(door).infer("digits", [tensor(LIBS[door], rows)]), door, "large")
        agrees(client_of(door).infer("digits", [tensor(LIBS[door], x)]))


@check_once
def streaming_over_grpc():
    answers = queue.Queue()
    with client_of("grpc") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(5):
            client.async_stream_infer("digits", [tensor(grpc_lib, x)], request_id=str(number))
        ids = set()
        for _ in range(5):
            result, error = answers.get(timeout=PATIENCE_S)
            assert error is None, error
            agrees(result)
            ids.add(result.get_response().id)
        assert ids == set("01234")
        client.async_stream_infer("absent", [tensor(grpc_lib, x)])
        result, error = answers.get(timeout=PATIENCE_S)
        assert result is None
        assert error.message()
        client.async_stream_infer("digits", [tensor(grpc_lib, x)], request_id="after")
        result, error = answers.get(timeout=PATIENCE_S)
        assert error is None, f"an error ended the stream: {error}"
        agrees(result)
        client.stop_stream()


@check_once
def streaming_over_grpc_aio():
    async def go():
        async with grpc_aio.InferenceServerClient(TOLD["grpc"]) as client:

            async def requests():
                for number in range(3):
                    yield {"model_name": "digits", "inputs": [tensor(grpc_lib, x)], "request_id": str(number)}

            seen = 0
            async for result, error in client.stream_infer(requests()):
                assert error is None, error
                agrees(result)
                seen += 1
            assert seen == 3

    asyncio.run(asyncio.wait_for(go(), PATIENCE_S))


@check
def asyncio_clients(door):
    async def go():
        lib = {"http": http_aio, "grpc": grpc_aio}[door]
        async with lib.InferenceServerClient(TOLD[door]) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("digits")) is not None
            asked = [client.infer("digits", [tensor(LIBS[door], x)]) for _ in range(16)]
            for result in await asyncio.gather(*asked):
                agrees(result)

    expected()
    asyncio.run(asyncio.wait_for(go(), PATIENCE_S))


@check_once
def a_cancelled_call_harms_nobody():
    client = client_of("grpc")
    for _ in range(8):
        client.async_infer("digits", [tensor(grpc_lib, x)], lambda result, error: None).cancel()
    agrees(client.infer("digits", [tensor(grpc_lib, x)]))


def main():
    TOLD.update(json.loads(sys.argv[1]))
    for name, run in CHECKS.items():
        try:
            run()
            found = "ok"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
            found = f"line {lines[-1] if lines else place.lineno}: {type(error).__name__}: {error}"
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        print(json.dumps(list(CHECKS)))
    else:
        main()
