"""Schedules are laid down before the run: by rate and seed, or as they stand in a file."""

from __future__ import annotations

import numpy as np
import pytest

from tenure.errors import NotFound, SpecError
from tenure.serve.load import schedule


def test_constant_arrivals_come_at_equal_distances_below_the_end():
    assert schedule.constant(4.0, 1.0).tolist() == [0.0, 0.25, 0.5, 0.75]
    assert len(schedule.constant(3.0, 10.0)) == 30
    assert len(schedule.constant(0.5, 1.0)) == 1


def test_poisson_arrivals_are_the_seeds_own_and_have_the_rate_and_the_spread_of_independent_users():
    one, again, other = (schedule.poisson(1000.0, 20.0, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one[:100], other[:100])
    assert len(one) == pytest.approx(20_000, rel=0.03)
    gaps_s = np.diff(one)
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.05)  # an exponential's
    assert one[-1] < 20.0


@pytest.mark.parametrize("rate_and_length", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1e7, 1.0), (1e6, 60.0), (float("nan"), 1.0)])
def test_rates_without_sense_or_end_are_refused(rate_and_length):
    with pytest.raises(SpecError):
        schedule.poisson(*rate_and_length, seed=0)


def test_an_unknown_kind_of_arrivals_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match="poisson or constant"):
        schedule.drawn("bursty", 1.0, 1.0, 0)


def test_a_recorded_schedule_is_taken_as_it_is(tmp_path):
    text, binary = tmp_path / "due.txt", tmp_path / "due.npy"
    text.write_text("# seconds\n0.0\n0.5\n\n0.5  # two at once\n3\n")
    np.save(binary, np.array([0.0, 0.5, 0.5, 3.0]))
    assert schedule.recorded(text).tolist() == [0.0, 0.5, 0.5, 3.0]
    assert schedule.recorded(binary).tolist() == [0.0, 0.5, 0.5, 3.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one time"),
        ("# nothing\n", "at least one time"),
        ("1\n0.5\n", "never fall"),
        ("-1\n", "from 0 on"),
        ("inf\n", "finite"),
        ("0 1\n2 3\n", "one column"),
        ("soon\n", "one number of seconds per line"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused_in_words(tmp_path, content, message):
    path = tmp_path / "due.txt"
    path.write_text(content)
    with pytest.raises(SpecError, match=message):
        schedule.recorded(path)


def test_a_schedule_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"due\.txt"):
        schedule.recorded(tmp_path / "due.txt")
