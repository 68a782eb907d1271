"""A real classifier answers as its makers measured it, by LiteRT and by ONNX Runtime alike."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from tenure.serve.engines import load_engine

VISION = Path(os.environ.get("TENURE_DATA") or Path(__file__).parents[3] / "shared" / "data") / "vision"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not VISION.is_dir(), reason=f"no {VISION}: name a data folder with TENURE_DATA"),
]


def sample(count):
    """Return pixels [count, 224, 224, 3] of a central crop of 87.5 %, and the indices of the right labels."""
    from PIL import Image

    with open(VISION / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    pixels = []
    for row in rows:
        image = Image.open(VISION / "images" / row["file"]).convert("RGB")
        side = int(0.875 * min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        cropped = image.crop((left, top, left + side, top + side))
        pixels.append(np.asarray(cropped.resize((224, 224), Image.Resampling.BILINEAR)))
    return np.stack(pixels), np.array([int(row["class_index"]) + 1 for row in rows])  # index 0 is the background


@pytest.mark.parametrize("ending", ["quant.tflite", "qdq.onnx"])
def test_mobilenet_classifies_as_measured(ending):
    pixels, right = sample(60)
    if ending == "qdq.onnx":
        pixels = (pixels.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
    else:
        pytest.importorskip("ai_edge_litert", reason="ai-edge-litert (extra litert) is not installed")
    engine = load_engine(VISION / "models" / f"mobilenet_v2_1.0_224_{ending}", threads=2)
    (taken,) = engine.inputs
    assert taken.shape[0] == 1  # neither file can be batched, and the metadata says so
    scores = np.concatenate(
        [engine.infer({taken.name: np.ascontiguousarray(image[None])})[engine.outputs[0].name] for image in pixels]
    )
    ranked = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")
    assert (ranked[:, 0] == right).sum() == 52
    assert (ranked[:, :5] == right[:, None]).any(axis=1).sum() == 59
    engine.close()
