"""The engine contract over ONNX Runtime and scikit-learn, and what is special to each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.contracts.engine_contract import EngineContract, Sample, assert_same
from tests.serve.conftest import make_digits, make_identity

from tenure.errors import MissingExtra, NotFound, SpecError
from tenure.serve.engines import load_engine
from tenure.serve.faults import InputRefused

onnx = pytest.importorskip("onnx", reason="onnx (extra demo) makes the test models")
_KINDS = {"FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE"}


def save(path: Path, nodes, inputs, outputs, weights=()) -> Path:
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


class TestOnnxRuntime(EngineContract):
    platform = "onnxruntime_onnx"

    def sample(self, folder):
        weights = make_digits(folder / "digits.onnx")
        x = np.random.default_rng(1).normal(size=(40, len(weights))).astype(np.float32)
        e = np.exp(x @ weights - (x @ weights).max(1, keepdims=True))
        return Sample(folder / "digits.onnx", "x", x, {"label": e.argmax(1), "probability": e / e.sum(1, keepdims=True)})

    def identity(self, folder, datatype):
        helper, kind = onnx.helper, getattr(onnx.TensorProto, _KINDS.get(datatype, datatype))
        values = [helper.make_tensor_value_info(name, kind, ["n", 4]) for name in ("x", "y")]
        return save(folder / "identity.onnx", [helper.make_node("Identity", ["x"], ["y"])], values[:1], values[1:])

    def failing(self, folder):
        helper, kinds = onnx.helper, onnx.TensorProto
        path = save(
            folder / "gather.onnx",
            [helper.make_node("Gather", ["table", "x"], ["y"])],
            [helper.make_tensor_value_info("x", kinds.INT64, ["n"])],
            [helper.make_tensor_value_info("y", kinds.FLOAT, ["n"])],
            [helper.make_tensor("table", kinds.FLOAT, [2], [1.0, 2.0])],
        )
        return path, {"x": np.array([0, 7])}

    def heavy(self, folder):
        helper, kinds = onnx.helper, onnx.TensorProto
        weights = np.ones((1024, 4096), np.float32)
        path = save(
            folder / "heavy.onnx",
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [helper.make_tensor_value_info("x", kinds.FLOAT, ["n", 1024])],
            [helper.make_tensor_value_info("y", kinds.FLOAT, ["n", 4096])],
            [helper.make_tensor("w", kinds.FLOAT, weights.shape, weights.tobytes(), raw=True)],
        )
        return path, weights.nbytes


class TestScikit(EngineContract):
    platform = "sklearn_skops"
    datatypes = ()

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def library(cls):
        pytest.importorskip("skops.io", reason="skops (extra sklearn) is not installed")

    def _dump(self, estimator, path):
        import skops.io

        skops.io.dump(estimator, path)
        return path

    def sample(self, folder):
        from sklearn.datasets import load_iris
        from sklearn.linear_model import LogisticRegression

        x, y = load_iris(return_X_y=True)
        fitted = LogisticRegression(max_iter=500).fit(x, y)
        path = self._dump(fitted, folder / "iris.skops")
        return Sample(path, "x", x[::6], {"label": fitted.predict(x[::6]), "probability": fitted.predict_proba(x[::6])})

    def failing(self, folder):
        path = self.sample(folder).path
        return path, {"x": np.full((1, 4), np.nan)}

    def heavy(self, folder):
        from sklearn.linear_model import LinearRegression

        fitted = LinearRegression().fit(np.eye(2, 1000), np.zeros((2, 2000)))
        fitted.coef_ = np.ones((2000, 1000))
        return self._dump(fitted, folder / "heavy.skops"), fitted.coef_.nbytes

    def test_untrusted_types_are_refused(self, tmp_path):
        with pytest.raises(SpecError, match=r"does not trust.*to_onnx"):
            load_engine(self._dump(Path("x"), tmp_path / "odd.skops"))

    def test_trees_are_refused_with_the_way_out_which_works(self, tmp_path):
        from sklearn.ensemble import RandomForestClassifier

        to_onnx = pytest.importorskip("skl2onnx", reason="skl2onnx (extra demo) is not installed").to_onnx
        x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
        forest = RandomForestClassifier(3, random_state=0).fit(x, [0, 1] * 3)
        with pytest.raises(SpecError, match=r"sklearn\.tree\._tree\.Tree.*to_onnx"):
            load_engine(self._dump(forest, tmp_path / "forest.skops"))
        (tmp_path / "forest.onnx").write_bytes(
            to_onnx(forest, x[:1], options={"zipmap": False}, target_opset=17).SerializeToString()
        )
        found = load_engine(tmp_path / "forest.onnx").infer({"X": x})
        np.testing.assert_array_equal(found["label"], forest.predict(x))
        assert_same(found["probabilities"], forest.predict_proba(x).astype(np.float32))

    def test_a_regressor_gives_predictions_and_text_classes_are_bytes(self, tmp_path):
        from sklearn.linear_model import LinearRegression
        from sklearn.naive_bayes import GaussianNB

        x = np.arange(12.0).reshape(6, 2)
        regressor = load_engine(self._dump(LinearRegression().fit(x, x.sum(1)), tmp_path / "line.skops"))
        np.testing.assert_allclose(regressor.infer({"x": x})["prediction"], x.sum(1))
        namer = load_engine(self._dump(GaussianNB().fit(x, ["low"] * 3 + ["high"] * 3), tmp_path / "names.skops"))
        assert namer.outputs[0].datatype == "BYTES"
        assert namer.infer({"x": x}, ["label"])["label"].tolist() == [b"low"] * 3 + [b"high"] * 3

    def test_jobs_of_an_estimator_are_the_instances_threads(self, tmp_path):
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline

        x = np.arange(12.0).reshape(6, 2)
        near = make_pipeline(KNeighborsClassifier(1, algorithm="brute", n_jobs=-1)).fit(x, [0, 1] * 3)
        engine = load_engine(self._dump(near, tmp_path / "near.skops"), threads=1)
        assert engine._estimator[0].n_jobs == 1
        np.testing.assert_array_equal(engine.infer({"x": x})["label"], near.predict(x))


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages and needs the GNU C library")
def test_memory_that_only_loading_needed_is_given_back(tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ["x", *(f"x{index}" for index in range(1, 12)), "y"]
    weights = np.random.default_rng(0).normal(size=(12, 256, 256, 3, 3)).astype(np.float32)
    save(
        tmp_path / "deep.onnx",
        [helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], pads=[1] * 4) for i in range(12)],
        [helper.make_tensor_value_info("x", kind, ["n", 256, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["n", 256, 8, 8])],
        [helper.make_tensor(f"w{i}", kind, weights[i].shape, weights[i].tobytes(), raw=True) for i in range(12)],
    )
    code = (
        "import sys, psutil, tenure.serve.engines.onnx_runtime, onnxruntime; from tenure.serve.engines import load_engine\n"
        "before = psutil.Process().memory_info().rss; engine = load_engine(sys.argv[1])\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "deep.onnx")], capture_output=True, timeout=60, check=True
    )
    assert int(done.stdout) < 1.8 * weights.nbytes  # 3 without giving back


def test_onnx_text_passes_and_text_that_is_not_utf8_is_refused(tmp_path):
    make_identity(tmp_path / "text.onnx", "STRING")
    engine = load_engine(tmp_path / "text.onnx")
    text = np.array([b"a", "ü".encode()], dtype=object)
    assert engine.infer({"x": text})["y"].tolist() == text.tolist()
    with pytest.raises(InputRefused, match="not UTF-8"):
        engine.infer({"x": np.array([b"\xff"], dtype=object)})


def test_a_missing_file_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(NotFound, match=r"gone\.onnx"):
        load_engine(tmp_path / "gone.onnx")
    for name in ("model.pkl", "model.joblib", "model.pt"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n")
        with pytest.raises(SpecError, match="Pickles run whatever they hold"):
            load_engine(tmp_path / name)


@pytest.mark.parametrize(
    ("ending", "package", "extra"),
    [(".onnx", "onnxruntime", "demo"), (".skops", "skops", "sklearn"), (".pt2", "torch", "torch"),
     (".tflite", "ai_edge_litert", "litert")],
)  # fmt: skip
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, ending, package, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"model{ending}").write_bytes(b"?")
    with pytest.raises(MissingExtra, match=rf'pip install "tenure\[{extra}\]"'):
        load_engine(tmp_path / f"model{ending}")


def test_a_device_that_an_engine_does_not_know_is_refused(digits):
    with pytest.raises(SpecError, match=r'cannot run on device "cuda"'):
        load_engine(digits.path, device="cuda")
