"""One HTTP/1.1 answer, read into place: heads by httptools, bodies of known length straight into one buffer.

No sockets here: the sync and the async client both ask `buffer` where the next bytes go and say with `received` how many
came. Heads are remembered by their bytes, since a server says the same again and again.
"""

from __future__ import annotations

from dataclasses import dataclass

import httptools
import numpy as np

from tenure.errors import Unavailable

MAX_HEAD_BYTES = 64 << 10
MAX_ANSWER_BYTES = 2 << 30
_ALIGNMENT = 64
_KEPT_HEADS = 256


class NotHttp(Unavailable):
    """What answers does not speak HTTP/1.1, or breaks off."""


@dataclass(frozen=True, slots=True)
class Head:
    """What the client needs of an answer's head."""

    status: int
    length: int | None
    """Bytes of the body; None: in chunks, or until the connection ends."""
    chunked: bool
    keep_alive: bool
    json_length: int | None
    """Inference-Header-Content-Length."""
    retry_after_s: float | None


class ResponseReader:
    """Reads one answer after the other from one connection. Raises NotHttp."""

    def __init__(self) -> None:
        self._scratch = bytearray(MAX_HEAD_BYTES)
        self._view = memoryview(self._scratch)
        self.start()

    def start(self) -> None:
        """Forget the last answer; `head` and `body` handed out stay valid."""
        self.head: Head | None = None
        self.body = memoryview(b"")
        """The whole body, once `received` has returned True; its first raw tensor lies aligned."""
        self.clean = True
        """False: bytes came that belong to no answer, so the connection must not be used again."""
        self._filled = 0
        self._pieces: _Pieces | None = None

    @property
    def began(self) -> bool:
        """Whether anything of the answer has come."""
        return self._filled > 0

    def buffer(self) -> memoryview:
        """Return where the next bytes go; never empty before the answer is complete."""
        if self.head is None:
            return self._view[self._filled :]
        return self._view if self._pieces is not None else self.body[self._filled :]

    def received(self, count: int) -> bool:
        """Take note of `count` bytes in `buffer`; return whether the answer is complete."""
        if self.head is None:
            return self._head_received(count)
        if self._pieces is not None:
            return self._pieces.feed(self._view[:count], self)
        self._filled += count
        return self._filled == len(self.body)

    def ended(self) -> bool:
        """Take note that the other side has closed; return whether that completes the answer."""
        if self._pieces is None or self.head is None or self.head.chunked:
            return False
        self.body, self.clean = memoryview(b"".join(self._pieces.parts)), False
        return True

    def _head_received(self, count: int) -> bool:
        searched = max(0, self._filled - 3)
        self._filled += count
        while True:
            end = self._scratch.find(b"\r\n\r\n", searched, self._filled) + 4
            if end < 4:
                if self._filled == MAX_HEAD_BYTES:
                    raise NotHttp(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
                return False
            head = parse_head(bytes(self._view[:end]))
            if head.status >= 200:
                break
            rest = self._scratch[end : self._filled]  # an interim answer, such as 100 Continue: the real one follows
            self._scratch[: len(rest)] = rest
            searched, self._filled = 0, len(rest)
        self.head = head
        more = self._filled - end
        if head.length is None:
            self._pieces = _Pieces()
            return self._pieces.feed(self._view[: self._filled], self)
        if head.length > MAX_ANSWER_BYTES:
            raise NotHttp(f"the answer claims {head.length} bytes; the client takes {MAX_ANSWER_BYTES}")
        self.body = aligned(head.length, head.json_length or 0)
        if more > head.length:
            self.clean, more = False, head.length
        self.body[:more] = self._view[end : end + more]
        self._filled = more
        return more == head.length


class _Pieces:
    """The body of an answer whose length is not told beforehand."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._size = 0
        self._complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: memoryview, reader: ResponseReader) -> bool:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise NotHttp(f"the answer is not HTTP/1.1: {error}") from error
        if self._size > MAX_ANSWER_BYTES:
            raise NotHttp(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if self._complete:
            reader.body = memoryview(b"".join(self.parts))
        return self._complete

    def on_body(self, body: bytes) -> None:
        self.parts.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        self._complete = True


class _Fields:
    """Collects what `Head` holds while httptools parses."""

    def __init__(self) -> None:
        self.length: int | None = None
        self.chunked = False
        self.json_length: int | None = None
        self.after_s: float | None = None
        self.after_ms: float | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key == b"transfer-encoding":
            self.chunked = True
        elif value.isdigit() and len(value) < 19:
            number = int(value)
            if key == b"content-length":
                self.length = number
            elif key == b"inference-header-content-length":
                self.json_length = number
            elif key == b"retry-after":
                self.after_s = float(number)
            elif key == b"retry-after-ms":
                self.after_ms = number / 1000


_heads: dict[bytes, Head] = {}


def parse_head(content: bytes) -> Head:
    """Return what an answer's head says, from its first byte to its empty line. Raises NotHttp."""
    known = _heads.get(content)
    if known is not None:
        return known
    fields = _Fields()
    parser = httptools.HttpResponseParser(fields)
    try:
        parser.feed_data(content)
    except httptools.HttpParserError as error:
        raise NotHttp(f"the answer is not HTTP/1.1: {error}") from error
    status = parser.get_status_code()
    head = Head(
        status=status,
        length=0 if status in (204, 304) else None if fields.chunked else fields.length,
        chunked=fields.chunked,
        keep_alive=parser.should_keep_alive(),
        json_length=fields.json_length,
        retry_after_s=fields.after_s if fields.after_ms is None else fields.after_ms,
    )
    if len(_heads) >= _KEPT_HEADS:
        _heads.clear()
    _heads[content] = head
    return head


def aligned(size: int, before: int) -> memoryview:
    """Return `size` writable bytes of which the one at `before` lies at a multiple of 64 in memory."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -(room.ctypes.data + before) % _ALIGNMENT
    return room.data[skip : skip + size]
