"""What an analysis has to say beside the files: what an image can't carry, and what its author should know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Matter(StrEnum):
    """What a finding is about."""

    STARTS = "starts"
    """It starts other programs."""
    NETWORK = "network"
    """It connects to other machines, so it may download what the image does not have."""
    WRITES = "writes"
    """It writes outside of temporary folders."""
    SECRET = "secret"
    """It reads what may be a secret; that is left out."""
    CACHE = "cache"
    """It reads a cache of this machine; that is left out."""
    HOST = "host"
    """It reads what describes this machine or its users; it goes into the image as it is."""
    LIBRARY = "library"
    """A shared library that an object needs is nowhere."""
    MODULE = "module"
    """What could not be analysed of the program's Python."""
    EXERCISE = "exercise"
    """An exercise failed, or the program ended before it was over."""
    TRACE = "trace"
    """Something could not be watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to know, and what to do about it."""

    matter: Matter
    found: str
    """What was seen, names and numbers included."""
    means: str
    """What follows for the image, and what to do."""


MAX_NAMED = 5
"""Names told in one finding; the rest are counted."""


def some(names: Sequence[str]) -> str:
    """Return the first names in one line, and how many there are beside them."""
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
