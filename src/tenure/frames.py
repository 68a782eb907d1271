"""A session: a command inside a lease that somebody talks to. What opens one, and the frames that go over its socket.

    client ─► agent   HELLO (the session's token, first), INPUT, INPUT_END, SIZE
    agent ─► client   OUTPUT, and as the last one EXIT or ERROR

A frame is a kind, a length and as many bytes. Encoding only: what runs in a session is `runtimes`', the sockets are in
`agent.sessions` and `cli.terminal`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from tenure.errors import CorruptData
from tenure.protocols import Window

MAX_FRAME_BYTES = 1 << 16
_HEAD = struct.Struct(">BI")
_SIZE = struct.Struct(">HH")
_CODE = struct.Struct(">i")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession:
    """Begin a command inside a lease for somebody to talk to, over a socket of its own; of broker and agent (`wire`).

    It is ended when the client hangs up. Raises Conflict when nothing runs there, Unsupported, Refused when too many are open.
    """

    lease_id: str
    argv: tuple[str, ...]
    window: Window | None = None
    """None: pipes instead of a terminal."""
    timeout_s: float = 0.0
    """It is ended after so long; 0: with the lease."""
    uid: int = -1
    """Who may talk to it; the broker says it to the agent, whatever a client says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAt:
    """Where a session waits for its client, for a few seconds: the first frame must be HELLO with the token."""

    path: str
    token: str


class Kind(IntEnum):
    """What a frame carries."""

    HELLO = 0
    INPUT = 1
    INPUT_END = 2
    """Nothing more will come: as Ctrl-D at the start of a line, or the end of a pipe."""
    SIZE = 3
    """Rows and columns of the window."""
    OUTPUT = 4
    EXIT = 5
    """Exit code; negative: the signal that ended the command."""
    ERROR = 6
    """Why the session ended before its command: an error as `codec.error_to_wire` writes it, in JSON."""


def frame(kind: Kind, data: bytes = b"") -> bytes:
    """Return the frames that carry `data`: one, or more of the same kind where it is longer than one may be."""
    pieces = [data[at : at + MAX_FRAME_BYTES] for at in range(0, len(data), MAX_FRAME_BYTES)] or [b""]
    return b"".join(_HEAD.pack(kind, len(piece)) + piece for piece in pieces)


def size_frame(rows: int, columns: int) -> bytes:
    """Return the frame of a window's size, each 1..65535."""
    return frame(Kind.SIZE, _SIZE.pack(min(max(rows, 1), 65535), min(max(columns, 1), 65535)))


def exit_frame(code: int) -> bytes:
    """Return the frame of a command's exit code."""
    return frame(Kind.EXIT, _CODE.pack(code))


def size_in(data: bytes) -> tuple[int, int]:
    """Return rows and columns. Raises CorruptData."""
    if len(data) != _SIZE.size:
        raise CorruptData(f"a window's size takes {_SIZE.size} bytes; found {len(data)}")
    rows, columns = _SIZE.unpack(data)
    return rows, columns


def code_in(data: bytes) -> int:
    """Return an exit code. Raises CorruptData."""
    if len(data) != _CODE.size:
        raise CorruptData(f"an exit code takes {_CODE.size} bytes; found {len(data)}")
    code: int = _CODE.unpack(data)[0]
    return code


class FrameReader:
    """Frames out of a stream of bytes, however it is cut. Holds less than one frame."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """Return the frames that are whole by now. Raises CorruptData for an unknown kind and for one that is too long."""
        self._held += data
        found: list[tuple[Kind, bytes]] = []
        at = 0
        while len(self._held) - at >= _HEAD.size:
            number, length = _HEAD.unpack_from(self._held, at)
            if length > MAX_FRAME_BYTES:
                raise CorruptData(f"a frame of {length} bytes came over a session; the limit is {MAX_FRAME_BYTES}")
            try:
                kind = Kind(number)
            except ValueError as error:
                raise CorruptData(f"a frame of unknown kind {number} came over a session") from error
            end = at + _HEAD.size + length
            if len(self._held) < end:
                break
            found.append((kind, bytes(self._held[at + _HEAD.size : end])))
            at = end
        del self._held[:at]
        return found
