"""What Python adds to a closure: which interpreter runs the program, and what the program's sources import."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from tenure.closures import Reason, Why
from tenure.errors import Unavailable
from tenure.images.closure_tree import Tree
from tenure.images.findings import Finding, Matter
from tenure.images.imports import Interpreter, ask_interpreter, imported_files

_PYTHON = re.compile(r"(?:python|pypy)\d*(?:\.\d+)*$")


def interpreter_of(
    programs: Sequence[str], argv: Sequence[str], env: Mapping[str, str], workdir: str
) -> tuple[Interpreter | None, Finding | None]:
    """Return the Python among the programs that ran, the first of them; a finding when it can't be asked."""
    executable = next((path for path in programs if _PYTHON.fullmatch(os.path.basename(path))), None)
    if executable is None:
        return None, None
    script = next((word for word in argv[1:] if word.endswith(".py")), "")
    try:
        return ask_interpreter(executable, env=env, workdir=workdir, script=script), None
    except Unavailable as error:
        means = "only what ran is in the closure: what its sources import besides was not looked for"
        return None, Finding(matter=Matter.MODULE, found=str(error), means=means)


def add_imports(tree: Tree, interpreter: Interpreter, *, own_sources: bool) -> None:
    """Add what the program's own sources import, where asked for, and what CPython imports unasked."""
    known = frozenset(path for path in tree if path.endswith(".py"))
    sources = [path for path in sorted(known) if interpreter.is_own_source(path)] if own_sources else []
    for item in imported_files(sources, interpreter, known=known):
        for path in item.files:
            tree.add(path, Reason(kind=Why.IMPORTED, detail=item.by))
