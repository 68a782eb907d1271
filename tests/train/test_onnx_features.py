from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tenure.errors import SpecError
from tenure.train.onnx_features import onnx_features

onnx = pytest.importorskip("onnx", reason="needs the extra demo")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra demo")

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution, a pool over the whole plane, a dense layer: batch fixed at 1, as converters write it."""
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        make("Conv", ["image", "kernel"], ["planes"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        make("Relu", ["planes"], ["active"]),
        make("AveragePool", ["active"], ["pool"], kernel_shape=[4, 4], strides=[1, 1]),
        make("Reshape", ["pool", "shape"], ["row"]),
        make("MatMul", ["row", "dense"], ["scores"]),
    ]
    constants = [
        tensor(RNG.standard_normal((6, 3, 3, 3)).astype(np.float32), "kernel"),
        tensor(np.array([1, 6]), "shape"),
        tensor(RNG.standard_normal((6, 2)).astype(np.float32), "dense"),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "net", [value("image", 1, [1, 3, 8, 8])], [value("scores", 1, [1, 2])], constants)
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=6), path)
    return path


def one_by_one(path: Path, images: np.ndarray, scale: float, shift: float) -> np.ndarray:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    planes = (images.astype(np.float32) * np.float32(scale) + np.float32(shift)).transpose(0, 3, 1, 2)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: plane[None]})[0] for plane in planes])


def test_a_model_with_a_fixed_batch_gives_the_same_for_a_batch_of_any_size(model):
    whole = onnx_features(model, scale=1 / 127.5, shift=-1.0)
    np.testing.assert_allclose(whole(IMAGES), one_by_one(model, IMAGES, 1 / 127.5, -1.0), rtol=1e-4, atol=1e-5)


def test_it_is_cut_at_a_tensor_and_takes_images_of_another_size(model):
    cut = onnx_features(model, output="pool", scale=1 / 255)
    rows = cut(IMAGES)
    assert rows.shape == (5, 6)
    dense = onnx.numpy_helper.to_array(onnx.load(model).graph.initializer[2])
    np.testing.assert_allclose(rows @ dense, one_by_one(model, IMAGES, 1 / 255, 0.0), rtol=1e-4, atol=1e-5)
    assert cut(RNG.integers(0, 256, (3, 16, 12, 3), dtype=np.uint8)).shape == (3, 6)
    plain = onnx_features(model, output="pool", size=(16, 16))(np.full((2, 8, 8, 3), 7, np.uint8))
    np.testing.assert_allclose(plain, onnx_features(model, output="pool")(np.full((2, 16, 16, 3), 7, np.uint8)), rtol=1e-5)


def test_an_unknown_tensor_is_refused_with_those_that_there_are(model):
    with pytest.raises(SpecError, match="'pool'"):
        onnx_features(model, output="pol")(IMAGES)
    with pytest.raises(SpecError, match="no ONNX model"):
        onnx_features(model.with_name("other.onnx"))


def test_the_identity_changes_with_weights_and_transforms_and_nothing_else(model):
    first = onnx_features(model, output="pool").identity
    assert onnx_features(model, output="pool").identity == first
    assert onnx_features(model, output="pool", scale=2.0).identity != first
    assert onnx_features(model, output="active").identity != first
    content = bytearray(model.read_bytes())
    content[-40] ^= 1
    model.write_bytes(content)
    assert onnx_features(model, output="pool").identity != first


def test_a_head_is_joined_to_one_model_that_takes_images(model, tmp_path):
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    head = onnx.helper.make_graph(
        [make("ArgMax", ["x"], ["label"], axis=1, keepdims=0)], "head", [value("x", 1, ["N", 6])], [value("label", 7, ["N"])]
    )
    path = tmp_path / "head.onnx"
    onnx.save(onnx.helper.make_model(head, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    cut = onnx_features(model, output="pool", size=(8, 8))
    cut.join(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    labels = session.run(["label"], {"x": IMAGES.astype(np.float32)})[0]
    assert np.array_equal(labels, cut(IMAGES).argmax(axis=1))


def test_a_real_model_keeps_its_labels_with_a_dynamic_batch(request):
    images = pytest.importorskip("PIL.Image", reason="needs pillow")
    root = Path(os.environ.get("TENURE_DATA") or Path(__file__).parents[3] / "shared" / "data") / "vision"
    path = root / "models" / "mobilenet_v2_1.0_224_qdq.onnx"
    if not path.is_file():
        pytest.skip(f"no {path}: name a data folder with TENURE_DATA")
    names = [line.split(",")[0] for line in (root / "labels.csv").read_text().splitlines()[1:7]]
    x = np.stack([np.asarray(images.open(root / "images" / name).convert("RGB").resize((224, 224))) for name in names])
    batch = onnx_features(path, scale=1 / 127.5, shift=-1.0)(x)
    assert np.array_equal(batch.argmax(axis=1), one_by_one(path, x, 1 / 127.5, -1.0).argmax(axis=1))
