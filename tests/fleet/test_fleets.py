"""What every fleet promises, once over the imagined one and once over real agents of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tenure import orders, wire
from tenure.errors import NotFound, Refused, SpecError, StaleFence, Unavailable
from tenure.fleet.contract import Fleet
from tenure.fleet.fake import FakeFleet
from tenure.fleet.local import LocalFleet, Part
from tenure.nodes import Machine, Node
from tenure.protocols import ExitKind, StartSpec, SystemClock
from tenure.resources import Capacity, Envelope

MIB = 1 << 20
CLOCK = SystemClock()


def fake(_home: Path) -> Fleet:
    node = Node(name="a", capacity=Capacity(cpus=1.0, memory_bytes=200 * MIB), machine=Machine(cpu_model="fake"))
    return FakeFleet([node], CLOCK)


def local(home: Path) -> Fleet:
    return LocalFleet(home, [Part(name="a", cpus=0.5, memory_bytes=200 * MIB)])


@pytest.fixture(params=[fake, pytest.param(local, marks=pytest.mark.real)], ids=["fake", "local"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[[Fleet], Awaitable[None]]], None]:
    def run(scene: Callable[[Fleet], Awaitable[None]]) -> None:
        async def all_of_it() -> None:
            fleet = request.param(tmp_path / "home")
            try:
                try:
                    await fleet.reach("a", term=term(5))
                except Refused as error:
                    pytest.skip(f"this machine has no room left for a small agent: {error}")
                await scene(fleet)
            finally:
                try:
                    await fleet.call("a", "shutdown", wire.Nothing())
                except Unavailable:
                    pass
                await fleet.close()

        asyncio.run(all_of_it())

    return run


def spec(tmp_path: Path, *, fence: int = 7, attempt: int = 1) -> orders.AgentStart:
    return orders.AgentStart(
        spec=StartSpec(
            lease_id="l1", fence=fence, attempt=attempt, argv=("sleep", "30"), env={"PATH": "/usr/bin:/bin"},
            workdir=str(tmp_path / "w"), worker_dir=str(tmp_path / "w"), log_path=str(tmp_path / "log"),
            envelope=Envelope(memory_bytes=32 * MIB), deadline_boot_s=CLOCK.boot_s() + 30.0, boot_id=CLOCK.boot_id(),
        )
    )  # fmt: skip


def term(fence: int) -> Callable[[], orders.NodeTerm]:
    return lambda: orders.NodeTerm(term_s=30.0, broker_fence=fence)


def test_a_reached_node_describes_itself_and_its_clock(play) -> None:
    async def scene(fleet: Fleet) -> None:
        node, boot = await fleet.reach("a", term=term(6))
        assert (node.name, fleet.names()) == ("a", ("a",))
        assert node.capacity.memory_bytes == 200 * MIB
        assert boot.boot_id == CLOCK.boot_id()

    play(scene)


def test_a_node_that_is_not_of_the_fleet_is_not_found(play) -> None:
    async def scene(fleet: Fleet) -> None:
        with pytest.raises(NotFound, match="this fleet has a"):
            await fleet.reach("z", term=term(6))

    play(scene)


def test_a_broker_with_an_older_fence_is_refused(play) -> None:
    async def scene(fleet: Fleet) -> None:
        with pytest.raises(StaleFence):
            await fleet.reach("a", term=term(4))
        await fleet.reach("a", term=term(5))

    play(scene)


def test_an_attempt_is_listed_while_it_runs_and_its_end_is_told(play, tmp_path: Path) -> None:
    async def scene(fleet: Fleet) -> None:
        told: asyncio.Queue[Any] = asyncio.Queue()
        fleet.listen(lambda node, view: told.put_nowait((node, view)), lambda node: None)
        handle = await fleet.call("a", "start", spec(tmp_path))
        assert (handle.lease_id, handle.attempt, handle.fence) == ("l1", 1, 7)
        (view,) = await fleet.call("a", "attempts", wire.Nothing())
        assert (view.handle, view.exit) == (handle, None)
        with pytest.raises(StaleFence):
            await fleet.call("a", "stop", orders.AgentStop(lease_id="l1", fence=6))
        await fleet.call("a", "stop", orders.AgentStop(lease_id="l1", fence=7, grace_s=0.5))
        while True:
            node, view = await asyncio.wait_for(told.get(), 20.0)
            if view.exit is not None:
                break
        assert (node, view.handle, view.exit.kind) == ("a", handle, ExitKind.STOPPED)
        await fleet.call("a", "forget", wire.LeaseRef(lease_id="l1"))
        assert await fleet.call("a", "attempts", wire.Nothing()) == ()

    play(scene)


def test_after_hanging_up_calls_say_so_and_reaching_again_finds_what_runs(play, tmp_path: Path) -> None:
    async def scene(fleet: Fleet) -> None:
        await fleet.call("a", "start", spec(tmp_path))
        await fleet.close()
        with pytest.raises(Unavailable):
            await fleet.call("a", "attempts", wire.Nothing())
        await fleet.reach("a", term=term(6))
        (view,) = await fleet.call("a", "attempts", wire.Nothing())
        assert view.handle.attempt == 1
        await fleet.call("a", "stop", orders.AgentStop(lease_id="l1", fence=7, grace_s=0.5))

    play(scene)


def test_a_node_is_added_and_taken_out_and_its_name_is_free_again(play) -> None:
    async def scene(fleet: Fleet) -> None:
        fleet.add(Part(name="b", cpus=0.25, memory_bytes=100 * MIB))
        assert fleet.names() == ("a", "b")
        node, _ = await fleet.reach("b", term=term(5))
        assert (node.capacity.cpus, node.capacity.memory_bytes) == (0.25, 100 * MIB)
        await fleet.remove("b")
        await fleet.remove("b")
        assert [str(part) for part in fleet.parts()] == [
            str(Part(name="a", cpus=fleet.parts()[0].cpus, memory_bytes=200 * MIB))
        ]
        with pytest.raises(Unavailable):
            await fleet.call("b", "describe", wire.Nothing())
        fleet.add(Part(name="b", cpus=0.125, memory_bytes=100 * MIB))
        node, _ = await fleet.reach("b", term=term(5))
        assert node.capacity.cpus == 0.125
        await fleet.remove("b")

    play(scene)


@pytest.mark.parametrize("text", ["a", "a:1.0:", "a::512MiB", "a:0.5:1GiB", "a:::0::", "a:1.0::2:80GiB:NVIDIA H100"])
def test_a_part_reads_back_as_it_was_written(text: str) -> None:
    assert str(Part.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "a:1",
        "a:x:",
        "a:0:",
        "a:nan:",
        "A::",
        "a:1:2parsec",
        "a:1:2:3",
        "a:::-1::",
        "a:::x::",
        "a:::::H100",
        "a:::1::A:B",
    ],
)
def test_a_part_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        Part.parse(text)
