"""Request bodies whose length is not known beforehand: chunked, compressed or both, within the memory budget.

Not here: bodies with a length, which are read straight into their buffer (`http_connection`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from tenure.serve.faults import InputRefused, TooLarge
from tenure.serve.http1 import Chunks, Head
from tenure.serve.plane import Buffer, Plane

_FIRST_BYTES = 64 << 10
_STEP_BYTES = 1 << 20
"""Unpacked at a time; between two steps others get their turn, whatever a small body unpacks to."""


class Body:
    """A body being put together in a buffer that grows, doubling. Ends with `take` or `drop`."""

    def __init__(self, plane: Plane, head: Head, *, door: str, max_bytes: int) -> None:
        """Raises Overloaded."""
        self._plane, self._door, self._max_bytes = plane, door, max_bytes
        self._chunks = Chunks() if head.chunked else None
        self._left = head.length
        self._unpacker = _unpacker(head.encoding)
        self._buffer = plane.reserve(min(_FIRST_BYTES, max_bytes), door)
        self.nbytes = 0
        """Of the body as it is meant, so far."""

    @property
    def ended(self) -> bool:
        """Whether all of it has been fed."""
        return self._chunks.ended if self._chunks is not None else self._left == 0

    @property
    def rest(self) -> int | None:
        """Bytes of it that have not been fed; None: that is not known."""
        return None if self._chunks is not None else self._left

    def feed(self, data: bytes) -> tuple[int, Iterator[None]]:
        """Return how many bytes of `data` belong to this body, and steps that store them, to be run one by one.

        Raises BadMessage; the steps raise TooLarge, Overloaded, InputRefused.
        """
        if self._chunks is not None:
            pieces, used = self._chunks.feed(data)
            pieces = [b"".join(pieces)]
        else:
            used = min(len(data), self._left)
            pieces = [data[:used]]
            self._left -= used
        return used, self._store(pieces)

    def take(self) -> tuple[Buffer, int]:
        """Return the buffer, now the caller's, and how much of it is filled. Raises InputRefused for a torn packed body."""
        if self._unpacker is not None and not self._unpacker.eof:
            raise InputRefused("the compressed body ends before its content does")
        return self._buffer, self.nbytes

    def drop(self) -> None:
        """Give the memory back."""
        self._plane.release(self._buffer)

    def _store(self, pieces: list[bytes]) -> Iterator[None]:
        for piece in pieces:
            if self._unpacker is None:
                self._append(piece)
                continue
            while True:
                if piece and self._unpacker.eof:
                    raise InputRefused("bytes follow the end of the compressed body")
                try:
                    unpacked = self._unpacker.decompress(piece, _STEP_BYTES)
                except zlib.error as error:
                    raise InputRefused(f"the body cannot be unpacked: {error}") from error
                self._append(unpacked)
                piece = self._unpacker.unconsumed_tail or self._unpacker.unused_data
                if not piece and len(unpacked) < _STEP_BYTES:
                    break
                yield

    def _append(self, piece: bytes) -> None:
        end = self.nbytes + len(piece)
        if end > self._max_bytes:
            raise TooLarge(f"a request may have {self._max_bytes} bytes, unpacked; this one has more")
        if end > len(self._buffer.view):
            larger = self._plane.reserve(min(self._max_bytes, max(end, 2 * len(self._buffer.view))), self._door)
            larger.view[: self.nbytes] = self._buffer.view[: self.nbytes]
            self._plane.release(self._buffer)
            self._buffer = larger
        self._buffer.view[self.nbytes : end] = piece
        self.nbytes = end


def _unpacker(encoding: str) -> zlib._Decompress | None:
    if not encoding:
        return None
    return zlib.decompressobj(zlib.MAX_WBITS | 16 if encoding == "gzip" else zlib.MAX_WBITS)
