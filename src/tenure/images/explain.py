"""Why a file is in a closure: its reasons, and the reasons of what it is there for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tenure.closures import Closure, ClosureFile, FileKind, Reason, Why
from tenure.errors import NotFound
from tenure.images.closure_rules import Rules
from tenure.images.findings import some

MAX_DEPTH = 6
_WORDS = {
    Why.OPENED: "opened by {}",
    Why.STATTED: "looked at by {}, and not opened",
    Why.EXECUTED: "executed by {}",
    Why.NEEDED: "needed by {}",
    Why.IMPORTED: "imported by {}",
    Why.ADDED: "added by name{}",
    Why.REPAIRED: "was missing when the image ran{}",
}


@dataclass(frozen=True, slots=True)
class Explained:
    """Why one path is there."""

    file: ClosureFile
    lines: tuple[str, ...]
    """A reason each, indented by two spaces for each step away from the file."""


def explain(closure: Closure, text: str) -> tuple[Explained, ...]:
    """Return why each path that `text` means is there: the path itself, or every one that ends with it.

    Raises NotFound, which says whether a rule leaves it out, and names paths that are alike.
    """
    found = _meant(closure, text)
    if not found:
        alike = [file.path for file in closure.files if os.path.basename(text).lower() in os.path.basename(file.path).lower()]
        near = f" There are {some(alike)}." if alike and os.path.basename(text) else ""
        why = Rules(home=os.path.expanduser("~")).left_out(text)
        rule = f" A rule leaves it out: {why}." if why else " Nothing that was watched or analysed needs it."
        raise NotFound(f"{text} is not in the closure.{rule}{near}")
    return tuple(Explained(file, tuple(_lines(closure, file, 0, frozenset()))) for file in found)


def _meant(closure: Closure, text: str) -> list[ClosureFile]:
    exact = closure.file(text.rstrip("/") or "/")
    if exact is not None:
        return [exact]
    return [file for file in closure.files if file.path.endswith("/" + text.strip("/"))] if text.strip("/") else []


def _lines(closure: Closure, file: ClosureFile, depth: int, seen: frozenset[str]) -> list[str]:
    indent = "  " * depth
    if not file.reasons:
        return [indent + _without_reason(closure, file)]
    lines = []
    for reason in file.reasons:
        lines.append(indent + words(reason))
        above = closure.file(reason.detail) if reason.kind in (Why.NEEDED, Why.IMPORTED) else None
        if above is not None and above.path not in seen and depth < MAX_DEPTH:
            lines += _lines(closure, above, depth + 1, seen | {file.path})
    return lines


def words(reason: Reason) -> str:
    """Return a reason in words, such as ``opened by python main.py``."""
    detail = reason.detail
    if reason.kind in (Why.ADDED, Why.REPAIRED):
        return _WORDS[reason.kind].format(f": {detail}" if detail else "")
    return _WORDS[reason.kind].format(detail or "the program")


def _without_reason(closure: Closure, file: ClosureFile) -> str:
    if file.kind is FileKind.SYMLINK:
        return "a link on the way to something"
    below = [other.path for other in closure.files if other.path.startswith(file.path + "/") and other.reasons]
    return f"holds {_example(below)}" if below else "on the way to something"


def _example(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
