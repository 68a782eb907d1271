"""The half of an HTTP connection that writes: answers, refusals, and its end. The half that reads is `http_connection`.

Answers are written to the socket directly; only what it does not take at once is copied, and then nothing more is read until
the client has taken that.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from tenure.errors import InternalError, TenureError
from tenure.serve import codec_http
from tenure.serve.codec_http import Template
from tenure.serve.faults import InputRefused, Overloaded
from tenure.serve.http1 import Head
from tenure.serve.http_answers import message, refusal, rendered
from tenure.serve.http_bodies import Body
from tenure.serve.http_requests import MAX_INLINE_BYTES, Known, answer_key
from tenure.serve.http_routes import Reply
from tenure.serve.plane import Answer, Buffer, Call, Output

if TYPE_CHECKING:
    from tenure.serve.http import HttpDoor

_log = logging.getLogger(__name__)

HEAD, BODY, COLLECT, BUSY, DISCARD, LINGER = range(6)
"""What is waited for: a head (or nothing), a body of known length, another body, an answer, the end of a refused body, the
client's leaving."""
DISCARD_BYTES = 1 << 20
"""A refused body's rest up to this is read and forgotten, so that the connection stays usable; past it, it is closed."""
_JSON_GROWTH = 8
"""A number's JSON may be as many times as long as the number."""
_MAX_PARTS = 512
"""Of one write; systems take about a thousand."""
_LEAVING_S = 0.25
"""How long a client may take to leave when the door closes."""
NO_HEAD = Head(raw=b"\0", method="", path=(), keep_alive=False, old=False)
_NOTHING_KNOWN = Known(("", ""), b"\0", Template((), (), None, 0))


class Writing(asyncio.BufferedProtocol):
    """See the module."""

    def __init__(self, door: HttpDoor) -> None:
        self._door, self._plane = door, door.plane
        self._transport = cast(asyncio.Transport, None)
        self._fd = -1
        self._done = self._answered  # bound once
        self.state = HEAD
        self.since_s = door.now_s
        """When the state was entered, by the door's coarse clock; while an answer is stuck: when it last moved."""
        self.unsent_bytes = 0
        """Of the present answer, waiting for the client to read."""
        self._head = NO_HEAD
        self._known = _NOTHING_KNOWN
        self._pending = b""
        """Read, not used."""
        self._target: memoryview | None = None
        """Where the body goes; None: to the scratch buffer."""
        self._left = 0
        """Bytes to come of a refused body."""
        self._buffer: Buffer | None = None
        self._body: Body | None = None
        self._steps: Iterator[None] | None = None
        self._call: Call | None = None
        self._owed: TenureError | None = None
        """Why the body that is being discarded was refused."""
        self._soon = False
        """What has been read is about to be looked at."""
        self._gone = False
        """Nothing more is read or written here."""

    # What the event loop calls

    def eof_received(self) -> bool:
        """See asyncio.BaseProtocol. A client that ends its side before the answer has left: its call is cancelled."""
        self._leave_behind()
        return False

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._door.unsent_bytes -= self.unsent_bytes
        self.unsent_bytes = 0
        self.since_s = self._door.now_s
        self._go_on()

    # What the door calls

    def abort(self) -> None:
        """Close at once."""
        self._leave_behind()
        self._transport.abort()

    # Answers

    def _answered(self, call: Call) -> None:
        """Write what came of the call."""
        self._call = None
        try:
            answer, known = call.answer, self._known
            if call.error is not None or answer is None:
                self._refuse(call.error or InternalError("a call ended without an answer"), 0)
            elif known.all_raw and self._head.plain and not self._door.leaving:
                key = answer_key(answer)
                first = known.last_head if key == known.last_key else known.head(key, answer)
                self._send(first, [output.data for output in answer.outputs if output.data is not None])
                self._next()
            else:
                self._render(answer, known.template)
        except Exception as error:
            self._fail(error)

    def _render(self, answer: Answer, said: Template) -> None:
        """Write an answer that is made for this request: with its id, in JSON, compressed, or the connection's last."""
        head, door = self._head, self._door
        close = not head.keep_alive or door.leaving
        sizes = sum(output.data.nbytes for output in answer.outputs if output.data is not None)
        as_json = codec_http.json_bytes(answer.outputs, said.raw_outputs)
        most = door.limits.max_json_bytes // _JSON_GROWTH
        if as_json > most:
            reason = (
                f"the outputs to be written as JSON have {as_json} bytes, the limit is {most}; ask for them raw (binary_data)"
            )
            self._refuse(InputRefused(reason), 0)
            return
        long = sizes if head.accept else as_json
        if long <= MAX_INLINE_BYTES:
            self._send(*rendered(answer, said, head, close=close))
            self._next()
            return
        if door.unsent_bytes + sizes > door.limits.max_unsent_bytes:
            self._refuse(Overloaded("too many long answers are being written as JSON or compressed; ask for raw outputs"), 0)
            return
        kept = Answer(answer.model, answer.version, tuple(_kept(output) for output in answer.outputs))
        self.state = BUSY
        door.unsent_bytes += sizes
        door.start(self._render_aside(partial(rendered, kept, said, head, close=close), sizes))

    async def _render_aside(self, work: Callable[[], tuple[bytes, list[memoryview]]], sizes: int) -> None:
        try:
            first, parts = await self._door.in_thread(work)
            if not self._gone:
                self._send(first, parts)
                self._next()
        except Exception as error:
            self._fail(error, done=True)
        finally:
            self._door.unsent_bytes -= sizes

    def _reply(self, found: Reply) -> None:
        self._send(message(found, self._head, close=self._door.leaving or not self._head.keep_alive), [])
        self._next()

    def _refuse(self, error: TenureError, rest: int | None) -> None:
        """Answer with an error, once the `rest` of the body is out of the way. None: nobody knows how long that is."""
        if rest is None or rest > DISCARD_BYTES or (rest and self._head.expects):
            self._part(error)
        elif rest:
            self.state, self._left, self._owed = DISCARD, rest, error
            self.since_s = self._door.now_s
        else:
            self._reply(refusal(error))

    def _pay(self) -> None:
        error, self._owed = self._owed, None
        assert error is not None
        self._reply(refusal(error))

    def _part(self, error: TenureError) -> None:
        """Answer with an error as the last thing on this connection."""
        self._drop()
        self._send(message(refusal(error), self._head, close=True), [])
        self._linger()

    def _fail(self, error: Exception, *, done: bool = False) -> None:
        """Answer with whatever was raised. done: the request has been read and the connection is fine."""
        if not isinstance(error, TenureError):
            _log.exception("an HTTP request could not be handled", exc_info=error)
            error = InternalError(f"the server failed: {type(error).__name__}")
        if self._gone:
            return
        if self.state == LINGER:
            self.abort()
        elif done:
            self._refuse(error, 0)
        else:
            self._part(error)

    def _send(self, first: bytes, parts: list[memoryview]) -> None:
        """Write to the socket itself; what it does not take is kept by the transport, and reading stops meanwhile."""
        if len(parts) > _MAX_PARTS:
            first, parts = b"".join([first, *parts]), []
        try:
            sent = os.writev(self._fd, [first, *parts]) if not self.unsent_bytes else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.abort()
            return
        size = len(first) + sum([part.nbytes for part in parts])
        if sent == size:
            return
        left: list[bytes | memoryview] = []
        for part in (memoryview(first), *parts):
            left.append(part[sent:])
            sent -= min(sent, len(part))
        kept = b"".join(left)
        before = self.unsent_bytes
        self._transport.write(kept)
        self.unsent_bytes = self._transport.get_write_buffer_size()
        if self.unsent_bytes:
            self._transport.pause_reading()
            self.since_s = self._door.now_s
            self._door.relieve(more_bytes=self.unsent_bytes - before)

    def _go_on(self) -> None:
        """Use what has been read and had to wait."""
        raise NotImplementedError

    def _next(self) -> None:
        """Wait for the next request, or for the client to leave."""
        if not self._head.keep_alive or self._door.leaving:
            self._linger()
            return
        self.state = HEAD
        self.since_s = self._door.now_s
        if self._pending:
            self._go_on_soon()

    def _go_on_soon(self) -> None:
        if not self._soon:
            self._soon = True
            self._door.loop.call_soon(self._go_on)

    def _linger(self) -> None:
        """Nothing more is said; what still comes is read and forgotten, for closing now could take the answer back."""
        if self._gone:
            return
        self.state = LINGER
        self._pending = b""
        self.since_s = self._door.now_s
        self._transport.write_eof()
        if self._door.leaving:
            self._door.loop.call_later(_LEAVING_S, self.abort)
        if not self._transport.is_reading():
            self._transport.resume_reading()

    # Leaving

    def _leave_behind(self) -> None:
        self._gone = True
        self._pending = b""
        self._drop()

    def _drop(self) -> None:
        """Give back what the present request holds."""
        call, self._call = self._call, None
        if call is not None:
            self._plane.cancel(call)
        buffer, self._buffer = self._buffer, None
        self._release(buffer)
        body, self._body = self._body, None
        if body is not None:
            body.drop()
        self._target = self._steps = self._owed = None

    def _release(self, buffer: Buffer | None) -> None:
        if buffer is not None:
            self._plane.release(buffer)


def _kept(output: Output) -> Output:
    """Return an output that outlives its call."""
    if output.data is None:
        return output
    return Output(output.name, output.datatype, output.shape, memoryview(bytes(output.data)))
