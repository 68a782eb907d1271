"""A tenant: who holds leases."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tenure.errors import SpecError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A person or a team."""

    name: str

    def __post_init__(self) -> None:
        check_name("tenant", self.name)


def check_name(what: str, name: str) -> str:
    """Return the name, or raise SpecError: names are lower-case letters, digits, dot, dash, underscore; 1 to 63 of them."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"{what} name {name!r} is not allowed: use 1 to 63 of a-z 0-9 . _ - and start with a letter or digit")
    return name
