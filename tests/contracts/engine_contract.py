"""What every engine promises, whatever library runs the model. A class per engine says how its models are made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from tenure.errors import SpecError
from tenure.serve.engines import load_engine
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.tensors import DTYPES, check_inputs, datatype_of

DATATYPES = tuple(name for name in DTYPES if name != "BYTES")


@dataclass(frozen=True)
class Sample:
    """A model with one input of rows by features, two outputs or more, and its answers as computed elsewhere."""

    path: Path
    name: str
    x: np.ndarray
    """At least 8 rows."""
    expected: dict[str, np.ndarray]


class EngineContract:
    """Take over, and say how models are made."""

    platform: str
    datatypes: tuple[str, ...] = DATATYPES
    """Those that an identity model can be made of."""

    def sample(self, folder: Path) -> Sample:
        raise NotImplementedError

    def identity(self, folder: Path, datatype: str) -> Path:
        """A model with one input and one output that gives back the same elements."""
        raise NotImplementedError

    def failing(self, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
        """A model, and input that fits its signature on which it raises."""
        raise NotImplementedError

    def heavy(self, folder: Path) -> tuple[Path, int]:
        """A model with one input [-1, n], and the bytes of its weights (10 MB or more)."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        return cls().sample(tmp_path_factory.mktemp("model"))

    @pytest.fixture
    def engine(self, case):
        engine = load_engine(case.path, threads=1)
        yield engine
        engine.close()

    def test_answers_are_those_computed_elsewhere(self, case, engine):
        found = engine.infer({case.name: case.x})
        assert list(found) == list(case.expected)
        for name, expected in case.expected.items():
            assert_same(found[name], expected)

    def test_metadata_is_true(self, case, engine):
        assert engine.platform == self.platform
        check_inputs({case.name: case.x}, engine.inputs)
        found = engine.infer({case.name: case.x[:3]})
        assert [meta.name for meta in engine.outputs] == list(found)
        check_inputs(found, engine.outputs)
        assert all(meta.shape[0] == -1 for meta in (*engine.inputs, *engine.outputs))

    def test_only_the_outputs_asked_for_in_the_models_order(self, case, engine):
        last = list(case.expected)[-1]
        assert list(engine.infer({case.name: case.x}, [last])) == [last]
        assert list(engine.infer({case.name: case.x}, list(case.expected)[::-1])) == list(case.expected)

    def test_a_batch_gives_what_its_rows_give_alone(self, case, engine):
        together = engine.infer({case.name: case.x})
        for row in range(len(case.x)):
            alone = engine.infer({case.name: case.x[row : row + 1]})
            for name, array in alone.items():
                assert array.shape == (1, *together[name].shape[1:])
                assert_same(array[0], together[name][row])

    def test_calls_leave_no_state_and_answers_stay_what_they_were(self, case, engine):
        first = engine.infer({case.name: case.x[:2]})
        kept = {name: array.copy() for name, array in first.items()}
        for rows in (1, 5, 2, 8):
            engine.infer({case.name: case.x[-rows:]})
        again = engine.infer({case.name: case.x[:2]})
        for name in kept:
            np.testing.assert_array_equal(first[name], kept[name])
            np.testing.assert_array_equal(again[name], kept[name])

    def test_memory_that_cannot_be_written_is_read(self, case, engine, tmp_path):
        (tmp_path / "tensor").write_bytes(case.x.tobytes())
        mapped = np.memmap(tmp_path / "tensor", case.x.dtype, "r", shape=case.x.shape)  # a write would end the process
        readonly = np.frombuffer(mapped, case.x.dtype).reshape(case.x.shape)
        assert not readonly.flags.writeable
        for name, expected in engine.infer({case.name: readonly}).items():
            assert_same(expected, case.expected[name])

    @pytest.mark.parametrize("wrong", ["no_rows", "name", "type", "rank", "width", "none", "more"])
    def test_input_that_does_not_fit_is_refused(self, case, engine, wrong):
        x = case.x
        other = np.int16 if x.dtype != np.int16 else np.float32
        feed = {
            "no_rows": {case.name: x[:0]},
            "name": {"another": x},
            "type": {case.name: x.astype(other)},
            "rank": {case.name: x[0]},
            "width": {case.name: x[:, :-1]},
            "none": {},
            "more": {case.name: x, "another": x},
        }[wrong]
        with pytest.raises(InputRefused, match=case.name):
            engine.infer(feed)
        assert_same(engine.infer({case.name: x})[engine.outputs[0].name], case.expected[engine.outputs[0].name])

    def test_an_output_that_is_not_there_is_refused(self, case, engine):
        with pytest.raises(InputRefused, match="ghost"):
            engine.infer({case.name: case.x}, ["ghost"])

    def test_every_datatype_passes_unchanged(self, tmp_path):
        for datatype in self.datatypes:
            engine = load_engine(self.identity(tmp_path, datatype))
            (taken,), (given,) = engine.inputs, engine.outputs
            assert (taken.datatype, given.datatype) == (datatype, datatype)
            x = extremes(datatype)
            found = engine.infer({taken.name: x})[given.name]
            assert datatype_of(found) == datatype
            np.testing.assert_array_equal(found.reshape(x.shape), x)
            engine.close()

    def test_a_model_that_raises_is_a_model_failure_and_answers_the_next_call(self, tmp_path):
        path, feed = self.failing(tmp_path)
        engine = load_engine(path)
        check_inputs(feed, engine.inputs)
        with pytest.raises((ModelFailed, InputRefused)):
            engine.infer(feed)
        harmless = {name: np.zeros_like(array) for name, array in feed.items()}
        assert engine.infer(harmless)
        engine.close()

    def test_a_broken_file_is_refused_with_its_name(self, case, tmp_path):
        content = case.path.read_bytes()
        for broken in (b"", b"not a model at all", content[: len(content) // 2], bytes(len(content))):
            path = tmp_path / f"broken{case.path.suffix}"
            path.write_bytes(broken)
            with pytest.raises(SpecError, match="broken"):
                load_engine(path)

    def test_closing_frees_the_model(self, tmp_path):
        path, weights_bytes = self.heavy(tmp_path)

        def use():
            engine = load_engine(path)
            (taken,) = engine.inputs
            engine.infer({taken.name: np.ones((2, *taken.shape[1:]), DTYPES[taken.datatype])})
            engine.close()

        use()
        before = psutil.Process().memory_info().rss
        for _ in range(12):
            use()
        # allocators keep up to a few models' worth of freed memory; kept models would be twelve
        assert psutil.Process().memory_info().rss - before < 6 * weights_bytes

    @pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
    def test_a_model_on_one_thread_starts_no_other(self, case):
        load_engine(case.path, threads=1).close()  # what the library itself starts, once
        before = set(os.listdir("/proc/self/task"))
        engine = load_engine(case.path, threads=1)
        engine.infer({case.name: case.x})
        assert set(os.listdir("/proc/self/task")) <= before
        engine.close()

    @pytest.mark.parametrize("options", [{"threads": 0}, {"device": "tpu"}, {"precision": "fp8"}, {"precision": "fp16"}])
    def test_a_setting_that_makes_no_sense_is_refused(self, case, options):
        with pytest.raises(SpecError, match=next(iter(options))):
            load_engine(case.path, **options)


def assert_same(found, expected):
    """Equal, floats but for rounding."""
    if np.asarray(expected).dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


def extremes(datatype: str) -> np.ndarray:
    """Two rows of four that a conversion on the way would spoil."""
    dtype = DTYPES[datatype]
    if dtype.kind == "b":
        return np.array([[True, False, False, True], [False, False, True, True]])
    if dtype.kind == "f":
        info = np.finfo(dtype)
        return np.array([[info.max, info.min, info.tiny, -0.0], [np.inf, -np.inf, np.nan, 1 / 3]], dtype)
    top = np.iinfo(dtype)
    return np.array([[top.min, top.max, 0, 1], [top.max, 2, 3, top.max - 1]], dtype)
