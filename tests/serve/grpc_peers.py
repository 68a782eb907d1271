"""What the gRPC door's tests need: the door over a fake plane on a loop of its own, and a client made of raw frames."""

import asyncio
import contextlib
import socket
import threading

import hpack
import numpy as np

from tenure.serve import http2_send as wire
from tenure.serve import v2
from tenure.serve.grpc import GrpcDoor
from tenure.serve.http2_send import FRAME, PREFACE, frame

PATH = f"/{v2.SERVICE}/ModelInfer"
HEADERS = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", PATH),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


class OpenDoor:
    """A door that listens, run by a thread; `clock_s` is what it takes for time."""

    def __init__(self, plane, limits=None):
        self.plane = plane
        self.clock_s = 0.0
        self.loop = asyncio.new_event_loop()
        self.door = GrpcDoor(plane, limits=limits, now_s=lambda: self.clock_s)
        bound = self._bound = socket.create_server(("127.0.0.1", 0))
        self.port = bound.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self.door.open(bound))

    def run(self, job):
        """Run a coroutine, or call a function, on the door's loop; return its result."""
        if not asyncio.iscoroutine(job):

            async def call():
                return job()

            return self.run(call())
        return asyncio.run_coroutine_threadsafe(job, self.loop).result(30)

    def until(self, condition):
        """Wait until something holds on the door's loop."""

        async def wait():
            async with asyncio.timeout(20):
                while not condition():
                    await asyncio.sleep(0.002)

        self.run(wait())

    def pass_time(self, seconds):
        """Let the door's clock run on, and have it look after its connections."""

        def look():
            self.clock_s += seconds
            self.door.look_after(self.clock_s)

        self.run(look)

    def close(self):
        self.run(self.door.close(0.0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        self.loop.close()
        self._bound.close()


class RawPeer:
    """A client that sends the frames it is told to."""

    def __init__(self, port, *, settings=b"", greet=True, receive_bytes=None):
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self._kept = b""
        if greet:
            self.send(PREFACE + frame(wire.SETTINGS, 0, 0, settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, content):
        self.socket.sendall(content)

    def headers(self, id, *more, path=PATH, end=False):
        fields = [(name, path if name == ":path" else value) for name, value in HEADERS] + list(more)
        flags = wire.END_HEADERS | (wire.END_STREAM if end else 0)
        return frame(wire.HEADERS, flags, id, self.encoder.encode(fields))

    def request(self, id, message, *more):
        """Send a call whole: message is a protobuf message or bytes."""
        self.send(self.headers(id, *more) + frame(wire.DATA, wire.END_STREAM, id, framed(message)))

    def read(self):
        """Return the next frame as (type, flags, stream, payload); None at the connection's end."""
        while len(self._kept) < 9 or len(self._kept) < 9 + int.from_bytes(self._kept[:3], "big"):
            with contextlib.suppress(ConnectionError):
                if found := self.socket.recv(1 << 16):
                    self._kept += found
                    continue
            return None
        high, low, kind, flags, id = FRAME.unpack_from(self._kept)
        end = 9 + (high << 8 | low)
        payload, self._kept = self._kept[9:end], self._kept[end:]
        return kind, flags, id, payload

    def until(self, kind, id=None):
        """Return the payload of the next frame of a type, and skip what comes before it."""
        while (found := self.read()) is not None:
            if found[0] == kind and id in (None, found[2]):
                return found[3]
        raise AssertionError("the connection ended first")

    def status(self, id=1):
        """Return the trailers of a call as a dict."""
        while (found := self.read()) is not None:
            if found[0] == wire.HEADERS:
                fields = dict(self.decoder.decode(found[3]))
                if found[2] == id and found[1] & wire.END_STREAM:
                    return fields
        raise AssertionError("the connection ended first")

    def ended(self):
        """Read to the connection's end; return the code of its last GOAWAY, None without one."""
        code = None
        while (found := self.read()) is not None:
            if found[0] == wire.GOAWAY:
                code = int.from_bytes(found[3][4:8], "big")
        return code


def framed(message, flag=0):
    content = message if isinstance(message, bytes) else message.SerializeToString()
    return bytes((flag,)) + len(content).to_bytes(4, "big") + content


def infer(x, *, model="double", id=""):
    message = v2.ModelInferRequest(model_name=model, id=id)
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    message.raw_input_contents.append(x.tobytes())
    return message


def row(value=1.0, columns=4):
    return np.full((1, columns), value, np.float32)
