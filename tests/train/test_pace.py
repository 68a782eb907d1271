from __future__ import annotations

from tenure.train.pace import LEAVE_FILES, LEAVE_SHARE, WINDOW, Leaving, Pace


def test_nothing_is_expected_of_steps_that_were_never_seen() -> None:
    assert (Pace().next_s, Pace().longest_s) == (0.0, 0.0)


def test_the_fewer_steps_were_seen_the_more_the_next_one_may_exceed_them() -> None:
    pace = Pace()
    pace.note(2.0)
    assert pace.next_s == 3.0
    pace.note(1.0)
    assert pace.next_s == 2.5
    for _ in range(WINDOW - 2):
        pace.note(1.5)
    assert 2.0 < pace.next_s < 2.1


def test_a_slow_phase_that_is_over_is_forgotten() -> None:
    pace = Pace()
    for seconds in [9.0] + [1.0] * WINDOW:
        pace.note(seconds)
    assert pace.longest_s == 1.0


def test_others_steps_serve_until_there_are_own_ones() -> None:
    pace = Pace()
    pace.begin_with([3.0, 4.0])
    pace.begin_with([9.0])
    assert (pace.shortest_s, pace.longest_s) == (3.0, 4.0)


def test_leaving_takes_the_longer_the_slower_the_start_and_the_files_were() -> None:
    leaving = Leaving(3.2)
    assert leaving.next_s == 3.2 * LEAVE_SHARE
    leaving.files.note(0.02)
    leaving.files.note(0.01)
    assert leaving.next_s == 3.2 * LEAVE_SHARE + LEAVE_FILES * 0.02
