"""Memory for request bodies: one shared, sparse, bounded piece, and who holds how much of it.

The server writes into it, instances map it read-only by `reader`. Allocation is by size classes (at most one eighth is
lost to rounding): a freed block goes onto a list of its class and is the next one handed out, still warm in the caches.
Behind the lists is a free list by address that joins neighbours; when it has no hole that is large enough, the lists are
emptied into it. Both ends cost O(1) for sizes that come again, and O(log holes) amortised otherwise.

Weighed and rejected: one mapping per request (page faults cost more than a small request), a buddy allocator (half of the
budget lost to rounding for sizes just above a power of two).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import bisect_left

from tenure.errors import SpecError
from tenure.serve.faults import Overloaded, TooLarge
from tenure.serve.plane import ALIGNMENT, Buffer

_NOTHING = memoryview(b"")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def shared_memory(name: str, size_bytes: int) -> int:
    """Return the descriptor of anonymous shared memory whose size nobody can change: no reader of it can be made to fault.

    Sparse: what is not written takes no memory.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


class Arena:
    """Bounded memory for requests, by offset."""

    def __init__(self, size_bytes: int, *, max_request_bytes: int) -> None:
        """size_bytes: the budget, rounded down to whole pages; at least one page."""
        size_bytes -= size_bytes % mmap.PAGESIZE
        if size_bytes <= 0:
            raise SpecError(f"a memory budget is at least {mmap.PAGESIZE} bytes")
        self.size_bytes = size_bytes
        self.max_request_bytes = min(max_request_bytes, size_bytes)
        self.held_bytes = 0
        """Rounded to size classes."""
        self.lately_bytes = 0
        """The most that was held since the last `trim`."""
        self.by_door: dict[str, int] = {}
        """Bytes held, by door."""
        fd = shared_memory("tenure-arena", size_bytes)
        self._memory = mmap.mmap(fd, size_bytes)
        self.reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        """Descriptor that others map read-only."""
        os.close(fd)
        self._view = memoryview(self._memory)
        self._lists: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}
        self._starts = [0]
        self._ends = [size_bytes]
        self._largest = size_bytes
        """No hole of the free list is larger; exact after a search that failed."""
        self._touched_bytes = 0
        """No page behind this has been written since it was given back."""
        self._peak_bytes = 0

    def reserve(self, nbytes: int, door: str) -> Buffer:
        """Return `nbytes` of memory that nobody else has. Raises TooLarge; Overloaded when there are not as many free."""
        if nbytes > self.max_request_bytes:
            raise TooLarge(f"a request may have {self.max_request_bytes} bytes; this one has {nbytes} or more")
        size = ALIGNMENT if nbytes <= ALIGNMENT else min(_rounded(nbytes), self.size_bytes)
        free = self._lists.get(size)
        offset = free.pop() if free else self._cut(size)
        self._sizes[offset] = size
        self.held_bytes = held = self.held_bytes + size
        if held > self.lately_bytes:
            self.lately_bytes = held
        by_door = self.by_door
        by_door[door] = by_door.get(door, 0) + size
        return Buffer(offset, self._view[offset : offset + nbytes], door)

    def release(self, buffer: Buffer) -> None:
        """Give back what `reserve` returned; its view must not be used any more. A second time is an error (KeyError)."""
        size = self._sizes.pop(buffer.offset)
        self.held_bytes -= size
        self.by_door[buffer.door] -= size
        buffer.view = _NOTHING
        free = self._lists.get(size)
        if free is None:
            self._lists[size] = [buffer.offset]
        else:
            free.append(buffer.offset)

    @property
    def peak_bytes(self) -> int:
        """The most that was ever held."""
        return max(self._peak_bytes, self.lately_bytes)

    def trim(self) -> int:
        """Give pages back to the system when less than half of them were in use since the last time; return how many bytes.

        Costs O(free blocks): for a timer, not for a request.
        """
        self._peak_bytes, lately = self.peak_bytes, self.lately_bytes
        self.lately_bytes = self.held_bytes
        if lately * 2 >= self._touched_bytes:
            return 0
        self._join()
        let_go = 0
        for start, end in zip(self._starts, self._ends, strict=True):
            start += -start % mmap.PAGESIZE
            end = min(end, self._touched_bytes)
            end -= end % mmap.PAGESIZE
            if start < end:
                self._memory.madvise(mmap.MADV_REMOVE, start, end - start)
                let_go += end - start
        self._touched_bytes = max((offset + size for offset, size in self._sizes.items()), default=0)
        return let_go

    def close(self) -> None:
        """Free the memory once the last buffer's view is gone."""
        os.close(self.reader)
        self._view.release()
        try:
            self._memory.close()
        except BufferError:
            pass  # a door still has a view: the mapping goes with it

    def _cut(self, size: int) -> int:
        at = self._first_fit(size)
        if at < 0 and any(self._lists.values()):
            self._join()
            at = self._first_fit(size)
        if at < 0:
            raise Overloaded(
                f"the memory for requests is full: {self.held_bytes} of {self.size_bytes} bytes are held; try again"
            )
        offset = self._starts[at]
        if offset + size == self._ends[at]:
            del self._starts[at], self._ends[at]
        else:
            self._starts[at] = offset + size
        self._touched_bytes = max(self._touched_bytes, offset + size)
        return offset

    def _first_fit(self, size: int) -> int:
        if size <= self._largest:
            for at, start in enumerate(self._starts):
                if self._ends[at] - start >= size:
                    return at
            self._largest = max(map(int.__sub__, self._ends, self._starts), default=0)
        return -1

    def _join(self) -> None:
        """Empty the lists into the free list. Each block is moved once for each time that it was freed."""
        for size, offsets in self._lists.items():
            for offset in offsets:
                self._put(offset, offset + size)
        self._lists.clear()
        self._largest = self.size_bytes

    def _put(self, start: int, end: int) -> None:
        starts, ends = self._starts, self._ends
        at = bisect_left(starts, start)
        if at < len(starts) and starts[at] == end:
            end = ends[at]
            del starts[at], ends[at]
        if at and ends[at - 1] == start:
            ends[at - 1] = end
        else:
            starts.insert(at, start)
            ends.insert(at, end)


def _rounded(nbytes: int) -> int:
    """Return the size class: multiples of 64, above 512 of an eighth of the power of two below."""
    step = max(ALIGNMENT, 1 << (nbytes - 1).bit_length() - 4)
    return -(-nbytes // step) * step
