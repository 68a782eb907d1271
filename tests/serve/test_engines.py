"""One contract suite over every engine, then what is special to each."""

from pathlib import Path

import numpy as np
import pytest

from tenure.errors import NotFound, SpecError
from tenure.serve.engines import load_engine
from tenure.serve.faults import ModelFailed
from tenure.serve.tensors import check_inputs


@pytest.fixture(scope="module")
def estimator():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn (extra demo) is not installed")
    from sklearn.linear_model import LogisticRegression

    x, y = datasets.load_iris(return_X_y=True)
    return LogisticRegression(max_iter=500).fit(x, y), x


@pytest.fixture(params=["onnx", "skops"])
def case(request, digits, tmp_path):
    if request.param == "onnx":
        return digits.path, digits.x, {"label": digits.label, "probability": digits.probability}
    fitted, x = request.getfixturevalue("estimator")
    skops = pytest.importorskip("skops.io", reason="skops (extra demo) is not installed")
    skops.dump(fitted, tmp_path / "iris.skops")
    return tmp_path / "iris.skops", x, {"label": fitted.predict(x), "probability": fitted.predict_proba(x)}


def test_an_engine_gives_the_answers_of_the_library_itself(case):
    path, x, expected = case
    engine = load_engine(path, threads=1)
    found = engine.infer({engine.inputs[0].name: x})
    np.testing.assert_array_equal(found["label"], expected["label"])
    np.testing.assert_allclose(found["probability"], expected["probability"], atol=1e-5)
    engine.close()


def test_an_engine_says_what_it_takes_and_gives_and_keeps_to_it(case):
    path, x, _ = case
    engine = load_engine(path)
    (taken,) = engine.inputs
    check_inputs({taken.name: x}, engine.inputs)
    found = engine.infer({taken.name: x[:3]})
    assert list(found) == [meta.name for meta in engine.outputs]
    check_inputs(found, engine.outputs)


def test_an_engine_gives_only_the_outputs_asked_for(case):
    path, x, _ = case
    engine = load_engine(path)
    assert list(engine.infer({engine.inputs[0].name: x}, ["probability"])) == ["probability"]


def test_a_broken_model_file_is_refused_with_its_name(case, tmp_path):
    broken = tmp_path / f"broken{case[0].suffix}"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(SpecError, match="broken"):
        load_engine(broken)


def test_a_missing_file_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(NotFound, match=r"gone\.onnx"):
        load_engine(tmp_path / "gone.onnx")
    (tmp_path / "model.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(SpecError, match="Pickles run whatever they hold"):
        load_engine(tmp_path / "model.pkl")


def test_a_model_that_fails_on_fitting_input_is_a_model_failure(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kinds.INT64, ["n"])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, ["n"])],
        [helper.make_tensor("table", kinds.FLOAT, [2], [1.0, 2.0])],
    )
    path = Path(tmp_path / "gather.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    engine = load_engine(path)
    assert engine.infer({"x": np.array([1])})["y"] == [2.0]
    with pytest.raises(Exception, match=r"refused|failed") as caught:
        engine.infer({"x": np.array([7])})
    assert isinstance(caught.value, (ModelFailed, SpecError))


def test_skops_files_with_untrusted_types_are_refused(tmp_path):
    skops = pytest.importorskip("skops.io", reason="skops (extra demo) is not installed")
    skops.dump(Path("x"), tmp_path / "odd.skops")
    with pytest.raises(SpecError, match="not trusted"):
        load_engine(tmp_path / "odd.skops")
