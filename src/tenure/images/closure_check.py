"""What was locked compared with what is on disk: a closure with this machine, an image with what was built."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenure.closures import ClosureFile, FileKind, files_hash
from tenure.errors import CorruptData, NotFound
from tenure.forms import LOCK_FILE, Form, ImageManifest
from tenure.images.closure_tree import content_hash
from tenure.images.lock import read_lock
from tenure.images.tree import scan, walk

ROOT_LOCK_FILE = "root.lock.json"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was built."""

    what: str
    """A form, the lock file, the manifest."""
    path: str
    """Inside the form, or of the file that is meant."""
    how: str


def verify_image(folder: Path, manifest: ImageManifest) -> list[Damage]:
    """Return all that is damaged in an image's folder; nothing when every form is as it was built."""
    found = _verify_lock(folder, manifest)
    for form, record in manifest.forms.items():
        place = folder / record.path
        if not place.exists():
            found.append(Damage(what=form, path=str(place), how="missing"))
        elif form is Form.ROOT and (folder / ROOT_LOCK_FILE).exists():
            found += _verify_root(folder, place, manifest)
        elif _digest(place) != record.sha256:
            found.append(Damage(what=form, path=str(place), how="its content is not what was built"))
    return found


def _verify_lock(folder: Path, manifest: ImageManifest) -> list[Damage]:
    path = folder / LOCK_FILE
    try:
        found = read_lock(path).hash
    except (NotFound, CorruptData) as error:
        return [Damage(what="lock file", path=str(path), how=str(error))]
    if found == manifest.closure_hash:
        return []
    return [Damage(what="lock file", path=str(path), how=f"it is of closure {found[:12]}, not of {manifest.closure_hash[:12]}")]


def _verify_root(folder: Path, place: Path, manifest: ImageManifest) -> list[Damage]:
    """Return what differs in a tree, file by file: its own lock file has what each was."""
    try:
        lock = read_lock(folder / ROOT_LOCK_FILE)
    except CorruptData as error:
        return [Damage(what="root", path=str(folder / ROOT_LOCK_FILE), how=str(error))]
    if lock.hash != manifest.id:
        return [Damage(what="root", path=str(folder / ROOT_LOCK_FILE), how="it is of another image")]
    found = [Damage(what="root", path=path, how=how) for path, how in differences(lock.files, place)]
    known = {file.path for file in lock.files}
    return found + [Damage(what="root", path=path, how="was not there") for path, _ in walk(place) if path not in known]


def _digest(place: Path) -> str:
    try:
        return files_hash(scan(place)) if place.is_dir() else content_hash(str(place))[1]
    except OSError as error:
        return str(error)
