"""Lives the runs of `benchmarks.image_grammar` at a real service, and tells whether two lives had the same outcome.

A service is started by whoever judges (`Start`), as a bare process or from an image; here it is talked to over HTTP and gRPC as
any client would, and ended by signals. Not here: what is drawn (the grammar), how requests are built (`image_requests`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from benchmarks import image_requests as requests
from benchmarks.image_grammar import Asked, Crowd, Exchange, Infer, Refused, Run, Served

ANSWER_MAX_S = 60.0
START_MAX_S = 120.0
END_MAX_S = 30.0
TOLERANCES = {"FP32": 1e-5, "FP64": 1e-12}
"""Datatype to what a float may differ by, absolutely and relative to what is expected, where bits may not be compared."""
_PATH, _ADDRESS = re.compile(r"(?:/[\w.@+-]+)+"), re.compile(r"\b(?:127\.0\.0\.1|localhost|\[::1\]):\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What came back for one request."""

    status: str
    """Of HTTP, or gRPC's name of it, or what became of the connection."""
    text: str = ""
    """All that is no tensor, without folders and ports."""
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    """Name to datatype, shape and content."""
    near: bool = False
    """It was one of several requests at once: floats are compared with a tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one life came to."""

    said: tuple[tuple[Said, ...], ...]
    """Per exchange what came back, a crowd's in the order of its members."""
    exit: str
    """Exit code, or that it did not start, or did not end. A second SIGTERM may find an interpreter that has put its handlers
    away already: after two, -15 is as good as 0, and is written so."""
    output: str = ""
    """The end of what the service wrote; no part of the comparison."""


class Life:
    """A service that was started: a process that prints its addresses as a line of JSON."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: str = "/", *, watched: bool = False) -> None:
        """watched: the command is a tracer, whose child is the service."""
        self._watched = watched
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            list(argv), env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        self.addresses: dict[str, str] = {}

    def wait_listening(self) -> bool:
        """Return whether it listens, within the bound; its addresses are known then."""
        assert self.process.stdout is not None
        ends_s, line = time.monotonic() + START_MAX_S, b""
        while not line.endswith(b"\n") and time.monotonic() < ends_s:
            if select.select([self.process.stdout], [], [], 0.2)[0]:
                found = os.read(self.process.stdout.fileno(), 1 << 16)
                if not found:
                    return False
                line += found
        with contextlib.suppress(ValueError, KeyError, IndexError):
            found = json.loads(line.splitlines()[0])["listening"]
            self.addresses = dict(found.get("endpoints", found))
        return bool(self.addresses)

    def signal(self, number: int) -> None:
        """Send a signal to the service; what has ended already gets none."""
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess, IndexError):
            if self._watched:
                psutil.Process(self.process.pid).children()[0].send_signal(number)
            else:
                self.process.send_signal(number)

    def wait(self) -> str:
        """Return how it ended; what does not end within the bound is killed, and said to be so."""
        try:
            return str(self.process.wait(END_MAX_S))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"did not end within {END_MAX_S:g} s"

    def output(self) -> str:
        """Return the end of what it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-6000:]

    def close(self) -> None:
        """End it where it lives, and let go of its pipes."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


Start = Callable[[Run], Life]


def live(start: Start, run: Run, model: Served) -> Outcome:
    """Live one run from start to end. Only what the service does is in the outcome; nothing is raised for that."""
    life = start(run)
    try:
        if not life.wait_listening():
            return Outcome(said=(), exit=f"did not listen, {life.wait()}", output=life.output())
        with Player(life.addresses, model) as player:
            said = tuple(player.play(exchange) for exchange in run.exchanges)
            _end(life, run, player, model)
            ended = life.wait()
            if run.end == "SIGTERM twice" and ended == str(-signal.SIGTERM):
                ended = "0"
        return Outcome(said=said, exit=ended, output=life.output())
    finally:
        life.close()


def differences(expected: Outcome, found: Outcome) -> list[str]:
    """Return in words what two lives of one run differ in; nothing where they had the same outcome."""
    if expected.exit != found.exit:
        return [f"exit: {expected.exit} expected, {found.exit} found"]
    told = []
    for number, (left, right) in enumerate(zip(expected.said, found.said, strict=True)):
        told += [f"exchange {number}: {why}" for one, other in zip(left, right, strict=True) if (why := differs(one, other))]
    return told


def differs(expected: Said, found: Said, *, near: bool = False) -> str:
    """Return in words what two answers differ in first; empty: nothing. near: floats within TOLERANCES are the same."""
    for name in ("status", "text"):
        if getattr(expected, name) != getattr(found, name):
            return f"{name} {getattr(expected, name)[:300]!r} expected, {getattr(found, name)[:300]!r} found"
    if list(expected.tensors) != list(found.tensors):
        return f"tensors {list(expected.tensors)} expected, {list(found.tensors)} found"
    for name, (datatype, shape, content) in expected.tensors.items():
        other = found.tensors[name]
        if (datatype, shape) != other[:2]:
            return f"{name}: {datatype}{list(shape)} expected, {other[0]}{list(other[1])} found"
        if content != other[2] and not ((near or expected.near) and _near(datatype, content, other[2])):
            return f"{name}: other values"
    return ""


class Player:
    """A client of one service."""

    def __init__(self, addresses: Mapping[str, str], model: Served) -> None:
        self._addresses, self._model = addresses, model
        self._kept: http.client.HTTPConnection | None = None
        self._channel: Any = None

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._kept is not None:
            self._kept.close()
        if self._channel is not None:
            self._channel.close()

    def play(self, exchange: Exchange) -> tuple[Said, ...]:
        """Make one exchange and return what came back."""
        match exchange:
            case Infer():
                return (self.infer(exchange),)
            case Refused(door="grpc"):
                return (self._call(*requests.grpc_refused(self._model, exchange), fresh=False),)
            case Refused():
                return (self._ask(requests.http_refused(self._model, exchange), fresh=True),)
            case Asked(door="grpc"):
                return (self._call(*requests.grpc_asked(self._model, exchange.question), fresh=False),)
            case Asked():
                return (_plain(self._ask(requests.http_asked(self._model, exchange.question), fresh=False), exchange.question),)
            case Crowd():
                return self._crowd(exchange)
        raise AssertionError(f"no such exchange: {exchange}")

    def infer(self, asked: Infer, *, near: bool = False) -> Said:
        """Ask for an answer."""
        if asked.door == "grpc":
            return self._call("ModelInfer", requests.grpc_infer(self._model, asked), fresh=asked.fresh, near=near)
        return self._ask(requests.http_infer(self._model, asked), fresh=asked.fresh, near=near)

    def _crowd(self, crowd: Crowd) -> tuple[Said, ...]:
        said: list[Said] = [Said(status="no answer")] * len(crowd.members)

        def one(number: int, member: Infer) -> None:
            with Player(self._addresses, self._model) as own:
                said[number] = own.infer(member, near=True)

        threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in enumerate(crowd.members)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * ANSWER_MAX_S)
        return tuple(said)

    def _ask(self, request: requests.HttpRequest, *, fresh: bool, near: bool = False) -> Said:
        if fresh or self._kept is None:
            connection = http.client.HTTPConnection(self._addresses["http"], timeout=ANSWER_MAX_S)
            if not fresh:
                self._kept = connection
        else:
            connection = self._kept
        try:
            connection.request(request.method, request.path, request.body, dict(request.headers))
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return Said(status=type(error).__name__, near=near)
        finally:
            if fresh:
                connection.close()
        text, tensors = requests.read_http(answer.headers, body)
        return Said(status=str(answer.status), text=_clean(text), tensors=tensors, near=near)

    def _call(self, method: str, message: Any, *, fresh: bool, near: bool = False) -> Said:
        import grpc

        if fresh or self._channel is None:
            options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.insecure_channel(self._addresses["grpc"], options)
            if not fresh:
                self._channel = channel
        else:
            channel = self._channel
        service, read = requests.grpc_method(method)
        try:
            found = channel.unary_unary(f"/{service}/{method}")(message, timeout=ANSWER_MAX_S)
        except grpc.RpcError as error:
            return Said(status=str(error.code().name), text=_clean(str(error.details())), near=near)
        finally:
            if fresh:
                channel.close()
        text, tensors = requests.read_grpc(read, found)
        return Said(status="OK", text=_clean(text), tensors=tensors, near=near)


def _end(life: Life, run: Run, player: Player, model: Served) -> None:
    number = signal.SIGINT if run.end == "SIGINT" else signal.SIGTERM
    flying = None
    if run.end == "SIGTERM in flight":
        asked = Infer(door="http-json", rows=32, values="normal", values_seed=1, outputs=(), id="", compression="", fresh=True)
        flying = threading.Thread(target=player.infer, args=(asked,), daemon=True)
        flying.start()
        time.sleep(0.002)
    life.signal(number)
    if run.end == "SIGTERM twice":
        time.sleep(0.02)
        life.signal(number)
    if flying is not None:
        flying.join(2 * ANSWER_MAX_S)


def _clean(text: str) -> str:
    return _PATH.sub("PATH", _ADDRESS.sub("ADDRESS", text))


def _plain(said: Said, question: str) -> Said:
    """Of what counts and times, keep the names."""
    if said.status != "200" or question not in ("metrics", "statistics"):
        return said
    if question == "statistics":
        names = set(re.findall(r'"(\w+)":', said.text))
    else:
        names = {line.split()[2] for line in said.text.splitlines() if line.startswith("# TYPE")}
    return Said(status=said.status, text=" ".join(sorted(names)))


def _near(datatype: str, expected: bytes, found: bytes) -> bool:
    tolerance = TOLERANCES.get(datatype)
    if tolerance is None or len(expected) != len(found):
        return False
    dtype = "<f4" if datatype == "FP32" else "<f8"
    left, right = np.frombuffer(expected, dtype), np.frombuffer(found, dtype)
    return bool(np.allclose(right, left, rtol=tolerance, atol=tolerance, equal_nan=True))
