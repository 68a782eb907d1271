"""The serving process: its ports, its end, its bounds."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.contracts.plane_contract import shared_memory  # noqa: F401

from tenure.errors import SpecError, Unavailable
from tenure.serve import Model
from tenure.serve.processes import leased_memory_bytes, leased_threads
from tenure.serve.repository import ModelFiles

from .conftest import Server


@pytest.mark.real
def test_sigterm_drains_and_leaves_a_result(digits, tmp_path):
    server = Server(digits.path, tmp_path / "w", "--name", "renamed", "--grpc-port", "off")
    assert json.loads((tmp_path / "w" / "endpoints.json").read_text()) == server.endpoints == {"http": server.http}
    with Model(f"http://{server.http}", "renamed") as model:
        model.predict(digits.x)  # its connection stays open: it must not hold the server up
        assert server.end() == 0
    assert json.loads((tmp_path / "w" / "result.json").read_text()) == {"state": "done", "drained": True}


@pytest.mark.real
def test_sigterm_under_load_answers_or_refuses_but_never_answers_wrong(digits, tmp_path):
    server = Server(digits.path, tmp_path / "w", "--grpc-port", "off")
    counts = {"right": 0, "wrong": 0, "refused": 0}

    def ask():
        with Model(f"http://{server.http}", "digits", timeout_s=10) as model:
            for _ in range(100_000):
                try:
                    found = model.predict(digits.x)["label"]
                except Unavailable:
                    counts["refused"] += 1
                    return
                counts["right" if np.array_equal(found, digits.label) else "wrong"] += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    ends_at_s = time.monotonic() + 20
    while counts["right"] < 30 and time.monotonic() < ends_at_s:
        time.sleep(0.005)
    assert server.end() == 0
    for thread in threads:
        thread.join(20)
    assert counts["right"] >= 30
    assert (counts["wrong"], counts["refused"]) == (0, 3)


@pytest.mark.real
@pytest.mark.parametrize("door", ["--http-port", "--grpc-port"])
def test_a_taken_port_is_named_and_ends_with_code_2(door, digits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = [sys.executable, "-m", "tenure.serve", "--model", str(digits.path), door, port]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 cannot be had" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
@pytest.mark.parametrize(
    ("options", "status"),
    [(("--host", "0.0.0.0"), 400), (("--host", "0.0.0.0", "--shared-memory", "on"), 200), (("--shared-memory", "off"), 400)],
    ids=["open to others", "open to others and asked for", "switched off"],
)
def test_shared_memory_is_for_servers_that_only_this_machine_reaches(digits, tmp_path, shared_memory, options, status):  # noqa: F811
    server = Server(digits.path, tmp_path / "w", "--grpc-port", "off", *options)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(server.http.rpartition(":")[2]), timeout=20)
        asked = json.dumps({"key": f"/{shared_memory(4096)}", "offset": 0, "byte_size": 4096})
        connection.request("POST", "/v2/systemsharedmemory/region/r/register", asked)
        assert connection.getresponse().status == status
        connection.close()
    finally:
        server.end()


@pytest.mark.real
def test_a_missing_model_ends_with_code_2_and_its_name(tmp_path):
    argv = [sys.executable, "-m", "tenure.serve", "--model", str(tmp_path / "gone.onnx")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "gone.onnx" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_models_are_found_in_every_layout(tmp_path: Path):
    for name in ("a.onnx", "b/model.onnx", "c/2/model.skops", "c/12/model.onnx", "d/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = ModelFiles(tmp_path).scan()
    assert {name: list(versions) for name, versions in found.items()} == {"a": ["1"], "b": ["1"], "c": ["2", "12"]}


def test_a_folder_without_models_says_what_was_expected(tmp_path: Path):
    with pytest.raises(SpecError, match=r"expected NAME\.onnx"):
        ModelFiles(tmp_path)


def test_threads_come_from_the_lease_then_the_environment(tmp_path):
    lease = tmp_path / "lease.json"
    lease.write_text(json.dumps({"threads": 3, "envelope": {"cpus": 1.5}}))
    assert leased_threads({"TENURE_LEASE_FILE": str(lease)}) == 3
    lease.write_text(json.dumps({"envelope": {"cpus": 0.5}}))
    assert leased_threads({"TENURE_LEASE_FILE": str(lease)}) == 1
    assert leased_threads({"OMP_NUM_THREADS": "2"}) == 2
    assert leased_threads({}) >= 1


def test_memory_comes_from_the_lease(tmp_path):
    lease = tmp_path / "lease.json"
    lease.write_text(json.dumps({"envelope": {"memory_bytes": 1 << 30}}))
    assert leased_memory_bytes({"TENURE_LEASE_FILE": str(lease)}) == 1 << 30
    for content in ("[]", '{"envelope": 3}', '{"envelope": {"memory_bytes": "x"}}', "{"):
        lease.write_text(content)
        assert leased_memory_bytes({"TENURE_LEASE_FILE": str(lease)}) == 0
        assert leased_threads({"TENURE_LEASE_FILE": str(lease)}) >= 1
    assert leased_memory_bytes({}) == 0


@pytest.mark.real
def test_a_model_that_cannot_be_loaded_ends_with_code_2_and_the_reason(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    argv = [sys.executable, "-m", "tenure.serve", "--model", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "broken.onnx" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


@pytest.mark.real
def test_a_killed_server_leaves_no_instance_behind(digits, tmp_path):
    server = Server(digits.path, tmp_path / "w", "--grpc-port", "off")
    instances = psutil.Process(server.process.pid).children()
    assert len(instances) == 1
    server.process.kill()
    server.end()
    assert psutil.wait_procs(instances, timeout=10)[1] == []


@pytest.mark.real
def test_sigterm_while_models_load_ends_it_at_once(digits):
    argv = [sys.executable, "-m", "tenure.serve", "--model", str(digits.path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ends_at_s = time.monotonic() + 30
        while not psutil.Process(process.pid).children() and time.monotonic() < ends_at_s:
            time.sleep(0.005)
        psutil.Process(process.pid).children()[0].suspend()  # a model that loads for ever
        process.terminate()
        assert process.communicate(timeout=20)[0] == ""
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_the_generated_descriptor_is_up_to_date():
    pytest.importorskip("grpc_tools", reason="grpcio-tools (extra dev) is not installed")
    script = Path(__file__).parents[2] / "tools" / "generate_v2.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def make_endless(path):
    """Write a model that counts to n, one loop turn each: n in the billions is as good as a hang."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "one"], ["sum_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", kinds.INT64, []),
            helper.make_tensor_value_info("go", kinds.BOOL, []),
            helper.make_tensor_value_info("sum", kinds.INT64, []),
        ],
        [helper.make_tensor_value_info("go_on", kinds.BOOL, []), helper.make_tensor_value_info("sum_out", kinds.INT64, [])],
        [helper.make_tensor("one", kinds.INT64, [], [1])],
    )
    constants = [helper.make_tensor("zero", kinds.INT64, [], [0]), helper.make_tensor("yes", kinds.BOOL, [], [True])]
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "yes", "zero"], ["count"], body=body)],
        "endless",
        [helper.make_tensor_value_info("n", kinds.INT64, [])],
        [helper.make_tensor_value_info("count", kinds.INT64, [])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.real
def test_a_model_that_hangs_takes_neither_other_models_nor_the_end_with_it(digits, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    make_endless(models / "endless.onnx")
    (models / "digits.onnx").write_bytes(digits.path.read_bytes())
    server = Server(models, tmp_path / "w", "--timeout-s", "0.3", "--grace-s", "0.3", "--threads", "1")
    try:
        with Model(f"http://{server.http}", "endless") as endless, Model(f"grpc://{server.grpc}", "digits") as other:
            assert endless.predict(np.array(5)) == 5
            with pytest.raises(Unavailable, match="did not answer within"):
                endless.predict(np.array(10**12))
            np.testing.assert_array_equal(other.predict(digits.x)["label"], digits.label)
    finally:
        code = server.end()
    assert code == 0
    assert json.loads((tmp_path / "w" / "result.json").read_text())["drained"] is True
