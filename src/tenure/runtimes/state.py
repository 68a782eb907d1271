"""A lease's files in the node's private state folder, read and replaced atomically. Standard library only.

    <state_dir>/leases/<lease_id>/
        spec.json      the attempt as asked, without the values of its environment (they may be secrets)
        shim.json      pid, start_ticks of the shim, when it started
        control.json   fence, deadline, bounds, stop order: written by the runtime, reread by the shim
        usage.json     the shim's last sample, for the height of memory
        exit.json      how the attempt ended; earlier attempts: exit.<attempt>.json

Not for: deciding anything about what they say (`process`, `shim`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenure.errors import CorruptData, SpecError

RECORD_MAX_S = 600.0
"""How long a shim whose job is over waits for a full disk to have room for its record."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def write_json(path: str | Path, data: Any, *, sync: bool = False, mode: int = 0o600) -> None:
    """Replace a file by data as JSON, at once or not at all. sync: also survive a power cut. Raises OSError."""
    temporary = f"{path}.{os.getpid()}.tmp"
    # In a folder that a job may write, neither a link nor a FIFO of that name is to lead or hold us anywhere.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(temporary, flags, mode)
    try:
        try:
            left = memoryview(json.dumps(data).encode())
            while left:  # a disk that fills up takes a part first, and refuses only the next write
                left = left[os.write(fd, left) :]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_record(
    path: str | Path, data: Any, *, max_s: float = RECORD_MAX_S, pause: Callable[[float], None] = time.sleep
) -> None:
    """Write what must not be lost, to survive a power cut: on a full disk, wait for room. Raises OSError after `max_s`."""
    end_s = time.monotonic() + max_s
    while True:
        try:
            write_json(path, data, sync=True)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() >= end_s:
                raise
        pause(0.2)


def read_json(path: str | Path) -> dict[str, Any] | None:
    """Return a file's object, or None when there is no file. Raises CorruptData when it is not one."""
    try:
        data = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptData(f"{path} is not valid JSON: {error}; remove it once nothing of its lease runs") from error
    if not isinstance(data, dict):
        raise CorruptData(f"{path} should hold an object; found {type(data).__name__}")
    return data


def term_file(state_dir: str | Path) -> Path:
    """Return where a node's term lies: {"ends_boot_s", "boot_id"}, written by the agent, obeyed by shims too."""
    return Path(state_dir) / "term.json"


class LeaseFiles:
    """Where one lease's state lies. Raises SpecError for a lease id that is no plain name."""

    def __init__(self, state_dir: str | Path, lease_id: str) -> None:
        if not _NAME.fullmatch(lease_id):
            raise SpecError(
                f"a lease id must be a plain name of at most 128 letters, digits, '.', '_', '-'; found {lease_id!r}"
            )
        self.root = Path(state_dir) / "leases" / lease_id
        self.spec = self.root / "spec.json"
        self.shim = self.root / "shim.json"
        self.control = self.root / "control.json"
        self.usage = self.root / "usage.json"
        self.exit = self.root / "exit.json"
        self.execs = self.root / "execs"
        """Exists once a command was run inside: its processes are no children of the shim."""

    def exit_of(self, attempt: int, last_attempt: int) -> Path:
        """Return where the record of one attempt lies, given which was the last."""
        return self.exit if attempt == last_attempt else self.root / f"exit.{attempt}.json"

    def set_aside(self, last_attempt: int) -> None:
        """Make room for a next attempt, keeping the last one's record."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.exit, self.root / f"exit.{last_attempt}.json")
        for path in (self.shim, self.usage, self.execs):
            path.unlink(missing_ok=True)
