"""One gRPC call as the door holds it: what its header asks for, the message that is coming, who waits for answers."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from tenure.errors import TenureError
from tenure.serve import grpc_status
from tenure.serve.codec_infer import Template
from tenure.serve.grpc_service import STREAM, Method
from tenure.serve.grpc_status import StatusError
from tenure.serve.http2_headers import Head
from tenure.serve.http2_send import Stream
from tenure.serve.plane import Buffer, Call, Plane, TensorRef

if TYPE_CHECKING:
    from tenure.serve.grpc_service import Service

DOOR = "grpc"


class Plan:
    """What a request's header asks for; worked out once per header."""

    __slots__ = ("encoding", "error", "http_status", "method", "timeout_s")

    def __init__(self, head: Head, service: Service) -> None:
        self.http_status = 0
        """Other than 0: the request is no gRPC call, and this is its HTTP answer."""
        self.error: TenureError | None = None
        self.method: Method | None = None
        self.timeout_s = 0.0
        self.encoding = head.fields.get(b"grpc-encoding", b"identity").decode("latin-1")
        kind = head.fields.get(b"content-type", b"")
        if head.method != b"POST":
            self.http_status = 405
        elif not (kind[:16] == b"application/grpc" and kind[16:17] in (b"", b"+", b";")):
            self.http_status = 415
        try:
            self.method = service.find(head.path)
            if self.encoding not in grpc_status.ACCEPTED_ENCODINGS:
                raise StatusError(
                    grpc_status.UNIMPLEMENTED,
                    f"grpc-encoding {self.encoding[:40]!r} is not understood; {', '.join(grpc_status.ACCEPTED_ENCODINGS)} are",
                )
            if b"grpc-timeout" in head.fields:
                self.timeout_s = grpc_status.parse_timeout(head.fields[b"grpc-timeout"]) or 1e-9
        except TenureError as error:
            self.error = error


class Slot:
    """One request of a stream, and its answer once there is one: answers leave in the order of their requests."""

    __slots__ = ("call", "final", "id", "parts", "stream")

    def __init__(self, stream: Request, id: str) -> None:
        self.stream = stream
        self.id = id
        self.final = False
        self.call: Call | None = None
        self.parts: list[bytes] | None = None


class Request(Stream):
    """One gRPC call: the message that is coming, and the call or calls that wait for answers."""

    __slots__ = (
        "at",
        "base",
        "began_s",
        "buffer",
        "call",
        "compressed",
        "ended",
        "has_message",
        "kind",
        "later",
        "later_last",
        "partial",
        "plan",
        "skip",
        "slots",
        "stop",
        "view",
    )

    def __init__(self, id: int, head: Head, send_window: int, plan: Plan, began_s: float) -> None:
        super().__init__(id, head, send_window)
        self.plan = plan
        self.kind = plan.method.kind if plan.method is not None else -1
        self.began_s = began_s
        """When the call, on a stream its newest message, began."""
        self.partial = b""
        """Less than five bytes of a message's prefix."""
        self.view: memoryview | None = None
        """Where the message goes: [base, stop), of which [base, at) is there."""
        self.base = self.at = self.stop = 0
        self.buffer: Buffer | None = None
        """Whose memory `view` is, if it is the plane's."""
        self.compressed = self.has_message = self.ended = False
        self.later: bytearray | None = None
        """While a compressed message is being unpacked: what came after it; `later_last`: and the body's end."""
        self.later_last = False
        self.skip = 0
        """Bytes to come of a message that was refused, on a stream that goes on."""
        self.call: Call | None = None
        self.slots: deque[Slot] | None = deque() if self.kind == STREAM else None

    @property
    def between_messages(self) -> bool:
        """Whether this is a stream that may be silent for as long as it likes."""
        return self.slots is not None and self.view is None and not self.partial and not self.skip


def placed(
    plane: Plane, template: Template, view: memoryview, base: int, stop: int, buffer: Buffer | None
) -> tuple[Buffer | None, tuple[TensorRef, ...]]:
    """Return the buffer that a call goes with, and where in it its inputs lie.

    The message is view[base:stop]; `buffer`: whose memory that is already, if it is the plane's. Given back where nothing
    of it is needed. Raises TooLarge, Overloaded.
    """
    if not template.buffered or template.typed:
        if buffer is not None:
            plane.release(buffer)
            buffer = None
        if template.typed_bytes:
            buffer = plane.reserve(template.typed_bytes, DOOR)
            for offset, raw in template.typed:
                buffer.view[offset : offset + len(raw)] = raw
    elif buffer is None:
        shift = template.shift
        buffer = plane.reserve(stop - base + shift, DOOR)
        buffer.view[shift : shift + stop - base] = view[base:stop]
    elif base != template.shift:
        moved = base - template.shift
        return buffer, tuple(ref if ref.region else replace(ref, offset=ref.offset + moved) for ref in template.inputs)
    return buffer, template.inputs
