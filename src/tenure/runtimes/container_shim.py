"""The shim of a container: deadline, order, disk and record as for any attempt, over processes that are not its children.

The child it is parent of is the attendant (`container_job`), which ends when the container has. What the shim does to the
container it does directly where it may (signals, control groups), so that a deadline holds while the engine is down, and
through the engine where it may not. Standard library and nouns only. Not for: making containers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import Any

from tenure.errors import TenureError
from tenure.runtimes import pidfds, procfs
from tenure.runtimes.confine import Confinement
from tenure.runtimes.container_engine import Engine, EngineError
from tenure.runtimes.shim import KILL_MAX_S, Shim
from tenure.runtimes.state import read_json
from tenure.runtimes.waiting import Waiting

ASK_S = 5.0
"""Bound of one question to the engine while a deadline may be near."""
ATTENDANT_MAX_S = 15.0
"""How long an attendant may take, once the container has ended and the engine answers, to hear how it ended."""
_LAST_SIGNAL = 64


class ContainerShim(Shim):
    """One attempt in a container. `plan["container"]`: socket, name, body."""

    def __init__(self, plan: dict[str, Any], text: bytes, channel: socket.socket, waiting: Waiting) -> None:
        super().__init__(plan, text, channel, waiting)
        self._engine = Engine(plan["container"]["socket"])
        self._name = str(plan["container"]["name"])
        self._init = (0, 0)
        self._cpu_s = 0.0
        self._oom_kills = 0

    # --- start ---

    def _make(self) -> None:
        """Nothing: the engine makes the container's groups."""
        for name in ("container.json", "engine.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._folder / name)

    def _begun(self) -> dict[str, Any] | None:
        note = read_json(self._folder / "container.json") or {}
        self._init = (int(note.get("pid", 0)), int(note.get("start_ticks", 0)))
        if "groups" in note:
            self._confinement = Confinement.from_plan(note["groups"])
        return None

    # --- watch ---

    def _pids(self) -> list[int]:
        return [pid for pid in self._confinement.members() if pid != self._init[0]]

    def _over_memory(self) -> bool:
        self._look()
        self._memory.saw(self._confinement.memory_bytes(0))
        return self._oom_kills > 0

    def _look(self) -> None:
        """Keep what the groups say: they go with the container, before anybody hears of its end."""
        if self._confinement.enforced:
            self._cpu_s = max(self._cpu_s, self._confinement.cpu_s(0))
            self._oom_kills = max(self._oom_kills, self._confinement.oom_kills())

    def _usage(self) -> dict[str, Any]:
        self._look()
        return dict(super()._usage(), cpu_s=self._cpu_s)

    def _ask_to_leave(self) -> None:
        try:
            if pidfds.send(*self._init, signal.SIGTERM):
                return
        except PermissionError:
            pass
        self._call("POST", f"/containers/{self._name}/kill", signal="SIGTERM")

    # --- end ---

    def _end_all(self) -> int:
        self._kill()
        end_s = time.monotonic() + KILL_MAX_S
        while procfs.is_alive(*self._init) and time.monotonic() < end_s:
            self._kill()
            time.sleep(0.005)
        left = int(procfs.is_alive(*self._init))
        end_s = time.monotonic() + ATTENDANT_MAX_S
        while self._reap() and (time.monotonic() < end_s or self._engine_is_away()):
            time.sleep(0.002)
        return left + super()._end_all()

    def _kill(self) -> None:
        self._look()
        self._confinement.stop_forks()
        self._confinement.kill()
        refused = False
        for pid in {*self._confinement.members(), *([self._init[0]] if procfs.is_alive(*self._init) else [])}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            except OSError:
                refused = True
        if refused:
            self._call("POST", f"/containers/{self._name}/kill", signal="SIGKILL")

    def _engine_is_away(self) -> bool:
        """Return whether the attendant waits for an engine, which it does for a bounded time of its own."""
        try:
            self._engine.call("GET", "/_ping", timeout_s=ASK_S)
        except EngineError:
            return False
        except TenureError:
            return True
        return False

    def _ended_how(self) -> tuple[int, int, str]:
        said = read_json(self._folder / "engine.json") or {}
        if not said.get("known"):
            why = "it did not come back in time" if said else "nobody asked it: the container's attendant is gone"
            return 1, 0, f"the container has ended; how, the engine did not say ({why})"
        code = int(said["code"])
        words = f"the engine's record: exit code {code}" + (f", {said['error']}" if said["error"] else "")
        words += "; the engine was away while it ran" if said["away"] else ""
        number = code - 128 if 128 < code <= 128 + _LAST_SIGNAL else 0
        return (0 if number else code), number, words

    def _oom_witness(self) -> str:
        said = read_json(self._folder / "engine.json") or {}
        if not said.get("oom_killed") and not self._oom_kills:
            return ""
        engine = "the engine's record: OOMKilled" if said.get("oom_killed") else "the container's own memory group"
        counted = f", oom_kill {self._oom_kills} in its memory group" if self._oom_kills else ""
        return f"{engine}{counted}; limit {self._envelope.memory_bytes} bytes, highest seen {self._memory.peak_bytes} bytes"

    def _height_bytes(self) -> int:
        """Return the bound: who was killed for want of memory had reached it."""
        return self._envelope.memory_bytes

    def _tidy(self) -> None:
        """Have the engine remove the container; one that is away is asked again when the lease is forgotten."""
        self._call("DELETE", f"/containers/{self._name}", force=True, v=True)

    def _call(self, method: str, path: str, **query: Any) -> None:
        with contextlib.suppress(TenureError):
            self._engine.call(method, path, timeout_s=ASK_S, **query)
