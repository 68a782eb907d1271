"""A cpio archive in the form that the Linux kernel unpacks into memory at its start. Bytes in, bytes out, no I/O.

Archives may follow each other: the kernel unpacks one after the other, so that what is only known at a start is appended.
Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import posixpath
import stat

_ALIGN = 4
_BLOCK = 512


class Archive:
    """Files for a kernel to unpack, each name once, all of root's and without times: the same parts give the same bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder and those it lies in; one that is there stays."""
        name = name.strip("/")
        if not name or name in self._names:
            return
        self.folder(posixpath.dirname(name))
        self._add(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file and the folders it lies in."""
        self.folder(posixpath.dirname(name.strip("/")))
        self._add(name.strip("/"), stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link and the folders it lies in."""
        self.folder(posixpath.dirname(name.strip("/")))
        self._add(name.strip("/"), stat.S_IFLNK | 0o777, target.encode(errors="surrogateescape"))

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device and the folders it lies in."""
        self.folder(posixpath.dirname(name.strip("/")))
        self._add(name.strip("/"), stat.S_IFCHR | mode, b"", (major, minor))

    def to_bytes(self) -> bytes:
        """Return the archive with its end mark, a whole number of blocks."""
        data = b"".join([*self._parts, _entry(0, "TRAILER!!!", 0, b"", (0, 0))])
        return data + bytes(-len(data) % _BLOCK)

    def _add(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        if name in self._names:
            raise ValueError(f"{name!r} is in the archive already")
        self._names.add(name)
        self._parts.append(_entry(len(self._names), name, mode, data, device))


def _entry(number: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    encoded = name.encode(errors="surrogateescape")
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded + b"\0"
    return head + bytes(-len(head) % _ALIGN) + data + bytes(-len(data) % _ALIGN)
