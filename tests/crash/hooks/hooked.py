"""Hooks around every effect that a process of the system under test has on the world, installed from outside.

An effect counts when a frame of the package stands on the stack. Each is met twice, before and after it happened. A *point* is
``role|kind|before or after|where``, where: the two innermost frames of the package. Each hit is one line of the run's trace.
The plan (a JSON file named by TENURE_CRASH) says at which hit of which point the process ends itself by SIGKILL, and what else
is to go wrong. Standard library only, and nothing of the package: it must not know.

    trace      file to append hits to               source   folder of the package
    kills      [{"point", "n", "late_s", "how"}]: the k-th is armed once the ones before it have fired; n counts from then, over
               all processes. late_s: what was about to be sent still arrives, that much later, from beyond the grave.
               how: ``kill``; ``cut``: the stream that was about to be written to is closed instead; ``stall``: the process
               stands still for STALL_S instead
    fsync_s    every fsync and commit takes this much longer
    control    ``answer_first``: the broker answers before its changes are on disk; ``no_fence``: no agent checks fences
"""

import builtins
import contextlib
import fcntl
import importlib.abc
import importlib.machinery
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time

_fork, _kill, _write, _open, _close = os.fork, os.kill, os.write, os.open, os.close
_lseek, _exists, _closerange, _pid = os.lseek, os.path.exists, os.closerange, os.getpid
_FORKED = {"forkserver": "shim", "shim": "job"}
_PLUMBING = {"ledger/store.py", "ledger/dialect.py"}
STALL_S = 2.0
_OP = re.compile(rb'"(?:op|note)":"(\w+)"')


class Hooks:
    """The state of one process."""

    def __init__(self, plan_path):
        with open(plan_path) as stream:
            self.plan = json.load(stream)
        self.role = _role(sys.orig_argv)
        self.source = self.plan["source"].rstrip("/") + "/"
        self.kills = list(enumerate(self.plan.get("kills", ())))
        self.fired = self.plan["trace"] + ".fired"
        self.trace = -1
        self.pid = 0
        self.settle_in()

    def settle_in(self):
        """Open the trace; after a fork anew, because shims close what they inherit."""
        self.pid = _pid()

    def note(self, text):
        """Append one line to the trace."""
        fd = _open(self.plan["trace"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, f"{time.clock_gettime(time.CLOCK_BOOTTIME):.6f} {_pid()} {text}\n".encode())
        finally:
            _close(fd)

    def where(self):
        """Return the two innermost frames of the package; empty when there is none."""
        frame, found, plumbing = sys._getframe(2), [], ""
        while frame is not None and len(found) < 2:
            code = frame.f_code
            if code.co_filename.startswith(self.source):
                place = code.co_filename[len(self.source) :]
                text = f"{place}:{code.co_name}:{frame.f_lineno}"
                if place in _PLUMBING or code.co_name == "transaction":
                    plumbing = plumbing or text
                else:
                    found.append(text)
            frame = frame.f_back
        return "<".join(found) or plumbing

    def asked(self):
        """Return the operation that is being answered, where a server's `_answer` stands on the stack."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name == "_answer" and frame.f_code.co_filename.startswith(self.source):
                return str(frame.f_locals.get("name", ""))
            frame = frame.f_back
        return ""

    def hit(self, kind, phase, where, late=None):
        """Note a hit, and die when it is the one."""
        point = f"{self.role}|{kind}|{phase}|{where}"
        self.note(point)
        for number, kill in self.kills:
            if kill["point"] != point or (number and not _exists(f"{self.fired}.{number - 1}")):
                continue
            fd = _open(f"{self.fired}.{number}.count", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _write(fd, b".")
            count = _lseek(fd, 0, os.SEEK_CUR)
            _close(fd)
            if count == kill["n"]:
                _close(_open(f"{self.fired}.{number}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
                self.note(f"FIRED {number} {kill['how']} {point}")
                if kill["how"] == "cut":
                    with contextlib.suppress(OSError):
                        late[0].shutdown(socket.SHUT_RDWR)
                    continue
                if kill["how"] == "stall":
                    _stand_still()
                    continue
                if late is not None and kill["late_s"]:
                    _send_late(*late, kill["late_s"])
                _kill(_pid(), signal.SIGKILL)


def _role(argv):
    text = " ".join(argv[1:])
    for word, role in (
        ("-m tenure.broker", "broker"),
        ("-m tenure.agent", "agent"),
        ("forkserver import main", "forkserver"),
        ("scenario.py", "client"),
    ):
        if word in text:
            return role
    return "other"


def _send_late(connection, data, late_s):
    """Leave a process behind that holds nothing but the connection, and sends what its dead parent had meant to."""
    fd = connection.fileno()
    if _fork():
        return
    try:
        os.setsid()
        _closerange(0, fd)
        _closerange(fd + 1, 4096)
        time.sleep(late_s)
        _write(fd, data)
        time.sleep(0.5)
    finally:
        os._exit(0)


def _stand_still():
    """Stop the whole process, all its threads, and have a child that holds nothing of it set it going again."""
    process = _pid()
    if _fork() == 0:
        try:
            os.setsid()
            _closerange(0, 4096)
            time.sleep(STALL_S)
            _kill(process, signal.SIGCONT)
        finally:
            os._exit(0)
    _kill(process, signal.SIGSTOP)


def _around(hooks, kind, function, *, slow_s=0.0, wanted=None):
    def hooked(*args, **kwargs):
        where = hooks.where() if wanted is None or wanted(*args, **kwargs) else ""
        if not where:
            return function(*args, **kwargs)
        hooks.hit(kind, "before", where)
        if slow_s:
            time.sleep(slow_s)
        result = function(*args, **kwargs)
        hooks.hit(kind, "after", where)
        return result

    hooked.__wrapped__ = function
    hooked.__name__ = getattr(function, "__name__", kind)
    return hooked


def _replace(hooks, holder, name, kind, **options):
    function = getattr(holder, name)
    hooked = _around(hooks, kind, function, **options)
    for group in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks, os.supports_effective_ids):
        if function in group:
            group.add(hooked)
    setattr(holder, name, hooked)


def _opens_for_writing(_path, flags=0, *_args, **_kwargs):
    return bool(flags & (os.O_CREAT | os.O_TRUNC))


def _file_for_writing(_path, mode="r", *_args, **_kwargs):
    return isinstance(mode, str) and any(letter in mode for letter in "wax+")


def _hook_files(hooks):
    slow_s = hooks.plan.get("fsync_s", 0.0)
    for name in ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate"):
        _replace(hooks, os, name, name)
    for name in ("write", "pwrite"):
        _replace(hooks, os, name, "write")
    for name in ("fsync", "fdatasync"):
        _replace(hooks, os, name, "fsync", slow_s=slow_s)
    _replace(hooks, os, "open", "open", wanted=_opens_for_writing)
    _replace(hooks, fcntl, "flock", "lock")
    opened = _around(hooks, "open", io.open, wanted=_file_for_writing)
    builtins.open = io.open = opened


def _hook_processes(hooks):
    for name in ("fork", "posix_spawn", "execvpe"):
        _replace(hooks, os, name, "exec" if name == "execvpe" else "start")
    for name in ("kill", "killpg"):
        _replace(hooks, os, name, "signal")
    _replace(hooks, signal, "pidfd_send_signal", "signal")
    _replace(hooks, subprocess.Popen, "__init__", "start")

    def forked():
        hooks.role = _FORKED.get(hooks.role, hooks.role)
        hooks.settle_in()

    os.register_at_fork(after_in_child=forked)


def _hook_messages(hooks):
    def around(name, function):
        def hooked(self, data, *args, **kwargs):
            where = hooks.where()
            if not where:
                return function(self, data, *args, **kwargs)
            whole = data if isinstance(data, (bytes, bytearray, memoryview)) else b"".join(data)
            if len(whole) == 1 and hooks.role in ("broker", "agent", "client"):
                return function(self, data, *args, **kwargs)  # an event loop waking itself: nobody outside sees it
            found = _OP.search(bytes(whole[:400]))
            what = found.group(1).decode() if found else ""
            if not what and (asked := hooks.asked()):
                what = f"answer {asked}"
            kind = f"send {what}".rstrip()
            hooks.hit(kind, "before", where, late=(self, bytes(whole)))
            result = function(self, data, *args, **kwargs)
            hooks.hit(kind, "after", where)
            return result

        hooked.__name__ = name
        return hooked

    for name in ("send", "sendall", "sendmsg"):
        setattr(socket.socket, name, around(name, getattr(socket.socket, name)))


def _hook_ledger(hooks):
    slow_s = hooks.plan.get("fsync_s", 0.0)

    class Cursor(sqlite3.Cursor):
        def execute(self, sql, *args):
            word = sql.lstrip()[:8].upper()
            if word.startswith("COMMIT"):
                return self.connection.committed(lambda: super(Cursor, self).execute(sql, *args))
            result = super().execute(sql, *args)
            if word.startswith("RELEASE") and (where := hooks.where()):
                self.connection.parts.append(where)
                hooks.hit("part", "after", where)
            return result

    class Connection(sqlite3.Connection):
        changes = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.parts = []

        def cursor(self, *_args):
            return super().cursor(Cursor)

        def committed(self, work):
            changed, self.changes = self.total_changes != self.changes, self.total_changes
            where = hooks.where() if self.in_transaction and changed else ""
            if not where:
                return work()
            # Many parts go to disk together: the point is named after the one that began the batch.
            where, self.parts = (self.parts or [where])[0], []
            hooks.hit("commit", "before", where)
            if slow_s:
                time.sleep(slow_s)
            result = work()
            hooks.hit("commit", "after", where)
            return result

        def commit(self):
            self.committed(super().commit)

    def connect(*args, **kwargs):
        kwargs.setdefault("factory", Connection)
        return real_connect(*args, **kwargs)

    real_connect = sqlite3.connect
    sqlite3.connect = sqlite3.dbapi2.connect = connect


def _never(*_args, **_kwargs):
    return None


async def _at_once(_self):
    return None


_REMOVED = {
    "answer_first": {"tenure.broker.book": [("Book", "durable", _at_once)]},
    "no_fence": {
        "tenure.agent.node": [("Agent", "_check_broker", _never)],
        "tenure.runtimes.shimmed": [("", "check_fence", _never)],
    },
}
"""Control -> module -> what is taken out of it once it is loaded: (class or none, name, what stands there instead)."""


def _take_out(removed):
    """Load the named modules as ever, then take the named checks out of them."""

    class Loader(importlib.abc.Loader):
        def __init__(self, loader):
            self.loader = loader

        def create_module(self, spec):
            return self.loader.create_module(spec)

        def exec_module(self, module):
            self.loader.exec_module(module)
            for holder, name, instead in removed[module.__name__]:
                place = getattr(module, holder) if holder else module
                if not hasattr(place, name):
                    raise SystemExit(f"the control cannot take {name} out of {module.__name__}: it is not there")
                setattr(place, name, instead)

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in removed else None
            if spec is not None:
                spec.loader = Loader(spec.loader)
            return spec

    sys.meta_path.insert(0, Finder())


def install(plan_path):
    """Hook this process, and all it forks."""
    hooks = Hooks(plan_path)
    if hooks.role == "other":
        return
    if hooks.plan.get("control"):
        _take_out(_REMOVED[hooks.plan["control"]])
    _hook_files(hooks)
    _hook_processes(hooks)
    _hook_messages(hooks)
    _hook_ledger(hooks)
