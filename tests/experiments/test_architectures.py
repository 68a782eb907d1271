import re
from dataclasses import replace

import numpy as np
import pytest

from tenure.errors import JobFailed, SpecError
from tenure.experiments import architectures, netns
from tenure.experiments.architectures import Served, measure_clients, measure_serving, percentile, server_command
from tenure.resources import Envelope
from tenure.serve.client import Model
from tenure.trials import Trial

from .fake_launch import PlainLaunch
from .synthetic import MACHINE

onnx = pytest.importorskip("onnx", reason="the test model is made with the package onnx (extra demo)")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A linear classifier of 64 pixels, as a file with its inputs and its own answers."""
    folder = tmp_path_factory.mktemp("model")
    chance = np.random.default_rng(3)
    weights = chance.normal(size=(64, 10)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["scores"]),
        onnx.helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "digits",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["n"])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, folder / "digits.onnx")
    images = chance.normal(size=(200, 64)).astype(np.float32)
    np.save(folder / "x.npy", images)
    with Model(str(folder / "digits.onnx")) as alone:
        found = alone.predict(images)
    np.save(folder / "y.npy", found["label"] if isinstance(found, dict) else found)
    return folder


@pytest.fixture
def launch(tmp_path):
    launch = PlainLaunch(tmp_path / "leases")
    yield launch
    launch.stop_all()


@pytest.fixture
def served(model, launch, tmp_path):
    return Served(
        name="digits",
        model=model / "digits.onnx",
        inputs=model / "x.npy",
        expected=model / "y.npy",
        launch=launch,
        workdir=tmp_path / "specs",
        app=Envelope(),
        server=Envelope(),
        seed=5,
        repeats=2,
        seconds=0.05,
        concurrency=4,
    )


def make_trial(**fields):
    return Trial(id="t", run_id="r", stage="serve", fingerprint="f", machine=MACHINE, **fields)


def quiet(text, *, done=None):
    pass


@pytest.mark.real
def test_every_architecture_is_measured_and_every_answer_is_right(served, launch):
    recorded = []
    trials = measure_serving(served, batches=(1, 8), make_trial=make_trial, record=recorded.append, progress=quiet)
    assert recorded == trials
    reached = "loopback" if netns.available() else "netns"
    seen = {
        tuple(t.configuration[key] for key in ("architecture", "transport", "interaction", "batch", "link")) for t in trials
    }
    places = [("simple", "none", "in-process")]
    places += [(a, t, link) for a, link in (("microservice", "loopback"), ("distributed", reached)) for t in ("http", "grpc")]
    assert seen == {(a, t, i, batch, link) for a, t, link in places for i in ("sync", "async") for batch in (1, 8)}
    for trial in trials:
        assert trial.metrics["wrong_answers"].maximum == 0
        assert trial.metrics["images_per_s"].n == served.repeats
        assert 0 < trial.metrics["p50_s"].mean <= trial.metrics["p99_s"].mean
        apart = trial.configuration["architecture"] != "simple"
        assert (trial.metrics["server_memory_bytes"].mean > 0) == apart
        assert trial.metrics["app_memory_bytes"].mean > 0
    assert all(launched.wait(0.0) is not None for launched in launch.started)


@pytest.mark.real
def test_without_a_namespace_the_distributed_architecture_is_labelled_loopback(served, monkeypatch):
    monkeypatch.setattr(netns, "available", lambda: "no right to make network namespaces")
    trials = measure_serving(
        served,
        batches=(1,),
        interactions=("sync",),
        transports=("grpc",),
        make_trial=make_trial,
        record=[].append,
        progress=quiet,
    )
    (far,) = [t for t in trials if t.configuration["architecture"] == "distributed"]
    assert far.configuration["link"] == "loopback"
    assert "no right to make network namespaces" in far.note


@pytest.mark.real
@pytest.mark.parametrize(("architecture", "transport"), [("simple", "none"), ("microservice", "grpc")])
def test_clients_at_once_add_their_rates_and_memories(served, launch, architecture, transport):
    configuration = {"architecture": architecture, "transport": transport, "interaction": "sync", "batch": 8}
    recorded = []
    trial = measure_clients(served, configuration, clients=3, make_trial=make_trial, record=recorded.append, progress=quiet)
    assert recorded == [trial]
    assert trial.configuration["clients"] == 3
    metrics = trial.metrics
    assert metrics["app_memory_bytes"].n == 3
    total = 3 * metrics["app_memory_bytes"].mean + metrics["server_memory_bytes"].mean
    assert metrics["memory_bytes"].mean == pytest.approx(total)
    assert len(launch.started) == (3 if architecture == "simple" else 4)


@pytest.mark.real
def test_a_wrong_answer_refuses_the_trial_and_ends_what_runs(served, launch, model, tmp_path):
    wrong = np.load(model / "y.npy")
    wrong[:] = (wrong + 1) % 10
    np.save(tmp_path / "wrong.npy", wrong)
    mistaken = Served(
        **{name: getattr(served, name) for name in Served.__dataclass_fields__} | {"expected": tmp_path / "wrong.npy"}
    )
    recorded = []
    with pytest.raises(JobFailed, match="answers differ"):
        measure_serving(mistaken, batches=(1,), make_trial=make_trial, record=recorded.append, progress=quiet)
    assert not recorded
    assert all(launched.wait(0.0) is not None for launched in launch.started)


@pytest.mark.real
def test_an_application_that_fails_tells_why(served, launch, tmp_path):
    lost = replace(served, inputs=tmp_path / "none.npy")
    configuration = {"architecture": "simple", "transport": "none", "interaction": "sync", "batch": 1}
    with pytest.raises(JobFailed, match=re.escape("none.npy")):
        measure_clients(lost, configuration, clients=1, make_trial=make_trial, record=[].append, progress=quiet)


def test_an_architecture_that_does_not_exist_is_refused(served):
    configuration = {"architecture": "simple", "transport": "grpc", "interaction": "sync", "batch": 1}
    with pytest.raises(SpecError, match="no such serving architecture"):
        measure_clients(served, configuration, clients=1, make_trial=make_trial, record=[].append, progress=quiet)


def test_a_door_that_is_not_asked_for_stays_shut(model):
    command = server_command(model / "digits.onnx", name="digits", ports={"grpc": 0})
    assert "--http-port=off" in command.argv
    assert command.ports == {"grpc": 0}


def test_percentiles_are_nearest_rank():
    values = [float(index) for index in range(1, 201)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (100.0, 198.0, 7.0)
    assert architectures.INTERACTIONS == ("sync", "async")
