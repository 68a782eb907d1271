"""Cuts between broker and agent, shorter and longer than the node's term, with real agents and shims."""

from __future__ import annotations

import os
import signal

import pytest

from tenure import orders
from tenure.errors import StaleFence, Unavailable
from tenure.fleet import local
from tenure.leases import EndReason, LeaseState
from tenure.runtimes.process import ProcessRuntime

from .conftest import Real, until

pytestmark = pytest.mark.real


def states_of(real: Real, node: str) -> list[str]:
    from tenure.ledger import queries

    with real.ledger.reading() as connection:
        found = queries.events_after(connection, 0, run_id="", max_events=10_000)
    return [event.kind for event in found if event.node == node and event.kind.startswith("node.")]


def test_a_cut_shorter_than_the_term_changes_nothing_also_when_the_agent_died_of_it(play) -> None:
    async def scene(real: Real) -> None:
        lease = await real.job("one")
        before, shim = real.lease(lease.id), real.state(lease.id, "shim.json")
        os.kill(real.agent_pid(lease.node), signal.SIGKILL)
        await until(lambda: states_of(real, lease.node)[-2:] == ["node.unreachable", "node.up"], "it is reached again")
        os.kill(real.agent_pid(lease.node), signal.SIGSTOP)
        real.fleet._clients[lease.node]._writer.transport.abort()
        await until(lambda: states_of(real, lease.node)[-1] == "node.unreachable", "the cut is seen")
        os.kill(_stopped(real, lease.node), signal.SIGCONT)
        await until(lambda: states_of(real, lease.node)[-1] == "node.up", "it is reached again")
        seen = len(real.beats(lease.id))
        await until(lambda: len(real.beats(lease.id)) > seen, "it beats on")
        assert (real.lease(lease.id), real.state(lease.id, "shim.json")) == (before, shim)
        assert "node.lost" not in states_of(real, lease.node)

    play(scene)


def _stopped(real: Real, node: str) -> int:
    lock = real.home / "nodes" / node / "agent.lock"
    for name in os.listdir("/proc"):
        if name.isdigit() and _holds(int(name), str(lock)):
            return int(name)
    raise AssertionError(f"no process holds {lock}")


def _holds(pid: int, path: str) -> bool:
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") == path for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


@pytest.mark.parametrize("gone", ["agent", "broker"])
def test_a_cut_longer_than_the_term_ends_the_lease_before_it_is_granted_again(play, gone: str) -> None:
    switched_off = pytest.MonkeyPatch()

    async def scene(real: Real) -> None:
        lease = await real.job("one")
        other = await real.job("other")
        assert lease.node != other.node
        if gone == "agent":  # and nobody starts it anew: its shims go by the term they know of
            switched_off.setattr(local, "start_agent", refuse)
            os.kill(real.agent_pid(lease.node), signal.SIGKILL)
            await real.ask("release", lease_ids=(other.id,))
        else:  # it says nothing for longer than the term: the agents end what they hold, and leave
            real.pause()
            await until(lambda: not any(map(real.has_agent, "ab")), "the agents leave at their terms' end")
            assert real.lease(lease.id).state is not LeaseState.GRANTING
            real.go_on()
        again = await real.job("again")
        ended = real.lease(lease.id)
        assert (ended.state, ended.end_reason) == (LeaseState.ENDED, EndReason.NODE_LOST) or gone == "agent"
        await until(lambda: real.lease(lease.id).state is LeaseState.ENDED, "the lease is given up")
        assert real.lease(lease.id).end_reason is EndReason.NODE_LOST
        ended_boot_s = real.clock.boot_s() - (real.clock.utc_s() - real.lease(lease.id).ended_at_s)
        assert real.beats(lease.id)[-1] < ended_boot_s
        switched_off.undo()
        if gone == "broker":
            assert real.beats(lease.id)[-1] < real.beats(again.id)[0]
        else:
            assert "term" in real.state(lease.id, "exit.json")["witness"]

    def refuse(*args: object, **fields: object) -> None:
        raise Unavailable("the node is switched off")

    play(scene, term_s=5.0)


def test_orders_of_a_broker_that_was_followed_by_another_are_refused_by_agent_and_runtime(play) -> None:
    async def scene(real: Real) -> None:
        lease = await real.job("one")
        old, client = real.broker, real.fleet._clients[lease.node]
        real.pause()
        old_fleet, old_ledger = real.fleet, real.ledger
        old_ledger.close()
        await real.open()
        assert real.broker.fence > old.fence
        with pytest.raises(StaleFence):
            await client.call("stop", orders.AgentStop(lease_id=lease.id, fence=lease.fence))
        with pytest.raises(StaleFence):
            await client.call("renew", orders.AgentRenew(lease_id=lease.id, fence=lease.fence, deadline_boot_s=0.0))
        with pytest.raises(StaleFence, match="older"):
            await old_fleet.call(lease.node, "term", orders.NodeTerm(term_s=1.0, broker_fence=old.fence))
        runtime = ProcessRuntime(real.home / "nodes" / lease.node)
        with pytest.raises(StaleFence):
            runtime.stop(runtime.attach(lease.id), grace_s=0.0, fence=lease.fence - 1)
        runtime.close()
        await old.book.close()
        await old_fleet.close()
        assert real.lease(lease.id).state is LeaseState.ACTIVE
        seen = len(real.beats(lease.id))
        await until(lambda: len(real.beats(lease.id)) > seen, "it beats on")

    play(scene)
