"""Sessions: what client and command say to each other gets through, whoever else knocks, and whoever goes first."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure import codec
from tenure.agent import sessions
from tenure.agent.sessions import Sessions
from tenure.errors import Conflict, CorruptData, Refused, Unavailable
from tenure.frames import MAX_FRAME_BYTES, FrameReader, Kind, SessionAt, code_in, exit_frame, frame, size_frame, size_in

LONG_S = 20.0
OPEN: list[socket.socket] = []
"""What a test has open; closed at its end."""


class Pipe:
    """A session whose command is this test: `command` is its end of a socket."""

    def __init__(self) -> None:
        self._ours, self.command = socket.socketpair()
        OPEN.extend((self._ours, self.command))
        self._ours.setblocking(False)
        self.exit_code: int | None = None
        self.sizes: list[tuple[int, int]] = []
        self.ended = threading.Event()

    def fileno(self) -> int:
        return self._ours.fileno()

    input_fileno = fileno

    def read(self) -> bytes | None:
        try:
            return self._ours.recv(65536)
        except BlockingIOError:
            return None

    def write(self, data: bytes) -> int:
        try:
            return self._ours.send(data)
        except BlockingIOError:
            return 0

    def close_input(self) -> None:
        self._ours.shutdown(socket.SHUT_WR)

    def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    def code(self) -> int | None:
        return self.exit_code

    def end(self) -> None:
        self._ours.close()
        self.ended.set()


class Client:
    def __init__(self, at: SessionAt, token: str = "") -> None:
        self.line = socket.socket(socket.AF_UNIX)
        OPEN.append(self.line)
        self.line.settimeout(LONG_S)
        self.line.connect(at.path)
        self.line.sendall(frame(Kind.HELLO, (token or at.token).encode()))
        self.reader = FrameReader()

    def heard(self) -> tuple[bytes, tuple[Kind, bytes]]:
        """Return all output, and the frame that ended it."""
        output = b""
        while data := self.line.recv(65536):
            for kind, said in self.reader.feed(data):
                if kind is not Kind.OUTPUT:
                    return output, (kind, said)
                output += said
        raise AssertionError(f"the session hung up; it said {output[-200:]!r}")


@pytest.fixture
def node(tmp_path: Path):
    made = Sessions(tmp_path, max_sessions=2)
    yield made
    made.close()
    while OPEN:
        OPEN.pop().close()


def opened(node: Sessions, pipe: Pipe, *, alive=lambda: True, timeout_s: float | None = None, uid: int | None = None):
    uid = os.geteuid() if uid is None else uid
    return node.open(lambda: pipe, lease_id="l-1", uid=uid, alive=alive, timeout_s=timeout_s)


def test_what_is_said_before_and_after_gets_through_and_the_code_ends_it(node: Sessions) -> None:
    pipe = Pipe()
    client = Client(opened(node, pipe))
    client.line.sendall(size_frame(20, 50) + frame(Kind.INPUT, b"in" * 100_000) + frame(Kind.INPUT_END))
    pipe.command.settimeout(LONG_S)
    came = b""
    while piece := pipe.command.recv(65536):
        came += piece
    assert came == b"in" * 100_000
    pipe.command.sendall(b"the last word")
    pipe.command.close()
    pipe.exit_code = -9
    output, (kind, code) = client.heard()
    assert (output, kind, code_in(code)) == (b"the last word", Kind.EXIT, -9)
    assert pipe.sizes == [(20, 50)]
    assert pipe.ended.wait(LONG_S)


def test_a_client_that_does_not_read_holds_the_command_back_and_loses_nothing(node: Sessions) -> None:
    pipe = Pipe()
    client = Client(opened(node, pipe))
    pipe.command.setblocking(False)
    sent, quiet_s = 0, time.monotonic()
    while time.monotonic() - quiet_s < 0.5:  # until nothing is taken any more
        _, writable, _ = select.select([], [pipe.command], [], 0.1)
        if writable:
            sent += pipe.command.send(b"x" * 65536)
            quiet_s = time.monotonic()
        assert sent < 64 << 20, "output is piled up without bound"
    pipe.command.close()
    pipe.exit_code = 0
    assert len(client.heard()[0]) == sent


def test_a_client_that_hangs_up_ends_the_command(node: Sessions) -> None:
    pipe = Pipe()
    client = Client(opened(node, pipe))
    pipe.command.sendall(b"hello")
    assert client.line.recv(100)
    client.line.close()
    assert pipe.ended.wait(LONG_S)


def test_only_who_has_the_token_is_let_in_and_only_once(node: Sessions) -> None:
    pipe = Pipe()
    at = opened(node, pipe)
    for said in ("0" * len(at.token), "short"):
        stranger = Client(at, said)
        stranger.line.shutdown(socket.SHUT_WR)
        assert stranger.line.recv(10) == b""
    client = Client(at)
    pipe.command.sendall(b"for you")
    assert b"for you" in client.line.recv(100)
    with pytest.raises(FileNotFoundError):
        Client(at)


@pytest.mark.real
def test_another_user_is_not_let_in_though_it_has_the_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # as the folder of a home that root shares
        node = Sessions(Path(folder))
        pipe = Pipe()
        at = opened(node, pipe, uid=12345)
        said = {uid: _says_hello(at, uid) for uid in (65534, 12345)}
        pipe.exit_code = 0
        node.close()
        while OPEN:
            OPEN.pop().close()
    assert said == {65534: "nothing", 12345: "let in"}


def _says_hello(at: SessionAt, uid: int) -> str:
    """Return whether a user that says the right token is heard: who is hung up on reads nothing."""
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setresuid(*[int(sys.argv[3])] * 3)\n"
        "line = socket.socket(socket.AF_UNIX); line.connect(sys.argv[1])\n"
        "line.settimeout(1.0)\n"
        "try:\n"
        "    line.sendall(bytes.fromhex(sys.argv[2]))\n"
        "    print('let in' if line.recv(1) else 'nothing')\n"
        "except TimeoutError: print('let in')\n"
        "except ConnectionError: print('nothing')\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", code, at.path, frame(Kind.HELLO, at.token.encode()).hex(), str(uid)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_a_session_nobody_comes_for_is_ended_and_leaves_no_socket(
    node: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "CLIENT_MAX_S", 0.1)
    pipe = Pipe()
    opened(node, pipe)
    assert pipe.ended.wait(LONG_S)
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_the_lease_of_the_time_and_of_the_agent_is_told(node: Sessions) -> None:
    held = {"alive": True}
    for act, kind in (
        (lambda: held.update(alive=False), Conflict),
        (lambda: None, Unavailable),
        (node.close, Unavailable),
    ):
        pipe = Pipe()
        timeout_s = 0.2 if kind is Unavailable and act is not node.close else None
        client = Client(opened(node, pipe, alive=lambda: held["alive"], timeout_s=timeout_s))
        pipe.command.sendall(b"x")
        client.line.recv(6, socket.MSG_WAITALL)  # it is under way
        act()
        with pytest.raises(kind):
            raise codec.error_from_wire(json.loads(client.heard()[1][1]))
        assert pipe.ended.wait(LONG_S)
        held["alive"] = True


def test_no_more_sessions_than_the_bound_are_open_and_a_failed_start_takes_no_place(node: Sessions, tmp_path: Path) -> None:
    def fails() -> Pipe:
        raise Conflict("it has ended")

    for _ in range(3):
        with pytest.raises(Conflict, match="it has ended"):
            node.open(fails, lease_id="l-1", uid=os.geteuid(), alive=lambda: True, timeout_s=None)
    assert list(tmp_path.iterdir()) == []
    first, second = Client(opened(node, Pipe())), Client(opened(node, Pipe()))
    with pytest.raises(Refused, match="2 commands"):
        opened(node, Pipe())
    first.line.close()
    second.line.close()


def test_one_user_takes_no_more_than_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_OF_ONE_USER", 1)
    node = Sessions(tmp_path)
    opened(node, Pipe(), uid=12345)
    with pytest.raises(Refused, match="of yours"):
        opened(node, Pipe(), uid=12345)
    opened(node, Pipe())
    node.close()
    while OPEN:
        OPEN.pop().close()


# --- frames ---


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=200)), max_size=8), st.integers(1, 50))
def test_frames_come_through_however_they_are_cut(said: list[tuple[Kind, bytes]], cut: int) -> None:
    stream = b"".join(frame(kind, data) for kind, data in said)
    reader = FrameReader()
    assert [each for at in range(0, len(stream), cut) for each in reader.feed(stream[at : at + cut])] == said


def test_long_data_goes_in_several_frames() -> None:
    data = os.urandom(2 * MAX_FRAME_BYTES + 1)
    came = FrameReader().feed(frame(Kind.OUTPUT, data))
    assert len(came) == 3
    assert b"".join(piece for _, piece in came) == data


def test_what_is_no_frame_is_refused() -> None:
    for stream in (b"\xff\0\0\0\1x", b"\1\xff\xff\xff\xff"):
        with pytest.raises(CorruptData):
            FrameReader().feed(stream)
    with pytest.raises(CorruptData):
        size_in(b"123")
    with pytest.raises(CorruptData):
        code_in(b"")
    assert size_in(FrameReader().feed(size_frame(0, 1 << 20))[0][1]) == (1, 65535)
    assert code_in(FrameReader().feed(exit_frame(-15))[0][1]) == -15
