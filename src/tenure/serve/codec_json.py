"""The `data` of a tensor written as JSON, into the raw layout and back.

Conversion changes no value: 1.5 is not an INT64, 300 is not a UINT8, true is not a number. It goes piece by piece, so that
a long array never exists as Python objects all at once (those take up to 24 times the text). JSON has no NaN: it reads null.
Not here: what stands around `data` (`codec_http`).
"""

from __future__ import annotations

import itertools
import math
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from tenure.serve.faults import InputRefused
from tenure.serve.tensors import dtype_of, element_count

PIECE_BYTES = 64 << 10
_AT_ONCE = 8192
"""Elements."""
MAX_TEXT_BYTES = 2 << 20
"""Of BYTES tensors as JSON, whose strings exist all at once."""
MAX_RANK = 32
_STRUCTURE = b"[],"
_BLANK = b"[] \t\r\n"
_OTHERS = bytes(code for code in range(256) if code not in _STRUCTURE)


def _decoder(element: Any) -> msgspec.json.Decoder[list[Any]]:
    return msgspec.json.Decoder(list[element])


def _bounded(datatype: str) -> Any:
    found = np.iinfo(dtype_of(datatype, tensor=""))
    return Annotated[int, msgspec.Meta(ge=int(found.min), le=int(found.max))]


_DECODERS: dict[str, msgspec.json.Decoder[list[Any]]] = {
    "BOOL": _decoder(bool),
    **{name: _decoder(float) for name in ("FP16", "FP32", "FP64")},
    **{name: _decoder(_bounded(name)) for name in ("INT8", "INT16", "INT32", "UINT8", "UINT16", "UINT32")},
    "INT64": _decoder(int),
    "UINT64": _decoder(Annotated[int, msgspec.Meta(ge=0)]),
}
_flat_strings = msgspec.json.Decoder(list[str])
_strings = msgspec.json.Decoder(list[Any])


class JsonData:
    """One tensor's `data`, checked against its shape: how long it is raw, and its raw bytes."""

    def __init__(self, text: memoryview, datatype: str, shape: Sequence[int], *, tensor: str) -> None:
        """Raises InputRefused. text: the JSON of an array, flat or nested."""
        self._tensor, self._datatype, self._text = tensor, datatype, text
        self._dtype = dtype_of(datatype, tensor=tensor)
        self._count = element_count(shape, tensor=tensor)
        self._elements: list[bytes] = []
        if bytes(text[:1]) != b"[":
            raise InputRefused(f'input "{tensor}" needs "data", an array of elements, or "binary_data_size" with raw bytes')
        if datatype == "BYTES":
            self._elements = self._read_strings()
            self.nbytes = sum(len(element) + 4 for element in self._elements)
        else:
            self._check_nesting()
            self.nbytes = self._count * self._dtype.itemsize

    def write(self, into: memoryview) -> None:
        """Write the raw layout, `nbytes` long. Raises InputRefused for elements that are not of the datatype."""
        if self._datatype == "BYTES":
            into[:] = b"".join(struct.pack("<I", len(element)) + element for element in self._elements)
            return
        if not self._count:
            return
        out = np.frombuffer(into, self._dtype)
        written = 0
        for piece in self._pieces():
            values = self._numbers(piece)
            if written + len(values) > self._count:
                raise self._irregular(written + len(values))
            out[written : written + len(values)] = values
            written += len(values)
        if written != self._count:
            raise self._irregular(written)

    def _pieces(self) -> Iterator[bytes]:
        """Cut the text between elements, without brackets and blanks. Raises InputRefused for an element without end."""
        kept = b""
        for piece in slices(self._text):
            kept += piece.translate(None, _BLANK)
            cut = kept.rfind(b",")
            if cut >= 0:
                yield kept[:cut]
                kept = kept[cut + 1 :]
            elif len(kept) > PIECE_BYTES:
                raise InputRefused(f'input "{self._tensor}" has an element of more than {PIECE_BYTES} bytes')
        yield kept

    def _numbers(self, piece: bytes) -> Any:
        try:
            values = _DECODERS[self._datatype].decode(b"[%b]" % piece)
            with np.errstate(over="ignore"):
                return (
                    np.array(values, np.float64).astype(self._dtype)
                    if self._dtype.kind == "f"
                    else np.array(values, self._dtype)
                )
        except (msgspec.DecodeError, OverflowError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error).split(" - at")[0]
            raise InputRefused(f'input "{self._tensor}" has elements that are not {self._datatype}: {reason}') from error

    def _check_nesting(self) -> None:
        found = b"".join(piece.translate(None, _OTHERS) for piece in slices(self._text))
        elements = found.count(b",") + 1
        if not self._count and not any(piece.translate(None, _BLANK + b",") for piece in slices(self._text)):
            return
        if elements != self._count or not _regular(found, elements):
            raise self._irregular(elements)

    def _read_strings(self) -> list[bytes]:
        if len(self._text) > MAX_TEXT_BYTES:
            raise InputRefused(
                f'input "{self._tensor}" has {len(self._text)} bytes of strings in JSON, the limit is {MAX_TEXT_BYTES};'
                ' send it raw, with "binary_data_size"'
            )
        try:
            elements = [self._encode(item) for item in _flat(self._strings())]
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise InputRefused(f'input "{self._tensor}" is no array of strings: {error}') from error
        if len(elements) != self._count:
            raise self._irregular(len(elements))
        return elements

    def _strings(self) -> list[Any]:
        try:
            return _flat_strings.decode(self._text)
        except msgspec.ValidationError:  # nested, or no strings
            return _strings.decode(self._text)

    def _encode(self, item: Any) -> bytes:
        if not isinstance(item, str):
            raise InputRefused(f'input "{self._tensor}" is BYTES: its elements must be strings; found {type(item).__name__}')
        return item.encode()

    def _irregular(self, found: int) -> InputRefused:
        return InputRefused(
            f'the "data" of input "{self._tensor}" is not a regular array of as many elements as its shape has,'
            f" {self._count}; found {found} elements"
        )


def slices(text: memoryview) -> Iterator[bytes]:
    """Copy a text slice by slice; where that is done in a thread, other threads get their turn in between."""
    for at in range(0, len(text), PIECE_BYTES):
        if at:
            time.sleep(0)  # lets go of the interpreter, which else changes hands every 5 ms
        yield bytes(text[at : at + PIECE_BYTES])


def _regular(structure: bytes, elements: int) -> bool:
    """Return whether brackets and commas are those of an array of one shape; its innermost arrays are folded level by level."""
    if len(structure) == elements + 1 and structure.count(b"[") == 1:
        return structure.startswith(b"[") and structure.endswith(b"]")
    element = b""
    for _ in range(MAX_RANK):
        opening = len(structure) - len(structure.lstrip(b"["))
        innermost = structure[opening - 1 : structure.find(b"]") + 1] if opening else b""
        if innermost != b"[%b]" % ((element + b",") * innermost.count(b",") + element):
            return False
        if innermost == structure:
            return True
        structure, element = structure.replace(innermost, b"x"), b"x"
    return False


def _flat(data: Iterable[Any]) -> Iterable[Any]:
    for item in data:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def to_json(raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> bytes:
    """Return raw elements as a flat JSON array. NaN and infinities read null; bytes that are no UTF-8 are replaced."""
    pieces: list[bytes] = []
    for elements in _strings_in(raw) if datatype == "BYTES" else _numbers_in(raw, datatype, shape):
        if pieces:
            time.sleep(0)  # as in `slices`
        pieces.append(msgspec.json.encode(elements)[1:-1])
    return b"[%b]" % b",".join(pieces)


def _numbers_in(raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Iterator[list[Any]]:
    array = np.frombuffer(raw, dtype_of(datatype, tensor=""), count=math.prod(shape))
    for at in range(0, array.size, _AT_ONCE):
        yield array[at : at + _AT_ONCE].tolist()


def _strings_in(raw: bytes | memoryview) -> Iterator[list[str]]:
    texts = (element.decode(errors="replace") for element in _elements(raw))
    while some := list(itertools.islice(texts, _AT_ONCE)):
        yield some


def _elements(raw: bytes | memoryview) -> Iterable[bytes]:
    at = 0
    while at < len(raw):
        start = at + 4
        at = start + int(struct.unpack_from("<I", raw, at)[0])
        yield bytes(raw[start:at])
