"""Idle leases: shrunk, told, ended, by policy; and whatever computes, untouched."""

from __future__ import annotations

import json

import pytest

from tenure import wire
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.resources import Envelope
from tenure.runs import RunFiles
from tenure.tenants import Policy
from tenure.usage import Usage

from .conftest import MIB, World

POLICY = Policy(idle_shrink_s=300.0, idle_warn_s=600.0, idle_reclaim_s=900.0)


async def ask(world: World, name: str = "one", *, on_event=False, cpus=2.0):
    envelope = Envelope(cpus=cpus, memory_bytes=64 * MIB, slot_s=50_000.0, total_s=100_000.0)
    member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("work",), on_event=on_event))
    asked = {"gang_id": name, "run_id": name, "stage": "s", "tenant": "t", "members": (member,), "queue_s": 60.0}
    (lease,) = await world.ask("request_gang", **asked)
    return world.lease(lease.id)


class Working:
    """Reports a lease's usage as time goes on."""

    def __init__(self, world: World, lease) -> None:
        self.world, self.lease, self.cpu_s = world, lease, 0.0

    async def go_on(self, seconds: float, *, cpus: float = 0.0, gpu_busy: float = 0.0) -> None:
        for _ in range(round(seconds / 5)):
            self.cpu_s += 5 * cpus
            if self.world.lease(self.lease.id).state is not LeaseState.ENDED:
                usage = Usage(at_s=self.world.clock.now_s, cpu_s=self.cpu_s, gpu_busy=gpu_busy, processes=5)
                self.world.fleet.use(self.lease.id, usage)
            await self.world.after(5, step_s=5)

    @property
    def now(self):
        return self.world.lease(self.lease.id)


def test_an_idle_lease_is_shrunk_then_its_holder_told_then_it_is_ended(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="*", policy=POLICY)
        work = Working(world, await ask(world))
        RunFiles(world.home, "one").worker("s", 0, 1).mkdir(parents=True)
        await work.go_on(600, cpus=1.0)
        await work.go_on(280)
        assert work.now.envelope.cpus == 2.0
        await work.go_on(60)
        assert (work.now.envelope.cpus, work.now.full_cpus, work.now.state) == (0.1, 2.0, LeaseState.ACTIVE)
        await work.go_on(300)
        notice = json.loads((RunFiles(world.home, "one").worker("s", 0, 1) / "notice.json").read_text())
        assert "unless something computes" in notice["text"]
        await work.go_on(300)
        assert work.now.end_reason is EndReason.RECLAIMED_IDLE
        assert "CPU and GPU were idle for 15" in work.now.end_detail
        kinds = [kind for kind in world.events("lease.") if kind in ("lease.shrunk", "lease.idle", "lease.draining")]
        assert kinds == ["lease.shrunk", "lease.idle", "lease.draining"]

    play(scene)


@pytest.mark.parametrize(("cpus", "gpu_busy"), [(1.0, 0.0), (0.08, 0.0), (0.0, 0.3)], ids=["cpu", "little", "gpu"])
def test_what_computes_with_nobody_connected_is_left_alone(play, cpus, gpu_busy) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=POLICY)
        work = Working(world, await ask(world))
        await work.go_on(3000, cpus=cpus, gpu_busy=gpu_busy)
        assert (work.now.state, work.now.envelope.cpus) == (LeaseState.ACTIVE, 2.0)
        assert not [kind for kind in world.events("lease.") if kind in ("lease.shrunk", "lease.idle")]

    play(scene)


def test_what_works_again_gets_its_cpu_back_and_counts_from_the_beginning(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=POLICY)
        work = Working(world, await ask(world))
        await work.go_on(400)
        assert work.now.envelope.cpus == 0.1
        await work.go_on(30, cpus=0.1)
        assert (work.now.envelope.cpus, work.now.full_cpus) == (2.0, 0.0)
        await work.go_on(280)
        assert work.now.envelope.cpus == 2.0
        assert world.events("lease.grown") == ["lease.grown"]

    play(scene)


def test_cpu_that_others_have_meanwhile_comes_back_when_they_are_done(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=Policy(idle_shrink_s=300.0))
        work = Working(world, await ask(world))
        await work.go_on(400)
        other = await ask(world, "other", cpus=3.5)
        assert other.state is LeaseState.ACTIVE
        await work.go_on(60, cpus=0.1)
        assert work.now.envelope.cpus == 0.1
        await world.ask("release", lease_ids=(other.id,))
        await work.go_on(30, cpus=0.1)
        assert work.now.envelope.cpus == 2.0

    play(scene)


def test_what_its_holder_says_while_it_is_shrunk_holds(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=Policy(idle_shrink_s=300.0))
        work = Working(world, await ask(world))
        await work.go_on(400)
        await world.ask("resize", lease_id=work.lease.id, envelope=Envelope(cpus=1.0, memory_bytes=64 * MIB))
        await work.go_on(30, cpus=0.5)
        assert (work.now.envelope.cpus, work.now.full_cpus) == (1.0, 0.0)

    play(scene)


def test_without_a_policy_or_without_word_from_the_node_nothing_is_done(play) -> None:
    async def scene(world: World) -> None:
        quiet = Working(world, await ask(world))
        await quiet.go_on(2000)
        assert quiet.now.state is LeaseState.ACTIVE
        await world.ask("set_policy", tenant="t", policy=POLICY)
        silent = await ask(world, "silent")
        world.fleet.use(silent.id, Usage(at_s=world.clock.now_s))
        await world.after(2000, step_s=10)
        assert world.lease(silent.id).state is LeaseState.ACTIVE, "its node tells nothing new"

    play(scene)


def test_a_lease_that_waits_for_events_may_rest(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=POLICY)
        lease = await ask(world, on_event=True)
        await world.after(2000, step_s=10)
        assert world.lease(lease.id).state is LeaseState.ACTIVE

    play(scene)
