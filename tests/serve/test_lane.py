"""A model's lane with instances that do what the test says, in virtual time: every call is told once, nothing leaks."""

import heapq
import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.errors import Unavailable
from tenure.serve import batchwire as wire
from tenure.serve.faults import Overloaded
from tenure.serve.lane import Lane
from tenure.serve.plane import Buffer, Call, ModelOptions, TensorRef, Wanted
from tenure.serve.signature import Signature
from tenure.serve.tensors import ModelMetadata, TensorMetadata

TIMEOUT_S, MAX_QUEUE = 5.0, 6
METADATA = ModelMetadata(
    name="m", inputs=(TensorMetadata("x", "UINT8", (-1, 2)),), outputs=(TensorMetadata("y", "UINT8", (-1, 2)),)
)


class Loop:
    """As much of an event loop as a lane uses, with a clock that the test moves."""

    def __init__(self):
        self.now_s = 0.0
        self._soon = deque()
        self._later = []
        self._order = itertools.count()

    def call_soon(self, callback):
        self._soon.append(callback)

    def call_later(self, delay_s, callback):
        timer = Timer(callback)
        heapq.heappush(self._later, (self.now_s + delay_s, next(self._order), timer))
        return timer

    def advance(self, seconds):
        end_s = self.now_s + seconds
        while True:
            while self._soon:
                self._soon.popleft()()
            if not self._later or self._later[0][0] > end_s:
                break
            self.now_s, _, timer = heapq.heappop(self._later)
            if not timer.cancelled:
                timer.callback()
        self.now_s = end_s


class Timer:
    def __init__(self, callback):
        self.callback, self.cancelled = callback, False

    def cancel(self):
        self.cancelled = True


class FakeInstance:
    def __init__(self):
        self.batches = deque()
        self.slot = 0
        self.answers = [memoryview(bytes(range(200))), memoryview(bytes(range(200)))]
        self.orders = []
        self.killed_for = ""

    def send(self, message):
        self.orders.append(wire.decode_order(message))

    def kill(self, why):
        self.killed_for = why


class Bench:
    """A lane, its calls, and what was told of them."""

    def __init__(self, *, stackable=True, instances=1, **options):
        self.loop = Loop()
        self.held = {}
        self.told = {}
        options = ModelOptions(
            **{"max_batch_rows": 4, "instances": 1, "max_queue": MAX_QUEUE, "timeout_s": TIMEOUT_S, **options}
        )
        self.lane = Lane(
            METADATA,
            "1",
            options,
            stackable=stackable,
            release=lambda buffer: self.held.pop(buffer.offset),
            clock=lambda: self.loop.now_s,
            loop=self.loop,
        )
        self.signature = Signature(METADATA, lambda name: pytest.fail("no regions here"))
        self._offset = itertools.count(64, 64)
        self.instances = [FakeInstance() for _ in range(instances)]
        for instance in self.instances:
            self.lane.add(instance)

    def ask(self, rows=1, **fields):
        buffer = Buffer(next(self._offset), memoryview(bytearray(64)), "test")
        call = Call("m", "", (TensorRef("x", "UINT8", (rows, 2), 0, rows * 2),), self._done, buffer, **fields)
        self.held[buffer.offset] = call
        try:
            self.lane.submit(call, self.signature.form(call))
        except Exception:
            del self.held[buffer.offset]
            raise
        return call

    def _done(self, call):
        assert id(call) not in self.told, "a call is told once"
        assert (call.answer is None) != (call.error is None)
        self.told[id(call)] = call

    def answer(self, instance, code=wire.OK):
        """Have an instance answer its oldest batch, all rows or each call by itself."""
        batch = instance.batches[0]
        if code == wire.OK and len(batch.tickets) > 1 and self.lane.stackable:
            done = wire.Done(batch.number, 1, 0.1, 0.1, 0.1, [wire.Rows(0, (2,), 0, 2)], [])
        else:
            ended = [wire.Ended(code, "why", [wire.Found(0, (t.rows, 2), 0, 2 * t.rows)]) for t in batch.tickets]
            done = wire.Done(batch.number, len(ended), 0.1, 0.1, 0.1, [], ended)
        self.lane.on_done(instance, done)

    def die(self, instance):
        self.lane.on_end(instance, "signal TEST")
        fresh = FakeInstance()
        self.instances[self.instances.index(instance)] = fresh
        self.lane.add(fresh)


def tickets(instance):
    return [ticket.request for ticket in instance.batches[0].tickets]


def test_what_is_submitted_in_one_iteration_is_one_batch():
    bench = Bench()
    calls = [bench.ask() for _ in range(3)]
    assert not bench.instances[0].batches
    bench.loop.advance(0)
    assert tickets(bench.instances[0]) == calls
    [order] = bench.instances[0].orders
    assert (order.stacked, order.offsets) == (True, [64, 128, 192])


def test_each_call_of_a_batch_gets_its_own_rows():
    bench = Bench()
    calls = [bench.ask(rows) for rows in (1, 2, 1)]
    bench.loop.advance(0)
    bench.answer(bench.instances[0])
    assert [bytes(call.answer.outputs[0].data) for call in calls] == [b"\x00\x01", b"\x02\x03\x04\x05", b"\x06\x07"]
    assert [call.answer.outputs[0].shape for call in calls] == [(1, 2), (2, 2), (1, 2)]
    assert not bench.held


def test_the_next_batch_is_under_way_before_the_last_one_is_told():
    bench = Bench()
    seen = []
    bench._done = lambda call: seen.append(len(bench.instances[0].batches))
    for _ in range(5):
        bench.ask()
    bench.loop.advance(0)
    bench.answer(bench.instances[0])
    assert seen == [1, 1, 1, 1]
    assert bench.instances[0].orders[0].slot != bench.instances[0].orders[1].slot


def test_calls_of_a_batch_that_killed_its_instance_are_each_run_alone_and_the_deadly_one_fails():
    bench = Bench()
    calls = [bench.ask() for _ in range(3)]
    bench.loop.advance(0)
    bench.die(bench.instances[0])
    assert tickets(bench.instances[0]) == calls[:1]
    bench.answer(bench.instances[0])
    assert tickets(bench.instances[0]) == calls[1:2]
    bench.die(bench.instances[0])
    bench.answer(bench.instances[0])
    assert [type(call.error) for call in calls] == [type(None), Unavailable, type(None)]
    assert not bench.held


def test_a_run_past_the_models_time_gets_its_instance_killed_whatever_its_calls_asked_for():
    bench = Bench()
    call = bench.ask(timeout_s=0.5)
    bench.loop.advance(0.5)
    assert isinstance(call.error, Unavailable)
    assert not bench.instances[0].killed_for
    assert bench.held, "it may still be read"
    bench.loop.advance(TIMEOUT_S - 0.5)
    assert "longer than 5 s" in bench.instances[0].killed_for
    bench.die(bench.instances[0])
    assert not bench.held


def test_answers_that_filled_the_memory_are_fetched_again_alone():
    bench = Bench()
    calls = [bench.ask() for _ in range(2)]
    bench.loop.advance(0)
    bench.answer(bench.instances[0], wire.AGAIN)
    bench.loop.advance(0)
    for call in calls:
        assert tickets(bench.instances[0]) == [call]
        bench.answer(bench.instances[0])
    assert all(call.answer is not None for call in calls)


def test_short_calls_that_cannot_be_stacked_come_to_share_a_message():
    bench = Bench(stackable=False, max_queue=1000)
    lengths = []
    for _ in range(300):
        bench.ask()
    bench.loop.advance(0)
    while bench.instances[0].batches:
        batch = bench.instances[0].batches[0]
        lengths.append(len(batch.tickets))
        ended = [wire.Ended(wire.OK, "", [wire.Found(0, (1, 2), 0, 2)]) for _ in batch.tickets]
        bench.lane.on_done(bench.instances[0], wire.Done(batch.number, len(ended), 0.0, 1e-5 * len(ended), 0.0, [], ended))
    assert lengths[0] == 1
    assert max(lengths) == 128, "2 ms of 10 µs each, down to a power of two"
    assert not bench.instances[0].orders[-1].stacked
    assert len(bench.told) == 300


def test_outputs_asked_for_in_another_order_do_not_share_a_batch():
    bench = Bench()
    bench.ask()
    bench.ask(outputs=(Wanted("y"),))
    bench.loop.advance(0)
    assert len(tickets(bench.instances[0])) == 1


def test_how_many_sizes_are_counted_apart_is_not_for_clients_to_say():
    bench = Bench()
    for rows in range(1, 31):
        bench.ask(rows)
        bench.loop.advance(0)
        bench.instances[0].batches[0].tickets[0].form.rows = rows * 100
        bench.answer(bench.instances[0])
    assert set(bench.lane.statistics.batches) == {100, 200, 256, 512, 1024, 2048}


_STEP = st.tuples(st.sampled_from(("ask", "slow", "cancel", "answer", "fail", "again", "die", "wait")), st.integers(0, 30))


@settings(max_examples=150, deadline=None)
@given(st.lists(_STEP, max_size=60), st.booleans(), st.integers(1, 2))
def test_every_call_is_told_once_and_all_memory_comes_back_whatever_happens(steps, stackable, instances):
    bench = Bench(stackable=stackable, instances=instances)
    calls, cancelled = [], set()
    for step, number in steps:
        instance = bench.instances[number % instances]
        if step in ("ask", "slow"):
            try:
                calls.append(bench.ask(1 + number % 3, timeout_s=1.0 if step == "slow" else 0.0))
            except Overloaded:
                assert len(bench.lane._queue) == MAX_QUEUE
        elif step == "cancel" and calls:
            call = calls[number % len(calls)]
            if call.ticket is not None:
                bench.lane.cancel(call.ticket)
                cancelled.add(id(call))
        elif step == "wait":
            bench.loop.advance(number / 10)
        elif instance.batches and step == "die":
            bench.die(instance)
        elif instance.batches and step in ("answer", "fail", "again"):
            bench.answer(instance, {"answer": wire.OK, "fail": wire.FAILED, "again": wire.AGAIN}[step])
        running = sum(len(batch.tickets) for each in bench.instances for batch in each.batches)
        assert bench.lane.open >= running
        if not running:
            bench.loop.advance(0)
    for _ in range(200):
        for instance in bench.instances:
            if instance.batches:
                bench.answer(instance)
        bench.loop.advance(0.01)
    assert bench.lane.open == 0
    assert not bench.held
    assert set(bench.told) | cancelled == {id(call) for call in calls}
    assert not set(bench.told) & cancelled
    assert sum(bench.lane.statistics.outcomes.values()) == len(calls)
