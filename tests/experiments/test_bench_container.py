"""Servers of an experiment in containers, beside the same ones in processes: a broker, and a Docker Engine of our own."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tenure.errors import SpecError
from tenure.experiments import netns
from tenure.experiments.stage_sweep import envelopes
from tenure.experiments.sweep import settings
from tenure.nodes import Node
from tenure.resources import Capacity
from tenure.sweeps import Sweep

from .synthetic import MACHINE
from .test_bench_real import linear

ARCHITECTURES = ["microservice"] if netns.available() else ["microservice", "distributed"]


def test_a_container_is_a_factor_of_servers_alone_and_has_no_shared_memory():
    planned = settings(Sweep(runtimes=("process", "container"), batches=(1,), twins=False), files=False)
    boxed = [setting for setting in planned if setting.runtime == "container"]
    assert {(s.architecture, s.transport) for s in boxed} == {
        (architecture, transport) for architecture in ("microservice", "distributed") for transport in ("http", "grpc")
    }
    beside = {replace(setting, runtime="process") for setting in boxed}
    assert beside <= set(planned)
    assert not {setting.application for setting in boxed} & {setting.application for setting in beside}
    assert all(setting.configuration()["runtime"] == "container" for setting in boxed)


def test_the_highest_weight_is_not_promised_to_containers():
    with pytest.raises(SpecError, match="undisturbed is not for containers"):
        settings(Sweep(runtimes=("container",), undisturbed=True), files=False)


def test_servers_with_leases_of_their_own_share_their_node_with_its_applications():
    node = Node(name="n", capacity=Capacity(cpus=8, memory_bytes=8 << 30), machine=MACHINE)
    near, far, apart = envelopes(node, Sweep(runtimes=("process", "container")))
    assert near == apart
    assert near.cpus * 3 + far.cpus == pytest.approx(8, abs=0.01)
    assert near.memory_bytes * 3 + far.memory_bytes <= 8 << 30
    assert envelopes(node, Sweep())[2] is None


@pytest.mark.real
@pytest.mark.docker
@pytest.mark.netns
def test_a_server_in_a_container_is_measured_beside_one_in_a_process(docker, tmp_path):
    pytest.importorskip("onnx")
    model, examples = linear(tmp_path)
    env = {**os.environ, "TENURE_HOME": str(tmp_path / "home"), "TENURE_SHARES_FILE": str(tmp_path / "shares.json")}
    env["DOCKER_HOST"] = f"unix://{docker.socket}"
    command = [sys.executable, "-m", "tenure.cli"]

    def tenure(*words):
        done = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    asked = ("--quick", "--repeats", "2", "--cell", "100ms", "--batches", "1", "--interactions", "sync", "--transports", "http")
    asked += ("--runtimes", "process,container", "--architectures", ",".join(ARCHITECTURES))
    try:
        outcome = json.loads(tenure("bench", "serve", model, examples, *asked, "--json").splitlines()[-1])
        trials = json.loads(tenure("trials", "--run", outcome["run"]["id"], "--json"))
    finally:
        subprocess.run([*command, "down"], env=env, capture_output=True, timeout=60, check=False)
    found = {
        (trial["configuration"]["architecture"], trial["configuration"]["runtime"]): trial["metrics"]
        for trial in trials
        if not trial["configuration"].get("twin")
    }
    assert set(found) == {(architecture, runtime) for architecture in ARCHITECTURES for runtime in ("process", "container")}
    for metrics in found.values():
        assert metrics["images_per_s"]["mean"] > 0
        assert metrics["server_cpu_s_per_image"]["mean"] > 0
        assert metrics["server_memory_bytes"]["mean"] > 1 << 20
        assert metrics["server_lease_memory_bytes"]["mean"] > 1 << 20
        assert metrics["server_start_s"]["mean"] > 0
    bounds = {trial["configuration"]["runtime"]: trial["bounds"] for trial in trials}
    assert bounds["container"]["memory_bytes"] == "exact"
    assert not [each for each in docker.containers() if each["Labels"].get("tenure.lease")]
