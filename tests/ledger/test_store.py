"""One contract over both databases: `ledger` and `ledger_address` run a test once on each. What only a file has is beside."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure import codec, wire
from tenure.errors import Conflict, CorruptData, InternalError, MissingExtra, NotFound, Refused, Unavailable
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState, changed, granted
from tenure.ledger import dialect, queries, schema
from tenure.ledger.address import Address
from tenure.ledger.dialect import LedgerHeld
from tenure.ledger.store import Ledger
from tenure.nodes import Machine
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.runs import Run, RunState, Stage
from tenure.trials import Trial
from tenure.usage import Usage, summarize


def now() -> float:
    return 1000.0


def lease(name: str = "a", **fields) -> Lease:
    return Lease(id=name, run_id="r1", stage="s", gang_id="g", envelope=Envelope(), command=Command(argv=("true",)), **fields)


def opened(address: Address) -> Ledger:
    return Ledger.open(address, now_s=now)


def test_migrated_tables_are_the_tables_that_queries_use(ledger: Ledger) -> None:
    with ledger.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_a_lease_is_written_together_with_the_event_that_tells_it(ledger: Ledger) -> None:
    with ledger.transaction() as tx:
        tx.put_lease(lease(), who="broker", why="asked", queue_until_s=1060.0)
    with ledger.reading() as connection:
        (event,) = queries.events_after(connection, 0, run_id="r1", max_events=10)
        assert queries.live_leases(connection) == ((lease(), 1060.0),)
    assert (event.seq, event.kind, event.who, event.why, event.at_s) == (1, "lease.requested", "broker", "asked", 1000.0)
    assert codec.from_builtins(event.data["lease"], Lease) == lease()


def test_nothing_is_written_when_a_transaction_raises(ledger: Ledger) -> None:
    with pytest.raises(NotFound), ledger.transaction() as tx:
        tx.put_run_state("none", tx.put_lease(lease(), who="broker") and RunState.DONE, who="broker")
    with ledger.reading() as connection:
        assert queries.live_leases(connection) == ()
        assert queries.events_after(connection, 0, run_id="", max_events=10) == ()


@pytest.mark.parametrize("change", ["UPDATE events SET why = 'else'", "DELETE FROM events"])
def test_an_event_can_be_neither_changed_nor_removed(ledger: Ledger, change: str) -> None:
    with ledger.transaction() as tx:
        tx.append("broker.started", who="broker")
    with pytest.raises(InternalError, match="append-only"), ledger.transaction() as tx:
        tx.connection.execute(sa.text(change))


def test_events_can_be_deleted_up_to_the_floor_and_no_further(ledger: Ledger) -> None:
    with ledger.transaction() as tx:
        seqs = [tx.append("broker.started", who="broker").seq for _ in range(4)]
        queries.raise_events_floor(tx.connection, seqs[1])
        queries.raise_events_floor(tx.connection, seqs[0])  # it never falls
        assert queries.events_floor(tx.connection) == seqs[1]
    with pytest.raises(InternalError, match="append-only"), ledger.transaction() as tx:
        tx.connection.execute(sa.delete(schema.events).where(schema.events.c.seq <= seqs[2]))
    with ledger.transaction() as tx:
        tx.connection.execute(sa.delete(schema.events).where(schema.events.c.seq <= seqs[1]))
    with pytest.raises(InternalError, match="append-only"), ledger.transaction() as tx:
        tx.connection.execute(sa.update(schema.events).values(why="else"))
    with ledger.transaction() as tx:
        tx.append("broker.started", who="broker")
        left = queries.events_after(tx.connection, 0, run_id="", max_events=10)
    assert [event.seq for event in left[:2]] == seqs[2:]
    assert left[2].seq > seqs[3]


def test_the_last_words_of_a_job_may_hold_anything(ledger: Ledger) -> None:
    said = "nul \0 tab \t quote ' euro € emoji \N{BUG}" + "x" * 10_000
    with ledger.transaction() as tx:
        tx.put_lease(lease(end_detail=said), who="w" * 500, why=said)
        (event,) = queries.events_after(tx.connection, 0, run_id="", max_events=10)
        assert queries.get_lease(tx.connection, "a").end_detail == said
    assert event.why == said.replace("\0", "\N{REPLACEMENT CHARACTER}")
    assert event.who == "w" * 500


def test_numbers_keep_all_their_digits(ledger: Ledger) -> None:
    with ledger.transaction() as tx:
        queries.raise_fence(tx.connection, 1 << 40)
        assert tx.next_fence() == (1 << 40) + 1
        wanted = lease(fence=1 << 40, requested_at_s=1_800_000_000.123457)
        tx.put_lease(wanted, who="broker", queue_until_s=1_800_000_060.123457)
        assert queries.live_leases(tx.connection) == ((wanted, 1_800_000_060.123457),)
        columns = sa.select(schema.leases.c.fence, schema.leases.c.requested_at_s)
        assert tx.connection.execute(columns).one() == (1 << 40, 1_800_000_000.123457)


def test_a_ledger_is_open_in_one_process_at_a_time(ledger_address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "BUSY_TIMEOUT_S", 0.05)
    ledger = Ledger.open(ledger_address, now_s=now, who="for /some/home")
    with pytest.raises(LedgerHeld, match=rf"pid {os.getpid()} on .* for /some/home.*one broker per ledger"):
        opened(ledger_address)
    ledger.close()
    opened(ledger_address).close()


def test_a_file_reached_by_another_link_is_the_same_ledger(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "l.sqlite", now_s=now)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "ledger.sqlite").symlink_to(tmp_path / "l.sqlite")
    with pytest.raises(LedgerHeld):
        Ledger.open(tmp_path / "home" / "ledger.sqlite", now_s=now)
    ledger.close()
    (tmp_path / "again.sqlite").hardlink_to(tmp_path / "l.sqlite")
    with pytest.raises(Conflict, match="more than one name"):
        Ledger.open(tmp_path / "again.sqlite", now_s=now)


def test_a_database_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r'pip install "tenure\[postgres\]"'):
        opened(Address.parse("postgresql://u@h/db"))


def test_fences_grow_across_openings(ledger_address: Address) -> None:
    seen = []
    for _ in range(3):
        ledger = opened(ledger_address)
        for _ in range(2):
            with ledger.transaction() as tx:
                seen.append(tx.next_fence())
        ledger.close()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(ledger_address: Address) -> None:
    ledger = opened(ledger_address)
    with ledger.transaction() as tx:
        tx.connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    ledger.close()
    with pytest.raises(Conflict, match=r"9999.*newer version"):
        opened(ledger_address)


def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database, but long enough to be read as one" * 100)
    before = path.read_bytes()
    with pytest.raises(CorruptData, match="left as it is"):
        Ledger.open(path, now_s=now)
    assert path.read_bytes() == before


def test_a_locked_file_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.sqlite"
    Ledger.open(path, now_s=now).close()
    monkeypatch.setattr(dialect, "BUSY_TIMEOUT_S", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked by another process"):
        Ledger.open(path, now_s=now)
    other.close()


def test_a_full_disk_is_refused_with_the_reason_and_nothing_is_lost(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "l.sqlite", now_s=now)
    with ledger.transaction() as tx:
        tx.append("broker.started", who="broker")
    with ledger.reading() as connection:
        pages = connection.execute(sa.text("PRAGMA page_count")).scalar()
        connection.execute(sa.text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(Refused, match="disk is full"), ledger.transaction() as tx:
        tx.append("broker.started", who="broker", why="x" * 1_000_000)
    with ledger.reading() as connection:
        assert len(queries.events_after(connection, 0, run_id="", max_events=10)) == 1
    ledger.close()


def events_of(address: Address) -> list[str]:
    """Return what another connection sees, which is what is on disk."""
    with dialect.reading_engine(address).connect() as connection:
        return [row[0] for row in connection.execute(sa.text("SELECT why FROM events ORDER BY seq"))]


def test_parts_go_to_disk_together_with_one_commit(ledger: Ledger, ledger_address: Address) -> None:
    before = ledger.commits
    for why in ("a", "b"):
        with ledger.part() as tx:
            tx.append("broker.started", who="broker", why=why)
    assert (ledger.uncommitted, events_of(ledger_address)) == (2, [])
    with ledger.reading() as connection:
        assert len(queries.events_after(connection, 0, run_id="", max_events=10)) == 2
    ledger.commit()
    assert (ledger.uncommitted, ledger.commits - before) == (0, 1)
    assert events_of(ledger_address) == ["a", "b"]


def test_a_part_that_raises_is_undone_alone(ledger: Ledger, ledger_address: Address) -> None:
    with ledger.part() as tx:
        tx.append("broker.started", who="broker", why="a")
    with pytest.raises(NotFound), ledger.part() as tx:
        tx.put_run_state("none", tx.append("broker.started", who="broker", why="b") and RunState.DONE, who="broker")
    ledger.commit()
    assert events_of(ledger_address) == ["a"]


def test_a_part_that_raises_alone_leaves_the_database_unlocked(ledger: Ledger, ledger_address: Address) -> None:
    with pytest.raises(NotFound), ledger.part() as tx:
        tx.put_run_state("none", tx.next_fence() and RunState.DONE, who="broker")
    with dialect.reading_engine(ledger_address).begin() as other:
        other.execute(sa.update(schema.meta).values(value="7"))


def test_when_the_database_refuses_a_part_the_earlier_ones_are_undone_and_it_is_told(
    ledger: Ledger, ledger_address: Address
) -> None:
    lost: list[str] = []
    ledger.on_lost = lambda error: lost.append(str(error))
    with ledger.part() as tx:
        tx.append("broker.started", who="broker", why="a")
    with pytest.raises(InternalError, match="append-only"), ledger.part() as tx:
        tx.connection.execute(sa.update(schema.events).values(why="else"))
    assert (len(lost), ledger.uncommitted, events_of(ledger_address)) == (1, 0, [])


def test_runs_keep_their_stages_in_order(ledger: Ledger) -> None:
    stages = tuple(Stage(name=name, kind="task") for name in ("prepare", "a"))
    run = Run(id="r1", name="n", tenant="default", job_file="", source="", stages=stages, created_at_s=5.0)
    with ledger.transaction() as tx:
        tx.put_run(run, who="tenant:default")
        tx.put_stage("r1", Stage(name="prepare", kind="task", state=RunState.DONE), who="tenant:default")
        tx.put_run_state("r1", RunState.RUNNING, who="tenant:default")
    with ledger.reading() as connection:
        kept = queries.get_run(connection, "r1")
    assert [(stage.name, stage.state) for stage in kept.stages] == [("prepare", "done"), ("a", "pending")]
    assert kept.state == "running"
    with pytest.raises(NotFound, match="r2"), ledger.transaction() as tx:
        tx.put_run_state("r2", RunState.DONE, who="tenant:default")


def test_an_attempts_exit_is_written_once(ledger: Ledger) -> None:
    end = Exit(kind=ExitKind.FAILED, code=3)
    with ledger.transaction() as tx:
        tx.put_lease(lease(attempt=4), who="broker")
        assert tx.put_exit(lease(attempt=4), 4, end, who="agent:local")
        assert not tx.put_exit(lease(attempt=4), 4, Exit(kind=ExitKind.COMPLETED), who="agent:local")
        assert queries.lease_exits(tx.connection, "a") == (end,)
        assert queries.last_attempt(tx.connection, "r1", "s", 0) == 4


def test_trials_are_kept_once_and_found_by_fingerprint(ledger: Ledger) -> None:
    trial = Trial(
        id="t1", run_id="r1", stage="s", fingerprint="f", source="probe", configuration={"workers": 2, "cpus": 0.5},
        metrics={"round_s": summarize([1.0, 2.0])}, machine=Machine(cpu_model="x"), curves={"accuracy": (0.1, 0.5)},
    )  # fmt: skip
    with ledger.transaction() as tx:
        assert queries.insert_trial(tx.connection, trial)
        assert not queries.insert_trial(tx.connection, trial)
        assert queries.list_trials(tx.connection, wire.ListTrials(fingerprint="f")) == (trial,)
        assert queries.list_trials(tx.connection, wire.ListTrials(fingerprint="g")) == ()


def test_usage_comes_back_oldest_first(ledger: Ledger) -> None:
    points = [wire.UsagePoint(lease_id="a", at_s=at, usage=Usage(at_s=at, cpu_s=at)) for at in (2.0, 1.0)]
    with ledger.transaction() as tx:
        queries.insert_usage(tx.connection, points)
        assert [point.at_s for point in queries.lease_usage(tx.connection, "a")] == [1.0, 2.0]


moves = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ask", "grant", "start", "end"]), st.booleans()), max_size=30)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=moves)
def test_live_leases_are_those_that_the_events_tell(new_ledger: Callable[[], Ledger], moves) -> None:
    """Whatever is written, kept or rolled back: folding the events gives the rows."""
    ledger = new_ledger()
    held: dict[str, Lease] = {}
    for number, move, fails in moves:
        name = f"l{number}"
        before = held.get(name)
        after = None
        if move == "ask" and before is None:
            after = lease(name)
        elif move == "grant" and before and before.state == "requested":
            after = granted(before, node="n", devices=(), fence=1, now_s=1.0)
        elif move == "start" and before and before.state == "granting":
            after = changed(before, LeaseState.ACTIVE)
        elif move == "end" and before and before.state != "ended":
            after = changed(before, LeaseState.ENDED, end_reason=EndReason.RELEASED, ended_at_s=9.0)
        if after is None:
            continue
        try:
            with ledger.transaction() as tx:
                tx.put_lease(after, who="broker")
                if fails:
                    raise KeyError(name)
        except KeyError:
            continue
        held[name] = after
    with ledger.reading() as connection:
        events = queries.events_after(connection, 0, run_id="", max_events=1000)
        rows = {kept.id: kept for kept, _ in queries.live_leases(connection)}
    ledger.close()
    folded = {event.lease_id: codec.from_builtins(event.data["lease"], Lease) for event in events}
    seqs = [event.seq for event in events]
    assert seqs == sorted(set(seqs))
    assert folded == held
    assert rows == {name: one for name, one in held.items() if one.state != "ended"}
