"""Packages that a program imports where they happen to be there, and goes on without where they are not.

scikit-learn imports PyTorch, 400 MB, in an environment that has it, to take its arrays; a service that is sent numbers has no
use for it. Only large packages are tried, each alone and as a whole, so that what asks for one meets what it meets in an
environment without it: ModuleNotFoundError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from tenure.images.tree import remove_tree, walk

LEAST_BYTES = 5_000_000
MAX_PACKAGES = 8
"""Each that is tried costs a start of the program."""
FOR_SPEED = ("uvloop", "httptools", "simplejpeg", "numexpr", "bottleneck", "numba", "llvmlite", "orjson", "mkl", "tbb")
"""Answers are the same without these, and later: they stay."""
_PACKAGE = re.compile(r"^(.*/(?:site|dist)-packages)/([A-Za-z_]\w*)/")


class Package:
    """Remove a package, its libraries and what is written about it."""

    def __init__(self, name: str) -> None:
        """name: of its folder among the packages."""
        self._name, self.name = name, f"package {name}"

    def apply(self, tree: Path) -> str:
        """See Step."""
        found = {match[1] for inside, _ in walk(tree) if (match := _PACKAGE.match(inside)) and match[2] == self._name}
        for folder in found:
            place = tree / folder.lstrip("/")
            for entry in list(place.iterdir()):
                if entry.name in (self._name, f"{self._name}.libs") or entry.name.startswith(f"{self._name}-"):
                    remove_tree(entry)
        return "" if found else "it is not there"


def large_packages(tree: Path, *, but: Collection[str] = ()) -> tuple[str, ...]:
    """Return the packages of a tree that are worth trying without, largest first; none of those that are there for speed."""
    sizes: dict[str, int] = {}
    for inside, path in walk(tree):
        if (match := _PACKAGE.match(inside)) and not path.is_symlink() and path.is_file():
            sizes[match[2]] = sizes.get(match[2], 0) + os.path.getsize(path)
    large = [name for name, size in sizes.items() if size >= LEAST_BYTES and name not in {*but, *FOR_SPEED}]
    return tuple(sorted(large, key=lambda name: -sizes[name])[:MAX_PACKAGES])
