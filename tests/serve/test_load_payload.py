"""What the load generator sends is what the server's metadata, the user and the seed say, encoded once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tenure.errors import NotFound, SpecError
from tenure.serve import v2
from tenure.serve.load import payload
from tenure.serve.load.payload import Shape
from tenure.serve.tensors import ModelMetadata, TensorMetadata


def model(*inputs):
    return ModelMetadata(name="m", inputs=tuple(TensorMetadata(*each) for each in inputs), outputs=())


PICTURES = model(("x", "UINT8", (-1, 8, 8, 3)))


def drawn(metadata, *, batch=1, shapes=None, seed=0, count=3):
    return list(payload.random_inputs(metadata, batch=batch, shapes=shapes or {}, seed=seed, count=count))


def test_random_inputs_fit_the_metadata_and_are_the_seeds_own():
    one, again, other = drawn(PICTURES, batch=4), drawn(PICTURES, batch=4), drawn(PICTURES, batch=4, seed=1)
    assert one[0]["x"].shape == (4, 8, 8, 3)
    assert one[0]["x"].dtype == np.uint8
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0]["x"], other[0]["x"])
    assert not np.array_equal(one[0]["x"], one[1]["x"])


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "UINT16", "INT64", "FP16", "FP32", "FP64", "BYTES"])
def test_every_type_of_the_protocol_can_be_drawn_and_encoded(datatype):
    inputs = drawn(model(("x", datatype, (-1, 5))), count=1)
    assert inputs[0]["x"].shape == (1, 5)
    assert payload.http_requests("h:1", "m", inputs)[0]
    assert payload.http_requests("h:1", "m", inputs, json=True)[0]
    message = v2.ModelInferRequest.FromString(payload.grpc_requests("h:1", "m", inputs)[0].body[5:])
    assert message.inputs[0].datatype == datatype


def test_lengths_that_are_open_must_be_said_and_only_those_can_be():
    text = model(("ids", "INT64", (-1, -1)))
    with pytest.raises(SpecError, match=r"--shape ids:128"):
        drawn(text)
    assert drawn(text, batch=2, shapes={"ids": Shape((16,))})[0]["ids"].shape == (2, 16)
    with pytest.raises(SpecError, match="beside the batch"):
        drawn(PICTURES, shapes={"x": Shape((9, 8, 3))})
    with pytest.raises(SpecError, match="has no input 'y'; it has x"):
        drawn(PICTURES, shapes={"y": Shape((9,))})
    with pytest.raises(SpecError, match="no room for a batch of 2"):
        drawn(model(("x", "FP32", (1, 4))), batch=2)


def test_a_model_whose_inputs_the_server_does_not_tell_is_described_by_the_user():
    assert drawn(model(), batch=2, shapes={"x": Shape((3,), "FP64")})[0]["x"].dtype == np.float64
    with pytest.raises(SpecError, match="--shape x:FP32:1024"):
        drawn(model(), shapes={"x": Shape((3,))})
    with pytest.raises(SpecError, match="does not say which inputs"):
        drawn(model())


def test_rows_of_a_file_are_sent_in_whole_batches_in_the_models_type(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10.0).reshape(5, 2))
    found = list(payload.file_inputs(tmp_path / "x.npy", model(("x", "FP32", (-1, 2))), batch=2))
    assert [each["x"].tolist() for each in found] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert found[0]["x"].dtype == np.float32
    np.savez(tmp_path / "both.npz", a=np.zeros((3, 1)), b=np.ones((3, 1)), more=np.zeros(1))
    both = model(("a", "FP32", (-1, 1)), ("b", "FP32", (-1, 1)))
    assert set(next(iter(payload.file_inputs(tmp_path / "both.npz", both, batch=3)))) == {"a", "b"}


@pytest.mark.parametrize(
    ("name", "batch", "kind", "message"),
    [
        ("none.npy", 1, NotFound, "cannot be read"),
        ("text.npy", 1, SpecError, "not a .npy or .npz"),
        ("x.npy", 3, SpecError, "has 2 rows; a request takes 3"),
        ("other.npz", 1, SpecError, "no array 'x', which m takes"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_words(tmp_path, name, batch, kind, message):
    np.save(tmp_path / "x.npy", np.zeros((2, 1)))
    np.savez(tmp_path / "other.npz", y=np.zeros((2, 1)))
    (tmp_path / "text.npy").write_text("not numbers")
    with pytest.raises(kind, match=message):
        list(payload.file_inputs(tmp_path / name, model(("x", "FP32", (-1, 1))), batch=batch))


def test_http_requests_are_whole_and_say_their_length():
    request = payload.http_requests("host:80", "a b", [{"x": np.ones((1, 4), np.float32)}])[0]
    head, body = request.split(b"\r\n\r\n", 1)
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert head.startswith(b"POST /v2/models/a%20b/infer HTTP/1.1")
    assert int(fields[b"Content-Length"]) == len(body)
    length = int(fields[b"Inference-Header-Content-Length"])
    assert json.loads(body[:length])["id"] == "load"
    assert body[length:] == np.ones(4, np.float32).tobytes()


def test_grpc_frames_hold_the_message_whatever_the_servers_frame_size():
    message = payload.grpc_requests("host:80", "m", [{"x": np.ones((1, 10_000), np.float32)}])[0]
    for size, frames in ((16_384, 3), (1 << 20, 1)):
        template, places = message.template(size)
        assert len(places) == 1 + frames
        assert all(template[at : at + 4] == bytes(4) for at in places)
        assert message.body[:size] in bytes(template)


def test_no_more_is_kept_than_fits_and_one_that_does_not_is_refused(monkeypatch):
    monkeypatch.setattr(payload, "MAX_BYTES", 1500)
    inputs = drawn(model(("x", "UINT8", (-1, 400))), count=16)
    assert 1 <= len(payload.http_requests("h:1", "m", inputs)) < 16
    with pytest.raises(SpecError, match="sends up to 1500"):
        payload.http_requests("h:1", "m", drawn(model(("x", "UINT8", (-1, 4000))), count=1))
