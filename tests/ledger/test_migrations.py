"""Ledgers of every released schema come forward whole, or stay what they were."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from tests.released import RELEASED, released

from tenure.ledger import dialect, migrate, portable, queries, schema
from tenure.ledger.address import Address
from tenure.ledger.store import Ledger

HEAD = migrate.head()


def now() -> float:
    return 2_000_000.0


def dumped(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return sorted(connection.iterdump())


def rows(ledger: Ledger) -> dict[str, list[tuple]]:
    with ledger.reading() as connection:
        return {
            name: sorted(map(tuple, connection.execute(sa.select(table)))) for name, table in schema.metadata.tables.items()
        }


def rows_of_file(path: Path) -> dict[str, list[tuple]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {name: sorted(connection.execute(f"SELECT * FROM {name}")) for (name,) in found}


def revision(ledger: Ledger) -> str:
    with ledger.reading() as connection:
        return migrate.revision_of(connection)


def test_there_is_a_dump_of_every_released_schema() -> None:
    assert [dump.stem for dump in RELEASED] == ["0001"]


@pytest.mark.parametrize("dump", RELEASED, ids=lambda dump: dump.stem)
def test_a_released_file_comes_forward_with_all_its_rows(dump: Path, tmp_path: Path) -> None:
    path = released(dump, tmp_path / "old.sqlite")
    before = rows_of_file(path)
    ledger, fresh = Ledger.open(path, now_s=now), Ledger.open(tmp_path / "new.sqlite", now_s=now)
    assert revision(ledger) == revision(fresh) == HEAD
    after = rows(ledger)
    assert after == {name: before[name] for name in after}
    with ledger.reading() as old, fresh.reading() as new:
        query = sa.text("SELECT type, name, sql FROM sqlite_master ORDER BY name")
        assert old.execute(query).all() == new.execute(query).all()
        assert len(queries.live_leases(old)) == 4
    ledger.close()
    fresh.close()


@pytest.mark.postgres
@pytest.mark.parametrize("dump", RELEASED, ids=lambda dump: dump.stem)
@pytest.mark.parametrize("new_ledger", ["postgresql"], indirect=True)
def test_a_released_file_moves_to_postgresql_and_comes_forward_there(
    dump: Path, tmp_path: Path, new_ledger: Callable[[], Ledger]
) -> None:
    path = released(dump, tmp_path / "old.sqlite")
    portable.write_backup(Address(path=path), tmp_path / "b", now_s=1.0)
    ledger = new_ledger()
    with ledger.transaction() as tx:  # the fixture's is at the head; what is tested starts from nothing
        dialect.set_aside(tx.connection, [*schema.metadata.tables, "alembic_version"], f"aside_{dump.stem}")
        migrate.bring_forward(tx.connection, "it", to=dump.stem)
        assert migrate.revision_of(tx.connection) == dump.stem
        portable.load(tmp_path / "b", tx.connection)
        migrate.bring_forward(tx.connection, "it")
        assert compare_metadata(MigrationContext.configure(tx.connection), schema.metadata) == []
    assert revision(ledger) == HEAD
    before, after = rows_of_file(path), rows(ledger)
    assert after == {name: before[name] for name in after}
    ledger.close()


FAILS = f"""
from alembic import op
import sqlalchemy as sa
revision, down_revision, branch_labels, depends_on = "fails", "{HEAD}", None, None
def upgrade():
    op.create_table("halfway", sa.Column("key", sa.Integer, primary_key=True))
    op.execute("UPDATE meta SET value = 'spoilt'")
    raise KeyError("midway")
"""


def with_a_step_that_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.copytree(migrate.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "fails.py").write_text(FAILS)
    monkeypatch.setattr(migrate, "MIGRATIONS", folder)


@pytest.mark.parametrize("dump", RELEASED, ids=lambda dump: dump.stem)
def test_a_step_that_fails_leaves_the_released_file_as_it_was(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = released(dump, tmp_path / "old.sqlite")
    before = dumped(path)
    with monkeypatch.context() as patch:
        with_a_step_that_fails(patch, tmp_path / "steps")
        with pytest.raises(KeyError, match="midway"):
            Ledger.open(path, now_s=now)
    assert dumped(path) == before
    ledger = Ledger.open(path, now_s=now)
    assert revision(ledger) == HEAD
    ledger.close()


def test_a_step_that_fails_leaves_either_database_as_it_was(
    new_ledger: Callable[[], Ledger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = new_ledger()
    with ledger.transaction() as tx:
        tx.next_fence()
        tx.append("broker.started", who="broker")
    before = rows(ledger)
    ledger.close()
    with monkeypatch.context() as patch:
        with_a_step_that_fails(patch, tmp_path / "steps")
        with pytest.raises(KeyError, match="midway"):
            Ledger.open(ledger.address, now_s=now)
    ledger = Ledger.open(ledger.address, now_s=now)
    assert rows(ledger) == before
    with ledger.reading() as connection:
        assert not sa.inspect(connection).has_table("halfway")
    ledger.close()
