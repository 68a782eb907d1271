"""Shrinking an image's tree, step by step; a step is kept only if the program's answers stay the same, byte for byte.

    tree ─► clone ─► step ─► the program runs in it and is asked ─► same answers: the clone is the tree now
                                                                 └► else: the clone goes, the report says why

Steps: `shrink_python` (byte code without sources), `shrink_elf` (symbol tables), `shrink_blas` (a BLAS that nobody calls),
`shrink_folders` (tests and what only compilers read). Not for: how answers are had (`answers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tenure.images.tree import clone_tree, remove_tree, tree_bytes

Check = Callable[[Path], str]
"""Run the program in a tree; return why its answers are not what they were, empty when they are."""


class Step(Protocol):
    """One way to make a tree smaller."""

    name: str
    """For people, as in the report."""

    def apply(self, tree: Path) -> str:
        """Change the tree, whose files other trees share: only `tree.replace_file` and removal. Return why nothing is to do."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """What came of one step."""

    step: str
    kept: bool
    saved_bytes: int = 0
    """By a kept step; by one that was dropped, what it would have saved."""
    why: str = ""
    """Why it was dropped, or had nothing to do."""


def shrink(
    tree: Path, steps: Sequence[Step], check: Check, *, told: Callable[[str], None] = lambda _: None
) -> tuple[Shrunk, ...]:
    """Apply what steps can be applied to a tree, in place; return what came of each.

    told: hears what is being tried. A step that fails on its own, with OSError or ValueError, is dropped.
    """
    report = []
    for step in steps:
        told(f"trying without {step.name}")
        report.append(_try(tree, step, check))
    return tuple(report)


def _try(tree: Path, step: Step, check: Check) -> Shrunk:
    trial = tree.with_name(f"{tree.name}.trial")
    remove_tree(trial)
    try:
        clone_tree(tree, trial)
        before = tree_bytes(trial)
        try:
            if nothing := step.apply(trial):
                return Shrunk(step=step.name, kept=False, why=nothing)
        except (OSError, ValueError) as error:
            return Shrunk(step=step.name, kept=False, why=f"it failed: {error}")
        saved_bytes = before - tree_bytes(trial)
        if saved_bytes <= 0:
            return Shrunk(step=step.name, kept=False, why="it saves nothing here")
        if why := check(trial):
            return Shrunk(step=step.name, kept=False, saved_bytes=saved_bytes, why=why)
        old = tree.with_name(f"{tree.name}.old")
        tree.rename(old)
        trial.rename(tree)
        remove_tree(old)
        return Shrunk(step=step.name, kept=True, saved_bytes=saved_bytes)
    finally:
        remove_tree(trial)
