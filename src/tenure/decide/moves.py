"""Whether a lease that renews should do so elsewhere: the one moment at which it can move without being interrupted.

Not here: how it moves, and the other reasons to (a draining node). The number of moves is bounded: they cost a restart each.
"""

from __future__ import annotations

from collections.abc import Sequence

from tenure.resources import DeviceShare, Envelope

from .rooms import Rooms

MAX_SHARE = 0.03
"""Moves of a run, over the leases admitted so far."""
LEAST_GAIN = 0.1
"""Devices that a move must make usable. On openb 0.02 to 0.1 give the same, 0.25 moves nothing."""


def moved(
    rooms: Rooms,
    node: str,
    envelope: Envelope,
    devices: Sequence[DeviceShare],
    models: Sequence[str] = (),
    *,
    moves: int,
    admitted: int,
    least_gain: float = LEAST_GAIN,
) -> tuple[str, tuple[DeviceShare, ...]] | None:
    """Return where a lease should go on at its renewal, None to stay. Leaves the rooms as they were.

    node, devices: where it is; moves, admitted: of the fleet so far, which bound what may follow.
    least_gain: what a move must gain over staying, in devices, counted as `Rooms.choose` does.
    """
    if moves + 1 > MAX_SHARE * admitted:
        return None
    rooms.give(node, envelope, devices)
    try:
        choice = rooms.choose(envelope, models)
        if choice is None or choice[0] == node:
            return None
        gained = rooms.gain(choice[0], envelope, models) - rooms.gain(node, envelope, models)
        return choice if gained >= least_gain else None
    finally:
        rooms.take(node, envelope, devices)
