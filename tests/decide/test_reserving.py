"""Reservations: room that will be there, and nothing granted or renewed that would take it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.placement import Placement
from tenure.decide.queueing import order_named
from tenure.decide.reserving import Span, is_over, peak_room, reach_s
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import Lease, LeaseState
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, DeviceShare, Envelope, Gpu

GIB = 1 << 30
HOUR_S = 3600.0


def a_lease(name, *, cpus=1.0, hours=1.0, state=LeaseState.QUEUED, node="", starts_h=0.0, devices=(), on_event=False, **more):
    envelope = Envelope(cpus=cpus, memory_bytes=GIB, slot_s=hours * HOUR_S, total_s=10 * hours * HOUR_S, **more)
    starts_s = starts_h * HOUR_S
    return Lease(
        id=name, run_id=name, stage="s", envelope=envelope, command=Command(argv=("x",), on_event=on_event), state=state,
        node=node, devices=devices, requested_at_s=0.0, starts_at_s=starts_s,
        ends_at_s=starts_s + hours * HOUR_S, total_ends_at_s=starts_s + 10 * hours * HOUR_S,
    )  # fmt: skip


def fleet(*leases, cpus=4.0, nodes=("a",), gpus=(), order="fifo"):
    placement = Placement(order=order_named(order))
    for name in nodes:
        capacity = Capacity(cpus=cpus, memory_bytes=64 * GIB, gpus=gpus)
        node = Node(name=name, capacity=capacity, machine=Machine(cpu_model="x"))
        placement.apply(Event(seq=0, at_s=0.0, kind="node.up", who="t", node=name, data={"node": node}))
    for lease in leases:
        placement.apply(Event(seq=0, at_s=0.0, kind=f"lease.{lease.state}", who="t", data={"lease": lease}))
    return placement


def granted(placement, now_h=0.0):
    return {grant.lease_id: grant.node for grant in placement.plan(now_h * HOUR_S).grants}


def reserved(name="r", at_h=2.0, **fields):
    return a_lease(name, state=LeaseState.RESERVED, node="a", starts_h=at_h, **fields)


def test_what_would_run_into_a_reservation_waits_and_what_ends_before_it_goes():
    placement = fleet(reserved(cpus=4), a_lease("long", hours=3), a_lease("short", hours=2), order="backfill")
    assert granted(placement) == {"short": "a"}
    assert "reserved within its time" in placement.plan(0.0).waiting["long"]


def test_beside_a_reservation_there_is_room_for_as_long_as_anyone_likes():
    assert granted(fleet(reserved(cpus=3), a_lease("long", hours=9))) == {"long": "a"}


def test_what_ends_before_the_reservation_does_not_count_against_what_begins_before_it():
    held = a_lease("held", cpus=3, hours=1, state=LeaseState.ACTIVE, node="a")
    assert granted(fleet(held, reserved(cpus=3), a_lease("long", hours=9))) == {"long": "a"}


def test_another_node_takes_what_the_reserved_one_cannot():
    assert granted(fleet(reserved(cpus=4), a_lease("long", hours=3), nodes=("a", "b"))) == {"long": "b"}


def test_one_that_waits_for_events_counts_with_all_the_time_it_may_hold():
    assert not granted(fleet(reserved(cpus=4, at_h=2), a_lease("trains", hours=1, on_event=True)))
    assert granted(fleet(reserved(cpus=4, at_h=11), a_lease("trains", hours=1, on_event=True)))


@pytest.mark.parametrize("order", ["fifo", "backfill", "las", "fair"])
def test_when_its_time_has_come_it_goes_first_whoever_waits(order):
    waits = [a_lease(f"w{number}", cpus=2) for number in range(4)]
    placement = fleet(*waits, reserved(cpus=3, at_h=2), order=order)
    assert granted(placement, now_h=2)["r"] == "a"


@pytest.mark.parametrize("order", ["fifo", "backfill", "las", "fair"])
def test_while_who_was_there_leaves_nobody_takes_the_room_bit_by_bit(order):
    leaving = a_lease("leaving", cpus=1, hours=2, state=LeaseState.DRAINING, node="a")
    placement = fleet(leaving, a_lease("small", cpus=1), reserved(cpus=4, at_h=2), order=order)
    assert granted(placement, now_h=2) == {}


def test_when_its_node_is_away_another_takes_it():
    placement = fleet(reserved(cpus=4), nodes=("a", "b"))
    placement.apply(Event(seq=0, at_s=0.0, kind="node.lost", who="t", node="a"))
    assert granted(placement, now_h=2) == {"r": "b"}


def test_a_reservation_is_placed_beside_what_is_held_past_its_beginning_and_what_else_is_reserved():
    held = a_lease("held", cpus=2, hours=3, state=LeaseState.ACTIVE, node="a")
    ahead = fleet(held, reserved(cpus=2, at_h=4)).ahead(0.0)
    asked = [Envelope(cpus=3, memory_bytes=GIB)]
    assert ahead.place(asked, 2 * HOUR_S, HOUR_S) is None
    assert ahead.place(asked, 3 * HOUR_S, 1 * HOUR_S) is not None
    assert ahead.place(asked, 3 * HOUR_S, 2 * HOUR_S) is None
    assert ahead.place(asked, 5 * HOUR_S, 9 * HOUR_S) is not None


def test_a_renewal_goes_as_far_as_the_first_reservation_that_needs_its_room():
    held = a_lease("held", cpus=2, hours=1, state=LeaseState.ACTIVE, node="a")
    until_s, other = fleet(held, reserved("r2", cpus=2, at_h=2), reserved("r3", cpus=3, at_h=5)).ahead(0.0).limit(held)
    assert (until_s, other.id) == (5 * HOUR_S, "r3")
    assert fleet(held).ahead(0.0).limit(held) == (float("inf"), None)


def test_a_device_that_is_reserved_is_kept():
    gpus = (Gpu(index=0, memory_bytes=16 * GIB), Gpu(index=1, memory_bytes=16 * GIB))
    whole = reserved(gpus=1.0, devices=(DeviceShare(index=0, fraction=1.0, memory_bytes=16 * GIB),))
    placement = fleet(
        whole, a_lease("half", gpus=0.5, hours=9), a_lease("whole", gpus=1.0, hours=9), gpus=gpus, order="backfill"
    )
    (grant,) = placement.plan(0.0).grants
    assert grant.devices[0].index == 1


SPANS = st.lists(
    st.builds(
        lambda begin, length, cpus: Span(begin, begin + length, Envelope(cpus=cpus, memory_bytes=cpus << 20)),
        st.integers(0, 20), st.integers(1, 10), st.integers(1, 4),
    ),
    max_size=8,
)  # fmt: skip


@given(SPANS, st.integers(0, 20), st.integers(1, 10))
def test_the_peak_is_what_a_look_at_every_moment_finds(spans, begin, length):
    room = peak_room(Capacity(cpus=100, memory_bytes=1 << 40), spans, begin, begin + length)
    moments = [begin + quarter / 4 for quarter in range(4 * length)]
    assert room.cpus == max(sum(s.envelope.cpus for s in spans if s.begin_s <= t < s.end_s) for t in moments)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 8)), max_size=8),
    st.sampled_from(["fifo", "backfill", "las", "fair"]),
)
def test_reservations_that_were_accepted_always_find_their_room(requests, order):
    """One after the other asks, now or for later; time goes on; who was promised room has it at that moment."""
    placement = fleet(order=order, nodes=("a", "b"))
    held: dict[str, Lease] = {}

    def put(lease):
        held[lease.id] = lease
        placement.apply(Event(seq=0, at_s=0.0, kind=f"lease.{lease.state}", who="t", data={"lease": lease}))

    def ended(lease):
        return Event(seq=0, at_s=0.0, kind="lease.ended", who="t", data={"lease": lease})

    for hour in range(20):
        for lease in [one for one in held.values() if one.state is LeaseState.ACTIVE and one.ends_at_s <= hour * HOUR_S]:
            over = a_lease(lease.id, state=LeaseState.ENDED)
            placement.apply(ended(over))
            held[lease.id] = over
        if hour < len(requests):
            cpus, hours, later = requests[hour]
            asked = a_lease(f"l{hour}", cpus=cpus, hours=hours)
            if later:
                begin_s = (hour + later) * HOUR_S
                places = placement.ahead(hour * HOUR_S).place([asked.envelope], begin_s, reach_s(asked))
                if places is not None:
                    put(
                        a_lease(
                            asked.id,
                            cpus=cpus,
                            hours=hours,
                            state=LeaseState.RESERVED,
                            node=places[0][0],
                            starts_h=hour + later,
                        )
                    )
            else:
                put(asked)
        grants = {grant.lease_id: grant for grant in placement.plan(hour * HOUR_S).grants}
        for lease in list(held.values()):
            due = lease.state is LeaseState.RESERVED and lease.starts_at_s <= hour * HOUR_S
            assert not due or lease.id in grants, f"{lease.id} was promised room at hour {hour}"
            if lease.id in grants:
                put(
                    a_lease(
                        lease.id, cpus=lease.envelope.cpus, hours=lease.envelope.slot_s / HOUR_S, state=LeaseState.ACTIVE,
                        node=grants[lease.id].node, starts_h=hour,
                    )
                )  # fmt: skip
        for node in placement.nodes():
            assert not is_over(placement.taken(node))
