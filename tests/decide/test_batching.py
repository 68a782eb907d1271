"""Batching: what the policy promises, over random histories in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.decide.batching import BatchPolicy, BatchQueue, Waiting
from tenure.errors import SpecError


@dataclass(frozen=True)
class Arrival:
    after_s: float
    rows: int
    kind: int
    priority: int
    patience_s: float
    dropped_after_s: float


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        after_s=st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.004, 0.03]),
        rows=st.sampled_from([1, 1, 1, 2, 3, 5, 11]),
        kind=st.integers(0, 2),
        priority=st.integers(1, 3),
        patience_s=st.sampled_from([math.inf, math.inf, 0.001, 0.006, 0.02, 0.2]),
        dropped_after_s=st.sampled_from([math.inf] * 6 + [0.0, 0.002, 0.05]),
    ),
    max_size=60,
)
POLICIES = st.builds(
    BatchPolicy,
    max_batch_rows=st.sampled_from([1, 4, 8]),
    max_delay_s=st.sampled_from([0.0, 0.002, 0.01]),
    max_waiting=st.sampled_from([5, 1000]),
    max_overtakes=st.sampled_from([0, 1, 3]),
)


class World:
    """A lane in virtual time: plans after every event and whenever the last plan said to look again."""

    def __init__(self, policy, instances, run_s):
        self.policy, self.queue, self.free, self.run_s = policy, BatchQueue(policy), instances, run_s
        self.now_s, self.again_s = 0.0, math.inf
        self.events = []  # (at_s, order, what, subject)
        self.waiting, self.started, self.expired, self.dropped, self.refused = [], [], [], [], []

    def at(self, at_s, what, subject=None):
        self.events.append((at_s, len(self.started) + len(self.events), what, subject))

    def play(self, arrivals):
        at_s = 0.0
        for arrival in arrivals:
            at_s += arrival.after_s
            self.at(at_s, "arrive", arrival)
        while self.events or self.again_s < math.inf:
            event_s = min((event[0] for event in self.events), default=math.inf)
            self.now_s = max(self.now_s, min(event_s, self.again_s))
            for event in sorted((e for e in self.events if e[0] <= self.now_s), key=lambda e: e[:2]):
                self.events.remove(event)
                self._happen(event[2], event[3])
            self._plan()

    def _happen(self, what, subject):
        if what == "end":
            self.free += 1
        elif what == "drop":
            if self.queue.drop(subject):
                self.waiting.remove(subject)
                self.dropped.append(subject)
        else:
            waiting = Waiting(
                subject, self.now_s, self.now_s + subject.patience_s, subject.rows, subject.kind, subject.priority
            )
            if self.queue.add(waiting):
                self.waiting.append(waiting)
            else:
                assert len(self.waiting) == self.policy.max_waiting
                self.refused.append(waiting)
            if subject.dropped_after_s < math.inf:
                self.at(self.now_s + subject.dropped_after_s, "drop", waiting)

    def _plan(self):
        plan = self.queue.plan(self.free, self.now_s)
        assert len(plan.batches) <= self.free
        for waiting in plan.expired:
            self.waiting.remove(waiting)
            self.expired.append((self.now_s, waiting))
        for batch in plan.batches:
            self.started.append((self.now_s, batch, list(self.waiting)))
            for waiting in batch:
                self.waiting.remove(waiting)
            self.free -= 1
            self.at(self.now_s + self.run_s, "end")
        self.again_s = plan.look_again_at_s
        assert self.again_s > self.now_s
        assert len(self.queue) == len(self.waiting)
        assert self.queue.rows == sum(waiting.rows for waiting in self.waiting)
        for waiting in self.waiting:
            assert waiting.deadline_s > self.now_s
            assert waiting.deadline_s >= self.again_s
            if self.free:
                assert self.now_s < waiting.arrived_at_s + self.policy.max_delay_s
                assert self.again_s <= waiting.arrived_at_s + self.policy.max_delay_s


WORLDS = st.builds(World, POLICIES, st.integers(1, 3), st.sampled_from([0.0005, 0.003, 0.02]))


@settings(max_examples=300, deadline=None)
@given(WORLDS, ARRIVALS)
def test_every_request_ends_once_in_a_fitting_batch_or_expired_at_its_deadline(world, arrivals):
    world.play(arrivals)
    ran = [waiting for _, batch, _ in world.started for waiting in batch]
    ended = [*ran, *(waiting for _, waiting in world.expired), *world.dropped, *world.refused]
    assert not world.waiting
    assert not len(world.queue)
    assert sorted(map(id, ended)) == sorted({id(waiting) for waiting in ended})
    assert len(ended) == len(arrivals)
    for at_s, waiting in world.expired:
        assert at_s == waiting.deadline_s
    for at_s, batch, before in world.started:
        assert len({(waiting.kind, waiting.priority) for waiting in batch}) == 1
        assert len(batch) == 1 or sum(waiting.rows for waiting in batch) <= world.policy.max_batch_rows
        assert all(waiting.deadline_s > at_s for waiting in batch)
        alike = [w for w in before if (w.kind, w.priority) == (batch[0].kind, batch[0].priority)]
        assert batch == alike[: len(batch)]


@settings(max_examples=300, deadline=None)
@given(WORLDS, ARRIVALS)
def test_priorities_go_first_in_order_of_arrival_and_overtake_only_so_often(world, arrivals):
    world.play(arrivals)
    streak = 0
    for at_s, batch, before in world.started:
        due = [w for w in before if w.arrived_at_s + world.policy.max_delay_s <= at_s]
        oldest = min(before, key=lambda w: w.number)
        passed = any(w.priority > batch[0].priority and w.number < batch[0].number for w in before)
        if oldest in due and streak >= world.policy.max_overtakes:
            assert batch[0] is oldest
        elif streak < world.policy.max_overtakes and due:
            best = min(due, key=lambda w: (w.priority, w.number))
            assert batch[0].priority <= best.priority
            if batch[0].priority == best.priority:
                assert batch[0] is best
        streak = streak + 1 if passed else 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 4))
def test_a_low_priority_runs_within_its_bound_under_endless_urgent_load(older, max_overtakes, per_batch):
    queue = BatchQueue(BatchPolicy(max_batch_rows=per_batch, max_overtakes=max_overtakes))
    for number in range(older):
        queue.add(Waiting(number, 0.0, kind=number, priority=2))
    last = Waiting("last", 0.0, kind="last", priority=3)
    queue.add(last)
    batches = 0
    while last.queued:
        for _ in range(2 * per_batch):
            queue.add(Waiting("urgent", 1.0 + batches, priority=1))
        queue.plan(1, 1.0 + batches)
        batches += 1
    assert batches <= (older + 1) * (max_overtakes + 1)


def test_a_batch_is_what_waits_when_an_instance_falls_free():
    queue = BatchQueue(BatchPolicy(max_batch_rows=4))
    waiting = [Waiting(number, 0.0) for number in range(6)]
    assert all(queue.add(w) for w in waiting)
    assert queue.plan(0, 0.0).batches == []
    assert queue.plan(1, 0.0).batches == [waiting[:4]]
    assert queue.plan(1, 0.0).batches == [waiting[4:]]


def test_free_instances_share_what_waits_unless_company_is_worth_waiting_for():
    for max_delay_s, sizes in ((0.0, [5, 4]), (0.01, [8])):
        queue = BatchQueue(BatchPolicy(max_batch_rows=8, max_delay_s=max_delay_s))
        for number in range(9):
            queue.add(Waiting(number, 0.0))
        assert [len(batch) for batch in queue.plan(2, 0.0).batches] == sizes


def test_a_full_batch_and_a_request_in_a_hurry_do_not_wait_for_company():
    queue = BatchQueue(BatchPolicy(max_batch_rows=2, max_delay_s=0.01))
    patient = Waiting("patient", 0.0, kind="a", deadline_s=1.0)
    queue.add(patient)
    assert queue.plan(1, 0.0).batches == []
    pair = [Waiting(number, 0.001, kind="b") for number in range(2)]
    hurried = Waiting("hurried", 0.001, kind="c", deadline_s=0.0205)
    for waiting in (*pair, hurried):
        queue.add(waiting)
    plan = queue.plan(3, 0.001)
    assert plan.batches == [pair, [hurried]]
    assert plan.look_again_at_s == 0.01
    assert queue.plan(3, 0.01).batches == [[patient]]


def test_a_request_larger_than_a_batch_runs_alone():
    queue = BatchQueue(BatchPolicy(max_batch_rows=4))
    small, large, last = Waiting("small", 0.0), Waiting("large", 0.0, rows=9), Waiting("last", 0.0)
    for waiting in (small, large, last):
        queue.add(waiting)
    assert [queue.plan(1, 0.0).batches for _ in range(3)] == [[[small]], [[large]], [[last]]]


@pytest.mark.parametrize("leave", ["run", "drop", "expire"])
@pytest.mark.parametrize("max_delay_s", [0.0, 5.0])
def test_memory_does_not_grow_with_the_requests_that_have_left(leave, max_delay_s):
    queue = BatchQueue(BatchPolicy(max_batch_rows=2, max_delay_s=max_delay_s, max_waiting=10))
    queue.add(Waiting("old", 0.0, kind="old", priority=2))
    for number in range(3000):
        now_s = number * 1e-4
        last = [Waiting(number, now_s, now_s + (60.0 if leave != "expire" else 1e-5), kind=number % 700) for _ in range(2)]
        assert all(queue.add(waiting) for waiting in last)
        if leave == "drop":
            assert all(queue.drop(waiting) for waiting in last)
            assert not queue.drop(last[0])
        else:
            plan = queue.plan(leave == "run", now_s + 2e-5)
            assert plan.expired == ([] if leave == "run" else last)
    assert len(queue) <= 3
    assert _held(queue) < 8 * (10 + 64)


def _held(queue: BatchQueue) -> int:
    """Entries in all structures of the queue."""
    levels = queue._levels.values()
    groups = {id(g): g for level in levels for g in (*level.groups.values(), *level.ready, *(g for _, g in level.order))}
    return (
        len(queue._deadlines)
        + sum(len(level.order) + len(level.ready) for level in levels)
        + sum(1 + len(group.entries) for group in groups.values())
    )


def test_a_policy_without_room_is_refused():
    with pytest.raises(SpecError, match="max_batch_rows >= 1"):
        BatchPolicy(max_batch_rows=0)
