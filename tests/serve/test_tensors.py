"""What is encoded decodes to itself, for every data type."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from tenure.serve.faults import InputRefused
from tenure.serve.tensors import DTYPES, datatype_of, from_raw, to_raw

NUMERIC = [dtype for name, dtype in DTYPES.items() if name != "BYTES"]
arrays = st.sampled_from(NUMERIC).flatmap(
    lambda dtype: some.arrays(dtype, some.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@settings(max_examples=60, deadline=None)
@given(arrays, st.integers(0, 7))
def test_raw_bytes_decode_to_the_same_array_however_they_lie(array, offset):
    raw = bytes(offset) + bytes(to_raw(array))
    assert same(from_raw(memoryview(raw)[offset:], datatype_of(array), array.shape, tensor="x"), array)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=64), st.sampled_from(list(DTYPES)), st.lists(st.integers(-2, 2**40), max_size=4))
def test_any_bytes_under_any_claim_are_an_array_or_refused(raw, datatype, shape):
    try:
        assert list(from_raw(raw, datatype, shape, tensor="x").shape) == shape
    except InputRefused:
        pass


def test_types_without_a_name_are_refused():
    with pytest.raises(InputRefused, match="complex"):
        datatype_of(np.zeros(1, complex))
