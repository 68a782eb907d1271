"""What can go wrong with one request, by what its sender can do. Knows nothing of HTTP or gRPC: each door has one table.

InputRefused    mend the request (a SpecError)
└── TooLarge    … make it smaller
Overloaded      wait `retry_after_s`, then try again (a Refused)
ModelFailed     look at the model: it raised on input that fits its signature
"""

from __future__ import annotations

from tenure.errors import Refused, SpecError, TenureError


class InputRefused(SpecError):
    """A request does not fit the protocol or the model's signature; nothing was run."""


class TooLarge(InputRefused):
    """A request is above the server's size limit."""


class Overloaded(Refused):
    """The model's queue or the server's memory for requests is full; nothing was run."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When to try again, seconds."""


class ModelFailed(TenureError):
    """The model raised, or gave back what its signature does not promise."""
