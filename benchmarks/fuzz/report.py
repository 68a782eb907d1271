"""What came of the requests: counts by where they were mutated and how they ended, and what must not have happened."""

from __future__ import annotations

import re
import threading
from collections import Counter

MAX_TOLD, MAX_REASONS = 20, 2000
_QUOTED = re.compile(r"""-?[0-9][0-9.,]*|\\?"[^"]*"|'[^']*'|%22.*?%22""")


class Report:
    """Shared by the threads that send."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """(where it was mutated, how it ended) -> requests."""
        self.reasons: Counter[str] = Counter()
        """What refusals said, with what they quote left out: how deep the requests came."""
        self.failures: list[str] = []
        self.failed = 0
        self._lock = threading.Lock()

    def ended(self, kind: str, outcome: str, reason: bytes = b"") -> None:
        """Count one request. reason: what its refusal said."""
        self.outcomes[(kind, outcome)] += 1  # one thread per kind
        if reason and len(self.reasons) < MAX_REASONS:
            self.reasons[kind[:4] + " " + _QUOTED.sub("#", reason[:100].decode("latin-1"))[:60]] += 1

    def fail(self, what: str) -> None:
        """Note what must not happen."""
        with self._lock:
            self.failed += 1
            if len(self.failures) < MAX_TOLD:
                self.failures.append(what[:600])

    @property
    def mutated(self) -> int:
        """Requests that were mutated, whatever came of them."""
        return sum(count for (kind, _), count in list(self.outcomes.items()) if not kind.endswith("valid"))

    def table(self) -> dict[str, dict[str, int]]:
        """Return kind -> outcome -> requests."""
        found: dict[str, dict[str, int]] = {}
        for (kind, outcome), count in sorted(self.outcomes.items()):
            found.setdefault(kind, {})[outcome] = count
        return found
