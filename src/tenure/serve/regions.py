"""System shared memory that clients have registered: objects of /dev/shm, by the names that requests use.

The server opens an object and hands its descriptor to the instances, which map it; it never reads or writes the bytes
itself, so an object that is cut short under load can end an instance (it is started again) but not the server.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from tenure.errors import NotFound
from tenure.serve.faults import InputRefused
from tenure.serve.plane import RegionStatus

MAX_REGIONS = 1024
_KEY = re.compile(r"/?[^/\0]{1,250}")


@dataclass(slots=True, eq=False)
class Region:
    """One registered region and its open object."""

    number: int
    """How instances call it; never used again."""
    status: RegionStatus
    fd: int
    """-1: unregistered."""
    writable: bool

    def check(self) -> None:
        """Raise InputRefused when the object has become shorter than what was registered."""
        size = os.fstat(self.fd).st_size
        if size < self.status.offset + self.status.nbytes:
            raise InputRefused(
                f'shared memory "{self.status.name}" ({self.status.key}) has been cut to {size} bytes; register it again'
            )


class Regions:
    """Registered regions by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Region] = {}
        self._number = 0

    def register(self, name: str, key: str, offset: int, nbytes: int) -> Region:
        """Open a shared-memory object. Raises InputRefused (absent, too short, name taken, too many)."""
        if not name or len(name) > 250:
            raise InputRefused(f"a region's name has 1 to 250 characters; found {len(name)}")
        if name in self._by_name:
            raise InputRefused(f'shared memory "{name}" is registered already: unregister it first')
        if len(self._by_name) >= MAX_REGIONS:
            raise InputRefused(f"{MAX_REGIONS} regions are registered, the limit: unregister some")
        fd, writable = _open(key)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise InputRefused(f'"{key[:80]}" is not a shared-memory object')
            if offset < 0 or nbytes < 1 or offset + nbytes > found.st_size:
                raise InputRefused(
                    f'shared memory "{key}" has {found.st_size} bytes; the region is to have {nbytes} from byte {offset} on'
                )
        except InputRefused:
            os.close(fd)
            raise
        self._number += 1
        region = self._by_name[name] = Region(self._number, RegionStatus(name, key, offset, nbytes), fd, writable)
        return region

    def unregister(self, name: str = "") -> list[Region]:
        """Forget one region, or all; return those that were there."""
        names = [name] if name else list(self._by_name)
        gone = [region for region in (self._by_name.pop(each, None) for each in names) if region is not None]
        for region in gone:
            os.close(region.fd)
            region.fd = -1
        return gone

    def find(self, name: str) -> Region:
        """Return a region. Raises InputRefused: a request names it."""
        region = self._by_name.get(name)
        if region is None:
            raise InputRefused(f'there is no registered shared memory "{name[:80]}"')
        return region

    def all(self) -> Sequence[Region]:
        """Return every region."""
        return list(self._by_name.values())

    def status(self, name: str = "") -> list[RegionStatus]:
        """Return what is registered. Raises NotFound for a name that is not."""
        if not name:
            return [region.status for region in self._by_name.values()]
        if name not in self._by_name:
            raise NotFound(f'there is no registered shared memory "{name[:80]}"')
        return [self._by_name[name].status]


def _open(key: str) -> tuple[int, bool]:
    """Open an object of /dev/shm and nothing outside of it; for writing where that is allowed."""
    if not _KEY.fullmatch(key) or key.strip("/") in (".", ".."):
        raise InputRefused(f"a shared-memory key is a slash and a name without slashes; found {key[:80]!r}")
    path, flags = f"/dev/shm/{key.lstrip('/')}", os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | flags), True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputRefused(f'shared memory "{key}" cannot be opened: {error.strerror}') from error
    try:
        return os.open(path, os.O_RDONLY | flags), False
    except OSError as error:
        raise InputRefused(f'shared memory "{key}" cannot be opened: {error.strerror}') from error
