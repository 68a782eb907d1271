"""What one start tells the first program of a guest (`data/microvm/init.c`), and what that one says. Bytes only, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenure.cpio import Archive
from tenure.runtimes.microvm_machine import GATEWAY, GUEST, WORKER_DIR

MAX_CONFIG_BYTES = (1 << 20) - 1
MAX_WORDS = 4096
"""As in the first program."""
RELAYED = ("result.json", "endpoints.json")
"""Files of the worker folder that the host hears of."""
KERNEL_THREADS = 128
"""What the guest's kernel itself counts among its threads, at most."""
_MAX_LINE_BYTES = 1 << 16
_MAX_MARK_BYTES = (2 << 20) + 4096


def start_archive(
    *,
    token: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    workdir: str,
    root_type: str,
    modules: Sequence[str],
    lease: bytes,
    network: bool = True,
    pids_max: int = 1024,
) -> bytes:
    """Return the archive of one start. Raises ValueError for a zero byte in a word, or more than the first program reads."""
    words = [f"token={token}", *(f"module={name}" for name in modules)]
    words += [f"root={root_type}"] if root_type else []
    words += ["tmpfs=/tmp:mode=1777", "tmpfs=/run:mode=755", "tmpfs=/dev/shm:mode=1777"]
    words += [f"address={GUEST}", f"gateway={GATEWAY}"] if network else []
    # What is reserved and never touched is nobody's loss; what is touched beyond the memory ends the program.
    words += ["set=vm/overcommit_memory=1", f"set=kernel/threads-max={pids_max + KERNEL_THREADS}"]
    words += [f"worker={WORKER_DIR}", f"workdir={workdir}"]
    words += [f"relay={name}" for name in RELAYED]
    words += [f"env={name}={value}" for name, value in env.items()] + [f"arg={word}" for word in argv]
    encoded = [word.encode(errors="surrogateescape") for word in words]
    if any(b"\0" in word for word in encoded):
        raise ValueError("a word of the command or its environment has a zero byte")
    config = b"".join(word + b"\0" for word in encoded)
    if len(config) > MAX_CONFIG_BYTES or len(words) > MAX_WORDS:
        raise ValueError(
            f"command and environment are {len(words)} words, {len(config)} bytes; at most {MAX_WORDS}, {MAX_CONFIG_BYTES}"
        )
    archive = Archive()
    archive.file("config", config, 0o600)
    archive.file("lease.json", lease, 0o600)
    return archive.to_bytes()


@dataclass(frozen=True, slots=True)
class Said:
    """One thing that the guest's first program said."""

    word: str
    rest: tuple[str, ...]


class Console:
    """Parts a guest's console into what its first program says and everything else, which is output."""

    def __init__(self, token: str) -> None:
        self._mark = b"\x01" + token.encode() + b" "
        self._left = b""

    def feed(self, data: bytes) -> Iterator[bytes | Said]:
        """Take what came, and yield output and what was said in their order. Of output only a mark's beginning is kept."""
        self._left += data
        while self._left:
            at = self._left.find(self._mark)
            if at < 0:
                keep = self._beginning()
                out, self._left = self._left[: len(self._left) - keep], self._left[len(self._left) - keep :]
                if out:
                    yield out
                return
            if at:
                yield self._left[:at]
                self._left = self._left[at:]
            end = self._left.find(b"\n")
            if end < 0:
                if len(self._left) > _MAX_MARK_BYTES:
                    self._left = b""
                return
            words = self._left[len(self._mark) : end].decode("ascii", "replace").split()
            self._left = self._left[end + 1 :]
            if words:
                yield Said(words[0], tuple(words[1:]))

    def rest(self) -> bytes:
        """Return what is left at the end."""
        left, self._left = self._left, b""
        return left

    def _beginning(self) -> int:
        """Return how many bytes at the end may be the beginning of a mark."""
        for size in range(min(len(self._mark) - 1, len(self._left)), 0, -1):
            if self._mark.startswith(self._left[-size:]):
                return size
        return 0


class KernelWords:
    """Lines of the guest's kernel that tell why it ended: kept as they were said."""

    def __init__(self) -> None:
        self.out_of_memory = ""
        self.panic = ""
        self._line = b""

    def feed(self, output: bytes) -> None:
        """Look at output as it comes."""
        *lines, self._line = (self._line + output).split(b"\n")
        self._line = self._line[-_MAX_LINE_BYTES:]
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if not text.startswith("["):
                continue
            if "Out of memory: Killed process" in text or "oom-kill:" in text:
                self.out_of_memory = text[:300]
            elif "Kernel panic" in text:
                self.panic = self.panic or text[:300]


def said_number(said: Said, at: int, default: int = 0) -> int:
    """Return a number that was said; `default` when there is none."""
    try:
        return int(said.rest[at])
    except (IndexError, ValueError):
        return default


def note_of(said: Mapping[str, Said], kernel: KernelWords, **more: Any) -> dict[str, Any]:
    """Return what is noted of a guest's end."""
    ended, noexec, broken = said.get("exit"), said.get("noexec"), said.get("broken")
    return {
        "up": "up" in said,
        "exit": [said_number(ended, 0), said_number(ended, 1), said_number(ended, 2)] if ended else None,
        "noexec": [" ".join(noexec.rest[:-1]), said_number(noexec, -1)] if noexec else None,
        "broken": [" ".join(broken.rest[:-1]), said_number(broken, -1)] if broken else None,
        "out_of_memory": kernel.out_of_memory,
        "panic": kernel.panic,
        **more,
    }
