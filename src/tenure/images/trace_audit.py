"""Watching a Python program from inside, where strace is not there: less is seen, and that is told.

A ``sitecustomize`` on the search path notes what every interpreter of the program opens, imports, loads, starts and connects to
(PEP 578). Files merely looked at are not told by any event, nor are system calls: the source of each bytecode file, what the
interpreter itself looks at when it starts, and what `imports` and `elf` find are put in instead.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tenure.closures import Why
from tenure.images.findings import Finding, Matter
from tenure.images.trace_read import Sighting, Watched

FOLDER_VARIABLE = "TENURE_AUDIT_DIR"
LESS = Finding(
    matter=Matter.TRACE,
    found="strace is not installed, or may not trace here: what is merely looked at, what programs do that are no Python, and "
    "system calls were not seen",
    means="the closure may lack files, and no seccomp profile can be made of it. Install strace and analyse again",
)
_HOOK = """
import os, sys

def _begin():
    folder = os.environ.get("TENURE_AUDIT_DIR")
    if not folder:
        return
    import json
    out = os.open(os.path.join(folder, "audit.%d" % os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(kind, value):
        if isinstance(value, bytes):
            value = os.fsdecode(value)
        if isinstance(value, (str, os.PathLike)):
            text = os.fspath(value)
            text = text if kind == "connect" else os.path.join(os.getcwd(), text)
            os.write(out, (json.dumps([kind, text]) + "\\n").encode("utf-8", "surrogateescape"))

    def hook(event, args):
        try:
            if event == "open":
                flags = args[2] if isinstance(args[2], int) else 0
                note("write" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "open", args[0])
            elif event == "import" and args[1]:
                note("open", args[1])
            elif event == "ctypes.dlopen" and args[0] and "/" in str(args[0]):
                note("open", args[0])
            elif event in ("os.listdir", "os.scandir"):
                note("stat", args[0] if args[0] is not None else ".")
            elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
                note("start", args[0])
            elif event == "socket.connect" and isinstance(args[1], tuple):
                note("connect", "%s:%s" % args[1][:2])
        except Exception:
            pass

    for module in list(sys.modules.values()):
        note("open", getattr(module, "__file__", None))
    note("exec", sys.executable)
    note("exec", getattr(sys, "_base_executable", None))
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix}:
        note("open", os.path.join(prefix, "pyvenv.cfg"))
    for folder in sys.path:
        note("path", folder or ".")
    note("path", os.path.dirname(os.__file__))
    sys.addaudithook(hook)

_begin()
sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
del sys.modules["sitecustomize"]
try:
    import sitecustomize  # the machine's own, which this one hides
except ImportError:
    sys.modules["sitecustomize"] = type(sys)("sitecustomize")
"""


def install(folder: Path) -> dict[str, str]:
    """Write the hook into a folder; return the environment that a program must find, PYTHONPATH to be put before its own."""
    place = folder / "hook"
    place.mkdir(parents=True, exist_ok=True)
    (place / "sitecustomize.py").write_text(_HOOK)
    return {FOLDER_VARIABLE: str(folder), "PYTHONPATH": str(place)}


def read_audit(folder: Path, watched: Watched) -> bool:
    """Add what the interpreters noted to `watched`; return whether any noted something."""
    seen = False
    for file in sorted(folder.glob("audit.*")):
        for kind, path in _notes(file):
            seen = True
            if not path.startswith(str(folder)):
                _take(watched, kind, path)
        file.unlink()
    return seen


def _notes(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        try:
            kind, path = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        yield kind, path


def _take(watched: Watched, kind: str, path: str) -> None:
    who = "the program"
    if kind == "connect":
        if not path.startswith(("127.", "::1:", "localhost:", "0.0.0.0:")):
            watched.connected.setdefault(path, who)
    elif kind == "start":
        watched.started.setdefault(path, who)
        watched.sightings.setdefault(Sighting(path, Why.EXECUTED, True), who)
    elif kind == "exec":
        watched.programs.append(path)
        watched.sightings.setdefault(Sighting(path, Why.EXECUTED, True), who)
    elif kind == "write":
        watched.changed.setdefault(path, who)
        if not any(Sighting(path, why, True) in watched.sightings for why in (Why.OPENED, Why.STATTED)):
            watched.made.add(path)
    elif kind == "path":
        watched.sightings.setdefault(Sighting(path, Why.STATTED, True), who)
        for each in (*glob.glob(os.path.join(glob.escape(path), "*.pth")), os.path.join(path, "lib-dynload")):
            watched.sightings.setdefault(Sighting(each, Why.OPENED, True), who)
    else:
        why = Why.STATTED if kind == "stat" else Why.OPENED
        watched.sightings.setdefault(Sighting(path, why, True), who)
        if source := _source(path):
            watched.sightings.setdefault(Sighting(source, Why.STATTED, True), who)


def _source(path: str) -> str:
    """Return the source of a file of bytecode, which Python looks at first; empty: it is none."""
    folder, name = os.path.split(path)
    if not name.endswith(".pyc") or os.path.basename(folder) != "__pycache__":
        return ""
    return os.path.join(os.path.dirname(folder), name.partition(".")[0] + ".py")
