"""What a closure lacks: named by watching the program here under what failed, or by what it said; and the closure with it.

A missing file can't be seen from inside: Python lists a folder and does not ask for a module that is not in it. So the program
is watched where nothing is missing, and what it uses there and the closure has not is what was missing.
Not here: building the image anew (`build`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from tenure.closures import Closure, ClosureFile, Exercise, FileKind, Reason, Why
from tenure.images.closure_rules import Rules, own_folders
from tenure.images.closure_tree import Tree
from tenure.images.explain import words
from tenure.images.imports import Interpreter, module_files
from tenure.images.system_calls import merged

_PATH = re.compile(
    r"""(?:No such file or directory|cannot open shared object file|can't open file|not found)[^'"/]*['"]?(/[^'":\n]+)"""
)
_PATH_FIRST = re.compile(r"""(/[^\s'":]+)['"]?: (?:cannot open|No such file|not found|Errno 2)""")
_MODULE = re.compile(r"""No module named ['"]([\w.]+)['"]|cannot import name ['"](\w+)['"] from ['"]([\w.]+)['"]""")
_LIBRARY = re.compile(
    r"(?:loading shared libraries: |OSError: |ImportError: )?([\w.+-]+\.so[\w.]*): cannot open shared object file"
)
MAX_TEXT_BYTES = 4 << 20
"""Of what a program said; the end counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A file that a closure lacks."""

    path: str
    """In the image, and on this machine."""
    how: str
    """How it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """A closure with what it lacked."""

    closure: Closure
    missing: tuple[Missing, ...]
    """Files alone, links and folders on the way apart; empty: nothing was."""


def sources_of(closure: Closure) -> dict[str, str]:
    """Return where files that an image has moved lie on this machine: path inside -> path here, for those still there."""
    found = {}
    for file in closure.files:
        here = next((reason.detail for reason in file.reasons if reason.kind is Why.ADDED), "")
        if file.kind is FileKind.FILE and here and here != file.path and os.path.isfile(here):
            found[file.path] = here
    return found


def here(words: Sequence[str], sources: Mapping[str, str]) -> tuple[str, ...]:
    """Return a command of an image as it is on this machine: paths of moved files, and of folders of them, put back."""
    folders: dict[str, str] = {}
    for inside, outside in sources.items():
        while os.path.basename(inside) == os.path.basename(outside) and inside != "/":
            folders[inside] = outside
            inside, outside = os.path.dirname(inside), os.path.dirname(outside)
        folders.setdefault(inside, outside)
    return tuple(folders.get(word, word) for word in words)


def with_seen(closure: Closure, seen: Closure) -> Repaired:
    """Return the closure with what was seen elsewhere and it has not: of the same program, under what failed."""
    moved = set(sources_of(closure).values())
    known = {file.path for file in closure.files}
    new = [file for file in seen.files if file.path not in known and file.path not in moved]
    led_to = {str(parent) for file in new if file.kind is not FileKind.DIRECTORY for parent in PurePosixPath(file.path).parents}
    new = [file for file in new if file.kind is not FileKind.DIRECTORY or file.path in led_to]
    marked = tuple(_marked(file, _seen_how(file)) for file in new)
    return Repaired(
        closure=_merged(closure, marked, seen.exercises, seen),
        missing=tuple(Missing(path=file.path, how=_seen_how(file)) for file in new if file.kind is FileKind.FILE),
    )


def _seen_how(file: ClosureFile) -> str:
    return words(file.reasons[0]) if file.reasons else "on the way to another"


def with_paths(closure: Closure, missing: Sequence[Missing]) -> Repaired:
    """Return the closure with named files, as they are on this machine; what is there already is not missing."""
    known = {file.path for file in closure.files}
    own = [*(os.path.dirname(item.path) for item in missing), *(item.path for item in missing)]
    tree = Tree(Rules(own=own_folders(own)))
    found = {}
    for item in missing:
        path = tree.add(item.path, Reason(kind=Why.REPAIRED, detail=item.how))
        if path is not None and path not in known:
            found[path] = item.how
    new = tuple(_marked(file, found.get(file.path, "")) for file in tree.files() if file.path not in known)
    return Repaired(
        closure=_merged(closure, new, (), None),
        missing=tuple(Missing(path=path, how=how) for path, how in sorted(found.items())),
    )


def _marked(file: ClosureFile, how: str) -> ClosureFile:
    if file.kind is not FileKind.FILE:
        return file
    reason = Reason(kind=Why.REPAIRED, detail=how)
    return replace(file, reasons=(reason, *(other for other in file.reasons if other.kind is not Why.REPAIRED)))


def _merged(closure: Closure, new: Sequence[ClosureFile], exercises: Sequence[Exercise], seen: Closure | None) -> Closure:
    files = {file.path: file for file in (*new, *closure.files)}
    calls = merged([closure.system_calls, seen.system_calls]) if seen is not None else closure.system_calls
    return replace(
        closure,
        files=tuple(files[path] for path in sorted(files)),
        exercises=tuple(dict.fromkeys((*closure.exercises, *exercises))),
        system_calls=calls,
    )


def named_in(text: str, closure: Closure, interpreter: Interpreter | None) -> list[Missing]:
    """Return the files that an error's text names as missing and that are on this machine: paths, libraries, modules.

    interpreter: of the program, on this machine; None: modules are not looked for.
    """
    text = text[-MAX_TEXT_BYTES:]
    known = {file.path for file in closure.files}
    found: dict[str, str] = {}
    for match in (*_PATH.finditer(text), *_PATH_FIRST.finditer(text)):
        found.setdefault(match[1].strip(), f"named by: {_line(text, match.start())}")
    for match in _LIBRARY.finditer(text):
        for path in _library(match[1], known):
            found.setdefault(path, f"named by: {_line(text, match.start())}")
    for match in _MODULE.finditer(text) if interpreter is not None else ():
        assert interpreter is not None
        name = match[1] or f"{match[3]}.{match[2]}"
        for path in module_files(name, interpreter):
            found.setdefault(path, f"named by: {_line(text, match.start())}")
    return [Missing(path=path, how=how) for path, how in found.items() if os.path.lexists(path) and path not in known]


def _library(name: str, known: set[str]) -> list[str]:
    """Return where a library of this name lies: beside one that the closure has, or where the linker looks by itself."""
    folders = {os.path.dirname(path) for path in known if ".so" in os.path.basename(path)}
    return [path for folder in sorted(folders) if os.path.isfile(path := os.path.join(folder, name))][:1]


def _line(text: str, at: int) -> str:
    start, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    return text[start : end if end >= 0 else len(text)].strip()[:200]
