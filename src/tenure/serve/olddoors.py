"""The ASGI and grpc.aio doors behind the new doors' interface, until those are here: opened on a bound socket, closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

from tenure.errors import Unavailable
from tenure.serve.bridge import Bridge
from tenure.serve.dataplane import DataPlane
from tenure.serve.http import HttpDoor as AsgiDoor
from tenure.serve.limits import DoorLimits


class HttpDoor:
    """uvicorn around the ASGI door."""

    def __init__(self, plane: DataPlane, *, limits: DoorLimits) -> None:
        self._plane = Bridge(plane)

    async def open(self, bound: socket.socket) -> None:
        """Start accepting. Raises Unavailable when that takes longer than 30 s."""
        self._server = server = _http_server(self._plane)
        self._task = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            async with asyncio.timeout(30):
                while not server.started and not self._task.done():
                    await asyncio.sleep(0.001)
        except TimeoutError as error:
            raise Unavailable("the HTTP door did not open within 30 s") from error

    async def close(self, grace_s: float) -> None:
        """Stop accepting, answer, leave."""
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await self._task


class GrpcDoor:
    """grpc.aio."""

    def __init__(self, plane: DataPlane, *, limits: DoorLimits) -> None:
        self._plane = Bridge(plane)

    async def open(self, bound: socket.socket) -> None:
        """Start accepting, on the address of the socket, which is closed: grpc.aio opens its own."""
        from tenure.serve.grpc import make_server  # grpc is loaded only where the door is really opened

        self._server = make_server(self._plane)
        host, port = bound.getsockname()[:2]
        bound.close()
        self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        await self._server.start()

    async def close(self, grace_s: float) -> None:
        """Stop accepting, answer, leave."""
        await self._server.stop(grace_s)


def _http_server(plane: Bridge) -> Any:
    import uvicorn  # only where the door is really opened

    class _Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave the signals to `serve`: both doors close together."""
            yield

    # One line for each malformed request would let any client fill the log; failures of our own are still written.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    return _Server(
        uvicorn.Config(
            AsgiDoor(plane),
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
            backlog=1024,
        )
    )
