"""gRPC as the load generator speaks it: HTTP/2 with many requests on few connections, which take turns.

    request ── template of its frames, the stream's number written in ──► socket
    answer  ── HEADERS, DATA, HEADERS ──► its last header block, known by its bytes ──► ended so

The server is asked to keep no table of headers, so that equal blocks mean the same.
Not here: one connection (`grpc_connection`), one call (`grpc_message`).
"""

from __future__ import annotations

import os
import socket
from errno import EINPROGRESS
from typing import Any

from tenure.serve.load.grpc_connection import Connection
from tenure.serve.load.grpc_message import Message
from tenure.serve.load.http_wire import SCRATCH_BYTES, connected
from tenure.serve.load.loop import Loop


class GrpcWire:
    """Connections to one gRPC server. See `loop.Wire`."""

    def __init__(self, host: str, port: int, *, connections: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self.address = f"grpc://{host}:{port}"
        self._connections = connections
        self._address: Any = None
        self._family = socket.AF_INET
        self.scratch = bytearray(SCRATCH_BYTES)
        self.view = memoryview(self.scratch)
        self._all: list[Connection] = []
        self._leaving: list[Connection] = []
        """On which answers are still due and nothing more is sent."""
        self._turn = 0
        self.loop: Loop

    def open(self, loop: Loop) -> None:
        """See Wire."""
        self.loop = loop
        for _ in range(self._connections):
            opened = connected(self._host, self._port, self._timeout_s)
            self._address, self._family = opened.getpeername(), opened.family
            connection = Connection(self, opened)
            self._all.append(connection)
            connection.settle(self._timeout_s)

    def try_send(self, index: int, request: Message) -> bool:
        """See Wire. The connections take turns."""
        connections = self._all
        for _ in connections:
            self._turn = turn = (self._turn + 1) % len(connections)
            connection = connections[turn]
            if connection.leaving:
                replaced = self._replace(turn)
                if isinstance(replaced, str):
                    self.loop.fail(index, replaced)
                    return True
                connection = replaced
            if len(connection.streams) < connection.max_streams:
                connection.send(index, request)
                return True
        return False

    def _replace(self, turn: int) -> Connection | str:
        """Begin to connect anew where nothing more can be sent; return the connection, or why there is none."""
        try:
            opened = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError as error:
            return f"no connection: {error.strerror}"
        opened.setblocking(False)
        code = opened.connect_ex(self._address)
        if code not in (0, EINPROGRESS):
            opened.close()
            return f"no connection: {os.strerror(code)}"
        self._leaving = [left for left in self._leaving if left.streams]
        if self._all[turn].streams:
            self._leaving.append(self._all[turn])
        else:
            self._all[turn].close()
        self._all[turn] = Connection(self, opened)
        return self._all[turn]

    def give_up(self, index: int) -> None:
        """See Wire."""
        for connection in (*self._all, *self._leaving):
            if connection.give_up(index):
                return

    def close(self) -> None:
        """See Wire."""
        for connection in (*self._all, *self._leaving):
            connection.close()
