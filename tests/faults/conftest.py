"""What the fault tests share: a broker of this process with short terms over real agents, and jobs that tell when they ran."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tenure import orders, wire
from tenure.broker import nodes as broker_nodes
from tenure.broker.daemon import Broker
from tenure.errors import TenureError
from tenure.fleet.local import LocalFleet, Part
from tenure.jobs import Command
from tenure.leases import Lease, LeaseState
from tenure.ledger.store import Ledger
from tenure.protocols import SystemClock
from tenure.resources import Envelope
from tenure.sockets import LineClient, socket_dir

MIB = 1 << 20
LONG_S = 30.0
"""Bound of a wait for something that is to happen."""
BEATS = "while :; do cut -d' ' -f1 /proc/uptime >> beats; sleep 0.05; done"
"""A job that writes CLOCK_BOOTTIME into its worker folder as long as it runs."""


async def until(true: Callable[[], Any], what: str) -> None:
    end_s = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < end_s, f"this did not happen in time: {what}"
        await asyncio.sleep(0.02)


class Real:
    """A broker in this process, its agents and shims as real processes. `term_s` holds for every node."""

    def __init__(self, home: Path, term_s: float) -> None:
        self.home, self.term_s, self.clock = home, term_s, SystemClock()
        self._ticking: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Be the home's broker; a later call is the next broker."""
        self.fleet = LocalFleet(self.home, [Part(name=name, cpus=0.2, memory_bytes=100 * MIB) for name in "ab"])
        self.ledger = Ledger.open(self.home / "ledger.sqlite", now_s=self.clock.utc_s)
        self.broker = Broker(self.ledger, self.fleet, home=self.home, clock=self.clock, term_s=self.term_s)
        await self.broker.nodes.reach_all()
        self.go_on()

    def go_on(self) -> None:
        """Have the broker do what is due, over and over."""
        self._ticking = asyncio.ensure_future(self._tick())

    def pause(self) -> None:
        """Have it do nothing of itself; what it is told it still hears."""
        assert self._ticking is not None
        self._ticking.cancel()

    async def _tick(self) -> None:
        while True:
            self.broker.tick()
            await asyncio.sleep(0.05)

    async def die(self) -> None:
        """Let go of everything at once, as a kill does."""
        self.pause()
        await self.broker.close()
        self.ledger.close()

    async def close(self) -> None:
        """End the agents, and with them whatever runs."""
        self.pause()
        for name in self.fleet.names():
            with contextlib.suppress(TenureError):
                await self.fleet.call(name, "shutdown", wire.Nothing())
        await until(lambda: not any(self.has_agent(name) for name in self.fleet.names()), "the agents leave")
        await self.die()

    def has_agent(self, node: str) -> bool:
        """Return whether a process holds the node's lock."""
        with (self.home / "nodes" / node / "agent.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def socket(self, node: str) -> Path:
        return socket_dir(self.home) / f"agent-{node}.sock"

    def agent_pid(self, node: str) -> int:
        client = LineClient(self.socket(node), orders.AGENT_OPS, who="test")
        client.close()
        return client.welcome.pid

    async def ask(self, op: str, **args: Any) -> Any:
        return await getattr(self.broker.handlers, f"op_{op}")(wire.BROKER_OPS[op].args(**args), None)

    async def asked(self, gang: str, *, script: str = BEATS, slot_s: float = 60.0, total_s: float = 120.0) -> Lease:
        """Return a lease of one job, granted or not. Two of them do not fit on one node."""
        envelope = Envelope(cpus=0.15, memory_bytes=64 * MIB, disk_bytes=128 << 10, slot_s=slot_s, total_s=total_s)
        member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("sh", "-c", script), grace_s=1.0))
        (lease,) = await self.ask("request_gang", gang_id=gang, run_id="r", stage=gang, members=(member,), queue_s=60.0)
        return lease  # type: ignore[no-any-return]

    async def job(self, gang: str, *, script: str = BEATS, **times: float) -> Lease:
        """Return the lease once its job runs."""
        lease = await self.asked(gang, script=script, **times)
        await until(lambda: self.lease(lease.id).state in (LeaseState.ACTIVE, LeaseState.ENDED), f"{gang} runs")
        assert self.lease(lease.id).state is LeaseState.ACTIVE, self.lease(lease.id)
        if script == BEATS:
            await until(lambda: self.beats(lease.id), f"{gang} beats")
        return self.lease(lease.id)

    def lease(self, lease_id: str) -> Lease:
        return self.broker.book.lease(lease_id)

    def worker_dir(self, lease_id: str) -> Path:
        lease = self.lease(lease_id)
        return self.home / "runs" / lease.run_id / lease.stage / "workers" / str(lease.worker) / str(lease.attempt)

    def beats(self, lease_id: str) -> list[float]:
        """Return when the job ran, CLOCK_BOOTTIME."""
        path = self.worker_dir(lease_id) / "beats"
        return [float(line) for line in path.read_text().splitlines() if line] if path.exists() else []

    def state(self, lease_id: str, name: str) -> dict[str, Any]:
        """Return one of the runtime's files on the lease."""
        path = self.home / "nodes" / self.lease(lease_id).node / "leases" / lease_id / name
        return json.loads(path.read_text())  # type: ignore[no-any-return]


Scene = Callable[[Real], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run a scene with two agents, each with room for one job. The margin is short: jobs here leave at once when told to."""
    monkeypatch.setenv("TENURE_SHARES_FILE", str(tmp_path / "shares.json"))
    monkeypatch.setattr(broker_nodes, "MARGIN_S", 1.0)

    def run(scene: Scene, *, term_s: float = 30.0) -> None:
        async def all_of_it() -> None:
            real = Real(tmp_path / "home", term_s)
            await real.open()
            try:
                if len(real.broker.nodes.known()) < 2:
                    pytest.skip(f"this machine has no room left for two small agents: {real.broker.nodes.why_unreached()}")
                await scene(real)
            finally:
                await real.close()

        asyncio.run(all_of_it())

    return run


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
