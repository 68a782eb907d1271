"""Shared memory of the client: inputs are copied once into parts of /dev/shm that the server has opened by name.

A region is unlinked as soon as the server has it, so nothing is left behind when either side dies. Parts are backed by
memory before they are written (a full /dev/shm is an error here, never a SIGBUS), and used last-in-first-out, so that few
pages are touched. Registering itself is the transport's: this module opens no connection.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenure.serve.tensors import Array

FOLDER = "/dev/shm"
MAX_BYTES = 512 << 20
"""Of all regions of one client; past it, requests travel in the body."""
MAX_PARTS = 16
"""Of one region. More regions are made when more requests are in flight."""
_REGION_BYTES = 64 << 20
_SMALLEST_PART = 1 << 16
_ALIGNMENT = 64
_KEPT = 64


@dataclass(eq=False, slots=True)
class Region:
    """One object in /dev/shm that the server knows by `name`."""

    name: str
    nbytes: int
    memory: mmap.mmap
    file: int
    lost: bool = False
    """The server has forgotten it: its parts are not used again."""

    def forget(self) -> None:
        """Give the memory back once the last part is out of use."""
        self.lost = True
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


Register = Callable[[Region], None]
"""Make a region known to the server, or raise."""


@dataclass(eq=False, slots=True)
class Part:
    """Room for one request's inputs."""

    region: Region
    offset: int
    nbytes: int
    backed: bool = False
    heads: dict[Any, tuple[bytes, list[Array]]] = field(default_factory=dict)
    """The request for a model and shapes, and where its inputs go."""

    def remember(self, key: Any, request: bytes, places: list[Array]) -> None:
        """Keep a request that will be sent again from this part."""
        if len(self.heads) >= _KEPT:
            self.heads.clear()
        self.heads[key] = (request, places)

    def place(self, offset: int, array: Array) -> Array:
        """Return the place of an input, `offset` bytes into this part, as an array to copy it into."""
        dtype = array.dtype.newbyteorder("<")
        return np.frombuffer(self.region.memory, dtype, array.size, self.offset + offset).reshape(array.shape)


class Regions:
    """The parts of one client, shared by its threads."""

    def __init__(self, folder: str = FOLDER) -> None:
        self._folder = folder
        self._free: dict[int, list[Part]] = {}
        self._regions: list[Region] = []
        self._making = threading.Lock()

    def take(self, nbytes: int, register: Register | None) -> Part | None:
        """Return a part of at least `nbytes`; `give` it back. None: none is free and none may be made.

        register: None makes no new region. Raises OSError when the memory can't be had, and what `register` raises.
        """
        size = max(_SMALLEST_PART, 1 << (nbytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        while True:
            try:
                part = free.pop()
            except IndexError:
                if register is None or not self._make(size, free, register):
                    return None
                continue
            if part.region.lost:
                continue
            if not part.backed:
                os.posix_fallocate(part.region.file, part.offset, part.nbytes)
                part.backed = True
            return part

    def give(self, part: Part) -> None:
        """Make a part free again."""
        free = self._free.get(part.nbytes)
        if free is not None and not part.region.lost:
            free.append(part)

    def lose(self, region: Region) -> None:
        """Take note that the server does not know a region any more."""
        region.forget()
        with self._making:
            self._regions = [kept for kept in self._regions if not kept.lost]

    def close(self) -> list[str]:
        """Free everything; return the names that the server still knows."""
        with self._making:
            names = [region.name for region in self._regions]
            for region in self._regions:
                region.forget()
            self._regions = []
            self._free = {}
        return names

    def _make(self, size: int, free: list[Part], register: Register) -> bool:
        with self._making:
            if free:
                return True  # another thread has just made some
            held = sum(region.nbytes for region in self._regions)
            count = min(MAX_PARTS, max(1, _REGION_BYTES // size), (MAX_BYTES - held) // size)
            if count < 1:
                return False
            region = _created(self._folder, size * count, register)
            self._regions.append(region)
            free += [Part(region, offset, size) for offset in range(size * (count - 1), -1, -size)]
            return True


def _created(folder: str, nbytes: int, register: Register) -> Region:
    name = f"tenure-{os.getpid()}-{secrets.token_hex(8)}"
    path = os.path.join(folder, name)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, nbytes)
        region = Region(name, nbytes, mmap.mmap(file, nbytes), file)
        register(region)
    except BaseException:
        os.close(file)
        raise
    finally:
        os.unlink(path)
    return region


def offsets(inputs: Mapping[str, Array]) -> tuple[list[int], int]:
    """Return where each input starts within a part, aligned, and the bytes that all take."""
    found, at = [], 0
    for array in inputs.values():
        found.append(at)
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return found, at
