"""One version of one model: its queue, the batches in its instances, and who is told what. No coroutine runs per request.

    submit ─► queue (decide.batching) ─► batch ─► instance ─► done(call), once each
                 ▲    once per loop iteration        │ dies or hangs
                 └── calls that had company: alone ──┘

When an instance dies, the batch it ran is suspect: each of its calls is tried once more, alone, so that only the one
that kills it fails. A run that takes longer than the model's timeout is ended by killing its instance.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tenure.decide.batching import BatchPolicy, BatchQueue
from tenure.decide.retries import Retries
from tenure.errors import TenureError, Unavailable
from tenure.serve import batchwire as wire
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded
from tenure.serve.plane import Answer, Buffer, Call, ModelOptions, Output
from tenure.serve.tally import Tally
from tenure.serve.tensors import ModelMetadata
from tenure.serve.tickets import QUEUED, RUNNING, TOLD, Batch, Ticket

if TYPE_CHECKING:
    from tenure.serve.instances import Instance
    from tenure.serve.signature import Form

_LOG = logging.getLogger(__name__)
_SHORT_RUN_S = 0.002
"""Calls that cannot be stacked share a message as long as they take less than this together."""


class Lane:
    """See the module."""

    def __init__(
        self,
        metadata: ModelMetadata,
        version: str,
        options: ModelOptions,
        *,
        stackable: bool,
        batchable: bool = True,
        release: Callable[[Buffer], None],
        clock: Callable[[], float] = time.monotonic,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """options: with nothing left to choose. release: gives a buffer back to the arena. loop: else the running one."""
        self.metadata = metadata
        self.version = version
        self.options = options
        self._tally = Tally()
        self.statistics = self._tally.statistics
        self.accepting = True
        self.stackable = stackable
        """Whether calls are run as one."""
        self.batchable = batchable
        """Whether a call's first dimension is its rows."""
        self.mixed_up = False
        """Whether a stacked run had not one row for each row, which it promised by its signature."""
        self.instances: list[Instance] = []
        """Those that are ready."""
        self._release = release
        self._clock = clock
        self._retries = Retries()
        self._loop = loop or asyncio.get_running_loop()
        self._max_calls = _max_calls(metadata)
        rows = min(options.max_batch_rows, self._max_calls) if stackable else 1
        self._queue = BatchQueue(
            BatchPolicy(max_batch_rows=rows, max_delay_s=options.max_delay_s if stackable else 0, max_waiting=options.max_queue)
        )
        self._again: deque[Ticket] = deque()
        self._open = 0
        """Calls accepted and not yet ended, those that run for nobody among them."""
        self._number = 0
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at_s = math.inf
        self._empty: asyncio.Future[None] | None = None
        self._all_outputs = tuple((meta.name, meta.datatype) for meta in metadata.outputs)

    # ---- what the plane calls

    def submit(self, call: Call, form: Form) -> None:
        """Queue a checked call. Raises Overloaded, Unavailable; the buffer stays the caller's then."""
        if not self.accepting:
            raise Unavailable(f'model "{self.metadata.name}" is not ready; try again')
        now_s = self._clock()
        options = self.options
        priority = 1
        if options.priority_levels:
            priority = min(call.priority, options.priority_levels) if call.priority > 0 else (options.priority_levels + 1) // 2
        timeout_s = min(call.timeout_s, options.timeout_s) or options.timeout_s
        ticket = Ticket(self, call, form, arrived_at_s=now_s, timeout_s=timeout_s, priority=priority)
        if not self._queue.add(ticket):
            raise Overloaded(
                f'model "{self.metadata.name}" has {len(self._queue)} requests waiting, its limit; try again',
                retry_after_s=self._retries.after_s(now_s, *self.pace_s()),
            )
        call.ticket = ticket
        self._open += 1
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_pump)

    def cancel(self, ticket: Ticket) -> None:
        """Tell nobody about a call; drop it if it still waits."""
        if ticket.state == TOLD:
            return
        self._tally.ended("cancelled")
        ticket.request.ticket = None
        queued = ticket.state == QUEUED
        ticket.state = TOLD
        if queued:
            if not self._queue.drop(ticket):
                self._again.remove(ticket)
            self._end(ticket)

    def refused(self, error: TenureError) -> None:
        """Count a call that was refused before it was queued."""
        self._tally.failed(error, 0.0)

    def pace_s(self) -> tuple[float, float]:
        """Return the time to half of what is queued, and from one row to the next, seconds, at the rate measured lately."""
        row_s = self._tally.unit_s / max(1, len(self.instances))
        return self._queue.rows * row_s / 2, row_s

    def add(self, instance: Instance) -> None:
        """Let a ready instance have work."""
        self.instances.append(instance)
        self._pump()

    async def drained(self) -> None:
        """Wait until every accepted call has ended."""
        while self._open:
            self._empty = self._loop.create_future()
            await self._empty

    @property
    def open(self) -> int:
        """Calls accepted and not yet ended."""
        return self._open

    def fail_all(self, error: TenureError) -> None:
        """Tell every waiting call that it will not be answered."""
        now_s = self._clock()
        waiting = [*self._again]
        self._again.clear()
        self._queue.policy = BatchPolicy(max_batch_rows=1 << 60, max_waiting=self.options.max_queue)
        while len(self._queue):
            plan = self._queue.plan(1, now_s)
            waiting += [*plan.expired, *(item for batch in plan.batches for item in batch)]  # type: ignore[list-item]
        for ticket in waiting:
            self._fail(ticket, error)
            self._end(ticket)

    # ---- scheduling

    def _scheduled_pump(self) -> None:
        self._scheduled = False
        self._pump()

    def _pump(self) -> None:
        """Start what can start now, fail what has waited too long, and see to being woken in time."""
        now_s = self._clock()
        free = [instance for instance in self.instances if not instance.batches]
        if self._again:
            self._pump_again(free, now_s)
        plan = self._queue.plan(len(free), now_s)
        for batch in plan.batches:
            self._send(free.pop(), batch, now_s)  # type: ignore[arg-type]
        for waiting in plan.expired:
            self._fail(waiting, self._late(waiting))  # type: ignore[arg-type]
            self._end(waiting)  # type: ignore[arg-type]
        self._wake_at(plan.look_again_at_s)

    def _pump_again(self, free: list[Instance], now_s: float) -> None:
        """Run calls that are tried again, each alone."""
        late = [ticket for ticket in self._again if ticket.deadline_s <= now_s]
        for ticket in late:
            self._again.remove(ticket)
            self._fail(ticket, self._late(ticket))
            self._end(ticket)
        while free and self._again:
            self._send(free.pop(), [self._again.popleft()], now_s)
        if self._again:
            self._wake_at(min(ticket.deadline_s for ticket in self._again))

    def _send(self, instance: Instance, tickets: list[Ticket], now_s: float) -> None:
        self._number += 1
        instance.slot = slot = (instance.slot + 1) % wire.SLOTS
        offsets, layouts, expires_at_s, queued_s = [], [], math.inf, 0.0
        for ticket in tickets:
            ticket.state = RUNNING
            ticket.deadline_s = ticket.answer_by_s
            buffer = ticket.request.buffer
            offsets.append(buffer.offset if buffer is not None else 0)
            layouts.append(ticket.form.layout)
            queued_s += now_s - ticket.arrived_at_s
            if ticket.deadline_s < expires_at_s:
                expires_at_s = ticket.deadline_s
        self.statistics.queue.add(queued_s, len(tickets))
        instance.batches.append(Batch(self._number, slot, tickets, now_s, expires_at_s))
        instance.send(wire.encode(wire.Run(self._number, slot, self.stackable, offsets, layouts)))
        self._wake_at(min(expires_at_s, now_s + self.options.timeout_s))

    def _wake_at(self, at_s: float) -> None:
        if at_s < self._wakes_at_s:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at_s = at_s
            self._timer = self._loop.call_later(max(0.0, at_s - self._clock()), self._wake)

    def _wake(self) -> None:
        self._timer, self._wakes_at_s = None, math.inf
        now_s = self._clock()
        for instance in self.instances:
            if instance.batches and instance.batches[0].began_at_s + self.options.timeout_s <= now_s:
                instance.kill(f"a run took longer than {self.options.timeout_s:g} s")
            for batch in instance.batches:
                if batch.expires_at_s <= now_s:
                    for ticket in batch.tickets:
                        if ticket.deadline_s <= now_s:
                            self._fail(ticket, self._late(ticket))
                    left = [ticket.deadline_s for ticket in batch.tickets if ticket.state != TOLD]
                    batch.expires_at_s = min(left, default=math.inf)
                self._wake_at(min(batch.expires_at_s, max(now_s + 0.01, batch.began_at_s + self.options.timeout_s)))
        self._pump()

    # ---- what instances report

    def on_done(self, instance: Instance, report: wire.Done) -> None:
        """A batch has ended: give its instance the next one, then tell its calls."""
        batch = instance.batches.popleft()
        now_s = self._clock()
        if instance.batches:
            instance.batches[0].began_at_s = now_s
        units = rows = len(batch.tickets)
        if self.batchable:
            rows = sum([ticket.form.rows for ticket in batch.tickets])
        self._tally.ran(report, rows, rows if self.stackable else units)
        if not self.stackable:
            self._share(min(self._max_calls, int(_SHORT_RUN_S / max(self._tally.unit_s, 1e-9))))
        elif not report.stackable:
            self._stop_stacking()
        if self._queue or self._again:
            self._pump()
        memory = instance.answers[batch.slot]
        if report.rows:
            self._tell_rows(batch.tickets, report.rows, memory, now_s)
        else:
            self._tell_each(batch.tickets, report.ended, memory, now_s)

    def on_end(self, instance: Instance, why: str) -> None:
        """An instance is gone: fail the call that it died of, try the others again."""
        if instance in self.instances:
            self.instances.remove(instance)
        for position, batch in reversed(list(enumerate(instance.batches))):
            for ticket in reversed(batch.tickets):
                if ticket.state == TOLD:
                    self._end(ticket)
                elif position or len(batch.tickets) > 1:
                    ticket.state = QUEUED
                    self._again.appendleft(ticket)
                else:
                    self._fail(ticket, Unavailable(f'the process of model "{self.metadata.name}" ended in this request: {why}'))
                    self._end(ticket)
        instance.batches.clear()
        self._pump()

    # ---- telling

    def _tell_rows(self, tickets: list[Ticket], rows: list[wire.Rows], memory: memoryview, now_s: float) -> None:
        name, version = self.metadata.name, self.version
        parts = [(*self._all_outputs[each.output], each.shape, each.offset, each.row_bytes) for each in rows]
        at, told, count, total_s = 0, 0, 0, 0.0
        for ticket in tickets:
            length = ticket.rows
            if ticket.state != TOLD:
                ticket.state = TOLD
                told += 1
                count += length
                total_s += now_s - ticket.arrived_at_s
                call = ticket.request
                call.ticket = None  # no cycle is left to the garbage collector
                end = at + length
                outputs = [
                    Output(output, kind, (length, *shape), memory[o + at * width : o + end * width], "", 0, length * width)
                    for output, kind, shape, o, width in parts
                ]
                call.answer = Answer(name, version, tuple(outputs))
                if call.buffer is not None:
                    self._release(call.buffer)
                self._call_done(call)
            elif ticket.request.buffer is not None:
                self._release(ticket.request.buffer)
            at += length
        self._closed(len(tickets))
        self._tally.answered(told, count, total_s)

    def _tell_each(self, tickets: list[Ticket], ended: list[wire.Ended], memory: memoryview, now_s: float) -> None:
        name, version, release = self.metadata.name, self.version, self._release
        told, count, total_s = 0, 0, 0.0
        for ticket, end in zip(tickets, ended, strict=True):
            if ticket.state == TOLD:
                self._end(ticket)
            elif end.code == wire.OK:
                ticket.state = TOLD
                told += 1
                count += ticket.form.rows
                total_s += now_s - ticket.arrived_at_s
                call = ticket.request
                call.ticket = None
                call.answer = Answer(name, version, self._outputs(call, end.outputs, memory))
                if call.buffer is not None:
                    release(call.buffer)
                self._call_done(call)
            elif end.code == wire.AGAIN:
                ticket.state = QUEUED
                self._again.append(ticket)
                self._schedule()
            else:
                self._fail(ticket, InputRefused(end.text) if end.code == wire.REFUSED else ModelFailed(end.text))
                self._end(ticket)
        self._closed(told)
        self._tally.answered(told, count if self.batchable else told, total_s)

    def _outputs(self, call: Call, outputs: list[wire.Found], memory: memoryview) -> tuple[Output, ...]:
        if not call.outputs:
            known = self._all_outputs
            return tuple(
                [Output(*known[f.output], f.shape, memory[f.offset : f.offset + f.nbytes], "", 0, f.nbytes) for f in outputs]
            )
        made = []
        for wanted, found in zip(call.outputs, outputs, strict=True):
            data = None if wanted.region else memory[found.offset : found.offset + found.nbytes]
            offset = found.offset if wanted.region else 0
            name, datatype = self._all_outputs[found.output]
            made.append(Output(name, datatype, found.shape, data, wanted.region, offset, found.nbytes))
        return tuple(made)

    def _fail(self, ticket: Ticket, error: TenureError) -> None:
        """Tell a call that it failed, unless it was told before; its memory is given back by `_end`."""
        if ticket.state == TOLD:
            return
        ticket.state = TOLD
        ticket.request.ticket = None
        self._tally.failed(error, self._clock() - ticket.arrived_at_s)
        ticket.request.error = error
        self._call_done(ticket.request)

    def _call_done(self, call: Call) -> None:
        try:
            call.done(call)
        except Exception:
            _LOG.exception("a door failed while it was told of an answer")

    def _end(self, ticket: Ticket) -> None:
        """Nothing reads the call's memory any more."""
        if ticket.request.buffer is not None:
            self._release(ticket.request.buffer)
        self._closed(1)

    def _closed(self, count: int) -> None:
        self._open -= count
        if not self._open and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _late(self, ticket: Ticket) -> Unavailable:
        limit_s = ticket.deadline_s - ticket.arrived_at_s
        return Unavailable(f'model "{self.metadata.name}" did not answer within {limit_s:g} s')

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_pump)

    def _stop_stacking(self) -> None:
        self.stackable, self.mixed_up = False, True
        self._share(1)

    def _share(self, calls: int) -> None:
        """Let at most so many calls that are not stacked share a message: powers of two, so that it settles."""
        calls = 1 << max(calls, 1).bit_length() - 1
        if calls != self._queue.policy.max_batch_rows:
            self._queue.policy = BatchPolicy(max_batch_rows=calls, max_waiting=self.options.max_queue)


def _max_calls(metadata: ModelMetadata) -> int:
    """Return how many calls fit into a message both ways, whatever becomes of them."""
    one = 1000 + sum(40 + 9 * len(meta.shape) for meta in (*metadata.inputs, *metadata.outputs)) * 2
    return max(1, min(256, wire.MAX_MESSAGE_BYTES // one))
