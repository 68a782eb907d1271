"""The pictures' example: what its job file says can be run, and its net is a training program that learns."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tenure.jobfile import parse_job_file
from tenure.train.programs import load_arrays, load_program

EXAMPLES = Path(__file__).parents[2] / "examples"
JOB = parse_job_file((EXAMPLES / "cifar10.toml").read_text())
PREPARE, TRAIN = JOB.stages
CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Zips as the job file describes them: cats are bright at the top, dogs on the left."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        for name in CLASSES:
            with zipfile.ZipFile(folder / f"{part}-{name}.zip", "w") as file:
                for number in range(count):
                    pixels = rng.integers(0, 120, (32, 32, 3))
                    pixels[(slice(0, 16), slice(None)) if name == "cat" else (slice(None), slice(8, 24))] += 130
                    with file.open(f"{part}/{name}/{number:04d}.png", "w") as member:
                        Image.fromarray(pixels.astype(np.uint8)).save(member, "PNG")
    return folder


@pytest.fixture(scope="module")
def arrays(pictures, tmp_path_factory):
    """What the first stage's command makes, started as a lease starts it."""
    folder = tmp_path_factory.mktemp("worker")
    beside = Path(sys.executable).parent
    env = {"TENURE_INPUT_PICTURES": str(pictures), "TENURE_WORKER_DIR": str(folder), "PATH": f"{beside}:/usr/bin:/bin"}
    subprocess.run(PREPARE.command, cwd=EXAMPLES, env=env | python_path(), check=True, timeout=60)
    return folder / PREPARE.outputs["pictures"]


def python_path():
    return {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def test_the_first_stage_leaves_what_the_second_reads(arrays):
    assert TRAIN.inputs == {"pictures": f"{PREPARE.name}:{PREPARE.outputs['pictures']}"}
    train, held_out = load_arrays({"pictures": str(arrays)})
    assert (train["x"].shape, held_out["x"].shape) == ((80, 32, 32, 3), (20, 32, 32, 3))


def test_both_examples_prepare_the_same_pictures_in_the_same_way():
    prepare, train = parse_job_file((EXAMPLES / "cifar10_frozen.toml").read_text()).stages
    assert prepare == PREPARE
    assert train.inputs["pictures"] == TRAIN.inputs["pictures"]
    assert train.inputs["model"] == train.options["model"], "so that a missing one is named before anything is leased"


def test_the_net_learns_with_the_options_of_the_job_file(arrays, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rounds = 30
    program = load_program(TRAIN.program, EXAMPLES, {**TRAIN.options, "rounds": rounds, "width": 4})
    train, held_out = program.data({"pictures": str(arrays)})
    weights = program.build(TRAIN.seed)
    losses = []
    for number in range(rounds):
        rng = np.random.default_rng(number)
        chosen = rng.permutation(len(train["y"]))[:32]
        summed, loss, n = program.gradient(weights, {name: values[chosen] for name, values in train.items()}, rng)
        weights = program.update(weights, summed, n, number)
        losses.append(loss / n)
    assert losses[0] > np.log(10) - 1
    assert losses[-1] < 1  # about 0.5 with softened labels is the least
    assert program.evaluate(weights, held_out) >= 0.9


def test_training_pictures_are_moved_and_mirrored_and_those_to_judge_by_are_not():
    pytest.importorskip("torch")
    net = load_program(TRAIN.program, EXAMPLES, dict(TRAIN.options))._whole
    x = np.zeros((64, 32, 32, 3), np.uint8)
    x[:, 16, 10] = 255
    assert net.transform(x, None) is x
    seen = net.transform(x, np.random.default_rng(0))
    rows, columns = np.nonzero(seen[..., 0])[1:]
    assert seen.shape == x.shape
    assert seen.dtype == np.uint8
    assert set(rows) == set(range(16 - 3, 16 + 4))
    assert set(columns) <= {*range(10 - 3, 10 + 4), *range(21 - 3, 21 + 4)}
    assert min((columns < 16).sum(), (columns > 16).sum()) > 10


def test_the_rate_rises_then_falls_and_ends_at_nothing():
    pytest.importorskip("torch")
    assert TRAIN.options["rounds"] == TRAIN.max_rounds
    net = load_program(TRAIN.program, EXAMPLES, dict(TRAIN.options))._whole
    rates = np.array([net.schedule(number) for number in range(TRAIN.max_rounds)])
    assert rates.argmax() == TRAIN.max_rounds // 5 - 1
    assert rates.max() == 1
    assert rates[-1] == 0
    assert net.schedule(TRAIN.max_rounds + 5) == 0
