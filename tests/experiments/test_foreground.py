"""`tenure serve MODEL`: a model in the foreground, under a lease, told how to call; and what is wrong with what is asked."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from tests.experiments.jobs import tiny

from tenure import errors, verbs
from tenure.cli.serving import is_job_file
from tenure.experiments.foreground import (
    ForegroundSpec,
    _callable,
    check_models,
    check_ports,
    job_file_of,
    reachable,
)
from tenure.jobfile import parse_job_file
from tenure.jobs import ServerOptions
from tenure.nodes import Machine, Node
from tenure.resources import Capacity
from tenure.serve.client import Model
from tenure.serve.tensors import ModelMetadata, TensorMetadata

GIB = 1 << 30


def node(*, cpus=4.0, memory_bytes=16 * GIB, held_cpus=0.0, held_bytes=0):
    capacity = Capacity(cpus=cpus, memory_bytes=memory_bytes)
    return Node(
        name="local",
        capacity=capacity,
        machine=Machine(cpu_model="x"),
        held_cpus=held_cpus,
        held_memory_bytes=held_bytes,
    )


@pytest.fixture
def folder(tmp_path):
    tiny.write_model(tmp_path / "tiny.onnx", np.eye(2))
    return tmp_path


def test_the_job_made_of_the_options_is_one_that_a_job_file_can_say(folder):
    options = ServerOptions(host="0.0.0.0", memory_budget_bytes=64 << 20, instances=2, threads=1, max_delay_s=0.002)
    spec = ForegroundSpec(model=folder / "tiny.onnx", cpus=1.5, memory_bytes=GIB, time_s=60, http_port=0, options=options)
    text, _ = job_file_of(spec, node())
    (job,) = parse_job_file(text).stages
    assert job.server == options
    assert job.ports == {"http": 0, "grpc": 8001}
    assert (job.envelope.cpus, job.envelope.memory_bytes, job.envelope.total_s) == (1.5, GIB, 60)


def test_without_bounds_a_server_gets_the_free_cores_and_half_the_free_memory_and_it_is_said(folder):
    text, why = job_file_of(ForegroundSpec(model=folder), node(held_cpus=1.0, held_bytes=4 * GIB))
    (job,) = parse_job_file(text).stages
    assert (job.envelope.cpus, job.envelope.memory_bytes) == (3.0, 6 * GIB)
    assert "3 free cores" in why
    assert "half of the 12.0 GiB" in why
    assert job.envelope.slot_s <= 120  # a killed command's server is gone soon after


def test_a_node_that_is_held_by_others_is_refused_in_words(folder):
    with pytest.raises(errors.Refused, match=r"leases hold all cores.*--cpus"):
        job_file_of(ForegroundSpec(model=folder), node(held_cpus=4.0))
    with pytest.raises(errors.Refused, match="too little for a server"):
        job_file_of(ForegroundSpec(model=folder, memory_bytes=1 << 20), node())


def test_what_cannot_be_served_is_told_before_anything_starts(folder, monkeypatch):
    with pytest.raises(errors.NotFound, match="does not exist"):
        check_models(folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(errors.SpecError, match="no model in"):
        check_models(folder / "empty")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingExtra, match=r"onnxruntime.*pip install"):
        check_models(folder)


def test_a_taken_port_is_named_with_its_option(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.SpecError, match=rf"port {port} .*--grpc-port"):
            check_ports(ForegroundSpec(model=folder, http_port=0, grpc_port=port))
    with pytest.raises(errors.SpecError, match="cannot share port 8001"):
        ForegroundSpec(model=folder, http_port=8001)


def test_a_folder_is_one_of_models_though_their_options_lie_in_it(folder):
    (folder / "model.toml").touch()
    assert not is_job_file(folder)
    assert not is_job_file(folder / "tiny.onnx")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "x.toml").touch()
    assert is_job_file(folder / "jobs")
    assert is_job_file(folder / "none.toml")


def test_lines_to_call_a_model_are_one_word_each_to_the_shell():
    metadata = ModelMetadata(
        name="it's $HOME",
        versions=("1", "3"),
        inputs=(TensorMetadata("a", "FP32", (-1, 2)), TensorMetadata("b", "BYTES", (1,))),
        outputs=(TensorMetadata("y", "INT64", (-1,)),),
    )
    model = _callable("127.0.0.1:8000", metadata)
    assert model.describe() == "it's $HOME, versions 1, 3: a FP32 [n, 2], b BYTES [1] -> y INT64 [n]"
    curl, _s, url, _d, body = shlex.split(model.curl)
    assert (curl, url) == ("curl", "http://127.0.0.1:8000/v2/models/it's $HOME/infer")
    assert [item["data"] for item in json.loads(body)["inputs"]] == [[0, 0], ["text"]]
    assert compile(shlex.split(model.python)[2], "line", "exec")
    assert reachable("0.0.0.0:80") == "127.0.0.1:80"
    assert reachable("[::]:80") == "[::1]:80"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "home"
    verbs.up(home=folder)
    yield folder
    verbs.down(home=folder)


def start(home, *argv):
    env = {**os.environ, "TENURE_HOME": str(home)}
    argv = [sys.executable, "-m", "tenure.cli", "serve", *map(str, argv)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_folder_is_served_until_it_is_interrupted_and_then_all_is_free(home, folder, number):
    ports = ("--http-port", 0, "--grpc-port", 0)
    batching = ("--instances", 2, "--threads", 2, "--max-batch-rows", 8, "--max-delay", "2ms", "--memory-budget", "16MiB")
    with start(home, folder, *ports, "--cpus", 0.5, "--memory", "512MiB", *batching, "--json") as process:
        try:
            told = json.loads(process.stdout.readline())["listening"]
            (lease,) = verbs.leases(home=home, live=True)
            assert lease.id == told["lease_id"]
            assert lease.envelope.cpus == 0.5
            (model,) = told["models"]
            x = np.array([[0.0, 1.0]], np.float32)
            for kind, address in told["endpoints"].items():
                with Model(f"{kind}://{address}", model["name"]) as client:
                    assert client.predict(x) is not None
            program, *arguments = shlex.split(model["python"])
            assert program == "python"
            asked = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
            assert asked.returncode == 0, asked.stderr
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    ended = json.loads(out)
    assert (ended["run"]["state"], ended["exit_code"], ended["failed"]) == ("done", 0, "")
    assert "; 3 requests answered; " in ended["closing"][-1]
    assert "CPU-s, peak memory" in ended["closing"][-1]
    assert not verbs.leases(home=home, live=True)


@pytest.mark.real
@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (("none",), 4, "does not exist"),
        ((".", "--cpus", "1000"), 3, "1000"),
        ((".", "--memory", "lots"), 2, "a size was expected"),
        (("job.toml", "--cpus", "1"), 2, "is for a model"),
    ],
)
def test_wrong_input_ends_with_a_sentence_and_its_code(home, folder, argv, code, told):
    with start(home, folder / argv[0], *argv[1:], "--http-port", 0, "--grpc-port", 0) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert told in err


@pytest.mark.real
def test_a_server_that_ends_by_itself_is_told_with_its_reason(home, folder):
    (folder / "tiny.onnx").write_bytes(b"no model")
    with start(home, folder, "--http-port", 0, "--grpc-port", 0, "--cpus", 1, "--memory", "512MiB") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot load" in err
    assert "tiny.onnx" in err


@pytest.mark.real
def test_a_server_with_a_time_ends_by_itself_and_well(home, folder):
    ports = ("--http-port", 0, "--grpc-port", 0)
    with start(home, folder, *ports, "--cpus", 0.5, "--memory", "512MiB", "--time", "4s", "--json") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "out_of_time" in json.loads(out.splitlines()[-1])["closing"][-1]


@pytest.mark.real
@pytest.mark.cgroup
def test_too_little_memory_is_told_with_what_to_give(home, folder):
    if "exact" not in {node.bounds["process"]["memory_bytes"] for node in verbs.nodes(home=home)}:
        pytest.skip("memory bounds are not exact here: how much a server has before it is ended differs")
    for number in range(6):  # a process each
        tiny.write_model(folder / f"tiny{number}.onnx", np.eye(2))
    with start(home, folder, "--http-port", 0, "--grpc-port", 0, "--cpus", 0.5, "--memory", "64MiB") as process:
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "64.0 MiB of memory is too little" in err
    assert "--memory" in err
