"""The models that images are judged with: each engine loads its own, and those of one kind agree."""

import numpy as np
import pytest
from benchmarks import image_models as models
from benchmarks.image_grammar import values
from benchmarks.programs import numpy_door

from tenure.serve.engines import load_engine

LIGHT_AND_TORCH = ("onnxruntime", "litert", "torch")


def served(engine, kind):
    return next(model for model in models.service(engine).models if model.name == kind)


def signature(tensors):
    return [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in tensors]


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_engines_that_share_weights_agree(tmp_path, kind):
    for extra in ("sklearn", "skl2onnx", "ai_edge_litert", "torch"):
        pytest.importorskip(extra, reason=f"{extra} is not installed")
    tensor = served("numpy", kind).inputs[0]
    x = np.abs(np.round(8 * values(tensor, 5, "normal", 1)))  # as pixels are
    expected = numpy_door.Model(models.write(tmp_path, "numpy", kind)).run(x)["probability"]
    for name in LIGHT_AND_TORCH:
        engine = load_engine(models.write(tmp_path, name, kind))
        assert signature(engine.inputs) == signature(served(name, kind).inputs), name
        assert signature(engine.outputs) == signature(served(name, kind).outputs), name
        np.testing.assert_allclose(engine.infer({"x": x})["probability"], expected, atol=2e-5, err_msg=name)
        engine.close()


def test_scikit_learn_loads_its_three(tmp_path):
    pytest.importorskip("skops", reason="skops (extra sklearn) is not installed")
    for kind in models.KINDS:
        engine = load_engine(models.write(tmp_path, "sklearn", kind))
        assert signature(engine.inputs) == signature(served("sklearn", kind).inputs)
        assert signature(engine.outputs) == signature(served("sklearn", kind).outputs)
        engine.close()
