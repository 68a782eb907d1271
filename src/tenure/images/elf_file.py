"""ELF files as bytes: where what is loaded ends, which symbols they want and give. 64 bit, little endian.

Source: System V ABI, chapters 4 and 5; GNU hash sections as glibc 2.36 reads them. Not for: what a program needs (`elf`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = b"\x7fELF\x02\x01"
X86_64, AARCH64 = 62, 183
_PT_LOAD, _PT_DYNAMIC = 1, 2
_NEEDED, _HASH, _STRTAB, _SYMTAB, _SONAME, _GNU_HASH = 1, 4, 5, 6, 14, 0x6FFFFEF5


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header."""

    kind: int
    offset: int
    address: int
    file_bytes: int


class ElfFile:
    """One file's bytes. Raises ValueError when they are no ELF file of 64 bit, little endian, or end too soon."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != MAGIC or len(data) < 64:
            raise ValueError("no ELF file of 64 bit, little endian")
        self.data = data
        try:
            self.kind, self.machine = struct.unpack_from("<HH", data, 16)
            self.headers_at, self.sections_at = struct.unpack_from("<QQ", data, 32)
            size, count = struct.unpack_from("<HH", data, 54)
            self.headers_end: int = self.headers_at + size * count
            self.segments = tuple(
                Segment(kind, offset, address, file_bytes)
                for kind, _, offset, address, _, file_bytes in (
                    struct.unpack_from("<IIQQQQ", data, self.headers_at + size * number) for number in range(count)
                )
            )
            self._dynamic = dict[int, int](self._tags())
        except struct.error as error:
            raise ValueError(f"an ELF file that ends too soon: {error}") from error

    def loaded_end(self) -> int:
        """Return where in the file the last byte lies, plus one, that a loader or the kernel may read."""
        return max(64, self.headers_end, *(segment.offset + segment.file_bytes for segment in self.segments))

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of the libraries it needs."""
        return tuple(self._text(value) for tag, value in self._tags() if tag == _NEEDED)

    @property
    def soname(self) -> str:
        """Its own name as a library; empty without one."""
        return self._text(self._dynamic[_SONAME]) if _SONAME in self._dynamic else ""

    def symbols(self, *, defined: bool) -> set[str]:
        """Return the names of its dynamic symbols that it gives, or those that it wants of others."""
        if _SYMTAB not in self._dynamic:
            return set()
        table, found = self._at(self._dynamic[_SYMTAB]), set()
        for number in range(1, self._symbol_count()):
            name, _, _, section = struct.unpack_from("<IBBH", self.data, table + 24 * number)
            if (section != 0) == defined:
                found.add(self._text(name))
        return found

    def _tags(self) -> Iterator[tuple[int, int]]:
        for segment in self.segments:
            if segment.kind == _PT_DYNAMIC:
                for at in range(segment.offset, segment.offset + segment.file_bytes, 16):
                    tag, value = struct.unpack_from("<QQ", self.data, at)
                    if tag == 0:
                        return
                    yield tag, value

    def _symbol_count(self) -> int:
        if _HASH in self._dynamic:
            (count,) = struct.unpack_from("<I", self.data, self._at(self._dynamic[_HASH]) + 4)
            return int(count)
        if _GNU_HASH not in self._dynamic:
            return 0
        at = self._at(self._dynamic[_GNU_HASH])
        buckets, first, words, _ = struct.unpack_from("<IIII", self.data, at)
        chains = at + 16 + 8 * words + 4 * buckets
        last = max(struct.unpack_from(f"<{buckets}I", self.data, at + 16 + 8 * words), default=0)
        if last < first:
            return int(first)
        while not struct.unpack_from("<I", self.data, chains + 4 * (last - first))[0] & 1:
            last += 1
        return int(last) + 1

    def _at(self, address: int) -> int:
        for segment in self.segments:
            if segment.kind == _PT_LOAD and segment.address <= address < segment.address + segment.file_bytes:
                return segment.offset + address - segment.address
        raise ValueError(f"address {address:#x} is in no loaded segment")

    def _text(self, offset: int) -> str:
        start = self._at(self._dynamic[_STRTAB]) + offset
        return self.data[start : self.data.index(b"\0", start)].decode("utf-8", "surrogateescape")
