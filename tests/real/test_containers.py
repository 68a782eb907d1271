"""Job files with `runtime = "container"`: a real broker and agent, and a Docker Engine of our own."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = [pytest.mark.real, pytest.mark.docker]

TASK = """
[run]
name = "boxed"

[task]
runtime = "container"
command = ["python", "look.py"]
inputs = { data = "data.txt" }
outputs = { seen = "seen.json" }
envelope = { cpus = 1, memory = "256MiB", slot = "60s" }
"""
LOOK = """
import json, os, numpy
seen = {
    "user": os.getuid(),
    "data": open(os.environ["TENURE_INPUT_DATA"]).read(),
    "numpy": numpy.__version__,
    "root": sorted(os.listdir("/")),
    "bound": json.load(open(os.environ["TENURE_LEASE_FILE"]))["envelope"]["memory_bytes"],
}
json.dump(seen, open(os.environ["TENURE_WORKER_DIR"] + "/seen.json", "w"))
"""
SERVE = """
[run]
name = "boxed"

[serve]
runtime = "container"
model = "double.onnx"
envelope = { cpus = 1, memory = "512MiB", slot = "60s", total = "60s" }
"""


@pytest.fixture
def tenure(docker, tmp_path):
    """Give the command's words and environment, in a home of this test's own; afterwards the home is down."""
    home = tmp_path / "home"
    (tmp_path / "project").mkdir()
    env = {**os.environ, "TENURE_HOME": str(home), "TENURE_SHARES_FILE": str(tmp_path / "shares.json")}
    env["DOCKER_HOST"] = f"unix://{docker.socket}"
    command = [sys.executable, "-m", "tenure.cli"]
    yield command, env
    subprocess.run([*command, "down"], env=env, capture_output=True, timeout=60, check=False)


def _double(path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_a_task_runs_in_a_container_and_leaves_its_outputs(docker, tenure, tmp_path):
    command, env = tenure
    (tmp_path / "project/job.toml").write_text(TASK)
    (tmp_path / "project/look.py").write_text(LOOK)
    (tmp_path / "project/data.txt").write_text("hello")
    done = subprocess.run(
        [*command, "run", str(tmp_path / "project/job.toml")], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = (tmp_path / "home/runs").rglob("artefacts/seen.json")
    seen = json.loads(kept.read_text())
    assert seen["user"] != 0
    assert seen["data"] == "hello"
    assert seen["bound"] == 256 << 20
    assert not {"boot", "srv", "opt"} & set(seen["root"])
    assert not [found for found in docker.containers() if found["Labels"].get("tenure.lease")]


def test_a_server_in_a_container_answers_on_this_machines_loopback(docker, tenure, tmp_path):
    command, env = tenure
    (tmp_path / "project/job.toml").write_text(SERVE)
    _double(tmp_path / "project/double.onnx")
    log = tmp_path / "out"
    with log.open("w") as out:
        run = subprocess.Popen([*command, "run", str(tmp_path / "project/job.toml")], env=env, stdout=out, stderr=out)
    try:
        end_s = time.monotonic() + 90
        while not (found := re.search(r"http://(127\.0\.0\.1:\d+)", log.read_text())):
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.1)
        body = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2.0]}]}
        asked = urllib.request.Request(f"http://{found[1]}/v2/models/boxed/infer", json.dumps(body).encode())
        with urllib.request.urlopen(asked, timeout=20) as answer:
            assert json.load(answer)["outputs"][0]["data"] == [3.0, 4.0]
        (container,) = [each for each in docker.containers() if each["Labels"].get("tenure.lease")]
        assert docker.inspect(container["Id"])["HostConfig"]["Memory"] == 512 << 20
    finally:
        run.terminate()
        run.wait(30)


def test_a_node_without_an_engine_refuses_and_says_why(tenure, tmp_path):
    command, env = tenure
    (tmp_path / "project/job.toml").write_text(TASK.replace('inputs = { data = "data.txt" }', "").replace("look.py", "-V"))
    env = {**env, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    done = subprocess.run(
        [*command, "run", str(tmp_path / "project/job.toml")], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "engine" in done.stdout + done.stderr
