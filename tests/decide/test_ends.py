"""What a lease becomes when an attempt of it has ended."""

from dataclasses import replace

import pytest

from tenure.decide.ends import MAX_FAILURES, describe_exit, is_normal, reason_after
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.protocols import MACHINE_RESTARTED, Exit, ExitKind
from tenure.resources import Envelope
from tenure.usage import Usage

NOW_S = 1000.0
WORKS = Lease(
    id="l",
    run_id="r",
    stage="train",
    worker=0,
    gang_id="g",
    tenant="t",
    envelope=Envelope(slot_s=100.0, total_s=600.0),
    command=Command(argv=("work",), expects_result=True),
    state=LeaseState.ACTIVE,
    ends_at_s=1100.0,
    total_ends_at_s=1600.0,
)
INVOKED = replace(WORKS, command=Command(argv=("work",), on_event=True))


def ended(kind, **more):
    return Exit(kind=kind, **more)


def after(lease, end, *, failures=0, now_s=NOW_S):
    return reason_after(lease, end, failures=failures, now_s=now_s)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (ended(ExitKind.COMPLETED, result={"state": "done"}), EndReason.COMPLETED),
        (ended(ExitKind.COMPLETED), EndReason.FAILED),
        (ended(ExitKind.FAILED, code=3), EndReason.FAILED),
        (ended(ExitKind.OUT_OF_MEMORY), EndReason.OUT_OF_MEMORY),
        (ended(ExitKind.OUT_OF_DISK), EndReason.OUT_OF_DISK),
        (ended(ExitKind.OUT_OF_TIME), EndReason.EXPIRED),
        (ended(ExitKind.STOPPED), EndReason.NODE_LOST),
        (ended(ExitKind.STOPPED, witness=MACHINE_RESTARTED), EndReason.NODE_LOST),
    ],
    ids=str,
)
def test_a_lease_ends_for_the_reason_that_its_attempt_gives(end, reason):
    assert after(WORKS, end)[0] is reason


def test_a_slot_that_reaches_the_total_is_out_of_time_and_not_expired():
    assert after(replace(WORKS, ends_at_s=1600.0), ended(ExitKind.OUT_OF_TIME))[0] is EndReason.OUT_OF_TIME


def test_a_lease_on_its_way_out_keeps_the_reason_it_was_ended_for():
    leaving = replace(WORKS, state=LeaseState.DRAINING, end_reason=EndReason.RELEASED, end_detail="by its tenant")
    assert after(leaving, ended(ExitKind.OUT_OF_MEMORY)) == (EndReason.RELEASED, "by its tenant")


def test_a_lease_that_events_invoke_goes_on_until_it_says_done_fails_too_often_or_has_spent_its_total():
    goes_on, done = (ended(ExitKind.COMPLETED, result={"state": state}) for state in ("continue", "done"))
    crash = ended(ExitKind.FAILED, code=1)
    assert after(INVOKED, goes_on) == (None, "")
    assert after(INVOKED, done)[0] is EndReason.COMPLETED
    assert after(INVOKED, crash, failures=MAX_FAILURES - 1) == (None, "")
    assert after(INVOKED, crash, failures=MAX_FAILURES)[0] is EndReason.FAILED
    assert after(INVOKED, crash, failures=1, now_s=1600.0)[0] is EndReason.OUT_OF_TIME


def test_what_an_event_invokes_may_be_ended_and_still_have_done_its_work():
    said = ended(ExitKind.OUT_OF_TIME, result={"state": "continue"})
    assert is_normal(INVOKED, said)
    assert not is_normal(WORKS, said)


def test_an_end_is_told_with_its_witness_its_peak_and_its_last_words():
    usage = Usage(at_s=0.0, peak_memory_bytes=64 << 20)
    end = ended(ExitKind.FAILED, code=2, witness="wait status of pid 7: exit 2", usage=usage, log_tail="one\nno such file\n")
    assert describe_exit(end) == (
        "failed with code 2; wait status of pid 7: exit 2; peak memory 64.0 MiB; last words: no such file"
    )
