"""Mounts of a container that another user named, held fast from the look at them until the engine has made them.

Between a look at a path and its mounting its owner could put a link in its place, and an engine is root. So the path is opened
with that user's rights, and what was opened is bound to a place where root alone can go; the engine mounts that. Once the
container runs it has its own mounts, and the places are given up. Standard library only. Not here: what may be mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Sequence

from tenure.runtimes.acting import Actor, acting_as

PLACES = "/run/tenure-mounts"
"""Never deleted recursively by anybody: what is bound there is users' own."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_BIND_ALL = 4096 | 16384
_MNT_DETACH = 2


class Pinned:
    """The places of one container's mounts. `release` gives them up, also those of one that died."""

    def __init__(self, name: str) -> None:
        self._folder = f"{PLACES}/{name}"

    def pin(self, sources: Sequence[str], actor: Actor) -> dict[str, str]:
        """Return source -> place. Raises OSError, also when a source is not what it was any more."""
        os.makedirs(PLACES, mode=0o700, exist_ok=True)
        self.release()
        os.mkdir(self._folder, 0o700)
        places = {}
        for number, source in enumerate(dict.fromkeys(sources)):
            with acting_as(actor):
                descriptor = os.open(source, os.O_PATH | os.O_CLOEXEC)
            try:
                if (found := os.readlink(f"/proc/self/fd/{descriptor}")) != source:
                    raise OSError(f"{source} has become {found} since it was looked at; start it again")
                places[source] = self._bind(descriptor, f"{self._folder}/{number}")
            finally:
                os.close(descriptor)
        return places

    def _bind(self, descriptor: int, place: str) -> str:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.mkdir(place, 0o700)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        if _LIBC.mount(f"/proc/self/fd/{descriptor}".encode(), place.encode(), None, ctypes.c_ulong(_MS_BIND_ALL), None) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{place} cannot be bound: {os.strerror(error)}")
        return place

    def release(self) -> None:
        """Give the places up. Nothing happens to what they showed, nor to a container that has it by now."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                place = f"{self._folder}/{name}"
                while _LIBC.umount2(place.encode(), _MNT_DETACH) == 0:
                    pass
                # Each of these refuses what is still a mount, and what is not empty.
                (os.rmdir if os.path.isdir(place) else os.unlink)(place)
            os.rmdir(self._folder)
