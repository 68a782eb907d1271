"""The process that attends to one container: forked ahead of its order like any job, it has the engine make and start it.

It copies the container's output to the log, outlasts an engine that is started anew meanwhile, notes what the engine says of
the end, and leaves: to the shim, its parent, it stands for the container.

    <folder>/container.json   id, init's pid and start_ticks, the container's groups: written before its start is reported
    <folder>/engine.json      what the engine says of the end: code, oom_killed, error, away (times it was gone meanwhile)

Standard library and nouns only, as for a shim. Not for: signals and bounds (`container_shim`), what is asked (`container`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from typing import Any, NoReturn

from tenure.errors import Unavailable
from tenure.runtimes import procfs
from tenure.runtimes.acting import acting_as, actor_from, open_regular
from tenure.runtimes.confine import Confinement
from tenure.runtimes.container_engine import Engine, EngineError, frames
from tenure.runtimes.groups import own_groups
from tenure.runtimes.pinned import Pinned
from tenure.runtimes.state import write_json

ENGINE_BACK_MAX_S = 120.0
"""How long an engine that is gone is waited for once the container has ended, to hear how."""
_EXEC_MAX_S = 5.0
"""Bound of waiting for the engine's init to have become the command's parent."""
_NO_PROGRAM = (126, 127)
_INITS = ("docker-init", "tini", "catatonit", "dumb-init")
"""What engines start first in a container, by name."""
_INITS_COMPLAINTS = ("[FATAL tini", "ERROR (catatonit")
_RETRY_S = 0.1
_V1 = ("memory", "cpu", "cpuacct", "pids")


def attend(plan: dict[str, Any], failure: int) -> NoReturn:
    """Make and start the plan's container, see it to its end, and exit; tell on `failure` why it does not start."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the shim tells the container; we stay to hear of its end
    attendant = _Attendant(plan)
    step = "engine"
    try:
        attendant.create()
        step = "exec"
        attendant.start()
    except (EngineError, Unavailable, OSError, _NotStarted) as error:
        report = {"error": str(error)[:4096], "errno": None, "step": _step_of(step, error)}
        os.write(failure, json.dumps(report).encode())
        attendant.release()
        os._exit(1)
    attendant.release()
    os.close(failure)
    attendant.follow()
    os._exit(0)


class _NotStarted(Exception):
    """The engine started the container, but its command could not be executed."""


def _step_of(step: str, error: Exception) -> str:
    if isinstance(error, EngineError):
        text = str(error)
        if error.status == 404 and "image" in text.lower():
            return "image"
        return "exec" if step == "exec" and 'exec: "' in text else "engine"
    return step if isinstance(error, _NotStarted) else "engine"


class _Attendant:
    """One container: its plan, the engine, and how far its output was copied."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan, self._folder = plan, plan["folder"]
        self._asked = plan["container"]
        self._engine = Engine(self._asked["socket"])
        self._name = self._asked["name"]
        self._pinned = Pinned(self._name)
        self._actor = actor_from(plan.get("acting"))
        with acting_as(self._actor):
            self._log = open_regular(plan["spec"]["log_path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._init = (0, 0)
        self._last = ""
        """Time stamp of the last piece copied, as the engine writes it."""
        self._at_last = 0
        """Pieces copied of that very time."""
        self._away = 0

    def create(self) -> None:
        """Have the engine make the container. Raises EngineError, Unavailable."""
        body = dict(self._asked["body"], Env=[f"{name}={value}" for name, value in self._plan["env"].items()])
        self._pin(body["HostConfig"]["Mounts"])
        try:
            self._engine.call("POST", "/containers/create", body, name=self._name)
        except EngineError as error:
            if error.status != 409:
                raise
            # One of this very attempt, whose shim died before it could note anything: it has run nothing that counts.
            self._engine.call("DELETE", f"/containers/{self._name}", force=True, v=True)
            self._engine.call("POST", "/containers/create", body, name=self._name)

    def _pin(self, mounts: list[dict[str, Any]]) -> None:
        """Have the engine mount what another user named as it was checked. Raises OSError."""
        if self._actor is not None:
            places = self._pinned.pin(self._asked["named"], self._actor)
            for mount in mounts:
                mount["Source"] = places.get(mount["Source"], mount["Source"])

    def release(self) -> None:
        """Give up what was held for the engine's mounts: the container has them, or was not made."""
        if self._actor is not None:
            self._pinned.release()

    def start(self) -> None:
        """Start it, and return once its command runs or has run. Raises EngineError, Unavailable, _NotStarted."""
        self._engine.call("POST", f"/containers/{self._name}/start")
        found = self._engine.call("GET", f"/containers/{self._name}/json")
        pid = int(found["State"]["Pid"])
        self._init = (pid, procfs.start_ticks(pid) if pid else 0)
        groups = _groups(pid, str(found["Id"])) if pid else Confinement("rlimit")
        note = {"id": found["Id"], "pid": self._init[0], "start_ticks": self._init[1], "groups": groups.to_plan()}
        write_json(f"{self._folder}/container.json", note)
        if not self._command_runs():
            state = self._state()
            if state and int(state["ExitCode"]) in _NO_PROGRAM and (said := self._said_by_init()):
                raise _NotStarted(said)

    def _command_runs(self) -> bool:
        """Return whether the engine's init has executed the command; False when it has ended before anybody could see it."""
        pid, ticks = self._init
        own = _comm(pid)
        end_s = time.monotonic() + _EXEC_MAX_S
        while procfs.is_alive(pid, ticks) and time.monotonic() < end_s:
            if any(_comm(child) not in ("", own) for child in procfs.descendants(pid)[:1]) or own not in _INITS:
                return True
            time.sleep(0.001)
        return procfs.is_alive(pid, ticks)

    def _said_by_init(self) -> str:
        """Return what the engine's init said of a command that it could not execute; empty when the words are another's."""
        with self._engine.open("GET", f"/containers/{self._name}/logs", stdout=True, stderr=True, tail=5) as answer:
            text = b"".join(frames(answer)).decode("utf-8", "replace")
        return next(
            (line.strip() for line in text.splitlines() if line.startswith(("[FATAL tini", "ERROR: child process"))), ""
        )

    # --- output ---

    def follow(self) -> None:
        """Copy the output until the container has ended, whatever becomes of the engine meanwhile; note how it ended."""
        while True:
            with contextlib.suppress(EngineError, Unavailable, OSError):
                self._copy()
            alive = procfs.is_alive(*self._init)
            state = self._state(0.0 if alive else ENGINE_BACK_MAX_S)
            if state is not None and not state["Running"]:
                with contextlib.suppress(EngineError, Unavailable, OSError):
                    self._copy(follow=False)
                self._note(state)
                return
            if not alive and state is None:
                self._note({})
                return
            self._away += state is None
            time.sleep(_RETRY_S)

    def _copy(self, *, follow: bool = True) -> None:
        skip, since = self._at_last, self._last
        words: dict[str, Any] = {"follow": follow, "stdout": True, "stderr": True, "timestamps": True}
        if since:
            words["since"] = _epoch(since)
        path = f"/containers/{self._name}/logs"
        timeout_s = None if follow else 30.0
        with self._engine.open("GET", path, None, timeout_s=timeout_s, **words) as answer:
            for piece in frames(answer):
                stamp, _, text = piece.partition(b" ")
                when = stamp.decode("ascii", "replace")
                if since and (when < since or (when == since and skip > 0)):
                    skip -= when == since
                    continue
                self._at_last = self._at_last + 1 if when == self._last else 1
                self._last = when
                _write(self._log, text)

    # --- end ---

    def _state(self, wait_s: float = 10.0) -> dict[str, Any] | None:
        """Return what the engine says of the container; None when it does not answer in time or knows of none."""
        end_s = time.monotonic() + wait_s
        while True:
            try:
                state: dict[str, Any] = self._engine.call("GET", f"/containers/{self._name}/json", timeout_s=10.0)["State"]
            except EngineError as error:
                if error.status == 404:
                    return {"Running": False, "ExitCode": 0, "OOMKilled": False, "Error": "it was removed by somebody else"}
            except (Unavailable, KeyError, TypeError):
                pass
            else:
                if not state["Running"] or procfs.is_alive(*self._init):
                    return state
            if time.monotonic() >= end_s:
                return None
            time.sleep(_RETRY_S)

    def _note(self, state: dict[str, Any]) -> None:
        note = {
            "known": bool(state),
            "code": int(state.get("ExitCode", 0)),
            "oom_killed": bool(state.get("OOMKilled", False)),
            "error": str(state.get("Error", "")),
            "away": self._away,
        }
        write_json(f"{self._folder}/engine.json", note)


def _groups(pid: int, container_id: str) -> Confinement:
    """Return the control groups of a container's first process as they lie here."""
    try:
        texts = procfs.read_text("/proc/self/mountinfo"), procfs.read_text(f"/proc/{pid}/cgroup")
    except OSError:
        return Confinement("rlimit")
    return container_groups(*texts, container_id)


def container_groups(mountinfo: str, cgroup: str, container_id: str) -> Confinement:
    """Return a container's own control groups; `rlimit` where these are not all named after it.

    The kernel shows a process that has just ended in the root of each hierarchy: whoever took that for the container's
    would kill everything on the machine. mountinfo, cgroup: content of /proc/self/mountinfo and /proc/PID/cgroup.
    """
    found = {name: path for name, path in own_groups(mountinfo, cgroup).items() if container_id in path}
    if all(name in found for name in _V1):
        return Confinement("v1", {name: found[name] for name in _V1})
    return Confinement("v2", dict.fromkeys(("memory", "cpu", "pids"), found[""])) if "" in found else Confinement("rlimit")


def _comm(pid: int) -> str:
    try:
        return procfs.read_text(f"/proc/{pid}/comm").strip()
    except OSError:
        return ""


def _epoch(stamp: str) -> str:
    """Return seconds.nanoseconds since 1970 of a time as the engine writes it (RFC 3339, UTC)."""
    whole, _, rest = stamp.rstrip("Z").partition(".")
    return f"{int(_utc(whole))}.{rest or '0'}"


def _utc(text: str) -> float:
    import calendar  # only when an engine was started anew

    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def _write(fd: int, data: bytes) -> None:
    """Append all of it; on a full disk the rest is lost, as it is for any program."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(fd, data) :]
