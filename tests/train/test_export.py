"""What a stage leaves: weights always, predictions and ONNX as far as the program can."""

import json

import numpy as np
import pytest

from tenure.errors import NotFound
from tenure.train.export import export
from tenure.train.predictions import SHOWN, as_pictures, predictions
from tenure.train.spec import TrainSpec, write_spec
from tenure.train.store import Store

PROGRAM = """
import numpy as np
class {name}:
    def data(self, inputs):
        y = np.arange(200) % 3
        x = np.zeros((200, 4, 4, 3), np.uint8)
        x[np.arange(200), 0, 0, 0] = y
        return dict(x=x, y=y), dict(x=x, y=y)
    def build(self, seed): return dict(w=np.ones(2, np.float32))
    def gradient(self, weights, batch, rng): return weights, 0.0, 1
    def update(self, weights, summed, n, round_): return weights
    def evaluate(self, weights, held_out): return 0.5
"""
PREDICT = "    def predict(self, weights, x): return np.minimum(x[:, 0, 0, 0].astype(int), 1)\n"


def stage(tmp_path, methods):
    (tmp_path / "p.py").write_text(PROGRAM.format(name="P") + methods)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "classes.json").write_text(json.dumps(["ant", "bee", "cow"]))
    spec = TrainSpec(program="p.py:P", folder=str(tmp_path), inputs={"x": str(tmp_path / "in")})
    write_spec(tmp_path / "stage", spec)
    return tmp_path / "stage"


def trained(root):
    store = Store(root / "store")
    meta = {"rounds": 1, "accuracy": 0.5, "loss": 0.1, "why": "goal", "at_s": 0.0}
    store.publish_arrays("result", {"layer/w.0": np.arange(3, dtype=np.float32)}, meta, durable=True)
    return root


def test_a_program_that_only_trains_leaves_its_weights_and_says_so(tmp_path):
    root = trained(stage(tmp_path, ""))
    made = export(root)
    assert made["equal"] is None
    assert "no predict(weights, x)" in made["note"]
    assert [path.name for path in (root / "artefacts").iterdir()] == ["weights.npz"]
    with np.load(root / "artefacts" / "weights.npz") as file:
        assert file["layer/w.0"].tolist() == [0, 1, 2]


def test_a_program_without_export_leaves_weights_and_predictions(tmp_path):
    root = trained(stage(tmp_path, PREDICT))
    made = export(root)
    assert "no export(weights, path)" in made["note"]
    assert sorted(path.name for path in (root / "artefacts").iterdir()) == ["predictions.npz", "weights.npz"]
    with np.load(root / "artefacts" / "predictions.npz") as file:
        found = dict(file)
    assert found["classes"].tolist() == ["ant", "bee", "cow"]
    assert len(found["index"]) == SHOWN
    assert found["pictures"][:, 0, 0, 0].tolist() == found["expected"].tolist() == (found["index"] % 3).tolist()
    assert found["predicted"].tolist() == np.minimum(found["expected"], 1).tolist()
    assert found["confusion"].tolist() == [[67, 0, 0], [0, 67, 0], [0, 66, 0]]


def test_a_library_that_export_lacks_is_told_and_ends_well(tmp_path):
    text = "    def export(self, weights, path):\n        import a_library_that_is_not_here\n"
    root = trained(stage(tmp_path, PREDICT + text))
    made = export(root)
    assert "a_library_that_is_not_here" in made["note"]
    assert sorted(path.name for path in (root / "artefacts").iterdir()) == ["predictions.npz", "weights.npz"]


def test_a_model_that_onnx_cannot_hold_is_told_and_ends_well(tmp_path):
    text = (
        "        from tenure.errors import Unsupported\n        raise Unsupported('ONNX export', 'the head is Python code')\n"
    )
    root = trained(stage(tmp_path, PREDICT + "    def export(self, weights, path):\n" + text))
    made = export(root)
    assert made["note"] == "no ONNX model: ONNX export is not supported here: the head is Python code."
    assert made["equal"] is None
    assert sorted(path.name for path in (root / "artefacts").iterdir()) == ["predictions.npz", "weights.npz"]


def test_a_program_on_features_shows_the_pictures_they_were_made_of(tmp_path):
    class OnFeatures:
        def predict(self, weights, x):
            return x.argmax(axis=1)

        def held_out_images(self):
            return np.full((4, 8, 8, 3), 7, np.uint8)

    found = predictions(OnFeatures(), {}, {"x": np.eye(4), "y": np.arange(4)}, {})
    assert found is not None
    assert found["pictures"].shape == (4, 8, 8, 3)
    assert found["confusion"].tolist() == np.eye(4).tolist()


def test_before_there_is_a_result_nothing_is_made(tmp_path):
    with pytest.raises(NotFound, match="no result yet"):
        export(stage(tmp_path, PREDICT))


def test_an_export_that_fails_leaves_no_half_made_model(tmp_path):
    root = trained(stage(tmp_path, PREDICT + "    def export(self, weights, path):\n        path.write_bytes(b'x'); 1 / 0\n"))
    with pytest.raises(ZeroDivisionError):
        export(root)
    assert sorted(path.name for path in (root / "artefacts").iterdir()) == ["predictions.npz", "weights.npz"]


@pytest.mark.parametrize(
    ("x", "picture", "shape"),
    [
        (np.zeros((5, 8, 8), np.uint8), None, (2, 8, 8, 3)),
        (np.zeros((5, 8, 8, 4), np.uint8), None, (2, 8, 8, 3)),
        (np.ones((5, 64), np.float32), (8, 8), (2, 8, 8, 3)),
        (np.ones((5, 64), np.float32), None, None),
        (np.zeros((5, 8, 8, 2), np.uint8), None, None),
    ],
)
def test_pictures_are_what_looks_like_some_or_is_said_to(x, picture, shape):
    found = as_pictures(x, np.array([0, 3]), picture)
    assert (None if found is None else found.shape) == shape
    assert found is None or picture is None or found.max() == 255


@pytest.mark.parametrize("y", [np.array([0.5, 1.5]), np.array([-1, 2]), np.array([10**6, 0])])
def test_what_is_no_class_has_no_predictions(y):
    class Echo:
        def predict(self, weights, x):
            return y

    assert predictions(Echo(), {}, {"x": np.zeros((2, 3)), "y": y}, {}) is None
