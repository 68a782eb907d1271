from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tenure.errors import NotFound, SpecError
from tenure.train.programs import Program, load_arrays, load_program
from tenure.train.progress import read_progress
from tenure.train.spec import TrainSpec, next_start_event, publish_event, read_spec, write_spec

from .driver import Driver, Tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(5)
    y = rng.integers(0, 3, 240)
    x = (rng.standard_normal((240, 6)) + 4 * np.eye(3, 6)[y]).astype(np.float32)
    for name, values in (("x_train", x[:180]), ("y_train", y[:180]), ("x_test", x[180:]), ("y_test", y[180:])):
        np.save(folder / f"{name}.npy", values)
    return folder


@pytest.mark.parametrize(
    "estimator",
    [
        "SGDClassifier(loss='log_loss')",
        "SGDClassifier()",
        "MLPClassifier((8,), solver='sgd', learning_rate_init=0.1, momentum=0)",
    ],
)
def test_an_estimator_with_partial_fit_trains_the_same_for_any_number_of_workers(
    tmp_path: Path, arrays: Path, estimator: str
) -> None:
    (tmp_path / "job.py").write_text(
        "from sklearn.linear_model import SGDClassifier\nfrom sklearn.neural_network import MLPClassifier\n"
        f"def Model():\n    return {estimator}\n"
    )
    shas = []
    for workers in (1, 3):
        program = load_program("job.py:Model", tmp_path, {})
        driver = Driver(tmp_path / str(workers), program=program, inputs={"data": str(arrays)}, max_rounds=12)
        shas.append(driver.run(workers))
    assert shas[0] == shas[1]
    assert (read_progress(tmp_path / "1" / "store").accuracy or 0) > 0.9


@pytest.mark.parametrize(
    ("reference", "options", "text"),
    [
        ("gone.py:X", {}, "there is no file"),
        ("job.py:Gone", {}, "has no 'Gone'; it has: Half"),
        ("job.py:Half", {}, "Half lacks data, build, update, evaluate"),
        ("job.py:Half", {"speed": 3}, "options .*speed.* do not fit"),
        ("broken.py:X", {}, "importing .*broken.py failed: ZeroDivisionError"),
        ("job.py:value", {}, "int lacks"),
    ],
)
def test_a_wrong_program_is_refused_in_words(tmp_path: Path, reference: str, options: dict[str, int], text: str) -> None:
    (tmp_path / "job.py").write_text("class Half:\n    def gradient(self): ...\nvalue = 3\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(SpecError, match=text):
        load_program(reference, tmp_path, options)


def test_missing_and_uneven_data_are_refused_in_words(tmp_path: Path, arrays: Path) -> None:
    with pytest.raises(SpecError, match="no inputs"):
        load_arrays({})
    with pytest.raises(SpecError, match=r"x_train.npy; it is in none of the input folders"):
        load_arrays({"data": str(tmp_path)})
    for path in arrays.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(tmp_path / "y_train.npy", np.zeros(3))
    with pytest.raises(SpecError, match=r"has 180 examples and y_train\.npy 3"):
        load_arrays({"data": str(tmp_path)})
    (tmp_path / "x_train.npy").write_bytes(b"not an array")
    with pytest.raises(SpecError, match=r"no array|not an array"):
        load_arrays({"data": str(tmp_path)})


def test_too_few_examples_for_the_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="at least one example for each of the 64 shards"):
        Driver(tmp_path, shards=64).run(1)


def test_the_protocol_is_what_the_examples_implement() -> None:
    assert isinstance(Tiny(), Program)
    assert isinstance(load_program("digits_program.py:Digits", EXAMPLES, {"hidden": 16}), Program)


def test_the_digits_gradient_is_the_derivative_of_its_loss() -> None:
    program = load_program("digits_program.py:Digits", EXAMPLES, {"hidden": 12, "copies": 1})
    rng = np.random.default_rng(0)
    batch = {"x": rng.random((20, 64)).astype(np.float32), "y": rng.integers(0, 10, 20)}
    weights = {name: values.astype(np.float64) for name, values in program.build(0).items()}
    found, _, n = program.gradient(weights, batch, np.random.default_rng(1))
    assert n == 20
    step = 1e-5
    for name, index in (("w0", (30, 3)), ("w1", (2, 7)), ("b2", (4,))):
        losses = []
        for sign in (1, -1):
            moved = {key: values.copy() for key, values in weights.items()}
            moved[name][index] += sign * step
            losses.append(program.gradient(moved, batch, np.random.default_rng(1))[1])
        assert found[name][index] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3, abs=1e-3)


def test_a_spec_reads_as_it_was_written_and_does_not_change(tmp_path: Path) -> None:
    spec = TrainSpec(program="a.py:B", folder="/x", inputs={"d": "/y"}, options={"rate": 0.5, "deep": True})
    write_spec(tmp_path, spec)
    write_spec(tmp_path, spec)
    assert read_spec(tmp_path) == spec
    with pytest.raises(SpecError, match="holds another training spec"):
        write_spec(tmp_path, TrainSpec(program="a.py:C", folder="/x"))
    with pytest.raises(NotFound):
        read_spec(tmp_path / "gone")


@pytest.mark.parametrize("wrong", [{"shards": 0}, {"goal_accuracy": 1.5}, {"program": "a.py"}, {"batch": 3}, {"max_rounds": 0}])
def test_a_spec_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    values: dict[str, object] = {"program": "a.py:B", "folder": "/x", **wrong}
    with pytest.raises(SpecError):
        TrainSpec(**values)  # type: ignore[arg-type]


def test_each_start_of_a_stage_is_a_generation_of_its_own(tmp_path: Path) -> None:
    assert publish_event(tmp_path, next_start_event(tmp_path, 2))
    again = next_start_event(tmp_path, 3)
    assert again["generation"] == 1
    assert publish_event(tmp_path, again)
    assert not publish_event(tmp_path, again)
