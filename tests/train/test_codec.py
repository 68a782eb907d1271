"""The codecs: bounds of what decoding gives, slices, sizes, and nothing lost with error feedback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tenure.errors import SpecError
from tenure.train.codec import CHUNK_VALUES, Codec, Feedback, Int8, TopK, make_codec, units_of

CODECS: list[Codec] = [Int8(), TopK(0.01), TopK(0.3), TopK(1.0)]
codecs = st.sampled_from(CODECS)
LEAST = 2.0**-119


@st.composite
def vectors(draw: st.DrawFn, *, finite: bool = True) -> Any:
    """Vectors of mixed magnitudes, of lengths around the units of both codecs; or short ones of hypothesis' own values."""
    if draw(st.booleans()):
        special = st.floats(width=32, allow_nan=not finite, allow_infinity=not finite)
        return draw(arrays(np.float32, st.integers(1, 40), elements=special))
    length = draw(st.sampled_from([1, 251, 252, 253, 600, CHUNK_VALUES - 1, CHUNK_VALUES, CHUNK_VALUES + 1, 10_000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = sorted(draw(st.tuples(st.integers(-44, 37), st.integers(-44, 37))))
    values = rng.standard_normal(length) * 10.0 ** rng.uniform(low, high, length)
    return np.where(rng.random(length) < draw(st.sampled_from([0.0, 0.5, 1.0])), 0, values).astype(np.float32)


def per_unit(values: Any, unit: int) -> Any:
    """Return, for each value, the largest magnitude of its unit."""
    whole = np.concatenate([values, np.zeros(-len(values) % unit, np.float32)]).reshape(-1, unit)
    return np.repeat(np.abs(whole).max(axis=1), unit)[: len(values)].astype(np.float64)


@settings(deadline=None)
@given(vectors())
def test_int8_is_off_by_at_most_half_a_step(values: Any) -> None:
    codec = Int8()
    found = codec.decode(codec.encode(values), len(values))
    largest = per_unit(values, codec.unit_values)
    off = np.abs(found.astype(np.float64) - values)
    assert np.all(off <= np.where(largest < LEAST, largest, 0.5001 * largest / 127))
    assert np.all(found[values == 0] == 0)


@settings(deadline=None)
@given(vectors(), st.sampled_from([0.0005, 0.01, 0.3, 1.0]))
def test_topk_keeps_the_largest_of_each_chunk_closely_and_nothing_else(values: Any, share: float) -> None:
    codec = TopK(share)
    found = codec.decode(codec.encode(values), len(values))
    largest = per_unit(values, codec.unit_values)
    close = np.abs(found.astype(np.float64) - values) <= 0.0005 * np.abs(values, dtype=np.float64) + 2.0**-25 * largest
    for at in range(0, len(values), codec.unit_values):
        part = slice(at, at + codec.unit_values)
        magnitudes = np.abs(values[part])
        smallest_kept = np.sort(magnitudes)[-codec.kept :][0]
        assert np.all((close[part] | (largest[part] < LEAST))[magnitudes > smallest_kept])
        assert np.all(found[part][magnitudes < smallest_kept] == 0)
        assert np.count_nonzero(found[part]) <= codec.kept


@settings(deadline=None)
@given(codecs, vectors())
def test_nothing_is_lost_between_what_is_sent_and_what_remains(codec: Codec, values: Any) -> None:
    data, residual = Feedback(codec).encode(values)
    sent = codec.decode(data, len(values))
    again = sent.astype(np.float64) + residual
    ulp = np.maximum(np.abs(values), np.abs(sent)) * 2.0**-23 + 2.0**-149
    assert np.all(np.abs(again - values) <= ulp)


@settings(deadline=None)
@given(codecs, vectors(finite=False), st.integers(0, 3), st.integers(0, 3))
def test_a_slice_of_units_is_encoded_and_decodes_as_in_the_whole(codec: Codec, values: Any, first: int, count: int) -> None:
    data = codec.encode(values)
    whole = codec.decode(data, len(values))
    start = first * codec.unit_values
    stop = min(start + count * codec.unit_values, len(values))
    if start < stop:
        part = data[first * codec.unit_bytes : units_of(codec, stop) * codec.unit_bytes]
        assert part.tobytes() == codec.encode(values[start:stop]).tobytes()
        assert codec.decode(part, stop - start).tobytes() == whole[start:stop].tobytes()


@settings(deadline=None)
@given(codecs, st.integers(1, 20_000))
def test_bytes_follow_from_the_length_alone(codec: Codec, length: int) -> None:
    values = np.linspace(-1, 1, length, dtype=np.float32)
    assert codec.encode(values).nbytes == -(-length // codec.unit_values) * codec.unit_bytes
    assert len(codec.decode(codec.encode(values), length)) == length


def test_sizes_are_as_written() -> None:
    assert (Int8().unit_values, Int8().unit_bytes) == (252, 256)
    assert [TopK(share).unit_bytes for share in (0.01, 0.001, 1e-9)] == [4 + 4 * 41, 4 + 4 * 5, 8]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_still_seen_and_stays_in_its_unit(codec: Codec, bad: float) -> None:
    values = np.ones(3 * codec.unit_values, dtype=np.float32)
    values[codec.unit_values + 7] = bad
    found = codec.decode(codec.encode(values), len(values)).reshape(3, -1)
    assert [bool(np.isnan(unit).any()) for unit in found] == [False, True, False]
    assert np.isnan(found[1, 7])


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_the_largest_float_stays_finite_and_the_smallest_does_no_harm(codec: Codec) -> None:
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest, 0, 1e-45, -1e-45], dtype=np.float32)
    assert np.isfinite(codec.decode(codec.encode(values), 5)).all()
    assert np.array_equal(codec.decode(codec.encode(values[2:]), 3), np.zeros(3, np.float32))


@pytest.mark.parametrize("codec", [Int8(), TopK(0.05)], ids=lambda codec: codec.name)
def test_with_feedback_the_sum_of_what_was_sent_follows_the_sum_of_what_was_meant(codec: Codec) -> None:
    rng = np.random.default_rng(5)
    feedback, plain_sent, sent, meant = Feedback(codec), np.zeros(5000), np.zeros(5000), np.zeros(5000)
    direction = rng.standard_normal(5000)
    for _ in range(60):
        values = (direction + 0.1 * rng.standard_normal(5000)).astype(np.float32)
        data, feedback.residual = feedback.encode(values)
        sent += codec.decode(data, len(values))
        plain_sent += codec.decode(codec.encode(values), len(values))
        meant += values
    assert np.allclose(sent + feedback.residual, meant, atol=1e-3)
    assert np.linalg.norm(sent - meant) < 0.6 * np.linalg.norm(plain_sent - meant)


def test_a_residual_of_another_length_and_bytes_of_another_vector_are_refused() -> None:
    with pytest.raises(ValueError, match="residual has 3 values, the vector 4"):
        Feedback(Int8(), np.zeros(3, np.float32)).encode(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"253 values have 512 bytes in codec int8; found 256"):
        Int8().decode(np.zeros(256, np.uint8), 253)


def test_a_codec_is_named_as_in_a_job_file() -> None:
    assert make_codec("none") is None
    assert make_codec("int8") == Int8()
    assert make_codec("topk:0.01") == TopK(0.01)
    for wrong in ("int4", "topk", "topk:", "topk:0", "topk:1.5", "topk:nan", "int8:0.5", ""):
        with pytest.raises(SpecError, match="codec must be"):
            make_codec(wrong)
