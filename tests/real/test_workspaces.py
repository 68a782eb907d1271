"""Workspaces with an environment as a holder uses them: real broker, agent, pip, processes, and a Docker Engine of our own."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
from tests.wheels import a_wheel

pytestmark = pytest.mark.real
LOOK = "import alpha, os, sys; print(alpha.VERSION, os.getcwd() == os.environ['HOME'], os.getuid(), sys.prefix)"


@pytest.fixture
def tenure(tmp_path):
    """Call the command in a home of this test's own, with an index of its own; afterwards the home is down."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    a_wheel(wheels, "alpha", "1.0")
    (tmp_path / "requirements.txt").write_text("alpha\n")
    (tmp_path / "wrong.txt").write_text("alpha\ngamma\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    env |= {"TENURE_HOME": str(tmp_path / "home"), "TENURE_SHARES_FILE": str(tmp_path / "shares.json")}

    def call(*argv, code=0, **more):
        words = [sys.executable, "-m", "tenure.cli", *argv]
        done = subprocess.run(words, env=env | more, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    call.env = env
    yield call
    call("down")


def test_a_workspace_has_the_packages_asked_for_and_a_home_that_stays(tenure, tmp_path):
    tenure("up", "--cpus", "1", "--memory", "512MiB")
    assert "wrong.txt:2: no wheel for 'gamma'" in tenure("lease", "--env", str(tmp_path / "wrong.txt"), code=2).stderr
    assert json.loads(tenure("leases", "--json").stdout) == []
    asked = ("lease", "--memory", "128MiB", "--env", str(tmp_path / "requirements.txt"), "--json")
    first = tenure(*asked)
    assert "built in" in first.stderr
    held = json.loads(first.stdout)
    said = tenure("exec", held["id"], "--", "python", "-c", LOOK + "; open('kept', 'w').write('x')").stdout
    assert said.startswith("1.0 True")
    assert str(tmp_path / "home/environments") in said
    tenure("release", held["id"])
    again = tenure(*asked)
    assert "already there" in again.stderr
    tenure("exec", json.loads(again.stdout)["id"], "--", "test", "-e", "kept")


@pytest.mark.docker
def test_in_a_container_it_has_the_same_read_only_and_the_same_home(docker, tenure, tmp_path):
    tenure.env["DOCKER_HOST"] = f"unix://{docker.socket}"
    tenure("up", "--cpus", "1", "--memory", "512MiB")
    asked = ("lease", "--memory", "128MiB", "--env", str(tmp_path / "requirements.txt"), "--runtime", "container", "--json")
    held = json.loads(tenure(*asked, "--tenant", "alice").stdout)
    said = tenure("exec", held["id"], "--", "python", "-c", LOOK + "; open('kept', 'w').write('x')").stdout.split()
    assert said[:2] == ["1.0", "True"]
    assert said[2] != "0"
    wrote = tenure("exec", held["id"], "--", "python", "-c", "open('/'.join([__import__('sys').prefix, 'x']), 'w')", code=1)
    assert "Read-only file system" in wrote.stdout
    tenure("release", held["id"])
    assert not [found for found in docker.containers() if found["Labels"].get("tenure.lease") == held["id"]]

    own = json.loads(tenure(*asked, "--tenant", "alice").stdout)
    tenure("exec", own["id"], "--", "test", "-e", "kept")
    tenure("release", own["id"])
    other = json.loads(tenure(*asked, "--tenant", "bob").stdout)
    tenure("exec", other["id"], "--", "test", "-e", str(tmp_path / "home/homes/alice"), code=1)


@pytest.mark.docker
def test_an_image_that_the_engine_has_not_is_named(docker, tenure):
    tenure.env["DOCKER_HOST"] = f"unix://{docker.socket}"
    tenure("up", "--cpus", "1", "--memory", "512MiB")
    assert "no image 'nobodys:1'" in tenure("lease", "--memory", "128MiB", "--image", "nobodys:1", code=1).stderr


@pytest.mark.parametrize("runtime", ["process", pytest.param("container", marks=pytest.mark.docker)])
def test_jupyterlabs_url_is_printed_once_it_answers(request, tenure, tmp_path, runtime):
    if runtime == "container":
        tenure.env["DOCKER_HOST"] = f"unix://{request.getfixturevalue('docker').socket}"
    a_wheel(tmp_path / "wheels", "jupyterlab", "4.0", code=STAND_IN)
    (tmp_path / "requirements.txt").write_text("jupyterlab\n")
    tenure("up", "--cpus", "1", "--memory", "512MiB")
    asked = ("lease", "--memory", "128MiB", "--env", str(tmp_path / "requirements.txt"), "--runtime", runtime)
    held = json.loads(tenure(*asked, "--json").stdout)
    assert "token=abc" in held["url"]
    with urllib.request.urlopen(held["url"], timeout=10) as answer:
        assert answer.status == 200
    tenure("release", held["id"])
    assert "open     http://127.0.0.1:" in tenure(*asked).stdout


STAND_IN = """
import http.server, json, os, sys
said = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
class Door(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
door = http.server.HTTPServer((said["--ServerApp.ip"], int(said["--ServerApp.port"])), Door)
folder = os.environ["JUPYTER_RUNTIME_DIR"]
os.makedirs(folder)
json.dump({"port": door.server_port, "base_url": "/", "token": "abc"}, open(folder + "/jpserver-1.json", "w"))
door.serve_forever()
"""
