"""A command inside a container that somebody talks to, through the engine ("Exec", and its hijacked connection).

Source: Docker Engine API 1.40, ContainerExec, ExecStart ("Hijacking"), ExecResize.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

from tenure.errors import Conflict, TenureError, Unavailable
from tenure.protocols import RuntimeHandle, Window
from tenure.runtimes import procfs
from tenure.runtimes.container_engine import VERSION, Engine, EngineError
from tenure.runtimes.execin import CANNOT_RUN

_READ_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 16
_ANSWER_S = 30.0
_ASK_EVERY_S = 0.2
"""How often the engine is asked for the exit code while the command may still run."""
_FRAME_HEAD_BYTES = 8


class ContainerSession:
    """See `protocols.Session`."""

    def __init__(self, engine: Engine, name: str, argv: Sequence[str], handle: RuntimeHandle, *, window: Window | None) -> None:
        """Start it. Raises Conflict when the container takes no command, Unavailable."""
        self._engine, self._window = engine, window
        body: dict[str, Any] = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True, "Cmd": list(argv)}
        body |= {"Tty": window is not None}
        body |= {"Env": [f"TERM={window.term}"]} if window is not None and window.term else {}
        self._held = bytearray()
        self._refused = ""
        self._ended = False
        self._next_ask_s = 0.0
        try:
            self._id = str(engine.call("POST", f"/containers/{name}/exec", body)["Id"])
        except EngineError as error:
            raise Conflict(f"lease {handle.lease_id} takes no command: {error}") from error
        self._line = self._hijack()
        if window is not None:
            self.resize(window.rows, window.columns)

    def _hijack(self) -> socket.socket:
        """Return the connection that carries the command's streams from here on."""
        text = json.dumps({"Detach": False, "Tty": self._window is not None}).encode()
        head = (
            f"POST /{VERSION}/exec/{self._id}/start HTTP/1.1",
            "Host: engine",
            "Connection: Upgrade",
            "Upgrade: tcp",
            "Content-Type: application/json",
            f"Content-Length: {len(text)}",
        )
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        line.settimeout(_ANSWER_S)
        try:
            line.connect(self._engine.path)
            line.sendall("\r\n".join([*head, "", ""]).encode() + text)
            answer = _head(line, self._held)
        except OSError as error:
            line.close()
            raise Unavailable(f"the container engine at {self._engine.path} does not answer: {error}") from error
        if not answer.startswith((b"HTTP/1.1 101", b"HTTP/1.1 200")):
            self._refused = _reason(answer, bytes(self._held))
            self._held.clear()
        line.setblocking(False)
        return line

    def fileno(self) -> int:
        """See Session."""
        return self._line.fileno()

    def input_fileno(self) -> int:
        """See Session."""
        return self._line.fileno()

    def read(self) -> bytes | None:
        """See Session."""
        if self._refused:
            said, self._refused = f"cannot run inside the lease: {self._refused}\n".encode(), ""
            self._ended = True
            return said
        if self._ended:
            return b""
        ready = self._piece()
        if ready:
            return ready
        try:
            data = self._line.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self._held += data
        self._ended = not data
        return self._piece() or (b"" if self._ended else None)

    def _piece(self) -> bytes:
        """Return output that is whole by now: in a terminal all of it, else the payloads of the engine's frames."""
        if self._window is not None:
            piece = bytes(self._held)
            self._held.clear()
            return piece
        found = bytearray()
        while len(self._held) >= _FRAME_HEAD_BYTES:
            end = _FRAME_HEAD_BYTES + int.from_bytes(self._held[4:_FRAME_HEAD_BYTES], "big")
            if len(self._held) < end:
                break
            found += self._held[_FRAME_HEAD_BYTES:end]
            del self._held[:end]
        return bytes(found)

    def write(self, data: bytes) -> int:
        """See Session."""
        try:
            return self._line.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def close_input(self) -> None:
        """See Session."""
        if self._window is not None:
            self.write(b"\x04")
            return
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)

    def resize(self, rows: int, columns: int) -> None:
        """See Session."""
        if self._window is not None:
            with contextlib.suppress(TenureError):  # one that has just ended has no window
                self._engine.call("POST", f"/exec/{self._id}/resize", h=rows, w=columns, timeout_s=_ANSWER_S)

    def code(self) -> int | None:
        """See Session."""
        now_s = time.monotonic()
        if now_s < self._next_ask_s and not self._ended:
            return None
        self._next_ask_s = now_s + _ASK_EVERY_S
        state = self._state()
        if not state or state.get("Running") or state.get("ExitCode") is None:
            return CANNOT_RUN if self._ended and state and not state.get("Running") else None
        code = int(state["ExitCode"])
        return 128 - code if 128 < code <= 192 else code

    def end(self) -> None:
        """See Session. The engine has no way to hang up: what runs is killed."""
        state = self._state() or {}
        pid = int(state.get("Pid") or 0) if state.get("Running") else 0
        for target in (*procfs.descendants(pid), pid) if pid else ():
            with contextlib.suppress(OSError):
                os.kill(target, signal.SIGKILL)
        self._line.close()

    def _state(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._engine.call("GET", f"/exec/{self._id}/json", timeout_s=_ANSWER_S)
        except TenureError:
            return None
        return found


def _head(line: socket.socket, rest: bytearray) -> bytes:
    """Return an answer's head; what came behind it is in `rest`. Raises OSError."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = line.recv(_READ_BYTES)
        if not piece or len(data) > _MAX_HEAD_BYTES:
            raise OSError("it closed the connection" if not piece else "its answer has no end")
        data += piece
    head, _, behind = data.partition(b"\r\n\r\n")
    rest += behind
    return head


def _reason(head: bytes, body: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["message"])
    return head.split(b"\r\n", 1)[0].decode("utf-8", "replace")
