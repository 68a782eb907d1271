"""Other servers and the load tools of others: each in a virtual environment of its own, with the same ONNX files as ours.

    python -m benchmarks.peers list
    python -m benchmarks.peers install NAME … | all
    python -m benchmarks.peers start NAME --model NAME=FILE.onnx …

One module per peer: what it is made of (packages by name, nothing else) and how it is started. `homes` makes the
environments (default below `.cache/peers`, else $TENURE_PEERS, else --root), `processes` starts and ends what runs in them.
Nothing here is imported by Tenure, and nothing of it is shipped.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from benchmarks.peers.processes import Launch, Order

NAMES = (
    *("triton", "kserve", "mlserver", "litserve", "fastapi", "tritonclient", "perf_analyzer", "wrk", "loadgen"),
    "model_analyzer",
)


class Peer(Protocol):
    """A module that says what one peer is made of."""

    NAME: str
    ABOUT: str

    def install(self, root: Path) -> Path:
        """Make its home below `root`, or find it made; return the home. Raises harness.Skip when it can't be had here."""
        ...


@runtime_checkable
class ServerPeer(Peer, Protocol):
    """A peer that serves models."""

    def launch(self, home: Path, order: Order) -> Launch:
        """Return how to start it with these models."""
        ...


@runtime_checkable
class ToolPeer(Peer, Protocol):
    """A peer that is a program or an interpreter with a library."""

    def command(self, home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the beginning of its command line and the environment it wants added."""
        ...


def peer(name: str) -> Peer:
    """Return the module of one peer. Raises ValueError for a name that is none."""
    if name not in NAMES:
        raise ValueError(f"there is no peer {name!r}; there are: {', '.join(NAMES)}")
    return cast(Peer, importlib.import_module(f"benchmarks.peers.{name}"))
