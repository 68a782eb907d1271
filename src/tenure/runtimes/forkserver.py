"""The warm fork server: a small single-threaded process that forks shims, so that starting one costs no interpreter start.
One shim always waits, so that the order need not wait for a fork either.

Each request is one byte with one file descriptor (SCM_RIGHTS): the shim's channel, on which the runtime hands the plan and
gets the answer. The server reads nothing else, so that a job's environment never passes through a file. It ends when its
own socket closes; shims live on. `ForkServer` is the runtime's side. Not for: what a shim does (`shim`).
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

_READY = b"+"
_REFILL_S = 0.02
"""After an order, the server waits this long for further ones before it forks the next spare: the job goes first."""


class ForkServer:
    """Starts shims. The server process is started by the constructor, and again when it has died."""

    def __init__(self, log_path: str | os.PathLike[str] = os.devnull, *, answer_s: float = 20.0) -> None:
        """log_path: where the server's and the shims' own complaints go; never a caller's terminal or pipe."""
        self._log_path = log_path
        self._lock = threading.Lock()
        self._answer_s = answer_s
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        with self._lock:
            self._ensure()

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
            raise Unavailable(f"the fork server did not come up within {self._answer_s:g} s: {error}") from error
        self._socket = ours
        return ours

    def start(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Have a shim run the plan; return its report: pid, start_ticks, started_at_s, or error, errno, step.

        Raises Unavailable when no report came within the bound; a shim that comes up later finds nobody and its files tell.
        """
        text = self._ask(plan) or self._ask(plan)  # a channel closed in silence was never taken up: the server was dying
        try:
            report = json.loads(text)
        except ValueError as error:
            raise Unavailable(f"the shim ended without a report; look into {self._log_path}") from error
        if not isinstance(report, dict):
            raise Unavailable(f"a shim reported {report!r} instead of an object")
        return report

    def _ask(self, plan: dict[str, Any]) -> bytes:
        """Return the report, or nothing when neither server nor shim holds the channel any more."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send(theirs)
            ours.settimeout(self._answer_s)
            try:
                ours.sendall(json.dumps(plan).encode())
                ours.shutdown(socket.SHUT_WR)
                parts = []
                while part := ours.recv(65536):
                    parts.append(part)
            except TimeoutError as error:
                raise Unavailable(f"no shim reported within {self._answer_s:g} s; try again") from error
            except OSError:
                return b""
        return b"".join(parts)

    def _send(self, channel: socket.socket) -> None:
        fds = array.array("i", [channel.fileno()])
        with self._lock:
            for last in (False, True):
                try:
                    self._ensure().sendmsg([b"s"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                    return
                except OSError as error:
                    self._drop()
                    if last:
                        raise Unavailable(f"the fork server took no request: {error}") from error

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End the server process. Shims live on."""
        with self._lock:
            self._drop()


def main() -> None:
    """Serve fork requests on the socket whose number is the first argument, until it closes."""
    server = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects ended shims
    gc.collect()
    gc.freeze()
    spare: socket.socket | None = _fork_shim(server)
    server.send(_READY)
    while True:
        if spare is None and not select.select([server], [], [], _REFILL_S)[0]:
            spare = _fork_shim(server)
        message, fds, _, _ = socket.recv_fds(server, 16, 1)
        if not message:
            return
        for fd in fds:
            _hand_over(server, spare, fd)
            spare = None


def _hand_over(server: socket.socket, spare: socket.socket | None, channel_fd: int) -> None:
    """Give a channel to the shim that waits, or to a new one when none does or somebody killed it."""
    for shim_socket in (spare, None):
        with contextlib.suppress(OSError), shim_socket or _fork_shim(server) as orders:
            socket.send_fds(orders, [b"s"], [channel_fd])
            break
    os.close(channel_fd)


def _fork_shim(server: socket.socket) -> socket.socket:
    """Fork a shim that waits for its order; return where it is given. It is this server's child in name only."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return ours
    try:
        os.close(server.detach())
        ours.close()
        shim.serve(theirs)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
