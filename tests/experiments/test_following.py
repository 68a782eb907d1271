"""What is told of a gang while it trains: the figures of one line, and each thing that happens once."""

from dataclasses import replace

import pytest

from tenure.experiments.following import QUIET_S, Following, show_time, told_end
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.prices import PriceVector
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.train.progress import TrainProgress
from tenure.usage import Usage
from tenure.wire import LeaseView

MIB = 1 << 20
ENVELOPE = Envelope(cpus=1.0, memory_bytes=96 * MIB, disk_bytes=8 * MIB)
PRICES = PriceVector(name="p", cpu_usd_per_hour=3600.0)


def lease(worker=0, **fields):
    known = {"state": LeaseState.ACTIVE, "starts_at_s": 100.0, **fields}
    return Lease(
        id=f"l-{worker}", run_id="r", stage="train", worker=worker, envelope=ENVELOPE, command=Command(argv=("x",)), **known
    )


def view(worker=0, *exits, processes=1, peak=61 * MIB, **fields):
    usage = Usage(at_s=1.0, peak_memory_bytes=peak, processes=processes)
    return LeaseView(lease=lease(worker, **fields), usage=usage, exits=tuple(exits))


def following(**options):
    return Following(envelope=ENVELOPE, prices=PRICES, **{"rounds": 100, **options})


def ended(kind, **fields):
    return Exit(kind=kind, **{"usage": Usage(at_s=1.0, peak_memory_bytes=95 * MIB), "witness": "the witness", **fields})


def trained(made, *looks):
    for now_s, rounds in looks:
        made.news(TrainProgress(round=rounds), [view()], now_s)
    return made


def test_the_line_has_rounds_loss_accuracy_workers_memory_time_and_cost():
    made = trained(following(), (100.0, 0), (110.0, 10), (120.0, 30))
    progress = TrainProgress(round=30, loss=0.4123, accuracy=0.912)
    assert made.line(progress, [view(), view(1, peak=70 * MIB)], 125.0) == (
        "round 30 of 100, loss 0.4123, accuracy 91.20%, 2 of 2 workers, peak 70.0 MiB of 96.0 MiB, 25 s, about 35 s left, "
        "$50.000000"
    )
    assert made.done(progress) == 0.3


def test_the_line_says_what_it_cannot_know():
    made = following(rounds_are="of at most")
    assert made.line(TrainProgress(), [view(processes=0, peak=0)], 101.0) == (
        "round 0 of at most 100, 0 of 1 workers, 1.0 s, $1.000000"
    )
    assert made.done(TrainProgress(round=3)) is None
    queued = view(starts_at_s=0.0, state=LeaseState.QUEUED)
    assert made.line(TrainProgress(), [queued], 101.0).startswith("waiting for room for 1 × [1 cpu, 96.0 MiB")


def test_a_lease_that_ended_costs_what_it_was_held():
    over = view(state=LeaseState.ENDED, ended_at_s=104.0, end_reason=EndReason.COMPLETED)
    assert following().line(TrainProgress(), [over, view(1)], 110.0).endswith("$14.000000")


def test_the_time_left_goes_by_the_last_half_minute():
    made = trained(following(), (0.0, 0), (1.0, 1), (2.0, 30), (50.0, 40), (80.0, 46))
    assert made.left_s(46) == pytest.approx((100 - 46) * 30 / 6)
    assert made.left_s(100) is None
    assert trained(following(), (0.0, 20), (5.0, 21)).left_s(21) is None


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (ended(ExitKind.SIGNALLED, signal=9), "worker 0 was killed by signal 9 (SIGKILL), which Tenure did not send"),
        (
            ended(ExitKind.OUT_OF_MEMORY),
            "worker 0 was out of memory: its bound is 96.0 MiB, its peak 95.0 MiB (the witness)",
        ),
        (ended(ExitKind.OUT_OF_TIME), "worker 0 was killed at the end of its slot (the witness)"),
        (ended(ExitKind.OUT_OF_DISK), "worker 0 wrote more than its bound of 8.0 MiB (the witness)"),
        (ended(ExitKind.STOPPED), "worker 0 was stopped (the witness)"),
        (ended(ExitKind.COMPLETED), "worker 0 ended with exit 0 but without the result.json that it owes"),
        (
            ended(ExitKind.FAILED, code=1, result={"state": "failed", "error": "ValueError: upside down"}),
            "worker 0 failed with code 1: ValueError: upside down",
        ),
        (ended(ExitKind.FAILED, code=73), "worker 0 could write nothing: the disk of the run's folder is full"),
        (ended(ExitKind.FAILED, witness="node a did not start it"), "worker 0 failed: node a did not start it"),
        (
            ended(ExitKind.FAILED, code=2, log_tail="Traceback\nKeyError: 'x'\n\n"),
            "worker 0 failed with code 2: KeyError: 'x'",
        ),
    ],
)
def test_a_death_is_told_once_with_its_cause_and_what_happens_next(end, told):
    made = following()
    seen = [view(0, end), view(1)]
    (sentence,) = made.news(TrainProgress(), seen, 1.0)
    assert sentence == f"{told}. What it had not published is computed again; it is started again."
    assert made.news(TrainProgress(), seen, 2.0) == []


def test_slots_that_end_well_and_ends_that_are_told_otherwise_are_no_news():
    went_on = ended(ExitKind.COMPLETED, result={"state": "continue"})
    late = ended(ExitKind.OUT_OF_TIME, result={"state": "continue"})
    killed = ended(ExitKind.SIGNALLED, signal=9)
    over = view(1, killed, state=LeaseState.ENDED, ended_at_s=9.0, end_reason=EndReason.FAILED)
    leaving = view(2, killed, state=LeaseState.DRAINING)
    assert following().news(TrainProgress(), [view(0, went_on, late), over, leaving], 1.0) == []


def test_each_torn_file_is_told_once():
    made = following()
    (sentence,) = made.news(TrainProgress(), [view()], 1.0, torn=["sums-7.0"])
    assert sentence.startswith("sums-7.0 in the store was not what was written")
    (sentence,) = made.news(TrainProgress(), [view()], 1.0, torn=["nodes-3.1", "sums-7.0"])
    assert sentence.startswith("nodes-3.1")


def test_what_is_new_in_a_resumed_run_is_told_once():
    made = following()
    assert made.news(TrainProgress(), [view()], 1.0) == []
    (sentence,) = made.news(TrainProgress(), [view()], 2.0, new="another program (p.py)")
    assert sentence.startswith("the run goes on with another program (p.py): its weights will not be")
    assert made.news(TrainProgress(), [view()], 3.0, new="another program (p.py)") == []


def test_a_gang_without_room_is_told_once_each_time_it_waits():
    made, queued = following(), view(state=LeaseState.QUEUED, starts_at_s=0.0)
    assert made.news(TrainProgress(), [queued], 1.0) == ["there is no room for the gang yet: it waits in the queue"]
    assert made.news(TrainProgress(), [queued], 2.0) == []


def test_silence_is_told_with_who_does_not_run_and_again_when_it_has_doubled():
    made = trained(following(), (0.0, 0), (1.0, 1))
    quiet = TrainProgress(round=1, round_s=(0.5,))
    seen = [view(), view(1, processes=0)]
    assert made.news(quiet, seen, QUIET_S) == []
    (sentence,) = made.news(quiet, seen, 1.0 + QUIET_S)
    assert sentence.startswith("no round has ended for 30 s (usual: 0.5 s); nothing runs for worker 1. ")
    assert made.news(quiet, seen, 55.0) == []
    (sentence,) = made.news(quiet, [view()], 61.0)
    assert "every worker runs" in sentence
    assert made.news(TrainProgress(round=2, round_s=(0.5, 40.0)), seen, 62.0) == []
    assert made.news(TrainProgress(round=2, round_s=(40.0, 40.0)), seen, 62.0 + QUIET_S) == []  # slow rounds are no silence


@pytest.mark.parametrize(
    ("reason", "end", "advice"),
    [
        (EndReason.OUT_OF_MEMORY, ended(ExitKind.OUT_OF_MEMORY), "may hold 96.0 MiB. Raise the envelope's memory"),
        (EndReason.OUT_OF_TIME, ended(ExitKind.OUT_OF_TIME), "Raise the envelope's total"),
        (EndReason.OUT_OF_DISK, ended(ExitKind.OUT_OF_DISK), "may write 8.0 MiB"),
        (EndReason.FAILED, ended(ExitKind.SIGNALLED, signal=9), "SIGKILL came from outside"),
        (EndReason.FAILED, ended(ExitKind.FAILED, log_tail="OSError: [Errno 28] No space left on device"), "Free space"),
        (EndReason.FAILED, ended(ExitKind.FAILED, log_tail="ValueError: no"), "ValueError: no"),
    ],
)
def test_a_failed_gang_names_the_first_to_end_why_and_what_to_do(reason, end, advice):
    first = view(1, end, state=LeaseState.ENDED, ended_at_s=5.0, end_reason=reason, end_detail="because")
    other = view(0, state=LeaseState.ENDED, ended_at_s=6.0, end_reason=EndReason.FAILED, end_detail="worker 1 of its gang")
    text, told = told_end("train", [other, first])
    assert text.startswith(f"stage train: worker 1 ended {reason}: because\n")
    assert advice in text
    assert told == reason
    done = replace(first, lease=replace(first.lease, end_reason=EndReason.COMPLETED))
    assert told_end("train", [done]) is None


def test_a_step_longer_than_its_slot_is_not_told_as_a_total_that_is_spent():
    over = {"state": LeaseState.ENDED, "ended_at_s": 5.0, "end_reason": EndReason.OUT_OF_TIME}
    text, _ = told_end("train", [view(0, ended(ExitKind.OUT_OF_TIME), end_detail="failed 3 times on the same event", **over)])
    assert "Its slot of 15 min 0 s is over before a step is done. Raise the envelope's slot" in text
    text, _ = told_end("train", [view(0, ended(ExitKind.OUT_OF_TIME), end_detail="its total of 1 s is spent", **over)])
    assert "Raise the envelope's total" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.7, "60 s"), (200.4, "3 min 20 s"), (7500, "2 h 5 min")])
def test_times_are_rounded_for_people(seconds, text):
    assert show_time(seconds) == text
