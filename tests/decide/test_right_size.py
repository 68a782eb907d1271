import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.right_size import HEADROOM, LEAST_MEMORY_BYTES, UseHistory, Window, right_size
from tenure.errors import SpecError
from tenure.resources import Envelope
from tenure.usage import Usage

MIB = 1 << 20


def windows(*peaks_mib: float, cpus: float = 0.5) -> list[Window]:
    return [Window(peak_memory_bytes=int(peak * MIB), cpus=cpus) for peak in peaks_mib]


def envelope(mib: int = 1024, cpus: float = 0.5) -> Envelope:
    return Envelope(cpus=cpus, memory_bytes=mib * MIB)


def test_memory_shrinks_to_the_highest_seen_and_a_little_once_enough_was_seen() -> None:
    seen = windows(*[100, 200, 150] * 7)
    assert right_size(seen[:18], envelope(cpus=0.6)) is None
    found = right_size(seen, envelope(cpus=0.6))
    assert found is not None
    assert found.envelope.memory_bytes == 225 * MIB
    assert found.envelope.cpus == 0.6
    assert found.risk == pytest.approx(1 / 22)
    assert "200.0 MiB at most in 21 windows" in found.why
    assert "4.5%" in found.why


def test_a_smaller_risk_asks_for_more_windows() -> None:
    seen = windows(*[100, 200] * 20)
    assert right_size(seen, envelope(cpus=0.6), max_risk=0.01) is None
    assert right_size(seen * 3, envelope(cpus=0.6), max_risk=0.01) is not None


def test_memory_that_rises_is_not_cut() -> None:
    assert right_size(windows(*range(100, 140)), envelope(cpus=0.6)) is None


def test_a_bound_that_is_nearly_reached_is_raised_at_once() -> None:
    found = right_size(windows(500, 990), envelope())
    assert found is not None
    assert found.envelope.memory_bytes == 1536 * MIB
    assert right_size(windows(*[990] + [300] * 3), envelope(cpus=0.6)) is None, "what was tight long ago is no reason"


def test_cores_shrink_to_what_nearly_all_windows_needed_and_grow_when_all_are_used() -> None:
    rare = windows(*[1000] * 39, cpus=0.4) + windows(1000, cpus=2.0)
    random.Random(1).shuffle(rare)
    found = right_size(rare, envelope(1100, cpus=4.0))
    assert found is not None
    assert found.envelope.cpus == pytest.approx(0.5)
    more = right_size(windows(100, 100, cpus=1.97), envelope(110, cpus=2.0))
    assert more is not None
    assert more.envelope.cpus == 3.0


def test_what_fits_is_left_alone() -> None:
    assert right_size(windows(*[950] * 40, cpus=0.46), envelope(1100)) is None
    assert right_size([], envelope()) is None


def test_a_risk_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match="risk"):
        right_size(windows(1), envelope(), max_risk=0.0)


peaks = st.lists(st.integers(1, 2000), min_size=19, max_size=80)


@given(peaks, st.integers(16, 4096), st.floats(0.1, 8), st.floats(0, 8))
def test_no_proposal_lies_below_what_was_seen_or_the_least_and_taking_it_ends_it(seen, bound_mib, cpus, used) -> None:
    history, present = windows(*seen, cpus=used), envelope(bound_mib, cpus)
    found = right_size(history, present)
    if found is None or found.envelope.memory_bytes >= present.memory_bytes:
        return
    assert found.envelope.memory_bytes >= max(seen) * MIB * (1 + HEADROOM)
    assert found.envelope.memory_bytes >= LEAST_MEMORY_BYTES
    again = right_size(history, found.envelope)
    assert again is None or again.envelope.memory_bytes == found.envelope.memory_bytes


def test_exchangeable_use_passes_the_highest_seen_as_often_as_the_risk_says() -> None:
    draw, passed, tries = random.Random(7), 0, 4000
    for _ in range(tries):
        *seen, following = (draw.lognormvariate(5, 1) for _ in range(20))
        passed += following > max(seen)
    assert passed / tries == pytest.approx(1 / 20, abs=0.015)


# --- windows of samples ---


def sample(at_s: float, *, cpu_s: float = 0.0, mib: int = 10, peak_mib: int = 10) -> Usage:
    return Usage(at_s=at_s, cpu_s=cpu_s, memory_bytes=mib * MIB, peak_memory_bytes=peak_mib * MIB)


def test_samples_become_windows_with_the_highest_memory_and_the_mean_cores() -> None:
    history = UseHistory(2.0)
    done = [
        history.take(sample(0.0)),
        history.take(sample(1.0, cpu_s=0.5, mib=20, peak_mib=30)),
        history.take(sample(2.0, cpu_s=3.0, mib=10, peak_mib=30)),
        history.take(sample(4.0, cpu_s=3.0, mib=11, peak_mib=30)),
    ]
    assert done == [False, False, True, True]
    first, second = history.windows
    assert (first.peak_memory_bytes, first.cpus) == (30 * MIB, 1.5)
    assert (second.peak_memory_bytes, second.cpus) == (11 * MIB, 0.0), "an old peak is not this window's"


def test_a_new_attempt_begins_anew_and_an_old_sample_is_passed_over() -> None:
    history = UseHistory(1.0)
    for at_s in range(4):
        history.take(sample(at_s, cpu_s=at_s))
    assert len(history.windows) == 3
    assert not history.take(sample(2.0, cpu_s=0.0))
    assert len(history.windows) == 3
    history.take(sample(5.0, cpu_s=0.1))
    assert history.windows == ()


def test_only_so_many_windows_are_kept() -> None:
    history = UseHistory(1.0, max_windows=5)
    for at_s in range(50):
        history.take(sample(at_s, cpu_s=at_s))
    assert len(history.windows) == 5
