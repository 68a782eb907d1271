"""One record of the training store: named arrays with a header, a fence and a checksum per 1 MiB block.

    magic (8) | header length (u32) | header CRC-32 (u32) | header (JSON) | zeros up to a multiple of 64 | payload

The header lists each array (name, dtype, shape, offset, bytes), the fence of the writer, free `meta` data, and the
CRC-32 of every MiB of payload. Readers verify the blocks they touch. Records are read, not mapped: a file that another
machine removes under a map ends in SIGBUS on NFS. CRC-32 finds torn and rotten files; it is no defence against malice.
Not here: where records lie and how they appear at once (`store`).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tenure.errors import CorruptData

Arrays = dict[str, NDArray[Any]]

MAGIC = b"TENURE\x001"
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 64 << 20
_PREFIX = struct.Struct("<8sII")
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says about itself."""

    fence: int
    """Fence of the lease under which it was written."""
    meta: Mapping[str, Any]
    """JSON-ready data, e.g. loss and seconds."""
    arrays: Mapping[str, Mapping[str, Any]]
    """Name -> dtype, shape, offset and bytes within the payload."""
    crcs: tuple[int, ...]
    """CRC-32 of each MiB of payload, the last one shorter."""
    payload_bytes: int
    payload_at: int
    """Offset of the payload in the file."""


def pack(arrays: Mapping[str, NDArray[Any]], *, fence: int = 0, meta: Mapping[str, Any] | None = None) -> list[memoryview]:
    """Return the pieces of a record, in order. Arrays are not copied when they are contiguous.

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
        gap = -plain.nbytes % _ALIGN
        pieces += [plain.reshape(-1).view(np.uint8).data, memoryview(bytes(gap))]
        offset += plain.nbytes + gap
    body = {"fence": fence, "meta": dict(meta or {}), "arrays": entries, "payload_bytes": offset, "crcs": _checksums(pieces)}
    header = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    prefix = _PREFIX.pack(MAGIC, len(header), zlib.crc32(header))
    gap = -(len(prefix) + len(header)) % _ALIGN
    return [memoryview(prefix + header + bytes(gap)), *pieces]


def read_header(path: Path) -> Header:
    """Return a record's verified header. Raises FileNotFoundError, or CorruptData when it is not whole."""
    with open(path, "rb") as file:
        return _header(file, path)


def read_arrays(path: Path, names: tuple[str, ...] | None = None) -> tuple[Header, Arrays]:
    """Return header and arrays (all, or those named), verifying every block they touch.

    Raises FileNotFoundError, CorruptData, KeyError for a name that the record lacks.
    """
    with open(path, "rb") as file:
        header = _header(file, path)
        if names is None:
            payload = _blocks(file, path, header, 0, header.payload_bytes)
            return header, {name: _view(payload, entry, 0) for name, entry in header.arrays.items()}
        found = {}
        for name in names:
            entry = header.arrays[name]
            first = entry["offset"] // BLOCK_BYTES * BLOCK_BYTES
            found[name] = _view(_blocks(file, path, header, first, entry["offset"] + entry["bytes"]), entry, first)
        return header, found


def _header(file: BinaryIO, path: Path) -> Header:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise CorruptData(f"{path}: {len(prefix)} bytes are too few for a record; it is torn")
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic != MAGIC or length > MAX_HEADER_BYTES:
        raise CorruptData(f"{path}: not a record of a training store (it begins with {prefix[:8]!r})")
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != crc:
        raise CorruptData(f"{path}: the header does not match its checksum")
    body = json.loads(text)
    return Header(
        fence=body["fence"],
        meta=body["meta"],
        arrays=body["arrays"],
        crcs=tuple(body["crcs"]),
        payload_bytes=body["payload_bytes"],
        payload_at=-(-(_PREFIX.size + length) // _ALIGN) * _ALIGN,
    )


def _blocks(file: BinaryIO, path: Path, header: Header, start: int, stop: int) -> bytearray:
    """Return the payload from `start`, a block's beginning, to the end of the block that holds `stop`, verified."""
    stop = min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, header.payload_bytes)
    buffer = bytearray(max(0, stop - start))
    file.seek(header.payload_at + start)
    got = file.readinto(buffer)  # type: ignore[attr-defined]
    if got != len(buffer):
        raise CorruptData(f"{path}: {len(buffer) - got} of {len(buffer)} bytes are missing; the file is torn")
    with memoryview(buffer) as view:
        for at in range(0, len(buffer), BLOCK_BYTES):
            block = (start + at) // BLOCK_BYTES
            if zlib.crc32(view[at : at + BLOCK_BYTES]) != header.crcs[block]:
                raise CorruptData(f"{path}: block {block} of the payload does not match its checksum")
    return buffer


def _view(buffer: bytearray, entry: Mapping[str, Any], start: int) -> NDArray[Any]:
    inside = entry["offset"] - start
    flat = np.frombuffer(buffer, dtype=np.uint8)[inside : inside + entry["bytes"]]
    values: NDArray[Any] = flat.view(np.dtype(entry["dtype"])).reshape(entry["shape"])
    return values


def _checksums(pieces: list[memoryview]) -> list[int]:
    crcs: list[int] = []
    crc, filled = 0, 0
    for part in _split(pieces):
        crc, filled = zlib.crc32(part, crc), filled + len(part)
        if filled == BLOCK_BYTES:
            crcs.append(crc)
            crc, filled = 0, 0
    return [*crcs, crc] if filled else crcs


def _split(pieces: list[memoryview]) -> Iterator[memoryview]:
    room = BLOCK_BYTES
    for piece in pieces:
        at = 0
        while at < len(piece):
            part = piece[at : at + room]
            yield part
            at += len(part)
            room = room - len(part) or BLOCK_BYTES
