from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tenure.errors import CorruptData, StaleFence
from tenure.train.records import BLOCK_BYTES, Record, pack, read_arrays
from tenure.train.store import Claims, Store, read_document


@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=5),
        hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.uint8]), hnp.array_shapes(min_dims=0, min_side=0)),
        max_size=4,
    )
)
def test_a_record_reads_as_it_was_written(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("r") / "record"
    path.write_bytes(b"".join(pack(arrays, fence=7, meta={"n": 1})))
    header, read = read_arrays(path)
    assert header.fence == 7
    assert read.keys() == arrays.keys()
    for name, values in arrays.items():
        assert read[name].dtype == values.dtype
        assert read[name].shape == values.shape
        assert read[name].tobytes() == values.tobytes()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    arrays = {"a": np.arange(400_000, dtype=np.float32), "b": np.ones(700_000, np.float32)}
    path.write_bytes(b"".join(pack(arrays)))
    return path


@pytest.mark.parametrize("at", [3, 20, 200, BLOCK_BYTES // 2, 3 * BLOCK_BYTES, -5])
def test_one_changed_byte_anywhere_is_found(large: Path, at: int) -> None:
    content = bytearray(large.read_bytes())
    content[at] ^= 0x40
    large.write_bytes(bytes(content))
    with pytest.raises(CorruptData):
        read_arrays(large)


@pytest.mark.parametrize("keep", [0, 10, 100, BLOCK_BYTES, -1])
def test_a_torn_record_is_found(large: Path, keep: int) -> None:
    large.write_bytes(large.read_bytes()[:keep])
    with pytest.raises(CorruptData):
        read_arrays(large)


def test_only_blocks_that_are_touched_are_read(large: Path) -> None:
    content = bytearray(large.read_bytes())
    content[-5] ^= 1  # the last block belongs to b alone
    large.write_bytes(bytes(content))
    record = Record(large)
    assert record.array("a")[399_999] == 399_999
    assert record.array("b", 600_000, 10).tolist() == [1.0] * 10
    assert record.header.payload_bytes >= 4_400_000
    with pytest.raises(CorruptData):
        record.array("b", 699_990, 10)


def test_a_part_that_a_record_lacks_is_refused(large: Path) -> None:
    with pytest.raises(ValueError, match="'a' has 400000 elements; asked for 399999 to 400001"):
        Record(large).array("a", 399_999, 2)


def test_objects_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="Python objects"):
        pack({"x": np.array([{}])})


def test_of_many_who_publish_one_name_one_has_the_effect(tmp_path: Path) -> None:
    stores = [Store(tmp_path, worker=worker) for worker in range(8)]
    for race in range(50):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda store: store.publish_json(f"plans/{race:04d}.json", store.worker), stores))  # noqa: B023
        assert sum(won) == 1
        assert read_document(tmp_path / f"plans/{race:04d}.json") == won.index(True)
    assert not [path for path in (tmp_path / "plans").iterdir() if path.name.startswith(".")]


def test_an_older_grant_of_the_same_worker_is_refused(tmp_path: Path) -> None:
    old = Store(tmp_path, worker=1, fence=4)
    other = Store(tmp_path, worker=2, fence=3)
    Store(tmp_path, worker=1, fence=5)
    with pytest.raises(StaleFence, match="fence 4, a newer grant with fence 5"):
        old.publish_json("plans/0000.json", {})
    assert other.publish_json("plans/0000.json", {})
    with pytest.raises(StaleFence):
        Store(tmp_path, worker=1, fence=4)


def test_a_claim_lapses_by_the_observers_own_clock_and_one_takes_it_over(tmp_path: Path) -> None:
    first, second, third = (Claims(Store(tmp_path, worker=worker)) for worker in range(3))
    assert first.claim("combine-00000001", "a", now_s=1e9, period_s=5)  # its clock may say what it likes
    assert not second.claim("combine-00000001", "b", now_s=10, period_s=5)
    assert not third.claim("combine-00000001", "c", now_s=100, period_s=5)
    assert not second.claim("combine-00000001", "b", now_s=14.9, period_s=5)
    assert second.claim("combine-00000001", "b", now_s=15, period_s=5)
    assert not third.claim("combine-00000001", "c", now_s=105, period_s=5)  # a new holder: its period begins anew
    assert second.takeovers("combine-00000001") == 1


def test_a_changed_document_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish_json("rounds/00000000.json", {"loss": 1.5})
    path = tmp_path / "rounds/00000000.json"
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(CorruptData, match="checksum"):
        store.read_json("rounds/00000000.json")
    assert store.read_json("rounds/00000001.json") is None
