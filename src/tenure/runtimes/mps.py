"""Parts of a GPU by CUDA's Multi-Process Service: one control daemon per device, each with folders of its own.

    agent ──starts──► nvidia-cuda-mps-control (one per device) ──starts──► nvidia-cuda-mps-server
                              ▲ socket in <folder>/<device>/pipe                    ▲
                              └────────── a lease's CUDA programs, told by their environment

A client's environment bounds it: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE the share of multiprocessors that its kernels may occupy,
CUDA_MPS_PINNED_DEVICE_MEM_LIMIT what it may allocate (the driver refuses more, as if the device were full). A program can
change its own environment, so this binds those that do not; who goes around the service altogether is seen by `clients`.
A daemon outlives the agent, as leases do, and is found again by its folder. Nothing of the device itself is ever set (its mode
of computing, its division into instances). Standard library only: a shim uses it.
Not for: who gets which part (`decide`), watching memory (`agent.gpus`).

Source: NVIDIA, Multi-Process Service, appendices "Tools and interface reference" and "Environment variables".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tenure.errors import Unavailable

ANSWER_MAX_S = 5.0
"""Bound of one question to a daemon."""
START_MAX_S = 3.0
"""Bound of one try to start a daemon."""
QUIT_MAX_S = 5
"""After so many seconds a daemon that was told to quit ends its servers, clients or not."""
MANY_USERS = "-multiuser-server"
"""Lets clients of several users share a server; only root's daemon can, and only of newer drivers."""


class Mps:
    """The daemons of one agent. `folder` is short (sockets lie below it) and its owner's own; made when missing."""

    def __init__(self, folder: Path, *, program: str, answer_max_s: float = ANSWER_MAX_S) -> None:
        self._folder, self._program, self._answer_max_s = folder, program, answer_max_s

    @property
    def program(self) -> str:
        """The control program."""
        return self._program

    def to_plan(self) -> dict[str, str]:
        """Return it as plain data, for who is to find its daemons again."""
        return {"folder": str(self._folder), "program": self._program}

    def pipe(self, uuid: str) -> Path:
        """Return the folder of a device's sockets, which its clients are told."""
        return self._of(uuid) / "pipe"

    def ensure(self, uuid: str) -> Path:
        """Start a device's daemon unless it runs; return the folder of its sockets once it answers.

        Raises Unavailable, with the end of its log, when it does not within twice `START_MAX_S`.
        """
        pipe = self.pipe(uuid)
        if self.answers(uuid):
            return pipe
        said = ""
        for option in ([MANY_USERS], []) if os.geteuid() == 0 else ([],):
            self._make(uuid)
            said = self._start(uuid, option)
            end_s = time.monotonic() + START_MAX_S
            while not said and time.monotonic() < end_s:
                if self.answers(uuid):
                    (self._of(uuid) / "users").write_text("many" if option else "one")
                    return pipe
                time.sleep(0.05)
            said = said or self._log_end(uuid)
            self.quit(uuid)
        raise Unavailable(f"{self._program} for device {uuid} did not answer: {said or 'it says nothing'}")

    def answers(self, uuid: str) -> bool:
        """Return whether a device's daemon runs."""
        return self.pipe(uuid).is_dir() and self._ask(uuid, "get_default_active_thread_percentage") is not None

    def serves_many_users(self, uuid: str) -> bool:
        """Return whether clients of several users can share a device's server; of others, one user's wait for another's."""
        try:
            return (self._of(uuid) / "users").read_text() == "many"
        except OSError:
            return False

    def clients(self, uuid: str) -> frozenset[int] | None:
        """Return the pids of the programs that go through a device's daemon; None when it does not answer."""
        servers = self._servers(uuid)
        if servers is None:
            return None
        found: set[int] = set()
        for server in servers:
            found.update(_numbers(self._ask(uuid, f"get_client_list {server}") or ""))
        return frozenset(found)

    def servers(self, uuid: str) -> frozenset[int]:
        """Return the pids of a device's servers; they have contexts of their own there."""
        return frozenset(self._servers(uuid) or ())

    def end_clients(self, uuid: str, pids: Iterable[int]) -> None:
        """Take the work of programs off the device, so that killing them does their neighbours no harm.

        A client that is killed while its kernels run can take the server with it, and all other clients. Nothing happens to
        those that are none.
        """
        wanted = set(pids)
        for server in self._servers(uuid) or ():
            for pid in wanted & set(_numbers(self._ask(uuid, f"get_client_list {server}") or "")):
                self._ask(uuid, f"terminate_client {server} {pid}")

    def quit(self, uuid: str) -> None:
        """End a device's daemon and what still goes through it. Returns when it does not answer any more, or after a bound."""
        self._ask(uuid, f"quit -t {QUIT_MAX_S}", timeout_s=QUIT_MAX_S + self._answer_max_s)
        end_s = time.monotonic() + QUIT_MAX_S
        while self.answers(uuid):
            if time.monotonic() > end_s:
                return
            time.sleep(0.05)
        shutil.rmtree(self._of(uuid), ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _servers(self, uuid: str) -> list[int] | None:
        said = self._ask(uuid, "get_server_list")
        return None if said is None else _numbers(said)

    def _of(self, uuid: str) -> Path:
        # The name of a socket may have 107 bytes, the uuid alone has 40.
        return self._folder / hashlib.sha256(uuid.encode()).hexdigest()[:8]

    def _make(self, uuid: str) -> None:
        try:
            # Others may pass through to the sockets, which check for themselves who comes, but not look around.
            for folder in (self._folder, self._of(uuid), self.pipe(uuid), self._of(uuid) / "log"):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(parents=True)
                if (owner := folder.stat(follow_symlinks=False).st_uid) != os.geteuid():
                    raise Unavailable(f"{folder} belongs to user {owner}, so that MPS cannot be run there; have it removed")
                folder.chmod(0o711)
        except OSError as error:
            raise Unavailable(f"the folders of MPS cannot be made: {error}") from error

    def _start(self, uuid: str, options: Iterable[str]) -> str:
        """Start the daemon; return what is wrong, empty when nothing is known to be."""
        try:
            done = subprocess.run(
                [self._program, "-d", *options],
                env=self._environment(uuid),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a pipe would be kept open by the daemon
                stderr=subprocess.DEVNULL,
                timeout=START_MAX_S,
                start_new_session=True,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return f"it ended with code {done.returncode}; {self._log_end(uuid)}" if done.returncode else ""

    def _environment(self, uuid: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        return kept | {
            "CUDA_VISIBLE_DEVICES": uuid,
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe(uuid)),
            "CUDA_MPS_LOG_DIRECTORY": str(self._of(uuid) / "log"),
        }

    def _ask(self, uuid: str, question: str, *, timeout_s: float = 0.0) -> str | None:
        """Return a daemon's answer to one command; None when there is none, or it does not answer in time."""
        try:
            done = subprocess.run(
                [self._program],
                input=f"{question}\n",
                env=self._environment(uuid),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s or self._answer_max_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        # It ends with 0 and says so in words when there is nobody to ask.
        lost = "cannot find mps control daemon" in (done.stdout + done.stderr).lower()
        return None if done.returncode or lost else done.stdout

    def _log_end(self, uuid: str) -> str:
        try:
            lines = (self._of(uuid) / "log" / "control.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return " | ".join(lines[-3:])


def client_environment(pipe: str | Path, *, fraction: float, memory_bytes: int) -> Mapping[str, str]:
    """Return the variables that put a CUDA program under a part of the one device that its daemon serves.

    fraction: of the multiprocessors, 0 < fraction <= 1; the driver rounds up to what it can divide. memory_bytes: rounded
    down to whole MiB; what the context itself takes counts too. Raises Unavailable for less than a MiB.
    """
    if memory_bytes < 1 << 20:
        raise Unavailable(f"MPS bounds device memory in MiB; found {memory_bytes} bytes. Ask for more gpu_memory")
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(pipe),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{max(0.01, min(100.0, fraction * 100)):.6g}",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={memory_bytes >> 20}M",
    }


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split() if word.isdigit()]
