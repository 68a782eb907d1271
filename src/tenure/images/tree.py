"""Directory trees of images: made of a closure, cloned, looked at. Form `root` is such a tree.

A tree depends on the closure alone: modes are 0755 and 0644, nobody's time, the owner whoever builds. Files are copied out of
the machine, never linked, as somebody may write to them there; a clone of a tree shares its files with it, and a step that
changes one writes it anew (`replace_file`).
Not for: which files (`trace`), what is left out of them (`shrink`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from tenure.closures import Closure, ClosureFile, FileKind, Reason
from tenure.errors import CorruptData, SpecError

OWN = ("dev", "proc", "run", "sys", "tmp")
"""Directories that every form has of its own, whatever a closure says of them."""
DIRECTORY_MODE, PROGRAM_MODE, FILE_MODE, LINK_MODE = 0o755, 0o755, 0o644, 0o777
_PIECE_BYTES = 1 << 20


def make_tree(closure: Closure, place: Path, *, sources: Mapping[str, Path] | None = None) -> None:
    """Write a closure's files below `place`, which must be missing or empty, each checked by its hash.

    sources: where a path's content lies on this machine, for those that lie elsewhere than in the image.
    Raises SpecError for what no form can hold, CorruptData when a file is no longer what was analysed.
    """
    place.mkdir(parents=True, exist_ok=True)
    for name in OWN:
        (place / name).mkdir()
    for file in closure.files:
        _check_place(file)
        if file.path.strip("/").partition("/")[0] in OWN or file.path == "/":
            continue
        target = place / file.path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.kind is FileKind.DIRECTORY:
            target.mkdir(exist_ok=True)
        elif file.kind is FileKind.SYMLINK:
            target.symlink_to(file.target)
        else:
            _copy(file, (sources or {}).get(file.path, Path(file.path)), target)
    workdir = place / closure.workdir.lstrip("/")
    if not os.path.lexists(workdir):
        workdir.mkdir(parents=True)
    for folder, _, _ in os.walk(place):
        os.chmod(folder, DIRECTORY_MODE)


def _check_place(file: ClosureFile) -> None:
    first = file.path.strip("/").partition("/")[0]
    if file.kind is FileKind.FILE and first in OWN:
        raise SpecError(
            f"{file.path} cannot be in an image: /{first} is the running program's own, empty at its start. "
            "Move the program, or what it reads, somewhere else, such as below your home, and build it again"
        )


def _copy(file: ClosureFile, source: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as old, target.open("wb") as new:
            while piece := old.read(_PIECE_BYTES):
                digest.update(piece)
                new.write(piece)
    except FileNotFoundError as error:
        raise CorruptData(f"{source} is gone since it was analysed; analyse the program again") from error
    if digest.hexdigest() != file.sha256:
        raise CorruptData(f"{source} has changed since it was analysed; analyse the program again")
    os.chmod(target, PROGRAM_MODE if file.mode & 0o111 else FILE_MODE)


def clone_tree(source: Path, place: Path) -> None:
    """Make a tree with the same content at `place`. Its files are the very same on disk: `replace_file` changes one."""
    shutil.copytree(source, place, symlinks=True, copy_function=_link)
    for folder, _, _ in os.walk(place):
        os.chmod(folder, DIRECTORY_MODE)


def _link(old: str, new: str, *, follow_symlinks: bool = True) -> None:
    os.link(old, new, follow_symlinks=False)


def replace_file(path: Path, data: bytes) -> None:
    """Give a file new content, without touching other names of the old one."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    with contextlib.suppress(FileNotFoundError):
        os.chmod(part, stat.S_IMODE(path.stat().st_mode))
    os.replace(part, path)


def remove_tree(place: Path) -> None:
    """Remove a tree; nothing happens when it is gone."""
    shutil.rmtree(place, ignore_errors=True)


def walk(place: Path) -> Iterator[tuple[str, Path]]:
    """Yield everything in a tree as (path inside, path here), sorted by path inside, links not followed."""
    found = []
    for folder, folders, files in os.walk(place):
        inside = "/" + os.path.relpath(folder, place) if folder != str(place) else ""
        found += [(f"{inside}/{name}", Path(folder, name)) for name in (*folders, *files)]
    yield from sorted(found)


def scan(place: Path, *, reasons: Mapping[str, tuple[Reason, ...]] | None = None) -> tuple[ClosureFile, ...]:
    """Return what is in a tree, as the entries of a closure. reasons: path -> why it is there, where that is known."""
    why = reasons or {}
    found = []
    for inside, path in walk(place):
        info = os.lstat(path)
        mode = stat.S_IMODE(info.st_mode)
        if stat.S_ISLNK(info.st_mode):
            entry = ClosureFile(
                path=inside, kind=FileKind.SYMLINK, mode=LINK_MODE, target=os.readlink(path), reasons=why.get(inside, ())
            )
        elif stat.S_ISDIR(info.st_mode):
            entry = ClosureFile(path=inside, kind=FileKind.DIRECTORY, mode=mode, reasons=why.get(inside, ()))
        else:
            entry = ClosureFile(
                path=inside,
                kind=FileKind.FILE,
                mode=mode,
                size_bytes=info.st_size,
                sha256=file_sha256(path),
                reasons=why.get(inside, ()),
            )
        found.append(entry)
    return tuple(found)


def tree_bytes(place: Path) -> int:
    """Return the size of a tree: the content of its files, one with several names once."""
    seen: dict[tuple[int, int], int] = {}
    for _, path in walk(place):
        info = os.lstat(path)
        if stat.S_ISREG(info.st_mode):
            seen[info.st_dev, info.st_ino] = info.st_size
    return sum(seen.values())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
