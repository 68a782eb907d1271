"""What a door puts up with from one client. Not here: the memory budget, which is the data plane's and all doors'."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tenure.errors import SpecError

ROOM_SHARE = 16
"""Of all connections, closed at a time while idle ones keep others out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """Bounds of one door. Past one, a client gets an error, or its connection is closed. Raises SpecError."""

    max_request_bytes: int = 64 << 20
    """Body of one request, also once it is unpacked."""
    max_json_bytes: int = 32 << 20
    """JSON of one request, and about that of an answer; longer tensors are to be sent raw."""
    max_unsent_bytes: int = 64 << 20
    """Answers that clients have not read yet, all connections together; past it, those stuck longest are closed."""
    max_head_bytes: int = 64 << 10
    """Request line and headers."""
    max_connections: int = 4096
    """Open at a time; past it, new ones wait to be accepted, and those idle longest are closed while some wait."""
    head_timeout_s: float = 10.0
    """From the first byte of a head to its last."""
    body_timeout_s: float = 60.0
    """From the end of the head to the last byte of the body."""
    idle_timeout_s: float = 300.0
    """A connection on which nothing is asked and nothing is due."""
    write_timeout_s: float = 30.0
    """An answer of which the client takes nothing."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise SpecError(f"{each.name} must be above 0; found {getattr(self, each.name)!r}")
