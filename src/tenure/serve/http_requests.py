"""What a door remembers of inference requests, and the slower ones made ready for the data plane.

Clients send the same JSON and get the same head over and over: `Known` keeps both for one JSON of one model. Not here: the
connection that reads and writes them (`http_connection`), what the JSON means (`codec_http`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tenure.serve import codec_http
from tenure.serve.codec_http import Template, TypedRequest
from tenure.serve.faults import InputRefused, TooLarge
from tenure.serve.http1 import answer_head
from tenure.serve.plane import Answer, Buffer

MAX_INLINE_BYTES = 64 << 10
"""JSON and compression above this are worked on in a thread, so that other connections go on."""
MAX_DIRECT_BYTES = 16 << 10
"""JSON up to this is looked up, or decoded, where it was read."""
_MAX_HEADS = 64
_BINARY = "application/octet-stream"


class Known:
    """One JSON that asks for inference with one model: what it says, and the heads of its answers by their shapes."""

    __slots__ = ("_heads", "all_raw", "content", "last_head", "last_key", "raw_bytes", "target", "template")

    def __init__(self, target: tuple[str, str], content: bytes, template: Template) -> None:
        self.target, self.content, self.template = target, content, template
        self.raw_bytes = template.raw_bytes
        raw = template.raw_outputs
        self.all_raw = not template.id and (
            raw is None or (bool(template.outputs) and all(each.region or each.name in raw for each in template.outputs))
        )
        """Whether the answer's head depends on its outputs' shapes alone."""
        self.last_key: Any = None
        self.last_head = b""
        self._heads: dict[Any, bytes] = {}

    def head(self, key: Any, answer: Answer) -> bytes:
        """Return status line, headers and JSON of an answer whose outputs are all sent raw. key: what they depend on."""
        found = self._heads.get(key)
        if found is None:
            content, raw = codec_http.answer_json(answer, "", self.template.raw_outputs)
            found = binary_head(content, sum(each.nbytes for each in raw)) if raw else answer_head(200, len(content)) + content
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            self._heads[key] = found
        self.last_key, self.last_head = key, found
        return found


def answer_key(answer: Answer) -> Any:
    """Return what the head of an answer with raw outputs depends on."""
    if len(answer.outputs) == 1:
        (only,) = answer.outputs
        if only.data is not None:
            return only.shape, only.data.nbytes, only.name, only.datatype, answer.version
    return (
        answer.version,
        *(
            (o.name, o.datatype, o.shape, o.region, o.offset, o.nbytes if o.data is None else o.data.nbytes)
            for o in answer.outputs
        ),
    )


def binary_head(
    content: bytes, raw_bytes: int, *, extra: tuple[str, ...] = (), close: bool = False, old: bool = False
) -> bytes:
    """Return the head of an answer with raw outputs, its JSON included."""
    extra = (f"{codec_http.HEADER_LENGTH}: {len(content)}", *extra)
    return answer_head(200, len(content) + raw_bytes, content_type=_BINARY, extra=extra, close=close, old=old) + content


def prepare(
    body: memoryview,
    json_length: int | None,
    *,
    max_json_bytes: int,
    reserve: Callable[[int], Buffer],
    release: Callable[[Buffer], None],
) -> tuple[Template, Buffer | None]:
    """Return what a whole body says, and the buffer its tensors were written to; None: they were moved to the body's front.

    Raises InputRefused, TooLarge, and what `reserve` raises.
    """
    content, raw = codec_http.split(body, json_length)
    if content.nbytes > max_json_bytes:
        raise TooLarge(
            f"the JSON of a request may have {max_json_bytes} bytes; this one has {content.nbytes}."
            " Send tensors raw (binary_data_size)"
        )
    found = codec_http.decode_request(content)
    template = found.template if isinstance(found, TypedRequest) else found
    check_raw(template, raw.nbytes)
    if not isinstance(found, TypedRequest):
        body[: raw.nbytes] = raw
        return template, None
    buffer = reserve(max(1, found.nbytes))
    try:
        found.write(buffer.view[: found.nbytes], raw)
    except BaseException:
        release(buffer)
        raise
    return template, buffer


def check_raw(template: Template, raw_bytes: int) -> None:
    """Refuse a body that does not carry as many raw bytes as its JSON says. Raises InputRefused."""
    if template.raw_bytes != raw_bytes:
        raise InputRefused(f"the raw inputs take {template.raw_bytes} bytes; {raw_bytes} follow the JSON")
