"""What the HTTP client is made of, without sockets: answers in any pieces, hostile answers, parts of shared memory."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.serve.faults import ModelFailed
from tenure.serve.http_client import regions, v2json
from tenure.serve.http_client.regions import Regions, offsets
from tenure.serve.http_client.response import MAX_HEAD_BYTES, NotHttp, ResponseReader, aligned, parse_head

BODY = bytes(range(256)) * 3
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Other: 1\r\n\r\n" % len(BODY) + BODY
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + SIZED
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\n%s\r\n200;x=y\r\n%s\r\n0\r\nTrailer: t\r\n\r\n" % (
    BODY[:256],
    BODY[256:],
)


def fed(reader: ResponseReader, content: bytes, cuts: list[int]) -> bool:
    """Feed a reader with pieces that end at these places; return whether it says that the answer is complete."""
    complete, at = False, 0
    for end in sorted({*(cut % (len(content) + 1) for cut in cuts), len(content)}):
        while at < end and not complete:
            room = reader.buffer()
            assert len(room) > 0
            count = min(len(room), end - at)
            room[:count] = content[at : at + count]
            at += count
            complete = reader.received(count)
    return complete


@given(st.sampled_from([SIZED, INTERIM, CHUNKED]), st.lists(st.integers(0, 2000), max_size=30))
def test_an_answer_reads_the_same_however_it_is_cut(content, cuts):
    reader = ResponseReader()
    for _ in range(2):
        reader.start()
        assert fed(reader, content, cuts)
        assert bytes(reader.body) == BODY
        assert reader.head.status == 200
        assert reader.clean


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", CHUNKED[:60], SIZED[:60]]),
    st.lists(st.integers(0, 500), max_size=9),
)
def test_rubbish_is_refused_or_waited_on_but_breaks_nothing(rubbish, start, cuts):
    reader = ResponseReader()
    try:
        complete = fed(reader, start + rubbish, cuts)
    except NotHttp:
        return
    assert not complete or reader.head is not None


def test_bytes_behind_an_answer_make_the_connection_unusable():
    reader = ResponseReader()
    room = reader.buffer()
    room[: len(SIZED) + 1] = SIZED + b"x"
    assert reader.received(len(SIZED) + 1)
    assert bytes(reader.body) == BODY
    assert not reader.clean


def test_what_is_claimed_is_bounded_before_memory_is_taken():
    reader = ResponseReader()
    with pytest.raises(NotHttp, match="claims 999999999999 bytes"):
        fed(reader, b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n", [])
    with pytest.raises(NotHttp, match=f"longer than {MAX_HEAD_BYTES} bytes"):
        fed(ResponseReader(), b"HTTP/1.1 200 OK\r\nX: " + b"y" * MAX_HEAD_BYTES, [])


@pytest.mark.parametrize("before", [0, 1, 63, 64, 200])
def test_the_first_raw_tensor_lies_aligned(before):
    room = aligned(5000, before)
    assert len(room) == 5000
    assert (np.frombuffer(room, np.uint8).ctypes.data + before) % 64 == 0


@given(st.integers(0, 5), st.sampled_from(["FP32", "INT8", "FP64", "BYTES", "NONE"]), st.integers(-3, 60))
def test_an_answer_whose_sizes_do_not_fit_is_never_an_array(length, datatype, claimed):
    raw = bytes(4 * length)
    tensor = {"name": "y", "datatype": datatype, "shape": [length], "parameters": {"binary_data_size": claimed}}
    content = json.dumps({"outputs": [tensor]}).encode()
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
    told = parse_head(head % (len(content), len(content) + len(raw)))
    try:
        found = v2json.read_answer(told, memoryview(content + raw))["y"]
    except ModelFailed:
        assert claimed != len(raw) or datatype != "FP32"
        return
    assert claimed == len(raw)
    assert found.shape == (length,)


class Memory:
    """Registers regions of a folder of the test's own, and remembers them."""

    def __init__(self, folder) -> None:
        self.regions = Regions(str(folder))
        self.known: list[str] = []

    def register(self, region) -> None:
        assert os.path.getsize(os.path.join(self.regions._folder, region.name)) == region.nbytes
        self.known.append(region.name)


def test_parts_in_use_never_overlap_and_all_of_them_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "MAX_BYTES", 16 << 20)
    monkeypatch.setattr(regions, "_REGION_BYTES", 2 << 20)
    memory, chance = Memory(tmp_path), np.random.default_rng(0)
    held = []
    for _ in range(2000):
        if held and chance.random() < 0.5:
            memory.regions.give(held.pop(chance.integers(len(held))))
            continue
        wanted = int(chance.integers(1, 3 << 20))
        part = memory.regions.take(wanted, memory.register)
        if part is None:
            continue
        assert part.nbytes >= wanted
        assert part.offset + part.nbytes <= part.region.nbytes
        for other in held:
            apart = part.offset + part.nbytes <= other.offset or other.offset + other.nbytes <= part.offset
            assert other.region is not part.region or apart
        held.append(part)
        assert sum({part.region.name: part.region.nbytes for part in held}.values()) <= 16 << 20
    assert os.listdir(tmp_path) == []
    assert sorted(memory.regions.close()) == sorted(memory.known)
    for part in held:
        memory.regions.give(part)
    assert memory.regions.take(1, None) is None


def test_a_region_that_the_server_has_lost_is_not_used_again(tmp_path):
    memory = Memory(tmp_path)
    first, second = (memory.regions.take(100, memory.register) for _ in range(2))
    assert first.region is second.region
    memory.regions.give(second)
    memory.regions.lose(first.region)
    memory.regions.give(first)
    third = memory.regions.take(100, memory.register)
    assert third.region is not first.region
    assert memory.regions.close() == [third.region.name]


def test_a_region_that_is_refused_leaves_nothing_behind(tmp_path):
    def refuse(region) -> None:
        raise ValueError("no")

    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="no"):
        Regions(str(tmp_path)).take(100, refuse)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) <= files


def test_inputs_lie_aligned_one_behind_the_other():
    starts, total = offsets({"a": np.zeros(1, np.int8), "b": np.zeros(100, np.float32), "c": np.zeros(0), "d": np.zeros(2)})
    assert starts == [0, 64, 512, 512]
    assert total == 576


def test_metadata_may_leave_out_or_null_what_the_protocol_makes_optional():
    found = v2json.read_metadata(
        memoryview(b'{"name":"m","versions":null,"inputs":[{"name":"x","datatype":"FP32","shape":[-1,4]}],"outputs":[]}')
    )
    assert found.versions == ()
    assert found.platform == ""
    assert found.inputs[0].shape == (-1, 4)
    assert v2json.read_metadata(memoryview(b'{"name":"m"}')).inputs == ()
