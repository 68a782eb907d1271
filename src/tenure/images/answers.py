"""What a program answers when it runs in a tree: the witness that a smaller image is still the same program.

It is started as the image starts it, asked, and ended by SIGTERM; its answers are bytes, compared as such. How a process gets
the tree for its root is handed in (`Enter`), as this room starts nothing of its own.
Not for: watching what it opens (`trace`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from tenure.errors import JobFailed, TenureError

Enter = Callable[[Path, str, Path | None], Sequence[str]]
"""From a tree, a workdir inside and a profile of system calls (None: none) to the command that goes before the program's."""
Ask = Callable[[int], bytes]
"""Ask the program that listens on a port of 127.0.0.1, and return its answers. Raises OSError, TenureError."""
_TICK_S = 0.02
_END_S = 15.0
_LEAST_WAIT_S, _SLOWER = 10.0, 5.0
"""How long a program in a smaller tree is waited for: so many times what it took in the whole one, at least so long."""
_MAX_SAID_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a program is driven so that its answers can be compared."""

    argv: tuple[str, ...]
    """As it is started here; another port than the image's, where it takes one."""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    port: int = 0
    """TCP port of 127.0.0.1 on which it listens; 0: it is run to its end."""
    asks: tuple[Ask, ...] = ()
    commands: tuple[str, ...] = ()
    """For this machine's shell, with TENURE_PORT; their output is their answer."""
    ready_s: float = 60.0
    """Until it listens."""
    total_s: float = 300.0
    """Until it has ended, if it ends by itself; and of each command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What it answered, in order, and how long its start took."""

    parts: tuple[bytes, ...]
    took_s: float = 0.0
    """From its start until it listened; of one that runs to its end, until then."""

    def differ(self, other: Answers) -> str:
        """Return how the other's answers differ from these, empty when they do not."""
        for number, (one, two) in enumerate(zip(self.parts, other.parts, strict=False)):
            if one != two:
                return f"answer {number + 1} of {len(self.parts)} is {_short(two)} instead of {_short(one)}"
        return "" if len(self.parts) == len(other.parts) else f"{len(other.parts)} answers instead of {len(self.parts)}"


def ask(asked: Asked, *, prefix: Sequence[str] = ()) -> Answers:
    """Run a program once and return its answers; every process of its session is gone then.

    prefix: goes before it, as `Enter` gives it. Raises JobFailed with what it said last.
    """
    with tempfile.TemporaryFile() as said:
        begun_s = time.monotonic()
        process = subprocess.Popen(
            [*prefix, *asked.argv],
            env=dict(asked.env),
            cwd="/" if prefix else asked.workdir,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if not asked.port:
                whole = _run_to_end(process, said, asked)
                return Answers(parts=(whole,), took_s=time.monotonic() - begun_s)
            _wait_listening(process, said, asked, begun_s)
            took_s = time.monotonic() - begun_s
            parts = tuple(_asked(question, asked.port, said) for question in asked.asks)
            parts += tuple(_commanded(command, asked) for command in asked.commands)
            if process.poll() is not None:
                raise JobFailed(f"it ended with {process.returncode} while it was asked; it said: {_tail(said)}")
            return Answers(parts=parts, took_s=took_s)
        finally:
            _end(process)


def checker(asked: Asked, wanted: Answers, enter: Enter, *, profile: Path | None, took_s: float) -> Callable[[Path], str]:
    """Return a check for `shrink`: whether the program in a tree answers what is wanted.

    profile: of system calls, which it runs behind. took_s: of the same program in the whole tree; one that takes several times
    as long is not waited for.
    """
    bound_s = max(_LEAST_WAIT_S, _SLOWER * took_s)
    asked = replace(asked, ready_s=bound_s, total_s=bound_s if not asked.port else asked.total_s)

    def check(tree: Path) -> str:
        try:
            return wanted.differ(ask(asked, prefix=enter(tree, asked.workdir, profile)))
        except TenureError as error:
            return str(error).splitlines()[0][:300]

    return check


# --- helpers ---


def _wait_listening(process: subprocess.Popen[bytes], said: IO[bytes], asked: Asked, begun_s: float) -> None:
    import socket

    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", asked.port), timeout=1.0):
            return
        if process.poll() is not None:
            raise JobFailed(f"it ended with {process.returncode} before it listened; it said: {_tail(said)}")
        if time.monotonic() - begun_s > asked.ready_s:
            raise JobFailed(f"it did not listen on port {asked.port} within {asked.ready_s:g} s; it said: {_tail(said)}")
        time.sleep(_TICK_S)


def _run_to_end(process: subprocess.Popen[bytes], said: IO[bytes], asked: Asked) -> bytes:
    try:
        code = process.wait(asked.total_s)
    except subprocess.TimeoutExpired as error:
        raise JobFailed(f"it did not end within {asked.total_s:g} s; it said: {_tail(said)}") from error
    said.seek(0)
    return f"exit {code}\n".encode() + said.read(_MAX_SAID_BYTES)


def _asked(question: Ask, port: int, said: IO[bytes]) -> bytes:
    try:
        return question(port)
    except (OSError, TenureError) as error:
        raise JobFailed(f"a question got no answer: {error}; it said: {_tail(said)}") from error


def _commanded(command: str, asked: Asked) -> bytes:
    env = {**os.environ, "TENURE_PORT": str(asked.port)}
    try:
        done = subprocess.run(
            ["sh", "-c", command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=asked.total_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise JobFailed(f"the exercise {command!r} did not end within {asked.total_s:g} s") from error
    return f"exit {done.returncode}\n".encode() + done.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(said: IO[bytes]) -> str:
    size = os.fstat(said.fileno()).st_size
    text = os.pread(said.fileno(), 2000, max(0, size - 2000)).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing"


def _short(data: bytes) -> str:
    return repr(data[:80]) + (f"… ({len(data)} bytes)" if len(data) > 80 else "")
