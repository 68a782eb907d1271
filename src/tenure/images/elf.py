"""What an ELF object needs: its interpreter and its libraries, and where they would be found.

Read here instead of by a library: three tables of fixed layout are all that is wanted, and only a few kilobytes of an object of
hundreds of megabytes are touched. Source: System V ABI, chapters 4 and 5; ld.so(8) for the order of the search.
"""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 10, 14, 15, 29
_MAX_TABLE_BYTES = 64 << 20
"""A table said to be larger is damage."""
_MACHINES = {62: "x86_64", 183: "aarch64", 3: "i386", 40: "arm", 243: "riscv64", 22: "s390x", 21: "ppc64le"}


@dataclass(frozen=True, slots=True)
class ElfObject:
    """An executable or a shared object."""

    path: str
    machine: str
    bits: int
    needed: tuple[str, ...]
    """Names of libraries, as written there."""
    interpreter: str
    """The dynamic linker; empty for a library or a static program."""
    soname: str
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]


def read_elf(path: str) -> ElfObject | None:
    """Return what an ELF file says of itself; None when it is none, or damaged."""
    try:
        with open(path, "rb") as file:
            return _read(path, file)
    except (OSError, struct.error, ValueError):
        return None


def _read(path: str, file: BinaryIO) -> ElfObject | None:
    head = file.read(64)
    if head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    machine = struct.unpack_from(order + "H", head, 18)[0]
    if wide:
        (table,) = struct.unpack_from(order + "Q", head, 32)
        entry_bytes, entries = struct.unpack_from(order + "HH", head, 54)
    else:
        (table,) = struct.unpack_from(order + "I", head, 28)
        entry_bytes, entries = struct.unpack_from(order + "HH", head, 42)
    loads: list[tuple[int, int, int]] = []
    dynamic, interpreter = b"", ""
    for raw in _records(_at(file, table, entry_bytes * entries), entry_bytes):
        if wide:
            kind, _, offset, address, _, size = struct.unpack_from(order + "IIQQQQ", raw)
        else:
            kind, offset, address, _, size = struct.unpack_from(order + "IIIII", raw)
        if kind == _PT_LOAD:
            loads.append((address, size, offset))
        elif kind == _PT_DYNAMIC:
            dynamic = _at(file, offset, size)
        elif kind == _PT_INTERP:
            interpreter = os.fsdecode(_at(file, offset, size).rstrip(b"\0"))
    tags = list(
        struct.iter_unpack(
            order + ("qQ" if wide else "iI"), dynamic[: len(dynamic) // (16 if wide else 8) * (16 if wide else 8)]
        )
    )
    values = dict(reversed(tags))
    strings = b""
    if _DT_STRTAB in values:
        strings = _at(file, _offset(loads, values[_DT_STRTAB]), values.get(_DT_STRSZ, 0))

    def text(tag: int) -> str:
        return _string(strings, values[tag]) if tag in values else ""

    origin = os.path.dirname(os.path.realpath(path))
    return ElfObject(
        path=path,
        machine=_MACHINES.get(machine, str(machine)),
        bits=64 if wide else 32,
        needed=tuple(_string(strings, value) for tag, value in tags if tag == _DT_NEEDED),
        interpreter=interpreter,
        soname=text(_DT_SONAME),
        rpath=_folders(text(_DT_RPATH), origin),
        runpath=_folders(text(_DT_RUNPATH), origin),
    )


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    if size > _MAX_TABLE_BYTES:
        raise ValueError(f"a table of {size} bytes")
    file.seek(offset)
    return file.read(size)


def _records(table: bytes, size: int) -> Iterator[bytes]:
    if size < 32:
        raise ValueError("segment headers too short")
    return (table[start : start + size] for start in range(0, len(table) - size + 1, size))


def _offset(loads: Sequence[tuple[int, int, int]], address: int) -> int:
    for begin, size, offset in loads:
        if begin <= address < begin + size:
            return address - begin + offset
    raise ValueError("strings outside of what is loaded")


def _string(strings: bytes, start: int) -> str:
    end = strings.find(b"\0", start)
    if end < 0:
        raise ValueError("a string without end")
    return os.fsdecode(strings[start:end])


def _folders(text: str, origin: str) -> tuple[str, ...]:
    folders = (part.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for part in text.split(":") if part)
    return tuple(os.path.normpath(folder) for folder in folders)


@dataclass(frozen=True, slots=True)
class Found:
    """Where a library lies."""

    path: str
    by_cache: bool
    """Only this machine's ld.so.conf leads there: the linker's cache must be kept."""


def find_library(
    name: str, wanted_by: ElfObject, *, library_path: Sequence[str] = (), more: Sequence[str] = ()
) -> Found | None:
    """Return where ld.so would find a library for an object; None: nowhere.

    library_path: of LD_LIBRARY_PATH. more: run paths of the program that loads the object.
    """
    if "/" in name:
        return Found(name, False) if _fits(name, wanted_by) else None
    rpath = () if wanted_by.runpath else (*wanted_by.rpath, *more)
    folders = (*rpath, *library_path, *wanted_by.runpath, *_standard(wanted_by))
    for folder in folders:
        if _fits(path := os.path.join(folder, name), wanted_by):
            return Found(path, False)
    for folder in _configured():
        if _fits(path := os.path.join(folder, name), wanted_by):
            return Found(path, True)
    return None


def _fits(path: str, wanted_by: ElfObject) -> bool:
    if not os.path.isfile(path):
        return False
    found = read_elf(path)
    return found is not None and (found.machine, found.bits) == (wanted_by.machine, wanted_by.bits)


def _standard(wanted_by: ElfObject) -> tuple[str, ...]:
    """Return the folders that ld.so knows without its cache: Debian's, and those of all others."""
    triple = f"{wanted_by.machine}-linux-gnu"
    wide = "64" if wanted_by.bits == 64 else ""
    return (f"/lib/{triple}", f"/usr/lib/{triple}", f"/lib{wide}", f"/usr/lib{wide}", "/lib", "/usr/lib")


def _configured(conf: str = "/etc/ld.so.conf", depth: int = 4) -> Iterator[str]:
    try:
        lines = Path(conf).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in (line.partition("#")[0].strip() for line in lines):
        if line.startswith("include ") and depth:
            for part in sorted(glob.glob(os.path.join(os.path.dirname(conf), line.removeprefix("include ").strip()))):
                yield from _configured(part, depth - 1)
        elif line.startswith("/"):
            yield line
