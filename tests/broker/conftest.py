from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tenure import wire
from tenure.broker.daemon import Broker
from tenure.fleet.fake import FakeFleet
from tenure.jobs import Command
from tenure.ledger.address import Address
from tenure.ledger.store import Ledger
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope

MIB = 1 << 20


class VirtualClock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.jump_s = 0.0
        """How far the wall clock was set away."""

    def utc_s(self) -> float:
        return self.now_s + self.jump_s

    def boot_s(self) -> float:
        return self.now_s - 900_000.0

    def boot_id(self) -> str:
        return "boot"


def node(name: str, *, cpus: float = 4.0, memory_bytes: int = 1024 * MIB) -> Node:
    return Node(name=name, capacity=Capacity(cpus=cpus, memory_bytes=memory_bytes), machine=Machine(cpu_model="fake"))


async def die(broker: Broker) -> None:
    """End a broker as kill -9 would: what has not gone to disk never does."""
    book = broker.book
    book._batch, book._points = None, []
    book.ledger.close()
    await broker.close()


class World:
    """A broker over imagined nodes, driven by hand. `restart` is a kill -9 followed by a new broker."""

    def __init__(self, home: Path, *nodes: Node, address: Address | None = None) -> None:
        self.home, self.clock = home, VirtualClock()
        self.address = address or Address(path=home / "ledger.sqlite")
        self.fleet = FakeFleet(nodes, self.clock)
        self._ids = 0
        self.broker: Broker
        self._open()

    def _new_id(self) -> str:
        self._ids += 1
        return f"l{self._ids}"

    def _open(self) -> None:
        self.ledger = Ledger.open(self.address, now_s=self.clock.utc_s)
        self.broker = Broker(self.ledger, self.fleet, home=self.home, clock=self.clock, term_s=60.0, new_lease_id=self._new_id)

    async def up(self) -> World:
        await self.broker.nodes.reach_all()
        await self.settle()
        return self

    async def restart(self) -> None:
        await die(self.broker)
        self._open()
        await self.up()

    async def settle(self) -> None:
        for _ in range(4):
            self.broker.tick()
            await self.broker.book.settle()

    async def after(self, seconds: float, *, step_s: float = 1.0) -> None:
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            self.clock.now_s = min(end_s, self.clock.now_s + step_s)
            await self.settle()

    async def ask(self, op: str, **args: Any) -> Any:
        result = await self.broker.handlers.table()[op](wire.BROKER_OPS[op].args(**args), None)
        await self.settle()
        return result

    async def gang(
        self, gang_id: str = "g", *, members: int = 1, memory_bytes: int = 64 * MIB, queue_s: float = 60.0, stage: str = "s",
        slot_s: float = 100.0, total_s: float = 1000.0, **command: Any,
    ):  # fmt: skip
        envelope = Envelope(memory_bytes=memory_bytes, slot_s=slot_s, total_s=total_s, cpus=0.5)
        made = Command(argv=("work",), **command)
        wanted = tuple(wire.GangMember(worker=w, envelope=envelope, command=made) for w in range(members))
        leases = await self.ask("request_gang", gang_id=gang_id, run_id="r", stage=stage, members=wanted, queue_s=queue_s)
        return [self.lease(lease.id) for lease in leases]

    def lease(self, lease_id: str):
        return self.broker.book.lease(lease_id)

    def publish(self, name: str, worker: int, stage: str = "s") -> None:
        folder = self.home / "runs" / "r" / stage / "store" / "events"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(f'{{"worker": {worker}}}')

    def events(self, kind: str = "") -> list[str]:
        from tenure.ledger import queries

        with self.ledger.reading() as connection:
            found = queries.events_after(connection, 0, run_id="", max_events=10_000)
        return [event.kind for event in found if event.kind.startswith(kind)]

    async def close(self) -> None:
        await self.broker.close()
        self.ledger.close()


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Run a scene in a world with the given nodes (default: one, called a)."""
    return player(tmp_path)


@pytest.fixture
def play_on_both(tmp_path: Path, ledger_address: Address) -> Callable[..., None]:
    """Run a scene as `play` does, over each database once."""
    return player(tmp_path, ledger_address)


def player(home: Path, address: Address | None = None) -> Callable[..., None]:
    def run(scene: Callable[[World], Coroutine[Any, Any, None]], *nodes: Node) -> None:
        async def all_of_it() -> None:
            world = World(home, *(nodes or (node("a"),)), address=address)
            try:
                await world.up()
                await scene(world)
            finally:
                await world.close()

        asyncio.run(all_of_it())

    return run
