"""One serving process: data plane, both doors, its ports, and an orderly end.

SIGTERM or SIGINT: readiness turns false, accepted requests are answered within the grace, then the process leaves.
Not here: the command line (`__main__`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tenure.errors import SpecError, Unavailable
from tenure.serve.bridge import Bridge
from tenure.serve.dataplane import DataPlane, Limits
from tenure.serve.http import HttpDoor
from tenure.serve.repository import ModelFiles

if TYPE_CHECKING:
    import uvicorn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PortTaken(SpecError):
    """A port cannot be had on this address."""


async def serve(
    model: Path,
    *,
    name: str = "",
    host: str = "127.0.0.1",
    http_port: int | None = 0,
    grpc_port: int | None = 0,
    limits: Limits | None = None,
    grace_s: float = 5.0,
    on_listening: Callable[[Mapping[str, str]], None],
) -> bool:
    """Serve until SIGTERM or SIGINT; return whether all accepted requests were answered.

    Ports: 0 means any free one, None closes that door. `on_listening` gets the addresses once every door is open.
    Raises PortTaken, NotFound, SpecError, MissingExtra; Unavailable when a door does not open within 30 s.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as doors:
        bound = None if http_port is None else _bind(host, http_port)
        if bound is not None:
            doors.callback(bound.close)
        if grpc_port:
            _bind(host, grpc_port).close()
        plane = DataPlane(ModelFiles(model, name=name), limits)
        doors.push_async_callback(plane.close)
        await plane.open()
        bridge = Bridge(plane)
        endpoints: dict[str, str] = {}
        if bound is not None:
            await _open_http(bridge, bound, doors, grace_s)
            endpoints["http"] = _address(host, bound.getsockname()[1])
        if grpc_port is not None:
            endpoints["grpc"] = _address(host, await _open_grpc(bridge, host, grpc_port, doors, grace_s))
        on_listening(endpoints)
        await stop.wait()
        return await plane.drain(grace_s)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise PortTaken(
            f"port {port} on {host} cannot be had: {error.strerror}. Choose another, or 0 for any free one"
        ) from error
    return bound


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _open_http(plane: Bridge, bound: socket.socket, doors: contextlib.AsyncExitStack, grace_s: float) -> None:
    server = _http_server(plane, grace_s)
    task = asyncio.create_task(server.serve(sockets=[bound]))

    async def close() -> None:
        server.should_exit = True
        await task

    doors.push_async_callback(close)
    try:
        async with asyncio.timeout(30):
            while not server.started and not task.done():
                await asyncio.sleep(0.001)
    except TimeoutError as error:
        raise Unavailable("the HTTP door did not open within 30 s") from error


def _http_server(plane: Bridge, grace_s: float) -> uvicorn.Server:
    import uvicorn  # only where the door is really opened

    class _Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave the signals to `serve`: both doors close together."""
            yield

    # One line for each malformed request would let any client fill the log; failures of our own are still written.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        HttpDoor(plane),
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        backlog=1024,
    )
    return _Server(config)


async def _open_grpc(plane: Bridge, host: str, port: int, doors: contextlib.AsyncExitStack, grace_s: float) -> int:
    from tenure.serve.grpc import make_server  # grpc is loaded only where the door is really opened

    server = make_server(plane)
    try:
        found = server.add_insecure_port(_address(host, port))
    except RuntimeError as error:
        raise PortTaken(f"port {port} on {host} cannot be had for gRPC. Choose another, or 0 for any free one") from error
    await server.start()
    doors.push_async_callback(server.stop, grace_s)
    return int(found)
