"""Secrets of tenants: values that came with a request, kept in this process's memory until its leases are over.

In a home of one's own a job's secrets are in the broker's environment; a broker that serves others has theirs from them.
"""

from __future__ import annotations

from collections.abc import Mapping

from tenure.broker.book import Book
from tenure.leases import Lease

MAX_BYTES = 64 << 10
"""Of one request's values together."""


class Secrets:
    """Gang -> name -> value."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._values: dict[str, dict[str, str]] = {}

    def put(self, gang_id: str, values: Mapping[str, str]) -> None:
        """Keep what a request brings; nothing for none. Those of gangs that are over go."""
        live = {lease.gang_id.partition("+")[0] for lease in self._book.live.values()}
        self._values = {known: kept for known, kept in self._values.items() if known in live}
        if values:
            self._values[gang_id] = dict(values)

    def of(self, lease: Lease) -> Mapping[str, str]:
        """Return the values that came with a lease's request to this broker."""
        return self._values.get(lease.gang_id.partition("+")[0], {})
