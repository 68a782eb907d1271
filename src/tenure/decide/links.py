"""What follows from a declared link. Pure: nothing is made or measured here (`experiments.links` makes it)."""

from __future__ import annotations

from tenure.links import DeclaredLink

LEAST_BURST_BYTES = 68_000
"""64 KB of one TCP stream, which the kernel hands over as one packet, with the headers of its parts."""
BURST_S = 1e-4
"""How long a timer of the kernel may be late: what a rate gives meanwhile must not be lost."""


def burst_bytes(link: DeclaredLink) -> int:
    """Return what passes at once after a pause, before the declared rate holds (the bucket of tc-tbf(8)); 0 without a rate."""
    return max(LEAST_BURST_BYTES, int(link.rate_bit_s / 8 * BURST_S)) if link.rate_bit_s else 0
