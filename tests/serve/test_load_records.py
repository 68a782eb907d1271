"""The record of a run: nothing is left out of a latency, and columns that don't fit together are refused."""

from __future__ import annotations

import numpy as np
import pytest

from tenure.errors import SpecError
from tenure.serve.load.records import Outcome, OwnUse, Record

NAN = float("nan")


def record() -> Record:
    return Record(
        np.array([0.0, 1.0, 2.0, 3.0, 4.0]),
        np.array([0.0, 1.5, 2.0, 3.0, NAN]),
        np.array([0.2, 1.7, 2.01, NAN, NAN]),
        np.array([Outcome.OK, Outcome.OK, Outcome.FAILED, Outcome.TIMED_OUT, Outcome.DROPPED]),
    )


def test_latency_counts_from_the_due_time_and_no_bad_request_looks_quick():
    found = record()
    assert found.latency_s(2.0) == pytest.approx([0.2, 0.7, 2.0, 2.0, 2.0])
    assert found.service_s[:3] == pytest.approx([0.2, 0.2, 0.01])
    assert found.issue_delay_s[:4] == pytest.approx([0.0, 0.5, 0.0, 0.0])
    assert np.isnan(found.issue_delay_s[4])
    assert [found.count(outcome) for outcome in Outcome] == [2, 0, 1, 1, 1]


def test_a_failure_slower_than_the_timeout_keeps_its_own_latency():
    slow = Record([0.0], [0.0], [9.0], [Outcome.FAILED])
    assert slow.latency_s(2.0) == pytest.approx([9.0])


def test_the_warm_up_is_cut_from_all_columns():
    kept = record().where(record().due_s >= 1.0)
    assert len(kept) == 4
    assert kept.outcome[0] == Outcome.OK


def test_an_empty_record_is_a_record():
    assert len(Record([], [], [], [])) == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0.0, 1.0], [0.0], [0.0], [0]), "one length"),
        (([NAN], [0.0], [0.0], [0]), "due_s must be finite"),
        (([1.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0, 0]), "must not fall; it does after request 0"),
        (([0.0], [0.0], [1.0], [9]), "outcome is 0 to 4; request 0 has 9"),
        (([0.0], [0.0], [1.0], [-1]), "whole numbers"),
        (([0.0], [0.0], [1.0], [0.5]), "whole numbers"),
        (([0.0], [0.0], [NAN], [0]), "issued_s <= ended_s"),
        (([0.0], [2.0], [1.0], [1]), "issued_s <= ended_s"),
        ((["a"], [0.0], [1.0], [0]), "column of numbers"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    with pytest.raises(SpecError, match=message):
        Record(*columns)


def test_own_use_tells_the_share_of_its_cores_and_refuses_nonsense():
    assert OwnUse(wall_s=10.0, cpu_s=8.0, cores=2.0).cpu_share == pytest.approx(0.4)
    with pytest.raises(SpecError, match="wall_s"):
        OwnUse(wall_s=0.0, cpu_s=0.0)
    with pytest.raises(SpecError, match="full_s"):
        OwnUse(wall_s=1.0, cpu_s=0.0, full_s=-1.0)
