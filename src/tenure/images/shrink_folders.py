"""What only people, compilers and test runners read, in the packages of a tree."""

from __future__ import annotations

import re
from pathlib import Path

from tenure.images.tree import remove_tree, walk

_FOLDERS = re.compile(r"/(?:site|dist)-packages/.*/(?:tests?|testing|benchmarks|examples|docs?|include)(?:/|$)")
_FILES = re.compile(
    r"/(?:site|dist)-packages/.*(?:\.pyi|\.pyx|\.pxd|\.h|\.hpp|\.c|\.cpp|\.a|\.md|\.rst)$|\.dist-info/RECORD$|/py\.typed$"
)


class Folders:
    """Remove folders of tests, examples and headers, and files that no running program reads."""

    name = "tests, headers and type stubs"

    def apply(self, tree: Path) -> str:
        """See Step."""
        gone = 0
        for inside, path in list(walk(tree)):
            if path.is_symlink() or not path.exists():
                continue
            if path.is_dir() and _FOLDERS.search(f"{inside}/"):
                remove_tree(path)
                gone += 1
            elif path.is_file() and _FILES.search(inside):
                path.unlink()
                gone += 1
        return "" if gone else "there are none"
