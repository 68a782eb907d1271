"""What came of the requests: counts by where they were mutated and how they ended, and what must not have happened."""

from __future__ import annotations

import threading
from collections import Counter

MAX_TOLD = 20


class Report:
    """Shared by the threads that send."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """(where it was mutated, how it ended) -> requests."""
        self.failures: list[str] = []
        self.failed = 0
        self._lock = threading.Lock()

    def ended(self, kind: str, outcome: str) -> None:
        """Count one request."""
        self.outcomes[(kind, outcome)] += 1  # one thread per kind

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
