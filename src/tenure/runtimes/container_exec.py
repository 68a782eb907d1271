"""One more command inside a container, through the engine (Docker Engine API, "Exec"). Not for: starting containers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from tenure.errors import Conflict, Unavailable
from tenure.protocols import RuntimeHandle
from tenure.runtimes import procfs
from tenure.runtimes.container_engine import Engine, EngineError, frames
from tenure.runtimes.execin import CANNOT_RUN, MAX_OUTPUT_BYTES

_FIRST_LOOK_S = 0.01
_MAX_LOOK_S = 0.2
_DRAIN_S = 0.2
"""How long output may still come once the command has ended: what it left running may hold its streams open."""


def run_in_container(
    engine: Engine, name: str, argv: Sequence[str], handle: RuntimeHandle, *, timeout_s: float
) -> tuple[int, bytes]:
    """Run a command with the job's environment, user and folder; return exit code (negative: signal) and its first MiB.

    Raises Unavailable when it did not end within `timeout_s`, Conflict when the lease ended before it. It is ended then.
    """
    try:
        body = {"AttachStdout": True, "AttachStderr": True, "Cmd": list(argv)}
        command = _Command(engine, str(engine.call("POST", f"/containers/{name}/exec", body)["Id"]), timeout_s)
    except EngineError as error:
        raise Conflict(f"lease {handle.lease_id} takes no command: {error}") from error
    deadline_s = time.monotonic() + timeout_s
    pause_s = _FIRST_LOOK_S
    while (code := command.code()) is None:
        if not procfs.is_alive(handle.pid, handle.start_ticks):
            raise Conflict(f"lease {handle.lease_id} ended before the command inside it did")
        if time.monotonic() >= deadline_s:
            command.kill()
            raise Unavailable(f"{argv[0]!r} in lease {handle.lease_id} did not end within {timeout_s:g} s: stopped")
        command.wait(min(pause_s, max(0.0, deadline_s - time.monotonic())))
        pause_s = min(_MAX_LOOK_S, pause_s * 2)
    return (128 - code if 128 < code <= 192 else code), command.output()


class _Command:
    """A command under way, whose output a thread collects."""

    def __init__(self, engine: Engine, exec_id: str, timeout_s: float) -> None:
        self._engine, self._id, self._timeout_s = engine, exec_id, timeout_s
        self._output = bytearray()
        self._refused = ""
        self._thread = threading.Thread(target=self._collect, name=f"exec {exec_id[:8]}", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            body = {"Detach": False, "Tty": False}
            with self._engine.open("POST", f"/exec/{self._id}/start", body, timeout_s=self._timeout_s + 1) as answer:
                for piece in frames(answer):
                    self._output += piece[: MAX_OUTPUT_BYTES - len(self._output)]
        except EngineError as error:
            self._refused = str(error)
        except (Unavailable, OSError):
            pass  # what came before stands; whether the command has ended, the engine tells

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of the output, at most so long."""
        self._thread.join(timeout_s)

    def code(self) -> int | None:
        """Return the exit code, None while it runs. Raises Unavailable."""
        if self._refused:
            return CANNOT_RUN
        state = self._state()
        return int(state["ExitCode"]) if state and not state["Running"] and state["ExitCode"] is not None else None

    def output(self) -> bytes:
        """Return what it said, or why it could not be run."""
        self._thread.join(_DRAIN_S)
        return f"cannot run inside the lease: {self._refused}\n".encode() if self._refused else bytes(self._output)

    def kill(self) -> None:
        """End it and what it started, where we may."""
        pid = int((self._state() or {}).get("Pid") or 0)
        for target in (*procfs.descendants(pid), pid) if pid else ():
            with contextlib.suppress(OSError):
                os.kill(target, signal.SIGKILL)

    def _state(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._engine.call("GET", f"/exec/{self._id}/json")
        except EngineError:
            return None
        return found
