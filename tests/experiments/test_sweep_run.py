"""A whole experiment on real processes: every setting in every repeat, its account complete, nothing left behind."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tenure.errors import JobFailed, SpecError
from tenure.experiments import netns
from tenure.experiments.stage_sweep import prepare
from tenure.experiments.sweep import order, settings
from tenure.experiments.sweep_nodes import Bench
from tenure.experiments.sweep_run import RAW, cells, measure_sweep
from tenure.links import parse_link
from tenure.resources import Envelope
from tenure.serve.load.orders import STAGES
from tenure.sweeps import Sweep
from tenure.trials import Trial

from .fake_launch import PlainLaunch
from .synthetic import MACHINE

onnx = pytest.importorskip("onnx", reason="the test model is made with the package onnx (extra demo)")
pytestmark = pytest.mark.real
PICTURES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The mean colour of a picture, and some pictures; one that is none."""
    folder = tmp_path_factory.mktemp("model")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)],
        "colours",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", 3, 32, 32])],
        [tensor("y", onnx.TensorProto.FLOAT, ["n", 3])],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), folder / "colours.onnx"
    )
    chance = np.random.default_rng(1)
    (folder / "images").mkdir()
    for index in range(PICTURES):
        pixels = chance.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    (folder / "images" / "00.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def launch(tmp_path):
    launch = PlainLaunch(tmp_path / "leases")
    yield launch
    launch.stop_all()


def make_trial(**fields):
    return Trial(id="t", run_id="r", stage="serve", fingerprint="f", machine=MACHINE, **fields)


def quiet(text, *, done=None):
    pass


def run(model, launch, tmp_path, sweep, *, recorded, expected=None, progress=quiet):
    prepared = prepare(model / "colours.onnx", {"images": model / "images"}, sweep, tmp_path / "work")
    if expected is not None:
        np.save(prepared.examples.expected, expected(np.load(prepared.examples.expected)))
    bench = Bench(
        name="colours",
        model=model / "colours.onnx",
        examples=prepared.examples,
        launch=launch,
        workdir=tmp_path / "work",
        near=Envelope(),
        far=Envelope(),
        link=parse_link(sweep.link),
    )
    far_link = "loopback" if netns.available() else str(bench.link) or "netns"
    planned = settings(sweep, files=True, far_link=far_link)
    return measure_sweep(bench, sweep, planned, seed=2, make_trial=make_trial, record=recorded.append, progress=progress)


def test_every_setting_is_measured_in_every_repeat_and_its_account_is_complete(model, launch, tmp_path):
    sweep = Sweep(batches=(4,), repeats=2, cell_s=0.05, in_flight=3, images=PICTURES, normalise="unit", fresh=False)
    recorded = []
    trials = run(model, launch, tmp_path, sweep, recorded=recorded)
    assert tuple(recorded) == trials
    assert len(trials) == 6 * 2 * 2 + 1
    places = sorted(place for trial in trials for place in trial.curves["order"])
    assert places == list(range(len(trials) * 2))
    for trial in trials:
        metrics, factors = trial.metrics, trial.configuration
        assert trial.source == "sweep"
        assert metrics["images_per_s"].n == len(trial.curves["images_per_s"]) == 2
        assert metrics["images_per_s"].mean == pytest.approx(np.mean(trial.curves["images_per_s"]))
        assert metrics["wrong_answers"].maximum == 0
        assert sum(metrics[name].mean for name in STAGES) == pytest.approx(metrics["wall_s"].mean, rel=0.02)
        assert (metrics["load_data_s"].mean > 0) == (factors["data"] == "files")
        assert 0 < metrics["p50_s"].mean <= metrics["p99_s"].mean == trial.curves["latency_s"][990]
        assert metrics["prepare_model_s"].n == 3
        simple = factors["architecture"] == "simple"
        parties = {"app", "recogniser"} if simple else {"app", "client", "server", "recogniser"}
        assert {name.removesuffix("_cpu") for name in metrics if name.endswith("_cpu")} == parties
        assert metrics["app_cpu"].mean > metrics["recogniser_cpu" if simple else "client_cpu"].mean
        assert all(metrics[f"{name}_cpu_s_per_image"].mean >= 0 for name in parties)
        if not simple:
            assert metrics["server_cpu"].mean >= metrics["recogniser_cpu"].mean > 0
            assert metrics["server_memory_bytes"].mean > metrics["recogniser_memory_bytes"].mean > 1 << 20
            assert metrics["server_cpu_min"].mean <= metrics["server_cpu_max"].mean
            assert metrics["compute_s"].mean > 0
        assert metrics["app_memory_bytes"].mean > 1 << 20
        assert ("3 requests in flight" in trial.note) == (factors["interaction"] == "async")
    raw = [json.loads(line) for line in (tmp_path / "work" / RAW).read_text().splitlines()]
    assert [each["order"] for each in raw] == list(range(len(trials) * 2))
    assert all(each["latencies_s"] for each in raw)
    assert all(launched.wait(0.0) is not None for launched in launch.started)
    assert len(launch.started) == 2  # a lease is a node: the server's and the client's


@pytest.mark.netns
@pytest.mark.skipif(bool(netns.available()), reason=f"no namespace: {netns.available()}")
def test_a_declared_link_is_crossed_and_its_forwarder_is_a_party(model, launch, tmp_path):
    sweep = Sweep(
        architectures=("distributed",),
        interactions=("sync",),
        transports=("http",),
        batches=(1,),
        data=("memory",),
        repeats=2,
        cell_s=0.2,
        images=PICTURES,
        normalise="unit",
        twins=False,
        fresh=False,
        link="rate=100Mbit,delay=5ms",
    )
    (trial,) = run(model, launch, tmp_path, sweep, recorded=[])
    assert trial.configuration["link"] == "100Mbit 5ms"
    assert trial.metrics["p50_s"].minimum > 0.01  # there and back
    assert 0 < trial.metrics["link_busy"].mean <= 1
    assert trial.metrics["forwarder_memory_bytes"].mean > 0
    assert trial.metrics["forwarder_cpu"].mean >= 0


def test_a_wrong_answer_refuses_the_experiment_and_ends_what_runs(model, launch, tmp_path):
    sweep = Sweep(
        architectures=("simple",), batches=(1,), repeats=1, cell_s=0.05, images=PICTURES, normalise="unit", fresh=False
    )
    recorded = []
    with pytest.raises(JobFailed, match="answers differ"):
        run(model, launch, tmp_path, sweep, recorded=recorded, expected=lambda right: right + 1)
    assert not recorded
    assert all(launched.wait(0.0) is not None for launched in launch.started)


def test_what_is_broken_off_keeps_its_whole_repeats(model, launch, tmp_path):
    sweep = Sweep(
        architectures=("simple",), batches=(1,), repeats=3, cell_s=0.05, images=PICTURES, normalise="unit", fresh=False
    )
    recorded = []

    def interrupted(text, *, done=None):
        if text.startswith("repeat 3"):
            raise KeyboardInterrupt

    prepared = prepare(model / "colours.onnx", {"images": model / "images"}, sweep, tmp_path / "work")
    bench = Bench(
        name="colours",
        model=model / "colours.onnx",
        examples=prepared.examples,
        launch=launch,
        workdir=tmp_path / "work",
        near=Envelope(),
    )
    with pytest.raises(KeyboardInterrupt):
        measure_sweep(
            bench,
            sweep,
            settings(sweep, files=True),
            seed=0,
            make_trial=make_trial,
            record=recorded.append,
            progress=interrupted,
        )
    assert {trial.metrics["images_per_s"].n for trial in recorded} == {2}
    assert all("2 of 3 repeats: broken off." in trial.note for trial in recorded)
    assert all(launched.wait(0.0) is not None for launched in launch.started)
    before = {trial.configuration["interaction"]: trial for trial in recorded if not trial.configuration.get("twin")}
    recorded.clear()
    steps = []
    measure_sweep(
        bench,
        sweep,
        settings(sweep, files=True),
        seed=0,
        make_trial=make_trial,
        record=recorded.append,
        progress=lambda text, *, done=None: steps.append(text),
    )
    assert not [step for step in steps if step.startswith(("repeat 1", "repeat 2"))]
    for trial in recorded:
        assert trial.metrics["images_per_s"].n == 3
        assert "2 repeats are from before it was broken off." in trial.note
        if trial.configuration["data"] == "memory" and not trial.configuration.get("twin"):
            earlier = before[trial.configuration["interaction"]]
            if earlier.configuration == trial.configuration:
                assert trial.curves["images_per_s"][:2] == earlier.curves["images_per_s"]


def test_memory_is_that_of_processes_that_have_run_nothing_else(model, launch, tmp_path):
    sweep = Sweep(
        architectures=("simple", "microservice"),
        interactions=("async",),
        transports=("http",),
        batches=(1, 64),
        repeats=2,
        cell_s=0.05,
        images_in_flight=512,
        images=PICTURES,
        normalise="unit",
        twins=False,
    )
    trials = run(model, launch, tmp_path, sweep, recorded=[])
    found = {tuple(t.configuration[name] for name in ("architecture", "batch", "data")): t.metrics for t in trials}
    for batch in (1, 64):
        one, two = (found["microservice", batch, data] for data in ("memory", "files"))
        assert one["server_memory_bytes"] == two["server_memory_bytes"]
        assert (one["server_memory_bytes"].n, one["app_memory_bytes"].n, two["app_memory_bytes"].n) == (1, 1, 2)
    small, large = (found["microservice", batch, "memory"]["server_memory_bytes"].mean for batch in (1, 64))
    assert large - small > 4 << 20  # 8 x 64 pictures of 12 KB are under way
    # A pair of nodes for each of the four, and those of the repeats.
    assert len(launch.started) == 4 + 1


def test_a_node_that_dies_ends_the_experiment_with_its_last_words(model, launch, tmp_path):
    sweep = Sweep(
        architectures=("simple",), batches=(1,), repeats=3, cell_s=0.05, images=PICTURES, normalise="unit", fresh=False
    )
    recorded = []

    def killing(text, *, done=None):
        if text.startswith("repeat 2"):
            launch.started[0].kill()

    with pytest.raises(JobFailed, match="the node ended"):
        run(model, launch, tmp_path, sweep, recorded=recorded, progress=killing)
    assert {trial.metrics["images_per_s"].n for trial in recorded} == {1}


@pytest.mark.parametrize(("max_s", "repeats"), [(0.0, 9), (1e6, 9), (50.0, 5), (1e-6, 2)])
def test_no_repeat_begins_that_would_end_too_late(max_s, repeats):
    sweep = Sweep(architectures=("simple",), interactions=("sync",), batches=(1, 8), data=("memory",), repeats=9, max_s=max_s)
    planned = settings(sweep, files=False)
    clock = [0.0]

    class Instant:
        def run(self, setting, *, repeat, **told):
            clock[0] += 10.0 / len(planned) if repeat >= 0 else 100.0  # a repeat takes 10 s, warming up does not count
            return repeat

    drawn = list(order(planned, sweep, 0))
    found = list(cells(Instant(), sweep, planned, drawn=drawn, progress=quiet, now=lambda: clock[0]))
    assert found == [repeat for repeat in range(repeats) for _ in planned]


def test_pictures_that_cannot_be_decoded_are_told_and_the_others_used(model, tmp_path):
    sweep = Sweep(images=PICTURES, normalise="unit")
    prepared = prepare(model / "colours.onnx", {"images": model / "images"}, sweep, tmp_path)
    assert len(prepared.examples.files) == PICTURES
    assert [each.partition(":")[0] for each in prepared.skipped] == ["00.png"]
    assert np.load(prepared.examples.inputs).shape == (PICTURES, 3, 32, 32)
    assert prepared.fixed_batch == 0


def test_a_model_of_floats_needs_to_be_told_its_normalisation(model, tmp_path):
    with pytest.raises(SpecError, match="normalise"):
        prepare(model / "colours.onnx", {"images": model / "images"}, Sweep(), Path(tmp_path))


def test_an_experiment_needs_something_to_send(model, tmp_path):
    with pytest.raises(SpecError, match=r"inputs\.images"):
        prepare(model / "colours.onnx", {}, Sweep(), tmp_path)
