"""Calls as JSON lines over a Unix socket: one server and two clients for all that speak `wire` and `orders`.

Not here: what the operations mean (`wire` and `orders` declare them, `agent` and `broker` do them).

Every line is bounded (`wire.MAX_LINE_BYTES`), every wait has a time limit, and a peer that does not read its notes is cut
off rather than buffered for. Sockets lie in a short folder, because a Unix socket's path may have 107 bytes and a home may
be deeper than that; `homes.socket_dir` finds the folder through a file in the home. Both ends see by the kernel's word who
is at the other (SO_PEERCRED): a server who calls, a client that who answers is who may.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tenure import codec, wire
from tenure.errors import CorruptData, InternalError, Refused, SpecError, TenureError, Unavailable
from tenure.homes import check_owner as check_owner
from tenure.homes import socket_dir as socket_dir
from tenure.homes import user_name

Handler = Callable[[Any, "Connection"], Awaitable[Any]]
MAX_UNSENT_BYTES = 32 << 20
MAX_CONNECTIONS = 64
"""Of one user other than the server's own at the same time; another is hung up on with the reason."""
MAX_CALLS = 64
"""Under way on one connection at the same time; the next is read when one of them is through."""


def _decode(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise CorruptData(f"a line that is not JSON came over the socket: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise CorruptData(f"a message must be a JSON object; found {line[:80]!r}")
    return message


def _result_line(call_id: Any, result: Any) -> bytes:
    return codec.to_json({"id": call_id, "result": codec.to_builtins(result)}) + b"\n"


def _error_line(call_id: Any, error: TenureError) -> bytes:
    return codec.to_json({"id": call_id, "error": codec.error_to_wire(error)}) + b"\n"


def _call_line(call_id: int, op: str, args: Any) -> bytes:
    line = codec.to_json({"id": call_id, "op": op, "args": codec.to_builtins(args)}) + b"\n"
    if len(line) > wire.MAX_LINE_BYTES:
        raise SpecError(f"the call {op!r} has {len(line)} bytes; the limit is {wire.MAX_LINE_BYTES}. Send less at once.")
    return line


def _answer(message: Mapping[str, Any], op: wire.Op) -> Any:
    if "error" in message:
        raise codec.error_from_wire(message["error"])
    return codec.from_builtins(message.get("result"), op.result)


def _checked_welcome(welcome: wire.Welcome) -> wire.Welcome:
    if welcome.version != wire.VERSION:
        raise Unavailable(
            f"{welcome.who} speaks wire version {welcome.version}, this program speaks {wire.VERSION}: "
            'stop the older one with "tenure down" and try again'
        )
    return welcome


def peer_of(connected: socket.socket) -> tuple[int, int]:
    """Return pid and uid at the other end of a Unix socket, as the kernel says: of who connected, or of who listens."""
    pid, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid), int(uid)


class Connection:
    """One client of a server, as its handlers see it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.who = ""
        """What the client called itself in its hello."""
        self.pid, self.uid = peer_of(writer.get_extra_info("socket"))
        """The client's process and user, as the kernel says (SO_PEERCRED)."""
        self._writer = writer

    def send(self, line: bytes) -> None:
        """Queue a line; a client with more than MAX_UNSENT_BYTES unread is cut off."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._writer.transport.abort()
            return
        self._writer.write(line)


class LineServer:
    """Serves the operations of `ops` on a Unix socket. Handlers run concurrently; one may await without blocking others."""

    def __init__(
        self,
        path: Path,
        ops: Mapping[str, wire.Op],
        handlers: Mapping[str, Handler],
        *,
        who: str,
        fence: Callable[[], int] = lambda: 0,
        mode: int = 0o600,
        on_close: Callable[[Connection], None] | None = None,
    ) -> None:
        missing = set(ops) - set(handlers) - {"hello"}
        if missing:
            raise InternalError(f"{who} has no handler for {', '.join(sorted(missing))}")
        self.path = path
        self.connections: set[Connection] = set()
        self._ops, self._handlers, self._who, self._fence, self._mode = ops, handlers, who, fence, mode
        self._on_close = on_close
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. A socket file left behind is replaced; who may start is decided by the owner's lock, not by the socket."""
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path=self.path, limit=wire.MAX_LINE_BYTES)
        self.path.chmod(self._mode)

    async def close(self) -> None:
        """Stop listening and cut every client off."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection._writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def notify_all(self, note: str, data: Any) -> None:
        """Tell every client something unasked."""
        line = codec.to_json({"note": note, "data": codec.to_builtins(data)}) + b"\n"
        for connection in self.connections:
            connection.send(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        self.connections.add(connection)
        calls: set[asyncio.Task[None]] = set()
        try:
            if connection.uid != os.geteuid() and sum(c.uid == connection.uid for c in self.connections) > MAX_CONNECTIONS:
                connection.send(_error_line(None, Refused(f"{self._who} answers {MAX_CONNECTIONS} connections of one user")))
                return
            while True:
                if len(calls) >= MAX_CALLS:
                    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                try:
                    line = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                except asyncio.LimitOverrunError:
                    connection.send(_error_line(None, SpecError(f"a line may have {wire.MAX_LINE_BYTES} bytes at most")))
                    return
                task = asyncio.ensure_future(self._answer(line, connection))
                for group in (calls, self._tasks):
                    group.add(task)
                    task.add_done_callback(group.discard)
        except asyncio.CancelledError:
            return
        finally:
            for task in calls:
                task.cancel()
            self.connections.discard(connection)
            writer.close()
            if self._on_close is not None:
                self._on_close(connection)

    async def _answer(self, line: bytes, connection: Connection) -> None:
        call_id: Any = None
        try:
            message = _decode(line)
            call_id = message.get("id")
            name = str(message.get("op"))
            if name not in self._ops:
                raise SpecError(f"{self._who} has no operation {name!r}; it has: {', '.join(sorted(self._ops))}")
            args = codec.from_builtins(message.get("args", {}), self._ops[name].args)
            if name == "hello":
                connection.who = args.who
                result: Any = wire.Welcome(version=wire.VERSION, who=self._who, pid=os.getpid(), fence=self._fence())
            else:
                result = await self._handlers[name](args, connection)
            connection.send(_result_line(call_id, result if result is not None else wire.Nothing()))
        except TenureError as error:
            connection.send(_error_line(call_id, error))
        except OSError as error:  # the machine's trouble (a full disk, missing rights), not the handler's mistake
            connection.send(_error_line(call_id, Unavailable(f"{self._who} cannot do {name}: {error}")))
        except Exception as error:  # a handler's own mistake must reach the caller, not end the server
            asyncio.get_running_loop().call_exception_handler({"message": f"{self._who}: handler failed", "exception": error})
            connection.send(_error_line(call_id, InternalError(f"{self._who} failed: {type(error).__name__}: {error}")))


class LineClient:
    """A blocking client, safe to share between threads (calls then wait for one another). Notes are ignored."""

    def __init__(
        self,
        path: Path,
        ops: Mapping[str, wire.Op],
        *,
        who: str,
        timeout_s: float = 30.0,
        server_uids: Collection[int] | None = None,
    ) -> None:
        """server_uids: users who may answer; anybody else who does is told nothing (Unavailable). None: whoever does."""
        self._ops, self._timeout_s, self._path = ops, timeout_s, path
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise Unavailable(f"nothing answers on {path}: {error.strerror}") from error
        if server_uids is not None and (uid := peer_of(self._socket)[1]) not in server_uids:
            self._socket.close()
            raise Unavailable(
                f"on {path} answers {user_name(uid)}, who has no say there: tell whoever looks after this machine"
            )
        self._file = self._socket.makefile("rb")
        try:
            self.welcome = _checked_welcome(self.call("hello", wire.Hello(who=who)))
        except BaseException:
            self.close()
            raise

    def call(self, op: str, args: Any, *, timeout_s: float | None = None) -> Any:
        """Return the operation's result. Raises what the other side raised; Unavailable when it is gone or too slow."""
        with self._lock:
            call_id = next(self._ids)
            self._socket.settimeout(self._timeout_s if timeout_s is None else timeout_s)
            try:
                self._socket.sendall(_call_line(call_id, op, args))
                while True:
                    line = self._file.readline(wire.MAX_LINE_BYTES + 1)
                    if not line.endswith(b"\n"):
                        raise Unavailable(f"{self._path} closed the connection during {op!r}")
                    message = _decode(line)
                    if message.get("id") == call_id:
                        return _answer(message, self._ops[op])
            except OSError as error:
                # After a timeout the stream may hold half an answer: this connection is of no more use.
                self._socket.close()
                raise Unavailable(f"{self._path} did not answer {op!r}: {error or type(error).__name__}") from error

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.close()
        if hasattr(self, "_file"):
            self._file.close()


class AsyncLineClient:
    """A client for asyncio: many calls at once, notes handed to `on_note`, the end of the connection to `on_close`."""

    def __init__(
        self,
        path: Path,
        ops: Mapping[str, wire.Op],
        *,
        who: str,
        on_note: Callable[[str, Any], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._path, self._ops, self._who = path, ops, who
        self._on_note, self._on_close = on_note, on_close
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, *, timeout_s: float = 10.0) -> wire.Welcome:
        """Connect and say hello. Raises Unavailable."""
        try:
            reader, self._writer = await asyncio.wait_for(
                asyncio.open_unix_connection(path=self._path, limit=wire.MAX_LINE_BYTES), timeout_s
            )
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"nothing answers on {self._path}: {error}") from error
        self._task = asyncio.ensure_future(self._read(reader))
        hello = wire.Hello(who=self._who)
        return _checked_welcome(await self.call("hello", hello, timeout_s=timeout_s))

    async def call(self, op: str, args: Any, *, timeout_s: float = 30.0) -> Any:
        """Return the operation's result. Raises what the other side raised; Unavailable when it is gone or too slow.

        One that is too slow is hung up on: nobody could tell what it makes of the call, and of those after it, later.
        """
        if self._writer is None or self._writer.is_closing():
            raise Unavailable(f"{self._path} is not connected")
        call_id = next(self._ids)
        future: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        try:
            self._writer.write(_call_line(call_id, op, args))
            message = await asyncio.wait_for(future, timeout_s)
        except (TimeoutError, OSError) as error:
            self._writer.transport.abort()
            raise Unavailable(f"{self._path} did not answer {op!r} within {timeout_s:g} s") from error
        finally:
            self._waiting.pop(call_id, None)
        return _answer(message, self._ops[op])

    async def close(self) -> None:
        """Hang up; waiting calls end with Unavailable."""
        if self._writer is not None:
            self._writer.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = _decode(line)
                if "note" in message:
                    if self._on_note is not None:
                        self._on_note(str(message["note"]), message.get("data"))
                elif (future := self._waiting.get(message.get("id", 0))) is not None and not future.done():
                    future.set_result(message)
        except (OSError, ValueError, CorruptData):
            pass  # a broken stream ends like a closed one: below, and every waiting call says so
        finally:
            if self._writer is not None:
                self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unavailable(f"{self._path} closed the connection"))
            if self._on_close is not None:
                self._on_close()


def free_port() -> int:
    """Return a port of the loopback that nobody has now; until it is bound somebody may take it."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
