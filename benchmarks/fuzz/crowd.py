"""Clients that misbehave for as long as the fuzzing lasts, and the witness that must not notice any of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import Counter

import numpy as np

from benchmarks.fuzz import grpc as fuzz_grpc
from benchmarks.fuzz.grpc import frame, heads, message
from benchmarks.fuzz.report import Report
from tenure.errors import TenureError
from tenure.serve.client import Model
from tenure.serve.faults import Overloaded

EACH = 8
"""Connections of each kind of misbehaviour."""
WITNESS_EVERY_S = 0.02
WITNESS_MAX_S = 10.0


class Crowd(threading.Thread):
    """Slow, silent, half-open and never-reading clients of both doors, on an event loop in a thread of its own."""

    def __init__(self, http: tuple[str, int], grpc: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self._http, self._grpc = http, grpc
        self._leave = threading.Event()
        self.rounds: Counter[str] = Counter()
        """Misbehaviour -> connections that the server, or we after a while, ended."""

    def run(self) -> None:
        """Misbehave until told to stop."""
        asyncio.run(self._run())

    def stop(self) -> None:
        """Hang up everywhere and return when that is done."""
        self._leave.set()
        self.join(30)

    async def _run(self) -> None:
        kinds = {
            "slow head": (
                self._http,
                self._drip(b"POST /v2/models/same/infer HTTP/1.1\r\nHost: slow\r\nX-A: " + b"a" * 5000, 1),
            ),
            "slow body": (self._http, self._drip(_HEAD % 50_000 + b"{" * 40_000, len(_HEAD))),
            "silent": (self._http, self._drip(b"", 0)),
            "silent grpc": (self._grpc, self._drip(b"", 0)),
            "half a preface": (self._grpc, self._drip(b"PRI * HT", 8)),
            "slow preface": (self._grpc, self._drip(_OPEN, 1)),
            "slow grpc body": (
                self._grpc,
                self._drip(_OPEN + frame(1, 4, 1, heads()) + frame(0, 0, 1, b"\0\0\0\xff\xff" * 500), 150),
            ),
            "never reads": (self._http, self._flood(_big_http())),
            "never reads grpc": (self._grpc, self._flood(_big_grpc())),
            "resets streams": (self._grpc, self._flood(_resets())),
        }
        tasks = [
            asyncio.create_task(self._again(name, address, what))
            for name, (address, what) in kinds.items()
            for _ in range(EACH)
        ]
        while not self._leave.is_set():
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, name: str, address: tuple[str, int], misbehave) -> None:  # type: ignore[no-untyped-def]
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as link:
                link.setblocking(False)
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                with contextlib.suppress(OSError, TimeoutError):
                    await loop.sock_connect(link, address)
                    async with asyncio.timeout(40):
                        await misbehave(link)
            self.rounds[name] += 1
            await asyncio.sleep(0.1)

    def _drip(self, data: bytes, at_once: int):  # type: ignore[no-untyped-def]
        async def misbehave(link: socket.socket) -> None:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(link, data[:at_once])
            for place in range(at_once, len(data)):
                await loop.sock_sendall(link, data[place : place + 1])
                await asyncio.sleep(0.3)
            while await loop.sock_recv(link, 4096):
                pass

        return misbehave

    def _flood(self, data: bytes):  # type: ignore[no-untyped-def]
        async def misbehave(link: socket.socket) -> None:
            loop = asyncio.get_running_loop()
            while True:
                await loop.sock_sendall(link, data)
                await asyncio.sleep(0.05)

        return misbehave


_HEAD = b"POST /v2/models/same/infer HTTP/1.1\r\nHost: slow\r\nContent-Length: %d\r\n\r\n"
_OPEN = fuzz_grpc._PREFACE + frame(4, 0, 0, struct.pack(">HI", 4, 0))  # a window of nothing: answers cannot be sent


def _big_http() -> bytes:
    raw = bytes(4 * 16 * 1024)
    text = b'{"inputs":[{"name":"x","shape":[1024,16],"datatype":"FP32","parameters":{"binary_data_size":%d}}]}' % len(raw)
    head = b"POST /v2/models/same/infer HTTP/1.1\r\nHost: deaf\r\n"
    head += b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n"
    return (head % (len(text), len(text) + len(raw)) + text + raw) * 4


def _big_grpc() -> bytes:
    call = message(fuzz_grpc._encode(fuzz_grpc.infer(bytes(64), 1)))
    return _OPEN + b"".join(frame(1, 4, n, heads()) + frame(0, 1, n, call) for n in range(1, 120, 2))


def _resets() -> bytes:
    return _OPEN + b"".join(frame(1, 4, n, heads()) + frame(3, 0, n, b"\0\0\0\x08") for n in range(1, 400, 2))


class Witness(threading.Thread):
    """Somebody else's client: asks another model of the same server over both doors, and checks each answer."""

    def __init__(self, endpoints: dict[str, str], x: np.ndarray, y: np.ndarray, report: Report) -> None:
        super().__init__(daemon=True)
        self._endpoints, self._x, self._y, self._report = endpoints, x, y, report
        self._leave = threading.Event()
        self.latencies_s: list[float] = []
        self.overloaded = 0

    def run(self) -> None:
        """Ask until told to stop."""
        with contextlib.ExitStack() as stack:
            models = [
                stack.enter_context(Model(f"{kind}://{address}", "double", timeout_s=WITNESS_MAX_S))
                for kind, address in self._endpoints.items()
            ]
            turn = 0
            while not self._leave.wait(WITNESS_EVERY_S):
                turn += 1
                row = turn % len(self._x)
                began_s = time.perf_counter()
                try:
                    answer = models[turn % len(models)].predict(self._x[row : row + 1])
                except Overloaded:
                    self.overloaded += 1
                    continue
                except TenureError as error:
                    self._report.fail(f"the witness got {error!r}")
                    continue
                self.latencies_s.append(time.perf_counter() - began_s)
                if not np.array_equal(answer, self._y[row : row + 1]):
                    self._report.fail(f"the witness was told {answer!r} instead of {self._y[row]!r}")

    def stop(self) -> None:
        """Return when the last answer is in."""
        self._leave.set()
        self.join(30)
