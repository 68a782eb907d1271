"""Backing a home's ledger up and restoring it: what lives goes on, agents obey, and nothing that was there is deleted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.postgres import Server

from tenure.broker import ledgers
from tenure.broker.client import _lock_held, connect, start_broker
from tenure.broker.daemon import home_lock
from tenure.errors import Conflict, CorruptData, NotFound, Refused
from tenure.leases import EndReason, LeaseState
from tenure.ledger import address, portable, queries
from tenure.ledger.address import Address
from tenure.ledger.store import Ledger
from tenure.runs import Run
from tenure.wire import MakeBackup

from .conftest import World
from .test_real import is_alive, shut_down, sleeping, until


def now() -> float:
    return 1000.0


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    shut_down(tmp_path / "home")


def used(at: Address, *, events: int = 1) -> None:
    """Make a ledger that holds a run."""
    ledger = Ledger.open(at, now_s=now)
    with ledger.transaction() as tx:
        for number in range(events):
            tx.put_run(Run(id=f"r{number}", name="n", tenant="t", job_file="", source="", stages=(), created_at_s=1.0), who="t")
            tx.next_fence()
    ledger.close()


def runs_and_fence(at: Address) -> tuple[set[str], int]:
    ledger = Ledger.open(at, now_s=now)
    with ledger.reading() as connection:
        found = {run.id for run in queries.list_runs(connection)}, queries.last_fence(connection)
    ledger.close()
    return found


# --- where what goes ---


def in_home(home: Path, at: Address) -> Address:
    """Have the home's ledger lie at an address of the fixture's."""
    home.mkdir(exist_ok=True)
    if at.path is None:
        address.remember(home, at)
    return address.of_home(home)


def test_a_used_ledger_is_restored_over_only_by_force_and_then_kept_aside(home: Path, ledger_address: Address) -> None:
    at = in_home(home, ledger_address)
    used(at)
    made = ledgers.backup(home, home / "b")
    used(at, events=3)
    with pytest.raises(Conflict, match="--force moves it aside"):
        ledgers.restore(home, home / "b")
    assert runs_and_fence(at) == ({"r0", "r1", "r2"}, 4)
    done = ledgers.restore(home, home / "b", force=True)
    runs, fence = runs_and_fence(at)
    assert (done.backup, runs) == (made, {"r0"})
    assert fence == done.fence == 4 + ledgers.FENCE_JUMP
    if at.path is not None:
        assert runs_and_fence(Address(path=Path(done.aside)))[0] == {"r0", "r1", "r2"}
    else:
        aside = Address.parse(at.url.rpartition("%3D")[0] + "%3D" + done.aside.removeprefix("schema "))
        assert runs_and_fence(aside)[0] == {"r0", "r1", "r2"}
    ledger = Ledger.open(at, now_s=now)
    with ledger.reading() as connection:
        assert queries.events_after(connection, 0, run_id="", max_events=99)[-1].kind == "ledger.restored"
    ledger.close()


@pytest.mark.postgres
def test_a_ledger_moves_to_the_other_database_and_back(home: Path, postgres_server: Server) -> None:
    file = in_home(home, Address(path=home / "ledger.sqlite"))
    used(file, events=2)
    ledgers.backup(home, home / "b")
    url = postgres_server.new_schema()
    ledgers.restore(home, home / "b", to=url)
    assert address.of_home(home) == Address.parse(url)
    used(address.of_home(home), events=3)
    ledgers.backup(home, home / "c")
    ledgers.restore(home, home / "c", to="ledger.sqlite", force=True)
    assert address.of_home(home) == file
    assert runs_and_fence(file)[0] == {"r0", "r1", "r2"}
    assert not (home / "ledger-url").exists()


def test_fences_go_on_above_all_that_agents_shims_and_workers_remember(home: Path) -> None:
    used(in_home(home, Address(path=home / "ledger.sqlite")))
    ledgers.backup(home, home / "b")
    for number, name in enumerate(
        ["nodes/a/broker.json", "nodes/a/leases/l1/control.json", "runs/r/s/workers/0/1/lease.json", "nodes/b/broker.json"]
    ):
        path = home / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"fence": 100 + number}) if number < 3 else "not json")
    assert ledgers.restore(home, home / "b", force=True).fence == 102 + ledgers.FENCE_JUMP


def test_a_damaged_backup_touches_nothing(home: Path) -> None:
    at = in_home(home, Address(path=home / "ledger.sqlite"))
    used(at)
    ledgers.backup(home, home / "b")
    (home / "b").write_bytes((home / "b").read_bytes()[:-30])
    before = {path.name: path.read_bytes() for path in home.glob("ledger*")}
    with pytest.raises(CorruptData, match="Take another one"):
        ledgers.restore(home, home / "b", force=True)
    assert {path.name: path.read_bytes() for path in home.glob("ledger*")} == before


def test_a_restore_that_fails_midway_leaves_the_ledger_as_it_was(
    home: Path, ledger_address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = in_home(home, ledger_address)
    used(at)
    ledgers.backup(home, home / "b")

    def fails(*_: object) -> None:
        raise KeyError("midway")

    monkeypatch.setattr(queries, "raise_fence", fails)
    used(at, events=2)
    with pytest.raises(KeyError):
        ledgers.restore(home, home / "b", force=True)
    assert runs_and_fence(at) == ({"r0", "r1"}, 3)


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"x" * 5000])
def test_a_ledger_that_cannot_be_read_is_replaced_by_force_only_and_kept(home: Path, damage) -> None:
    at = in_home(home, Address(path=home / "ledger.sqlite"))
    used(at)
    ledgers.backup(home, home / "b")
    spoilt = damage(at.path.read_bytes())
    at.path.write_bytes(spoilt)
    with pytest.raises(CorruptData):
        ledgers.restore(home, home / "b")
    assert at.path.read_bytes() == spoilt
    done = ledgers.restore(home, home / "b", force=True)
    assert Path(done.aside).read_bytes() == spoilt
    assert runs_and_fence(at)[0] == {"r0"}


def test_a_home_without_a_ledger_has_nothing_to_back_up(home: Path) -> None:
    home.mkdir()
    with pytest.raises(NotFound, match="no ledger"):
        ledgers.backup(home, home / "b")
    assert sorted(path.name for path in home.iterdir()) == ["broker.lock", "ledger.sqlite.lock", "socket-dir"]


def test_while_a_broker_lives_nothing_is_restored(home: Path) -> None:
    used(in_home(home, Address(path=home / "ledger.sqlite")))
    ledgers.backup(home, home / "b")
    with home_lock(home), pytest.raises(Conflict, match="tenure down"):
        ledgers.restore(home, home / "b", force=True)


def test_only_the_brokers_own_user_may_have_a_backup_made(play, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.gang()
        asked = MakeBackup(path=str(tmp_path / "b"))
        backup = world.broker.handlers.table()["backup"]
        with pytest.raises(Refused, match="serves its owner alone"):
            await backup(asked, SimpleNamespace(uid=os.geteuid() + 1))
        made = await backup(asked, SimpleNamespace(uid=os.geteuid()))
        assert made == portable.verify(tmp_path / "b")
        assert made.rows["leases"] == 1

    play(scene)


# --- a world that goes on ---


def test_leases_of_the_backup_go_on_and_later_ones_are_stopped(play_on_both, tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        home = world.home
        in_home(home, world.address)
        (kept,) = await world.gang("kept")
        await world.broker.book.durable()
        portable.write_backup(world.address, home / "b", now_s=1.0)
        (later,) = await world.gang("later", stage="t")
        fence = world.broker.fence
        await world.broker.close()
        world.ledger.close()
        ledgers.restore(home, home / "b", force=True)
        world._open()
        await world.up()
        assert world.broker.fence > fence + ledgers.FENCE_JUMP
        assert world.lease(kept.id) == kept
        assert [spec.lease_id for spec in world.fleet.started] == [kept.id, later.id]
        await world.after(10.0)
        assert world.fleet.attempts["a"].keys() == {kept.id}
        assert world.broker.nodes.is_up("a")

    play_on_both(scene)


@pytest.mark.real
def test_a_backup_made_under_a_running_lease_is_restored_and_the_lease_still_runs(home: Path) -> None:
    start_broker(home, nodes=("a:0.6:150MiB",))
    with connect(home) as client:
        kept = sleeping(client, "kept")
        made = ledgers.backup(home, home / "b")
        assert made.rows["leases"] == 1
        later = sleeping(client, "later")
        fence, pid = client.status().fence, int((home / "broker.lock").read_text())
    os.kill(pid, signal.SIGKILL)
    until(lambda: not _lock_held(home))  # a thread of the dead may hold it a moment longer than the process is listed
    ledgers.restore(home, home / "b", force=True)
    with connect(home) as client:
        assert client.status().fence > fence + ledgers.FENCE_JUMP
        after = client.lease(kept.id).lease
        assert (after.state, after.attempt, after.fence) == (LeaseState.ACTIVE, kept.attempt, kept.fence)
        until(lambda: not any(alive(path) for path in shims(home, later.id)))
        assert any(alive(path) for path in shims(home, kept.id))
        client.release((kept.id,))
        (view,) = client.wait_leases((kept.id,))
        assert view.lease.end_reason is EndReason.RELEASED


def shims(home: Path, lease_id: str) -> list[Path]:
    return list(home.glob(f"nodes/*/leases/{lease_id}/shim.json"))


def alive(shim: Path) -> bool:
    try:
        return is_alive(json.loads(shim.read_bytes())["pid"])
    except FileNotFoundError:
        return False
