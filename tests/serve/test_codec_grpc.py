"""Answers over gRPC as other servers send them."""

import numpy as np
import pytest

from tenure.serve import v2
from tenure.serve.codec_grpc import decode_outputs
from tenure.serve.faults import InputRefused


def answer():
    message = v2.ModelInferResponse()
    tensor = message.outputs.add(name="y", datatype="FP32", shape=[2])
    message.raw_output_contents.append(np.array([1.5, 2.5], np.float32).tobytes())
    return message, tensor


def test_an_empty_message_of_typed_contents_beside_raw_ones_is_read_as_mlserver_means_it():
    message, tensor = answer()
    tensor.contents.SetInParent()
    assert tensor.HasField("contents")
    assert decode_outputs(message)["y"].tolist() == [1.5, 2.5]


def test_typed_contents_beside_raw_ones_are_refused():
    message, tensor = answer()
    tensor.contents.fp32_contents.append(1.5)
    with pytest.raises(InputRefused, match="both typed and raw"):
        decode_outputs(message)
