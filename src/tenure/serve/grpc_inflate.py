"""Compressed gRPC messages: unpacked into memory of the plane, and never further than a message may be long.

The message is unpacked twice, a piece at a time: once to know its length, once into the buffer reserved for that. Other
work goes on between two pieces, so that a message that unpacks to much keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterator

from tenure.serve.codec_infer import first_raw
from tenure.serve.faults import InputRefused, TooLarge
from tenure.serve.plane import ALIGNMENT, Buffer, Plane

_PIECE = 128 << 10
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


async def inflate(
    content: memoryview, limit: int, plane: Plane, door: str, wanted: Callable[[], bool]
) -> tuple[Buffer | None, memoryview, int, int] | None:
    """Return the buffer that holds the message, its memory, and where in it the message starts and ends.

    None once `wanted` says that nobody waits any more. Raises InputRefused for bytes that are neither gzip nor deflate,
    TooLarge past `limit`, Overloaded.
    """
    nbytes, first = 0, 0
    for piece in _pieces(content):
        if not nbytes:
            first = first_raw(memoryview(piece), 0, len(piece))
        nbytes += len(piece)
        if nbytes > limit:
            raise TooLarge(f"a compressed message unpacks to more than {limit} bytes")
        await asyncio.sleep(0)
        if not wanted():
            return None
    if not nbytes:
        return None if not wanted() else (None, memoryview(bytearray()), 0, 0)
    base = -first % ALIGNMENT
    buffer = plane.reserve(nbytes + base, door)
    at = base
    try:
        for piece in _pieces(content):
            buffer.view[at : at + len(piece)] = piece
            at += len(piece)
            await asyncio.sleep(0)
            if not wanted():
                break
    except BaseException:
        plane.release(buffer)
        raise
    if not wanted():
        plane.release(buffer)
        return None
    return buffer, buffer.view, base, at


def _pieces(content: memoryview) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    rest: bytes | memoryview = content
    try:
        while rest and not unpacker.eof:
            piece = unpacker.decompress(rest[:_PIECE] if len(rest) > _PIECE else rest, _PIECE)
            taken = min(len(rest), _PIECE) - len(unpacker.unconsumed_tail)
            rest = rest[taken:]
            if piece:
                yield piece
            elif not taken:
                break
        while not unpacker.eof:
            piece = unpacker.decompress(unpacker.unconsumed_tail, _PIECE)
            if not piece:
                break
            yield piece
    except zlib.error as error:
        raise InputRefused(f"a message is not compressed as its grpc-encoding says: {error}") from error
    if not unpacker.eof or unpacker.unused_data or rest:
        raise InputRefused("a compressed message ends too early, or has bytes after its end")
