"""Threads and instances from a share of the CPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.threads import MAX_THREADS, choose_threads
from tenure.errors import SpecError

LARGE, SMALL = 100_000_000, 500_000


@given(
    st.floats(0.01, 512), st.sampled_from([".onnx", ".skops", ".pt2", ".tflite"]), st.sampled_from([SMALL, LARGE]),
    st.sampled_from([0, 0, 1, 2]), st.sampled_from([0, 0, 1, 3]),
)  # fmt: skip
def test_a_share_is_never_exceeded_unless_asked_for_and_what_is_asked_for_is_kept(cpus, kind, size, instances, threads):
    found = choose_threads(cpus, kind=kind, model_bytes=size, instances=instances, threads=threads)
    assert found.instances >= 1
    assert found.threads >= 1
    assert found.reason
    assert instances in (0, found.instances)
    assert threads in (0, found.threads)
    if not instances and not threads:
        assert found.instances * found.threads <= max(1, cpus)


@pytest.mark.parametrize(
    ("cpus", "kind", "size", "instances", "threads"),
    [
        (0.5, ".onnx", LARGE, 1, 1),
        (1.9, ".onnx", LARGE, 1, 1),
        (2, ".onnx", LARGE, 1, 2),
        (2, ".tflite", SMALL, 1, 1),
        (8, ".tflite", SMALL, 4, 1),
        (2, ".skops", LARGE, 1, 1),
        (16, ".pt2", LARGE, 4, MAX_THREADS),
    ],
)
def test_large_models_get_threads_and_small_ones_do_not(cpus, kind, size, instances, threads):
    found = choose_threads(cpus, kind=kind, model_bytes=size)
    assert (found.instances, found.threads) == (instances, threads)


def test_a_device_needs_one_instance_and_a_share_of_nothing_is_refused():
    found = choose_threads(8, kind=".pt2", model_bytes=LARGE, device="cuda")
    assert (found.instances, found.threads) == (1, 1)
    with pytest.raises(SpecError, match="above 0"):
        choose_threads(0, kind=".onnx", model_bytes=1)
