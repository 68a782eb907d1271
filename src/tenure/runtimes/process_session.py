"""A command inside a lease of plain processes that somebody talks to: in a pseudo-terminal (pty(7)), or through pipes.

It is started as any command inside (`execin`), dies with the agent, and what it left in the background ends with the lease.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from typing import Any

from tenure.errors import Unavailable
from tenure.protocols import RuntimeHandle, Window
from tenure.runtimes.execin import start_inside

READ_BYTES = 1 << 16
HANGUP_S = 1.0
"""Between SIGHUP and SIGKILL."""


class ProcessSession:
    """See `protocols.Session`."""

    def __init__(self, plan: dict[str, Any], handle: RuntimeHandle, *, job_pid: int, window: Window | None) -> None:
        """Start it. Raises Unavailable when no terminal is left on this machine."""
        self._window = window
        if window is None:
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self._process = start_inside(plan, handle, job_pid=job_pid, streams=streams)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._input, self._output = (os.dup(stream.fileno()) for stream in (self._process.stdin, self._process.stdout))
            self._process.stdin.close()
            self._process.stdout.close()
        else:
            self._process, self._output = _in_terminal(plan, handle, job_pid, window)
            self._input = self._output
        self._open = {self._input, self._output}
        for descriptor in self._open:
            os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """See Session."""
        return self._output

    def input_fileno(self) -> int:
        """See Session."""
        return self._input

    def read(self) -> bytes | None:
        """See Session."""
        try:
            return os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EIO:  # as the terminal says that nobody has it open any more
                raise
            return b""

    def write(self, data: bytes) -> int:
        """See Session."""
        if self._input not in self._open:
            return len(data)
        try:
            return os.write(self._input, data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def close_input(self) -> None:
        """See Session."""
        if self._window is not None:
            self.write(b"\x04")
        elif self._input in self._open:
            self._close(self._input)

    def resize(self, rows: int, columns: int) -> None:
        """See Session."""
        if self._window is not None:
            _set_size(self._output, rows, columns)

    def code(self) -> int | None:
        """See Session."""
        return self._process.poll()

    def end(self) -> None:
        """See Session."""
        for descriptor in list(self._open):  # a terminal that is closed hangs up by itself
            self._close(descriptor)
        for number, wait_s in ((signal.SIGHUP, HANGUP_S), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
                return

    def _close(self, descriptor: int) -> None:
        self._open.discard(descriptor)
        os.close(descriptor)


def _in_terminal(
    plan: dict[str, Any], handle: RuntimeHandle, job_pid: int, window: Window
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the command in a terminal of its own; return it and our end of the terminal."""
    try:
        ours, its = pty.openpty()
    except OSError as error:
        raise Unavailable(f"lease {handle.lease_id}: no terminal can be made here: {error}") from error
    try:
        _set_size(its, window.rows, window.columns)
        if plan["uid"] is not None:
            os.fchown(its, plan["uid"], -1)
        seen = {"TERM": window.term} if window.term else {}
        plan = plan | {"terminal": True, "environment": seen}
        return start_inside(plan, handle, job_pid=job_pid, streams={"stdin": its, "stdout": its, "stderr": its}), ours
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(its)


def _set_size(descriptor: int, rows: int, columns: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
