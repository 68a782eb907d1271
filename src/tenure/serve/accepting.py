"""Accepting connections up to a bound: past it, and while the process has no descriptor left, new ones wait in the kernel."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
from collections.abc import Callable

_AT_ONCE = 64
"""Accepted before other work goes on."""
_SHORT_OF = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class Acceptor:
    """Accepts on a listening socket, which stays its owner's, and gives each connection a protocol."""

    def __init__(
        self, bound: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol], *, most: int, open_now: Callable[[], int]
    ) -> None:
        """most: connections at a time. open_now: how many there are."""
        self._bound, self._make, self._most, self._open_now = bound, make_protocol, most, open_now
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting = self._closed = False
        self._poll = select.poll()
        self._poll.register(bound, select.POLLIN)
        bound.setblocking(False)
        self.resume()

    def resume(self) -> None:
        """Accept again if there is room: to be called when a connection has gone, and now and then."""
        if not self._accepting and not self._closed and not self._full():
            self._accepting = True
            self._loop.add_reader(self._bound.fileno(), self._accept)

    def some_wait(self) -> bool:
        """Whether connections wait in the kernel because as many are open as may be."""
        return not self._closed and self._full() and bool(self._poll.poll(0))

    def close(self) -> None:
        """Accept no more."""
        self._pause()
        self._closed = True

    def _full(self) -> bool:
        return self._open_now() + len(self._opening) >= self._most

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._bound.fileno())

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if self._full():
                self._pause()
                return
            try:
                accepted, _ = self._bound.accept()
            except OSError as error:
                if error.errno in _SHORT_OF:
                    self._pause()  # no busy loop: `resume` tries again
                return
            task = self._loop.create_task(self._connect(accepted))
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self.resume()  # a connection that has just been made was counted twice until now

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._make, accepted)
        except OSError:
            accepted.close()  # it left before it was met
