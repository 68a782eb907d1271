"""When those who were refused should come back: a pure fold over refusals.

Told only how long the queue is, a crowd of refused clients comes back at once, is refused again, and its refusals cost what
its answers could have had. Here each of them gets a time of its own: places fall free at a known pace, and as many of the
refused are asked back per place as `CROWDING` says, a little more than one, since some never come and most add a random part.
"""

from __future__ import annotations

from collections import deque

CROWDING = 1.5
"""Refused ones asked back per place that falls free."""
MIN_S, MAX_S = 0.01, 30.0
MAX_REMEMBERED = 8192
"""Refused ones that are expected back; of more, those refused longest ago are forgotten."""


class Retries:
    """Who was told to come back when."""

    def __init__(self) -> None:
        self._due_s: deque[float] = deque(maxlen=MAX_REMEMBERED)

    def after_s(self, now_s: float, wait_s: float, place_s: float) -> float:
        """Return in how many seconds one who is refused now should ask again.

        now_s: any clock that goes forward. wait_s: when a place should be free for the first of the refused. place_s: from one
        place that falls free to the next.
        """
        due_s = self._due_s
        while due_s and due_s[0] <= now_s:
            due_s.popleft()
        after_s = min(MAX_S, max(MIN_S, wait_s, len(due_s) * place_s / CROWDING))
        due_s.append(now_s + after_s)
        return after_s
