"""One HTTP connection: bytes in, calls to the data plane, answers out. Small Python per request decides the door's speed.

    head ─┬─ raw tensors after JSON: read straight to their buffer ──────────► submit … answered ─► write
          ├─ other bodies: collected first (`http_bodies`), then made ready ─► submit … answered ─► write
          └─ refused: what is still coming is read and forgotten, then the reason is written

One request at a time: what a client sends meanwhile waits, unread past one read. Reads go to a scratch buffer that all
connections of a door share (the loop reads right after it has asked where to), large bodies straight to their arena buffer.
Not here: how answers are written (`http_writing`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from tenure.errors import TenureError
from tenure.serve.codec_http import Template
from tenure.serve.faults import InputRefused, TooLarge
from tenure.serve.http1 import CONTINUE, BadMessage, Head
from tenure.serve.http_bodies import Body
from tenure.serve.http_requests import MAX_INLINE_BYTES, Known, check_raw, prepare
from tenure.serve.http_routes import Reply, reply
from tenure.serve.http_writing import BODY, BUSY, COLLECT, DISCARD, HEAD, LINGER, NO_HEAD, Writing
from tenure.serve.plane import Buffer, Call

if TYPE_CHECKING:
    from tenure.serve.http import HttpDoor

LINGER_S = 5.0
"""How long a client may take to leave after its last answer."""
MAX_CONTROL_BYTES = 1 << 20
"""Body of a request that is no inference."""
_HEAD_START = 0.1
"""Share of the time for a body in which its pace does not matter yet."""
_IN_REGION = b'"shared_memory_region"'


class Connection(Writing):
    """See the module."""

    def __init__(self, door: HttpDoor) -> None:
        super().__init__(door)
        self._scratch, self._scratch_view = door.scratch, door.scratch_view
        self._filled = 0
        """Of the target."""
        self._direct = False
        """The body in reading is one whose meaning is known."""

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # told as soon as all is written
        self._fd = transport.get_extra_info("socket").fileno()
        self._door.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        self._fd = -1  # it may be another connection's by now
        self._done = _nobody  # no cycle is left to the garbage collector
        self._leave_behind()
        self._door.unsent_bytes -= self.unsent_bytes
        self.unsent_bytes = 0
        self._door.left(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        return self._scratch_view if self._target is None else self._target[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        try:
            if self.state == HEAD and not self._pending:
                used = self._take(self._scratch, self._scratch_view, nbytes)
                if used < nbytes:
                    self._pending = bytes(self._scratch_view[used:nbytes])
                    if used:
                        self._work_off()
            elif self._target is not None:
                self._filled += nbytes
                if self._filled == len(self._target):
                    self._complete()
            elif self.state != LINGER:
                self._pending += self._scratch_view[:nbytes]
                self._work_off()
        except Exception as error:
            self._fail(error)

    # What the door calls

    def check(self, now_s: float) -> None:
        """Hold the connection against its time limits."""
        limits, state = self._door.limits, self.state
        waited_s = now_s - self.since_s - self._door.tick_s  # since_s may be a tick old when it is written
        if self.unsent_bytes:
            left = self._transport.get_write_buffer_size()
            if left < self.unsent_bytes:
                self._door.unsent_bytes -= self.unsent_bytes - left
                self.unsent_bytes, self.since_s = left, now_s
            elif waited_s > limits.write_timeout_s:
                self.abort()
        elif state == LINGER:
            if waited_s > min(LINGER_S, limits.body_timeout_s):
                self.abort()
        elif state == HEAD and not self._pending:
            if waited_s > limits.idle_timeout_s:
                self.abort()
        elif state == HEAD and not self._pending.startswith(self._head.raw):
            if waited_s > limits.head_timeout_s:
                self._fail(BadMessage(f"the request's head did not arrive within {limits.head_timeout_s:g} s", 408))
        elif state != BUSY and (waited_s > limits.body_timeout_s or self._too_slow(waited_s)):
            self._fail(BadMessage(f"the request's body did not arrive, or would not, within {limits.body_timeout_s:g} s", 408))

    def _too_slow(self, waited_s: float) -> bool:
        """Whether a body falls behind the pace that ends in time: who claims much memory and sends nothing has it briefly."""
        if self._target is None:
            return False
        due = waited_s / self._door.limits.body_timeout_s - _HEAD_START
        return self._filled < due * len(self._target)

    def is_idle(self, for_s: float) -> bool:
        """Whether nothing has been asked here for so long, and nothing is due."""
        return self.state == HEAD and not self._pending and not self.unsent_bytes and self._door.now_s - self.since_s >= for_s

    def leave(self) -> None:
        """Close, unless something is asked or due: then the answer tells the client to leave."""
        if self.state == HEAD and not self._pending and not self.unsent_bytes:
            self._transport.close()

    # Reading

    def _go_on(self) -> None:
        self._soon = False
        try:
            self._work_off()
        except Exception as error:
            self._fail(error)

    def _work_off(self) -> None:
        """Use what has been read; read no more while it has to wait."""
        while self._pending and not self._gone:
            state, data = self.state, self._pending
            if self.unsent_bytes or state == BUSY or self._steps is not None:
                self._transport.pause_reading()
                return
            if state == HEAD:
                used = self._take(data, memoryview(data), len(data))
                if not used:
                    break
                if self.state == HEAD and used < len(data):  # answered at once: others have their turn before the next
                    self._pending = data[used:]
                    self._transport.pause_reading()
                    self._go_on_soon()
                    return
            elif state == BODY:
                used = self._fill(data)
            elif state == COLLECT:
                used = self._collect(data)
            elif state == DISCARD:
                used = min(self._left, len(data))
                self._left -= used
            else:
                used = len(data)
            self._pending = data[used:]
            if self.state == DISCARD and not self._left:
                self._pay()
        if not (self._gone or self.unsent_bytes or self._transport.is_reading()):
            self._transport.resume_reading()

    def _take(self, data: bytes | bytearray, view: memoryview, size: int) -> int:
        """Begin with the request at the start of data[:size]; return how many bytes were used, 0 when more are needed."""
        head = self._head
        at = len(head.raw)
        if size < at or not data.startswith(head.raw):
            found = self._read_head(data, view, size)
            if found is None:
                return 0
            head = self._head = found
            at = len(head.raw)
        target = head.target
        if target is None or not head.direct:
            self._begin(head)
            return at
        whole = head.json_length is None  # such bodies are worth a look only where all tensors lie in regions
        end = at + (head.length if head.json_length is None else head.json_length)
        if size < end:
            self._note_arrival()
            return 0
        known = self._known
        if known.target != target or len(known.content) != end - at or not data.startswith(known.content, at):
            other = None if whole and data.find(_IN_REGION, at, end) < 0 else self._recall(target, view[at:end])
            if other is None:
                self._begin(head)
                return at
            known = self._known = other
        raw_bytes = head.length - end + at
        try:
            if known.raw_bytes != raw_bytes:
                check_raw(known.template, raw_bytes)
            buffer = self._plane.reserve(raw_bytes, "http") if raw_bytes else None
        except TenureError as error:
            self._refuse(error, raw_bytes)
            return end
        stop = end + raw_bytes
        if size >= stop:
            if buffer is not None:
                buffer.view[:raw_bytes] = view[end:stop]
            self._submit(known, buffer)
            return stop
        assert buffer is not None
        self._read_into(buffer, raw_bytes, known)
        self._fill(view[end:size])
        return size

    def _read_head(self, data: bytes | bytearray, view: memoryview, size: int) -> Head | None:
        self._head = NO_HEAD  # whatever is wrong with this one is not answered as the last one asked
        limit = self._door.limits.max_head_bytes
        end = data.find(b"\r\n\r\n", 0, size) + 4
        if (end if end > 3 else size) > limit:
            raise BadMessage(f"a request's head may have {limit} bytes; this one has more", 431)
        self._note_arrival()
        if end < 4:
            return None
        start = 2 if data.startswith(b"\r\n") else 0  # an empty line before a request is forgiven (RFC 9112, 2.2)
        found = self._door.head(bytes(view[start:end]))
        return replace(found, raw=bytes(view[:end])) if start else found

    def _note_arrival(self) -> None:
        """Start the clock of a request at its first byte."""
        if not self._pending:
            self.since_s = self._door.now_s

    def _recall(self, target: tuple[str, str], content: memoryview) -> Known | None:
        try:
            return self._door.known(target, bytes(content))
        except InputRefused:
            return None  # the slower way says so when the body has been read

    def _begin(self, head: Head) -> None:
        """Start with the body of a request that can't be read straight to its place; its head is used."""
        max_bytes = self._door.limits.max_request_bytes if head.target else MAX_CONTROL_BYTES
        self.since_s = self._door.now_s
        try:
            if head.refused is not None:
                raise head.refused
            if head.length > max_bytes:
                raise TooLarge(f"a request may have {max_bytes} bytes here; this one has {head.length}")
            if head.chunked or (head.encoding and head.length):
                self._body = Body(self._plane, head, door="http", max_bytes=max_bytes)
                self.state = COLLECT
            elif head.length:
                self._read_into(self._plane.reserve(head.length, "http"), head.length, None)
            else:
                self._use(None, 0)
                return
        except TenureError as error:
            self._refuse(error, None if head.chunked else head.length)
            return
        if head.expects:
            self._send(CONTINUE, [])

    def _read_into(self, buffer: Buffer, size: int, known: Known | None) -> None:
        """Have what is left of a body read straight to its place. known: what it says, if that is known."""
        self._buffer, self._target, self._filled = buffer, buffer.view[:size], 0
        self._direct = known is not None
        self.state = BODY
        self.since_s = self._door.now_s

    def _fill(self, data: bytes | memoryview) -> int:
        assert self._target is not None
        used = min(len(data), len(self._target) - self._filled)
        self._target[self._filled : self._filled + used] = data[:used]
        self._filled += used
        if self._filled == len(self._target):
            self._complete()
        return used

    def _complete(self) -> None:
        """All of a body of known length is there."""
        buffer, size = self._buffer, self._filled
        self._buffer = self._target = None
        if self._direct:
            self._submit(self._known, buffer)
        else:
            self._use(buffer, size)

    def _collect(self, data: bytes) -> int:
        assert self._body is not None
        used, self._steps = self._body.feed(data)
        self._step()
        return used

    def _step(self) -> None:
        """Store one piece of a collected body; one that unpacks to a lot lets others have their turn in between."""
        body, steps = self._body, self._steps
        if self._gone or body is None or steps is None:
            return
        try:
            if next(steps, steps) is None:
                self._door.loop.call_soon(self._step_on)
                return
            self._steps = None
            if not body.ended:
                return
            buffer, size = body.take()
        except TenureError as error:
            rest = body.rest
            self._drop()
            self._refuse(error, rest)
            return
        self._body = None
        self._use(buffer, size)

    def _step_on(self) -> None:
        try:
            self._step()
            self._work_off()
        except Exception as error:
            self._fail(error)

    # Using whole bodies

    def _use(self, buffer: Buffer | None, size: int) -> None:
        """Do what a request asks for whose body is there."""
        head = self._head
        self.state = BUSY
        if head.target is None:
            body = b"" if buffer is None else bytes(buffer.view[:size])
            if buffer is not None:
                self._plane.release(buffer)
            self._control(head, body)
        elif (size if head.json_length is None else head.json_length) > MAX_INLINE_BYTES:
            self._door.start(self._use_aside(head, buffer, size))
        else:
            try:
                template, other = self._prepare(head, buffer, size, aside=False)
            except TenureError as error:
                self._release(buffer)
                self._refuse(error, 0)
                return
            self._submit_prepared(head, template, buffer, other)

    async def _use_aside(self, head: Head, buffer: Buffer | None, size: int) -> None:
        try:
            template, other = await self._door.in_thread(partial(self._prepare, head, buffer, size, aside=True))
        except BaseException as error:
            self._release(buffer)
            if not isinstance(error, Exception):
                raise
            self._fail(error, done=True)
            return
        if self._gone:
            self._release(buffer)
            self._release(other)
        else:
            self._submit_prepared(head, template, buffer, other)

    def _prepare(self, head: Head, buffer: Buffer | None, size: int, *, aside: bool) -> tuple[Template, Buffer | None]:
        door = self._door
        return prepare(
            memoryview(b"") if buffer is None else buffer.view[:size],
            head.json_length,
            max_json_bytes=door.limits.max_json_bytes,
            reserve=door.reserve_from_thread if aside else door.reserve,
            release=door.release_from_thread if aside else self._plane.release,
        )

    def _submit_prepared(self, head: Head, template: Template, buffer: Buffer | None, other: Buffer | None) -> None:
        if other is not None:
            self._release(buffer)
            buffer = other
        assert head.target is not None
        self._known = Known(head.target, b"\0", template)
        self._submit(self._known, buffer)

    def _control(self, head: Head, body: bytes) -> None:
        try:
            found = reply(self._plane, head.method, head.path, body)
        except TenureError as error:
            self._refuse(error, 0)
            return
        if isinstance(found, Reply):
            self._reply(found)
        else:
            self._door.start(self._reply_later(found))

    async def _reply_later(self, work: Awaitable[Reply]) -> None:
        try:
            found = await work
            if not self._gone:
                self._reply(found)
        except Exception as error:
            self._fail(error, done=True)

    def _submit(self, known: Known, buffer: Buffer | None) -> None:
        model, version = known.target
        said = known.template
        call = Call(
            model,
            version,
            said.inputs,
            self._done,
            buffer,
            said.outputs,
            said.id,
            said.priority,
            said.timeout_s,
        )
        self._call = call
        self.state = BUSY
        try:
            self._plane.submit(call)
        except TenureError as error:
            self._call = None
            self._refuse(error, 0)


def _nobody(call: Call) -> None:
    """Take an answer for which nobody waits."""
