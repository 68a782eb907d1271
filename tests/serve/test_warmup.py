"""What is seen of a model before it serves."""

import time

import numpy as np
import pytest

from tenure.serve.faults import ModelFailed
from tenure.serve.tensors import TensorMetadata
from tenure.serve.warmup import warm_up


class Engine:
    """Takes `fixed_s` a run and `row_s` a row, by a clock that the test replaces the real one with."""

    def __init__(self, clock, *, fixed_s=0.0, row_s=0.0, shape=(-1, 3), kind="FP32", rows_back=None):
        self.inputs = (TensorMetadata("x", kind, shape),)
        self.outputs = (TensorMetadata("y", "FP32", (-1,)),)
        self.runs = []
        self._clock, self._fixed_s, self._row_s, self._rows_back = clock, fixed_s, row_s, rows_back

    def infer(self, inputs, outputs=()):
        rows = inputs["x"].shape[0]
        self.runs.append(rows)
        self._clock.now_s += self._fixed_s + rows * self._row_s
        return {"y": np.zeros(self._rows_back or rows, np.float32)}


class Clock:
    now_s = 0.0


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now_s)
    return made


@pytest.mark.parametrize(
    ("times", "pays"),
    [({"fixed_s": 0.001, "row_s": 0.0001}, True), ({"row_s": 0.05}, False), ({"fixed_s": 0.001, "row_s": 0.05}, False)],
    ids=["a run costs more than a row", "rows are all it costs", "a run hardly counts"],
)
def test_stacking_pays_where_a_row_gets_cheaper_in_company(clock, times, pays):
    assert warm_up(Engine(clock, **times), 8) == (True, pays)


def test_a_slow_model_is_run_twice_and_a_quick_one_three_times(clock):
    slow, quick = Engine(clock, row_s=0.2), Engine(clock, row_s=0.001)
    warm_up(slow, 4)
    warm_up(quick, 4)
    assert (slow.runs, quick.runs) == ([1, 1, 4, 4], [1, 1, 1, 4, 4, 4])


def test_a_model_that_gives_other_rows_is_not_stacked(clock):
    assert warm_up(Engine(clock, rows_back=1), 8) == (False, True)


def test_what_cannot_be_run_is_believed_by_its_signature(clock):
    assert warm_up(Engine(clock, shape=(-1, -1)), 8) == (True, True)
    assert warm_up(Engine(clock, shape=(1, 3)), 8) == (False, True)
    assert warm_up(Engine(clock, row_s=1), 0) == (True, True)
    failing = Engine(clock)
    failing.infer = lambda feed: (_ for _ in ()).throw(ModelFailed("zeros are not liked"))
    assert warm_up(failing, 8) == (True, True)


def test_text_is_warmed_up_with_empty_text(clock):
    engine = Engine(clock, kind="BYTES")
    seen = []
    engine.infer = lambda feed: seen.append(feed["x"]) or {"y": np.zeros(feed["x"].shape[0], np.float32)}
    warm_up(engine, 2)
    assert {item for array in seen for item in array.reshape(-1)} == {b""}
