"""MLPerf's LoadGen: the load generator whose schedule, latency from the scheduled time and verdict are the field's referee."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import homes

NAME = "loadgen"
ABOUT = "MLPerf LoadGen with its Python bindings"
_PACKAGES = ("mlcommons-loadgen==6.0.17", "numpy")


def install(root: Path) -> Path:
    """See Peer."""
    return homes.make(root, NAME, packages=_PACKAGES)


def command(home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """See ToolPeer: the interpreter that has the library."""
    return (str(homes.python(home)),), {}
