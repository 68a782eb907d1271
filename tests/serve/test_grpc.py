"""The gRPC door over a fake data plane, with the gRPC library's clients: the service, errors, streams, many at once."""

import asyncio
import threading

import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
from tenure.errors import Unavailable  # noqa: E402
from tenure.serve import v2  # noqa: E402
from tenure.serve.faults import Overloaded  # noqa: E402
from tenure.serve.limits import DoorLimits  # noqa: E402
from tenure.serve.tensors import TensorMetadata  # noqa: E402

from .fakes import FakePlane  # noqa: E402
from .grpc_peers import PATH, OpenDoor, infer, row  # noqa: E402
from .models import KINDS, Kind  # noqa: E402

WIDE = 150_528
"""Elements of a ResNet-50 input."""


def wide(columns=WIDE):
    signature = (TensorMetadata("x", "FP32", (-1, columns)),)
    return Kind(signature, (TensorMetadata("y", "FP32", (-1, columns)),), lambda inputs: {"y": inputs["x"] + 1})


@pytest.fixture
def plane():
    return FakePlane(*KINDS, wide=wide())


@pytest.fixture
def door(plane):
    door = OpenDoor(plane, DoorLimits(max_request_bytes=8 << 20))
    yield door
    door.close()
    assert plane.held_bytes == 0
    assert door.door.streams == 0


@pytest.fixture
def channel(door):
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(door.address, options=options) as channel:
        yield channel


@pytest.fixture
def call(channel):
    def run(name, message=None, /, *, timeout=20, service=v2.SERVICE, methods=v2.METHODS, **fields):
        request, response = methods[name]
        multi = channel.unary_unary(
            f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return multi(message if message is not None else request(**fields), timeout=timeout)

    return run


def refused(call, *arguments, **fields):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    return caught.value


def result(message, dtype=np.float32):
    return np.frombuffer(message.raw_output_contents[0], dtype).reshape(message.outputs[0].shape)


def test_health_and_metadata_answer(call, plane):
    assert call("ServerLive").live
    assert call("ServerReady").ready
    assert call("ModelReady", name="double").ready
    found = call("ServerMetadata")
    assert found.name == "tenure"
    assert {"statistics", "model_repository", "system_shared_memory"} <= set(found.extensions)
    found = call("ModelMetadata", name="double")
    assert [(t.name, t.datatype, list(t.shape)) for t in found.inputs] == [("x", "FP32", [-1, 4])]
    assert call("ModelConfig", name="double").config.input[0].dims == [-1, 4]
    plane.draining = True
    assert not call("ServerReady").ready


def test_the_health_service_answers_for_server_and_models(call, plane):
    def check(service):
        return call("Check", v2.HealthCheckRequest(service=service), service=v2.HEALTH, methods=v2.HEALTH_METHODS)

    kinds = v2.HealthCheckResponse
    assert check("").status == check(v2.SERVICE).status == check("double").status == kinds.SERVING
    plane.loaded.discard("double")
    assert check("double").status == kinds.NOT_SERVING
    assert refused(check, "nothing").code() is grpc.StatusCode.NOT_FOUND


def test_inference_answers_with_the_id_of_its_request(call):
    for id in ("7", "", "an id"):
        answer = call("ModelInfer", infer(row(3), id=id))
        assert answer.id == id
        assert (answer.model_name, answer.model_version) == ("double", "1")
        np.testing.assert_array_equal(result(answer), row(6))


def test_several_inputs_and_chosen_outputs(call):
    message = v2.ModelInferRequest(model_name="sums")
    for name, value in (("a", 5), ("b", 3)):
        message.inputs.add(name=name, datatype="INT64", shape=[2])
        message.raw_input_contents.append(np.full(2, value, np.int64).tobytes())
    assert [result(call("ModelInfer", message), np.int64).tolist()] == [[8, 8]]
    message.outputs.add(name="difference")
    answer = call("ModelInfer", message)
    assert [o.name for o in answer.outputs] == ["difference"]
    assert result(answer, np.int64).tolist() == [2, 2]


def test_raw_and_typed_contents_give_the_same_answer(call):
    typed = v2.ModelInferRequest(model_name="double")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1.5] * 4)
    assert call("ModelInfer", typed) == call("ModelInfer", infer(row(1.5)))
    text = v2.ModelInferRequest(model_name="upper")
    text.inputs.add(name="t", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b"bcd"])
    assert call("ModelInfer", text).raw_output_contents[0] == b"\1\0\0\0A\3\0\0\0BCD"


def test_what_fails_says_why_in_the_codes_of_grpc(call, plane):
    bad = infer(row())
    bad.inputs[0].name = "é%\n"
    error = refused(call, "ModelInfer", bad)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the model takes the inputs x; the request carries é%" in error.details()
    assert refused(call, "ModelInfer", infer(row(), model="nothing")).code() is grpc.StatusCode.NOT_FOUND
    assert refused(call, "ModelMetadata", name="nothing").code() is grpc.StatusCode.NOT_FOUND
    assert refused(call, "ModelInfer", infer(row(), model="raising")).code() is grpc.StatusCode.INTERNAL
    plane.refuse_with = Unavailable("not ready yet")
    assert refused(call, "ModelInfer", infer(row())).code() is grpc.StatusCode.UNAVAILABLE
    plane.refuse_with = Overloaded("the queue is full", retry_after_s=0.25)
    error = refused(call, "ModelInfer", infer(row()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert {("retry-after-s", "0.25"), ("grpc-retry-pushback-ms", "250")} <= {
        (m.key, m.value) for m in error.trailing_metadata()
    }


def test_bytes_that_are_no_message_are_an_invalid_argument(channel):
    for name in ("ModelInfer", "ModelMetadata"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{v2.SERVICE}/{name}")(b"\x0a\xff\xff", timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", [f"/{v2.SERVICE}/TraceSetting", "/no.Service/Call", f"/{v2.HEALTH}/Watch"])
def test_what_is_not_offered_is_unimplemented(channel, path):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_image_sized_tensor_comes_through_whole_and_aligned(call, plane):
    x = np.random.default_rng(0).normal(size=(2, WIDE)).astype(np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(result(call("ModelInfer", infer(x, model="wide"))), x + 1)
    assert [call.inputs[0].offset % 64 for call in plane.calls] == [0, 0, 0]


def test_a_message_past_the_limit_is_refused_by_its_length(call, door):
    x = np.zeros((15, WIDE), np.float32)
    error = refused(call, "ModelInfer", infer(x, model="wide"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "at most 8388608" in error.details()
    assert call("ServerLive").live


def test_past_the_memory_budget_a_call_is_told_when_to_try_again_and_others_go_on(call, plane, door):
    plane.budget_bytes = 2_000_000
    held = door.run(lambda: plane.reserve(1_900_000, "test"))
    error = refused(call, "ModelInfer", infer(np.zeros((1, WIDE), np.float32), model="wide"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "500") in {(m.key, m.value) for m in error.trailing_metadata()}
    assert call("ServerReady").ready
    np.testing.assert_array_equal(result(call("ModelInfer", infer(row()))), row(2))
    door.run(lambda: plane.release(held))


@pytest.mark.parametrize("algorithm", ["Gzip", "Deflate"])
def test_compressed_requests_are_understood(channel, algorithm):
    request, response = v2.METHODS["ModelInfer"]
    x = np.arange(2 * WIDE, dtype=np.float32).reshape(2, WIDE)
    answer = channel.unary_unary(PATH, request_serializer=request.SerializeToString, response_deserializer=response.FromString)(
        infer(x, model="wide"), timeout=20, compression=getattr(grpc.Compression, algorithm)
    )
    np.testing.assert_array_equal(result(answer), x + 1)


def test_a_deadline_reaches_the_model_and_a_client_that_gives_up_is_forgotten(call, plane, door):
    plane.paused = True
    error = refused(call, "ModelInfer", infer(row()), timeout=1.5)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < plane.calls[0].timeout_s < 2  # clients round it up on the wire
    door.until(lambda: plane.cancelled == plane.calls)


def test_the_plane_s_own_timeout_is_a_deadline_exceeded(call, plane, door):
    plane.fail_with = Unavailable("no answer within 2.5 s")
    plane.paused = True
    message = infer(row())
    message.parameters["timeout"].int64_param = 2_500_000
    errors = []
    waiting = threading.Thread(target=lambda: errors.append(refused(call, "ModelInfer", message)))
    waiting.start()
    door.until(lambda: plane.calls)
    assert plane.calls[0].timeout_s == 2.5
    door.pass_time(3.0)
    door.run(plane.resume)
    waiting.join(20)
    assert errors[0].code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_statistics_and_repository(call):
    call("ModelInfer", infer(row()))
    (found,) = call("ModelStatistics", name="double").model_stats
    assert (found.name, found.version, found.inference_count) == ("double", "1", 1)
    assert found.inference_stats.success.ns == 1_000_000
    assert found.last_inference > 1e12
    call("RepositoryModelUnload", model_name="double")
    states = {m.name: m.state for m in call("RepositoryIndex").models}
    assert (states["double"], states["sums"]) == ("UNAVAILABLE", "READY")
    assert "double" not in {m.name for m in call("RepositoryIndex", ready=True).models}
    assert refused(call, "ModelInfer", infer(row())).code() is grpc.StatusCode.UNAVAILABLE
    call("RepositoryModelLoad", model_name="double")
    assert call("ModelInfer", infer(row()))
    assert refused(call, "RepositoryModelLoad", model_name="nothing").code() is grpc.StatusCode.NOT_FOUND
    request = v2.METHODS["RepositoryModelLoad"][0](model_name="double")
    request.parameters["config"].string_param = "{}"
    assert refused(call, "RepositoryModelLoad", request).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_tensors_may_lie_in_system_shared_memory(call, tmp_path):
    from multiprocessing import shared_memory

    region = shared_memory.SharedMemory(create=True, size=64)
    try:
        np.frombuffer(region.buf, np.float32, 4, offset=16)[:] = 4
        call("SystemSharedMemoryRegister", name="r", key=f"/{region.name}", offset=0, byte_size=64)
        assert call("SystemSharedMemoryStatus").regions["r"].byte_size == 64
        message = v2.ModelInferRequest(model_name="double")
        for tensor, offset in (
            (message.inputs.add(name="x", datatype="FP32", shape=[1, 4]), 16),
            (message.outputs.add(name="y"), 32),
        ):
            tensor.parameters["shared_memory_region"].string_param = "r"
            tensor.parameters["shared_memory_byte_size"].int64_param = 16
            tensor.parameters["shared_memory_offset"].int64_param = offset
        answer = call("ModelInfer", message)
        assert answer.outputs[0].parameters["shared_memory_offset"].int64_param == 32
        assert np.frombuffer(region.buf, np.float32, 4, offset=32).tolist() == [8.0] * 4
        call("SystemSharedMemoryUnregister", name="r")
        assert refused(call, "SystemSharedMemoryStatus", name="r").code() is grpc.StatusCode.NOT_FOUND
        assert refused(call, "ModelInfer", message).code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        region.close()
        region.unlink()


def test_cuda_shared_memory_says_why_not(call):
    assert not call("CudaSharedMemoryStatus").regions
    call("CudaSharedMemoryUnregister", name="r")
    error = refused(call, "CudaSharedMemoryRegister", name="r", raw_handle=b"x", byte_size=4)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "no GPU" in error.details()


def stream_call(channel):
    return channel.stream_stream(
        f"/{v2.SERVICE}/ModelStreamInfer",
        request_serializer=v2.ModelInferRequest.SerializeToString,
        response_deserializer=v2.ModelStreamInferResponse.FromString,
    )


def test_a_stream_answers_every_message_in_order_and_errors_stay_with_theirs(channel):
    bad = infer(row(), id="3")
    bad.inputs[0].name = "z"
    messages = [infer(row(i), id=str(i)) for i in range(3)] + [bad] + [infer(row(i), id=str(i)) for i in range(4, 500)]
    answers = list(stream_call(channel)(iter(messages), timeout=30))
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(500)]
    assert "takes the inputs" in answers[3].error_message
    assert all(not answer.error_message for i, answer in enumerate(answers) if i != 3)
    np.testing.assert_array_equal(result(answers[499].infer_response), row(998))


def test_a_stream_takes_large_messages_one_after_the_other(channel):
    x = np.ones((1, WIDE), np.float32)
    answers = list(stream_call(channel)((infer(x * i, model="wide") for i in range(12)), timeout=60))
    assert [float(result(answer.infer_response)[0, -1]) for answer in answers] == [i + 1 for i in range(12)]


def test_a_stream_past_the_memory_budget_refuses_the_message_and_goes_on(channel, plane, door):
    plane.budget_bytes = 1_000_000
    held = door.run(lambda: plane.reserve(900_000, "test"))
    messages = [infer(row(1), id="a"), infer(np.ones((1, WIDE), np.float32), model="wide", id="b"), infer(row(2), id="c")]
    answers = list(stream_call(channel)(iter(messages), timeout=30))
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    np.testing.assert_array_equal(result(answers[2].infer_response), row(4))
    door.run(lambda: plane.release(held))


def test_a_cancelled_stream_cancels_its_calls(channel, plane, door):
    plane.paused = True
    stopped = threading.Event()

    def messages():
        yield infer(row())
        yield infer(row())
        stopped.wait(20)

    answers = stream_call(channel)(messages(), timeout=30)
    door.until(lambda: len(plane.calls) == 2)
    answers.cancel()
    door.until(lambda: len(plane.cancelled) == 2)
    stopped.set()


def test_an_answer_marked_final_where_asked(channel):
    message = infer(row(), id="1")
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    (answer,) = stream_call(channel)(iter([message]), timeout=20)
    assert answer.infer_response.parameters["triton_final_response"].bool_param


def test_a_thousand_calls_at_once_over_several_connections(door, plane):
    plane.paused = True
    x = [row(i) for i in range(1000)]

    async def main():
        request, response = v2.METHODS["ModelInfer"]
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(door.address, options=options) for _ in range(5)]
        calls = [
            channels[i % 5].unary_unary(
                PATH, request_serializer=request.SerializeToString, response_deserializer=response.FromString
            )(infer(each, id=str(i)), timeout=60)
            for i, each in enumerate(x)
        ]
        answers = asyncio.gather(*calls)
        while len(plane.calls) < 1000:
            await asyncio.sleep(0.01)
        plane.paused = False
        door.loop.call_soon_threadsafe(plane.resume)
        found = await answers
        for channel in channels:
            await channel.close()
        return found

    answers = asyncio.run(main())
    assert [answer.id for answer in answers] == [str(i) for i in range(1000)]
    assert all(result(answer)[0, 0] == 2 * i for i, answer in enumerate(answers))


def test_a_bomb_is_refused_by_what_it_would_become(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(PATH)(bytes(64 << 20), timeout=30, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "unpacks to more than" in caught.value.details()
