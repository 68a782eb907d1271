from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.errors import SpecError
from tenure.train.feature_cache import Entry, cache_folder
from tenure.train.features import Frozen
from tenure.train.programs import load_arrays, load_program
from tenure.train.records import read_arrays

from .driver import Driver, Tiny

BATCH = 4
RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (34, 6, 6, 3), dtype=np.uint8)
LABELS = (IMAGES.mean(axis=(1, 2, 3)) > 127).astype(np.int64)


class Counting:
    """A frozen part that knows how many images it was given."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.seen, self.sizes = scale, 0, []

    def __call__(self, images: Any) -> Any:
        self.seen += len(images)
        self.sizes.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float32) / 255 * self.scale
        return np.stack([flat.mean(axis=1), flat.max(axis=1), flat.min(axis=1), flat.std(axis=1)], axis=1)


class Head(Tiny):
    """Softmax regression over four features."""

    def data(self, inputs: Any) -> Any:
        return load_arrays(inputs)

    def predict(self, weights: Any, x: Any) -> Any:
        return np.argmax(x @ weights["w"] + weights["b"], axis=1)


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "images"
    folder.mkdir()
    for part, rows in (("train", slice(0, 24)), ("test", slice(24, 34))):
        np.save(folder / f"x_{part}.npy", IMAGES[rows])
        np.save(folder / f"y_{part}.npy", LABELS[rows])
    return {"images": str(folder)}


def frozen(tmp_path: Path, features: Any = None, identity: Any = "weights 1", **options: Any) -> Frozen:
    given = {"folder": tmp_path / "cache", "batch": BATCH, "batches_per_piece": 1, **options}
    return Frozen(features or Counting(), identity, given.pop("head", Head()), **given)


def test_a_piece_of_several_batches_holds_what_each_batch_gave(tmp_path, images):
    features = Counting()
    train, _ = frozen(tmp_path, features, batches_per_piece=3).data(images)
    assert np.array_equal(train["x"], frozen(tmp_path / "single").data(images)[0]["x"])
    assert max(features.sizes) == BATCH


def entry_of(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    return folder


def test_the_head_is_given_features_in_place_of_images_and_each_image_is_computed_once(tmp_path, images):
    first, second = Counting(), Counting()
    train, held_out = frozen(tmp_path, first).data(images)
    assert np.array_equal(train["x"], Counting()(IMAGES[:24]))
    assert np.array_equal(held_out["x"], Counting()(IMAGES[24:]))
    assert np.array_equal(train["y"], LABELS[:24])
    assert first.seen == 34
    again, _ = frozen(tmp_path, second).data(images)
    assert second.seen == 0
    assert np.array_equal(again["x"], train["x"])
    assert not list(entry_of(tmp_path).glob("pieces/*")) + list(entry_of(tmp_path).glob("claims/*"))


@pytest.mark.parametrize("change", ["weights", "images", "batch"])
def test_other_weights_images_or_batches_are_another_key(tmp_path, images, change):
    frozen(tmp_path).data(images)
    counting = Counting(scale=2.0)
    if change == "images":
        other = IMAGES[:24].copy()
        other[7, 2, 2, 1] ^= 1
        np.save(Path(images["images"]) / "x_train.npy", other)
    identity, batch = "weights 2" if change == "weights" else "weights 1", 5 if change == "batch" else BATCH
    train, _ = frozen(tmp_path, counting, identity, batch=batch).data(images)
    assert counting.seen == 34
    assert np.array_equal(train["x"][:7], Counting(2.0)(IMAGES[:7]))


def test_random_augmentation_is_refused_unless_a_choice_is_made(tmp_path, images):
    def augmenting(x: Any, rng: Any) -> Any:
        return Counting()(x) + (0 if rng is None else rng.normal(size=(len(x), 4)))

    with pytest.raises(SpecError, match="per-pass"):
        frozen(tmp_path, augmenting).data(images)
    with pytest.raises(SpecError, match="nothing draws random numbers"):
        frozen(tmp_path, augment="per-pass").data(images)
    with pytest.raises(SpecError, match="augment must be one of"):
        frozen(tmp_path, augment="sometimes")


def test_augmented_copies_are_kept_per_pass_over_the_data(tmp_path, images):
    def augmenting(x: Any, rng: Any) -> Any:
        return Counting()(x) + (0 if rng is None else rng.normal(0, 0.01, (len(x), 4)).astype(np.float32))

    program = frozen(tmp_path, augmenting, augment="per-pass", passes=3)
    train, held_out = program.data(images)
    assert train["x"].shape == (72, 4)
    assert np.array_equal(train["y"], np.tile(LABELS[:24], 3))
    copies = train["x"].reshape(3, 24, 4)
    assert not np.array_equal(copies[0], copies[1])
    assert np.array_equal(held_out["x"], Counting()(IMAGES[24:]))
    driver = Driver(tmp_path / "stage", program=program, batch=24, max_rounds=4, inputs=images)
    seen = []
    gradient = program.head.gradient
    program.head.gradient = lambda weights, batch, rng: (seen.append(batch["x"]), gradient(weights, batch, rng))[1]
    driver.run(1)
    for round_ in range(4):
        rows = np.concatenate(seen[6 * round_ : 6 * round_ + 6])
        assert np.array_equal(np.sort(rows, axis=0), np.sort(copies[round_ % 3], axis=0))


def test_an_estimator_is_a_head_too(tmp_path, images):
    linear = pytest.importorskip("sklearn.linear_model", reason="needs the extra demo")
    program = frozen(tmp_path, head=linear.SGDClassifier(random_state=0))
    driver = Driver(tmp_path / "stage", program=program, max_rounds=3, inputs=images)
    driver.run(2)
    assert driver.outcomes[-1].state == "done"


def test_a_spoilt_piece_of_the_features_is_found_and_it_alone_is_computed_again(tmp_path, images):
    frozen(tmp_path).data(images)
    path = entry_of(tmp_path) / "x_train.npy"
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    spoilt[-4 * 6 - 3 * BATCH * 16] ^= 4  # a byte of the fourth of six pieces
    path.write_bytes(spoilt)
    counting = Counting()
    train, _ = frozen(tmp_path, counting).data(images)
    assert np.array_equal(train["x"], Counting()(IMAGES[:24]))
    assert counting.seen == BATCH
    assert path.read_bytes() == whole


def test_features_that_were_cut_off_are_computed_again(tmp_path, images):
    frozen(tmp_path).data(images)
    path = entry_of(tmp_path) / "x_test.npy"
    path.write_bytes(path.read_bytes()[:-3])
    counting = Counting()
    _, held_out = frozen(tmp_path, counting).data(images)
    assert np.array_equal(held_out["x"], Counting()(IMAGES[24:]))
    assert counting.seen == 10


def test_a_torn_piece_is_computed_again(tmp_path, images):
    program = frozen(tmp_path)
    steps = program.prepare(images)
    while not list(tmp_path.glob("cache/*/pieces/x_test-*")):
        next(steps)
    (torn,) = tmp_path.glob("cache/*/pieces/x_test-*")
    torn.write_bytes(torn.read_bytes()[:-5])
    _, held_out = frozen(tmp_path).data(images)
    assert np.array_equal(held_out["x"], Counting()(IMAGES[24:]))
    assert list(entry_of(tmp_path).glob("quarantine/*"))


def test_a_slot_that_ends_in_the_middle_goes_on_in_the_next_one(tmp_path, images):
    counting = Counting()
    program = frozen(tmp_path, counting)
    driver = Driver(tmp_path / "stage", program=program, max_rounds=2, inputs=images, slot_s=2.0)
    driver.program = _Slow(program, driver)
    assert driver.run(2) == Driver(tmp_path / "one", program=frozen(tmp_path), max_rounds=2, inputs=images).run(1)
    assert counting.seen == 34
    left = [outcome for outcome in driver.outcomes if outcome.state == "continue"]
    assert len(left) >= 4
    assert (tmp_path / "stage" / "store" / "plans" / "0000.json").exists()


class _Slow:
    """Passes everything on, and lets the driver's clock go on by 0.6 s with each step of the preparation."""

    def __init__(self, program: Frozen, driver: Driver) -> None:
        self._program, self._driver = program, driver

    def prepare(self, inputs: Any) -> Any:
        for step in self._program.prepare(inputs):
            self._driver.now_s += 0.6
            yield step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def test_a_preparation_that_gets_nowhere_is_given_up_with_its_reason(tmp_path, images):
    from tenure.errors import JobFailed

    driver = Driver(tmp_path / "stage", program=frozen(tmp_path), inputs=images, slot_s=0.05, max_idle_slots=2)
    with pytest.raises(JobFailed, match="0 of 9 pieces"):
        driver.run(1)


def test_the_least_recently_used_features_make_room_and_none_in_use_do(tmp_path, images):
    root, free = tmp_path / "cache", os.statvfs(tmp_path)
    for number, key in enumerate(("old", "older", "mapped")):
        entry = Entry(root, key)
        (entry.folder / "x_train.npy").write_bytes(b"x" * 400_000)
        os.utime(entry.folder / "used", (1000 - 10 * number, 1000 - 10 * number))
        for user in () if key == "mapped" else (entry.folder / "users").iterdir():
            user.unlink()
    new = Entry(root, "new", limit_bytes=1_300_000)
    new.make_room(300_000)
    assert sorted(path.name for path in root.iterdir()) == ["mapped", "new", "old"]
    with pytest.raises(SpecError, match="in use"):
        new.make_room(1_200_000)
    assert (root / "mapped").exists(), free


def test_a_run_s_features_lie_below_the_home_that_all_runs_share():
    assert cache_folder({"TENURE_RUN_DIR": "/home/x/runs/r1/train"}) == Path("/home/x/cache/features")
    assert cache_folder({"TENURE_HOME": "/h", "TENURE_RUN_DIR": "/a/b/c"}) == Path("/h/cache/features")
    assert cache_folder({"TENURE_RUN_DIR": "/a/b/stage"}) == Path("/a/b/stage/cache/features")
    with pytest.raises(SpecError, match="folder"):
        cache_folder({})


def test_features_that_are_not_one_row_per_image_or_not_finite_are_refused(tmp_path, images):
    with pytest.raises(SpecError, match="a row for each"):
        frozen(tmp_path, lambda x: x.reshape(-1)).data(images)
    with pytest.raises(SpecError, match="NaN"):
        frozen(tmp_path, lambda x: Counting()(x) * np.float32(np.nan), "nan").data(images)


# --- real processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from tenure.train.features import Frozen
    from tests.train.test_features import Counting, Head

    folder, images, pause_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

    def features(x):
        with open(folder / f"seen-{os.getpid()}", "a") as file:
            file.write("x" * len(x))
        time.sleep(pause_s)
        return Counting()(x)

    print("ready", flush=True)
    sys.stdin.readline()
    program = Frozen(features, "weights 1", Head(), folder=folder / "cache", batch=2, batches_per_piece=1)
    train, _ = program.data({"images": images})
    print(float(train["x"].sum()), flush=True)
"""


def start(tmp_path: Path, images: dict[str, str], worker: int, pause_s: float) -> subprocess.Popen[str]:
    script = textwrap.dedent(SCRIPT)
    root = Path(__file__).parents[2]
    env = {**os.environ, "TENURE_WORKER": str(worker), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", script, str(tmp_path), images["images"], str(pause_s)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def seen(tmp_path: Path) -> list[int]:
    return sorted(path.stat().st_size for path in tmp_path.glob("seen-*"))


@pytest.mark.real
def test_processes_that_start_together_share_the_work_and_agree(tmp_path, images):
    both = [start(tmp_path, images, worker, 0.05) for worker in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    answers = [one.communicate(timeout=60)[0] for one in both]
    assert answers[0] == answers[1] == f"{float(Counting()(IMAGES[:24]).sum())}\n"
    assert sum(seen(tmp_path)) == 34
    assert min(seen(tmp_path)) >= 4


@pytest.mark.real
def test_a_process_killed_in_a_piece_loses_that_piece_only(tmp_path, images):
    killed = start(tmp_path, images, 0, 0.2)
    killed.stdin.write("go\n")
    killed.stdin.flush()
    until = time.monotonic() + 60
    while sum(seen(tmp_path)) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    lost = sum(seen(tmp_path)) - 2 * len(list(tmp_path.glob("cache/*/pieces/x_test-*")))
    other = start(tmp_path, images, 0, 0.0)
    answer = other.communicate("go\n", timeout=60)[0]
    assert answer.splitlines()[-1] == f"{float(Counting()(IMAGES[:24]).sum())}"
    assert sum(seen(tmp_path)) == 34 + lost
    assert lost <= 2


# --- models that are cut ----------------------------------------------------------------------------------------------


def test_a_torch_module_that_is_cut_trains_alike_with_and_without_the_cache(tmp_path, images, monkeypatch):
    pytest.importorskip("torch", reason="needs the extra torch")
    (tmp_path / "net.py").write_text(
        textwrap.dedent("""
            import torch
            from torch import nn

            class Net(nn.Module):
                def __init__(self, noise=0.0):
                    super().__init__()
                    self.noise = noise
                    self.body = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.ReLU())
                    self.classifier = nn.Linear(5, 2)
                    with torch.no_grad():
                        for parameter in self.body.parameters():
                            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))

                def transform(self, x, rng):
                    if rng is None or not self.noise:
                        return x
                    return (x * rng.uniform(0.9, 1, (len(x), 1, 1, 1))).astype("float32")

                def forward(self, x):
                    return self.classifier(self.body(x))
        """)
    )
    monkeypatch.setenv("TENURE_HOME", str(tmp_path / "home"))

    def made(**options: Any) -> Any:
        return load_program("net.py:Net", tmp_path, {"cut": "classifier", "optimizer": "sgd", **options})

    cached = made()
    assert isinstance(cached, Frozen)
    Driver(tmp_path / "a", program=cached, max_rounds=3, inputs=images).run(2)
    Driver(tmp_path / "b", program=made(cache=False), max_rounds=3, inputs=images).run(1)
    weights = {}
    for which in "ab":
        _, weights[which] = read_arrays(tmp_path / which / "store" / "result")
    for name, values in weights["a"].items():
        np.testing.assert_allclose(values, weights["b"][name], rtol=1e-5, atol=1e-6)
    labels = cached.predict(weights["a"], IMAGES[24:])
    assert np.array_equal(labels, cached.predict(weights["a"], cached.data(images)[1]["x"]))
    with pytest.raises(SpecError, match="per-pass"):
        made(noise=1.0).data(images)
    train, _ = made(noise=1.0, augment="per-pass", passes=2).data(images)
    assert len(train["x"]) == 48
    assert not np.array_equal(train["x"][:24], train["x"][24:])
    with pytest.raises(SpecError, match="cut"):
        load_program("net.py:Net", tmp_path, {"augment": "per-pass"})
