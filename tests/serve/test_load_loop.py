"""The generator's loop keeps to its schedule whatever the server does, and says so when it could not."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from tests.serve.load_fakes import Virtual, run_open, virtual_loop

from tenure.serve.load import schedule
from tenure.serve.load.records import Outcome

SOON_S = 30e-6
"""Below it the loop does not go to sleep, so issues may be so early in a wait as late."""


def quick(index, now_s):
    return now_s + 0.001


def test_every_request_is_issued_when_it_is_due_and_none_before():
    due_s = schedule.poisson(500.0, 4.0, seed=3)
    _, record = run_open(Virtual(quick), due_s)
    assert (record.outcome == Outcome.OK).all()
    assert (record.issued_s >= due_s).all()
    assert record.issue_delay_s.max() < SOON_S
    assert record.latency_s(10.0) == pytest.approx(np.full(len(due_s), 0.001), abs=2 * SOON_S)


def frozen(index, now_s):
    """A server that stands still for the first second of every four, then answers what waits at once."""
    return now_s + 0.001 if now_s % 4 >= 1 else math.floor(now_s / 4) * 4 + 1.001


def test_a_frozen_server_is_seen_in_every_percentile_since_latency_counts_from_the_due_time():
    due_s = schedule.constant(100.0, 8.0)
    _, record = run_open(Virtual(frozen), due_s)
    truth_s = np.array([frozen(0, at_s) - at_s for at_s in due_s])
    assert record.latency_s(10.0) == pytest.approx(truth_s, abs=2 * SOON_S)
    assert np.percentile(record.latency_s(10.0), 99) > 0.95


def test_the_same_freeze_is_told_by_a_closed_loop_of_one_client_only_once_per_freeze():
    loop, columns = virtual_loop(Virtual(frozen), 20_000)
    loop.run_closed(1, 8.0)
    record = columns.record(loop.count)
    assert np.count_nonzero(record.latency_s(10.0) > 0.5) == 2  # why closed and open loads never share a column


def test_a_generator_that_was_held_up_issues_all_it_owes_and_tells_the_delay():
    due_s = schedule.constant(100.0, 2.0)
    _, record = run_open(Virtual(quick, stalls=[(0.503, 0.3)]), due_s)
    assert (record.outcome == Outcome.OK).all()
    late = record.issue_delay_s > 0.001
    assert np.flatnonzero(late).tolist() == list(range(51, 81))
    assert record.issue_delay_s.max() == pytest.approx(0.29, abs=0.011)
    assert record.latency_s(10.0)[51] == pytest.approx(0.29 + 0.001, abs=0.011)


def test_a_request_past_its_timeout_is_given_up_and_counts_as_the_timeout():
    wire = Virtual(lambda index, now_s: now_s + (5.0 if index == 3 else 0.001))
    _, record = run_open(wire, schedule.constant(10.0, 1.0), timeout_s=2.0)
    assert record.outcome[3] == Outcome.TIMED_OUT
    assert wire.given_up == [3]
    assert record.latency_s(2.0)[3] == pytest.approx(2.0, abs=SOON_S)
    assert record.count(Outcome.OK) == 9


def test_what_the_generator_may_not_send_waits_in_order_and_the_wait_is_told():
    wire = Virtual(lambda index, now_s: now_s + 0.1)
    loop, record = run_open(wire, schedule.constant(20.0, 1.0), max_in_flight=1, timeout_s=30.0)
    assert wire.sent == list(range(20))
    assert (record.outcome == Outcome.OK).all()
    assert record.issue_delay_s[19] == pytest.approx(19 * 0.05, abs=0.001)
    assert loop.full_s == pytest.approx(1.85, abs=0.01)  # from the second request being due to the last one being sent
    assert loop.peak_in_flight == 1


def test_what_is_due_and_never_sent_is_dropped_not_forgotten():
    wire = Virtual(lambda index, now_s: None)
    loop, record = run_open(wire, np.full(10, 0.1), max_in_flight=2, timeout_s=0.5)
    assert record.count(Outcome.TIMED_OUT) == 2
    assert record.count(Outcome.DROPPED) == 8
    assert np.isnan(record.issued_s[record.outcome == Outcome.DROPPED]).all()
    assert (record.latency_s(0.5) >= 0.5 - 1e-9).all()
    assert loop.full_s == pytest.approx(0.5, abs=0.001)


def test_a_burst_that_is_due_at_one_moment_is_sent_at_that_moment():
    _, record = run_open(Virtual(quick), np.full(200, 0.25))
    assert record.issue_delay_s.max() < 0.001
    assert (record.outcome == Outcome.OK).all()


def test_failures_are_counted_with_their_reasons_and_few_reasons_are_kept():
    wire = Virtual(quick)
    wire.failing = lambda index: f"reason {index}" if index % 2 else ""
    loop, record = run_open(wire, schedule.constant(100.0, 2.0))
    assert record.count(Outcome.FAILED) == 100
    assert sum(loop.reasons.values()) == 100
    assert len(loop.reasons) == 33
    assert loop.reasons["other reasons"] == 68


def test_closed_loop_clients_ask_again_when_their_answer_has_come_until_the_time_is_over():
    wire = Virtual(lambda index, now_s: now_s + 0.01)
    loop, columns = virtual_loop(wire, 10_000)
    loop.run_closed(4, 1.0)
    record = columns.record(loop.count)
    assert 396 <= len(record) <= 404
    assert loop.peak_in_flight == 4
    assert (np.diff(record.due_s) >= 0).all()
    assert record.due_s[4:8] == pytest.approx(record.ended_s[:4])
    assert record.due_s.max() < 1.0
    assert loop.stopped == ""


def test_a_closed_loop_ends_when_nothing_but_failures_comes_back():
    wire = Virtual(quick)
    wire.failing = lambda index: "nobody there"
    loop, columns = virtual_loop(wire, 10_000)
    loop.run_closed(2, 60.0)
    assert "1000 requests in a row failed" in loop.stopped
    assert columns.record(loop.count).count(Outcome.FAILED) < 1_010


def test_a_closed_loop_ends_when_its_record_is_full():
    loop, columns = virtual_loop(Virtual(quick), 50)
    loop.run_closed(2, 60.0)
    assert "as many as one run keeps" in loop.stopped
    assert len(columns.record(loop.count)) == 50


def test_a_run_that_is_interrupted_keeps_what_had_ended_before_the_first_request_that_had_not():
    wire = Virtual(lambda index, now_s: now_s + (5.0 if index == 30 else 0.001))
    wait = wire.wait

    def wait_until_interrupted(*arguments):
        if wire.now_s > 0.5:
            raise KeyboardInterrupt
        wait(*arguments)

    wire.wait = wait_until_interrupted
    loop, columns = virtual_loop(wire, 100)
    columns.begin(100)
    np.asarray(columns.due)[:] = schedule.constant(100.0, 1.0)
    loop.run_open(100)
    record = columns.record(loop.count)
    assert re.fullmatch(r"it was interrupted; requests under way: [12], the oldest for 0\.2\d* s", loop.stopped)
    assert len(record) == 30  # later ones had ended too, but only the quick ones
    assert (record.outcome == Outcome.OK).all()


def test_what_the_generator_says_of_itself_leaves_the_warm_up_out():
    wire = Virtual(lambda index, now_s: now_s + (0.2 if now_s < 1.0 else 0.001))
    loop, _ = run_open(wire, schedule.constant(10.0, 2.0), max_in_flight=1, measured_from_s=1.5)
    assert loop.full_s == 0.0
    assert loop.wall_s == pytest.approx(0.4, abs=0.001)
