"""The plan of a serving experiment: which settings, in which order. Pure."""

from collections import Counter
from dataclasses import replace

import pytest

from tenure.errors import SpecError
from tenure.experiments.sweep import Contender, fresh, in_flight, order, settings
from tenure.sweeps import Sweep

SWEEP = Sweep(batches=(1, 8), repeats=5)


def planned(sweep=SWEEP, **more):
    return settings(sweep, **{"files": True, **more})


def test_every_combination_is_there_once_and_shared_memory_is_for_the_microservice_alone():
    found = planned(replace(SWEEP, twins=False))
    assert len(set(found)) == len(found)
    places = Counter((each.architecture, each.transport) for each in found)
    # sync and async, from memory and from files, two batches
    assert places == dict.fromkeys(
        [
            ("simple", "none"),
            *(("microservice", each) for each in ("http", "grpc", "shm")),
            *(("distributed", each) for each in ("http", "grpc")),
        ],
        8,
    )
    assert {(each.architecture, each.link) for each in found} == {
        ("simple", "in-process"),
        ("microservice", "loopback"),
        ("distributed", "netns"),
    }


def test_a_configuration_names_every_factor():
    (first, *_) = planned()
    assert first.configuration() == {
        "architecture": "simple",
        "transport": "none",
        "interaction": "sync",
        "batch": 1,
        "clients": 1,
        "link": "in-process",
        "server": "tenure",
        "data": "memory",
        "load": "closed",
        "runtime": "process",
    }


def test_the_first_setting_of_each_batch_has_a_twin():
    twins = [each for each in planned() if each.twin]
    assert [(each.describe(), each.configuration()["twin"]) for each in twins] == [
        ("simple sync, batch 1, from memory (twin)", 1),
        ("simple sync, batch 8, from memory (twin)", 1),
    ]
    assert {each.application for each in twins} == {"simple-tenure-sync"}


def test_every_repeat_runs_every_setting_once_in_an_order_of_its_own():
    found = planned()
    drawn = list(order(found, SWEEP, seed=3))
    rounds = [[setting for repeat, setting in drawn if repeat == number] for number in range(5)]
    assert [repeat for repeat, _ in drawn] == [number for number in range(5) for _ in found]
    assert all(set(each) == set(found) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 5
    assert list(order(found, SWEEP, seed=3)) == drawn != list(order(found, SWEEP, seed=4))


def test_visits_of_a_repeat_are_rounds_of_their_own():
    found = planned()
    drawn = list(order(found, replace(SWEEP, repeats=2, visits=3), seed=3))
    assert [repeat for repeat, _ in drawn] == [0] * 3 * len(found) + [1] * 3 * len(found)
    rounds = [tuple(setting for _, setting in drawn[start : start + len(found)]) for start in range(0, len(drawn), len(found))]
    assert all(set(each) == set(found) for each in rounds)
    assert len(set(rounds)) == 6


def test_a_fresh_server_tells_the_memory_of_all_that_ask_it_alike():
    found = planned(contenders=[Contender(name="triton", targets={"grpc": "grpc://h:1"}, model="m")])
    told_by = fresh(found)
    assert set(told_by) == {each for each in found if each.server == "tenure"}
    assert {(each.data, each.twin) for each in told_by.values()} == {("memory", 0)}
    assert len(set(told_by.values())) == 6 * 2 * 2
    for setting, other in told_by.items():
        assert replace(setting, data="memory", twin=0) == other


def test_without_pictures_nothing_comes_from_files():
    assert {each.data for each in planned(files=False)} == {"memory"}
    with pytest.raises(SpecError, match="there are no pictures"):
        planned(replace(SWEEP, data=("files",)), files=False)


def test_a_model_of_fixed_shape_is_measured_with_the_batch_it_takes():
    assert {each.batch for each in planned(fixed_batch=8)} == {8}
    with pytest.raises(SpecError, match="takes 3 images at a time"):
        planned(fixed_batch=3)


def test_shared_memory_alone_leaves_nothing_of_a_distributed_architecture():
    with pytest.raises(SpecError, match="no setting is left"):
        planned(replace(SWEEP, architectures=("distributed",), transports=("shm",)))


def test_a_contender_stands_beside_ours_with_its_own_transports():
    there = Contender(name="triton", targets={"grpc": "grpc://127.0.0.1:8001"}, model="m", pids=(7,))
    found = [each for each in planned(contenders=[there]) if each.server == "triton"]
    assert {(each.architecture, each.transport, each.link) for each in found} == {("microservice", "grpc", "loopback")}
    assert len(found) == 8
    with pytest.raises(SpecError, match="undisturbed is not for contenders"):
        planned(replace(SWEEP, undisturbed=True), contenders=[there])
    with pytest.raises(SpecError, match="name of its own"):
        Contender(name="tenure", targets={"grpc": "grpc://h:1"}, model="m")


@pytest.mark.parametrize(
    ("interaction", "batch", "expected"),
    [("sync", 32, 1), ("async", 1, 8), ("async", 8, 8), ("async", 32, 2), ("async", 128, 2)],
)
def test_so_many_requests_are_in_flight_that_their_images_stay_bounded(interaction, batch, expected):
    (setting, *_) = planned()
    assert in_flight(SWEEP, replace(setting, interaction=interaction, batch=batch)) == expected


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"architectures": ("simple", "simple")}, "sweep.architectures"),
        ({"transports": ("carrier pigeon",)}, "sweep.transports must be one or more of http, grpc, shm"),
        ({"batches": ()}, "sweep.batches"),
        ({"batches": (0,)}, "sweep.batches"),
        ({"repeats": 0}, "sweep.repeats"),
        ({"cell_s": 0.001}, "sweep.cell"),
        ({"visits": 0}, "sweep.visits"),
        ({"in_flight": 0}, "sweep.in_flight"),
        ({"images": 0}, "sweep.images"),
        ({"normalise": "loud"}, "sweep.normalise"),
        ({"client_cpus": -1.0}, "sweep.client_cpus"),
    ],
)
def test_a_sweep_refuses_what_cannot_be_measured(changed, says):
    with pytest.raises(SpecError, match=says):
        replace(SWEEP, **changed)
