"""Memory for requests: nothing overlaps, nothing leaks, what is free can be had."""

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.errors import SpecError
from tenure.serve.arena import Arena
from tenure.serve.faults import Overloaded, TooLarge

BUDGET = 1 << 16


@pytest.fixture
def arena():
    made = Arena(BUDGET, max_request_bytes=BUDGET)
    yield made
    made.close()


def resident_bytes(arena):
    return os.fstat(arena.reader).st_blocks * 512


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, BUDGET), st.integers(-30, -1)), max_size=80))
def test_buffers_never_overlap_and_all_memory_can_be_had_again(steps):
    arena = Arena(BUDGET, max_request_bytes=BUDGET)
    held = []
    for step in steps:
        if step >= 0:
            try:
                buffer = arena.reserve(step, "a")
            except Overloaded:
                continue
            assert (len(buffer.view), buffer.offset % 64) == (step, 0)
            held.append((buffer, step))
        elif held:
            arena.release(held.pop(step % len(held))[0])
        spans = sorted((buffer.offset, buffer.offset + size) for buffer, size in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert sum(size for _, size in held) <= arena.held_bytes <= BUDGET
        assert arena.by_door.get("a", 0) == arena.held_bytes
    for buffer, _ in held:
        arena.release(buffer)
    assert arena.held_bytes == 0
    whole = arena.reserve(BUDGET, "b")
    arena.release(whole)
    arena.close()


def test_a_freed_block_is_the_next_one_of_its_size(arena):
    first, second = arena.reserve(4096, "a"), arena.reserve(4096, "a")
    place = first.offset
    arena.release(first)
    assert arena.reserve(4090, "a").offset == place
    arena.release(second)


def test_what_is_written_is_what_others_map(arena):
    buffer = arena.reserve(5, "a")
    buffer.view[:] = b"hello"
    assert os.pread(arena.reader, 5, buffer.offset) == b"hello"
    with pytest.raises(OSError):
        os.pwrite(arena.reader, b"x", buffer.offset)
    arena.release(buffer)


def test_a_second_release_is_an_error_and_changes_nothing(arena):
    buffer = arena.reserve(10, "a")
    arena.release(buffer)
    with pytest.raises(KeyError):
        arena.release(buffer)
    assert arena.held_bytes == 0


def test_limits_are_told_apart(arena):
    with pytest.raises(TooLarge):
        arena.reserve(BUDGET + 1, "a")
    arena.reserve(BUDGET // 2, "a")
    with pytest.raises(Overloaded, match="are held"):
        arena.reserve(BUDGET // 2 + 1, "b")
    assert arena.by_door == {"a": BUDGET // 2}
    with pytest.raises(SpecError):
        Arena(100, max_request_bytes=10)


def test_pages_of_a_burst_are_given_back_once_it_is_over(arena):
    kept = arena.reserve(8192, "a")
    burst = [arena.reserve(8192, "a") for _ in range(6)]
    for buffer in (kept, *burst):
        buffer.view[:] = b"x" * 8192
    for buffer in burst:
        arena.release(buffer)
    assert arena.trim() == 0, "they were in use since the last time"
    assert arena.trim() >= 6 * 8192
    assert resident_bytes(arena) <= 8192
    assert bytes(kept.view) == b"x" * 8192
    assert arena.peak_bytes == 7 * 8192
    assert arena.trim() == 0
