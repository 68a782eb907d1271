"""HTTP bodies: what a client encodes is understood, answers read back, and whatever else arrives is refused with a reason."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from tenure.serve import codec_http
from tenure.serve.codec_http import Template, TypedRequest
from tenure.serve.codec_json import JsonData, to_json
from tenure.serve.faults import InputRefused
from tenure.serve.plane import Answer, Output, TensorRef, Wanted
from tenure.serve.tensors import DTYPES, datatype_of, from_raw, to_raw

NUMERIC = [dtype for name, dtype in DTYPES.items() if name != "BYTES"]


def arrays_of(dtypes, **options):
    return st.sampled_from(dtypes).flatmap(
        lambda dtype: some.arrays(dtype, some.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), **options)
    )


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def arrays_in(body, length):
    """Decode a request as the door does, then its tensors as an instance does."""
    content, raw = codec_http.split(memoryview(body), length)
    found = codec_http.decode_request(content)
    template = found
    if isinstance(found, TypedRequest):
        template, filled = found.template, memoryview(bytearray(found.nbytes))
        found.write(filled, raw)
        raw = filled
    return template, {
        ref.name: from_raw(raw[ref.offset : ref.offset + ref.nbytes], ref.datatype, ref.shape, tensor=ref.name)
        for ref in template.inputs
        if not ref.region
    }


def raw_request(arrays, **fields):
    """Return the parts of a request, and the length of the first: its JSON."""
    raw = [bytes(to_raw(array)) for array in arrays.values()]
    tensors = [
        {"name": name, "datatype": datatype_of(array), "shape": array.shape, "parameters": {"binary_data_size": len(part)}}
        for (name, array), part in zip(arrays.items(), raw, strict=True)
    ]
    content = json.dumps({"inputs": tensors, **fields}).encode()
    return [content, *raw], len(content)


def read_answer(body, length=None):
    """Return an answer's JSON, and its outputs as arrays by name."""
    told, at, found = json.loads(body[:length]), length or 0, {}
    for each in told["outputs"]:
        size = each.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(each["data"], DTYPES[each["datatype"]]).reshape(each["shape"])
        else:
            array = from_raw(body[at : at + size], each["datatype"], each["shape"], tensor=each["name"])
            at += size
        found[each["name"]] = array
    return told, found


def output(name, array):
    return Output(name, datatype_of(array), array.shape, memoryview(to_raw(array)))


@settings(max_examples=60, deadline=None)
@given(arrays_of(NUMERIC), st.lists(st.binary(max_size=9), max_size=4))
def test_raw_requests_and_answers_decode_to_themselves(array, texts):
    words = np.array([*texts, None], dtype=object)[:-1]
    asked = {"binary_data_output": True, "priority": 2, "timeout": 250_000}
    parts, length = raw_request({"a": array, "b": words}, id="7", parameters=asked)
    template, found = arrays_in(b"".join(parts), length)
    assert (template.id, template.raw_outputs, template.priority, template.timeout_s) == ("7", None, 2, 0.25)
    assert template.raw_bytes == sum(len(part) for part in parts[1:])
    assert same(found["a"], array)
    assert found["b"].tolist() == texts
    content, raw = codec_http.answer_json(Answer("m", "1", (output("a", array),)), "7", None)
    told, outputs = read_answer(b"".join((content, *raw)), len(content))
    assert (told["model_name"], told["model_version"], told["id"]) == ("m", "1", "7")
    assert same(outputs["a"], array)
    assert len(content) % 64 == 0


@settings(max_examples=100, deadline=None)
@given(arrays_of(NUMERIC, elements={"allow_nan": False, "allow_infinity": False}), st.booleans())
def test_json_requests_and_answers_decode_to_themselves(array, nested):
    data = array.tolist() if nested and array.ndim else array.reshape(-1).tolist()
    data = [data] if nested and array.size else data
    tensor = {"name": "x", "datatype": datatype_of(array), "shape": list(array.shape), "data": data}
    template, found = arrays_in(json.dumps({"inputs": [tensor]}).encode(), None)
    assert same(found["x"], array)
    assert template.raw_outputs == frozenset()
    content, raw = codec_http.answer_json(Answer("m", "1", (output("x", array),)), "", template.raw_outputs)
    assert not raw
    assert same(read_answer(content)[1]["x"], array)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=5), max_size=5))
def test_json_strings_decode_to_themselves(texts):
    data = JsonData(memoryview(json.dumps(texts).encode()), "BYTES", (len(texts),), tensor="x")
    raw = bytearray(data.nbytes)
    data.write(memoryview(raw))
    assert json.loads(to_json(raw, "BYTES", (len(texts),))) == texts


def test_long_json_arrays_are_converted_piece_by_piece():
    array = np.arange(200_000, dtype=np.int64).reshape(2, 1000, 100) - 70_000
    data = JsonData(memoryview(json.dumps(array.tolist(), indent=1).encode()), "INT64", array.shape, tensor="x")
    raw = bytearray(data.nbytes)
    data.write(memoryview(raw))
    assert raw == array.tobytes()
    assert json.loads(to_json(raw, "INT64", array.shape)) == array.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" + b"1" * 200_000 + b"]", "element of more than"),
        (b"[" + b" " * 200_000 + b"1.5]", ""),
        (b"[[1" + b"," * 3 + b"1]]", "v2 JSON"),
    ],
)
def test_long_elements_are_refused_and_long_blanks_are_not(data, reason):
    content = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":%b}]}' % data
    if reason:
        with pytest.raises(InputRefused, match=reason):
            arrays_in(content, None)
    else:
        assert arrays_in(content, None)[1]["x"].tolist() == [1.5]


ONE = b'{"name":"x","datatype":"%b","shape":[%b],"data":[%b]}'


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (b",".join([ONE % (b"FP32", b"1", b"1")] * 40_000), "may hold 4096 objects"),
        (ONE % (b"FP32", b",".join([b"1000"] * 400_000), b"1"), "the shape of input"),
        (ONE % (b"BYTES", b"1", b",".join([b'"a"'] * 600_000)), "of strings in JSON"),
        (ONE % (b"UINT8", b"1000000", b",".join([b"1"] * 1_000_000)), ""),
        (ONE % (b"UINT8", b"250000,4", b",".join([b"[1,1,1,1]"] * 250_000)), ""),
        (ONE % (b"UINT8", b"0", b",".join([b"[]"] * 600_000)), ""),
    ],
    ids=["objects", "shape", "strings", "flat", "nested", "empty"],
)
def test_json_takes_little_more_memory_than_its_text(inputs, reason):
    content = memoryview(b'{"inputs":[%b]}' % inputs)
    tracemalloc.start()
    try:
        if reason:
            with pytest.raises(InputRefused, match=reason):
                codec_http.decode_request(content)
        else:
            found = codec_http.decode_request(content)
            found.write(memoryview(bytearray(found.nbytes)), content[:0])
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content) + (1 << 21)
    finally:
        tracemalloc.stop()


def test_nan_reads_null_in_json_and_passes_raw():
    array = np.array([1.5, np.nan, np.inf], np.float32)
    assert to_json(array.tobytes(), "FP32", (3,)) == b"[1.5,null,null]"
    parts, length = raw_request({"x": array})
    assert same(arrays_in(b"".join(parts), length)[1]["x"], array)


def test_raw_and_json_inputs_may_be_mixed():
    tensors = [
        {"name": "a", "datatype": "UINT8", "shape": [3], "data": [1, 2, 3]},
        {"name": "b", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
        {"name": "c", "datatype": "BYTES", "shape": [1], "data": ["hé"]},
    ]
    content = json.dumps({"inputs": tensors}).encode()
    _, found = arrays_in(content + np.array([1, 2], np.float32).tobytes(), len(content))
    assert (found["a"].tolist(), found["b"].tolist(), found["c"].tolist()) == ([1, 2, 3], [1.0, 2.0], ["hé".encode()])


def test_regions_stand_for_inputs_and_outputs():
    place = {"shared_memory_region": "in", "shared_memory_byte_size": 24, "shared_memory_offset": 64}
    room = {"shared_memory_region": "out", "shared_memory_byte_size": 24, "shared_memory_offset": 128}
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3], "parameters": place}
    request = {"inputs": [tensor], "outputs": [{"name": "y", "parameters": room}, {"name": "z"}]}
    template = codec_http.decode_request(json.dumps(request).encode())
    assert isinstance(template, Template)
    assert template.inputs == (TensorRef("x", "FP32", (2, 3), 64, 24, "in"),)
    assert (template.outputs, template.raw_bytes) == ((Wanted("y", "out", 128, 24), Wanted("z")), 0)
    answer = Answer("m", "1", (Output("y", "FP32", (2, 3), None, "out", 128, 24),))
    content, raw = codec_http.answer_json(answer, "", template.raw_outputs)
    assert not raw
    assert json.loads(content)["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2, 3]}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"datatype": "FLOAT"}, "supported"),
        ({"shape": [2, 15]}, "found 32 elements"),
        ({"shape": [-2, -16]}, "lengths must be >= 0"),
        ({"shape": [2**62, 2**62]}, "elements"),
        ({"shape": [1] * 33}, "at most 32"),
        ({"shape": "many"}, "not v2 JSON"),
        ({"data": None}, "needs"),
        ({"data": 5}, "needs"),
        ({"data": {"a": 1}}, "needs"),
        ({"data": [["a"] * 16] * 2}, "not FP32"),
        ({"data": [[True] * 16] * 2}, "not FP32"),
        ({"data": [[None] * 16] * 2}, "not FP32"),
        ({"data": [[1.0] * 16, [1.0]]}, "not a regular array"),
        ({"data": [[1.0] * 17, [1.0] * 15]}, "not a regular array"),
        ({"data": [[[1.0] * 31], 1.0]}, "not a regular array"),
        ({"data": [[1.0] * 30, 1.0, 1.0]}, "not a regular array"),
        ({"data": [1.0, [1.0] * 31]}, "not a regular array"),
        ({"parameters": {"binary_data_size": 128}}, "more than one way"),
        ({"data": [1.5], "shape": [1], "datatype": "INT64"}, "not INT64"),
        ({"data": [300], "shape": [1], "datatype": "UINT8"}, "not UINT8"),
        ({"data": [-1], "shape": [1], "datatype": "UINT64"}, "not UINT64"),
        ({"data": [2**64], "shape": [1], "datatype": "UINT64"}, "not UINT64"),
        ({"data": [2**63], "shape": [1], "datatype": "INT64"}, "not INT64"),
        ({"data": [1], "shape": [1], "datatype": "BOOL"}, "not BOOL"),
        ({"data": [1], "shape": [1], "datatype": "BYTES"}, "must be strings"),
        ({"data": [1], "shape": [0]}, "not a regular array"),
    ],
)
def test_json_that_does_not_fit_is_refused_with_the_reason(change, reason):
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 16], "data": [[0.5] * 16] * 2, **change}
    with pytest.raises(InputRefused, match=reason):
        arrays_in(json.dumps({"inputs": [tensor]}).encode(), None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": {"binary_data_size": 2**60}}, "claims"),
        ({"parameters": {"binary_data_size": 2**70}}, "claims"),
        ({"parameters": {"binary_data_size": -1}}, "claims"),
        ({"parameters": {"binary_data_size": 10}}, "takes 128"),
        ({"parameters": {"binary_data_size": True}}, "not v2 JSON"),
        ({"datatype": "BYTES", "parameters": {"binary_data_size": 12}}, "takes 128 or more"),
        ({"parameters": {"shared_memory_region": "r"}}, "without"),
        ({"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 64}}, "takes 128"),
        ({"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 128, "shared_memory_offset": -1}}, "claims"),
    ],
)
def test_claims_that_do_not_fit_are_refused(change, reason):
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 16], **change}
    with pytest.raises(InputRefused, match=reason):
        codec_http.decode_request(json.dumps({"inputs": [tensor]}).encode())


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"parameters": {"sequence_id": 3}}, "no state"),
        ({"parameters": {"sequence_id": "a"}}, "no state"),
        ({"parameters": {"priority": -1}}, "negative"),
        ({"outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "classification"),
        ({"outputs": [{"name": "y"}] * 1025}, "1024 inputs and as many outputs; found 0 and 1025"),
    ],
)
def test_what_is_not_offered_is_refused_with_the_reason(request_, reason):
    with pytest.raises(InputRefused, match=reason):
        codec_http.decode_request(json.dumps({"inputs": [], **request_}).encode())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_request_is_a_request_or_refused(data):
    typed = {"name": "t", "datatype": "INT8", "shape": [2, 2], "data": [[1, 2], [3, 4]]}
    raw = {"name": "x", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}}
    content = json.dumps({"id": "a", "inputs": [typed, raw], "outputs": [{"name": "y"}]}).encode()
    body = bytearray(content + bytes(24))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    try:
        arrays_in(bytes(body[:cut]), data.draw(st.sampled_from([len(content), None, 0, 10**9])))
    except InputRefused:
        pass
