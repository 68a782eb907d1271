"""The gRPC door of a real server: raw and typed contents, and what must be refused."""

import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
from tenure.serve import v2  # noqa: E402

pytestmark = pytest.mark.real


@pytest.fixture
def call(server):
    with grpc.insecure_channel(server.grpc) as channel:

        def run(name, message):
            request, response = v2.METHODS[name]
            serializers = {"request_serializer": request.SerializeToString, "response_deserializer": response.FromString}
            return channel.unary_unary(f"/{v2.SERVICE}/{name}", **serializers)(message, timeout=20)

        yield run


def request(x, **changes):
    message = v2.ModelInferRequest(model_name="digits", id="7")
    message.inputs.add(**{"name": "x", "datatype": "FP32", "shape": x.shape, **changes})
    return message


def refused(call, message):
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", message)
    return caught.value.code()


def test_health_and_metadata_answer(call):
    assert call("ServerLive", v2.ServerLiveRequest()).live
    assert call("ServerReady", v2.ServerReadyRequest()).ready
    assert call("ModelReady", v2.ModelReadyRequest(name="digits")).ready
    assert call("ServerMetadata", v2.ServerMetadataRequest()).name == "tenure"
    found = call("ModelMetadata", v2.ModelMetadataRequest(name="digits"))
    assert [(t.name, t.datatype, list(t.shape)) for t in found.inputs] == [("x", "FP32", [-1, 16])]


def test_raw_and_typed_contents_give_the_same_answer(call, digits):
    raw = request(digits.x)
    raw.raw_input_contents.append(digits.x.tobytes())
    typed = request(digits.x)
    typed.inputs[0].contents.fp32_contents.extend(digits.x.ravel())
    answers = [call("ModelInfer", message) for message in (raw, typed)]
    assert answers[0] == answers[1]
    assert answers[0].id == "7"
    np.testing.assert_array_equal(np.frombuffer(answers[0].raw_output_contents[0], np.int64), digits.label)


@pytest.mark.parametrize(
    "change",
    [{"name": "y"}, {"datatype": "FP64"}, {"datatype": "?"}, {"shape": [1, 16]}, {"shape": [2**62, 2**62]}, {"shape": [-1]}],
)
def test_a_raw_tensor_that_does_not_fit_is_an_invalid_argument(call, digits, change):
    message = request(digits.x, **change)
    message.raw_input_contents.append(digits.x.tobytes())
    assert refused(call, message) is grpc.StatusCode.INVALID_ARGUMENT


def test_contents_that_contradict_each_other_are_refused(call, digits):
    both = request(digits.x)
    both.inputs[0].contents.fp32_contents.extend(digits.x.ravel())
    both.raw_input_contents.append(digits.x.tobytes())
    none, other = request(digits.x), request(digits.x)
    other.inputs[0].contents.fp64_contents.extend(digits.x.ravel())
    too_many = request(digits.x)
    too_many.raw_input_contents.extend([digits.x.tobytes()] * 2)
    for message in (both, none, other, too_many):
        assert refused(call, message) is grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_that_are_no_message_are_an_invalid_argument(server):
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{v2.SERVICE}/ModelInfer")(b"\x0a\xff\xff", timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_typed_value_out_of_range_is_refused(call):
    message = v2.ModelInferRequest(model_name="same_uint8")
    message.inputs.add(name="x", datatype="UINT8", shape=[1]).contents.uint_contents.append(300)
    assert refused(call, message) is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_model_is_not_found_and_too_large_a_message_exhausts(call, digits):
    unknown = request(digits.x)
    unknown.model_name = "nothing"
    unknown.raw_input_contents.append(digits.x.tobytes())
    assert refused(call, unknown) is grpc.StatusCode.NOT_FOUND
    large = request(digits.x)
    large.raw_input_contents.append(bytes(2_000_000))
    assert refused(call, large) is grpc.StatusCode.RESOURCE_EXHAUSTED
