"""The grpc.aio door behind the new doors' interface, until that is here: opened on a bound socket, closed."""

from __future__ import annotations

import socket

from tenure.serve.bridge import Bridge
from tenure.serve.dataplane import DataPlane
from tenure.serve.limits import DoorLimits


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
