"""UTC for leases: read off the wall clock once, from then on counted on CLOCK_BOOTTIME, so that setting it moves nothing.

For: every UTC time that the broker writes down or compares. Not for: deadlines on nodes (`nodes` turns what is left into
their own CLOCK_BOOTTIME). Weighed and rejected: moving every lease's times when a jump is seen, which needs the jump seen
before anything is decided, and rewrites every lease.
"""

from __future__ import annotations

from tenure.protocols import Clock

JUMP_S = 0.5
"""A smaller distance to the wall clock is not worth following."""


class SteadyClock:
    """A Clock whose UTC does not jump. It follows the wall clock only when told to, which is while no lease is live."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.offset_s = clock.utc_s() - clock.boot_s()
        """UTC minus CLOCK_BOOTTIME; kept in the ledger, for the brokers of this boot that come after."""

    def utc_s(self) -> float:
        """See Clock."""
        return self._clock.boot_s() + self.offset_s

    def boot_s(self) -> float:
        """See Clock."""
        return self._clock.boot_s()

    def boot_id(self) -> str:
        """See Clock."""
        return self._clock.boot_id()

    def jumped(self) -> bool:
        """Return whether the wall clock has been set since it was last followed."""
        return abs(self._clock.utc_s() - self.utc_s()) > JUMP_S

    def follow(self) -> None:
        """Go by the wall clock as it now is."""
        self.offset_s = self._clock.utc_s() - self._clock.boot_s()
