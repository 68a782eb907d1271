"""How long the next step of a kind may take, from the last ones: asked before one is begun late in a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

WINDOW = 16
"""Steps looked back at: a slow phase that is over shall not shorten every slot to come."""
LEAVE_SHARE = 1 / 32
"""Of what the process took to start, leaving takes no more than this: it adapts to the CPU share and to a busy machine."""
LEAVE_FILES = 3
"""Files that leaving may write: sums of shards added so far, the next slot's event, ``result.json``."""
UNCERTAIN = 0.5
"""The next step may take the longest of n and UNCERTAIN / n of it more: few steps tell little about the longest to come."""


class Pace:
    """Of one kind of step."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)

    def note(self, seconds: float) -> None:
        """Take a step's duration into account."""
        self._last.append(seconds)

    def begin_with(self, seconds: Iterable[float]) -> None:
        """Take others' steps for one's own as long as there are none."""
        if not self._last:
            self._last.extend(seconds)

    @property
    def longest_s(self) -> float:
        """Of the last steps; 0 before the first."""
        return max(self._last, default=0.0)

    @property
    def shortest_s(self) -> float:
        """Of the last steps; 0 before the first."""
        return min(self._last, default=0.0)

    @property
    def next_s(self) -> float:
        """What the next step may take."""
        return (1 + UNCERTAIN / max(1, len(self._last))) * self.longest_s


class Leaving:
    """Of handing over to the next slot and ending the process."""

    def __init__(self, startup_s: float = 0.0) -> None:
        """startup_s: what this process took from its order until it could begin."""
        self._startup_s = startup_s
        self.files = Pace()
        """Each one published in this slot."""

    @property
    def next_s(self) -> float:
        """What leaving may take."""
        return LEAVE_SHARE * self._startup_s + LEAVE_FILES * self.files.longest_s
