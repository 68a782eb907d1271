"""The engine contract over torch's exported programs, what is refused before torch reads it, and the graphs of a device."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
from tests.contracts.engine_contract import EngineContract, Sample

from tenure.errors import SpecError
from tenure.serve.engines import load_engine
from tenure.serve.faults import InputRefused

torch = pytest.importorskip("torch", reason="torch (extra torch) is not installed")
KINDS = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip


class Dense(torch.nn.Module):
    def __init__(self, features=4, classes=3):
        super().__init__()
        self.line = torch.nn.Linear(features, classes)
        self.register_buffer("scale", torch.full((classes,), 2.0))

    def forward(self, x):
        score = self.line(x) * self.scale
        return {"score": score, "probability": score.softmax(1)}


class Same(torch.nn.Module):
    def forward(self, x):
        return x


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(2, 3)

    def forward(self, x):
        return self.table(x)


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls


class Scribbling(torch.nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 1, x * 2


def export(module, example, path, **dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("rows", **(dim or {"min": 1}))},)
        torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=shapes), path)
    return path


class TestTorch(EngineContract):
    platform = "pytorch_exported"

    def sample(self, folder):
        torch.manual_seed(0)
        module, x = Dense(), torch.randn(9, 4)
        expected = {name: found.detach().numpy() for name, found in module(x).items()}
        return Sample(export(module, x, folder / "dense.pt2"), "x", x.numpy(), expected)

    def identity(self, folder, datatype):
        return export(Same(), torch.zeros(2, 4, dtype=getattr(torch, KINDS[datatype])), folder / "same.pt2")

    def failing(self, folder):
        return export(Table(), torch.zeros(2, dtype=torch.int64), folder / "table.pt2"), {"x": np.array([1, 7])}

    def heavy(self, folder):
        return export(Dense(1024, 4096), torch.zeros(2, 1024), folder / "heavy.pt2"), 1024 * 4096 * 4


def test_an_output_is_a_copy_of_what_the_caller_or_the_model_owns(tmp_path):
    engine = load_engine(export(Same(), torch.zeros(2, 4), tmp_path / "same.pt2"))
    x = np.ones((2, 4), np.float32)
    found = engine.infer({"x": x})["output"]
    x[:] = 5
    np.testing.assert_array_equal(found, np.ones((2, 4)))


def test_a_program_that_writes_to_its_input_writes_to_a_copy(tmp_path):
    engine = load_engine(export(Scribbling(), torch.zeros(2, 4), tmp_path / "scribble.pt2"))
    assert [meta.name for meta in engine.outputs] == ["output_0", "output_1"]
    x = np.frombuffer(bytes(32), np.float32).reshape(2, 4)
    np.testing.assert_array_equal(engine.infer({"x": x})["output_1"], np.full((2, 4), 2))
    assert not x.any()


def test_a_program_that_keeps_state_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"changes its own buffers.*eval"):
        load_engine(export(Counting(), torch.zeros(2, 4), tmp_path / "counting.pt2"))


def test_more_rows_than_were_exported_are_refused(tmp_path):
    engine = load_engine(export(Dense(), torch.zeros(2, 4), tmp_path / "dense.pt2", min=1, max=16))
    assert len(engine.infer({"x": np.zeros((16, 4), np.float32)})["score"]) == 16
    with pytest.raises(InputRefused, match=r"1 to 16 along axis 0.*found 17"):
        engine.infer({"x": np.zeros((17, 4), np.float32)})


def rewritten(path, changes):
    """Write the archive again with some records changed (by the end of their name) or added."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).split("/")[0]
    for name, change in changes.items():
        full = f"{root}/{name}"
        records[full] = change(records.get(full, b"")) if callable(change) else change
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def edited(edit):
    def change(content):
        described = json.loads(content)
        edit(described)
        return json.dumps(described).encode()

    return change


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def hostile(mark):
    """Ways to make torch.export.load, or the first call, run code: name -> records to change."""
    bomb = pickle.dumps(Bomb(mark))
    saved = io.BytesIO()
    torch.save(Bomb(mark), saved)
    code = f"__import__('os').mkdir({str(mark)!r})"

    def first_weight(meta):
        next(iter(meta["config"].values())).update(use_pickle=True)

    def graph(edit):
        return {"models/model.json": edited(lambda d: edit(d["graph_module"]["graph"], d))}

    def size(text):
        def edit(g, d):
            g["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text

        return graph(edit)

    def target(text):
        return graph(lambda g, d: g["nodes"][0].update(target=text))

    def rename(g, d):
        text = json.dumps(d).replace('"x"', json.dumps(f"x={code}"))
        d.clear()
        d.update(json.loads(text))

    def nesting(g, d):
        signature = d["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps(
            [1, {"type": "collections.defaultdict", "context": json.dumps({"default_factory_module": "antigravity"}),
                 "children_spec": []}]
        )  # fmt: skip

    return {
        "pickled weight": {
            "data/weights/model_weights_config.json": edited(first_weight),
            "data/weights/weight_0": saved.getvalue(),
        },
        "sample inputs": {"data/sample_inputs/model.pt": saved.getvalue()},
        "old weights": {"data/weights/model.pt": saved.getvalue()},
        "old constants": {"data/constants/model.pt": saved.getvalue()},
        "opaque object": {
            "data/constants/model_constants_config.json": edited(
                lambda c: c["config"].update(o={"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True})
            ),
            "data/constants/opaque_obj_0": bomb,
        },
        "compiled library": {"data/aotinductor/model/model.so": b"\x7fELF"},
        "size evaluated": size(code),
        "size with an attribute": size("(1).__class__"),
        "size without a bound": size("9**9**9**9"),
        "any callable of torch": target("torch.os.system"),
        "files by an operator": target("torch.ops.aten.from_file.default"),
        "extension": target("#evil:run"),
        "code as a name": graph(rename),
        "keyword as a name": graph(lambda g, d: g["nodes"][0].update(name="import")),
        "nesting that imports": graph(nesting),
        "custom objects": graph(lambda g, d: g["custom_obj_values"].update(o={"name": "o", "class_fqn": "c"})),
        "unknown metadata": graph(lambda g, d: g["nodes"][0]["metadata"].update(run="x")),
        "laid out otherwise": {"models/model.json": b"[]"},
        "no program": {"models/model.json": b"{"},
        "two programs": {"models/other.json": b"{}"},
    }


@pytest.mark.parametrize("way", sorted(hostile("")))
def test_a_file_that_could_run_code_is_refused_and_nothing_is_run(tmp_path, way):
    mark = tmp_path / "ran"
    path = export(Dense(), torch.zeros(2, 4), tmp_path / "dense.pt2")
    load_engine(path).close()
    rewritten(path, {})
    load_engine(path).close()  # writing it again is not what is refused
    with pytest.raises(SpecError, match=r"dense\.pt2"):
        load_engine(rewritten(path, hostile(mark)[way]))
    assert not mark.exists()


@pytest.mark.parametrize(
    "way", ["pickled weight", "sample inputs", "old weights", "old constants", "size evaluated", "code as a name"]
)
def test_torch_itself_would_run_what_is_refused_here(tmp_path, way):
    """The check is needed as long as this holds; when it fails, torch has become safer."""
    mark = tmp_path / "ran"
    path = rewritten(export(Dense(), torch.zeros(2, 4), tmp_path / "dense.pt2"), hostile(mark)[way])
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(path)
    assert mark.exists()


def test_programs_of_usual_layers_pass_the_check(tmp_path):
    class Usual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 3),
                torch.nn.BatchNorm2d(4),
                torch.nn.ReLU(),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
            )
            self.attend = torch.nn.MultiheadAttention(4, 2, batch_first=True)
            self.names = torch.nn.ModuleDict({"with-dash": torch.nn.LayerNorm(4)})

        def forward(self, x):
            y = self.names["with-dash"](self.body(x))[:, None]
            with torch.no_grad():
                z, _ = self.attend(y, y, y)
            return z.reshape(x.shape[0] * 2, 2)

    module, x = Usual(), torch.randn(3, 3, 8, 8)
    engine = load_engine(export(module, x, tmp_path / "usual.pt2"))
    np.testing.assert_allclose(engine.infer({"x": x.numpy()})["output"], module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(SpecError, match="no CUDA device"):
        load_engine(export(Dense(), torch.zeros(2, 4), tmp_path / "dense.pt2"), device="cuda", precision="fp16")


class Host:
    """A device in the host's memory that replays by calling again: what `Cuda` is to a runner."""

    def __init__(self, *, capturable=True):
        self.capturable, self.replays = capturable, []

    def host(self, shape, dtype):
        return torch.empty(tuple(shape), dtype=dtype)

    def device(self, shape, dtype):
        return torch.zeros(tuple(shape), dtype=dtype)

    def upload(self, tensor):
        return tensor.clone()

    def using(self):
        return contextlib.nullcontext()

    def wait(self):
        pass

    def captured(self, run):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = run()

        def replay():
            self.replays.append(found[0].shape[0])
            for place, new in zip(found, run(), strict=True):
                place.copy_(new)

        return replay, found


@pytest.mark.parametrize("capturable", [True, False])
def test_batches_go_through_the_next_larger_graph_and_get_their_own_rows_back(capturable):
    from tenure.serve.pt2.graphs import GraphRunner

    device = Host(capturable=capturable)
    runner = GraphRunner(device, lambda tensors: [tensors[0] * 2, tensors[0].sum(1)])
    runner.capture([((4,), torch.float32)], 5)
    kept = []
    for rows in (3, 1, 8, 2, 11, 5):
        x = torch.randn(rows, 4)
        found = runner.run([x])
        kept.append((found, x))
        torch.testing.assert_close(found[0], x * 2)
    for found, x in kept:
        torch.testing.assert_close(found[1], x.sum(1))
    assert device.replays == ([4, 1, 8, 2, 8] if capturable else [])


def test_half_precision_halves_matrices_and_leaves_vectors():
    from tenure.serve.pt2.graphs import halve

    state = dict(Dense().state_dict())
    halve(torch, state)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "line.weight": torch.float16, "line.bias": torch.float32, "scale": torch.float32
    }  # fmt: skip


def test_half_precision_stays_inside(tmp_path):
    torch.manual_seed(0)
    module, x = Dense(), torch.randn(5, 4)
    engine = load_engine(export(module, x, tmp_path / "dense.pt2"))
    engine._around = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # what fp16 does on a device
    found = engine.infer({"x": x.numpy()})["score"]
    assert found.dtype == np.float32
    expected = module(x)["score"].detach().numpy()
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_device_answers_are_those_of_the_cpu(tmp_path, precision):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten())
    path = export(module, torch.randn(2, 3, 16, 16), tmp_path / "conv.pt2")
    on_cpu, on_device = load_engine(path), load_engine(path, device="cuda", precision=precision, max_batch_rows=8)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for rows in (1, 3, 8, 11):
        x = {"input": np.random.default_rng(rows).normal(size=(rows, 3, 16, 16)).astype(np.float32)}
        expected = on_cpu.infer(x)["output"]
        np.testing.assert_allclose(on_device.infer(x)["output"], expected, rtol=tolerance, atol=tolerance)
