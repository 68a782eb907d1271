"""A backup holds all of a ledger, may be restored into either database, and tells when it is damaged."""

from __future__ import annotations

import gzip
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from tenure import wire
from tenure.errors import Conflict, CorruptData, NotFound, Refused
from tenure.jobs import Command
from tenure.leases import Lease, granted
from tenure.ledger import portable, queries, schema
from tenure.ledger.store import Ledger
from tenure.nodes import Machine, Node
from tenure.protocols import Exit, ExitKind
from tenure.resources import Capacity, Envelope
from tenure.runs import Run, Stage
from tenure.trials import Recommendation, Trial
from tenure.usage import Usage, summarize


def filled(ledger: Ledger) -> Ledger:
    """Put something of every kind into a ledger."""
    lease = Lease(id="l1", run_id="r1", stage="s", gang_id="g", envelope=Envelope(), command=Command(argv=("€", "\0", "\n")))
    trial = Trial(id="t1", run_id="r1", stage="s", fingerprint="f", source="probe", configuration={"cpus": 0.1},
                  metrics={"round_s": summarize([0.1, 1 / 3])}, machine=Machine(cpu_model="x"))  # fmt: skip
    with ledger.transaction() as tx:
        stages = (Stage(name="s", kind="task"),)
        tx.put_run(Run(id="r1", name="n", tenant="t", job_file="", source="", stages=stages, created_at_s=1 / 3), who="t")
        tx.put_lease(
            granted(lease, node="a", devices=(), fence=tx.next_fence(), now_s=1e9 / 7), who="broker", queue_until_s=1e10
        )
        tx.put_exit(lease, 1, Exit(kind=ExitKind.FAILED, code=3), who="agent:a", why="last words: \0 \t ü")
        made = queries.Invocation(name="e", worker=0, lease_id="l1", attempt=1, starts=1, failures=0, done=True)
        queries.put_invocation(tx.connection, "r1", "s", made, now_s=2.5)
        queries.insert_usage(tx.connection, [wire.UsagePoint(lease_id="l1", at_s=0.1 + 0.2, usage=Usage(at_s=1.0, cpu_s=2.0))])
        queries.insert_trial(tx.connection, trial)
        queries.insert_recommendation(
            tx.connection, Recommendation(id="c1", run_id="r1", stage="s", at_s=1.0, goal="g", chosen=None)
        )
        node = Node(name="a", capacity=Capacity(cpus=1.0, memory_bytes=1 << 40), machine=Machine(cpu_model="x"))
        tx.put_node(node, kind="node.up", who="agent:a")
        queries.raise_events_floor(tx.connection, 1)
        tx.connection.execute(sa.delete(schema.events).where(schema.events.c.seq <= 1))
    return ledger


def contents(ledger: Ledger) -> dict[str, list[tuple]]:
    with ledger.reading() as connection:
        tables = schema.metadata.tables.items()
        return {name: sorted(map(tuple, connection.execute(sa.select(table)))) for name, table in tables}


def lines(file: Path) -> list[bytes]:
    return gzip.decompress(file.read_bytes()).splitlines(keepends=True)


def rewritten(file: Path, unpacked: bytes) -> None:
    file.write_bytes(gzip.compress(unpacked))


@pytest.fixture
def backup(new_ledger: Callable[[], Ledger], tmp_path: Path) -> Path:
    ledger = filled(new_ledger())
    portable.write_backup(ledger.address, tmp_path / "b", now_s=5.0)
    ledger.close()
    return tmp_path / "b"


def load(file: Path, ledger: Ledger) -> None:
    with ledger.transaction() as tx:
        portable.load(file, tx.connection)


def test_what_a_backup_holds_is_what_the_ledger_held_in_either_database(
    new_ledger: Callable[[], Ledger], other_ledger: Callable[[], Ledger], tmp_path: Path
) -> None:
    for make in (new_ledger, other_ledger):
        ledger, copy = filled(new_ledger()), make()
        before = contents(ledger)
        assert all(before.values()), {name: len(rows) for name, rows in before.items()}
        made = portable.write_backup(ledger.address, tmp_path / "b", now_s=5.0, force=True)
        assert portable.verify(tmp_path / "b") == made
        assert made.rows == {name: len(rows) for name, rows in before.items()}
        load(tmp_path / "b", copy)
        assert contents(copy) == before
        portable.write_backup(copy.address, tmp_path / "again", now_s=5.0, force=True)
        assert lines(tmp_path / "again") == lines(tmp_path / "b")
        ledger.close()
        copy.close()


def test_a_restored_ledger_goes_on_numbering_above_all_it_held(
    new_ledger: Callable[[], Ledger], backup: Path, tmp_path: Path
) -> None:
    ledger = new_ledger()
    load(backup, ledger)
    before = contents(ledger)
    with ledger.transaction() as tx:
        assert tx.append("broker.started", who="broker").seq > max(row[0] for row in before["events"])
        queries.insert_usage(tx.connection, [wire.UsagePoint(lease_id="l1", at_s=9.0, usage=Usage(at_s=9.0))])
        queries.insert_recommendation(
            tx.connection, Recommendation(id="c2", run_id="r1", stage="s", at_s=1.0, goal="g", chosen=None)
        )
    assert len(contents(ledger)["usage_points"]) == 2
    ledger.close()


def test_numbers_of_deleted_events_do_not_come_again(new_ledger: Callable[[], Ledger], tmp_path: Path) -> None:
    ledger, copy = new_ledger(), new_ledger()
    with ledger.transaction() as tx:
        last = [tx.append("broker.started", who="broker").seq for _ in range(5)][-1]
        queries.raise_events_floor(tx.connection, last)
        tx.connection.execute(sa.delete(schema.events))
    portable.write_backup(ledger.address, tmp_path / "b", now_s=5.0)
    load(tmp_path / "b", copy)
    with copy.transaction() as tx:
        assert tx.append("broker.started", who="broker").seq == last + 1
    ledger.close()
    copy.close()


def test_a_backup_holds_one_moment_while_others_write(new_ledger: Callable[[], Ledger], tmp_path: Path) -> None:
    ledger = filled(new_ledger())
    held = portable.write_backup(ledger.address, tmp_path / "b", now_s=5.0)
    with ledger.part() as tx:  # not committed: it is nobody's business yet
        tx.append("broker.started", who="broker")
        assert portable.write_backup(ledger.address, tmp_path / "c", now_s=5.0) == wire.Backup(
            path=str(tmp_path / "c"), schema=held.schema, made_at_s=5.0, rows=held.rows, sha256=held.sha256
        )
    ledger.commit()
    assert portable.write_backup(ledger.address, tmp_path / "d", now_s=5.0).rows["events"] == held.rows["events"] + 1
    ledger.close()


def test_a_backup_is_its_owners_and_replaces_nothing_unasked(new_ledger: Callable[[], Ledger], tmp_path: Path) -> None:
    ledger = filled(new_ledger())
    file = tmp_path / "b"
    portable.write_backup(ledger.address, file, now_s=5.0)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    with pytest.raises(Conflict, match="left as it is"):
        portable.write_backup(ledger.address, file, now_s=6.0)
    assert file.read_bytes() == before
    portable.write_backup(ledger.address, file, now_s=6.0, force=True)
    with pytest.raises(NotFound, match="does not exist"):
        portable.write_backup(ledger.address, tmp_path / "none" / "b", now_s=6.0)
    assert [path.name for path in tmp_path.iterdir() if "draft" in path.name] == []
    ledger.close()


@pytest.mark.parametrize("new_ledger", ["sqlite"], indirect=True)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_backup_cut_short_is_refused(backup: Path, share: float) -> None:
    whole = backup.read_bytes()
    backup.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorruptData, match="backup"):
        portable.verify(backup)


@pytest.mark.parametrize("new_ledger", ["sqlite"], indirect=True)
def test_every_flipped_byte_of_a_backup_is_noticed(backup: Path) -> None:
    whole = backup.read_bytes()
    held = portable.verify(backup)
    for place in range(0, len(whole), 37):
        backup.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert portable.verify(backup) == held, place  # a flag of gzip's header that changes nothing
            assert place < 10, place
        except (CorruptData, Conflict):
            pass


@pytest.mark.parametrize("new_ledger", ["sqlite"], indirect=True)
def test_a_backup_that_was_changed_by_hand_is_refused(backup: Path) -> None:
    whole = lines(backup)
    rewritten(backup, b"".join(whole).replace(b'"agent:a"', b'"agent:b"'))
    with pytest.raises(CorruptData, match="sum"):
        portable.verify(backup)
    rewritten(backup, b"".join(whole[:-2] + whole[-1:]))
    with pytest.raises(CorruptData):
        portable.verify(backup)
    rewritten(backup, b"".join([*whole, b"{}\n"]))
    with pytest.raises(CorruptData, match="after its end"):
        portable.verify(backup)


@pytest.mark.parametrize("new_ledger", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("field", "value"), [("schema", "9999"), ("tenure_backup", 2)])
def test_a_newer_backup_is_refused_with_the_reason(backup: Path, field: str, value: object) -> None:
    head, *rest = lines(backup)
    rewritten(backup, resummed([json.dumps(json.loads(head) | {field: value}).encode() + b"\n", *rest]))
    with pytest.raises(Conflict, match=r"newer"):
        portable.verify(backup)


def resummed(unpacked: list[bytes]) -> bytes:
    import hashlib

    *body, end = unpacked
    sha256 = hashlib.sha256(b"".join(body)).hexdigest()
    return b"".join([*body, json.dumps(json.loads(end) | {"sha256": sha256}).encode() + b"\n"])


def test_other_files_are_no_backups(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"SQLite format 3\0" * 100)
    with pytest.raises(CorruptData, match="no backup"):
        portable.verify(tmp_path / "b")
    with pytest.raises(NotFound):
        portable.verify(tmp_path / "none")
    with pytest.raises(Refused, match="cannot be read"):
        portable.verify(tmp_path)
