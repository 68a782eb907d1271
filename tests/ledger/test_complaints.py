"""What PostgreSQL complains of becomes an error that says what to do; a real server says it where that is cheap."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError
from tests.postgres import Server

from tenure.errors import CorruptData, InternalError, Refused, SpecError, TenureError, Unavailable
from tenure.ledger import dialect
from tenure.ledger.address import Address
from tenure.ledger.store import Ledger

psycopg = pytest.importorskip("psycopg", reason='no psycopg here (pip install "tenure[postgres]")')


def now() -> float:
    return 1000.0


@pytest.mark.parametrize(
    ("state", "kind", "said"),
    [
        ("53100", Refused, "disk is full.*nothing was changed"),
        ("55P03", Unavailable, "locked or too slow.*Try again"),
        ("57014", Unavailable, "locked or too slow"),
        ("XX001", CorruptData, "left as it is: restore a backup"),
        ("XX002", CorruptData, "restore a backup"),
        ("42501", Unavailable, "right to make and write tables"),
        ("28P01", Unavailable, "pgpass"),
        ("3D000", Unavailable, "createdb"),
        ("53300", Unavailable, "does not answer"),
        ("57P01", Unavailable, "does not answer"),
        ("25006", Unavailable, "does not answer"),
        ("22021", SpecError, "cannot hold a value"),
        ("42601", InternalError, "refused a query"),
    ],
)
def test_each_kind_of_complaint_says_what_to_do(state: str, kind: type[TenureError], said: str) -> None:
    cause = psycopg.errors.lookup(state)("the server's\n  own words")
    error = dialect.explained(DBAPIError("SELECT", {}, cause), "postgresql://u@h/db")
    assert type(error) is kind
    assert "the server's own words" in str(error) or state == "53100"
    with pytest.raises(kind, match=said):
        raise error


@pytest.mark.postgres
def test_a_user_without_rights_is_told(postgres_server: Server) -> None:
    url = postgres_server.new_schema()
    postgres_server.execute("CREATE ROLE guest LOGIN")
    schema = url.rpartition("%3D")[2]
    postgres_server.execute(f"GRANT USAGE ON SCHEMA {schema} TO guest")
    with pytest.raises(Unavailable, match="right to make and write tables"):
        Ledger.open(Address.parse(url.replace("postgres@", "guest@")), now_s=now)


@pytest.mark.postgres
def test_a_server_that_only_reads_is_no_place_for_a_ledger(postgres_server: Server) -> None:
    url = postgres_server.new_schema() + "%20-cdefault_transaction_read_only%3Don"
    with pytest.raises(Unavailable, match="read-only"):
        Ledger.open(Address.parse(url), now_s=now)


@pytest.mark.postgres
def test_a_table_that_another_locks_is_waited_for_a_bounded_time(
    postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "BUSY_TIMEOUT_S", 0.2)
    address = Address.parse(postgres_server.new_schema())
    ledger = Ledger.open(address, now_s=now)
    with dialect.reading_engine(address).begin() as other:
        other.exec_driver_sql("LOCK TABLE meta")
        with pytest.raises(Unavailable, match="locked or too slow"), ledger.transaction() as tx:
            tx.next_fence()
    with ledger.transaction() as tx:
        assert tx.next_fence() == 1
    ledger.close()
