"""Several agents on one machine, for one user and for two: real brokers and agents, with shares of this test's own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tenure.meter.machine import capacity

from .test_unprivileged import NOBODY, _python

pytestmark = pytest.mark.real
WHOLE = capacity(Path("/"))


def command(*argv):
    return [sys.executable, "-m", "tenure.cli", *map(str, argv)]


@pytest.fixture
def tenure(tmp_path):
    """Give a function that runs the command in a home and with shares of this test's own; afterwards the home is down."""
    home = tmp_path / "home"
    env = {**os.environ, "TENURE_HOME": str(home), "TENURE_SHARES_FILE": str(tmp_path / "shares.json")}

    def call(*argv, code=0):
        done = subprocess.run(command(*argv), env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    call.home = home
    yield call
    subprocess.run(command("down"), env=env, capture_output=True, timeout=60, check=False)


def nodes(tenure):
    return {node["name"]: node for node in json.loads(tenure("nodes", "--json").stdout)}


def kill_broker(home):
    pid = int((home / "broker.lock").read_text())
    os.kill(pid, signal.SIGKILL)
    end_s = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]:
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_nodes_are_added_outlive_the_brokers_death_and_are_taken_out(tenure):
    part = WHOLE.cpus / 4
    (a,) = json.loads(tenure("up", "--node", "a", "--cpus", part, "--json").stdout)
    assert a["capacity"]["cpus"] == part
    assert a["capacity"]["memory_bytes"] == WHOLE.memory_bytes // 4
    tenure("up", "--node", "b", "--memory", f"{WHOLE.memory_bytes // 4}B")
    assert tenure("up", "--node", "b").stdout.splitlines()[1].startswith("b     up")

    refused = tenure("up", "--node", "c", "--cpus", WHOLE.cpus * 0.75, code=3)
    assert "node a of " in refused.stderr
    assert "node b of " in refused.stderr
    conflict = tenure("up", "--node", "a", "--cpus", part / 2, code=5)
    assert "tenure down --node a" in conflict.stderr

    kill_broker(tenure.home)
    found = nodes(tenure)
    assert {name: node["state"] for name, node in found.items()} == {"a": "up", "b": "up"}
    assert found["b"]["capacity"]["cpus"] == pytest.approx(part)

    tenure("down", "--node", "b")
    assert set(nodes(tenure)) == {"a"}
    tenure("up", "--node", "c", "--cpus", WHOLE.cpus * 0.75)
    assert "'x' does not exist; this home has a, c" in tenure("down", "--node", "x", code=4).stderr


def test_up_on_a_machine_that_is_taken_leaves_no_broker_behind(tenure, tmp_path):
    tenure("up", "--node", "a")
    other = ("--home", tmp_path / "other")
    refused = tenure("up", *other, code=3)
    assert f"node a of {tenure.home}" in refused.stderr
    end_s = time.monotonic() + 20
    while (tmp_path / "other" / "broker.json").exists():
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert tenure("down", *other).stdout == "nothing was up in this home\n"


@pytest.fixture
def neighbour():
    """Give a function that runs the command as another user, with a home of that user's own; skip without a second user."""
    if not NOBODY:
        pytest.skip("only root can be two users")
    if (found := _python()) is None:
        pytest.skip("no Python of this version, with its packages, can be read by the user nobody")
    program, packages = found
    top = Path(tempfile.mkdtemp(prefix="tu-"))
    top.chmod(0o1777)
    home = top / "home"
    home.mkdir()
    os.chown(home, NOBODY["user"], NOBODY["group"])
    env = {"PATH": os.defpath, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home)}
    env |= {"TENURE_HOME": str(home), "TENURE_SHARES_FILE": str(top / "shares.json")}

    def call(*argv, code=0, as_root=False, **more):
        who = {} if as_root else NOBODY
        argv = [program, "-m", "tenure.cli", *map(str, argv)]
        done = subprocess.run(argv, env=env | more, cwd="/", capture_output=True, text=True, timeout=60, check=False, **who)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    call.top, call.home = top, home
    yield call
    call("down")
    call("down", as_root=True, TENURE_HOME=str(top / "of-root"))
    shutil.rmtree(top)


def test_users_share_a_machine_by_parts_and_not_a_home(neighbour):
    of_root = neighbour.top / "of-root"
    mine = {"as_root": True, "TENURE_HOME": str(of_root)}
    neighbour("up", "--node", "theirs", "--cpus", WHOLE.cpus * 0.75)
    refused = neighbour("up", "--node", "mine", "--cpus", WHOLE.cpus / 2, code=3, **mine)
    assert f"node theirs of {neighbour.home} (user nobody, pid " in refused.stderr
    neighbour("up", "--node", "mine", "--cpus", WHOLE.cpus / 4, **mine)
    refused = neighbour("up", "--node", "more", "--cpus", WHOLE.cpus / 4, code=3)
    assert f"node mine of {of_root} (user root, pid " in refused.stderr

    # Brokers answer in both homes, and each user may open the other's folder: it is the owner that counts.
    of_root.chmod(0o777)
    refused = neighbour("nodes", code=2, TENURE_HOME=str(of_root))
    assert f"the home {of_root} belongs to user root (0); this is user nobody (65534)" in refused.stderr
    refused = neighbour("nodes", code=2, as_root=True)
    assert f"the home {neighbour.home} belongs to user nobody (65534); this is user root (0)" in refused.stderr
    assert "Set TENURE_HOME, or --home, to a folder of your own" in refused.stderr
