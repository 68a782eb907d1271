"""Real programs under watch: their closure runs alone, and what they do that an image can't carry is told."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tenure.closures import FileKind, Why
from tenure.errors import NotFound, Refused, SpecError
from tenure.images import closure
from tenure.images.closure import Program, analyse, find_program
from tenure.images.findings import Matter
from tenure.images.trace import Bounds, Drive, Life, MissingStrace, find_strace

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_strace() is None, reason="needs strace, and the right to trace"),
]
SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/lazy":
            import lazily
        self.send_response(200)
        self.end_headers()
        self.wfile.write(open("data.txt", "rb").read())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", 0), Handler).serve_forever()
"""


def analysed(folder, source, *, lives=(), **fields):
    (folder / "main.py").write_text(source)
    argv = (sys.executable, "main.py")
    lives = tuple(Life(argv=argv, **life) for life in lives)
    return analyse(Program(argv=argv, workdir=str(folder), lives=lives, **fields), bounds=Bounds(total_s=60))


def reasons(analysis, path):
    file = analysis.closure.file(os.path.realpath(path))
    return {reason.kind for reason in file.reasons} if file else set()


def matters(analysis):
    return {finding.matter: finding.found for finding in analysis.findings}


def lay_out(closure, root):
    for file in closure.files:
        place = Path(f"{root}{file.path}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.kind is FileKind.DIRECTORY:
            place.mkdir(exist_ok=True)
        elif file.kind is FileKind.SYMLINK:
            place.symlink_to(file.target)
        else:
            shutil.copy(file.path, place)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for chroot")
def test_a_program_runs_from_its_closure_alone_and_from_files_merely_opened_it_does_not(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/helper.py").write_text("WORD = 'answered'\n")
    found = analysed(tmp_path / "app", "import json, helper\nprint(json.dumps(helper.WORD))\n")
    lay_out(found.closure, tmp_path / "whole")
    run = [
        shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin"),
        "{}",
        *found.closure.program[:1],
        f"{tmp_path}/app/main.py",
    ]

    def ran(root):
        return subprocess.run(
            [word.format(root) for word in run], capture_output=True, text=True, timeout=60, env=dict(found.closure.env)
        )

    assert ran(tmp_path / "whole").stdout == '"answered"\n'
    for file in found.closure.files:
        if file.kind is FileKind.FILE and {reason.kind for reason in file.reasons} == {Why.STATTED}:
            os.unlink(f"{tmp_path}/whole{file.path}")
    assert ran(tmp_path / "whole").returncode != 0


def test_a_server_is_driven_by_its_exercises_and_stopped(tmp_path):
    (tmp_path / "data.txt").write_text("data")
    (tmp_path / "lazily.py").write_text("")
    get = "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/lazy' % os.environ['TENURE_PORT']).read()"
    fetch = f'{sys.executable} -c "{get}"'
    found = analysed(tmp_path, SERVER, lives=[{"drives": (Drive(command=fetch),)}])
    assert [exercise.exit_code for exercise in found.closure.exercises] == [0]
    assert reasons(found, tmp_path / "data.txt") == {Why.OPENED}
    assert reasons(found, tmp_path / "lazily.py")
    assert Matter.EXERCISE not in matters(found)
    assert {"accept4", "bind", "listen"} <= {call.name for call in found.closure.system_calls}
    bind = next(call for call in found.closure.system_calls if call.name == "socket")
    assert "AF_INET" in bind.flags


def test_what_no_exercise_reached_of_the_programs_own_imports_is_there_all_the_same(tmp_path):
    (tmp_path / "data.txt").write_text("data")
    (tmp_path / "lazily.py").write_text("import csv\n")
    found = analysed(tmp_path, SERVER)
    assert reasons(found, tmp_path / "lazily.py") == {Why.IMPORTED}
    assert any(file.path.endswith("/csv.py") for file in found.closure.files)
    assert not reasons(found, tmp_path / "data.txt")
    assert "nothing drove it" in matters(found)[Matter.EXERCISE]


def test_a_failing_exercise_and_a_program_that_ends_too_early_are_told(tmp_path):
    (tmp_path / "data.txt").write_text("data")
    found = analysed(tmp_path, SERVER, lives=[{"drives": (Drive(command="echo no such page; exit 3"),)}])
    assert found.closure.exercises[0].exit_code == 3
    assert "no such page" in str(found.findings)
    early = analysed(tmp_path, "raise SystemExit('bad model')", lives=[{"drives": (Drive(command="true"),)}])
    assert "ended with 1 before exercise" in matters(early)[Matter.EXERCISE]
    assert "bad model" in str(early.findings)


def test_starting_programs_writing_outside_and_secrets_are_findings(tmp_path):
    (tmp_path / ".env").write_text("TOKEN=x")
    (tmp_path / "lib.sh").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "lib.sh").chmod(0o755)
    source = """
import subprocess, pathlib, tempfile
open(".env").read()
subprocess.run(["./lib.sh"], check=True)
pathlib.Path("/var/lib/tenure-test-log").write_text("x")
pathlib.Path("/var/lib/tenure-test-log").unlink()
"""
    if not os.access("/var/lib", os.W_OK):
        source = source.replace("/var/lib/tenure-test-log", "written")
    found = analysed(tmp_path, source)
    told = matters(found)
    assert "lib.sh" in told[Matter.STARTS]
    assert find_program(("./lib.sh",), str(tmp_path), "/bin") == f"{tmp_path}/lib.sh"
    assert Matter.SECRET in told
    assert ".env" not in {os.path.basename(file.path) for file in found.closure.files}
    assert reasons(found, "/bin/sh") == {Why.EXECUTED}  # the kernel read it: no call tells
    assert ("written" in str(found.findings)) or ("tenure-test-log" in told[Matter.WRITES])


def test_what_the_program_makes_is_not_in_its_closure_and_added_files_are(tmp_path):
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra/table.csv").write_text("1")
    found = analysed(tmp_path, "open('out.txt', 'w').write('x'); open('out.txt').read()", add=("extra",))
    assert not reasons(found, tmp_path / "out.txt")
    assert reasons(found, tmp_path / "extra/table.csv") == {Why.ADDED}


def test_two_analyses_give_the_same_closure(tmp_path):
    one, two = (analysed(tmp_path, "import json") for _ in range(2))
    assert one.closure.hash == two.closure.hash
    assert not any("__pycache__" in file.path for file in one.closure.files)


def test_little_of_this_machine_is_in_what_the_image_starts_with(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/nowhere/bin")
    found = analysed(tmp_path, "import os; assert 'AWS_SECRET_ACCESS_KEY' not in os.environ, 1", env={"MODE": "fast"})
    assert found.closure.exercises[0].exit_code == 0
    assert found.closure.env["MODE"] == "fast"
    assert "/nowhere/bin" not in found.closure.env["PATH"]


def test_a_program_past_its_bound_is_ended_with_all_it_started(tmp_path):
    (tmp_path / "main.py").write_text("import subprocess\nsubprocess.run(['sleep', '4711'])")
    program = Program(argv=(sys.executable, "main.py"), workdir=str(tmp_path))
    with pytest.raises(Refused, match="longer than"):
        analyse(program, bounds=Bounds(total_s=2))
    assert "4711" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_what_outlives_the_program_is_told_and_ended(tmp_path):
    source = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(4712)
    os._exit(0)
os.wait()
"""
    (tmp_path / "main.py").write_text(source)
    program = Program(argv=(sys.executable, "main.py"), workdir=str(tmp_path))
    found = analyse(program, bounds=Bounds(grace_s=1, total_s=60))
    assert "left processes behind: python" in matters(found)[Matter.STARTS]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in left.splitlines() if line.endswith(f"{sys.executable} main.py")]


def test_a_server_that_ignores_its_stop_signal_is_killed_and_that_is_told(tmp_path):
    (tmp_path / "main.py").write_text(SERVER.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN"))
    argv = (sys.executable, "main.py")
    life = Life(argv=argv, drives=(Drive(command="true"),), stop_signal=signal.SIGTERM)
    found = analyse(Program(argv=argv, workdir=str(tmp_path), lives=(life,)), bounds=Bounds(grace_s=1))
    assert "did not end" in matters(found)[Matter.EXERCISE]


def test_what_cannot_be_started_is_told_before_anything_is(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="no-such-program"):
        analyse(Program(argv=("no-such-program",), workdir=str(tmp_path)))
    with pytest.raises(SpecError, match="no program"):
        analyse(Program(argv=(), workdir=str(tmp_path)))
    with pytest.raises(NotFound, match="no folder"):
        analyse(Program(argv=("true",), workdir=str(tmp_path / "x")))
    with pytest.raises(NotFound, match="to add"):
        analyse(Program(argv=("true",), workdir=str(tmp_path), add=("x",)))


@pytest.fixture
def no_strace(monkeypatch):
    monkeypatch.setattr(closure, "find_strace", lambda: None)


def test_without_strace_a_python_program_is_watched_from_inside_and_the_closure_says_so(tmp_path, no_strace):
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "data.txt").write_text("x")
    found = analysed(tmp_path, "import json, helper, ctypes\nopen('data.txt').read()\nopen('made.txt', 'w')\n")
    assert found.closure.exercises[0].exit_code == 0
    assert reasons(found, tmp_path / "data.txt") == {Why.OPENED}
    assert reasons(found, tmp_path / "helper.py")
    assert not reasons(found, tmp_path / "made.txt")
    assert "not installed" in matters(found)[Matter.TRACE]
    assert found.closure.system_calls == ()
    assert not any("tenure-trace" in file.path for file in found.closure.files)
    assert "tenure-trace" not in str(found.closure.env)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for chroot")
def test_a_closure_made_without_strace_runs_alone_too(tmp_path, no_strace):
    found = analysed(tmp_path, "import json, decimal, ctypes\nprint(decimal.Decimal(json.loads('2')) / 4)\n")
    lay_out(found.closure, tmp_path / "whole")
    chroot = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin")
    run = [chroot, str(tmp_path / "whole"), found.closure.program[0], str(tmp_path / "main.py")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, env=dict(found.closure.env))
    assert done.stdout == "0.5\n", done.stderr


def test_without_strace_what_is_no_python_is_refused(tmp_path, no_strace):
    with pytest.raises(MissingStrace, match=r"no Python.*apt-get install strace"):
        analyse(Program(argv=("true",), workdir=str(tmp_path)))
