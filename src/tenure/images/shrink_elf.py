"""Symbol and debug tables: everything in a file behind the last byte that is ever loaded.

`strip` moves what stays, and has broken libraries that patchelf had changed (NumPy's OpenBLAS among them: "ELF load command
address/offset not page-aligned"). Here nothing moves: the file is cut off, and its header says that it has no sections, which
only debuggers and linkers read. What patchelf moved behind the tables keeps them: less is saved then.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from tenure.images.elf_file import MAGIC, ElfFile
from tenure.images.tree import replace_file, walk

_SECTIONS_AT, _SECTION_COUNT_AT = 40, 60
_LEAST_BYTES = 512
"""Less to be cut off is not worth a change."""


class Symbols:
    """Cut ELF files off behind what is loaded."""

    name = "symbol and debug tables"

    def apply(self, tree: Path) -> str:
        """See Step."""
        cut = 0
        for _, path in walk(tree):
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as stream:
                if stream.read(len(MAGIC)) != MAGIC:
                    continue
            if (shorter := cut_off(path.read_bytes())) is not None:
                replace_file(path, shorter)
                cut += 1
        return "" if cut else "no file has any"


def cut_off(data: bytes) -> bytes | None:
    """Return an ELF file's bytes without what is never loaded; None when that is little, or the file is none of ours."""
    try:
        elf = ElfFile(data)
    except ValueError:
        return None
    end = elf.loaded_end()
    if elf.kind not in (2, 3) or not elf.segments or end > len(data) - _LEAST_BYTES:
        return None  # neither a program nor a library: an object file is all sections
    kept = bytearray(data[:end])
    struct.pack_into("<Q", kept, _SECTIONS_AT, 0)
    struct.pack_into("<HHH", kept, _SECTION_COUNT_AT - 2, 64, 0, 0)
    return bytes(kept)


def elf_files(tree: Path) -> dict[str, ElfFile]:
    """Return the ELF files of a tree by their paths inside; what cannot be read is left out."""
    found = {}
    for inside, path in walk(tree):
        if path.is_symlink() or not path.is_file() or os.path.getsize(path) < len(MAGIC):
            continue
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                continue
            stream.seek(0)
            try:
                found[inside] = ElfFile(stream.read())
            except ValueError:
                continue
    return found


def remove_needless(tree: Path, pattern: re.Pattern[str], files: Mapping[str, ElfFile]) -> None:
    """Remove the libraries whose paths match and that no other of these files needs, again and again, and links to them."""
    left = dict(files)
    while True:
        needed = {name for elf in left.values() for name in elf.needed}
        needless = [
            path
            for path, elf in left.items()
            if pattern.search(path) and {elf.soname, os.path.basename(path)}.isdisjoint(needed)
        ]
        if not needless:
            break
        for path in needless:
            (tree / path.lstrip("/")).unlink()
            del left[path]
    for inside, place in list(walk(tree)):
        if place.is_symlink() and pattern.search(inside) and not place.exists():
            place.unlink()
