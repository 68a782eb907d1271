"""Node choice by what would be stranded: it fits where `packing` says so, forgets nothing, and does not depend on the past."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide import rooms as module
from tenure.decide.mix import Mix
from tenure.decide.packing import shortage
from tenure.decide.rooms import Rooms
from tenure.decide.shapes import MICRO, Shape, node_order, shape_of
from tenure.resources import Capacity, Envelope, Gpu

GIB = 1 << 30
MIX = Mix({Shape(1.0, GIB, 0.5): 3, Shape(2.0, GIB, 1.0): 2, Shape(1.0, GIB, 2.0, models=("A",)): 1})


def a_capacity(cpus=8.0, gpus=2, model="A", memory_gib=16, gpu_gib=16):
    devices = tuple(Gpu(index=i, model=model, memory_bytes=gpu_gib * GIB) for i in range(gpus))
    return Capacity(cpus=cpus, memory_bytes=memory_gib * GIB, disk_bytes=100 * GIB, gpus=devices)


def an_envelope(gpus=0.0, cpus=1.0, memory_gib=1, gpu_gib=0):
    return Envelope(cpus=cpus, memory_bytes=memory_gib * GIB, gpus=gpus, gpu_memory_bytes=gpu_gib * GIB)


def placed(rooms, envelope, models=()):
    node, devices = rooms.choose(envelope, models)
    rooms.take(node, envelope, devices)
    return node, [share.index for share in devices]


def test_a_share_goes_beside_another_rather_than_onto_a_whole_device():
    rooms = Rooms({"a": a_capacity(), "b": a_capacity()}, MIX)
    assert placed(rooms, an_envelope(0.5)) == ("a", [0])
    assert placed(rooms, an_envelope(0.5)) == ("a", [0])
    assert placed(rooms, an_envelope(2.0)) == ("b", [0, 1])


def test_a_lease_without_gpu_leaves_the_cpus_beside_free_devices_alone():
    rooms = Rooms({"gpu": a_capacity(cpus=3), "plain": a_capacity(cpus=4, gpus=0)}, MIX)
    assert [placed(rooms, an_envelope(cpus=2))[0] for _ in range(2)] == ["plain", "plain"]
    assert placed(rooms, an_envelope(cpus=2))[0] == "gpu"


def test_models_and_device_memory_bind_and_the_reasons_say_so():
    rooms = Rooms({"a": a_capacity(model="A", gpu_gib=16), "b": a_capacity(model="B", gpu_gib=32)}, MIX)
    assert placed(rooms, an_envelope(1.0), ("B", "C"))[0] == "b"
    assert placed(rooms, an_envelope(0.1, gpu_gib=24)) == ("b", [1])
    assert rooms.choose(an_envelope(1.0), ("B",)) is None
    assert rooms.refusals(an_envelope(1.0), ("B",)) == {
        "a": "needs a gpu of model B; node has A",
        "b": "needs 1 whole gpus; node has gpu 0: 0 with 0 B free, gpu 1: 0.9 with 8.0 GiB free",
    }
    assert rooms.refusals(an_envelope(cpus=99))["a"] == "needs 99 cpus; node has 8 free"


def test_the_order_of_nodes_mixes_kinds_whatever_their_names():
    fleet = {f"{kind}{i}": a_capacity(model=kind) for kind, count in (("A", 4), ("B", 2)) for i in range(count)}
    kinds = [name[0] for name in node_order(fleet)]
    assert kinds == ["A", "B", "A", "A", "B", "A"]
    renamed = {f"{9 - i}": fleet[name] for i, name in enumerate(fleet)}
    assert [renamed[name].gpus[0].model for name in node_order(renamed)] == kinds


def test_a_gang_is_placed_whole_or_not_at_all_and_asking_changes_nothing():
    rooms = Rooms({"a": a_capacity(), "b": a_capacity()}, MIX)
    before = rooms.snapshot()
    nodes = [node for node, _ in rooms.choose_all([an_envelope(0.5), an_envelope(2.0), an_envelope(0.5)])]
    assert nodes[0] == nodes[2] != nodes[1]
    assert rooms.choose_all([an_envelope(2.0)] * 3) is None
    assert rooms.snapshot() == before


def test_small_requests_weigh_more_and_rare_tiny_ones_do_not_decide():
    one, half, tiny = Shape(1.0, GIB, 1.0), Shape(1.0, GIB, 0.5), Shape(1.0, GIB, 0.001)
    mix = Mix({one: 8, half: 1, tiny: 1})
    weights = dict(zip(mix.shapes, mix._weights.sum(axis=1).tolist(), strict=True))
    assert weights[one] == pytest.approx(weights[half], abs=2)
    assert weights[tiny] == pytest.approx(1_000 * weights[one] / 8, rel=1e-3)
    assert Mix({Shape(1.0, GIB, 0.0): 5}).shapes == ()


@pytest.mark.parametrize("gpus", [0.0, 0.3, 1.0, 2.0])
def test_without_any_mix_nodes_are_filled_in_order(gpus):
    rooms = Rooms({name: a_capacity(cpus=2) for name in "abc"}, Mix({}))
    chosen = [placed(rooms, an_envelope(gpus))[0] for _ in range(2 if gpus < 2 else 1)]
    assert set(chosen) == {"a"}


FLEET = {
    "a": a_capacity(cpus=3.0, gpus=2),
    "b": a_capacity(cpus=3.0, gpus=2),
    "c": a_capacity(cpus=2.5, gpus=1, model="B", gpu_gib=8),
    "d": replace(a_capacity(cpus=1.5, gpus=0), disk_bytes=0),
    "e": replace(a_capacity(), gpus=(Gpu(index=3, model="A", memory_bytes=4 * GIB), Gpu(index=7, model="B", memory_bytes=GIB))),
}
ASKED = st.tuples(
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0]),
    st.sampled_from([0.1, 0.3, 1.0]),
    st.sampled_from([0, 0, 2, 12]),
    st.sampled_from([(), (), ("A",), ("B",)]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(ASKED, st.integers(0, 30)), max_size=40), st.sampled_from([8, 1024]))
def test_choices_fit_by_the_packing_rules_and_equal_those_of_a_fleet_filled_anew(steps, states):
    first, module._FIRST_STATES = module._FIRST_STATES, states
    try:
        follow(steps)
    finally:
        module._FIRST_STATES = first


def follow(steps):
    rooms, held = Rooms(FLEET, MIX), []
    for step in steps:
        if isinstance(step, int):
            if held:
                rooms.give(*held.pop(step % len(held)))
            continue
        gpus, cpus, gpu_gib, models = step
        envelope = replace(an_envelope(gpus, cpus=cpus, gpu_gib=gpu_gib if gpus else 0), disk_bytes=GIB)
        choice = rooms.choose(envelope, models)
        anew = Rooms(FLEET, MIX)
        for node, other, devices in reversed(held):
            anew.take(node, other, devices)
        assert anew.snapshot() == rooms.snapshot()
        assert anew.choose(envelope, models) == choice
        if choice is None:
            assert set(rooms.refusals(envelope, models)) == set(FLEET)
            continue
        node, devices = choice
        assert shortage(rooms.room(node), envelope) == ""
        assert node not in rooms.refusals(envelope, models)
        assert all(not models or gpu.model in models for gpu in FLEET[node].gpus if gpu.index in {d.index for d in devices})
        rooms.take(node, envelope, devices)
        held.append((node, envelope, devices))
        assert all(0 <= left <= MICRO for state in rooms.snapshot().values() for left, *_ in state[3])
        assert rooms.gain(node, envelope, models) <= shape_of(envelope).gpus + 20
    for lease in held:
        rooms.give(*lease)
    assert rooms.snapshot() == Rooms(FLEET, MIX).snapshot()
