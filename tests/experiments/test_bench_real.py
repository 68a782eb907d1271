"""`tenure bench serve` as a user types it: a broker, two leases, real processes, a report; and nothing left afterwards."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the test model is made with the package onnx (extra demo)")
pytestmark = pytest.mark.real


def living(folder):
    """Return the processes that have the folder in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text and int(entry.name) != os.getpid():
            found.append(text)
    return found


def tenure(home, *argv):
    env = {**os.environ, "TENURE_HOME": str(home)}
    done = subprocess.run([sys.executable, "-m", "tenure.cli", *argv], env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def linear(folder):
    """Write a small model and examples of it; return their paths."""
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [tensor("y", onnx.TensorProto.FLOAT, ["n", 10])],
        [onnx.numpy_helper.from_array(np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32), "w")],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "linear.onnx")
    np.save(folder / "x.npy", np.random.default_rng(2).normal(size=(20, 64)).astype(np.float32))
    return str(folder / "linear.onnx"), str(folder / "x.npy")


def test_an_experiment_is_a_run_with_a_trial_per_setting_and_a_report(tmp_path):
    model, examples = linear(tmp_path)
    home = tmp_path / "home"
    asked = ("--quick", "--repeats", "2", "--cell", "100ms", "--batches", "1", "--interactions", "sync", "--transports", "http")
    said = tenure(home, "bench", "serve", model, examples, *asked, "--goal", "p99<1s", "--json")
    outcome = json.loads(said.splitlines()[-1])
    assert outcome["run"]["state"] == "done"
    assert any("4 settings, 2 repeats, every answer right" in line for line in outcome["closing"])
    assert "p99&lt;1s" in Path(outcome["report_html"]).read_text()
    trials = json.loads(tenure(home, "trials", "--run", outcome["run"]["id"], "--json"))
    assert {(trial["configuration"]["architecture"], trial["configuration"].get("twin", 0)) for trial in trials} == {
        ("simple", 0),
        ("simple", 1),
        ("microservice", 0),
        ("distributed", 0),
    }
    leases = json.loads(tenure(home, "leases", "--json"))
    assert [lease["end_reason"] for lease in leases] == ["released", "released"]
    tenure(home, "down")
    end_s = time.monotonic() + 30
    while living(home):
        assert time.monotonic() < end_s, living(home)
        time.sleep(0.05)


def test_a_search_starts_every_server_as_its_setting_says_and_recommends_one(tmp_path):
    model, examples = linear(tmp_path)
    home = tmp_path / "home"
    asked = ("--search", "--goal", "p99<1s", "--clients", "2", "--trials", "2", "--cell", "50ms", "--repeats", "2")
    asked += ("--architectures", "microservice", "--transports", "http,shm", "--interactions", "sync", "--batches", "2")
    asked += ("--instances", "1,2", "--threads", "1", "--max-delays", "0ms,1ms")
    outcome = json.loads(tenure(home, "bench", "serve", model, examples, *asked, "--json").splitlines()[-1])
    assert outcome["run"]["state"] == "done"
    trials = json.loads(tenure(home, "trials", "--run", outcome["run"]["id"], "--json"))
    assert 1 <= len(trials) <= 2
    folder = home / "runs" / outcome["run"]["id"] / "serve" / "search"
    for number, trial in enumerate(sorted(trials, key=lambda one: one["at_s"]), 1):
        factors, spec = trial["configuration"], json.loads((folder / str(number) / "server-node.json").read_text())
        assert factors["clients"] == len(spec["applications"]) == 2
        told = dict(flag.lstrip("-").split("=", 1) for flag in spec["server"] if "=" in flag)
        assert told["instances"] == told["threads"] == str(factors["instances"])  # one thread each
        assert float(told.get("max-delay-ms", 0)) == 1e3 * factors["max_delay_s"]
        assert trial["metrics"]["images_per_s"]["n"] == 2
        assert trial["source"] == "probe"
    assert any("is the fastest that meets the goal" in line for line in outcome["closing"])
    page = Path(outcome["report_html"]).read_text()
    assert "What was tried" in page
    again = json.loads(tenure(home, "bench", "serve", model, examples, *asked, "--json").splitlines()[-1])
    assert any(f"0 made, {len(trials)} known before" in line for line in again["closing"])
    tenure(home, "down")
    end_s = time.monotonic() + 30
    while living(home):
        assert time.monotonic() < end_s, living(home)
        time.sleep(0.05)
