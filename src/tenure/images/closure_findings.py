"""From what was watched to what is said of it: starts, network, writes, secrets, this machine's own files."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tenure.closures import Why
from tenure.images.closure_rules import SECRET, Rules
from tenure.images.findings import Finding, Matter, some
from tenure.images.trace_read import Watched

_TELLING = frozenset({"/etc/passwd", "/etc/group", "/etc/hosts"})
_QUIET_WRITES = ("/tmp/", "/var/tmp/", "/dev/", "/proc/", "/sys/")


def findings(watched: Watched, left_out: Mapping[str, str], rules: Rules, unread: int) -> list[Finding]:
    """Return what a program does that an image can't carry, or that its author should know; nothing for the usual."""
    found = [
        _starts(watched),
        _network(watched),
        _writes(watched),
        _secrets(left_out),
        _cache(watched, left_out),
        _host(watched),
    ]
    if unread:
        means = "what they say is not in the closure. Report it with the lines"
        found.append(Finding(matter=Matter.TRACE, found=f"{unread} lines of the trace can't be read", means=means))
    return [finding for finding in found if finding is not None]


def _starts(watched: Watched) -> Finding | None:
    names = sorted(
        {os.path.realpath(path) for path in watched.started} - {os.path.realpath(path) for path in watched.programs[:1]}
    )
    if not names:
        return None
    means = "they are in the closure with what they read. A form without processes (a unikernel) can't run them"
    return Finding(matter=Matter.STARTS, found=f"it starts other programs: {some(names)}", means=means)


def _network(watched: Watched) -> Finding | None:
    if not watched.connected:
        return None
    means = (
        "what it gets there is not in the closure, and a microVM reaches nothing but its own port. "
        "Fetch it before, and add it by name (--add PATH)"
    )
    return Finding(matter=Matter.NETWORK, found=f"it connects to {some(sorted(watched.connected))}", means=means)


def _writes(watched: Watched) -> Finding | None:
    paths = sorted(path for path in watched.changed if not path.startswith(_QUIET_WRITES) and "/__pycache__/" not in path + "/")
    if not paths:
        return None
    means = "an image is read-only there, or forgets it at the end. Let it write to /tmp, or to a mounted folder"
    return Finding(matter=Matter.WRITES, found=f"it writes outside of temporary folders: {some(paths)}", means=means)


def _secrets(left_out: Mapping[str, str]) -> Finding | None:
    paths = _with(left_out, SECRET)
    if not paths:
        return None
    means = (
        "they are left out, for whoever has the image could read them. Hand them over when it runs, or name them (--add PATH)"
    )
    return Finding(matter=Matter.SECRET, found=f"it looks at what may be secrets: {some(paths)}", means=means)


def _cache(watched: Watched, left_out: Mapping[str, str]) -> Finding | None:
    opened = {
        sighting.path for sighting in watched.sightings if sighting.why is Why.OPENED and not watched.was_made(sighting.path)
    }
    paths = sorted(path for path, why in left_out.items() if "cache" in why and path in opened and os.path.isfile(path))
    written = {os.path.dirname(path) for path in watched.changed}  # what the program keeps there itself
    paths = [path for path in paths if path != "/etc/ld.so.cache" and os.path.dirname(path) not in written]
    if not paths:
        return None
    means = "they are left out. If it needs them (a model it once downloaded), name them (--add PATH)"
    return Finding(matter=Matter.CACHE, found=f"it reads a cache of this machine: {some(paths)}", means=means)


def _host(watched: Watched) -> Finding | None:
    paths = sorted({sighting.path for sighting in watched.sightings if sighting.why is Why.OPENED} & _TELLING)
    if not paths:
        return None
    means = "they go into the image as they are, with this machine's names"
    return Finding(matter=Matter.HOST, found=f"it reads {some(paths)}", means=means)


def _with(left_out: Mapping[str, str], why: str) -> list[str]:
    return sorted(path for path, reason in left_out.items() if reason == why)
