"""Whose turn it is: least service first, floors, first leases in time, who gives way, and what estimates are worth."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.estimates import Estimates
from tenure.decide.placement import Placement
from tenure.decide.queueing import FAIR, FIFO, ORDERS, TAIL, Queue
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope, Gpu

GIB = 1 << 30
HOUR_S = 3600.0
ORDERS_BY_SERVICE = [name for name, order in ORDERS.items() if order.by_service]


def a_node(name="n", cpus=8.0, gpus=0):
    devices = tuple(Gpu(index=index, memory_bytes=GIB) for index in range(gpus))
    capacity = Capacity(cpus=cpus, memory_bytes=64 * GIB, gpus=devices)
    return Node(name=name, capacity=capacity, machine=Machine(cpu_model="test"))


class World:
    """Leases that come, hold, give way and end, and a fold that hears of it."""

    def __init__(self, order, *nodes):
        self.fold, self.events, self.leases, self.now_s = Placement(order=order), [], {}, 0.0
        self.order = order
        for node in nodes or (a_node(),):
            self.hear("node.up", node=node.name, data={"node": node})

    def hear(self, kind, *, node="", data):
        event = Event(seq=len(self.events) + 1, at_s=self.now_s, kind=kind, who="broker", node=node, data=data)
        self.events.append(event)
        self.fold.apply(event)

    def put(self, lease, **data):
        self.leases[lease.id] = lease
        self.hear(f"lease.{lease.state}", data={"lease": lease, **data})

    def ask(self, name, *, job="", cpus=1.0, gpus=0.0, tenant="t", gang="", worker=0, estimate_s=None):
        lease = Lease(
            id=name,
            run_id=job or name,
            stage="s",
            worker=worker,
            gang_id=gang,
            tenant=tenant,
            envelope=Envelope(cpus=cpus, memory_bytes=1 << 20, gpus=gpus),
            command=Command(argv=("true",)),
            requested_at_s=self.now_s,
        )
        self.put(lease, **({} if estimate_s is None else {"estimate_s": estimate_s}))

    def grant(self, ending=()):
        """Do what the plan says; return who began, who was renewed, and who gave way."""
        plan = self.fold.plan(self.now_s, ending=ending)
        gave_way = sorted(set(ending) - set(plan.renewals))
        for name in gave_way:
            self.end(name, EndReason.EXPIRED)
        for grant in plan.grants:
            lease = replace(self.leases[grant.lease_id], state=LeaseState.ACTIVE, node=grant.node, devices=grant.devices)
            self.put(replace(lease, starts_at_s=self.now_s))
        return [grant.lease_id for grant in plan.grants], sorted(plan.renewals), gave_way

    def end(self, name, reason=EndReason.COMPLETED):
        self.put(replace(self.leases[name], state=LeaseState.ENDED, end_reason=reason, ended_at_s=self.now_s))

    def had(self, job, hours, *, cpus=1.0):
        """Have a job served for so long in the past, and end its lease unfinished."""
        self.ask(f"{job}-old", job=job, cpus=cpus)
        self.grant()
        self.now_s += hours * HOUR_S
        self.end(f"{job}-old", EndReason.EXPIRED)


@pytest.mark.parametrize("name", ORDERS_BY_SERVICE)
def test_who_has_had_least_goes_first(name):
    world = World(ORDERS[name], a_node(cpus=1.0))
    world.had("long", 10)
    world.had("short", 1)
    world.ask("a", job="long")
    world.ask("b", job="short")
    assert world.grant()[0] == ["b"]


def test_of_new_jobs_the_narrow_one_goes_first():
    world = World(ORDERS["las"], a_node(cpus=8.0))
    world.ask("filler", cpus=8.0)
    world.grant()
    world.ask("wide", cpus=8.0)
    world.ask("narrow", cpus=1.0)
    world.end("filler")
    assert world.grant()[0] == ["narrow"]


def test_first_come_first_served_never_gives_way_and_lets_none_by():
    world = World(FIFO, a_node(cpus=2.0))
    world.ask("a", cpus=1.0)
    world.grant()
    world.ask("big", cpus=2.0)
    world.ask("small", cpus=1.0)
    world.now_s = 100 * HOUR_S
    assert world.grant(ending=["a"]) == ([], ["a"], [])


def test_backfill_lets_those_by_who_fit():
    world = World(ORDERS["backfill"], a_node(cpus=2.0))
    world.ask("a", cpus=1.0)
    world.grant()
    world.ask("big", cpus=2.0)
    world.ask("small", cpus=1.0)
    assert world.grant(ending=["a"]) == (["small"], ["a"], [])


def test_a_gang_goes_on_until_others_have_had_less_than_half_of_what_it_has():
    world = World(ORDERS["las"], a_node(cpus=1.0))
    world.had("other", 2)
    world.ask("a")
    world.grant()
    world.ask("b", job="other")
    world.now_s += 3 * HOUR_S
    assert world.grant(ending=["a"]) == ([], ["a"], [])
    world.now_s += 2 * HOUR_S
    assert world.grant(ending=["a"]) == (["b"], [], ["a"])


def test_only_those_give_way_whose_room_is_used_and_the_longest_served_first():
    world = World(ORDERS["las"], a_node(cpus=4.0))
    for job, hours in (("x", 9), ("y", 5), ("z", 7)):
        world.had(job, hours)
    for job in "xyz":
        world.ask(f"{job}1", job=job)
    world.grant()
    world.ask("new", cpus=3.0)  # one is free
    world.now_s += HOUR_S
    assert world.grant(ending=["x1", "y1", "z1"]) == (["new"], ["y1"], ["x1", "z1"])


def test_nobody_gives_way_for_one_that_would_not_fit_even_so():
    world = World(ORDERS["las"], a_node(cpus=4.0))
    world.ask("stays", cpus=2.0)
    world.ask("ends", cpus=2.0)
    world.grant()
    world.ask("new", cpus=4.0)
    world.now_s += 50 * HOUR_S
    assert world.grant(ending=["ends"]) == ([], ["ends"], [])


def test_a_gang_over_two_nodes_gives_way_whole():
    world = World(ORDERS["las"], a_node("m", cpus=2.0), a_node("n", cpus=2.0))
    for worker in range(2):
        world.ask(f"g{worker}", job="g", gang="g", worker=worker, cpus=2.0)
    assert world.grant()[0] == ["g0", "g1"]
    world.ask("new", cpus=2.0)
    world.now_s += 9 * HOUR_S
    assert world.grant(ending=["g0", "g1"]) == (["new"], [], ["g0", "g1"])


def test_gpus_of_those_that_give_way_are_given_out_again_whole():
    world = World(ORDERS["las"], a_node("m", gpus=4), a_node("n", gpus=4))
    for number in range(8):
        world.ask(f"j{number}", gpus=1.0, cpus=0.1)
    world.grant()
    world.ask("new", gpus=4.0, cpus=0.1)
    world.now_s += 9 * HOUR_S
    begun, renewed, gave_way = world.grant(ending=[f"j{number}" for number in range(8)])
    assert begun == ["new"]
    assert (len(renewed), len(gave_way)) == (4, 4)
    assert {world.leases[name].node for name in gave_way} == {world.leases["new"].node}


def test_a_tenant_below_its_floor_goes_before_one_above():
    world = World(FAIR, a_node(cpus=8.0))
    for number in range(8):
        world.ask(f"many{number}", tenant="many")
    world.grant()
    world.now_s += HOUR_S
    world.end("many0")
    world.ask("new", tenant="many")
    world.had("old", 5)
    world.ask("few", job="old", tenant="few")
    world.now_s += 1.0
    assert world.grant()[0][0] == "few"


def test_a_tenant_alone_goes_by_service_though_only_its_narrow_gangs_are_within_the_floor():
    world = World(FAIR, a_node(cpus=8.0))
    world.had("old", 30)
    world.ask("filler", cpus=8.0)
    world.grant()
    world.ask("narrow", job="old", cpus=1.0)
    world.ask("wide", cpus=8.0)
    world.end("filler")
    assert world.grant()[0] == ["wide"]


def test_who_waits_too_long_for_a_first_lease_goes_first_and_holds_back_the_rest():
    world = World(FAIR, a_node(cpus=8.0))
    world.ask("runs", cpus=7.0)
    world.grant()
    world.ask("wide", cpus=8.0)
    world.now_s += FAIR.first_lease_s + 1
    world.ask("narrow", cpus=1.0)
    assert world.grant()[0] == []
    world.now_s += 1
    begun, _, gave_way = world.grant(ending=["runs"])
    assert (begun, gave_way) == (["wide"], ["runs"])


def test_a_job_far_past_its_estimate_counts_as_one_without():
    known = Estimates()
    served_s = 1000 * HOUR_S
    index_s = known.service_per_completion_s(60.0, served_s)
    assert index_s == pytest.approx(served_s / TAIL, rel=0.5)
    assert known.service_per_completion_s(HOUR_S, 0.0) < known.service_per_completion_s(10 * HOUR_S, 0.0)


@pytest.mark.parametrize(("sigma", "bias"), [(0.3, 0.0), (1.0, -0.7), (2.0, 0.5)])
def test_what_estimates_are_worth_is_learnt_from_jobs_that_ended(sigma, bias):
    rng, known = random.Random(7), Estimates()
    for _ in range(2000):
        took_s = math.exp(rng.gauss(8, 2)) + 60
        known.learn(took_s=took_s, estimate_s=took_s * math.exp(-bias - sigma * rng.gauss(0, 1)))
    assert known.sigma == pytest.approx(sigma, rel=0.1)
    assert known.bias == pytest.approx(bias, abs=0.15)


def test_exact_estimates_make_the_index_what_is_left():
    known = Estimates()
    for _ in range(5000):
        known.learn(took_s=HOUR_S, estimate_s=HOUR_S)
    assert known.service_per_completion_s(10 * HOUR_S, 0.0) == pytest.approx(10 * HOUR_S, rel=0.25)
    assert known.service_per_completion_s(10 * HOUR_S, 8 * HOUR_S) == pytest.approx(2 * HOUR_S, rel=0.4)


def test_estimates_decide_between_new_jobs():
    world = World(FAIR, a_node(cpus=1.0))
    world.ask("filler")
    world.grant()
    world.ask("long", estimate_s=50 * HOUR_S)
    world.ask("short", estimate_s=HOUR_S)
    world.end("filler")
    assert world.grant()[0] == ["short"]


def test_a_job_that_is_done_is_forgotten():
    queue = Queue(FAIR)
    queue.resize([Capacity(cpus=1.0, memory_bytes=GIB)])
    lease = Lease(id="a", run_id="a", stage="s", envelope=Envelope(), command=Command(argv=("true",)))
    queue.put(lease, None, 60.0)
    queue.put(replace(lease, state=LeaseState.ENDED, end_reason=EndReason.CANCELLED), lease)
    assert queue.turns(0.0) == []
    assert not queue._jobs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(ORDERS)))
def test_the_folded_queue_plans_as_the_rebuilt_one_and_grants_no_more_than_there_is(seed, name):
    rng, world = random.Random(seed), World(ORDERS[name], a_node("m", cpus=4.0, gpus=2), a_node("n", cpus=4.0))
    for step in range(40):
        world.now_s += rng.choice((10.0, 1000.0, 20_000.0))
        held = sorted(key for key, lease in world.leases.items() if lease.holds)
        if rng.random() < 0.6:
            width, gpus = rng.randint(1, 3), rng.choice((0.0, 0.0, 0.5, 1.0))
            job = f"j{rng.randrange(12)}"
            for worker in range(width):
                world.ask(
                    f"{step}.{worker}", job=job, gang=f"g{step}", worker=worker, gpus=gpus, tenant=f"t{rng.randrange(3)}",
                    estimate_s=rng.choice((None, 600.0, 90_000.0)),
                )  # fmt: skip
        elif held:
            gang = world.leases[rng.choice(held)].gang_id
            for key in [key for key in held if world.leases[key].gang_id == gang]:
                world.end(key, rng.choice((EndReason.COMPLETED, EndReason.EXPIRED, EndReason.FAILED)))
        gangs = sorted({lease.gang_id for lease in world.leases.values() if lease.holds})
        over = {gang for gang in gangs if rng.random() < 0.5}
        ending = [key for key, lease in sorted(world.leases.items()) if lease.holds and lease.gang_id in over]
        again = Placement(order=ORDERS[name])
        for event in world.events:
            again.apply(event)
        assert again.plan(world.now_s, ending=ending) == world.fold.plan(world.now_s, ending=ending)
        world.grant(ending)
        for node in world.fold.nodes():
            room = world.fold.taken(node)
            assert room.cpus <= room.capacity.cpus + 1e-6
            assert all(share <= 1 + 1e-6 for share, _ in room.devices.values())
