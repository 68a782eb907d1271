"""A door in this process over a fake plane, and a client that writes bytes as it likes."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import uvloop

from tenure.serve.http import HttpDoor
from tenure.serve.limits import DoorLimits

from .fakes import FakePlane

LIMIT_S = 20
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    def array(self, dtype, at=0):
        """Return the raw outputs from byte `at` on."""
        return np.frombuffer(self.body[int(self.headers["inference-header-content-length"]) + at :], dtype)


class Wire:
    """One connection of a client that does nothing by itself."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, data):
        self.writer.write(data)

    async def drip(self, data, size=1):
        """Send piece by piece, each in a segment of its own."""
        for at in range(0, len(data), size):
            self.writer.write(data[at : at + size])
            await self.writer.drain()
            for _ in range(3):  # the loop is the door's too: it reads meanwhile
                await asyncio.sleep(0)

    async def reply(self, method="POST"):
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), LIMIT_S)).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        status = int(first.split()[1])
        size = 0 if method == "HEAD" or status == 100 else int(headers["content-length"])
        return Reply(status, headers, await asyncio.wait_for(self.reader.readexactly(size), LIMIT_S))

    async def ask(self, data, method="POST"):
        self.send(data)
        return await self.reply(method)

    async def ended(self):
        """Return what still comes until the server closes."""
        try:
            return await asyncio.wait_for(self.reader.read(), LIMIT_S)
        except ConnectionError:
            return b""

    def close(self):
        self.writer.close()


class Bench:
    """The door, its plane, and connections to it."""

    def __init__(self, plane, door, address):
        self.plane, self.door, self.address = plane, door, address
        self.wires = []

    async def wire(self):
        reader, writer = await asyncio.open_connection(*self.address, limit=1 << 26)
        self.wires.append(Wire(reader, writer))
        return self.wires[-1]

    async def until(self, condition):
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def ask(self, data, method="POST"):
        wire = await self.wire()
        reply = await wire.ask(data, method)
        wire.close()
        return reply


def run(test: Callable[[Bench], Awaitable[None]], *, plane=None, limits=None, uv=True, family=socket.AF_INET):
    """Run a test against an open door; at its end nothing may be held any more."""

    async def go():
        used = plane or FakePlane("double", "picky", "upper", "sums")
        with socket.socket(family) as bound:
            bound.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
            bound.listen(256)
            door = HttpDoor(used, limits=limits or DoorLimits())
            await door.open(bound)
            bench = Bench(used, door, bound.getsockname()[:2])
            try:
                await test(bench)
            finally:
                for wire in bench.wires:
                    wire.close()
                used.paused = False
                await door.close(1)
            await bench.until(lambda: used.held_bytes == 0)
            assert door.unsent_bytes == 0

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uv else None) as runner:
        runner.run(go())


def head(size, *lines, path="/v2/models/double/infer", method="POST"):
    length = [] if size is None else [f"Content-Length: {size}"]
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *length, *lines, "", "")).encode()


def get(path, *lines, method="GET"):
    return head(None, *lines, path=path, method=method)


def raw_body(x=X, *, outputs=None, name="x", **fields):
    """Return a body with one raw tensor, and the length of its JSON."""
    tensor = {"name": name, "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    request = {"inputs": [tensor], "parameters": {"binary_data_output": True}, **fields}
    if outputs is not None:
        request["outputs"] = outputs
    content = json.dumps(request).encode()
    return content + x.tobytes(), len(content)


def raw_request(x=X, *lines, path="/v2/models/double/infer", **fields):
    body, length = raw_body(x, **fields)
    return head(len(body), f"Inference-Header-Content-Length: {length}", *lines, path=path) + body


def json_request(data=None, *lines, path="/v2/models/double/infer", **changes):
    tensor = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "data": X.tolist() if data is None else data, **changes}
    body = json.dumps({"inputs": [tensor]}).encode()
    return head(len(body), *lines, path=path) + body
