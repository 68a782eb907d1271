"""Where on this machine control groups for leases may be made: found once, when a runtime starts.

For: our own groups of either generation (`own_groups`), and a home for v2 groups (`unified_home`). Not for: a lease's limits
(`confine`).

The kernel's rule for v2: a group that hands controllers to groups below it holds no processes (cgroups(7)). So we look from
our own group upwards for the nearest place that may become or is such an inner group, and is ours to write:

    place                    an inner group: empty, or emptied by us, or the true root
      ├─ tenure.agent        the leaf for the processes that were in the place
      └─ tenure.leases       hands the controllers on: whoever manages the place cannot switch them off while it does so
           └─ tenure.<lease>.<attempt>

Moved into the leaf are we alone, where nobody else is in our group, or everybody in it where it is ours to arrange: the top
of what was delegated (a scope with systemd's mark, a container, a lease of ours in which Tenure runs again). Out of such a
group we never climb, so that what runs in a lease stays within its bounds. Otherwise others' processes stay where they are.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from tenure.errors import Unavailable
from tenure.runtimes import procfs

V2_CONTROLLERS = ("memory", "cpu", "pids")
_MAX_MOVES = 100
"""Bound of emptying a group whose processes go on forking."""


def write(path: str, value: int | str) -> None:
    """Write one value to a control file. Raises OSError with the file's name."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)


def pids_in(folder: str) -> list[int]:
    """Return the processes of one group. Raises OSError."""
    return [int(word) for word in procfs.read_text(f"{folder}/cgroup.procs").split()]


def subtree(folder: str) -> Iterator[str]:
    """Yield a group and all below it, the deepest first; one that vanishes meanwhile is passed over."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                yield from subtree(entry.path)
        yield folder


def own_groups(mountinfo: str, membership: str) -> dict[str, str]:
    """Return controller -> our own group's folder, from /proc/self/mountinfo and /proc/self/cgroup (cgroups(7)).

    The unified hierarchy's key is the empty string. Controllers that are not mounted here are left out.
    """
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    found: dict[str, str] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        root, point = fields[3], fields[4]
        names = [""] if kind[0] == "cgroup2" else [word for word in kind[2].split(",") if word in paths]
        for controller in names:
            if controller not in paths:
                continue
            path = paths[controller]
            inner = os.path.relpath(path, root) if path == root or path.startswith(root.rstrip("/") + "/") else "."
            found.setdefault(controller, os.path.normpath(os.path.join(point, inner)))
    return found


def leaf_of(folder: str, name: str) -> str:
    """Return the leaf for processes of a group that has become an inner one."""
    return f"{folder}/{name}.agent"


def unified_home(own: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the group below which groups of leases can be made, made itself, and the controllers it hands on.

    own: our own group's folder. The controllers always include memory; cpu or pids may be missing where they are not
    delegated. Raises OSError or Unavailable with the reason of the first place looked at when there is none.
    """
    if os.path.basename(own) == f"{name}.agent":
        own = os.path.dirname(own)  # the leaf that an earlier call made
    refused: OSError | Unavailable | None = None
    place = own
    while True:
        try:
            return _settle_at(place, own, name)
        except (OSError, Unavailable) as error:
            refused = refused or error
        if _is_ours_to_arrange(place, name):
            raise refused
        place = os.path.dirname(place)


def _settle_at(place: str, own: str, name: str) -> tuple[str, tuple[str, ...]]:
    for path in (place, f"{place}/cgroup.procs", f"{place}/cgroup.subtree_control"):
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied", f"{place}/cgroup.procs")
    if not _is_root(place):
        others = [pid for pid in pids_in(place) if pid != os.getpid()]
        if others and not (place == own and _is_ours_to_arrange(place, name)):
            raise Unavailable(f"cgroup v2 {place} holds {len(others)} processes of others")
        _empty(place, leaf_of(place, name))
    _switch_on(place, V2_CONTROLLERS)
    held = _on(place)
    if "memory" not in held:
        raise Unavailable(f"cgroup v2 {place} lacks memory (it has {', '.join(_available(place)) or 'no controller'})")
    home = f"{place}/{name}.leases"
    os.makedirs(home, exist_ok=True)
    _switch_on(home, held)
    return home, _on(home)


def _is_root(place: str) -> bool:
    """Return whether a folder is the machine's own root group, the only one that may hold processes and hand on controllers."""
    return not os.path.exists(f"{place}/cgroup.type")


def _is_ours_to_arrange(place: str, name: str) -> bool:
    """Return whether this is the top of what was given to us; above it nothing is ours."""
    above = os.path.dirname(place)
    if not os.access(f"{above}/cgroup.procs", os.W_OK) or os.path.basename(above) == f"{name}.leases":
        return True
    for mark in ("trusted.delegate", "user.delegate"):  # systemd, since 251
        with contextlib.suppress(OSError):
            if os.getxattr(place, mark) == b"1":
                return True
    return False


def _empty(place: str, leaf: str) -> None:
    """Move every process of a group into the leaf below it. Raises OSError where one cannot be moved."""
    for _ in range(_MAX_MOVES):
        pids = pids_in(place)
        if not pids:
            return
        os.makedirs(leaf, exist_ok=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                write(f"{leaf}/cgroup.procs", pid)
        time.sleep(0)


def _available(place: str) -> tuple[str, ...]:
    return tuple(procfs.read_text(f"{place}/cgroup.controllers").split())


def _on(place: str) -> tuple[str, ...]:
    on = procfs.read_text(f"{place}/cgroup.subtree_control").split()
    return tuple(controller for controller in V2_CONTROLLERS if controller in on)


def _switch_on(place: str, wanted: tuple[str, ...]) -> None:
    """Hand controllers on to the groups below, asking the groups above for them first where we may.

    Those that are not to be had stay off. Raises OSError when memory, which is to be had, cannot be switched on.
    """
    missing = [controller for controller in wanted if controller not in _on(place)]
    absent = tuple(controller for controller in missing if controller not in _available(place))
    above = os.path.dirname(place)
    if absent and os.access(f"{above}/cgroup.subtree_control", os.W_OK):
        with contextlib.suppress(OSError):
            _switch_on(above, absent)
    for controller in missing:
        if controller not in _available(place):
            continue
        try:  # one at a time: one that is refused must not take the others with it
            write(f"{place}/cgroup.subtree_control", f"+{controller}")
        except OSError:
            if controller == "memory":
                raise
