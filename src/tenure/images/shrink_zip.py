"""The standard library's modules in one compressed archive, where every interpreter looks for them first: lib/python311.zip.

Code compresses to less than half, and 150 files become one. `encodings`, which an interpreter needs before it can read a
compressed archive, and what is no byte code stay as files.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from tenure.images.tree import walk

_ENCODINGS = re.compile(r"^(.*/lib)/python(\d+)\.(\d+)/encodings/__init__\.pyc$")
_STAY = ("encodings", "lib-dynload", "site-packages", "dist-packages")
_LANDMARK = "os.pyc"
"""By this the interpreter knows its library's folder."""
_WHEN = (1980, 1, 1, 0, 0, 0)
_LEVEL = 9


class ZippedLibrary:
    """Put the standard library's code into the archive; sources must be gone before."""

    name = "files of the standard library"

    def apply(self, tree: Path) -> str:
        """See Step."""
        found = next((match for inside, _ in walk(tree) if (match := _ENCODINGS.match(inside))), None)
        if found is None:
            return "it has none whose sources are gone"
        lib, version = found[1], f"{found[2]}.{found[3]}"
        folder, archive = (
            tree / f"{lib}/python{version}".lstrip("/"),
            tree / f"{lib}/python{found[2]}{found[3]}.zip".lstrip("/"),
        )
        if archive.exists():
            return "there is an archive already"
        modules = [path for _, path in walk(folder) if path.suffix == ".pyc" and not path.is_symlink()]
        moved = [
            path for path in modules if (name := path.relative_to(folder)).parts[0] not in _STAY and str(name) != _LANDMARK
        ]
        if any(path.with_suffix(".py").exists() for path in moved) or any("__pycache__" in path.parts for path in moved):
            return "its sources are there"
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in moved:
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _WHEN)
                entry.external_attr = 0o644 << 16
                zipped.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, _LEVEL)
                path.unlink()
        os.chmod(archive, 0o644)
        for inside, _, _ in os.walk(folder, topdown=False):
            if not os.listdir(inside):
                os.rmdir(inside)
        return ""
