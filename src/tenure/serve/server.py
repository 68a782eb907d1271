"""One serving process: data plane, both doors, its ports, and an orderly end.

SIGTERM or SIGINT: readiness turns false and new requests are refused, accepted ones are answered within the grace, then
the process leaves. Not here: the command line (`__main__`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tenure.errors import SpecError
from tenure.serve.dataplane import DataPlane, Limits
from tenure.serve.http import HttpDoor
from tenure.serve.limits import DoorLimits
from tenure.serve.repository import ModelFiles

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 4096


class PortTaken(SpecError):
    """A port cannot be had on this address."""


class Door(Protocol):
    """One protocol's way in."""

    async def open(self, bound: socket.socket) -> None:
        """Start accepting on a listening socket."""
        ...

    async def close(self, grace_s: float) -> None:
        """Stop accepting, tell connections to leave, wait for what is due, close."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens. Ports: 0 means any free one, None closes that door."""

    host: str = "127.0.0.1"
    http_port: int | None = 0
    grpc_port: int | None = 0


async def serve(
    model: Path,
    *,
    name: str = "",
    address: Address | None = None,
    limits: Limits | None = None,
    door_limits: DoorLimits | None = None,
    grace_s: float = 5.0,
    on_listening: Callable[[Mapping[str, str]], None],
) -> bool:
    """Serve until SIGTERM or SIGINT; return whether all accepted requests were answered.

    `on_listening` gets the addresses by door once every door is open. Raises PortTaken, NotFound, SpecError,
    MissingExtra, Unavailable when it cannot start.
    """
    address = address or Address()
    stop = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as open_until_the_end:
        bound = {
            kind: open_until_the_end.enter_context(contextlib.closing(_bind(address.host, port)))
            for kind, port in (("http", address.http_port), ("grpc", address.grpc_port))
            if port is not None
        }
        endpoints = {kind: _shown(address.host, each.getsockname()[1]) for kind, each in bound.items()}
        plane = DataPlane(ModelFiles(model, name=name), limits)
        open_until_the_end.push_async_callback(plane.close)
        if not await _unless(stop, plane.open()):
            return True
        doors = []
        for kind, each in bound.items():
            door = _door(kind, plane, door_limits or DoorLimits())
            await door.open(each)
            open_until_the_end.push_async_callback(door.close, 0.0)
            doors.append(door)
        gc.collect()
        gc.freeze()  # what is here now stays: the collector need not look at it again and again
        on_listening(endpoints)
        await stop.wait()
        plane.draining = True
        drained = asyncio.create_task(plane.drain(grace_s))
        await asyncio.gather(drained, *(door.close(grace_s) for door in doors))
        return drained.result()


def _door(kind: str, plane: DataPlane, limits: DoorLimits) -> Door:
    if kind == "http":
        return HttpDoor(plane, limits=limits)
    from tenure.serve.grpc import GrpcDoor  # its libraries only where the door is opened

    return GrpcDoor(plane, limits=limits)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run to the end and return True, or call it off and return False when told to stop. Raises what `work` raises."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    done = task.done()
    for each in (task, stopping):
        each.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return done


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise PortTaken(
            f"port {port} on {host} cannot be had: {error.strerror}. Choose another, or 0 for any free one"
        ) from error
    return bound


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
