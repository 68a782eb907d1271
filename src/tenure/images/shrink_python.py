"""Python's byte code in an image: compiled here, the same bytes every time, and the sources left out where nobody reads them.

A closure has sources only. First every module gets its code beside it, which an interpreter takes without looking at times
(PEP 552, unchecked): nothing in an image is compiled at its start, and none is written. Then, as a step, the code takes the
source's place: half of the files go.
Not for: interpreters of another version than this one (their modules are compiled when they start).
"""

from __future__ import annotations

import ast
import importlib.util
import marshal
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from tenure.images.tree import replace_file, walk

_CACHE = "__pycache__"
_UNCHECKED = 1
_DOCUMENTATION = ("/numpy/_core/_add_newdocs.py", "/numpy/_core/_add_newdocs_scalars.py")
"""Modules that do nothing but give documentation to what is written in C."""


def add_bytecode(tree: Path, version: str, *, leave: Collection[str] = ()) -> int:
    """Put each module's code beside its source; return how many were compiled.

    version: of the image's interpreter; another one than this gets nothing. leave: paths inside of programs, which are run
    from their source. A file that is no Python stays as it is.
    """
    if not speaks(version):
        return 0
    done = 0
    for inside, path in _sources(tree, leave):
        code = compiled(path.read_bytes(), inside)
        if code is not None:
            target = tree / importlib.util.cache_from_source(inside).lstrip("/")
            target.parent.mkdir(exist_ok=True)
            target.parent.chmod(0o755)
            replace_file(target, code)
            target.chmod(0o644)
            done += 1
    return done


def speaks(version: str) -> bool:
    """Return whether an interpreter of this version takes the code that this one compiles."""
    return version.split(".")[:2] == [str(part) for part in sys.version_info[:2]]


class DocStrings:
    """Compile modules again without the documentation of modules and functions; that of classes is read by dataclasses."""

    name = "documentation strings"

    def __init__(self, *, leave: Collection[str] = ()) -> None:
        """leave: as in `add_bytecode`."""
        self._leave = leave

    def apply(self, tree: Path) -> str:
        """See Step."""
        done = 0
        for inside, path in _sources(tree, self._leave):
            cached = tree / importlib.util.cache_from_source(inside).lstrip("/")
            source = b"" if inside.endswith(_DOCUMENTATION) else path.read_bytes()
            if cached.exists() and (code := compiled(source, inside, documented=False)) is not None:
                replace_file(cached, code)
                done += 1
        return "" if done else "no module has byte code here"


class Sources:
    """Put the code of modules in the place of their sources."""

    def __init__(self, *, below: str = "", but: Collection[str] = (), leave: Collection[str] = ()) -> None:
        """below: a part of their paths, such as ``/site-packages/numpy/``; empty: all. but: parts that none has."""
        self._below, self._but, self._leave = below, tuple(but), leave
        what = below.strip("/").rpartition("/")[2] or "modules"
        self.name = f"sources of {what}" + (
            f" other than {', '.join(part.strip('/').rpartition('/')[2] for part in but)}" if but else ""
        )

    def apply(self, tree: Path) -> str:
        """See Step."""
        moved = 0
        for inside, path in list(_sources(tree, self._leave)):
            if self._below not in inside or any(part in inside for part in self._but):
                continue
            cached = tree / importlib.util.cache_from_source(inside).lstrip("/")
            if cached.exists():
                os.replace(cached, path.with_suffix(".pyc"))
                path.unlink()
                moved += 1
        for folder, folders, files in os.walk(tree, topdown=False):
            if os.path.basename(folder) == _CACHE and not folders and not files:
                os.rmdir(folder)
        return "" if moved else "no module has byte code here"


def packages(tree: Path, *, least_bytes: int = 200_000) -> tuple[str, ...]:
    """Return the packages of a tree with so many bytes of sources, as parts of paths, largest first."""
    sizes: dict[str, int] = {}
    for inside, path in _sources(tree, ()):
        head, mark, rest = inside.rpartition("-packages/")
        if mark and "/" in rest:
            name = f"{head.rpartition('/')[2]}{mark}{rest.partition('/')[0]}/"
            sizes[f"/{name}"] = sizes.get(f"/{name}", 0) + path.stat().st_size
    return tuple(sorted((name for name, size in sizes.items() if size >= least_bytes), key=lambda name: -sizes[name]))


def _sources(tree: Path, leave: Collection[str]) -> Iterator[tuple[str, Path]]:
    for inside, path in walk(tree):
        if inside.endswith(".py") and inside not in leave and path.is_file() and not path.is_symlink():
            yield inside, path


def compiled(source: bytes, name: str, *, documented: bool = True) -> bytes | None:
    """Return the content of a module's .pyc, which depends on source, name and interpreter alone; None when it is no Python.

    documented: whether modules and functions keep their documentation strings.
    """
    try:
        text = source if documented else _undocumented(ast.parse(source, name))
        code = compile(text, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None
    head = importlib.util.MAGIC_NUMBER + _UNCHECKED.to_bytes(4, "little") + importlib.util.source_hash(source)
    return head + _marshalled(code)


def _undocumented(module: ast.Module) -> ast.Module:
    for node in ast.walk(module):
        if (
            isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            first = node.body[0]
            node.body[0] = ast.copy_location(ast.Pass(), first)
    return module


def _marshalled(code: CodeType) -> bytes:
    """Marshal code so that equal code gives equal bytes.

    marshal marks an object for later reference when anybody else holds it as well at that moment, so that its bytes tell
    what this interpreter did before. Here all are held by a list, and so all are marked. It also says of each string whether
    it is interned, and the strings of one letter are the interpreter's own, shared by all code: here they always are.
    Equal sets are one set or several, by what was interned before: here always one.
    """
    code = _with_shared_sets(code, {})
    held: list[Any] = []
    _hold(code, held)
    return marshal.dumps(code)


def _with_shared_sets(code: CodeType, known: dict[frozenset[str], frozenset[Any]]) -> CodeType:
    """Return the code with equal sets among its constants as one object; code that has none stays the same object."""

    def shared(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _with_shared_sets(value, known)
        return known.setdefault(frozenset(map(repr, value)), value) if isinstance(value, frozenset) else value

    constants = tuple(map(shared, code.co_consts))
    # By what is in it alone, not by whether this changes anything: a changed code object has its own tuples.
    settled = any(isinstance(new, frozenset) or new is not old for new, old in zip(constants, code.co_consts, strict=True))
    return code.replace(co_consts=constants) if settled else code


def _hold(value: Any, held: list[Any]) -> None:
    held.append(value)
    if isinstance(value, str) and len(value) <= 1:
        sys.intern(value)
    if isinstance(value, CodeType):
        for part in (value.co_names, value.co_varnames, value.co_cellvars, value.co_freevars, value.co_consts):
            held.extend(part)
        held.extend((value.co_names, value.co_consts, value.co_filename, value.co_name, value.co_qualname))
        held.extend((value.co_linetable, value.co_exceptiontable))
        for constant in value.co_consts:
            _hold(constant, held)
    elif isinstance(value, (tuple, frozenset)):
        for part in value:
            _hold(part, held)
