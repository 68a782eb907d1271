"""What Prometheus reads of a broker, and the door at which it does."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tenure import wire
from tenure.broker.metrics import METRICS
from tenure.broker.metrics_door import MAX_CONNECTIONS, MAX_REQUEST_BYTES, MetricsDoor
from tenure.errors import Refused, SpecError
from tenure.jobs import Command
from tenure.resources import Envelope
from tenure.usage import Usage

from .conftest import MIB, World, node

NAME = re.compile(r"tenure_[a-z_]*[a-z]")


def figures(world: World) -> dict[tuple, float]:
    text = world.broker.metrics.text().decode()
    return {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}


async def ask(world: World, name: str, *, cpus: float, tenant: str = "ada"):
    member = wire.GangMember(
        worker=0,
        envelope=Envelope(cpus=cpus, memory_bytes=64 * MIB, slot_s=500.0, total_s=500.0),
        command=Command(argv=("work",)),
    )
    asked = {"gang_id": name, "run_id": "r", "stage": "s", "tenant": tenant, "members": (member,), "queue_s": 400.0}
    (lease,) = await world.ask("request_gang", **asked)
    return world.lease(lease.id)


def test_leases_nodes_and_the_queue_are_told_as_they_are(play) -> None:
    async def scene(world: World) -> None:
        held = await ask(world, "one", cpus=3)
        await ask(world, "two", cpus=2, tenant="bob")
        await world.after(30)
        world.broker.book.note_usage(held.id, Usage(at_s=5.0, cpu_s=12.5, memory_bytes=9 * MIB))
        found = figures(world)
        labels = (held.id, "ada", "r", "s", "0", "a")
        assert found["tenure_lease_cpu_seconds_total", *labels] == 12.5
        assert found["tenure_lease_memory_bytes", *labels] == 9 * MIB
        assert found["tenure_lease_limit_cpus", *labels] == 3
        assert found["tenure_lease_end_timestamp_seconds", *labels] == held.ends_at_s
        assert (found["tenure_node_cpus", "a"], found["tenure_node_held_cpus", "a"]) == (4, 3)
        assert (found["tenure_node_up", "a"], found["tenure_node_state", "a", "up"]) == (1, 1)
        assert (found["tenure_leases", "ada", "active"], found["tenure_leases", "bob", "queued"]) == (1, 1)
        assert (found["tenure_queue_leases", "bob"], found["tenure_queue_cpus", "bob"]) == (1, 2)
        assert found["tenure_queue_oldest_wait_seconds",] == pytest.approx(30, abs=2)

    play(scene)


def test_a_lease_that_ended_leaves_its_series_and_is_counted_once(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, "one", cpus=1)
        await world.ask("release", lease_ids=(lease.id,))
        await world.after(20)
        found = figures(world)
        assert found["tenure_leases_ended_total", "ada", "released"] == 1
        assert not any(lease.id in key for key in found)

    play(scene)


def test_a_node_that_does_not_answer_is_down_and_keeps_its_figures(play) -> None:
    async def scene(world: World) -> None:
        world.fleet.cut("b")
        await world.settle()
        found = figures(world)
        assert (found["tenure_node_up", "a"], found["tenure_node_up", "b"]) == (1, 0)
        assert found["tenure_node_state", "b", "unreachable"] == 1

    play(scene, node("a"), node("b"))


def test_every_metric_is_named_by_the_house_and_stands_on_the_page_and_no_other_does() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) for name in names)
    page = Path("docs/metering.md").read_text()
    told = set(re.findall(r"`(tenure_[a-z_]+)`", page))
    assert told == set(names)


# --- the door ---


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


async def read(port: int, request: bytes) -> tuple[bytes, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        answer = await reader.read()
    finally:
        writer.transport.abort()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def with_door(scene) -> None:
    async def all_of_it() -> None:
        door = MetricsDoor(lambda: b"tenure_things 1\n")
        await door.open(free_port())
        try:
            await scene(door)
        finally:
            await door.close()

    asyncio.run(all_of_it())


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200", b"tenure_things 1\n"),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", b"200", b"tenure_things 1\n"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200", b""),
        (b"GET / HTTP/1.1\r\n\r\n", b"404", b"metrics are at /metrics\n"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405", b"metrics can only be read\n"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST_BYTES + b"\r\n\r\n", b"431", b"the request is too long\n"),
    ],
    ids=["get", "with a query", "head", "elsewhere", "post", "too long"],
)
def test_the_door_answers_what_it_is_asked(request_, status, body) -> None:
    async def scene(door: MetricsDoor) -> None:
        head, found = await read(door.port, request_)
        assert head.startswith(b"HTTP/1.1 " + status)
        assert found == body

    with_door(scene)


def test_readers_that_never_ask_keep_nobody_else_out_for_long(monkeypatch) -> None:
    monkeypatch.setattr("tenure.broker.metrics_door.REQUEST_MAX_S", 0.2)

    async def scene(door: MetricsDoor) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(MAX_CONNECTIONS)]
        with pytest.raises(ConnectionResetError):
            await read(door.port, b"GET /metrics HTTP/1.1\r\n\r\n")
        for reader, writer in silent:
            assert await reader.read() == b"", "it is hung up on"
            writer.close()
            await writer.wait_closed()
        head, _ = await read(door.port, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")

    with_door(scene)


def test_a_port_in_use_is_refused_and_the_door_stays_where_it_was() -> None:
    async def scene(door: MetricsDoor) -> None:
        before = door.port
        other = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        taken = other.sockets[0].getsockname()[1]
        with pytest.raises(Refused, match=f"{taken}.*another port"):
            await door.open(taken)
        with pytest.raises(SpecError, match="between 1 and 65535"):
            await door.open(70000)
        assert (await read(before, b"GET /metrics HTTP/1.1\r\n\r\n"))[1] == b"tenure_things 1\n"
        other.close()

    with_door(scene)
