"""Placement: gangs whole or not at all, nothing over-granted, and a state that events alone rebuild."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.codec import to_builtins
from tenure.decide.packing import TOLERANCE, pack, room_with
from tenure.decide.placement import Placement, Plan
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState, changed, granted
from tenure.nodes import Machine, Node, NodeState
from tenure.resources import Capacity, Envelope, Gpu

GIB = 1 << 30
COMMAND = Command(argv=("true",))


def a_node(name, cpus=2.0, memory_gib=16.0, gpus=()):
    capacity = Capacity(cpus=cpus, memory_bytes=int(memory_gib * GIB), disk_bytes=100 * GIB, gpus=gpus)
    return Node(name=name, capacity=capacity, machine=Machine(cpu_model="test"))


def a_lease(name, gang="", *, cpus=1.0, memory_gib=1.0, at_s=0.0, run="r", worker=0, gpus=0.0, gpu_gib=0.0):
    envelope = Envelope(cpus=cpus, memory_bytes=int(memory_gib * GIB), gpus=gpus, gpu_memory_bytes=int(gpu_gib * GIB))
    return Lease(
        id=name, run_id=run, stage="s", worker=worker, gang_id=gang, envelope=envelope, command=COMMAND, requested_at_s=at_s
    )


class World:
    """A ledger in miniature: events in order, and the fold that follows them."""

    def __init__(self):
        self.fold, self.events, self.leases = Placement(), [], {}

    def up(self, *nodes):
        for node in nodes:
            self.hear(node.name, "node.up", {"node": to_builtins(node)})

    def hear(self, node, kind, data=None):
        event = Event(seq=len(self.events) + 1, at_s=0.0, kind=kind, who="broker", node=node, data=data or {})
        self.events.append(event)
        self.fold.apply(event)

    def put(self, lease):
        self.leases[lease.id] = lease
        self.hear("", f"lease.{lease.state}", {"lease": to_builtins(lease)})

    def ask(self, *leases):
        for lease in leases:
            self.put(lease)

    def grant(self, plan: Plan):
        for grant in plan.grants:
            lease = self.leases[grant.lease_id]
            self.put(granted(lease, node=grant.node, devices=grant.devices, fence=1, now_s=1.0))

    def end(self, lease_id):
        self.put(changed(self.leases[lease_id], LeaseState.ENDED, end_reason=EndReason.COMPLETED, ended_at_s=2.0))

    def rebuilt(self):
        fold = Placement()
        for event in self.events:
            fold.apply(event)
        return fold


def test_a_gang_is_granted_whole_or_not_at_all():
    world = World()
    world.up(a_node("a", cpus=2))
    world.ask(a_lease("x", cpus=1, at_s=1))
    world.grant(world.fold.plan(1.0))
    world.ask(*(a_lease(f"g{i}", "g", worker=i, at_s=2, run="q") for i in range(2)))
    plan = world.fold.plan(2.0)
    assert plan.grants == ()
    assert set(plan.waiting) == {"g0", "g1"}
    assert "needs 1 cpus" in plan.waiting["g0"] or "together" in plan.waiting["g0"]
    world.end("x")
    assert [grant.lease_id for grant in world.fold.plan(3.0).grants] == ["g0", "g1"]


def test_a_gang_that_never_fits_is_impossible_with_the_reason_of_each_node():
    world = World()
    world.up(a_node("a"), a_node("b", memory_gib=8))
    world.ask(a_lease("big", memory_gib=24))
    (impossible,) = world.fold.plan(0.0).impossible
    assert impossible.reasons == {
        "a": "needs 24.0 GiB of memory; node has 16.0 GiB",
        "b": "needs 24.0 GiB of memory; node has 8.0 GiB",
    }


def test_a_gang_too_large_only_as_a_whole_says_so():
    world = World()
    world.up(a_node("a"), a_node("b"))
    world.ask(*(a_lease(f"g{i}", "g", worker=i) for i in range(5)))
    impossible = world.fold.plan(0.0).impossible
    assert len(impossible) == 5
    assert "5 leases together: needs 5 cpus; all nodes have 4" in impossible[0].reasons["gang"]


def test_an_empty_fleet_makes_leases_wait_and_rules_nothing_out():
    world = World()
    world.ask(a_lease("x"), a_lease("gpu", gpus=0.5, at_s=1))
    assert world.fold.plan(0.0) == Plan(waiting={"x": "no node is up", "gpu": "waits behind x"})
    world.end("x")
    assert world.fold.plan(0.0) == Plan(waiting={"gpu": "no node is up"})
    assert world.fold.what_if([a_lease("y")]) == {"fleet": "no node is up"}


def test_first_come_first_served_and_small_requests_do_not_pass_a_waiting_gang():
    world = World()
    world.up(a_node("a", cpus=2))
    world.ask(a_lease("first", cpus=1, at_s=1, run="one"))
    world.grant(world.fold.plan(1.0))
    world.ask(a_lease("large", cpus=2, at_s=2, run="two"), a_lease("small", cpus=1, at_s=3, run="three"))
    plan = world.fold.plan(3.0)
    assert plan.grants == ()
    assert plan.waiting["small"] == "waits behind large"


def test_a_run_that_holds_a_lease_is_not_made_to_wait_for_a_newcomer():
    world = World()
    world.up(a_node("a", cpus=2))
    world.ask(a_lease("server", cpus=1, at_s=1, run="one"))
    world.grant(world.fold.plan(1.0))
    world.ask(a_lease("newcomer", cpus=2, at_s=2, run="two"), a_lease("client", cpus=1, at_s=3, run="one"))
    assert [grant.lease_id for grant in world.fold.plan(3.0).grants] == ["client"]


def test_best_fit_prefers_the_node_left_with_least_memory_then_cpus_then_name():
    world = World()
    world.up(a_node("roomy", memory_gib=16), a_node("snug", memory_gib=4), a_node("also-snug", memory_gib=4, cpus=1))
    world.ask(a_lease("x"))
    assert world.fold.plan(0.0).grants[0].node == "also-snug"


def test_mixed_gangs_that_best_fit_cannot_pack_are_found_by_search():
    rooms = {name: room_with(Capacity(cpus=10, memory_bytes=10 * GIB), ()) for name in "ab"}
    sizes = (4, 4, 3, 3, 3, 3)
    packing, _ = pack([Envelope(memory_bytes=size * GIB) for size in sizes], rooms)
    assert packing is not None
    assert sum(size for size, (node, _) in zip(sizes, packing, strict=True) if node == "a") == 10
    assert pack([Envelope(memory_bytes=size * GIB) for size in (4, 4, 4, 3, 5)], rooms) == (None, True)


def test_gpu_fractions_are_counted_per_device_never_as_a_sum():
    gpus = (Gpu(index=0, memory_bytes=16 * GIB), Gpu(index=1, memory_bytes=16 * GIB))
    world = World()
    world.up(a_node("g", cpus=8, gpus=gpus))
    world.ask(a_lease("x", gpus=0.6, at_s=1), a_lease("y", gpus=0.6, at_s=2), a_lease("z", gpus=0.6, at_s=3))
    plan = world.fold.plan(0.0)
    assert [grant.devices[0].index for grant in plan.grants] == [0, 1]
    assert "needs 0.6 of one gpu; node has gpu 0: 0.4" in plan.waiting["z"]


def test_an_instance_of_a_divided_gpu_is_leased_whole_and_never_in_parts():
    gpus = tuple(Gpu(index=index, memory_bytes=10 * GIB, uuid=f"MIG-{index}", instance=True) for index in range(2))
    world = World()
    world.up(a_node("g", cpus=8, gpus=gpus))
    world.ask(a_lease("whole", gpus=1.0, gpu_gib=10), a_lease("part", gpus=0.5, at_s=1))
    plan = world.fold.plan(0.0)
    assert [(grant.lease_id, grant.devices[0].memory_bytes) for grant in plan.grants] == [("whole", 10 * GIB)]
    assert "an instance, leased whole" in dict(plan.impossible[0].reasons)["g"]


def test_whole_gpus_need_devices_that_nobody_shares():
    gpus = (Gpu(index=0, memory_bytes=16 * GIB), Gpu(index=1, memory_bytes=16 * GIB))
    world = World()
    world.up(a_node("g", cpus=8, gpus=gpus))
    world.ask(a_lease("part", gpus=0.1))
    world.grant(world.fold.plan(0.0))
    world.ask(a_lease("two", gpus=2.0), a_lease("fat", gpus=0.5, gpu_gib=24))
    plan = world.fold.plan(0.0)
    assert "two" in plan.waiting
    assert [impossible.lease_id for impossible in plan.impossible] == ["fat"]
    world.end("part")
    assert {share.index for share in world.fold.plan(0.0).grants[0].devices} == {0, 1}


def test_gpu_leases_leave_whole_devices_and_the_cpus_beside_them_to_those_who_need_them():
    gpus = (Gpu(index=0, memory_bytes=16 * GIB), Gpu(index=1, memory_bytes=16 * GIB))
    world = World()
    world.up(a_node("a", cpus=5, gpus=gpus), a_node("b", cpus=4, gpus=gpus), a_node("plain", cpus=64, memory_gib=64))
    world.ask(a_lease("half", gpus=0.5, at_s=1), a_lease("two", gpus=2.0, cpus=4, at_s=2), a_lease("rest", gpus=0.5, at_s=3))
    world.ask(a_lease("none", cpus=2, at_s=4))
    nodes = {grant.lease_id: grant.node for grant in world.fold.plan(0.0).grants}
    assert nodes["half"] == nodes["rest"] != nodes["two"]
    assert nodes["none"] == "plain"


def test_parts_of_cores_that_add_up_exactly_are_granted_beside_gpu_leases_too():
    world = World()
    world.up(a_node("a", cpus=3, gpus=(Gpu(index=0, memory_bytes=16 * GIB),)))
    world.ask(a_lease("gpu", gpus=1.0, at_s=1), *(a_lease(f"third{i}", cpus=2 / 3, at_s=2) for i in range(3)))
    assert len(world.fold.plan(0.0).grants) == 4


def test_a_fleet_without_gpus_needs_no_numpy():
    program = (
        "import sys; from tenure.decide.placement import Placement; from tenure.decide.packing import pack; "
        "sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_removed_node_is_planned_for_no_more():
    world = World()
    world.up(a_node("a"), a_node("b"))
    world.ask(a_lease("x"))
    assert world.fold.plan(0.0).grants[0].node == "a"
    world.hear("a", "node.removed")
    assert world.fold.plan(0.0).grants[0].node == "b"
    assert world.fold.plan(0.0) == world.rebuilt().plan(0.0)


def test_unreachable_nodes_get_nothing_new_but_still_count_as_the_fleet():
    world = World()
    world.up(a_node("a"))
    world.hear("a", "node.unreachable")
    world.ask(a_lease("x"))
    plan = world.fold.plan(0.0)
    assert plan.grants == plan.impossible == ()
    world.hear("a", "node.lost")
    assert world.fold.what_if([a_lease("y")]) == {"fleet": "no node is up"}


def test_what_if_leaves_the_state_as_it_was_and_tells_now_from_ever():
    world = World()
    world.up(a_node("a", cpus=2))
    world.ask(a_lease("x", cpus=2))
    world.grant(world.fold.plan(0.0))
    before = copy.deepcopy(world.fold.snapshot())
    assert world.fold.what_if([Envelope(cpus=1)]) == {"a": "needs 1 cpus; node has 0 free"}
    assert world.fold.what_if([Envelope(cpus=1)], idle=True) is None
    assert world.fold.what_if([Envelope(cpus=3)], idle=True) == {"a": "needs 3 cpus; node has 2"}
    assert world.fold.snapshot() == before
    assert world.fold.resize_shortage("x", Envelope(cpus=1)) == ""
    assert world.fold.resize_shortage("x", Envelope(cpus=3)) == "needs 3 cpus; node has 2 free"


def test_a_reservation_waits_until_its_start():
    world = World()
    world.up(a_node("a"))
    world.ask(replace(a_lease("x"), state=LeaseState.RESERVED, starts_at_s=100.0))
    assert world.fold.plan(99.0).waiting == {"x": "reserved for later"}
    assert len(world.fold.plan(100.0).grants) == 1


CPUS = st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0])
GPUS = st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.7, 1.0, 2.0])
GANGS = st.lists(st.tuples(CPUS, st.integers(1, 6), GPUS), min_size=1, max_size=4)
STEPS = st.lists(st.one_of(GANGS, st.integers(0, 50), st.sampled_from(["plan", "lose", "return"])), max_size=30)


def check_nothing_is_over_granted(world):
    for name, node in world.fold.nodes().items():
        held = [lease for lease in world.leases.values() if lease.holds and lease.node == name]
        assert sum(lease.envelope.cpus for lease in held) <= node.capacity.cpus + 2 * TOLERANCE
        assert sum(lease.envelope.memory_bytes for lease in held) <= node.capacity.memory_bytes
        for gpu in node.capacity.gpus:
            shares = [share for lease in held for share in lease.devices if share.index == gpu.index]
            assert sum(share.fraction for share in shares) <= 1 + 2 * TOLERANCE
            assert sum(share.memory_bytes for share in shares) <= gpu.memory_bytes
            assert not any(share.fraction == 1 for share in shares) or len(shares) == 1


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_whatever_happens_nothing_is_over_granted_and_events_rebuild_the_state(steps):
    world = World()
    world.up(a_node("a", gpus=(Gpu(index=0, memory_bytes=8 * GIB), Gpu(index=1, memory_bytes=8 * GIB))), a_node("b", cpus=1.5))
    for number, step in enumerate(steps):
        if isinstance(step, list):
            parts = [a_lease(f"{number}-{i}", f"g{number}", cpus=c, memory_gib=m, gpus=g, at_s=number, run=f"r{number % 3}",
                             worker=i) for i, (c, m, g) in enumerate(step)]  # fmt: skip
            world.ask(*parts)
        elif isinstance(step, int):
            live = sorted(name for name, lease in world.leases.items() if lease.state is not LeaseState.ENDED)
            if live:
                world.end(live[step % len(live)])
        elif step == "plan":
            plan = world.fold.plan(float(number))
            told = [g.lease_id for g in plan.grants] + [i.lease_id for i in plan.impossible] + list(plan.waiting)
            assert sorted(told) == sorted(k for k, v in world.leases.items() if not v.holds and v.state is not LeaseState.ENDED)
            gangs = {world.leases[grant.lease_id].gang_id for grant in plan.grants}
            for gang in gangs:
                waiting = {k for k, v in world.leases.items() if v.gang_id == gang and v.state is LeaseState.REQUESTED}
                assert waiting <= {grant.lease_id for grant in plan.grants}
            assert all(world.fold.nodes()[grant.node].state is NodeState.UP for grant in plan.grants)
            world.grant(plan)
        else:
            kind = "node.lost" if step == "lose" else "node.up"
            data = {} if step == "lose" else {"node": to_builtins(a_node("b", cpus=1.5))}
            world.hear("b", kind, data)
        check_nothing_is_over_granted(world)
        assert world.fold == world.rebuilt()
        assert world.fold.plan(float(number)) == world.rebuilt().plan(float(number))


def test_a_plan_is_made_once_until_something_changes():
    world = World()
    world.up(a_node("a", cpus=2))
    world.ask(a_lease("x", cpus=2), a_lease("y", cpus=2, at_s=1))
    plan = world.fold.plan(0.0)
    assert world.fold.plan(1.0) is plan
    world.grant(plan)
    assert world.fold.plan(2.0) is not plan
    world.ask(replace(a_lease("z"), state=LeaseState.RESERVED, starts_at_s=100.0))
    assert world.fold.plan(99.0) != world.fold.plan(100.0)


def test_an_invocation_tells_the_lease_too():
    world = World()
    world.up(a_node("a"))
    world.ask(a_lease("x"))
    world.grant(world.fold.plan(0.0))
    lease = replace(world.leases["x"], attempt=1, ends_at_s=99.0)
    world.hear("", "invoked", {"lease": to_builtins(lease)})
    assert world.fold.snapshot()["held"]["a"]["x"] == lease
