"""What a program's own Python sources import, also where no run came by: inside functions, in branches, lazily.

Only the program's own sources are read whole. Of what they import, what is imported when a module is loaded is followed; what
a library imports inside its functions is not, or every optional dependency of every library would be part of every closure.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tenure.errors import Unavailable

UNASKED = (
    *("traceback", "linecache", "tokenize", "token", "textwrap", "contextlib", "warnings", "_strptime", "calendar"),
    *("encodings.ascii", "encodings.latin_1", "encodings.utf_8", "encodings.idna", "encodings.cp437", "stringprep"),
    *("encodings.utf_8_sig", "encodings.utf_16", "encodings.utf_32", "unicodedata", "signal", "atexit", "faulthandler"),
)
"""Modules of the standard library that CPython imports by itself when something out of the ordinary happens."""
_ASK_TIMEOUT_S = 60.0
_ASK = (
    "import sys, json, sysconfig, importlib.machinery as m; "
    "print(json.dumps([sys.path, m.all_suffixes(), sysconfig.get_paths()['stdlib'], '%d.%d.%d' % sys.version_info[:3], "
    "sys.prefix, sys.base_prefix, sorted(sys.builtin_module_names)]))"
)


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that runs a program, as it says itself."""

    path: tuple[str, ...]
    """Its module search path."""
    suffixes: tuple[str, ...]
    """Of module files."""
    stdlib: str
    version: str
    prefix: str
    base_prefix: str
    builtin: frozenset[str]

    def is_own_source(self, path: str) -> bool:
        """Whether a file is a source of the program itself, not of a library or of Python."""
        return (
            path.endswith(".py")
            and "/site-packages/" not in path
            and "/dist-packages/" not in path
            and not path.startswith(os.path.realpath(self.stdlib) + "/")
        )


def ask_interpreter(executable: str, *, env: Mapping[str, str], workdir: str, script: str = "") -> Interpreter:
    """Return what an interpreter says of itself. script: the program's file; its folder leads the search path.

    Raises Unavailable when it does not answer.
    """
    try:
        done = subprocess.run(
            [executable, "-c", _ASK], env=dict(env), cwd=workdir, capture_output=True, timeout=_ASK_TIMEOUT_S, check=True
        )
        path, suffixes, stdlib, version, prefix, base, builtin = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise Unavailable(f"{executable} did not say where it looks for modules: {error}") from error
    own = os.path.dirname(os.path.realpath(os.path.join(workdir, script))) if script else workdir
    folders = (own, *(os.path.join(workdir, folder) for folder in path if folder))
    return Interpreter(tuple(dict.fromkeys(folders)), tuple(suffixes), stdlib, version, prefix, base, frozenset(builtin))


@dataclass(frozen=True, slots=True)
class Imported:
    """A module's files, found because somebody imports it."""

    module: str
    files: tuple[str, ...]
    """The file, and those of the packages above it."""
    by: str
    """The module or file that imports it."""


def imported_files(sources: Sequence[str], interpreter: Interpreter, *, known: frozenset[str] = frozenset()) -> list[Imported]:
    """Return what the program's own `sources` import and, of that, what loading it imports; each module once.

    known: files that are there already: they were loaded under an exercise, and what loading them imports with them.
    """
    found: dict[str, Imported] = {}
    waiting = [(path, name, True) for path in sources for name in _imports(path, "", everywhere=True)]
    waiting += [("the interpreter", name, False) for name in UNASKED]
    while waiting:
        by, name, _ = waiting.pop()
        if name in found or name in interpreter.builtin:
            continue
        files = module_files(name, interpreter)
        if not files:
            continue
        found[name] = Imported(name, files, by)
        last = files[-1]
        if last.endswith(".py") and last not in known and last not in sources:
            package = name if os.path.basename(last) == "__init__.py" else name.rpartition(".")[0]
            waiting += [(name, other, False) for other in _imports(last, package, everywhere=False)]
    return [item for _, item in sorted(found.items())]


def module_files(name: str, interpreter: Interpreter) -> tuple[str, ...]:
    """Return the files of a module and of the packages above it, outermost first; empty: it is not there, or built in."""
    folders: Sequence[str] = interpreter.path
    files: list[str] = []
    for part in name.split("."):
        place = _place(part, folders, interpreter.suffixes)
        if place is None:
            return ()
        file, folders = place
        files += [file] if file else []
    return tuple(files)


def _place(part: str, folders: Sequence[str], suffixes: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return a module's file and where its submodules lie; the file is empty for a namespace package."""
    spaces = []
    for folder in folders:
        base = os.path.join(folder, part)
        if os.path.isdir(base):
            for suffix in suffixes:
                if os.path.isfile(file := os.path.join(base, "__init__" + suffix)):
                    return file, [base]
            spaces.append(base)
        for suffix in suffixes:
            if os.path.isfile(file := base + suffix):
                return file, []
    return ("", spaces) if spaces else None


def _imports(path: str, package: str, *, everywhere: bool) -> list[str]:
    """Return the modules that a source names, also those that ``from a import b`` may mean; none if it can't be parsed."""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    names: dict[str, None] = {}
    for node in _walk(tree, everywhere):
        if isinstance(node, ast.Import):
            names.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            if base is not None:
                names.update(dict.fromkeys([base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*")]))
        elif (literal := _import_module(node)) is not None:
            names[literal] = None
    return [name for name in names if name]


def _walk(node: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (inner for part in child.orelse for inner in (part, *_walk(part, everywhere)))
            continue
        if not everywhere and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _walk(child, everywhere)


def _absolute(node: ast.ImportFrom, package: str) -> str | None:
    if not node.level:
        return node.module
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
    return ".".join([*above, *([node.module] if node.module else [])]) if above else None


def _import_module(node: ast.AST) -> str | None:
    """Return the module of ``importlib.import_module("x")`` and ``__import__("x")``."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return None
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    value = node.args[0].value
    return value if called in ("import_module", "__import__") and isinstance(value, str) and not value.startswith(".") else None
