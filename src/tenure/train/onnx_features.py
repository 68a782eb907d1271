"""An ONNX model, cut before its classifier, as the frozen part of a program (`features.Frozen`), through ONNX Runtime.

    images [N, height, width, channels] ──► scale, shift, resize ──► the model up to a tensor ──► rows
                                            └────────────── one ONNX graph, exported whole ─────────┘

The model's batch may be fixed; it becomes dynamic. So may the size of its images: a pool that spans the whole plane becomes a
global one, hence a fully convolutional model takes smaller images, too. Not here: the cache (`feature_cache`), training.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import MissingExtra, SpecError, Unsupported

_FORMAT = 1
"""Part of the identity; grows when the same file would be cut into another graph."""
_INPUT, _OUTPUT = "x", "features"
_HEAD = "head/"
_IMAGE_RANK = 4
_CHANNELS = (1, 3, 4)
_RESIZES = 11
"""First opset with a Resize that takes sizes."""


class OnnxFeatures:
    """Callable: images (N, height, width, channels), any number type -> float rows. `identity` tells weights and transforms."""

    def __init__(self, path: Path, transforms: dict[str, Any]) -> None:
        self._path, self._transforms = path, transforms
        threads = os.environ.get("OMP_NUM_THREADS", "")
        self._threads = int(threads) if threads.isdigit() else 0
        self._session: Any = None

    @property
    def identity(self) -> bytes:
        """A SHA-256 over the model's file, the transforms, and ONNX Runtime's version. Needs neither of the libraries."""
        digest = hashlib.sha256()
        with open(self._path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        runtime = importlib.metadata.version("onnxruntime")
        told = {**self._transforms, "format": _FORMAT, "onnxruntime": runtime, "one thread": self._threads == 1}
        digest.update(json.dumps(told, sort_keys=True).encode())
        return digest.digest()

    def __call__(self, images: NDArray[Any]) -> NDArray[Any]:
        """Return a row per image. One thread where the worker says so (OMP_NUM_THREADS, as in same-result mode)."""
        if self._session is None:
            self._session = self._open()
        x = np.ascontiguousarray(images, dtype=np.float32)
        rows: NDArray[Any] = self._session.run([_OUTPUT], {_INPUT: x})[0]
        return rows

    def model(self) -> Any:
        """Return the graph that is run, as an ``onnx.ModelProto``: input ``x`` float32, output ``features``."""
        onnx = _import("onnx")
        model = onnx.load(self._path)
        _make_dynamic(model)
        _cut(model, self._transforms["output"], self._path)
        _put_before(model, self._transforms)
        onnx.checker.check_model(model)
        return model

    def join(self, path: Path) -> None:
        """Put this graph before the head in the ONNX file at `path`, whose first input becomes this one's output."""
        onnx = _import("onnx")
        head, model = onnx.load(path), self.model()
        opset = {one.domain: one.version for one in head.opset_import}.get("", 0)
        model = onnx.version_converter.convert_version(model, opset)
        model.ir_version = head.ir_version
        outputs = [one.name for one in head.graph.output]
        head = onnx.compose.add_prefix(head, _HEAD)
        joined = onnx.compose.merge_models(model, head, io_map=[(_OUTPUT, head.graph.input[0].name)])
        for name, one in zip(outputs, joined.graph.output, strict=True):
            for node in joined.graph.node:
                node.output[:] = [name if made == one.name else made for made in node.output]
            _rename(joined.graph, one.name, name)
            one.name = name
        onnx.checker.check_model(joined)
        path.write_bytes(joined.SerializeToString())

    def _open(self) -> Any:
        runtime = _import("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return runtime.InferenceSession(self.model().SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnx_features(
    path: str | os.PathLike[str],
    *,
    output: str = "",
    size: tuple[int, int] | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> OnnxFeatures:
    """Return the model in a file, up to a tensor, as a callable for `Frozen`.

    output: the tensor whose values are the features, flattened to rows; empty: the model's first output. size: height and
    width that images are resized to (bilinear); None: as they are. scale, shift: a pixel becomes scale * value + shift first.
    Raises SpecError when the file does not exist; when first used, for a tensor that it lacks, naming some that it has.
    """
    found = Path(path)
    if not found.is_file():
        raise SpecError(f"there is no ONNX model at {found}")
    return OnnxFeatures(found, {"output": output, "size": size and list(size), "scale": scale, "shift": shift})


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)  # heavy: only where features are computed or exported
        if name == "onnx":
            importlib.import_module("onnx.version_converter")
            importlib.import_module("onnx.compose")
    except ImportError as error:
        raise MissingExtra(name, "demo", "The frozen part from an ONNX model") from error
    return module


def _shapes(model: Any) -> dict[str, list[int]]:
    """Return tensor -> dimensions, 0 for those that are not fixed; of all tensors whose shape can be told."""
    onnx = _import("onnx")
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in [*graph.value_info, *graph.input, *graph.output]
        if one.type.tensor_type.HasField("shape")
    }


def _make_dynamic(model: Any) -> None:
    """Free batch and plane of the graph from the sizes that it was written with."""
    onnx = _import("onnx")
    graph, shapes = model.graph, _shapes(model)
    batch = shapes[graph.input[0].name][0]
    constants = {one.name: one for one in graph.initializer}
    for node in graph.node:
        if node.op_type in ("AveragePool", "MaxPool"):
            plane = shapes.get(node.input[0], [])[2:]
            kernel = next(list(a.ints) for a in node.attribute if a.name == "kernel_shape")
            if plane and kernel == plane:
                node.op_type = f"Global{node.op_type}"
                del node.attribute[:]
        elif node.op_type == "Reshape" and batch and node.input[1] in constants:
            wanted = onnx.numpy_helper.to_array(constants[node.input[1]]).copy()
            if wanted[0] == batch:
                wanted[0] = -1 if -1 not in wanted else 0
                constants[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(wanted, node.input[1]))
    del graph.value_info[:]
    dims = graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_param = "N"
    for at, dim in enumerate(dims):
        if at and len(dims) == _IMAGE_RANK and dim.dim_value not in _CHANNELS:
            dim.dim_param = f"side{at}"


def _cut(model: Any, output: str, path: Path) -> None:
    """Let the graph end with `features`: the rows of tensor `output`."""
    onnx = _import("onnx")
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    output = output or graph.output[0].name
    if output not in made:
        some = ", ".join(repr(name) for node in list(graph.node)[-40:] for name in node.output if "antized" not in name)
        raise SpecError(f"{path} has no tensor {output!r} to cut at; its last ones are: {some}")
    needed, left = set(), [output]
    while left:
        node = made.get(left.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            left += node.input
    nodes = [node for node in graph.node if id(node) in needed]
    nodes.append(onnx.helper.make_node("Flatten", [output], [_OUTPUT], axis=1))
    used = {name for node in nodes for name in node.input}
    constants = [one for one in graph.initializer if one.name in used]
    kept = [one for one in graph.input if one.name in used and one.name not in {constant.name for constant in constants}]
    if len(kept) != 1:
        raise SpecError(f"{path}: {output!r} depends on the inputs {[one.name for one in kept]}; it must be one, the images")
    rows = onnx.helper.make_tensor_value_info(_OUTPUT, onnx.TensorProto.FLOAT, ["N", None])
    new = onnx.helper.make_graph(nodes, graph.name or "features", kept, [rows], constants)
    model.graph.CopyFrom(new)


def _put_before(model: Any, transforms: dict[str, Any]) -> None:
    """Let the graph begin with ``x`` [N, height, width, channels], scaled, shifted, resized and in the model's own order."""
    onnx = _import("onnx")
    graph, size = model.graph, transforms["size"]
    first = graph.input[0]
    dims = [dim.dim_value for dim in first.type.tensor_type.shape.dim]
    if len(dims) != _IMAGE_RANK:
        raise Unsupported("onnx_features", f"the model's input has shape {dims}, not that of images")
    opset = {one.domain: one.version for one in model.opset_import}.get("", 0)
    if size and opset < _RESIZES:
        raise Unsupported(
            "onnx_features size", f"the model is of opset {opset}, resizing needs {_RESIZES}", "Convert the model."
        )
    _rename(graph, first.name, "tenure/input")
    channels_first = dims[1] in _CHANNELS
    make = onnx.helper.make_node
    nodes = [
        make("Mul", [_INPUT, "tenure/scale"], ["tenure/scaled"]),
        make("Add", ["tenure/scaled", "tenure/shift"], ["tenure/shifted"]),
        make("Transpose", ["tenure/shifted"], ["tenure/planes"], perm=[0, 3, 1, 2]),
    ]
    constants: dict[str, NDArray[Any]] = {name: np.array([transforms[name]], np.float32) for name in ("scale", "shift")}
    last = "tenure/planes"
    if size:
        nodes += [
            make("Shape", [last], ["tenure/shape"]),
            make("Gather", ["tenure/shape", "tenure/two"], ["tenure/images"], axis=0),
            make("Concat", ["tenure/images", "tenure/size"], ["tenure/sizes"], axis=0),
            make("Resize", [last, "tenure/none", "tenure/none", "tenure/sizes"], ["tenure/resized"], mode="linear"),
        ]
        constants |= {"two": np.array([0, 1]), "size": np.array(size), "none": np.zeros(0, np.float32)}
        last = "tenure/resized"
    order = [0, 1, 2, 3] if channels_first else [0, 2, 3, 1]
    nodes.append(make("Transpose", [last], ["tenure/input"], perm=order))
    made = [onnx.numpy_helper.from_array(value, f"tenure/{name}") for name, value in constants.items()]
    shape = ["N", "height", "width", dims[1] if channels_first else dims[3]]
    x = onnx.helper.make_tensor_value_info(_INPUT, onnx.TensorProto.FLOAT, shape)
    whole = [*nodes, *graph.node], graph.name, [x], list(graph.output), [*made, *graph.initializer]
    graph.CopyFrom(onnx.helper.make_graph(*whole))


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name == old:
                node.input[at] = new
