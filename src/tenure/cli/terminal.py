"""This terminal as the one of a command inside a lease: what is typed goes in, what comes is shown, window and Ctrl-C included.

The terminal is raw meanwhile, and is put back however this ends. Not here: opening the session (`tenure.leasing`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from tenure import codec
from tenure.errors import SpecError, Unavailable
from tenure.frames import MAX_FRAME_BYTES, FrameReader, Kind, SessionAt, code_in, frame, size_frame
from tenure.protocols import Window

_ANSWER_S = 10.0
_MAX_UNSENT_BYTES = 4 * MAX_FRAME_BYTES


def talk(
    lease_id: str, argv: Sequence[str], *, in_terminal: bool, timeout_s: float = 0.0, home: str | Path | None = None
) -> int:
    """Run a command inside a lease, joined to this process's input and output; return its exit code (negative: signal).

    in_terminal: in a terminal of its own, of this window's size. timeout_s: it is ended then; 0: with the lease.
    Raises SpecError when this is no terminal, NotFound, Conflict, Unsupported, Refused, Unavailable.
    """
    from tenure import leasing

    if in_terminal and not (os.isatty(0) and os.isatty(1)):
        raise SpecError(
            "-t shows a terminal in this one, but input or output here is none; leave -t out (-i alone takes a pipe)"
        )
    window = None
    if in_terminal:
        rows, columns = _window_size()
        window = Window(rows=rows, columns=columns, term=os.environ.get("TERM", "xterm"))
    sys.stdout.flush()
    at = leasing.open_session(lease_id, argv, window=window, timeout_s=timeout_s, home=home)
    with _connected(at) as line, _resized(in_terminal) as resized, _raw(in_terminal):
        return _Talk(line, resized).until_the_end()


@contextlib.contextmanager
def _connected(at: SessionAt) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(_ANSWER_S)
        try:
            line.connect(at.path)
            line.sendall(frame(Kind.HELLO, at.token.encode()))
        except OSError as error:
            raise Unavailable(f"the session of the command inside does not answer: {error}") from error
        line.setblocking(False)
        yield line


class _Talk:
    """What is on its way between this process's input and output, and a session."""

    def __init__(self, line: socket.socket, resized: int) -> None:
        """resized: readable when the window has a new size."""
        self._line, self._resized = line, resized
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._input_open = True

    def until_the_end(self) -> int:
        """Carry both ways until the other side says how the command ended. Raises what it says, Unavailable when it is gone."""
        while True:
            reads: list[socket.socket | int] = [self._line, self._resized]
            if self._input_open and len(self._unsent) < _MAX_UNSENT_BYTES:
                reads.append(0)
            readable, _, _ = select.select(reads, [self._line] if self._unsent else [], [])
            if self._resized in readable:
                os.read(self._resized, 4096)
                self._unsent += size_frame(*_window_size())
            if 0 in readable:
                self._take_input()
            self._send()
            if self._line in readable and (code := self._hear()) is not None:
                return code

    def _take_input(self) -> None:
        try:
            data = os.read(0, MAX_FRAME_BYTES)
        except OSError:  # a terminal that was taken away
            data = b""
        self._input_open = bool(data)
        self._unsent += frame(Kind.INPUT, data) if data else frame(Kind.INPUT_END)

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # what it said last is still read
            while self._unsent:
                del self._unsent[: self._line.send(self._unsent)]

    def _hear(self) -> int | None:
        try:
            data = self._line.recv(MAX_FRAME_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            raise Unavailable("the node's agent hung up before the command inside had ended; it was ended with the connection")
        for kind, said in self._reader.feed(data):
            if kind is Kind.OUTPUT:
                _show(said)
            elif kind is Kind.EXIT:
                return code_in(said)
            elif kind is Kind.ERROR:
                raise codec.error_from_wire(json.loads(said))
        return None


def _show(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _window_size() -> tuple[int, int]:
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(descriptor)
            if size.lines and size.columns:
                return size.lines, size.columns
    return 24, 80


@contextlib.contextmanager
def _resized(wanted: bool) -> Iterator[int]:
    """Give a descriptor that becomes readable when the window changes its size."""
    ours, its = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(its, b"w")

    before = signal.signal(signal.SIGWINCH, note) if wanted else None
    try:
        yield ours
    finally:
        if wanted:
            signal.signal(signal.SIGWINCH, before)
        os.close(ours)
        os.close(its)


@contextlib.contextmanager
def _raw(wanted: bool) -> Iterator[None]:
    """Have the terminal hand on every key, and put it back however this ends, a signal included."""
    if not wanted:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    kept = termios.tcgetattr(0)
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead is kept
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(0, termios.TCSADRAIN, kept)
        for number, handler in before.items():
            signal.signal(number, handler)
