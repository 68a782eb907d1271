"""Every error Tenure raises on purpose, by what a caller can do about it.

    TenureError
    ├── SpecError            mend what was handed in
    │   ├── JobFileError     … in a job file: file, line, key, value, what is allowed
    │   └── Unsupported      … or choose another runtime: this one cannot honour a field
    ├── MissingExtra         install something
    ├── Refused              lower the request, wait, or free something
    │   └── NoPlacement      … with the reason of each node
    ├── NotFound             name something that exists
    ├── Conflict             look again: the world moved on
    │   ├── StaleFence       … an older grant's order
    │   └── IllegalChange    … a state that does not follow from the present one
    ├── Unavailable          try again: a process or machine did not answer in time
    ├── CorruptData          restore or recompute: what was read is not what was written
    ├── JobFailed            look at the job's own log: it ended badly
    └── InternalError        report a bug

Errors know nothing of exit codes or protocols: `cli` keeps one table for exit codes, `codec` one for the socket.
A message answers: what was refused, which object, the value found, the limit, what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping


class TenureError(Exception):
    """Base of all errors raised on purpose. `str(error)` is meant for people."""


class SpecError(TenureError):
    """What was handed in is wrong; nothing was started."""


class JobFileError(SpecError):
    """A job file is wrong. Names file, line, key, value found, and what is allowed."""

    def __init__(self, message: str, *, source: str = "", line: int = 0, key: str = "") -> None:
        place = f"{source}:{line}: " if line else (f"{source}: " if source else "")
        super().__init__(f"{place}{message}")
        self.source = source
        """File name, or empty when the text came from elsewhere."""
        self.line = line
        """1-based line of the offending key, 0 when the file as a whole is meant."""
        self.key = key
        """Dotted key, e.g. ``train.envelope.memory``."""


class Unsupported(SpecError):
    """A runtime cannot honour a field of its start spec.

    field: the spec's field. reason: why this runtime cannot. remedy: what to use instead.
    """

    def __init__(self, field: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"{field} is not supported here: {reason}." + (f" {remedy}" if remedy else ""))
        self.field = field
        self.reason = reason


class MissingExtra(TenureError):
    """An optional library is not installed."""

    def __init__(self, package: str, extra: str, what_for: str) -> None:
        super().__init__(
            f'{what_for} needs the package "{package}", which is not installed. Install it with: pip install "tenure[{extra}]"'
        )
        self.package = package
        self.extra = extra


class Refused(TenureError):
    """A request is well formed but can't be met now."""


class NoPlacement(Refused):
    """No node can hold what was asked. `reasons` maps each node to why it was refused."""

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        lines = "".join(f"\n  node {node}: {why}" for node, why in sorted(self.reasons.items()))
        super().__init__(message + lines)


class NotFound(TenureError):
    """The named thing does not exist."""


class Conflict(TenureError):
    """The world is no longer as the caller thought."""


class StaleFence(Conflict):
    """An order or record carries a fence older than one already seen."""


class IllegalChange(Conflict):
    """A state change that no rule allows."""


class Unavailable(TenureError):
    """A process or machine did not answer within the stated bound; trying again may help."""


class CorruptData(TenureError):
    """A stored record fails its checksum or its schema."""


class JobFailed(TenureError):
    """A job that Tenure ran ended badly. `reason` is the lease's end reason."""

    def __init__(self, message: str, *, reason: str = "failed") -> None:
        super().__init__(message)
        self.reason = reason


class InternalError(TenureError):
    """Tenure broke one of its own rules: please report it."""
