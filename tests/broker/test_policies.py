"""What a tenant may hold, reserve, renew; what its holders are told before a lease ends."""

from __future__ import annotations

import json

import pytest

from tenure import wire
from tenure.errors import Refused, SpecError
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.resources import Envelope
from tenure.runs import RunFiles
from tenure.tenants import Policy

from .conftest import MIB, World, node


async def ask(world: World, name: str, *, cpus=0.5, tenant="t", slot_s=1000.0, total_s=10_000.0, starts_at_s=0.0, mib=64):
    envelope = Envelope(cpus=cpus, memory_bytes=mib * MIB, slot_s=slot_s, total_s=total_s)
    member = wire.GangMember(worker=0, envelope=envelope, command=Command(argv=("work",)))
    asked = {"gang_id": name, "run_id": name, "stage": "s", "tenant": tenant, "members": (member,), "queue_s": 60.0}
    (lease,) = await world.ask("request_gang", **asked, starts_at_s=starts_at_s)
    return world.lease(lease.id)


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        (Policy(max_leases=1), "1 leases"),
        (Policy(max_cpus=0.9), "0.5 cpus"),
        (Policy(max_memory_bytes=100 * MIB), "64.0 MiB of memory"),
    ],
    ids=["leases", "cpus", "memory"],
)
def test_past_a_quota_a_tenant_gets_no_more_and_others_do(play, policy, what) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=policy)
        first = await ask(world, "one")
        with pytest.raises(Refused, match=f"tenant t has {what}.*quota"):
            await ask(world, "two")
        assert (await ask(world, "one")).id == first.id, "asking again is no second request"
        assert (await ask(world, "other", tenant="u")).state is LeaseState.ACTIVE
        await world.ask("release", lease_ids=(first.id,))
        await world.settle()
        assert (await ask(world, "two")).state is LeaseState.ACTIVE

    play(scene)


def test_a_resize_past_the_quota_is_refused_and_one_below_is_not(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="*", policy=Policy(max_memory_bytes=128 * MIB))
        lease = await ask(world, "one")
        with pytest.raises(Refused, match="quota is 128"):
            await world.ask("resize", lease_id=lease.id, envelope=Envelope(cpus=0.5, memory_bytes=129 * MIB))
        resized = await world.ask("resize", lease_id=lease.id, envelope=Envelope(cpus=1, memory_bytes=128 * MIB))
        assert resized.envelope.memory_bytes == 128 * MIB

    play(scene)


def test_an_own_policy_goes_before_everybodys_and_both_outlive_the_broker(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="*", policy=Policy(max_leases=0))
        await world.ask("set_policy", tenant="t", policy=Policy(max_leases=1))
        await world.restart()
        assert set(await world.ask("policies")) == {"*", "t"}
        await ask(world, "one")
        with pytest.raises(Refused):
            await ask(world, "two", tenant="u")
        await world.ask("set_policy", tenant="t", policy=None)
        assert set(await world.ask("policies")) == {"*"}
        assert world.events("policy") == ["policy.set"] * 3

    play(scene)


def test_what_makes_no_sense_as_a_policy_is_refused() -> None:
    with pytest.raises(SpecError, match="max_cpus"):
        Policy(max_cpus=-1)
    with pytest.raises(SpecError, match="first shrunk"):
        Policy(idle_warn_s=10, idle_reclaim_s=5)


def test_a_holder_renews_as_far_as_its_policy_lets_it(play) -> None:
    async def scene(world: World) -> None:
        await world.ask("set_policy", tenant="t", policy=Policy(max_slot_s=2000.0, max_total_s=10_000.0))
        with pytest.raises(Refused, match="slot of 50min"):
            await ask(world, "long", slot_s=3000.0)
        with pytest.raises(Refused, match="total of"):
            await ask(world, "long", total_s=20_000.0)
        lease = await ask(world, "one")
        with pytest.raises(Refused, match="renewal of lease l1 refused: its time of 1h"):
            await world.ask("renew", lease_id=lease.id, for_s=3600.0)
        renewed = await world.ask("renew", lease_id=lease.id, for_s=2000.0)
        assert renewed.ends_at_s == world.clock.now_s + 2000.0

    play(scene)


def test_a_reservation_begins_at_its_time_and_not_before(play) -> None:
    async def scene(world: World) -> None:
        begins_s = world.clock.now_s + 500.0
        lease = await ask(world, "later", cpus=4, starts_at_s=begins_s)
        assert (lease.state, lease.node, lease.starts_at_s) == (LeaseState.RESERVED, "a", begins_s)
        short = await ask(world, "short", slot_s=400.0)
        assert short.state is LeaseState.ACTIVE
        assert (await ask(world, "long")).state is LeaseState.QUEUED
        with pytest.raises(Refused, match=r"no node will have room .*free then"):
            await ask(world, "same", cpus=1, starts_at_s=begins_s)
        capped = await world.ask("renew", lease_id=short.id, for_s=1000.0)
        assert capped.ends_at_s == begins_s
        with pytest.raises(Refused, match=f"reserved from then on \\(lease {lease.id}\\)"):
            await world.ask("renew", lease_id=short.id, for_s=1000.0)
        await world.restart()
        await world.after(499.0, step_s=10.0)
        assert world.lease(lease.id).state is LeaseState.RESERVED
        from tenure.protocols import Exit, ExitKind

        world.fleet.finish(short.id, Exit(kind=ExitKind.OUT_OF_TIME, ended_at_s=world.clock.now_s))
        await world.after(2.0)
        assert world.lease(lease.id).state is LeaseState.ACTIVE
        assert world.lease(lease.id).ends_at_s == pytest.approx(begins_s + 1000.0, abs=3.0)
        assert world.events("lease.reserved") == ["lease.reserved"]

    play(scene)


def test_a_reservation_that_is_given_up_never_held_and_its_room_is_free(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, "later", cpus=4, starts_at_s=world.clock.now_s + 100.0)
        await world.after(50)
        await world.ask("release", lease_ids=(lease.id,))
        ended = world.lease(lease.id)
        assert (ended.end_reason, ended.held_s) == (EndReason.RELEASED, 0.0)
        assert (await ask(world, "long")).state is LeaseState.ACTIVE

    play(scene)


def test_a_resize_does_not_take_what_is_reserved_within_its_time(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, "one", slot_s=1000.0)
        await ask(world, "later", cpus=3.5, starts_at_s=world.clock.now_s + 500.0)
        with pytest.raises(Refused, match="has reserved that room within its time"):
            await world.ask("resize", lease_id=lease.id, envelope=Envelope(cpus=1.0, memory_bytes=64 * MIB))

    play(scene)


def test_one_that_begins_too_far_ahead_is_refused(play) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(Refused, match="time until it begins of 15d is past what tenant t may have, 14d"):
            await ask(world, "later", starts_at_s=world.clock.now_s + 15 * 86400.0)

    play(scene)


def told(world: World, lease) -> dict:
    files = RunFiles(world.home, lease.run_id)
    return json.loads((files.worker("s", 0, lease.attempt) / "notice.json").read_text())


def test_a_holder_is_told_before_its_slot_ends_in_an_event_its_log_and_its_folder(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, "one", slot_s=1000.0)
        files = RunFiles(world.home, lease.run_id)
        files.worker("s", 0, lease.attempt).mkdir(parents=True)
        files.logs("s").mkdir(parents=True)
        log = files.logs("s") / f"0.{lease.attempt}.log"
        log.write_text("working")
        await world.after(690)
        assert not world.events("lease.expiring")
        await world.after(20)
        assert world.events("lease.expiring") == ["lease.expiring"]
        assert f"tenure renew {lease.id}" in told(world, lease)["text"]
        assert log.read_text().startswith("working\n[tenure] lease l1 ends in 5min")
        await world.ask("renew", lease_id=lease.id, for_s=1000.0)
        await world.after(600)
        assert len(world.events("lease.expiring")) == 1
        await world.after(350)
        assert len(world.events("lease.expiring")) == 3, "5 min and 1 min before the new end"

    play(scene)


def test_a_notice_follows_no_link_that_a_job_put_in_its_folder(play, tmp_path) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, "one", slot_s=1000.0)
        folder = RunFiles(world.home, lease.run_id).worker("s", 0, lease.attempt)
        folder.mkdir(parents=True)
        victim = tmp_path / "victim"
        victim.write_text("mine")
        (folder / "notice.json").symlink_to(victim)
        await world.after(720)
        assert victim.read_text() == "mine"
        assert told(world, lease)["lease_id"] == lease.id

    play(scene)


def test_one_whose_total_is_spent_is_told_to_save(play) -> None:
    async def scene(world: World) -> None:
        lease = await ask(world, "one", slot_s=1000.0, total_s=1000.0)
        RunFiles(world.home, lease.run_id).worker("s", 0, lease.attempt).mkdir(parents=True)
        await world.after(720)
        assert "total time is spent then" in told(world, lease)["text"]

    play(scene, node("a"))
