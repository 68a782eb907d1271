"""A run of an ordinary user: no right to cgroups or namespaces, a home with spaces and umlauts, another working directory.

As root the tests become `nobody` for it; they skip where no Python of this version can be read by that user.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

SOURCE = Path(__file__).parents[2] / "src"
NOBODY = {"user": 65534, "group": 65534, "extra_groups": ()} if os.geteuid() == 0 else {}
TINY = Path(__file__).parents[1] / "experiments" / "jobs" / "tiny.py"
JOB = """
[run]
name = "small"

[task]
command = ["python", "-c", "print('ready')"]
envelope = { cpus = 1, memory = "64MiB", slot = "30s" }

[train]
program = "tiny.py:Tiny"
shards = 2
max_rounds = 3
envelope = { cpus = 1, memory = "160MiB", slot = "30s", total = "60s" }
"""
TOO_LARGE = """
[run]
name = "large"

[task]
command = ["python", "-c", "x = bytearray({mib} << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(60)"]
envelope = {{ cpus = 1, memory = "64MiB", slot = "30s" }}
"""


def _python():
    """Return a command that runs this Python's packages as the user; None when the user can read no such Python."""
    packages = f"{SOURCE}:{sysconfig.get_path('purelib')}"
    for program in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        try:
            done = subprocess.run(
                [program, "-c", "import tenure, msgspec, onnx, onnxruntime"],
                env={"PYTHONPATH": packages, "PATH": os.defpath},
                cwd="/",
                capture_output=True,
                timeout=60,
                check=False,
                **NOBODY,
            )
        except OSError:
            continue
        if done.returncode == 0:
            return program, packages
    return None


@pytest.fixture(scope="module")
def tenure():
    """Give a function that runs `tenure` as the user, and the folder of the user."""
    if (found := _python()) is None:
        pytest.skip("no Python of this version, with its packages, can be read by the user nobody")
    program, packages = found
    top = Path(tempfile.mkdtemp(prefix="tu-"))
    top.chmod(0o1777)  # as /dev/shm is
    folder = top / "Größe & Maß ☃"
    folder.mkdir()
    shutil.copy(TINY, folder)
    (folder / "job.toml").write_text(JOB)
    (folder / "soon.toml").write_text(TOO_LARGE.format(mib=200))
    (folder / "far.toml").write_text(TOO_LARGE.format(mib=4000))
    (top / "shares.json").write_text("[]")
    (top / "shares.json").chmod(0o666)
    if NOBODY:
        for path in (folder, *folder.iterdir()):
            os.chown(path, 65534, 65534)
    env = {
        "PATH": f"{os.defpath}:/usr/sbin",
        "PYTHONPATH": packages,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        "TENURE_HOME": str(folder / "mein Zuhause"),
        "TENURE_SHARES_FILE": str(top / "shares.json"),
    }

    def run(*words):
        argv = [program, "-m", "tenure.cli", *map(str, words)]
        return subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True, timeout=100, check=False, **NOBODY)

    run.folder = folder
    yield run
    run("down")
    shutil.rmtree(top)


def test_a_task_and_a_training_run_to_their_end_and_say_how_bounds_are_held(tenure):
    done = tenure("run", tenure.folder / "job.toml")
    assert done.returncode == 0, done.stderr + done.stdout
    first = done.stdout.splitlines()[0]
    assert "node local: " in first
    if NOBODY:
        assert "rlimits and polling" in first
        assert "advisory" in first
        assert "Traceback" not in done.stderr
    [report] = (tenure.folder / "mein Zuhause").glob("runs/*/report/report.json")
    assert json.loads(report.read_text())


@pytest.mark.parametrize("job", ["soon.toml", "far.toml"])
def test_too_much_memory_is_told_as_such(tenure, job):
    done = tenure("run", tenure.folder / job)
    assert done.returncode == 1, done.stderr
    assert "out_of_memory" in done.stderr or job == "far.toml"
    assert "emory" in done.stderr


def test_the_doctor_finds_nothing_broken(tenure):
    done = tenure("doctor")
    assert done.returncode == 0, done.stdout
    assert "BROKEN" not in done.stdout


def test_a_home_of_another_user_is_refused_with_what_to_do(tenure, tmp_path):
    if not NOBODY:
        pytest.skip("only root can make what belongs to another user")
    foreign = tmp_path / "of-root"
    foreign.mkdir(mode=0o700)
    done = tenure("nodes", "--home", str(foreign / "home"))
    assert done.returncode == 2
    assert "Set TENURE_HOME to a folder you may write" in done.stderr
