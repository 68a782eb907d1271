"""What the ledger lets go of, on both databases."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from tenure import wire
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState, changed, granted
from tenure.ledger import queries, retention
from tenure.ledger.store import Ledger
from tenure.nodes import Machine
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.runs import Run, RunState
from tenure.trials import Trial
from tenure.usage import Usage, summarize

DAY_S = 86400.0


class Clock:
    """What the ledger takes for now."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.now_s = ledger, 1000.0
        ledger.now_s = lambda: self.now_s


@pytest.fixture
def clock(ledger: Ledger) -> Clock:
    return Clock(ledger)


def write(ledger: Ledger, name: str, *, at_s: float, live: bool = False, row: bool = True, clock: Clock) -> None:
    """Write a run with one lease, its exit, its usage and its trial."""
    clock.now_s = at_s
    lease = Lease(
        id=f"l-{name}", run_id=name, stage="s", envelope=Envelope(), command=Command(argv=("x",)), requested_at_s=at_s
    )
    with ledger.transaction() as tx:
        if row:
            state = RunState.RUNNING if live else RunState.DONE
            tx.put_run(Run(id=name, name="n", tenant="t", job_file="", source="", state=state, created_at_s=at_s), who="t")
        tx.put_lease(lease, who="t")
        lease = granted(lease, node="a", devices=(), fence=tx.next_fence(), now_s=at_s)
        tx.put_lease(lease, who="t")
        queries.insert_usage(tx.connection, [wire.UsagePoint(lease_id=lease.id, at_s=at_s, usage=Usage(at_s=at_s))])
        machine = Machine(cpu_model="x")
        queries.insert_trial(
            tx.connection,
            Trial(
                id=f"t-{name}", run_id=name, stage="s", fingerprint="f", source="probe", configuration={},
                metrics={"m": summarize([1.0])}, machine=machine, at_s=at_s,
            ),
        )  # fmt: skip
        if not live:
            tx.put_exit(lease, 0, Exit(kind=ExitKind.COMPLETED), who="a")
            tx.put_lease(changed(lease, LeaseState.ENDED, end_reason=EndReason.COMPLETED, ended_at_s=at_s), who="a")


def seqs(ledger: Ledger, run_id: str = "") -> list[int]:
    with ledger.reading() as connection:
        return [event.seq for event in queries.events_after(connection, 0, run_id=run_id, max_events=1000)]


def test_runs_are_known_with_their_age_newest_first_also_those_only_leases_tell_of(ledger: Ledger, clock: Clock) -> None:
    write(ledger, "old", at_s=1000.0, clock=clock)
    write(ledger, "bare", at_s=2000.0, row=False, clock=clock)
    write(ledger, "live", at_s=3000.0, live=True, clock=clock)
    clock.now_s = 5000.0
    with ledger.transaction() as tx:
        tx.put_run_state("old", RunState.DONE, who="t")
    with ledger.reading() as connection:
        found = retention.known_runs(connection)
    assert [(run.id, run.last_s, run.over, run.live) for run in found] == [
        ("live", 3000.0, False, True), ("bare", 2000.0, True, False), ("old", 5000.0, True, False),
    ]  # fmt: skip


def test_a_forgotten_run_leaves_its_trials_and_its_events_and_nothing_else(ledger: Ledger, clock: Clock) -> None:
    write(ledger, "one", at_s=1000.0, clock=clock)
    write(ledger, "two", at_s=1000.0, clock=clock)
    before = seqs(ledger, "one")
    with ledger.transaction() as tx:
        held = retention.run_rows(tx.connection, "one")
        assert retention.forget_run(tx.connection, "one") == held
    assert held.count == 4  # run, lease, exit, usage point
    with ledger.reading() as connection:
        assert [run.id for run in queries.list_runs(connection)] == ["two"]
        assert [lease.run_id for lease in queries.select_leases(connection, wire.ListLeases())] == ["two"]
        assert queries.lease_exits(connection, "l-one") == ()
        assert queries.lease_usage(connection, "l-one") == ()
        assert len(queries.list_trials(connection, wire.ListTrials())) == 2
    assert seqs(ledger, "one") == before


def test_old_events_go_in_small_steps_but_none_of_a_live_lease_or_of_a_run_that_goes_on(ledger: Ledger, clock: Clock) -> None:
    write(ledger, "old", at_s=1000.0, clock=clock)
    write(ledger, "live", at_s=1100.0, live=True, clock=clock)
    write(ledger, "kept", at_s=1200.0, clock=clock)
    write(ledger, "young", at_s=10 * DAY_S, clock=clock)
    kept = seqs(ledger, "live") + seqs(ledger, "kept") + seqs(ledger, "young")
    which = {"before_s": 5 * DAY_S, "keep_runs": ("kept", "live")}
    with ledger.reading() as connection:
        look = retention.old_events(connection, **which)
    counts = []
    while not counts or counts[-1]:
        with ledger.transaction() as tx:
            counts.append(retention.delete_old_events(tx.connection, **which, max_rows=2).count)
    assert counts == [2, 2, 1, 0]
    assert look.count == 5
    assert look.size_bytes > 0
    assert sorted(seqs(ledger)) == sorted(kept)


def test_events_above_the_floor_stay_append_only(ledger: Ledger, clock: Clock) -> None:
    write(ledger, "old", at_s=1000.0, clock=clock)
    write(ledger, "young", at_s=10 * DAY_S, clock=clock)
    with ledger.transaction() as tx:
        retention.delete_old_events(tx.connection, before_s=5 * DAY_S, keep_runs=(), max_rows=100)
    with pytest.raises(Exception, match="append-only") as caught, ledger.transaction() as tx:
        tx.connection.exec_driver_sql("DELETE FROM events")
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert seqs(ledger) == seqs(ledger, "young")


def test_usage_of_ended_leases_and_trials_go_by_age(ledger: Ledger, clock: Clock) -> None:
    for name, at_s, live in (("old", 1000.0, False), ("live", 1100.0, True), ("young", 10 * DAY_S, False)):
        write(ledger, name, at_s=at_s, live=live, clock=clock)
    with ledger.transaction() as tx:
        assert retention.delete_old_usage(tx.connection, before_s=5 * DAY_S, max_rows=100).count == 1
        assert retention.old_trials(tx.connection, before_s=5 * DAY_S).count == 2
        assert retention.delete_old_trials(tx.connection, before_s=5 * DAY_S, max_rows=1).count == 1
    with ledger.reading() as connection:
        assert [len(queries.lease_usage(connection, f"l-{name}")) for name in ("old", "live", "young")] == [0, 1, 1]
        assert [trial.run_id for trial in queries.list_trials(connection, wire.ListTrials())] == ["live", "young"]
