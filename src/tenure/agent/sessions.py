"""Commands inside leases that somebody talks to: each waits on a socket of its own, and a thread carries what is said.

A session's socket lies in the folder of the agent's, under a name that nobody can guess, is there for a few seconds and taken
by one client: the user whom the broker named, with the token it was given. Then the frames (`frames`) go between that client
and the command directly; the broker may come and go. A client that hangs up ends its command; the end of the lease, or of the
agent, ends both. What either side does not read is held back, never piled up.
Not here: what the command runs in (`runtimes`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tenure import codec
from tenure.errors import Conflict, CorruptData, Refused, TenureError, Unavailable
from tenure.frames import MAX_FRAME_BYTES, FrameReader, Kind, SessionAt, exit_frame, frame, size_in
from tenure.protocols import Session

MAX_SESSIONS = 32
MAX_OF_ONE_USER = 8
"""Of a user that is not the agent's own."""
CLIENT_MAX_S = 15.0
"""How long a session waits for its client."""
FAREWELL_MAX_S = 10.0
"""How long a client may take to read the end."""
_MAX_HELD_BYTES = 4 * MAX_FRAME_BYTES
_LOOK_EVERY_S = 0.1
_DRAIN_S = 0.2
"""How long output may still come once the command has ended: what it left running may hold its terminal."""


class Sessions:
    """The open sessions of one node."""

    def __init__(self, folder: Path, *, max_sessions: int = MAX_SESSIONS) -> None:
        """folder: for the sockets."""
        self._folder, self._max = folder, max_sessions
        self._open: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads: set[threading.Thread] = set()

    def open(
        self, begin: Callable[[], Session], *, lease_id: str, uid: int, alive: Callable[[], bool], timeout_s: float | None
    ) -> SessionAt:
        """Begin a command and return where its client finds it.

        alive: whether the lease's command still runs. timeout_s: the command is ended after so long; None: with the lease.
        Raises Refused when too many are open, and what `begin` raises.
        """
        self._enter(uid)
        listener: socket.socket | None = None
        try:
            listener, path = self._listen(uid)
            token = secrets.token_hex(16)
            talk = _Talk(begin(), lease_id=lease_id, alive=alive, over=self._over, timeout_s=timeout_s)
        except BaseException:
            if listener is not None:
                listener.close()
                Path(path).unlink(missing_ok=True)
            self._leave(uid)
            raise
        thread = threading.Thread(
            target=self._run, args=(talk, listener, path, token, uid), name=f"session {lease_id}", daemon=True
        )
        self._threads.add(thread)
        thread.start()
        return SessionAt(path=path, token=token)

    def close(self) -> None:
        """End every session; returns when they are through, within a few seconds."""
        self._over.set()
        for thread in list(self._threads):
            thread.join(5.0)

    def _enter(self, uid: int) -> None:
        with self._lock:
            if self._open.total() >= self._max:
                raise Refused(f"{self._max} commands are being talked to on this node, the most there may be; end one first")
            if uid not in (os.geteuid(), 0) and self._open[uid] >= MAX_OF_ONE_USER:
                raise Refused(f"{MAX_OF_ONE_USER} commands of yours are being talked to, the most there may be; end one first")
            self._open[uid] += 1

    def _leave(self, uid: int) -> None:
        with self._lock:
            self._open[uid] -= 1

    def _listen(self, uid: int) -> tuple[socket.socket, str]:
        path = str(self._folder / f"s-{secrets.token_urlsafe(9)}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            os.chmod(path, 0o600 if uid in (os.geteuid(), 0) else 0o666)  # others are told apart by the kernel's word
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise Unavailable(f"no socket for a session can be made in {self._folder}: {error}") from error
        return listener, path

    def _run(self, talk: _Talk, listener: socket.socket, path: str, token: str, uid: int) -> None:
        try:
            client = self._accept(listener, token, uid)
            os.unlink(path)
            listener.close()
            if client is not None:
                with client:
                    talk.carry(client)
        except OSError:
            pass  # the client, or the folder, is gone: nobody is left to tell
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
            listener.close()
            talk.end()
            self._leave(uid)
            self._threads.discard(threading.current_thread())

    def _accept(self, listener: socket.socket, token: str, uid: int) -> socket.socket | None:
        """Return the client's connection; None when none that may came in time."""
        end_s = time.monotonic() + CLIENT_MAX_S
        while not self._over.is_set() and (left_s := end_s - time.monotonic()) > 0:
            if not select.select([listener], [], [], min(left_s, _LOOK_EVERY_S))[0]:
                continue
            client, _ = listener.accept()
            client.settimeout(min(left_s, 5.0))
            with contextlib.suppress(OSError):
                if _peer(client) in {uid, os.geteuid(), 0} and _hello(client, token.encode()):
                    client.setblocking(False)
                    return client
            client.close()
        return None


def _peer(client: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _hello(client: socket.socket, token: bytes) -> bool:
    """Whether a client says the token first. What it says after that is left unread. Raises OSError."""
    wanted = frame(Kind.HELLO, token)
    said = b""
    while len(said) < len(wanted) and (data := client.recv(len(wanted) - len(said))):
        said += data
    return secrets.compare_digest(said, wanted)


class _Talk:
    """One command and its client."""

    def __init__(
        self,
        session: Session,
        *,
        lease_id: str,
        alive: Callable[[], bool],
        over: threading.Event,
        timeout_s: float | None,
    ) -> None:
        self._session, self._lease_id, self._alive, self._over = session, lease_id, alive, over
        self._timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s if timeout_s else float("inf")
        self._reader = FrameReader()
        self._input, self._output = bytearray(), bytearray()
        self._input_ends = self._silent = False

    def carry(self, client: socket.socket) -> None:
        """Carry both ways until the command has ended, and say how; or until the client hangs up."""
        self._client = client
        try:
            last = self._until_the_end()
        except _HungUp:
            return
        except TenureError as error:
            last = frame(Kind.ERROR, json.dumps(codec.error_to_wire(error)).encode())
        self._output += last
        end_s = time.monotonic() + FAREWELL_MAX_S
        with contextlib.suppress(_HungUp):
            while self._output and (left_s := end_s - time.monotonic()) > 0:
                select.select([], [client], [], left_s)
                self._send()

    def end(self) -> None:
        """End the command, if it still runs."""
        self._session.end()

    def _until_the_end(self) -> bytes:
        """Return the frame that says how the command ended. Raises _HungUp, Conflict, Unavailable."""
        ended_at_s: float | None = None
        code: int | None = None
        while True:
            self._wait(short=ended_at_s is not None)
            self._take_output()
            self._take_input()
            if code is None and (code := self._session.code()) is not None:
                ended_at_s = time.monotonic()
            if ended_at_s is not None and code is not None:
                if self._silent or time.monotonic() - ended_at_s > _DRAIN_S:
                    return exit_frame(code)
            elif not self._alive():
                raise Conflict(f"lease {self._lease_id} ended before the command inside it did")
            elif self._over.is_set():
                raise Unavailable(f"the agent of lease {self._lease_id} leaves: the command inside was ended")
            elif time.monotonic() >= self._end_s:
                raise Unavailable(
                    f"the command in lease {self._lease_id} did not end within {self._timeout_s or 0:g} s: stopped"
                )

    def _wait(self, *, short: bool) -> None:
        reads: list[socket.socket | Session] = [self._client] if len(self._input) < _MAX_HELD_BYTES else []
        if not self._silent and len(self._output) < _MAX_HELD_BYTES:
            reads.append(self._session)
        writes: list[socket.socket | int] = [self._client] if self._output else []
        if self._input:
            writes.append(self._session.input_fileno())
        select.select(reads, writes, [], _LOOK_EVERY_S / 10 if short or self._silent else _LOOK_EVERY_S)

    def _take_output(self) -> None:
        while not self._silent and len(self._output) < _MAX_HELD_BYTES:
            data = self._session.read()
            if data is None:
                break
            self._silent = not data
            self._output += frame(Kind.OUTPUT, data) if data else b""
        self._send()

    def _send(self) -> None:
        try:
            while self._output:
                del self._output[: self._client.send(self._output)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise _HungUp from error

    def _take_input(self) -> None:
        if len(self._input) < _MAX_HELD_BYTES:
            try:
                data = self._client.recv(MAX_FRAME_BYTES)
            except BlockingIOError:
                data = None
            except OSError as error:
                raise _HungUp from error
            if data == b"":
                raise _HungUp
            for kind, said in self._reader.feed(data or b""):
                self._heard(kind, said)
        while self._input and (taken := self._session.write(bytes(self._input[:MAX_FRAME_BYTES]))):
            del self._input[:taken]
        if self._input_ends and not self._input:
            self._input_ends = False
            self._session.close_input()

    def _heard(self, kind: Kind, said: bytes) -> None:
        if kind is Kind.INPUT:
            self._input += said
        elif kind is Kind.INPUT_END:
            self._input_ends = True
        elif kind is Kind.SIZE:
            self._session.resize(*size_in(said))
        else:
            raise CorruptData(f"a client does not say {kind.name} in a session")


class _HungUp(Exception):
    """The client is gone."""
