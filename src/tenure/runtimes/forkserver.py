"""The warm fork server: a small single-threaded process that forks shims, so that starting one costs no interpreter start.
One shim always waits at a channel that the runtime already holds, so that the order waits for no fork and no server.

Each request is one byte with one file descriptor (SCM_RIGHTS): the shim's channel, on which the runtime hands the plan and
gets the answer. The server reads nothing else, so that a job's environment never passes through a file. It ends when its
own socket closes; shims live on, and one without an order leaves when its channel closes. `ForkServer` is the runtime's
side. Not for: what a shim does (`shim`).
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from typing import Any

from tenure.errors import Unavailable
from tenure.runtimes import shim
from tenure.runtimes.container_shim import ContainerShim
from tenure.runtimes.microvm_shim import MicrovmShim
from tenure.runtimes.state import read_json

_KINDS = {"container": ContainerShim, "microvm": MicrovmShim}
"""Key of a plan -> the shim it wants."""
_READY = b"+"
_REFILL_S = 0.02
"""The server is idle this long before it forks a shim that has no order yet: the job of the last order goes first."""


class ForkServer:
    """Starts shims. The server process is started by the constructor, and again when it has died."""

    def __init__(self, log_path: str | os.PathLike[str] = os.devnull, *, answer_s: float = 20.0) -> None:
        """log_path: where the server's and the shims' own complaints go; never a caller's terminal or pipe."""
        self._log_path = log_path
        self._lock = threading.Lock()
        self._answer_s = answer_s
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._waiting: socket.socket | None = None
        with self._lock:
            self._ensure()
        self._have_one_wait()

    @property
    def pid(self) -> int:
        """Of the server process; 0 when there is none."""
        return self._process.pid if self._process else 0

    def _ensure(self) -> socket.socket:
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        self._drop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from tenure.runtimes.forkserver import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ours.settimeout(self._answer_s)
        try:
            if ours.recv(1) != _READY:
                raise OSError("it closed its socket")
        except OSError as error:
            ours.close()
            self._drop()  # one that comes up after all would serve nobody
            raise Unavailable(f"the fork server did not come up within {self._answer_s:g} s: {error}") from error
        self._socket = ours
        return ours

    def start(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Have a shim run the plan; return its report: pid, start_ticks, started_at_s, or error, errno, step.

        Raises Unavailable when no report came within the bound; a shim that comes up later finds nobody and its files tell.
        """
        order = json.dumps(plan).encode()
        with self._lock:
            waiting, self._waiting = self._waiting, None
        text = self._ask(waiting, order) if waiting is not None else b""
        note: dict[str, Any] | None = None
        for _ in range(2):
            # A channel closed in silence was never taken up: that shim or the server was dying. One that left its note was,
            # and what it began must not be begun twice.
            if text or (note := read_json(f"{plan['folder']}/shim.json")) is not None:
                break
            text = self._ask(self._channel(), order)
        self._have_one_wait()
        if note is not None:
            return note  # it says all that the report would have said; whether that shim still lives is for the caller to see
        try:
            report = json.loads(text)
        except ValueError as error:
            raise Unavailable(f"the shim ended without a report; look into {self._log_path}") from error
        if not isinstance(report, dict):
            raise Unavailable(f"a shim reported {report!r} instead of an object")
        return report

    def _have_one_wait(self) -> None:
        """Request the next order's shim. A server that can't take it is the next order's concern, and a closed one stays so."""
        with self._lock, contextlib.suppress(OSError):
            if self._waiting is None and self._socket is not None:
                self._waiting = _request(self._socket)

    def _channel(self) -> socket.socket:
        """Return a channel for which the server will fork a shim, at the latest when something is written to it."""
        with self._lock:
            try:
                return _request(self._ensure())
            except OSError:
                self._drop()
            try:
                return _request(self._ensure())
            except OSError as error:
                self._drop()
                raise Unavailable(f"the fork server took no request: {error}") from error

    def _ask(self, channel: socket.socket, order: bytes) -> bytes:
        """Return the report, or nothing when neither server nor shim holds the channel any more. Closes the channel."""
        with channel:
            channel.settimeout(self._answer_s)
            try:
                channel.sendall(order)
                channel.shutdown(socket.SHUT_WR)
                parts = []
                while part := channel.recv(65536):
                    parts.append(part)
            except TimeoutError as error:
                raise Unavailable(f"no shim reported within {self._answer_s:g} s; try again") from error
            except OSError:
                return b""
        return b"".join(parts)

    def _drop(self) -> None:
        for held in (self._socket, self._waiting):
            if held is not None:
                held.close()
        self._socket = self._waiting = None
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End the server process. Shims live on."""
        with self._lock:
            self._drop()


def _request(server: socket.socket) -> socket.socket:
    """Send the server a new channel's other end; return ours. Raises OSError when it is gone."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            server.sendmsg([b"s"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
        except BaseException:
            ours.close()
            raise
    return ours


def main() -> None:
    """Serve fork requests on the socket whose number is the first argument, until it closes."""
    server = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects ended shims
    gc.collect()
    gc.freeze()
    server.send(_READY)
    pending: list[int] = []
    while True:
        ready, _, _ = select.select([server.fileno(), *pending], [], [], _REFILL_S if pending else None)
        for channel in [fd for fd in pending if fd in ready or not ready]:
            pending.remove(channel)
            _fork_shim(server, channel, pending)
        if server.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(server, 16, 1)
            if not message:
                return
            pending.extend(fds)


def _fork_shim(server: socket.socket, channel: int, others: list[int]) -> None:
    """Fork a shim that waits at a channel for its order. It is this server's child in name only."""
    if os.fork():
        os.close(channel)
        return
    try:
        for fd in (server.detach(), *others):
            os.close(fd)
        shim.serve(socket.socket(fileno=channel), _KINDS)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
