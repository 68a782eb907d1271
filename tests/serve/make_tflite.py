"""Writes small .tflite files: one operator each, from the schema that LiteRT carries (no TensorFlow)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

_KINDS = {
    "FP32": "FLOAT32", "FP64": "FLOAT64", "FP16": "FLOAT16", "BOOL": "BOOL", "UINT8": "UINT8", "INT8": "INT8",
    "UINT16": "UINT16", "INT16": "INT16", "UINT32": "UINT32", "INT32": "INT32", "UINT64": "UINT64", "INT64": "INT64",
}  # fmt: skip


def write(path: Path, operators, inputs, outputs, constants=(), inner=(), *, open_rows=False) -> Path:
    """operators: (builtin name, options, names in, names out); tensors: (name, shape, datatype); constants: (name, array).

    options: a table's name, or its name and a dict of its fields.
    open_rows: declare the first dimension of inputs and outputs open.
    """
    import flatbuffers

    s = schema()
    model, graph = s.ModelT(), s.SubGraphT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [s.BufferT()], [], [graph]
    graph.tensors, graph.operators, index = [], [], {}

    def tensor(name, shape, kind, data=None):
        made = s.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), getattr(s.TensorType, kind), 0
        if data is not None:
            buffer = s.BufferT()
            buffer.data = np.frombuffer(data, np.uint8)
            model.buffers.append(buffer)
            made.buffer = len(model.buffers) - 1
        graph.tensors.append(made)
        index[name] = len(graph.tensors) - 1

    for name, shape, datatype in (*inputs, *inner, *outputs):
        tensor(name, shape, _KINDS[datatype])
        if open_rows:
            graph.tensors[-1].shapeSignature = [-1, *shape[1:]]
    for name, array in constants:
        kind = {"f": "FLOAT32", "i": "INT32"}[array.dtype.kind]
        tensor(name, array.shape, kind, np.ascontiguousarray(array).tobytes())
    graph.inputs = [index[name] for name, *_ in inputs]
    graph.outputs = [index[name] for name, *_ in outputs]
    for builtin, table, taken, given in operators:
        options, fields = table if isinstance(table, tuple) else (table, {})
        code = s.OperatorCodeT()
        code.builtinCode = getattr(s.BuiltinOperator, builtin)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
        model.operatorCodes.append(code)
        made = s.OperatorT()
        made.opcodeIndex = len(model.operatorCodes) - 1
        made.inputs, made.outputs = [index[name] for name in taken], [index[name] for name in given]
        made.builtinOptions = getattr(s, f"{options}T")()
        made.builtinOptionsType = getattr(s.BuiltinOptions, options)
        if options == "SoftmaxOptions":
            made.builtinOptions.beta = 1.0
        for field, value in fields.items():
            assert hasattr(made.builtinOptions, field), f"{options} has no field {field}"
            setattr(made.builtinOptions, field, value)
        graph.operators.append(made)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def schema():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ai_edge_litert import schema_py_generated

    return schema_py_generated


def dense(path: Path, weights: np.ndarray) -> Path:
    """x [1, n] -> score [1, m], probability [1, m]; weights: [m, n]."""
    many, features = weights.shape
    return write(
        path,
        [
            ("FULLY_CONNECTED", "FullyConnectedOptions", ["x", "w", "b"], ["score"]),
            ("SOFTMAX", "SoftmaxOptions", ["score"], ["probability"]),
        ],
        [("x", (1, features), "FP32")],
        [("score", (1, many), "FP32"), ("probability", (1, many), "FP32")],
        [("w", weights.astype(np.float32)), ("b", np.zeros(many, np.float32))],
    )


def identity(path: Path, datatype: str) -> Path:
    """x [1, 4] -> y [1, 1, 4] of one data type."""
    return write(
        path,
        [("EXPAND_DIMS", "ExpandDimsOptions", ["x", "axis"], ["y"])],
        [("x", (1, 4), datatype)],
        [("y", (1, 1, 4), datatype)],
        [("axis", np.array([1], np.int32))],
    )


def gather(path: Path) -> Path:
    """Rows of a table of two: fails for an index of 2 or more. x [1] -> y [1, 3]."""
    return write(
        path,
        [("GATHER", "GatherOptions", ["table", "x"], ["y"])],
        [("x", (1,), "INT32")],
        [("y", (1, 3), "FP32")],
        [("table", np.arange(6, dtype=np.float32).reshape(2, 3))],
    )


def fixed_reshape(path: Path, *, open_rows: bool = False) -> Path:
    """x [1, 4] -> y [1, 2, 2] by a reshape that knows one row only."""
    return write(
        path,
        [("RESHAPE", "ReshapeOptions", ["x", "shape"], ["y"])],
        [("x", (1, 4), "FP32")],
        [("y", (1, 2, 2), "FP32")],
        [("shape", np.array([1, 2, 2], np.int32))],
        open_rows=open_rows,
    )


def mixed_rows(path: Path) -> Path:
    """x [1, 4] -> y [1, 4], the sum over the rows added to each: keeps the shape, but mixes rows."""
    return write(
        path,
        [("CUMSUM", "CumsumOptions", ["x", "axis"], ["y"])],
        [("x", (1, 4), "FP32")],
        [("y", (1, 4), "FP32")],
        [("axis", np.array(0, np.int32))],
    )
