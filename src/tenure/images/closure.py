"""From a program and what drives it to its closure: watched, analysed, merged, and what there is to say beside.

watch (trace, trace_read) ─► files that were there ─┐
Python sources (imports) ───────────────────────────┼─► tree: links followed, rules held ─► hashed ─► Closure
ELF objects (elf), #! lines ────────────────────────┘
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tenure.closures import Closure, Reason, SystemCall, Why
from tenure.errors import NotFound, SpecError
from tenure.images import closure_findings, closure_python, trace_audit
from tenure.images.closure_rules import Rules, own_folders
from tenure.images.closure_tree import Tree
from tenure.images.elf import ElfObject, find_library, read_elf
from tenure.images.findings import Finding, Matter, some
from tenure.images.imports import Interpreter
from tenure.images.strace import Record, StraceParser, parse
from tenure.images.system_calls import merged, system_calls
from tenure.images.trace import Bounds, Life, Lived, MissingStrace, find_strace, live
from tenure.images.trace_read import TraceReader, Watched

CARRIED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that a program gets from who analyses it, and that its image keeps; all others must be given."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
"""Set under watch, for an analysis leaves what it analyses as it is."""
_MAX_SCRIPTS = 4
"""Interpreters of interpreters followed, as in Linux."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is analysed."""

    argv: tuple[str, ...]
    workdir: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Given by intent, beside `CARRIED`."""
    add: tuple[str, ...] = ()
    """Files and folders that belong to it, whatever was seen."""
    lives: tuple[Life, ...] = ()
    """How it is run under watch; empty: once, as `argv` says, driven by nothing."""
    own_sources: bool = True
    """Whether what its own Python sources import is added, also where no exercise came by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """A closure, and what is to be known of it."""

    closure: Closure
    findings: tuple[Finding, ...]
    left_out: Mapping[str, str]
    """Path that the program named to why it is left out."""
    took_s: float


def analyse(
    program: Program, *, bounds: Bounds | None = None, say: Say = lambda _: None, trace_dir: Path | None = None
) -> Analysis:
    """Run a program under watch and return what it needs. Every process of it is gone afterwards.

    say: is told what goes on, a line at a time. trace_dir: folder in which the raw traces stay; None: they go.
    Raises NotFound, SpecError: it can't be started; MissingStrace; Refused: past a bound; JobFailed is never raised: a program
    that fails is a finding.
    """
    begun_s = time.monotonic()
    argv = (find_program(program.argv, program.workdir, _search_path(program.env)), *program.argv[1:])
    env = environment(program.env)
    lives = program.lives or (Life(argv=argv),)
    watched, lived = Watched(), []
    calls: list[tuple[SystemCall, ...]] = []
    with_strace = find_strace() is not None
    parser = StraceParser()
    with _folder(trace_dir) as folder:
        hook = {} if with_strace else _hook(folder, env)
        for number, life in enumerate(lives):
            say(f"watching {' '.join(life.argv)} ({number + 1} of {len(lives)})")
            trace = folder / f"trace.{number}" if with_strace else None
            run = Life(
                argv=(find_program(life.argv, program.workdir, env["PATH"]), *life.argv[1:]),
                drives=life.drives,
                stop_signal=life.stop_signal,
            )
            lived.append(live(run, env={**env, **hook}, workdir=program.workdir, trace=trace, bounds=bounds))
            if trace is None:
                _read_audit(folder, watched, run)
                continue
            reader = TraceReader(watched, program.workdir)
            with open(trace, encoding="utf-8", errors="surrogateescape") as lines:
                calls.append(system_calls(_through(parse(lines, parser), reader)))
    say("analysing libraries and modules")
    if not with_strace:
        lived[0] = replace(lived[0], findings=(trace_audit.LESS, *lived[0].findings))
    return _assemble(program, argv, env, watched, lived, merged(calls), parser, say, begun_s)


def find_program(argv: Sequence[str], workdir: str, search_path: str) -> str:
    """Return the absolute path of a command. Raises SpecError for none, NotFound."""
    if not argv or not argv[0]:
        raise SpecError("there is no program to analyse: give its command after --")
    if not os.path.isdir(workdir):
        raise NotFound(f"there is no folder {workdir} to start {argv[0]} in")
    found = shutil.which(os.path.join(workdir, argv[0]) if "/" in argv[0] else argv[0], path=search_path)
    if found is None:
        raise NotFound(f"there is no program {argv[0]!r} in {workdir if '/' in argv[0] else search_path}")
    path = os.path.join(workdir, found)
    return path if ".." in path.split("/") else os.path.normpath(path)  # before ".." there may be a link


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return what a program is started with: little that is this machine's, so that its image finds the same."""
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    base = {"PATH": _search_path(given), "HOME": os.path.expanduser("~"), "LANG": "C.UTF-8", _NO_BYTECODE: "1"}
    return {**base, **carried, **given}


def _search_path(given: Mapping[str, str]) -> str:
    return given.get("PATH") or os.environ.get("PATH") or _PATH


class _folder:
    """A folder for traces: the given one, made when missing, or one that goes."""

    def __init__(self, given: Path | None) -> None:
        self._given = given
        self._temporary = None if given else tempfile.TemporaryDirectory(prefix="tenure-trace-", ignore_cleanup_errors=True)

    def __enter__(self) -> Path:
        if self._temporary is not None:
            return Path(self._temporary.name)
        assert self._given is not None
        self._given.mkdir(parents=True, exist_ok=True)
        return self._given.absolute()

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()


def _hook(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return what a program must find in its environment to be watched from inside."""
    found = trace_audit.install(folder)
    return {**found, "PYTHONPATH": ":".join(filter(None, (found["PYTHONPATH"], env.get("PYTHONPATH", ""))))}


def _read_audit(folder: Path, watched: Watched, life: Life) -> None:
    if not trace_audit.read_audit(folder, watched):
        raise MissingStrace(f"{life.argv[0]} can't be watched: it is no Python that can be watched from inside, and ")


def _through(records: Iterator[Record], reader: TraceReader) -> Iterator[Record]:
    for record in records:
        reader.take(record)
        yield record


def _assemble(
    program: Program,
    argv: tuple[str, ...],
    env: Mapping[str, str],
    watched: Watched,
    lived: Sequence[Lived],
    calls: tuple[SystemCall, ...],
    parser: StraceParser,
    say: Say,
    begun_s: float,
) -> Analysis:
    findings = [finding for life in lived for finding in life.findings]
    interpreter, trouble = closure_python.interpreter_of(watched.programs, argv, env, program.workdir)
    findings += [trouble] if trouble else []
    rules = Rules(own=_own(program, argv, interpreter), home=env["HOME"])
    tree = Tree(rules)
    for sighting, who in watched.sightings.items():
        if not watched.was_made(sighting.path):
            tree.add(sighting.path, Reason(kind=sighting.why, detail=who), follows=sighting.follows)
    for path in dict.fromkeys(watched.programs):
        _add_script_interpreters(tree, path)
    if interpreter is not None:
        closure_python.add_imports(tree, interpreter, own_sources=program.own_sources)
    for path in program.add:
        add_all(tree, os.path.join(program.workdir, path), Why.ADDED)
    findings += add_libraries(tree, env.get("LD_LIBRARY_PATH", ""))
    say(f"hashing {sum(1 for _ in tree)} paths")
    files = tree.files()
    closure = Closure(
        program=argv,
        workdir=program.workdir,
        env=_kept_environment(program, env, [file.path for file in files]),
        machine=platform.machine(),
        python=interpreter.version if interpreter else "",
        exercises=tuple(exercise for life in lived for exercise in life.exercises),
        files=files,
        system_calls=calls,
        made_at_s=time.time(),
    )
    findings += closure_findings.findings(watched, tree.left_out, rules, parser.unread_count)
    return Analysis(
        closure=closure,
        findings=tuple(dict.fromkeys(findings)),
        left_out=dict(sorted(tree.left_out.items())),
        took_s=time.monotonic() - begun_s,
    )


def _kept_environment(program: Program, env: Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    """Return what the image starts with: nothing of this machine that no file of the closure gives a meaning to."""
    kept = {name: value for name, value in env.items() if name != _NO_BYTECODE}
    folders = {os.path.dirname(path) for path in paths}
    if "PATH" not in program.env:
        searched = (folder for folder in env["PATH"].split(":") if os.path.realpath(folder) in folders)
        kept["PATH"] = ":".join(dict.fromkeys(searched)) or _PATH
    if "HOME" not in program.env and not any(path.startswith(env["HOME"] + "/") for path in paths):
        del kept["HOME"]
    return dict(sorted({**kept, **program.env}.items()))


def _own(program: Program, argv: Sequence[str], interpreter: Interpreter | None) -> tuple[str, ...]:
    named = [
        os.path.join(program.workdir, word) for word in (*argv, *program.add, *(w for life in program.lives for w in life.argv))
    ]
    paths = [program.workdir, *(path for path in named if os.path.exists(path))]
    if interpreter is not None:
        paths += [*interpreter.path, interpreter.prefix, interpreter.base_prefix]
    return own_folders(paths)


def add_all(tree: Tree, path: str, why: Why) -> None:
    """Add a file, or a folder with all that is in it. The reason says where each lies here, as an image may move it.

    Raises NotFound.
    """
    if not os.path.lexists(path):
        raise NotFound(f"there is nothing at {path} to add")
    found = tree.add(path, Reason(kind=why, detail=os.path.realpath(path)))
    if found is not None and os.path.isdir(found):
        for folder, folders, files in os.walk(found):
            for inside in (os.path.join(folder, name) for name in (*folders, *files)):
                tree.add(inside, Reason(kind=why, detail=inside), follows=False)


def _add_script_interpreters(tree: Tree, path: str) -> None:
    """Add what the kernel itself reads to execute a file: no call tells of it."""
    for _ in range(_MAX_SCRIPTS):
        try:
            with open(path, "rb") as file:
                line = file.readline(256)
        except OSError:
            return
        if not line.startswith(b"#!"):
            return
        words = os.fsdecode(line[2:]).split()
        if not words:
            return
        tree.add(words[0], Reason(kind=Why.EXECUTED, detail=f"interpreter of {path}"))
        path = words[0]


def add_libraries(tree: Tree, library_path: str) -> list[Finding]:
    """Add what the ELF objects of the tree need and what those need; return what is nowhere."""
    objects = {path: item for path in tree if (item := _object(path)) is not None}
    run_paths = tuple(
        dict.fromkeys(folder for item in objects.values() if item.interpreter for folder in (*item.rpath, *item.runpath))
    )
    search = tuple(folder for folder in re.split("[:;]", library_path) if folder)
    names = {os.path.basename(path) for path in objects} | {item.soname for item in objects.values()}
    waiting = list(objects.values())
    missing: dict[str, str] = {}
    while waiting:
        item = waiting.pop()
        wanted = [item.interpreter] if item.interpreter else []
        wanted += [name for name in item.needed if os.path.basename(name) not in names]
        wanted += (
            ["libgcc_s.so.1"] if item.soname == "libc.so.6" and "libgcc_s.so.1" not in names else []
        )  # glibc loads it late
        for name in wanted:
            found = find_library(name, item, library_path=search, more=run_paths)
            if found is None:
                if name in item.needed:
                    missing.setdefault(name, item.path)
                continue
            if found.by_cache and not tree.rules.keep_linker_cache:
                tree.rules = Rules(tree.rules.own, tree.rules.home, keep_linker_cache=True)
                tree.add("/etc/ld.so.cache", Reason(kind=Why.NEEDED, detail=f"to find {name}"))
            real = tree.add(found.path, Reason(kind=Why.NEEDED, detail=item.path))
            names |= {os.path.basename(name)}
            if real is not None and real not in objects and (more := _object(real)) is not None:
                objects[real] = more
                names |= {more.soname, os.path.basename(real)}
                waiting.append(more)
    if not missing:
        return []
    named = some([f"{name} (of {os.path.basename(path)})" for name, path in sorted(missing.items())])
    means = "what needs them fails when it is loaded, here as in the image; an optional part may never be"
    return [Finding(matter=Matter.LIBRARY, found=f"libraries that are nowhere: {named}", means=means)]


def _object(path: str) -> ElfObject | None:
    if path.endswith((".py", ".pyc", ".txt", ".json")):
        return None
    return read_elf(path) if os.path.isfile(path) and not os.path.islink(path) else None
