from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenure import wire
from tenure.errors import Conflict, CorruptData, InternalError, NotFound, Refused, Unavailable
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState, changed, granted
from tenure.ledger import dialect, queries, schema
from tenure.ledger.store import Ledger
from tenure.nodes import Machine
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.runs import Run, RunState, Stage
from tenure.trials import Trial
from tenure.usage import Usage, summarize


def now() -> float:
    return 1000.0


@pytest.fixture
def ledger(tmp_path: Path):
    made = Ledger.open(tmp_path / "ledger.sqlite", now_s=now)
    yield made
    made.close()


def lease(name: str = "a", **fields) -> Lease:
    return Lease(id=name, run_id="r1", stage="s", gang_id="g", envelope=Envelope(), command=Command(argv=("true",)), **fields)


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
    assert wire.from_builtins(event.data["lease"], Lease) == lease()


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


def test_fences_grow_across_openings(tmp_path: Path) -> None:
    seen = []
    for _ in range(3):
        ledger = Ledger.open(tmp_path / "l.sqlite", now_s=now)
        for _ in range(2):
            with ledger.transaction() as tx:
                seen.append(tx.next_fence())
        ledger.close()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    Ledger.open(path, now_s=now).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(Conflict, match=r"9999.*newer version"):
        Ledger.open(path, now_s=now)


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


def test_a_full_disk_is_refused_with_the_reason_and_nothing_is_lost(ledger: Ledger) -> None:
    with ledger.transaction() as tx:
        tx.append("broker.started", who="broker")
    with ledger.reading() as connection:
        pages = connection.execute(sa.text("PRAGMA page_count")).scalar()
        connection.execute(sa.text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(Refused, match="disk is full"), ledger.transaction() as tx:
        tx.append("broker.started", who="broker", why="x" * 1_000_000)
    with ledger.reading() as connection:
        assert len(queries.events_after(connection, 0, run_id="", max_events=10)) == 1


def events_of(path: Path) -> list[str]:
    """Return what another connection sees, which is what is on disk."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT why FROM events ORDER BY seq")]


def test_parts_go_to_disk_together_with_one_commit(ledger: Ledger, tmp_path: Path) -> None:
    before = ledger.commits
    for why in ("a", "b"):
        with ledger.part() as tx:
            tx.append("broker.started", who="broker", why=why)
    assert (ledger.uncommitted, events_of(tmp_path / "ledger.sqlite")) == (2, [])
    with ledger.reading() as connection:
        assert len(queries.events_after(connection, 0, run_id="", max_events=10)) == 2
    ledger.commit()
    assert (ledger.uncommitted, ledger.commits - before) == (0, 1)
    assert events_of(tmp_path / "ledger.sqlite") == ["a", "b"]


def test_a_part_that_raises_is_undone_alone(ledger: Ledger, tmp_path: Path) -> None:
    with ledger.part() as tx:
        tx.append("broker.started", who="broker", why="a")
    with pytest.raises(NotFound), ledger.part() as tx:
        tx.put_run_state("none", tx.append("broker.started", who="broker", why="b") and RunState.DONE, who="broker")
    ledger.commit()
    assert events_of(tmp_path / "ledger.sqlite") == ["a"]


def test_a_part_that_raises_alone_leaves_the_database_unlocked(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(NotFound), ledger.part() as tx:
        tx.put_run_state("none", RunState.DONE, who="broker")
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite", timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")


def test_when_the_database_refuses_a_part_the_earlier_ones_are_undone_and_it_is_told(ledger: Ledger, tmp_path: Path) -> None:
    lost: list[str] = []
    ledger.on_lost = lambda error: lost.append(str(error))
    with ledger.reading() as connection:
        connection.execute(sa.text("PRAGMA max_page_count = 1"))
    with ledger.part() as tx:
        tx.append("broker.started", who="broker", why="a")
    with pytest.raises(Refused, match="disk is full"), ledger.part() as tx:
        tx.append("broker.started", who="broker", why="x" * 1_000_000)
    assert (len(lost), ledger.uncommitted, events_of(tmp_path / "ledger.sqlite")) == (1, 0, [])


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
def test_live_leases_are_those_that_the_events_tell(tmp_path_factory: pytest.TempPathFactory, moves) -> None:
    """Whatever is written, kept or rolled back: folding the events gives the rows."""
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger") / "l.sqlite", now_s=now)
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
    folded = {event.lease_id: wire.from_builtins(event.data["lease"], Lease) for event in events}
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert folded == held
    assert rows == {name: one for name, one in held.items() if one.state != "ended"}
