"""By which means this machine holds bounds: cgroup v1, v2, or rlimits with polling; chosen once, by trying.

Not here: one attempt's bounds (`confine`), where groups may be made (`groups`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import Literal

from tenure.errors import Unavailable, Unsupported
from tenure.resources import Bound, Envelope
from tenure.runtimes import procfs
from tenure.runtimes.confine import NAME, Confinement
from tenure.runtimes.groups import own_groups, unified_home

Confine = Literal["auto", "cgroup", "rlimit"]
_V1 = ("memory", "cpu", "cpuacct", "pids")
SCOPE = "systemd-run --user --scope -p Delegate=yes tenure up"
"""How a user whose session is not delegated gets a group that is."""


class Confiner:
    """The means of this machine: makes the confinement of each attempt, and says how bounds are held."""

    def __init__(self, kind: str, parents: dict[str, str] | None = None, why: str = "") -> None:
        self.kind = kind
        self._parents = dict(parents or {})
        self._why = why

    def for_attempt(self, name: str) -> Confinement:
        """Return the (not yet made) confinement of one attempt. `name` is a file name."""
        return Confinement(self.kind, {controller: f"{folder}/{name}" for controller, folder in self._parents.items()})

    def bounds(self) -> dict[str, Bound]:
        """Return how each envelope field is held."""
        return {
            "cpus": "exact" if "cpu" in self._parents else "advisory",
            "memory_bytes": "exact" if "memory" in self._parents else "advisory",
            "gpus": "advisory",
            "gpu_memory_bytes": "advisory",
            "disk_bytes": "upper",
            "slot_s": "exact",
            "total_s": "exact",
        }

    def describe(self) -> str:
        """Return one sentence on the means."""
        if self.kind == "rlimit":
            why = f" ({self._why})" if self._why else ""
            return f"rlimits and polling{why}: memory per process and by the tree's sum, cpus by affinity; both advisory"
        held = ", ".join(controller for controller in ("memory", "cpu", "pids") if controller in self._parents)
        text = f"cgroup {self.kind}: {held}"
        if "cpu" not in self._parents:
            text += "; cpus by affinity, advisory: that controller is not delegated here"
        if "pids" not in self._parents:
            text += "; the number of processes is not bounded"
        return f"{text}; disk by polling"


def find_confiner(confine: Confine = "auto", *, name: str = NAME) -> Confiner:
    """Return the strongest means that works here; `confine` may demand one.

    Raises Unsupported when cgroups are demanded and cannot be had.
    """
    if confine == "rlimit":
        return Confiner("rlimit", why="as asked")
    reasons = []
    for find in (_find_v1, _find_v2):
        try:
            return find(name)
        except (OSError, Unavailable) as error:
            reasons.append(_in_words(error))
    why = "; ".join(reasons)
    if confine == "cgroup":
        raise Unsupported("confine", f"no cgroup can be made here ({why})", f"Run as root or in a delegated scope: {SCOPE}.")
    if os.path.exists(f"/run/user/{os.geteuid()}/systemd/private"):
        why += f'; exact bounds by starting with "{SCOPE}"'
    return Confiner("rlimit", why=why)


def _in_words(error: OSError | Unavailable) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{os.path.dirname(str(error.filename))}: {error.strerror}"
    return str(error)


def _own() -> dict[str, str]:
    return own_groups(procfs.read_text("/proc/self/mountinfo"), procfs.read_text("/proc/self/cgroup"))


def _find_v1(name: str) -> Confiner:
    own = _own()
    missing = [controller for controller in _V1 if controller not in own]
    if missing:
        raise Unavailable(f"cgroup v1 lacks {', '.join(missing)}")
    _try(Confinement("v1", {controller: f"{own[controller]}/{name}.probe.{os.getpid()}" for controller in _V1}))
    return Confiner("v1", {controller: own[controller] for controller in _V1})


def _find_v2(name: str) -> Confiner:
    own = _own().get("")
    if own is None:
        raise Unavailable("no cgroup v2 is mounted")
    home, controllers = unified_home(own, name)
    _try(Confinement("v2", dict.fromkeys(controllers, f"{home}/{name}.probe.{os.getpid()}")))
    return Confiner("v2", dict.fromkeys(controllers, home))


def _try(probe: Confinement) -> None:
    """Make a group with limits, move a child into it, remove it, and those of processes that died over theirs. Raises OSError
    where we may not."""
    for folder in dict.fromkeys(probe.groups.values()):
        parent, name = os.path.split(folder)
        stem = name.rpartition(".")[0]
        for other in os.listdir(parent):
            left, _, pid = other.rpartition(".")
            if left == stem and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{parent}/{other}")
    try:
        probe.make(Envelope(), 16)
        child = subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE, start_new_session=True)
        try:
            probe.join(child.pid)
        finally:
            child.kill()
            child.communicate()
    finally:
        probe.remove()
