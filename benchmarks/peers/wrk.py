"""wrk: a closed-loop HTTP load generator in C, Debian's package."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.peers import homes

NAME = "wrk"
ABOUT = "a closed-loop HTTP load generator in C"
_DEBIAN = ("wrk", "libluajit-5.1-2", "libluajit-5.1-common")


def install(root: Path) -> Path:
    """See Peer. The machine's own wrk is taken where there is one."""
    if shutil.which("wrk"):
        return root
    return homes.make(root, NAME, debian=_DEBIAN)


def command(home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """See ToolPeer."""
    found = shutil.which("wrk")
    if found:
        return (found,), {}
    return (str(home / "debian" / "usr" / "bin" / "wrk"),), {"LD_LIBRARY_PATH": homes.debian_libraries(home)}
