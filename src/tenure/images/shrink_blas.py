"""A BLAS that is loaded, since NumPy is linked to it, and never called: 25 MB of kernels that an engine has of its own.

Its place is taken by a library of a few kilobytes that gives the same names. The two functions that NumPy calls whenever it is
imported (dot products of its self-test) work; any other says on standard error what happened and ends the program by SIGABRT,
so that no wrong number ever comes of it. It is written here, byte by byte: users need no compiler.
Only for x86-64. Not for: programs that do call it; the answers tell, and the step is dropped.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection
from pathlib import Path

from tenure.images.elf_file import X86_64
from tenure.images.shrink_elf import elf_files, remove_needless
from tenure.images.tree import replace_file

_BLAS = re.compile(r"/lib(?:scipy_)?(?:open|f|c)?blas[^/]*\.so[^/]*$")
_SUPPORT = re.compile(r"/lib(?:gfortran|quadmath|blas|lapack|cblas)[^/]*\.so[^/]*$")
"""What goes with it, where nothing else needs it."""
SAID = (
    b"tenure: this image was built without its BLAS library, as no exercise came to call it; the program has just done so.\n"
    b"tenure: build the image anew with an exercise that does, or with --keep blas.\n"
)


class UnusedBlas:
    """Put a stand-in in the place of one BLAS library, wherever it lies below a folder of this name."""

    def __init__(self, owner: str) -> None:
        """owner: of the library, as its wheel's folder is called: ``numpy`` for numpy.libs."""
        self._owner = owner
        self.name = f"{owner}'s BLAS"

    def apply(self, tree: Path) -> str:
        """See Step."""
        files = elf_files(tree)
        blas = [path for path in files if _BLAS.search(path) and f"/{self._owner}.libs/" in path]
        if not blas:
            return "it has none of its own"
        for path in blas:
            library = files[path]
            if library.machine != X86_64:
                return "stand-ins are written for x86-64 only"
            users = [user for name, user in files.items() if name != path and library.soname in user.needed]
            wanted = set().union(*(user.symbols(defined=False) for user in users)) & library.symbols(defined=True)
            replace_file(tree / path.lstrip("/"), stand_in(library.soname, wanted))
        remove_needless(tree, _SUPPORT, {path: elf for path, elf in files.items() if path not in blas})
        return ""


# --- the stand-in: one page of headers, tables and code, one of what the loader writes to ---

_PAGE = 4096
_SDOT = bytes.fromhex(
    "0f57c0"  # xorps xmm0, xmm0
    "4885ff7e1f"  # test rdi, rdi; jle end            n
    "48c1e202"  # shl rdx, 2                          step of x, bytes
    "49c1e002"  # shl r8, 2                           step of y
    "f30f100e"  # again: movss xmm1, [rsi]
    "f30f5909"  # mulss xmm1, [rcx]
    "f30f58c1"  # addss xmm0, xmm1
    "4801d6"  # add rsi, rdx
    "4c01c1"  # add rcx, r8
    "48ffcf"  # dec rdi
    "75e9"  # jnz again
    "c3"  # end: ret
)
"""float cblas_sdot(int64 n, float *x, int64 incx, float *y, int64 incy), System V calling convention."""
_DDOT = bytes.fromhex("0f57c04885ff7e1f48c1e20349c1e003f20f100ef20f5909f20f58c14801d64c01c148ffcf75e9c3")
"""The same in double precision."""
_WORKING = {"cblas_sdot": _SDOT, "cblas_ddot": _DDOT}


def stand_in(soname: str, names: Collection[str]) -> bytes:
    """Return a shared library for x86-64 that gives these functions, as above.

    Source: System V ABI, chapters 4 and 5, and its AMD64 supplement.
    """
    ordered = sorted(names)
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in [soname, *ordered])
    code, starts = _code(ordered)
    count = len(ordered) + 1
    hash_at = 64 + 4 * 56
    symbols_at = _aligned(hash_at + 8 + 4 * (1 + count), 8)
    strings_at = symbols_at + 24 * count
    code_at = _aligned(strings_at + len(strings), 16)
    end = code_at + len(code)
    dynamic_at = _aligned(end, _PAGE)
    offset = 1 + len(soname) + 1
    symbols = bytes(24)
    for name, start in zip(ordered, starts, strict=True):
        symbols += struct.pack("<IBBHQQ", offset, 0x12, 0, 1, code_at + start, 1)  # a global function
        offset += len(name) + 1
    chain = [*range(count)][1:] and [0, *range(2, count), 0]  # one bucket: a short list is as good as a hash
    table = struct.pack(f"<{3 + count}I", 1, count, int(count > 1), *(chain or [0]))
    tags = ((14, 1), (4, hash_at), (5, strings_at), (6, symbols_at), (10, len(strings)), (11, 24), (0, 0))
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    segments = (
        (1, 5, 0, end, _PAGE),
        (1, 6, dynamic_at, len(dynamic), _PAGE),
        (2, 6, dynamic_at, len(dynamic), 8),
        (0x6474E551, 6, 0, 0, 16),  # a stack that is not executed
    )
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, X86_64, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    header += b"".join(
        struct.pack("<IIQQQQQQ", kind, rights, at, at, at, size, size, align) for kind, rights, at, size, align in segments
    )
    image = bytearray(dynamic_at) + dynamic
    for at, part in ((0, header), (hash_at, table), (symbols_at, symbols), (strings_at, strings), (code_at, code)):
        image[at : at + len(part)] = part
    return bytes(image)


def _code(names: list[str]) -> tuple[bytes, list[int]]:
    """Return the machine code and where in it each name begins."""
    parts, starts, places = bytearray(_refusal()), [], {"": 0}
    for name, working in _WORKING.items():
        parts += bytes(-len(parts) % 16)
        places[name] = len(parts)
        parts += working
    for name in names:
        starts.append(next((places[known] for known in _WORKING if known in name and not name.endswith("sub")), 0))
    return bytes(parts), starts


def _refusal() -> bytes:
    """Return code that writes the message to standard error and sends its own process SIGABRT."""
    before = (
        b"\xb8\x01\x00\x00\x00\xbf\x02\x00\x00\x00"  # mov eax, write; mov edi, 2
        + b"\xba" + struct.pack("<I", len(SAID))  # mov edx, length
    )  # fmt: skip
    after = (
        b"\x0f\x05"  # syscall
        b"\xb8\x27\x00\x00\x00\x0f\x05"  # mov eax, getpid; syscall
        b"\x89\xc7\xbe\x06\x00\x00\x00"  # mov edi, eax; mov esi, SIGABRT
        b"\xb8\x3e\x00\x00\x00\x0f\x05"  # mov eax, kill; syscall
        b"\xbf\x86\x00\x00\x00\xb8\xe7\x00\x00\x00\x0f\x05"  # mov edi, 134; mov eax, exit_group; syscall
    )
    return before + b"\x48\x8d\x35" + struct.pack("<i", len(after)) + after + SAID  # lea rsi, [rip + after]


def _aligned(value: int, to: int) -> int:
    return -(-value // to) * to
