"""One record of the training store: named arrays with a header, a fence and a checksum per block.

    magic (8) | header length (u32) | its CRC-32 (u32) | header (JSON) | CRC-32 of each block (u32) | zeros up to 64 | payload

The header lists each array (name, dtype, shape, offset, bytes), the fence of the writer, free `meta` data and the size of a
block. Readers verify the blocks they touch: whoever reads a 64th of a record pays a 64th of its checksums. Records are read,
not mapped: a file that another machine removes under a map ends in SIGBUS on NFS. CRC-32 finds torn and rotten files; it is
no defence against malice. Not here: where records lie and how they appear at once (`store`).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import CorruptData
from tenure.train.files import Files

Arrays = dict[str, NDArray[Any]]

MAGIC = b"TENURE\x002"
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 20
_PREFIX = struct.Struct("<8sII")
_ALIGN = 64
_HEAD_BYTES = 4096
"""Read at once: header, checksums and all of a small record."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says about itself."""

    fence: int
    """Fence of the lease under which it was written."""
    meta: Mapping[str, Any]
    """JSON-ready data, e.g. loss and seconds."""
    arrays: Mapping[str, Mapping[str, Any]]
    """Name -> dtype, shape, offset and bytes within the payload."""
    block_bytes: int
    payload_bytes: int
    table_at: int
    """Offset of the checksums in the file."""
    payload_at: int
    """Offset of the payload in the file."""


def pack(
    arrays: Mapping[str, NDArray[Any]],
    *,
    fence: int = 0,
    meta: Mapping[str, Any] | None = None,
    block_bytes: int = BLOCK_BYTES,
    align: int = _ALIGN,
) -> list[memoryview]:
    """Return the pieces of a record, in order. Arrays are not copied when they are contiguous.

    align: each array begins at a multiple of this many bytes of the payload.
    Raises ValueError for arrays of objects and for a NaN in `meta`.
    """
    entries: dict[str, dict[str, Any]] = {}
    pieces: list[memoryview] = []
    offset = 0
    for name, values in arrays.items():
        if values.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects; only plain numbers can be stored")
        plain = np.ascontiguousarray(values)
        entries[name] = {"dtype": values.dtype.str, "shape": list(values.shape), "offset": offset, "bytes": plain.nbytes}
        gap = -plain.nbytes % align
        pieces += [plain.reshape(-1).view(np.uint8).data, memoryview(bytes(gap))]
        offset += plain.nbytes + gap
    if pieces:  # nothing follows the last array
        offset -= len(pieces.pop())
    body = {"fence": fence, "meta": dict(meta or {}), "arrays": entries, "payload_bytes": offset, "block_bytes": block_bytes}
    header = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    prefix = _PREFIX.pack(MAGIC, len(header), zlib.crc32(header))
    table = np.array(_checksums(pieces, block_bytes), dtype="<u4").tobytes()
    gap = -(len(prefix) + len(header) + len(table)) % _ALIGN
    return [memoryview(b"".join((prefix, header, table, bytes(gap)))), *pieces]


class Record:
    """A record that is read in parts. Raises FileNotFoundError, or CorruptData when the header is not whole."""

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self._path = path
        self._files = files or Files()
        self._head = self._files.read(path, 0, _HEAD_BYTES)
        self.header = self._read_header()

    def array(self, name: str, first: int = 0, count: int = -1) -> NDArray[Any]:
        """Return `count` elements of the flattened array from `first` on (-1: all, in its shape), verified.

        Raises CorruptData, KeyError for a name that the record lacks, ValueError for elements that it lacks.
        """
        entry = self.header.arrays[name]
        dtype = np.dtype(entry["dtype"])
        size = entry["bytes"] // dtype.itemsize
        stop = size if count < 0 else first + count
        if not 0 <= first <= stop <= size:
            raise ValueError(f"{self._path}: array {name!r} has {size} elements; asked for {first} to {stop}")
        start_at, stop_at = (entry["offset"] + n * dtype.itemsize for n in (first, stop))
        values: NDArray[Any] = self._payload(start_at, stop_at).view(dtype)
        return values.reshape(entry["shape"]) if count < 0 and not first else values

    def arrays(self) -> Arrays:
        """Return all arrays, verified. Raises CorruptData."""
        whole = self._payload(0, self.header.payload_bytes)
        return {
            name: whole[entry["offset"] : entry["offset"] + entry["bytes"]].view(entry["dtype"]).reshape(entry["shape"])
            for name, entry in self.header.arrays.items()
        }

    def _read_header(self) -> Header:
        if len(self._head) < _PREFIX.size:
            raise CorruptData(f"{self._path}: {len(self._head)} bytes are too few for a record; it is torn")
        magic, length, crc = _PREFIX.unpack_from(self._head)
        if magic != MAGIC or length > MAX_HEADER_BYTES:
            raise CorruptData(f"{self._path}: not a record of a training store (it begins with {bytes(self._head[:8])!r})")
        text = self._bytes(_PREFIX.size, length)
        if len(text) != length or zlib.crc32(text) != crc:
            raise CorruptData(f"{self._path}: the header does not match its checksum")
        body = json.loads(bytes(text))
        table_at = _PREFIX.size + length
        table_bytes = 4 * -(-body["payload_bytes"] // body["block_bytes"])
        return Header(
            fence=body["fence"],
            meta=body["meta"],
            arrays=body["arrays"],
            block_bytes=body["block_bytes"],
            payload_bytes=body["payload_bytes"],
            table_at=table_at,
            payload_at=-(-(table_at + table_bytes) // _ALIGN) * _ALIGN,
        )

    def _bytes(self, at: int, size: int) -> bytearray | memoryview:
        """Return bytes of the file: those read at first, or read now; fewer when it ends before."""
        if at + size <= len(self._head):
            return memoryview(self._head)[at : at + size]
        return self._files.read(self._path, at, size)

    def _payload(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return payload bytes start to stop - 1, after a look at the checksums of the blocks they lie in."""
        header, block = self.header, self.header.block_bytes
        if start == stop:
            return np.empty(0, dtype=np.uint8)
        first, last = start // block, -(-stop // block)
        table = np.frombuffer(self._checked(header.table_at + 4 * first, 4 * (last - first)), dtype="<u4")
        begin, end = first * block, min(last * block, header.payload_bytes)
        content = self._checked(header.payload_at + begin, end - begin)
        with memoryview(content) as view:
            for number, expected in enumerate(table.tolist()):
                if zlib.crc32(view[number * block : (number + 1) * block]) != expected:
                    raise CorruptData(f"{self._path}: block {first + number} of the payload does not match its checksum")
        return np.frombuffer(content, dtype=np.uint8)[start - begin : stop - begin]

    def _checked(self, at: int, size: int) -> bytearray:
        found = self._bytes(at, size)
        if len(found) != size:
            raise CorruptData(f"{self._path}: {size - len(found)} of {size} bytes are missing; the file is torn")
        return found if isinstance(found, bytearray) else bytearray(found)


def read_arrays(path: Path, files: Files | None = None) -> tuple[Header, Arrays]:
    """Return a whole record, verified. Raises FileNotFoundError, CorruptData."""
    record = Record(path, files)
    return record.header, record.arrays()


def _checksums(pieces: list[memoryview], block_bytes: int) -> list[int]:
    crcs: list[int] = []
    crc, filled = 0, 0
    for part in _split(pieces, block_bytes):
        crc, filled = zlib.crc32(part, crc), filled + len(part)
        if filled == block_bytes:
            crcs.append(crc)
            crc, filled = 0, 0
    return [*crcs, crc] if filled else crcs


def _split(pieces: list[memoryview], block_bytes: int) -> Iterator[memoryview]:
    room = block_bytes
    for piece in pieces:
        at = 0
        while at < len(piece):
            part = piece[at : at + room]
            yield part
            at += len(part)
            room = room - len(part) or block_bytes
