"""Placement rules by name: each sends a lease where it says, and none where there is no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.placement import Placement
from tenure.decide.rooms import Rooms
from tenure.decide.rules import RULES, rule_named
from tenure.decide.shapes import Shape
from tenure.errors import SpecError
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import Lease
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, DeviceShare, Envelope, Gpu

GIB = 1 << 30


def a_capacity(gpus=4, cpus=32.0):
    return Capacity(cpus=cpus, memory_bytes=64 * GIB, gpus=tuple(Gpu(index=i) for i in range(gpus)))


def an_envelope(gpus, cpus=1.0):
    return Envelope(cpus=cpus, memory_bytes=GIB, gpus=gpus, disk_bytes=0)


def chosen(name, held, wanted, counts):
    """Return the node that a rule takes among a, b and c, with these GPUs held on them."""
    rule = RULES[name]
    rooms = Rooms({node: a_capacity() for node in held}, rule.mix(counts), rule)
    for node, gpus in held.items():
        for index in range(gpus):
            rooms.take(node, an_envelope(1.0), [DeviceShare(index=index, fraction=1.0)])
    return rooms.choose(an_envelope(wanted))[0]


COUNTS = {Shape(1.0, GIB, 1.0): 10.0, Shape(1.0, GIB, 4.0): 10.0}


def test_first_fit_takes_the_first_by_name_and_best_fit_the_fullest():
    held = {"a": 0, "b": 3, "c": 1}
    assert chosen("firstfit", held, 1.0, COUNTS) == "a"
    assert chosen("bestfit", held, 1.0, COUNTS) == "b"


@pytest.mark.parametrize("name", ["tenure", "fgd"])
def test_a_rule_that_looks_at_fragmentation_keeps_the_whole_node_whole(name):
    assert chosen(name, {"a": 0, "b": 2, "c": 1}, 1.0, COUNTS) != "a"


def test_the_published_rule_counts_what_can_use_no_gpu_and_leaves_out_rare_shapes():
    mix = RULES["fgd"].mix({Shape(1.0, GIB, 1.0): 60.0, Shape(2.0, GIB, 0.0): 36.0, Shape(1.0, GIB, 2.0): 4.0})
    assert [shape.gpus for shape in mix.shapes] == [1.0]


def test_an_unknown_rule_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match=r"'best'.*tenure, fgd, bestfit, firstfit"):
        rule_named("best")


@pytest.mark.parametrize(("name", "node"), [("firstfit", "a"), ("tenure", "b")])
def test_the_fold_follows_its_rule_on_nodes_without_gpus_too(name, node):
    fold = Placement(rule=RULES[name])
    for number, (key, cpus) in enumerate((("a", 16.0), ("b", 4.0))):
        up = Node(name=key, capacity=a_capacity(0, cpus), machine=Machine(cpu_model="t"))
        fold.apply(Event(seq=number, at_s=0.0, kind="node.up", who="test", node=key, data={"node": up}))
    lease = Lease(id="l", run_id="r", stage="s", envelope=an_envelope(0.0), command=Command(argv=("x",)))
    fold.apply(Event(seq=9, at_s=0.0, kind="lease.requested", who="test", data={"lease": lease}))
    assert [grant.node for grant in fold.plan(0.0).grants] == [node]


@given(st.sampled_from(sorted(RULES)), st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0, 4.0]), max_size=40))
def test_no_rule_over_uses_a_node_or_drops_what_fits(name, wanted):
    rule = RULES[name]
    shapes = {Shape(1.0, GIB, gpus): 1.0 for gpus in wanted}
    rooms = Rooms({key: a_capacity() for key in "abc"}, rule.mix(shapes), rule)
    for gpus in wanted:
        choice = rooms.choose(an_envelope(gpus))
        if choice is None:
            assert len(rooms.refusals(an_envelope(gpus))) == 3
            continue
        rooms.take(choice[0], an_envelope(gpus), choice[1])
    for key in "abc":
        room = rooms.room(key)
        assert room.cpus <= 32.0 + 1e-6
        assert all(share <= 1 + 1e-9 for share, _ in room.devices.values())
