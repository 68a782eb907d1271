"""Answers as bytes: replies and errors of every kind, and inference answers made for one request alone.

Answers that repeat are remembered in `http_requests`. No sockets here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import msgspec

from tenure.errors import NotFound, SpecError, TenureError, Unavailable
from tenure.serve import codec_http
from tenure.serve.codec_http import Template
from tenure.serve.faults import Overloaded, TooLarge
from tenure.serve.http1 import JSON, BadMessage, Head, answer_head
from tenure.serve.http_routes import Reply, WrongMethod
from tenure.serve.plane import Answer

_STATUS: tuple[tuple[type[TenureError], int], ...] = (
    (WrongMethod, 405),
    (TooLarge, 413),
    (SpecError, 400),
    (NotFound, 404),
    (Overloaded, 429),
    (Unavailable, 503),
)

_MAX_PACKED_BYTES = 16 << 20
"""Longer answers go as they are: sending is sooner done than packing."""


def refusal(error: TenureError) -> Reply:
    """Return what tells a client of an error: {"error": reason}."""
    status = error.status if isinstance(error, BadMessage) else next((s for kind, s in _STATUS if isinstance(error, kind)), 500)
    extra: tuple[str, ...] = ()
    if isinstance(error, Overloaded):
        wait_s = max(0.0, error.retry_after_s)
        extra = (f"Retry-After: {max(1, math.ceil(wait_s))}", f"Retry-After-Ms: {math.ceil(wait_s * 1000)}")
    elif isinstance(error, WrongMethod):
        extra = (f"Allow: {error.allow}",)
    return Reply(msgspec.json.encode({"error": str(error)}), status, extra=extra)


def message(reply: Reply, head: Head, *, close: bool) -> bytes:
    """Return a reply to the request with this head as bytes."""
    first = answer_head(
        reply.status, len(reply.body), content_type=reply.content_type, extra=reply.extra, close=close, old=head.old
    )
    return first if head.method == "HEAD" else first + reply.body


def rendered(answer: Answer, said: Template, head: Head, *, close: bool) -> tuple[bytes, list[memoryview]]:
    """Return an inference answer as bytes and the raw outputs that follow them."""
    content, raw = codec_http.answer_json(answer, said.id, said.raw_outputs)
    size = len(content) + sum(each.nbytes for each in raw)
    extra: tuple[str, ...] = (f"{codec_http.HEADER_LENGTH}: {len(content)}",) if raw else ()
    kind = "application/octet-stream" if raw else JSON
    if head.accept and size <= _MAX_PACKED_BYTES:
        packed = pack((content, *raw), head.accept)
        if len(packed) < size:
            content, raw, size = packed, [], len(packed)
            extra = (*extra, f"Content-Encoding: {head.accept}")
    return answer_head(200, size, content_type=kind, extra=extra, close=close, old=head.old) + content, raw


def pack(parts: Iterable[bytes | memoryview], encoding: str) -> bytes:
    """Return an answer's body compressed, lightly: tensors hardly shrink and time counts."""
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16 if encoding == "gzip" else zlib.MAX_WBITS)
    return b"".join([*(packer.compress(part) for part in parts), packer.flush()])
