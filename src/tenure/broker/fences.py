"""What is remembered of fences outside the ledger: a ledger that knows less than that is not the one it should be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from tenure.errors import CorruptData
from tenure.ledger import queries
from tenure.ledger.store import Ledger

_AGENTS = ("nodes/*/broker.json",)
_ALL = (*_AGENTS, "nodes/*/leases/*/control.json", "runs/*/*/workers/*/*/lease.json")


def highest_seen(home: Path) -> int:
    """Return the highest fence that agents, shims or workers of the home have on file, 0 when none has."""
    return _highest(home, _ALL)


def check_not_older(ledger: Ledger, home: Path) -> None:
    """Raise CorruptData when the home's agents have obeyed a broker that the ledger knows nothing of.

    It is empty then, an older copy, or another home's: a broker would forget leases that run, and agents would refuse it.
    """
    seen = _highest(home, _AGENTS)
    with ledger.reading() as connection:
        known = queries.last_fence(connection)
    if known < seen:
        raise CorruptData(
            f"the ledger {ledger.address} knows fences up to {known}, but agents of home {home} have obeyed a broker with "
            f'fence {seen}: it is empty, an older copy, or of another home. Restore a backup ("tenure restore FILE" goes on '
            f"above them); to begin anew without one, remove {home / 'nodes'} once nothing runs there."
        )


def _highest(home: Path, patterns: Iterable[str]) -> int:
    highest = 0
    for path in (path for pattern in patterns for path in home.glob(pattern)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # half a file says nothing
            highest = max(highest, int(json.loads(path.read_bytes())["fence"]))
    return highest
