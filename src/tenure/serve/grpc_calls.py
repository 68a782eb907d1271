"""Calls of one gRPC connection: from message bytes to calls of the data plane, and from answers to frames.

A message's length stands in its first five bytes. Only when the plane has given it a buffer does its stream's window
open, so that bodies past the memory budget are not even sent; what has a buffer is read from the socket straight into it.
Not here: the socket (`grpc_connection`), frames (`http2`), messages (`codec_infer`), what else is served (`grpc_service`).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from tenure.errors import InternalError, TenureError
from tenure.serve import grpc_status
from tenure.serve.codec_infer import Template, first_raw, stream_error
from tenure.serve.faults import InputRefused, Overloaded, TooLarge
from tenure.serve.grpc_inflate import inflate
from tenure.serve.grpc_request import DOOR, Plan, Request, Slot, placed
from tenure.serve.grpc_service import INFER, STREAM, UNARY
from tenure.serve.grpc_status import HEADERS, TRAILERS, StatusError
from tenure.serve.http2 import Connection
from tenure.serve.http2_headers import Head
from tenure.serve.http2_send import FIRST_WINDOW, Stream
from tenure.serve.plane import ALIGNMENT, Buffer, Call

if TYPE_CHECKING:
    from tenure.serve.grpc import GrpcDoor

SMALL_BYTES = 1024
"""Messages up to this length need no buffer of the plane: health checks are answered when the budget is used up."""
MAX_WORK = 16
"""Loads and unloads of models at a time."""
MAX_UNARY_BYTES = 1 << 20
"""Of calls that are no inference."""
MAX_HELD_BYTES = 8 << 20
"""Answers that one peer's windows keep here; past it, its new requests are refused."""
MAX_STREAM_REQUESTS = 4096
"""Requests of one stream that wait for their answers; its window stays shut from a sixteenth of it on."""
_log = logging.getLogger(__name__)
_PREFIX = struct.Struct(">BL")


class Calls:
    """Handler of one connection's HTTP/2 state."""

    def __init__(self, door: GrpcDoor) -> None:
        self._door = door
        self._plane = door.plane
        self._limits = door.limits
        self.h2 = Connection(self, max_streams=door.max_streams)
        self._done_call, self._done_slot = self._done, self._slot_done

    def mark(self) -> None:
        """Have what is in `h2.out` written before long."""
        raise NotImplementedError

    def abandon(self) -> None:
        """The connection is gone: cancel whatever waits on it."""
        for stream in list(self.h2.streams.values()):
            self.h2.drop(stream)
        self._done_call = self._done_slot = None  # type: ignore[assignment]  # they refer back to here

    # HTTP/2

    def make_stream(self, id: int, head: Head, send_window: int) -> Stream | None:
        """See Handler."""
        door = self._door
        if door.streams >= door.max_door_streams:
            return None
        plan = head.plan
        if plan is None:
            plan = head.plan = Plan(head, door.service)
        door.streams += 1
        return Request(id, head, send_window, plan, door.now_s())

    def opened(self, stream: Stream) -> None:
        """See Handler."""
        assert isinstance(stream, Request)
        plan = stream.plan
        if plan.http_status:
            self._end(stream, grpc_status.http_error(plan.http_status))
        elif plan.error is not None:
            self._fail(stream, plan.error)
        else:
            if stream.kind == STREAM:
                self.h2.send_headers(stream, HEADERS)
            if stream.remote_closed:
                self.take(stream, self._door.shared, 0, 0, True)

    def reset(self, stream: Stream) -> None:
        """See Handler: nobody waits for this call any more."""
        assert isinstance(stream, Request)
        self._free(stream)
        call, stream.call = stream.call, None
        if call is not None:
            self._plane.cancel(call)
        if stream.slots:
            for slot in stream.slots:
                if slot.call is not None:
                    self._plane.cancel(slot.call)
                    slot.call = None
            stream.slots.clear()

    def closed(self, stream: Stream) -> None:
        """See Handler."""
        self._door.streams -= 1

    def data(self, stream: Stream, data: memoryview, start: int, stop: int, last: bool) -> None:
        """See Handler. The usual call, one inference in one frame, goes the short way."""
        assert isinstance(stream, Request)
        if last and stop - start >= 5 and stream.kind == INFER and stream.view is None and stream.later is None:
            flag, length = _PREFIX.unpack_from(data, start)
            if not flag and stop - start - 5 == length and not stream.partial and not stream.has_message:
                try:
                    self._check_room(length)
                    self._infer(stream, data, start + 5, stop)
                except Exception as error:
                    self._fail(stream, error)
                return
        self.take(stream, data, start, stop, last)

    def take(self, stream: Request, data: memoryview, start: int, stop: int, last: bool) -> None:
        """Take body bytes data[start:stop] in the general way."""
        if stream.later is not None:
            stream.later += data[start:stop]
            stream.later_last = stream.later_last or last
            return
        try:
            self._assemble(stream, data, start, stop, last)
        except Exception as error:
            self._fail(stream, error)

    # Requests

    def _assemble(self, stream: Request, data: memoryview, at: int, stop: int, last: bool) -> None:
        """Put messages together from body bytes as they come. Raises TenureError where the call cannot go on."""
        while True:
            if stream.view is not None and not stream.has_message:
                taken = min(stop - at, stream.stop - stream.at)
                if taken:
                    stream.view[stream.at : stream.at + taken] = data[at : at + taken]
                    stream.at += taken
                    at += taken
                if stream.at < stream.stop:
                    break
                if stream.compressed:
                    self._unpack(stream, data[at:stop], last)
                    return
                self._message(stream)
            elif stream.skip:
                skipped = min(stop - at, stream.skip)
                stream.skip -= skipped
                at += skipped
                if stream.skip:
                    break
            if at >= stop:
                break
            if stream.has_message:
                raise StatusError(grpc_status.INVALID_ARGUMENT, "more than one message was sent to a call that takes one")
            taken = min(5 - len(stream.partial), stop - at)
            stream.partial += data[at : at + taken]
            at += taken
            if len(stream.partial) < 5:
                break
            flag, length = _PREFIX.unpack(stream.partial)
            stream.partial = b""
            self._begin(stream, flag, length, data, at, stop)
        if last:
            self._body_ended(stream)

    def _check_room(self, length: int) -> None:
        if length > self._limits.max_request_bytes:
            raise TooLarge(f"a message has {length} bytes; at most {self._limits.max_request_bytes} are taken")
        if self.h2.held_bytes > MAX_HELD_BYTES or self._door.unsent > self._door.max_unsent_bytes:
            raise Overloaded("answers are waiting that their clients do not read; read them first")

    def _begin(self, stream: Request, flag: int, length: int, data: memoryview, at: int, stop: int) -> None:
        """Find room for a message of which data[at:stop] may be here, then let the rest be sent."""
        if flag > 1 or (flag and stream.plan.encoding == "identity"):
            raise StatusError(grpc_status.INTERNAL, f"a message has the compression flag {flag}, but no grpc-encoding says how")
        stream.compressed = bool(flag)
        stream.began_s = self._door.now_s()
        try:
            self._check_room(length)
            if stream.kind == UNARY and length > MAX_UNARY_BYTES:
                raise TooLarge(f"the request has {length} bytes; at most {MAX_UNARY_BYTES} are taken by this call")
            if length <= SMALL_BYTES:
                stream.view, stream.base = memoryview(bytearray(length)), 0
            else:
                first = first_raw(data, at, min(stop, at + length)) if stream.kind >= INFER and not flag else 0
                stream.buffer = self._plane.reserve(length + -first % ALIGNMENT, DOOR)
                stream.view, stream.base = stream.buffer.view, -first % ALIGNMENT
        except TenureError as error:
            if stream.kind != STREAM or isinstance(error, TooLarge):
                raise
            stream.skip = length
            self._answer_slot(self._new_slot(stream, ""), [stream_error(str(error), "")])
        stream.at, stream.stop = stream.base, stream.base + length
        missing = max(0, length - (stop - at))
        if stream.slots is None:
            self.h2.open_window(stream, missing)
        elif missing or stream.recv_window < FIRST_WINDOW // 2:
            # A stream that is slow to be answered gets room for the message that has a buffer, and no more.
            slow = len(stream.slots) > MAX_STREAM_REQUESTS // 16
            self.h2.open_window(stream, missing + (0 if slow else FIRST_WINDOW))

    def _message(self, stream: Request) -> None:
        """A message is there whole, and unpacked."""
        if stream.kind != STREAM:
            stream.has_message = True
            return
        slot = self._new_slot(stream, "")
        try:
            view, base, stop = stream.view, stream.base, stream.stop
            assert view is not None
            template, slot.id = self._door.reader.read(view, base, stop)
            slot.final = template.final
            buffer, stream.buffer = stream.buffer, None
            self._submit(slot, template, slot.id, stream.plan.timeout_s, self._done_slot, view, base, stop, buffer)
        except TenureError as error:
            self._answer_slot(slot, [stream_error(str(error), slot.id)])
        finally:
            self._free(stream)

    def _unpack(self, stream: Request, rest: memoryview, last: bool) -> None:
        """Unpack a compressed message a piece at a time, between other work; what follows it waits until then.

        That is no more than the stream's window: it is not opened meanwhile.
        """
        view, base, stop, buffer = stream.view, stream.base, stream.stop, stream.buffer
        assert view is not None
        self._door.work(self._unpacked(stream, view[base:stop], buffer))
        stream.later, stream.later_last = bytearray(rest), last
        stream.view = stream.buffer = None

    async def _unpacked(self, stream: Request, content: memoryview, buffer: Buffer | None) -> None:
        found = None
        try:
            async with self._door.unpacking:
                found = await inflate(content, self._limits.max_request_bytes, self._plane, DOOR, lambda: self._waits(stream))
        except Exception as error:
            self._fail(stream, error)
        finally:
            if buffer is not None:
                self._plane.release(buffer)
        if found is not None:
            stream.buffer, stream.view, stream.base, stream.stop = found
            stream.at = stream.stop
            stream.compressed = False
            later, stream.later = stream.later, None
            assert later is not None
            if self._waits(stream):
                self.take(stream, memoryview(later), 0, len(later), stream.later_last)
            else:
                self._free(stream)
        self.mark()

    def _waits(self, stream: Request) -> bool:
        return self.h2.streams.get(stream.id) is stream

    def _body_ended(self, stream: Request) -> None:
        """The peer has sent all it will: answer, or say what is missing."""
        if stream.partial or stream.skip or (stream.view is not None and not stream.has_message):
            raise InputRefused("the request ended inside a message")
        if stream.slots is not None:
            stream.ended = True
            self._drain(stream)
        elif not stream.has_message:
            raise InputRefused("the request ended without a message")
        else:
            view, base, stop, buffer = stream.view, stream.base, stream.stop, stream.buffer
            assert view is not None
            if stream.kind == INFER:
                stream.buffer = stream.view = None
                self._infer(stream, view, base, stop, buffer)
            else:
                self._run(stream, bytes(view[base:stop]))

    def _infer(self, stream: Request, view: memoryview, base: int, stop: int, buffer: Buffer | None = None) -> None:
        try:
            template, id = self._door.reader.read(view, base, stop)
        except TenureError:
            if buffer is not None:
                self._plane.release(buffer)
            raise
        self._submit(stream, template, id, stream.plan.timeout_s, self._done_call, view, base, stop, buffer)

    def _submit(
        self,
        waiter: Request | Slot,
        template: Template,
        id: str,
        timeout_s: float,
        done: Any,
        view: memoryview,
        base: int,
        stop: int,
        buffer: Buffer | None,
    ) -> None:
        """Hand the message view[base:stop] to the plane; `buffer`: whose memory it is already, if it is the plane's."""
        buffer, inputs = placed(self._plane, template, view, base, stop, buffer)
        asked_s = template.timeout_s
        if asked_s and not 0 < timeout_s < asked_s:
            timeout_s = asked_s
        call = Call(
            template.model,
            template.version,
            inputs,
            done,
            buffer,
            template.outputs,
            id,
            template.priority,
            timeout_s,
            state=waiter,
        )
        waiter.call = call
        try:
            self._plane.submit(call)
        except BaseException:
            waiter.call = None
            raise

    def _run(self, stream: Request, content: bytes) -> None:
        """Answer a call of the service that is no inference."""
        self._free(stream)
        method = stream.plan.method
        assert method is not None
        assert method.run is not None
        answer = method.run(content)
        if isinstance(answer, bytes):
            self._answer(stream, answer)
        else:
            self._door.work(self._later(stream, answer), MAX_WORK)

    async def _later(self, stream: Request, waiting: Awaitable[bytes]) -> None:
        try:
            answer = await waiting
        except Exception as error:
            if self._waits(stream):
                self._fail(stream, error)
                self.mark()
            return
        if self._waits(stream):
            self._answer(stream, answer)
            self.mark()

    # Answers

    def _answer(self, stream: Request, message: bytes) -> None:
        self.h2.respond(stream, HEADERS, [_PREFIX.pack(0, len(message)), message], len(message) + 5, TRAILERS)

    def _done(self, call: Call) -> None:
        stream: Request = call.state
        stream.call = None
        answer = call.answer
        if answer is None:
            assert call.error is not None
            self._fail(stream, call.error, call)
        else:
            door = self._door
            parts, nbytes = door.writer.unary(answer, call.id)
            self.h2.respond(stream, HEADERS, parts, nbytes, TRAILERS)
        self.mark()

    def expire(self, stream: Request, error: TenureError) -> None:
        """End a call whose body did not come in time."""
        self._fail(stream, error)
        self.mark()

    def _fail(self, stream: Request, error: Exception, call: Call | None = None) -> None:
        """End a call with an error; nothing more of its body is wanted."""
        if not isinstance(error, TenureError):
            _log.error("a call of %s failed in the door", stream.head.path[:120], exc_info=error)
            error = InternalError(f"the server failed at this call: {type(error).__name__}")
        if not self._waits(stream):
            self._free(stream)
            return
        code = grpc_status.code_of(error)
        allowed_s = call.timeout_s if call is not None else 0.0
        if code == grpc_status.UNAVAILABLE and 0 < allowed_s <= self._door.now_s() - stream.began_s:
            code = grpc_status.DEADLINE_EXCEEDED
        trailers = grpc_status.error_trailers(code, error)
        if stream.slots is None:
            trailers = HEADERS + trailers
        self._end(stream, trailers)

    def _end(self, stream: Request, trailers: bytes) -> None:
        if stream.slots:
            for slot in stream.slots:
                if slot.call is not None:
                    self._plane.cancel(slot.call)
                    slot.call = None
            stream.slots.clear()
        self._free(stream)
        self.h2.send_trailers(stream, trailers)

    def _free(self, stream: Request) -> None:
        buffer, stream.buffer, stream.view = stream.buffer, None, None
        if buffer is not None:
            self._plane.release(buffer)

    # Streams

    def _new_slot(self, stream: Request, id: str) -> Slot:
        assert stream.slots is not None
        if len(stream.slots) >= MAX_STREAM_REQUESTS:
            raise Overloaded(f"{MAX_STREAM_REQUESTS} requests of this stream wait for answers; read some first")
        slot = Slot(stream, id)
        stream.slots.append(slot)
        return slot

    def _slot_done(self, call: Call) -> None:
        slot: Slot = call.state
        slot.call = None
        if call.answer is None:
            parts = [stream_error(str(call.error), slot.id)]
        else:
            pieces, _ = self._door.writer.streamed(call.answer, call.id, slot.final)
            parts = [b"".join(pieces)]
        self._answer_slot(slot, parts)
        self.mark()

    def _answer_slot(self, slot: Slot, parts: list[bytes]) -> None:
        slot.parts = parts
        self._drain(slot.stream)

    def _drain(self, stream: Request) -> None:
        """Send the answers that are next in order; end the stream when its last is out."""
        slots = stream.slots
        assert slots is not None
        while slots and slots[0].parts is not None:
            self.h2.send_data(stream, slots.popleft().parts or [])
        if stream.ended and not slots:
            if self._waits(stream):
                self._end(stream, TRAILERS)
            return
        between = stream.view is None and not stream.skip
        if between and stream.recv_window < FIRST_WINDOW // 2 and len(slots) <= MAX_STREAM_REQUESTS // 16:
            self.h2.open_window(stream, FIRST_WINDOW)
