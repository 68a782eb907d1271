"""Files that lie elsewhere in an image than on the machine where it is built: its bytes then do not tell where that was."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tenure.closures import Closure, ClosureFile, FileKind, Reason, Why


def relocate(closure: Closure, moves: Mapping[str, str]) -> tuple[Closure, dict[str, Path]]:
    """Return the closure with files and words of its command moved, and where the moved files' content lies on this machine.

    moves: path on this machine -> path in the image; of a folder, with all that is in it. Folders that only led to what was
    moved are not in the image. A moved file's first reason says where it was.
    """
    files: dict[str, ClosureFile] = {}
    sources: dict[str, Path] = {}
    left_behind = {str(parent) for old in moves for parent in Path(old).parents}
    for file in closure.files:
        new = _moved(file.path, moves)
        if new == file.path:
            files[file.path] = file
            continue
        target = _moved(file.target, moves) if file.target.startswith("/") else file.target
        reasons = (Reason(kind=Why.ADDED, detail=file.path), *(each for each in file.reasons if each.kind is not Why.ADDED))
        files[new] = replace(file, path=new, target=target, reasons=reasons)
        if file.kind is FileKind.FILE:
            sources[new] = Path(file.path)
    for path in sorted(left_behind, key=len, reverse=True):
        entry = files.get(path)
        if entry is not None and entry.kind is FileKind.DIRECTORY and not any(other.startswith(f"{path}/") for other in files):
            del files[path]
    for path in list(files):
        parent = posixpath.dirname(path)
        while parent != "/" and parent not in files:
            files[parent] = ClosureFile(path=parent, kind=FileKind.DIRECTORY, mode=0o755)
            parent = posixpath.dirname(parent)
    program = tuple(_moved_word(word, moves) for word in closure.program)
    return replace(closure, program=program, files=tuple(files[path] for path in sorted(files))), sources


def _moved(path: str, moves: Mapping[str, str]) -> str:
    for old, new in moves.items():
        if path == old or path.startswith(f"{old}/"):
            return new + path.removeprefix(old)
    return path


def _moved_word(word: str, moves: Mapping[str, str]) -> str:
    option, mark, path = word.partition("=")
    return f"{option}={_moved(path, moves)}" if mark and option.startswith("-") else _moved(word, moves)
