"""Models that the serving benchmarks serve, made by a script: none is shipped, weights are random.

- `resnet50`: the architecture of ResNet-50 (v1.5, stride in the 3x3), float32, batch normalisation folded into the
  convolutions, He-initialised, 25.5 M parameters, x [n,3,224,224] -> y [n,1000]. Speed does not depend on the weights.
- `same`: gives back 1,024 float32 (4 KB): whatever a request costs is not the model.
- `mean`: x [n,3,224,224] (602,112 bytes a row) -> y [n,1], the mean of each image: the wire is everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

IMAGE = (3, 224, 224)
IMAGE_BYTES = 4 * 3 * 224 * 224
SAME = (1024,)
SAME_BYTES = 4 * 1024
RESNET50_PARAMETERS = 25_530_472
_BLOCKS = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
"""Blocks, width and first stride of each of the four parts."""


def resnet50(path: Path, *, seed: int = 0) -> Path:
    """Write ResNet-50 and return the path."""
    writer = _Writer(seed)
    x = writer.relu(writer.convolve("x", 3, 64, 7, 2))
    x = writer.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for blocks, width, first_stride in _BLOCKS:
        for index in range(blocks):
            stride = first_stride if index == 0 else 1
            y = writer.relu(writer.convolve(x, channels, width, 1, 1))
            y = writer.relu(writer.convolve(y, width, width, 3, stride))
            y = writer.convolve(y, width, 4 * width, 1, 1, gain=0.1)  # keeps 16 sums of random branches in range
            past = x if channels == 4 * width else writer.convolve(x, channels, 4 * width, 1, stride)
            x = writer.relu(writer.node("Add", [y, past]))
            channels = 4 * width
    x = writer.node("Flatten", [writer.node("GlobalAveragePool", [x])])
    weight = writer.constant(writer.rng.normal(0, 0.01, (channels, 1000)))
    writer.node("Gemm", [x, weight, writer.constant(np.zeros(1000))], output="y")
    assert writer.parameters == RESNET50_PARAMETERS, f"not ResNet-50: {writer.parameters} parameters"
    return writer.write(path, ["n", *IMAGE], ["n", 1000])


def same(path: Path) -> Path:
    """Write the 4 KB identity and return the path."""
    writer = _Writer(0)
    writer.node("Identity", ["x"], output="y")
    return writer.write(path, ["n", *SAME], ["n", *SAME])


def mean(path: Path) -> Path:
    """Write the mean of an image and return the path."""
    writer = _Writer(0)
    flat = writer.node("Flatten", ["x"])
    writer.node("ReduceMean", [flat], output="y", axes=[1], keepdims=1)
    return writer.write(path, ["n", *IMAGE], ["n", 1])


def images(rows: int, *, seed: int = 0) -> Any:
    """Return random images, float32 [rows,3,224,224], about as spread as normalised photographs."""
    return np.random.default_rng(seed).normal(size=(rows, *IMAGE)).astype(np.float32)


class _Writer:
    """Collects nodes and constants of one graph x -> y."""

    def __init__(self, seed: int) -> None:
        import onnx

        self._onnx = onnx
        self.rng = np.random.default_rng(seed)
        self.parameters = 0
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def node(self, kind: str, inputs: list[str], *, output: str = "", **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        output = output or f"t{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, values: Any) -> str:
        """Add weights as float32; return their name."""
        array = np.ascontiguousarray(values, np.float32)
        self.parameters += array.size
        self._constants.append(self._onnx.numpy_helper.from_array(array, f"w{len(self._constants)}"))
        return f"w{len(self._constants) - 1}"

    def convolve(self, x: str, taken: int, given: int, size: int, stride: int, *, gain: float = 1.0) -> str:
        """Add a convolution with bias (the folded normalisation), He-initialised."""
        deviation = gain * (2 / (taken * size * size)) ** 0.5
        weight = self.constant(self.rng.normal(0, deviation, (given, taken, size, size)))
        pads = [size // 2] * 4
        bias = self.constant(np.zeros(given))
        return self.node("Conv", [x, weight, bias], kernel_shape=[size, size], strides=[stride, stride], pads=pads)

    def relu(self, x: str) -> str:
        """Add a rectifier."""
        return self.node("Relu", [x])

    def write(self, path: Path, taken: list[Any], given: list[Any]) -> Path:
        """Write the file and return its path."""
        helper, element = self._onnx.helper, self._onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            path.stem,
            [helper.make_tensor_value_info("x", element, taken)],
            [helper.make_tensor_value_info("y", element, given)],
            self._constants,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        return path
