"""The files of a closure compared with those on disk: this machine's, or those of a tree that was made of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from tenure.closures import ClosureFile, FileKind
from tenure.images.closure_tree import content_hash


def differences(files: Sequence[ClosureFile], root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield each path of a closure that is not on disk as it was, and how it differs.

    root: where the tree lies; None: this machine's own. There modes count; in a tree, which has owners and modes of its own
    making, only kinds and content do.
    """
    for file in files:
        path = file.path if root is None else str(root) + file.path
        try:
            status = os.lstat(path)
        except OSError as error:
            yield file.path, "missing" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else str(error.strerror)
            continue
        found = _kind(status)
        if found is not file.kind:
            yield file.path, f"is a {found or 'device, pipe or socket'}, was a {file.kind}"
        elif file.kind is FileKind.SYMLINK and os.readlink(path) != file.target:
            yield file.path, f"leads to {os.readlink(path)}, led to {file.target}"
        elif root is None and file.kind is FileKind.FILE and stat.S_IMODE(status.st_mode) != file.mode:
            yield file.path, f"has mode {stat.S_IMODE(status.st_mode):04o}, had {file.mode:04o}"
        elif file.kind is FileKind.FILE and (why := _content(path, status.st_size, file)):
            yield file.path, why


def _kind(status: os.stat_result) -> FileKind | None:
    if stat.S_ISLNK(status.st_mode):
        return FileKind.SYMLINK
    if stat.S_ISDIR(status.st_mode):
        return FileKind.DIRECTORY
    return FileKind.FILE if stat.S_ISREG(status.st_mode) else None


def _content(path: str, size: int, file: ClosureFile) -> str:
    if size != file.size_bytes:
        return f"has {size} bytes, had {file.size_bytes}"
    try:
        return "" if content_hash(path)[1] == file.sha256 else "has other content of the same length"
    except OSError as error:
        return f"can't be read: {error.strerror}"
