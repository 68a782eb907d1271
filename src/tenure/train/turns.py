"""Who does what one suffices for: at once the worker whose turn it is, another by a claim once it was due for a claim period.

So nothing is claimed as long as nobody dies, and what a dead worker owed is done one claim period later.
"""

from __future__ import annotations

from tenure.train.context import Context
from tenure.train.events import Work
from tenure.train.store import Claims


class Turns:
    """One worker's view of what falls to it."""

    def __init__(self, event: Work, context: Context) -> None:
        self._context = context
        self._claims = Claims(context.store)
        self._owner = f"worker {event.workerno}, generation {event.generation}, slot {event.slot}"
        self._due_since: dict[str, float] = {}

    def falls_to_us(self, name: str, *, ours: bool) -> bool:
        """Return whether to do a piece of work now. Ask again while it is due. ours: whether it is our turn."""
        if ours:
            return True
        now_s = self._context.monotonic()
        if now_s - self._due_since.setdefault(name, now_s) < self._context.spec.claim_period_s:
            return False
        return self.claim(name)

    def claim(self, name: str) -> bool:
        """Return whether the work is ours by claim, whoever's turn it is. Ask again while it is due."""
        context = self._context
        return self._claims.claim(name, self._owner, now_s=context.monotonic(), period_s=context.spec.claim_period_s)
