"""One instance: a process with one engine and one model, started by the server as `python -m tenure.serve.instance`.

It maps the arena read-only, waits for a batch, runs it, writes the answers into its own answer memory and says so. A model
that crashes or hangs takes this process with it and nothing else. It ends when its socket does, or with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec

from tenure.errors import MissingExtra, TenureError
from tenure.serve import batchwire as wire
from tenure.serve.runner import Runner
from tenure.serve.warmup import warm_up

_PR_SET_PDEATHSIG = 1
_IDLE_S = 10
"""After which memory that only a burst needed is given back."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process, as JSON. Descriptors are inherited."""

    path: str
    loader: str
    """``module:function``, called with the path and the four options below; returns an Engine."""
    threads: int
    device: str
    precision: str
    max_batch_rows: int
    parent: int
    """Process id of the server."""
    socket: int
    arena: int
    answers: tuple[int, ...]
    warmup_rows: int
    """As `warm_up` takes it."""


def main(argument: str) -> int:
    """Serve one model until the socket ends."""
    start = msgspec.json.decode(argument, type=Start)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != start.parent:
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the server says when to leave
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = socket.socket(fileno=start.socket)
    try:
        engine = _load(start)
        warmth = warm_up(engine, start.warmup_rows)
    except Exception as error:  # whatever a library raises while it loads: the server has to hear of it
        link.send(wire.encode(_reason(error)))
        return 3
    runner = Runner(
        engine, _map(start.arena, mmap.PROT_READ), [_map(fd, mmap.PROT_READ | mmap.PROT_WRITE) for fd in start.answers]
    )
    link.send(wire.encode(wire.Loaded(engine.platform, _described(engine.inputs), _described(engine.outputs), *warmth)))
    with contextlib.suppress(ConnectionError):
        _serve(link, runner)
    return 0


def _serve(link: socket.socket, runner: Runner) -> None:
    space = bytearray(wire.MAX_MESSAGE_BYTES)
    view = memoryview(space)
    encode, decode = wire.encode, wire.decode_order
    room = socket.CMSG_SPACE(4)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _IDLE_S, 0))
    while True:
        try:
            size, extra, _, _ = link.recvmsg_into([space], room)
        except BlockingIOError:
            runner.trim()
            continue
        if not size:
            return
        order = decode(view[:size])
        if type(order) is wire.Run:
            link.send(encode(runner.run(order)))
        elif type(order) is wire.MapRegion:
            fd = int.from_bytes(extra[0][2][:4], sys.byteorder)
            try:
                runner.map_region(order, fd)
            except (OSError, ValueError):
                pass  # it has shrunk since: who uses it is told that it is not mapped
            finally:
                os.close(fd)
        elif type(order) is wire.DropRegion:
            runner.drop_region(order.region)


def _load(start: Start) -> Any:
    module, _, function = start.loader.partition(":")
    return getattr(importlib.import_module(module), function)(
        Path(start.path),
        threads=start.threads,
        device=start.device,
        precision=start.precision,
        max_batch_rows=start.max_batch_rows,
    )


def _map(fd: int, protection: int) -> mmap.mmap:
    mapped = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, protection)
    os.close(fd)
    return mapped


def _described(tensors: Any) -> list[wire.Tensor]:
    return [wire.Tensor(t.name, t.datatype, t.shape) for t in tensors]


def _reason(error: Exception) -> wire.NotLoaded:
    text = str(error)[:8000]
    if isinstance(error, MissingExtra):
        return wire.NotLoaded("MissingExtra", text, [error.package, error.extra, text.split(" needs the package ")[0]])
    if isinstance(error, TenureError):
        return wire.NotLoaded(type(error).__name__, text)
    return wire.NotLoaded("", f"{type(error).__name__}: {text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
