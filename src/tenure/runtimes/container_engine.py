"""A container engine's HTTP API over its Unix socket, in the standard library: Docker's, which Podman's socket answers too.

A shim that must be small asks it as well as the agent, so there is no client library: requests go out as HTTP/1.0, which the
engine answers with neither chunks nor a kept connection, so that an answer is a head and what follows up to its end.
Source: Docker Engine API 1.40. Not for: what is asked (`container`, `container_job`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import urlencode

from tenure.errors import TenureError, Unavailable

VERSION = "v1.40"
"""Of Docker 19.03; Podman 4 answers it."""
ANSWER_S = 60.0
"""Bound of one call; the engine serializes some of its work."""
_MAX_HEAD_BYTES = 65536
_MAX_FRAME_BYTES = 16 << 20


class EngineError(TenureError):
    """The engine refused a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def find_socket() -> str:
    """Return the path of the engine's socket: DOCKER_HOST or CONTAINER_HOST, else where engines put theirs; empty: none."""
    for name in ("DOCKER_HOST", "CONTAINER_HOST"):
        if (address := os.environ.get(name, "")).startswith("unix://"):
            return address.removeprefix("unix://")
    own = os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")
    for path in ("/var/run/docker.sock", f"{own}/docker.sock", f"{own}/podman/podman.sock", "/run/podman/podman.sock"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and os.access(path, os.R_OK | os.W_OK):
                return path
    return ""


class Engine:
    """One engine. Every call opens a connection of its own, so that an engine that is started anew is no special case."""

    def __init__(self, path: str) -> None:
        """path: of its socket."""
        self.path = path

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout_s: float | None = ANSWER_S,
        archive: BinaryIO | None = None,
        **query: Any,
    ) -> Any:
        """Return the answer, from JSON; None when it is empty or none.

        body: sent as JSON. archive: an open file to send instead, from its beginning. query: true and false as 1 and 0.
        Raises EngineError when the engine refuses, Unavailable when it does not answer.
        """
        with self.open(method, path, body, timeout_s=timeout_s, archive=archive, **query) as answer:
            try:
                data = answer.read()
            except OSError as error:
                raise self._away(error) from error
        try:
            return json.loads(data) if data else None
        except ValueError:
            return None

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout_s: float | None = ANSWER_S,
        archive: BinaryIO | None = None,
        **query: Any,
    ) -> Iterator[BinaryIO]:
        """Give the answer's body as it comes. Raises EngineError, Unavailable; reading it may raise OSError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(timeout_s)
            try:
                line.connect(self.path)
                _send(line, method, path, body, archive, query)
                answer = line.makefile("rb")
                status = _status(answer)
            except (OSError, ValueError) as error:
                raise self._away(error) from error
            with answer:
                if status >= 400:
                    raise EngineError(status, _message(answer.read(_MAX_HEAD_BYTES)))
                yield answer

    def _away(self, error: Exception) -> Unavailable:
        return Unavailable(f"the container engine at {self.path} does not answer: {error}; see that it runs")


def _send(line: socket.socket, method: str, path: str, body: Any, archive: BinaryIO | None, query: dict[str, Any]) -> None:
    text = b"" if body is None else json.dumps(body).encode()
    words = {name: int(value) if isinstance(value, bool) else value for name, value in query.items()}
    target = f"/{VERSION}{path}" + (f"?{urlencode(words)}" if words else "")
    kind = "application/x-tar" if archive is not None else "application/json"
    size = os.fstat(archive.fileno()).st_size if archive is not None else len(text)
    head = (f"{method} {target} HTTP/1.0", "Host: engine", f"Content-Type: {kind}", f"Content-Length: {size}")
    line.sendall("\r\n".join([*head, "", ""]).encode() + text)
    if archive is not None:
        archive.seek(0)
        line.sendfile(archive)


def _status(answer: BinaryIO) -> int:
    """Return the status of an answer, whose body comes next. Raises ValueError."""
    first = answer.readline(_MAX_HEAD_BYTES).split()
    if len(first) < 2 or not first[0].startswith(b"HTTP/"):
        raise ValueError("it closed the connection" if not first else f"it answered {first[0][:80]!r}")
    while answer.readline(_MAX_HEAD_BYTES).strip():
        pass
    return int(first[1])


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode("utf-8", "replace").strip()


def frames(answer: BinaryIO) -> Iterator[bytes]:
    """Yield the payloads of a multiplexed stream (Docker Engine API, "Stream format"), both output streams as one."""
    while len(head := answer.read(8)) == 8:
        size = int.from_bytes(head[4:], "big")
        if size > _MAX_FRAME_BYTES:
            raise OSError(f"the engine announced a piece of {size} bytes")
        yield answer.read(size)
