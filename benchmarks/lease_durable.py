"""What it costs that a grant is on disk before it is answered, with one client and with 64.

World: a real broker (ledger, queue, placement, wire, socket) in a process of its own over 20 imagined nodes that start whatever
they are told; clients are threads of this process, each with a connection of its own, in a closed loop: request one lease, wait
until it is active, keep it, request the next. Nothing is released meanwhile, so that all commits counted are those of grants.
Ledgers: SQLite (WAL, synchronous=FULL) in a fresh folder; PostgreSQL where its server can be started here.
Measured per ledger: commits per grant with 1 client and with 64; grants/s with 64 clients, and the same path with fsync off
(SQLite: synchronous=OFF; PostgreSQL: fsync=off), in interleaved rounds (5; --quick: 3), each with a fresh process and ledger;
the value is the ratio of the medians for SQLite. Beside it the raw rate of fdatasync of 4 KiB in the same folder.
Bars: at most 2 commits per grant with one client, at most 0.1 with 64, and at 64 clients at least 0.7 of the path without
fsync; each must hold on every ledger measured.
Checked: every lease answered for is active in the ledger's file, read by another program after the broker was killed (SIGKILL).
Control: one commit per change (no group commit): it must miss the 0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from tests import postgres

from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from tenure import wire
from tenure.jobs import Command
from tenure.leases import LeaseState
from tenure.resources import Envelope
from tenure.sockets import LineClient, socket_dir

NAME = "lease_durable"
BAR = "<= 2 commits per grant with one client, <= 0.1 with 64; at 64 clients >= 0.7 x the same path with fsync off"
ONE_LIMIT, MANY_LIMIT, RATIO_LIMIT = 2.0, 0.1, 0.7
CLIENTS = 64
NODES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round found."""

    grants_per_s: float
    commits_per_grant: float
    p50_s: float
    """Median time from request to active."""


def run(options: Options) -> Result:
    """Measure each ledger that can be had here."""
    grants, repeats = (15, 3) if options.quick else (40, 5)
    found: dict[str, dict[str, Any]] = {}
    control: Control | None = None
    for name, place in ledgers():
        with place as (durable, unsafe):
            contenders = {
                "one": lambda new=durable: measure(new(), clients=1, grants=grants * 2),
                "many": lambda new=durable: measure(new(), clients=CLIENTS, grants=grants),
                "no fsync": lambda new=unsafe: measure(new(), clients=CLIENTS, grants=grants, unsafe=True),
            }
            if name == "sqlite":
                contenders["control"] = lambda new=durable: measure(new(), clients=CLIENTS, grants=grants, alone=True)
            rounds = interleaved(contenders, repeats, seed=options.seed)
        found[name] = figures(rounds)
        if name == "sqlite":
            value = median([r.commits_per_grant for r in rounds["control"]])
            control = Control(
                name="one commit per change", value=value, failed=value > MANY_LIMIT, how=f"bar {MANY_LIMIT} commits per grant"
            )
    holds, why = judge(all(meets(figure) for figure in found.values()), control)
    sqlite = found["sqlite"]
    return Result(
        value=sqlite["ratio"],
        spread=sqlite["ratio_spread"],
        unit="of the rate without fsync",
        holds=holds,
        why=why,
        reference={"name": "fdatasync of 4 KiB", "value": raw_fsync_rate(), "unit": "1/s"},
        control=control,
        details={"ledgers": found, "clients": CLIENTS, "repeats": repeats, "load_1min": os.getloadavg()[0]},
    )


def figures(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """Return one ledger's figures."""
    safe, unsafe = ([r.grants_per_s for r in rounds[name]] for name in ("many", "no fsync"))
    return {
        "commits_per_grant_1": median([r.commits_per_grant for r in rounds["one"]]),
        "commits_per_grant_64": median([r.commits_per_grant for r in rounds["many"]]),
        "grants_per_s_1": median([r.grants_per_s for r in rounds["one"]]),
        "grants_per_s_64": median(safe),
        "grants_per_s_64_spread": spread(safe),
        "grants_per_s_64_no_fsync": median(unsafe),
        "p50_1_s": median([r.p50_s for r in rounds["one"]]),
        "p50_64_s": median([r.p50_s for r in rounds["many"]]),
        "ratio": median(safe) / median(unsafe),
        "ratio_spread": spread([a / b for a, b in zip(safe, unsafe, strict=True)]),
    }


def meets(figure: dict[str, Any]) -> bool:
    """Return whether one ledger meets the three bars."""
    few = figure["commits_per_grant_1"] <= ONE_LIMIT and figure["commits_per_grant_64"] <= MANY_LIMIT
    return few and figure["ratio"] >= RATIO_LIMIT


Places = tuple[Callable[[], str], Callable[[], str]]
"""How to make a new ledger with fsync, and one without: each returns its URL, empty for a file of the home."""


def ledgers() -> Iterator[tuple[str, contextlib.AbstractContextManager[Places]]]:
    """Give each kind of ledger that can be had here."""
    yield "sqlite", contextlib.nullcontext((str, str))
    if not postgres.why_absent():
        yield "postgresql", _two_servers()


@contextlib.contextmanager
def _two_servers() -> Iterator[Places]:
    with postgres.running() as durable, postgres.running(settings={"fsync": "off"}) as unsafe:
        yield durable.new_schema, unsafe.new_schema


def measure(url: str, *, clients: int, grants: int, unsafe: bool = False, alone: bool = False) -> Round:
    """Have `clients` threads request `grants` leases each of a fresh broker, kill it, and check that its ledger has them."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        home = Path(folder)
        words = ["--url", url] * bool(url) + ["--unsafe"] * unsafe + ["--alone"] * alone
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.lease_durable", "--home", folder, *words])
        try:
            path = socket_dir(home) / "broker.sock"
            until(lambda: path.exists() and (home / "commits").exists(), "the broker answers", 30.0)
            took: list[float] = []
            failed: list[BaseException] = []
            commits = counted(home)
            args = [(path, number, grants, took, failed) for number in range(clients)]
            threads = [threading.Thread(target=ask, args=each, daemon=True) for each in args]
            begun_s = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(300.0)
            wall_s = time.perf_counter() - begun_s
            assert not failed, f"a client failed: {failed[0]!r}"
            assert len(took) == clients * grants, "a client did not end"
            commits = counted(home) - commits
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        if not unsafe:
            kept = active_on_disk(home, url)
            assert kept >= clients * grants, f"{clients * grants} grants were answered, {kept} are on disk"
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()
    return Round(grants_per_s=len(took) / wall_s, commits_per_grant=commits / len(took), p50_s=median(took))


def ask(path: Path, number: int, grants: int, took: list[float], failed: list[BaseException]) -> None:
    """Be one client."""
    try:
        client = LineClient(path, wire.BROKER_OPS, who=f"client-{number}", timeout_s=120.0)
        envelope = Envelope(cpus=0.01, memory_bytes=1 << 20, disk_bytes=1 << 20)
        member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("work",)))
        for count in range(grants):
            gang = f"g{number}-{count}"
            begun_s = time.perf_counter()
            (lease,) = client.call("request_gang", wire.RequestGang(gang_id=gang, run_id=gang, stage="s", members=(member,)))
            if lease.state is not LeaseState.ACTIVE:
                (view,) = client.call("wait_leases", wire.WaitLeases(lease_ids=(lease.id,), until="active"))
                lease = view.lease
            assert lease.state is LeaseState.ACTIVE, lease
            took.append(time.perf_counter() - begun_s)
        client.close()
    except BaseException as error:  # told to the thread that measures
        failed.append(error)


def active_on_disk(home: Path, url: str) -> int:
    """Return how many active leases another program finds."""
    from tenure.ledger.address import Address
    from tenure.ledger.dialect import reading_engine

    engine = reading_engine(Address.parse(url) if url else Address(path=home / "ledger.sqlite"))
    with engine.connect() as connection:
        count = connection.execute(sa.text("SELECT count(*) FROM leases WHERE state = 'active'")).scalar_one()
    engine.dispose()
    return int(count)


def counted(home: Path) -> int:
    """Return the broker's count of commits so far; it writes it ten times a second."""
    time.sleep(0.3)
    return int((home / "commits").read_text())


def until(true: Any, what: str, limit_s: float) -> None:
    """Wait for a condition, a bounded time."""
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)


def raw_fsync_rate(seconds: float = 1.0) -> float:
    """Return how many times a second 4 KiB can be written and synced here."""
    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR")) as stream:
        count, end_s = 0, time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            os.pwrite(stream.fileno(), b"x" * 4096, 4096 * (count % 256))
            os.fdatasync(stream.fileno())
            count += 1
    return count / seconds


def main() -> None:
    """Be the broker of one round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--url", default="")
    parser.add_argument("--unsafe", action="store_true")
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> None:
    from tenure.broker.daemon import Broker, answer
    from tenure.fleet.fake import FakeFleet
    from tenure.ledger.address import Address
    from tenure.ledger.store import Ledger
    from tenure.nodes import Machine, Node
    from tenure.protocols import SystemClock
    from tenure.resources import Capacity

    clock = SystemClock()
    capacity = Capacity(cpus=1000.0, memory_bytes=1 << 40)
    nodes = [Node(name=f"n{number}", capacity=capacity, machine=Machine(cpu_model="imagined")) for number in range(NODES)]
    address = Address.parse(options.url) if options.url else Address(path=options.home / "ledger.sqlite")
    ledger = Ledger.open(address, now_s=clock.utc_s)
    if options.unsafe and not options.url:
        ledger._driver.execute("PRAGMA synchronous=OFF")  # of the one connection that the engine has
    broker = Broker(ledger, FakeFleet(nodes, clock), home=options.home, clock=clock, persistent=True)
    if options.alone:
        gather = broker.book._gather

        def at_once() -> None:
            gather()
            broker.book.ledger.commit()

        broker.book._gather = at_once  # type: ignore[method-assign]

    async def count() -> None:
        while True:
            draft = options.home / ".commits"
            draft.write_text(str(ledger.commits))
            draft.replace(options.home / "commits")
            await asyncio.sleep(0.1)

    counting = asyncio.ensure_future(count())
    try:
        await answer(broker, options.home)
    finally:
        counting.cancel()
        ledger.close()


if __name__ == "__main__":
    main()
