import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import gone, until

from tenure import codec, orders, wire
from tenure.agent.start import start_agent
from tenure.broker.nodes import MARGIN_S
from tenure.errors import Conflict, Refused, StaleFence, Unavailable, Unsupported
from tenure.protocols import ExitKind, StartSpec
from tenure.resources import Envelope
from tenure.sockets import AsyncLineClient, LineClient

pytestmark = pytest.mark.real


class Node:
    """An agent of its own in a folder of its own."""

    def __init__(self, home, name="n1"):
        self.home, self.name, self.socket = Path(home), name, Path(home) / f"{name}.sock"
        self.fence = 0

    def up(self, *, term_s=30.0, cpus=0.1, memory_bytes=128 << 20, **fields):
        start_agent(self.home, self.name, self.socket, term_s=term_s, cpus=cpus, memory_bytes=memory_bytes, **fields)
        return self.client()

    def client(self):
        return LineClient(self.socket, orders.AGENT_OPS, who="test")

    def pid(self):
        client = self.client()
        client.close()
        return client.welcome.pid

    def spec(self, *argv, boot, lease="lease-1", slot_s=60.0):
        worker = self.home / "runs" / lease
        return StartSpec(
            lease_id=lease, fence=1, attempt=1, argv=argv, workdir=str(worker), worker_dir=str(worker),
            log_path=str(self.home / f"{lease}.log"), envelope=Envelope(memory_bytes=64 << 20),
            deadline_boot_s=boot.boot_s + slot_s, boot_id=boot.boot_id,
        )  # fmt: skip

    def exit_of(self, lease="lease-1"):
        path = self.home / "nodes" / self.name / "leases" / lease / "exit.json"
        until(path.exists, "an exit record")
        return json.loads(path.read_text())


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setenv("TENURE_SHARES_FILE", str(tmp_path / "shares.json"))
    made = Node(tmp_path)
    yield made
    try:
        pid = made.pid()
    except Unavailable:
        return
    os.kill(pid, signal.SIGTERM)
    until(lambda: not made.socket.exists(), "the agent has left")


def term(client, *, term_s=30.0, fence=1):
    return client.call("term", orders.NodeTerm(term_s=term_s, broker_fence=fence))


def test_an_agent_describes_its_node_and_the_part_of_the_machine_it_offers(node):
    client = node.up()
    described = client.call("describe", wire.Nothing())
    client.close()
    assert (described.name, described.capacity.cpus, described.capacity.memory_bytes) == ("n1", 0.1, 128 << 20)
    assert described.confinement["process"]
    assert described.bounds["process"]["slot_s"] == "exact"


def test_an_agent_starts_renews_looks_into_stops_and_forgets_a_lease(node):
    client = node.up()
    boot = term(client)
    handle = client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=boot)))
    with pytest.raises(Conflict):
        client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=boot)))
    with pytest.raises(Unsupported):
        client.call("start", orders.AgentStart(runtime="container", spec=node.spec("true", boot=boot, lease="other")))
    client.call("renew", orders.AgentRenew(lease_id="lease-1", fence=1, deadline_boot_s=boot.boot_s + 100))
    client.call("resize", orders.AgentResize(lease_id="lease-1", fence=1, envelope=Envelope(memory_bytes=80 << 20)))
    assert client.call("exec", wire.Exec(lease_id="lease-1", argv=("echo", "in"))).output == "in\n"
    (view,) = client.call("attempts", wire.Nothing())
    assert (view.handle, view.exit) == (handle, None)
    with pytest.raises(StaleFence):
        client.call("stop", orders.AgentStop(lease_id="lease-1", fence=0))
    client.call("stop", orders.AgentStop(lease_id="lease-1", fence=1, grace_s=0))
    node.exit_of()
    until(lambda: client.call("attempts", wire.Nothing())[0].exit, "the agent sees the end")
    client.call("forget", wire.LeaseRef(lease_id="lease-1"))
    assert client.call("attempts", wire.Nothing()) == ()
    client.close()


def test_an_agent_tells_the_usage_and_at_once_the_end_of_each_attempt(node):
    node.up().close()
    seen = []

    async def watch():
        client = AsyncLineClient(
            node.socket, orders.AGENT_OPS, who="broker", on_note=lambda name, data: seen.append((name, data))
        )
        await client.connect()
        boot = await client.call("term", orders.NodeTerm(term_s=30, broker_fence=1))
        await client.call("start", orders.AgentStart(spec=node.spec("sleep", "1.5", boot=boot)))
        deadline = time.monotonic() + 20
        while not (seen and seen[-1][1].get("exit")) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await client.close()

    asyncio.run(watch())
    views = [codec.from_builtins(data, orders.AttemptView) for name, data in seen if name == "attempt"]
    assert views[0].exit is None
    assert views[0].usage.processes == 1
    assert views[-1].exit.kind is ExitKind.COMPLETED


def test_a_broker_with_an_older_fence_is_refused_also_after_the_agents_death(node):
    client = node.up()
    boot = term(client, fence=7)
    newer = node.client()
    term(newer, fence=8)
    with pytest.raises(StaleFence):
        client.call("start", orders.AgentStart(spec=node.spec("true", boot=boot)))
    newer.close()
    client.close()
    os.kill(node.pid(), signal.SIGKILL)
    client = node.up()
    with pytest.raises(StaleFence, match="older"):
        term(client, fence=7)
    client.close()


def test_an_agent_killed_and_started_again_finds_its_leases(node):
    client = node.up()
    handle = client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=term(client))))
    client.close()
    os.kill(node.pid(), signal.SIGKILL)
    client = node.up()
    (view,) = client.call("attempts", wire.Nothing())
    assert (view.handle, view.exit) == (handle, None)
    client.call("stop", orders.AgentStop(lease_id="lease-1", fence=1, grace_s=0))
    assert node.exit_of()["kind"] == "stopped"
    client.close()


def test_an_unrenewed_term_ends_the_leases_and_then_the_agent(node):
    client = node.up()
    boot = term(client, term_s=1.0)
    client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=boot)))
    client.close()
    assert "term" in node.exit_of()["witness"]
    until(lambda: not node.socket.exists(), "the agent has left")


def test_a_term_that_ends_while_the_agent_is_dead_ends_the_leases_too(node):
    client = node.up()
    boot = term(client, term_s=1.5)
    handle = client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=boot)))
    client.close()
    os.kill(node.pid(), signal.SIGKILL)
    assert "term" in node.exit_of()["witness"]
    until(lambda: gone(handle.pid), "the shim has left")


def test_leaving_ends_what_runs(node):
    client = node.up()
    client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=term(client))))
    client.call("shutdown", wire.Nothing())
    client.close()
    assert node.exit_of()["kind"] == "stopped"
    until(lambda: not node.socket.exists(), "the agent has left")


def test_a_part_that_another_home_holds_is_refused_with_its_holder(node, tmp_path):
    node.up(cpus=None, memory_bytes=None).close()
    other = Node(tmp_path / "other", "n2")
    with pytest.raises(Refused, match=f"node n1 of {tmp_path}"):
        other.up(cpus=0.5)


def test_starting_an_agent_that_runs_is_no_error(node):
    node.up().close()
    pid = node.pid()
    node.up().close()
    assert node.pid() == pid


def test_an_agent_that_cannot_come_up_is_reported_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TENURE_SHARES_FILE", str(tmp_path / "shares.json"))
    with pytest.raises(Unavailable, match=r"(?s)ended with code 2.*invalid choice"):
        start_agent(tmp_path, "n1", tmp_path / "s", term_s=1, confine="magic")


def test_an_order_that_comes_on_a_replaced_connection_is_refused(node):
    client = node.up()
    boot = term(client, fence=3)
    newer = node.client()
    term(newer, fence=3)
    with pytest.raises(StaleFence, match="newer connection"):
        client.call("start", orders.AgentStart(spec=node.spec("true", boot=boot)))
    assert newer.call("attempts", wire.Nothing()) == ()
    newer.close()
    client.close()


def test_an_attempt_older_than_one_that_was_started_is_refused(node):
    client = node.up()
    spec = replace(node.spec("true", boot=term(client)), attempt=2)
    client.call("start", orders.AgentStart(spec=spec))
    node.exit_of()
    with pytest.raises(Conflict, match="too late"):
        client.call("start", orders.AgentStart(spec=replace(spec, attempt=1)))
    client.close()


def test_a_term_does_not_go_past_what_its_order_says_however_late_it_comes(node):
    client = node.up()
    boot = term(client)
    order = orders.NodeTerm(term_s=60, broker_fence=1, ends_boot_s=boot.boot_s + 1.0, boot_id=boot.boot_id)
    client.call("start", orders.AgentStart(spec=node.spec("sleep", "60", boot=boot)))
    client.call("term", order)
    client.close()
    assert "term" in node.exit_of()["witness"]


def test_a_job_that_ignores_sigterm_is_gone_within_the_margin_after_the_term(node):
    client = node.up()
    boot = term(client)
    spec = replace(node.spec("sh", "-c", "trap '' TERM; sleep 60 & wait; wait", boot=boot), grace_s=50.0)
    client.call("start", orders.AgentStart(spec=spec))
    boot = term(client, term_s=0.5)
    client.close()
    os.kill(node.pid(), signal.SIGKILL)
    record = node.exit_of()
    assert record["kind"] == "stopped", record
    assert record["ended_at_s"] - boot.utc_s - 0.5 <= MARGIN_S
