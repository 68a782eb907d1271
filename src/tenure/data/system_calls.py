"""Numbers of Linux's system calls by architecture. Not for what a kernel makes of them (`compat`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources

from tenure.errors import Unsupported


@cache
def numbers(machine: str) -> Mapping[str, int]:
    """Return name -> number. machine: as the kernel calls it, ``x86_64`` or ``aarch64``. Raises Unsupported."""
    document = tomllib.loads(resources.files("tenure.data").joinpath("system_calls.toml").read_text())
    if machine not in document:
        known = ", ".join(sorted(name for name, table in document.items() if isinstance(table, dict)))
        raise Unsupported("seccomp", f"system calls of {machine} have no table here; there are {known}")
    table: dict[str, int] = document[machine]
    return table
