"""Servers of others in the table of an experiment: addresses, who they are, whether they can be compared, whom to meter."""

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from benchmarks import peers
from benchmarks.peers import homes
from benchmarks.peers.processes import Order, start
from tests.serve.conftest import Server, make_digits, make_identity

from tenure.errors import NotFound, SpecError, Unavailable
from tenure.experiments.contenders import Against, find_contenders, is_here, listeners, parse_against, tree
from tenure.experiments.stage_sweep import prepare
from tenure.experiments.sweep import settings
from tenure.experiments.sweep_nodes import Bench
from tenure.experiments.sweep_run import measure_sweep
from tenure.links import parse_link
from tenure.resources import Envelope
from tenure.serve.client import Model
from tenure.serve.tensors import ModelMetadata, TensorMetadata
from tenure.sweeps import Sweep
from tenure.trials import Trial

from .fake_launch import PlainLaunch
from .synthetic import MACHINE


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A server of the protocol: ours, standing for another's."""
    folder = tmp_path_factory.mktemp("models")
    make_digits(folder / "digits.onnx")
    make_identity(folder / "same.onnx", "FLOAT")
    started = Server(folder, tmp_path_factory.mktemp("served"), "--max-batch-rows", "16")
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "digits.onnx"
    make_digits(path)
    with Model(str(path)) as model:
        return model.metadata()


def found(there, ours, *addresses, model="digits", told=None, **more):
    return find_contenders(addresses, model, ours, warn=(told if told is not None else []).append, **more)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("grpc://gpu:9001", Against(transport="grpc", host="gpu", port=9001)),
        ("http://gpu", Against(transport="http", host="gpu", port=8000)),
        ("gpu", Against(transport="grpc", host="gpu", port=8001)),
        ("grpc://[::1]:7", Against(transport="grpc", host="::1", port=7)),
        (
            "http://gpu/?model=m&pid=12&name=mlserver",
            Against(transport="http", host="gpu", port=8000, model="m", pid=12, name="mlserver"),
        ),
    ],
)
def test_addresses_are_read_with_tritons_ports_where_they_name_none(text, wanted):
    assert parse_against(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "ftp://gpu",
        "grpc://",
        "grpc://gpu:port",
        "grpc://gpu/v2/models",
        "grpc://gpu?pid=x",
        "grpc://gpu?batch=3",
        "gpu?name=tenure",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(text):
    with pytest.raises(SpecError):
        parse_against(text)


def test_http_and_grpc_of_one_server_are_one_contender_with_its_processes(there, ours):
    told = []
    (one,) = found(there, ours, f"http://{there.http}?name=peer", f"grpc://{there.grpc}?name=peer", told=told)
    assert (one.name, one.model, one.link) == ("peer", "digits", "loopback")
    assert one.targets == {"http": f"http://{there.http}", "grpc": f"grpc://{there.grpc}"}
    assert there.process.pid in one.pids
    assert set(one.pids) == set(tree([there.process.pid]))
    assert len(one.pids) > 1  # its instances are processes of their own
    assert told == []


def test_a_server_goes_by_the_name_it_gives_itself_and_never_by_ours(there, ours):
    (by_grpc,) = found(there, ours, f"grpc://{there.grpc}")
    assert by_grpc.name == f"tenure-{there.grpc.rpartition(':')[2]}"


def test_two_servers_of_one_kind_stay_apart(there, ours, tmp_path):
    make_digits(tmp_path / "digits.onnx")
    second = Server(tmp_path / "digits.onnx", tmp_path / "served")
    try:
        one, two = found(there, ours, f"grpc://{there.grpc}?name=peer", f"grpc://{second.grpc}?name=peer")
        assert one.name == "peer"
        assert two.name == f"peer-{second.grpc.rpartition(':')[2]}"
        assert not set(one.pids) & set(two.pids)
    finally:
        second.end()


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_model_that_is_not_there_is_told_with_how_to_name_it(there, ours, door):
    address = f"{door}://{getattr(there, door)}"
    with pytest.raises(NotFound, match=r"\?model=NAME"):
        found(there, ours, address, model="resnet")
    (one,) = found(there, ours, f"{address}?model=digits", model="resnet")
    assert one.model == "digits"


def test_another_model_is_not_compared(there, ours):
    with pytest.raises(SpecError, match="only the same model can be compared"):
        found(there, ours, f"grpc://{there.grpc}?model=same")


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_batches_larger_than_it_takes_are_refused_before_anything_runs(there, ours, door):
    address = f"{door}://{getattr(there, door)}"
    assert found(there, ours, address, largest_batch=16)
    with pytest.raises(SpecError, match="takes batches up to 16, and 32 is asked"):
        found(there, ours, address, largest_batch=32)


def test_names_of_tensors_may_differ_and_shapes_may_be_wider(there, ours):
    wide = ModelMetadata(name="digits", inputs=(TensorMetadata("pixels", "FP32", (1, 16)),), outputs=ours.outputs)
    assert found(there, wide, f"grpc://{there.grpc}")
    narrow = ModelMetadata(name="digits", inputs=(TensorMetadata("x", "FP32", (-1, 17)),), outputs=ours.outputs)
    with pytest.raises(SpecError):
        found(there, narrow, f"grpc://{there.grpc}")


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_nobody_there_is_told_with_what_to_do(ours, door):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(Unavailable, match="Start it first"):
            find_contenders([f"{door}://127.0.0.1:{free.getsockname()[1]}"], "digits", ours, warn=print)


def test_a_server_of_another_protocol_is_told_as_such(ours):
    page = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler); print(s.server_port, flush=True); s.serve_forever()"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", page], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        try:
            port = other.stdout.readline().strip()
            with pytest.raises(Unavailable, match="no server of the Open Inference Protocol v2"):
                find_contenders([f"http://127.0.0.1:{port}"], "digits", ours, warn=print)
        finally:
            other.kill()


class Silent(BaseHTTPRequestHandler):
    """A server that does not say what its models take, and cannot read binary tensors: MLServer over HTTP."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        model = {"name": "digits", "platform": "", "inputs": [], "outputs": []}
        self.answer(200, model if "/models/" in self.path else {"name": "ML Server", "version": "1"})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(500, {"error": "what is this?"})

    def log_message(self, *unused):
        pass


def test_a_server_that_does_not_read_binary_tensors_is_refused_before_anything_runs(ours):
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = []
        with pytest.raises(SpecError, match=r"what is this\?.*name its grpc address"):
            find_contenders([f"http://127.0.0.1:{server.server_port}"], "digits", ours, warn=told.append)
        server.shutdown()
    assert "does not say what model 'digits' takes" in told[0]


def test_whoever_listens_is_found_and_nobody_else():
    with socket.create_server(("127.0.0.1", 0)) as here:
        assert listeners(here.getsockname()[1]) == (os.getpid(),)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert listeners(silent.getsockname()[1]) == ()


def test_a_container_s_proxy_is_not_taken_for_the_server(there, ours, monkeypatch):
    from tenure.experiments import contenders

    monkeypatch.setattr(contenders, "_comm", lambda pid: "docker-proxy")
    told = []
    (one,) = found(there, ours, f"grpc://{there.grpc}", told=told)
    assert one.pids == ()
    assert "listens there for a container" in told[0]
    assert "?pid=N" in told[0]


def test_a_process_that_was_named_is_metered_and_one_that_is_not_there_refused(there, ours):
    (one,) = found(there, ours, f"grpc://{there.grpc}?pid={os.getpid()}")
    assert os.getpid() in one.pids
    with pytest.raises(SpecError, match="no process of this machine"):
        found(there, ours, f"grpc://{there.grpc}?pid={2**22 - 1}")


def test_what_is_here_is_told_by_binding_to_it():
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert not is_here("203.0.113.7")  # TEST-NET-3: nobody's
    with pytest.raises(Unavailable):
        is_here("no-such-host.invalid")


def test_a_tree_of_processes_is_the_process_and_what_it_started():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            assert child.pid in tree([os.getpid()])
            assert tree([child.pid]) == (child.pid,)
        finally:
            child.kill()


def test_listeners_are_read_from_the_kernels_tables(tmp_path):
    """IPv6 too; who may not be looked at is left out."""
    (tmp_path / "net").mkdir()
    head = "sl local_address rem_address st tx rx tr tm retrnsmt uid timeout inode\n"
    row = "0: {}:1F41 0:0 {} 0:0 00:0 0 0 0 {} 1\n"
    (tmp_path / "net" / "tcp").write_text(head + row.format("0100007F", "01", 11) + row.format("0100007F", "0A", 12))
    (tmp_path / "net" / "tcp6").write_text(head + row.format("0" * 32, "0A", 13))
    for pid, inode in ((7, 11), (8, 12), (9, 13)):
        folder = tmp_path / str(pid) / "fd"
        folder.mkdir(parents=True)
        Path(folder / "3").symlink_to(f"socket:[{inode}]")
    (tmp_path / "10").mkdir()
    assert sorted(listeners(8001, tmp_path)) == [8, 9]
    assert listeners(8002, tmp_path) == ()


def make_double(path):
    """Write a model with one FP32 output, which is all that the peers' programs for some servers can give: y = 2 x."""
    onnx = pytest.importorskip("onnx", reason="the test model is made with the package onnx (extra demo)")
    tensor, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [tensor("x", kinds.FLOAT, ["n", 16])],
        [tensor("y", kinds.FLOAT, ["n", 16])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)


def measured(contenders, path, tmp_path, **more):
    """Run a small experiment of a model beside contenders; return the trials."""
    np.save(tmp_path / "x.npy", np.random.default_rng(3).normal(size=(8, 16)).astype(np.float32))
    sweep = Sweep(
        architectures=("simple",), transports=("grpc",), batches=(4,), data=("memory",), cell_s=0.05, fresh=False, **more
    )
    prepared = prepare(path, {"x": tmp_path / "x.npy"}, sweep, tmp_path / "work")
    launch = PlainLaunch(tmp_path / "leases")
    bench = Bench(
        name="digits",
        model=path,
        examples=prepared.examples,
        launch=launch,
        workdir=tmp_path / "work",
        near=Envelope(),
        contenders=contenders,
        link=parse_link(""),
    )
    try:
        return measure_sweep(
            bench,
            sweep,
            settings(sweep, files=False, contenders=contenders),
            seed=1,
            make_trial=lambda **fields: Trial(id="t", run_id="r", stage="s", fingerprint="f", machine=MACHINE, **fields),
            record=lambda trial: None,
            progress=lambda text, done=None: None,
        )
    finally:
        launch.stop_all()


@pytest.mark.real
def test_a_contender_is_measured_in_the_same_order_with_its_processes_and_its_own_statistics(there, ours, tmp_path):
    contenders = found(there, ours, f"http://{there.http}?name=peer", f"grpc://{there.grpc}?name=peer", largest_batch=4)
    make_digits(tmp_path / "digits.onnx")
    trials = measured(contenders, tmp_path / "digits.onnx", tmp_path, repeats=2)
    theirs = [trial for trial in trials if trial.configuration["server"] == "peer"]
    ways = sorted((trial.configuration["transport"], trial.configuration["interaction"]) for trial in theirs)
    assert ways == [("grpc", "async"), ("grpc", "sync"), ("http", "async"), ("http", "sync")]
    for trial in theirs:
        assert trial.metrics["wrong_answers"].maximum == 0
        assert trial.metrics["server_memory_bytes"].mean > 1e6
        assert trial.metrics["server_cpu"].mean > 0
        assert trial.metrics["compute_s"].mean > 0
        assert "recogniser_cpu" not in trial.metrics
    places = sorted(place for trial in trials for place in trial.curves["order"])
    assert places == list(range(2 * len(trials)))


@pytest.mark.real
@pytest.mark.parametrize("name", ["triton", "mlserver", "kserve"])
def test_servers_of_others_as_they_are(name, tmp_path):
    root = homes.default_root()
    if not homes.made(root, name):
        pytest.skip(f"{name} is not below {root}: make peers")
    path = tmp_path / "double.onnx"
    make_double(path)
    with Model(str(path)) as model:
        ours = model.metadata()
    order = Order(models={"double": path}, folder=tmp_path / name)
    with start(name, peers.peer(name).launch(root / name, order), tmp_path / name) as served:
        told = []
        (one,) = find_contenders([f"grpc://{served.addresses['grpc']}"], "double", ours, largest_batch=4, warn=told.append)
        trials = measured((one,), path, tmp_path, repeats=1)
    assert one.name == name
    assert served.pid in one.pids
    theirs = [trial for trial in trials if trial.configuration["server"] == name]
    assert len(theirs) == 2
    for trial in theirs:
        assert trial.metrics["wrong_answers"].maximum == 0
        assert trial.metrics["server_memory_bytes"].mean > 10e6
