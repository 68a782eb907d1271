"""The broker over both databases, and the real one on a real PostgreSQL: one broker per ledger, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.postgres import PASSWORD, Server
from tests.released import RELEASED, released

from tenure import verbs
from tenure.broker import fences, ledgers
from tenure.broker.client import connect, start_broker
from tenure.errors import Conflict, CorruptData, SpecError, Unavailable
from tenure.leases import EndReason, LeaseState
from tenure.ledger import address, queries
from tenure.ledger.store import Ledger
from tenure.orders import AttemptView
from tenure.protocols import RuntimeHandle

from .conftest import World, node
from .test_broker import DONE, said
from .test_real import is_alive, launch, request, shut_down, sleeping, until

PART = ("a:0.4:150MiB",)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    shut_down(tmp_path / "home")


# --- imagined nodes, both databases ---


def test_a_killed_broker_finds_its_leases_in_either_database(play_on_both) -> None:
    async def scene(world: World) -> None:
        gang = await world.gang(members=2)
        fence = world.broker.fence
        await world.restart()
        assert world.broker.fence > fence
        for lease in gang:
            assert world.lease(lease.id) == lease
            world.fleet.finish(lease.id, DONE)
        await world.settle()
        assert {world.lease(lease.id).end_reason for lease in gang} == {EndReason.COMPLETED}
        assert len(world.fleet.started) == 2

    play_on_both(scene, node("a"))


def test_events_drive_a_gang_in_either_database(play_on_both) -> None:
    async def scene(world: World) -> None:
        (lease,) = await world.gang(on_event=True, expects_result=True)
        for name in ("one", "two"):
            world.publish(name, 0)
            await world.after(2.0)
            world.fleet.finish(lease.id, said("done" if name == "two" else "continue"))
            await world.settle()
        assert world.lease(lease.id).end_reason is EndReason.COMPLETED
        assert world.events("invoked") == ["invoked", "invoked"]

    play_on_both(scene)


# --- a ledger that an earlier Tenure wrote ---


@pytest.mark.parametrize("dump", RELEASED, ids=lambda dump: dump.stem)
def test_a_broker_goes_on_with_the_live_leases_of_a_released_ledger(dump: Path, tmp_path: Path) -> None:
    """The dump holds a gang of two that runs (l2, l3), a lease that runs an event (l4), and one that waits (l5)."""
    released(dump, tmp_path / "ledger.sqlite")

    async def scene() -> None:
        world = World(tmp_path, node("a"), node("b"))
        for lease in world.broker.book.live.values():
            if lease.attempt:
                handle = RuntimeHandle(
                    lease_id=lease.id, attempt=lease.attempt, fence=lease.fence, pid=1, start_ticks=1, started_at_s=1.0
                )
                world.fleet.attempts[lease.node][lease.id] = AttemptView(handle=handle)
        await world.up()
        assert {lease.id: str(lease.state) for lease in world.broker.book.live.values()} == {
            "l2": "active", "l3": "active", "l4": "active", "l5": "queued",
        }  # fmt: skip
        assert world.fleet.started == []
        assert world.broker.fence > max(world.lease(name).fence for name in ("l2", "l3", "l4"))
        world.fleet.finish("l4", said("done"))
        for name in ("l2", "l3"):
            world.fleet.finish(name, DONE)
        await world.settle()
        assert {world.lease(name).end_reason for name in ("l2", "l3", "l4")} == {EndReason.COMPLETED}
        assert [spec.lease_id for spec in world.fleet.started] == ["l5"]
        await world.close()

    asyncio.run(scene())


@pytest.mark.real
@pytest.mark.parametrize("dump", RELEASED, ids=lambda dump: dump.stem)
def test_a_lease_that_runs_when_tenure_is_replaced_by_a_newer_one_goes_on(dump: Path, home: Path, tmp_path: Path) -> None:
    """Its rows are put into a file of the released schema, as the older Tenure would have left them."""
    start_broker(home, nodes=PART)
    with connect(home) as client:
        before = sleeping(client, "s")
        fence, pid = client.status().fence, int((home / "broker.lock").read_text())
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    path = home / "ledger.sqlite"
    path.replace(tmp_path / "new.sqlite")
    (home / "ledger.sqlite-wal").replace(tmp_path / "new.sqlite-wal")
    (home / "ledger.sqlite-shm").unlink(missing_ok=True)
    released(dump, path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER events_no_delete")
        connection.execute("ATTACH ? AS new", (str(tmp_path / "new.sqlite"),))
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in set(names) - {"alembic_version", "sqlite_sequence"}:
            connection.execute(f"DELETE FROM {name}")
            connection.execute(f"INSERT INTO {name} SELECT * FROM new.{name}")
        connection.execute(
            "CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events is append-only'); END"
        )
        connection.commit()
    with connect(home) as client:
        assert client.status().fence > fence
        after = client.lease(before.id).lease
        assert (after.state, after.attempt, after.fence) == (LeaseState.ACTIVE, before.attempt, before.fence)
        client.release((before.id,))
        (view,) = client.wait_leases((before.id,))
        assert view.lease.end_reason is EndReason.RELEASED


# --- which ledger a home has ---


@pytest.mark.postgres
def test_a_homes_ledger_is_remembered_for_its_owner_only(tmp_path: Path, postgres_server: Server) -> None:
    name = address.Address.parse(postgres_server.new_database()).url.partition("@/")[2].partition("?")[0]
    url = postgres_server.tcp_url(name, password=PASSWORD)
    ledgers.choose(tmp_path, url)
    note = tmp_path / "ledger-url"
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert address.of_home(tmp_path) == address.Address.parse(url)
    assert str(address.of_home(tmp_path)) == f"postgresql://postgres:***@127.0.0.1:{postgres_server.port}/{name}"
    assert PASSWORD not in repr(address.of_home(tmp_path))
    ledgers.choose(tmp_path, url)


@pytest.mark.parametrize("url", ["mysql://u@h/db", "postgresql://u@h", "/tmp/ledger.sqlite", "postgresql://u:pw@h/", "a b"])
def test_what_names_no_postgresql_database_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(SpecError, match="postgresql://USER@HOST/DATABASE") as caught:
        ledgers.choose(tmp_path, url)
    assert "pw" not in str(caught.value)


def test_a_home_with_runs_or_leases_keeps_its_ledger(play, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.gang()

    play(scene)
    with pytest.raises(Conflict, match=r"already holds runs or leases.*tenure backup FILE"):
        ledgers.choose(tmp_path, "postgresql://u@h/db")
    assert not (tmp_path / "ledger-url").exists()


@pytest.mark.postgres
def test_a_home_whose_ledger_was_never_used_may_have_another_that_knows_its_agents_fence(
    tmp_path: Path, postgres_server: Server
) -> None:
    Ledger.open(tmp_path / "ledger.sqlite", now_s=time.time).close()
    (tmp_path / "nodes" / "a").mkdir(parents=True)
    (tmp_path / "nodes" / "a" / "broker.json").write_text('{"fence": 41}')
    url = postgres_server.new_schema()
    ledgers.choose(tmp_path, url)
    assert address.of_home(tmp_path).url == url
    ledger = Ledger.open(address.of_home(tmp_path), now_s=time.time)
    fences.check_not_older(ledger, tmp_path)
    with ledger.transaction() as tx:
        assert tx.next_fence() == 42
    ledger.close()


@pytest.mark.postgres
def test_a_database_that_cannot_be_opened_is_not_taken(tmp_path: Path, postgres_server: Server) -> None:
    for url, reason in (
        (postgres_server.tcp_url(password="wrong"), "lets nobody in.*pgpass"),
        (postgres_server.url("nowhere"), "createdb"),
        (postgres_server.url() + "&options=-csearch_path%3Dnowhere", "no schema that exists"),
    ):
        with pytest.raises(Unavailable, match=reason) as caught:
            ledgers.choose(tmp_path, url)
        assert "wrong" not in str(caught.value)
        assert not (tmp_path / "ledger-url").exists()


@pytest.mark.parametrize("left", [b"", None, "an older copy"])
def test_a_ledger_that_knows_less_than_the_agents_is_refused(tmp_path: Path, left: bytes | str | None) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger.open(path, now_s=time.time)
    with ledger.transaction() as tx:
        tx.next_fence()
    ledger.close()
    (tmp_path / "nodes" / "a").mkdir(parents=True)
    (tmp_path / "nodes" / "a" / "broker.json").write_text('{"fence": 7}')
    if left is None:
        path.unlink()
    elif isinstance(left, bytes):
        path.write_bytes(left)
    ledger = Ledger.open(path, now_s=time.time)
    with pytest.raises(CorruptData, match=r"fence 7: it is empty, an older copy.*tenure restore"):
        fences.check_not_older(ledger, tmp_path)
    with ledger.transaction() as tx:
        queries.raise_fence(tx.connection, 7)
    fences.check_not_older(ledger, tmp_path)
    ledger.close()


# --- real processes, a real server ---


def terminate(server: Server) -> None:
    """Cut every broker's connection, as a restarted or failing server would."""
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'tenure pid%'")


@pytest.mark.real
@pytest.mark.postgres
def test_a_broker_that_loses_its_ledger_ends_and_the_next_one_finds_the_lease_running(
    home: Path, tmp_path: Path, postgres_server: Server
) -> None:
    url = postgres_server.new_database()
    ledgers.choose(home, url)
    start_broker(home, nodes=PART)
    with connect(home) as client:
        launched = launch(client)(request(("sleep", "60")))
        until(lambda: launched.usage().processes > 0)
        before, fence = client.lease(launched.lease_id).lease, client.status().fence
        events = client.events()
        pid = int((home / "broker.lock").read_text())

        with pytest.raises(Conflict, match="End it with"):
            ledgers.choose(home, "postgresql://u@h/db")
        other = tmp_path / "other"
        other.mkdir()
        address.remember(other, address.Address.parse(url))
        with pytest.raises(Conflict, match=rf"held by another process \(tenure pid {pid} on .*one broker per ledger"):
            start_broker(other, nodes=("b:0.1:70MiB",))

        terminate(postgres_server)
        after = client.lease(launched.lease_id).lease
        assert (after.state, after.attempt, after.fence) == (LeaseState.ACTIVE, before.attempt, before.fence)
        assert client.status().fence > fence
        assert client.events()[: len(events)] == events
        said_so = (home / "broker.log").read_text()
        assert "was lost" in said_so or "has hung up" in said_so
        launched.stop()
        ended = client.lease(launched.lease_id).lease
        assert ended.end_reason is EndReason.RELEASED
    assert not (home / "ledger.sqlite").exists()


@pytest.mark.real
@pytest.mark.postgres
def test_a_call_under_way_when_the_ledger_is_lost_is_made_again_on_the_next_broker(home: Path, postgres_server: Server) -> None:
    ledgers.choose(home, postgres_server.new_database())
    start_broker(home, nodes=PART)
    with connect(home) as client:
        for _ in range(3):
            terminate(postgres_server)
            assert client.runs() == ()
            assert client.status().leases == 0


@pytest.mark.real
@pytest.mark.postgres
def test_a_server_that_refuses_is_told_with_what_to_do_and_without_the_password(home: Path, postgres_server: Server) -> None:
    home.mkdir()
    for url, reason in (
        (postgres_server.tcp_url(password="wrong"), "lets nobody in.*pgpass"),
        (postgres_server.url("nowhere"), "createdb"),
    ):
        address.remember(home, address.Address.parse(url))  # it was right once
        with pytest.raises(Unavailable, match=reason) as caught:
            connect(home)
        assert "wrong" not in str(caught.value)
        assert "wrong" not in (home / "broker.log").read_text()


@pytest.mark.real
@pytest.mark.postgres
def test_up_takes_the_ledgers_url_from_the_environment(
    home: Path, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres_server.execute("CREATE DATABASE from_environment")
    monkeypatch.setenv("TENURE_LEDGER", postgres_server.tcp_url("from_environment", password=PASSWORD))
    verbs.up(home=home, cpus=0.3, memory=100 << 20)
    assert verbs.runs(home=home) == ()
    pid = int((home / "broker.lock").read_text())
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    assert PASSWORD not in argv
    assert PASSWORD.replace("/", "%2F") not in argv
    assert json.loads((home / "broker.json").read_text())["persistent"] is True
    assert postgres_server.execute("SELECT count(*) FROM events", "from_environment")[0][0] > 0
    os.kill(pid, 9)
    monkeypatch.delenv("TENURE_LEDGER")
    assert verbs.runs(home=home) == ()
    assert not (home / "ledger.sqlite").exists()
