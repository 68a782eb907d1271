"""What a stage depends on beside its spec: each difference is found, named, and refused only where it must be."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.errors import JobFailed, SpecError
from tenure.train import circumstances as c
from tenure.train.programs import load_program

PROGRAM = "import neighbour\nclass P:\n    data = build = gradient = update = evaluate = lambda self: None\n"


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """A folder with a program, its neighbour and data; called, it gives the circumstances now, as a new process would."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "x.npy", np.arange(1000.0).reshape(100, 10))

    def look() -> dict[str, Any]:
        for name in ("neighbour", "tenure_program_program"):
            sys.modules.pop(name, None)
        load_program("program.py:P", tmp_path, {})
        arrays = {"x": np.load(tmp_path / "data" / "x.npy", mmap_mode="r")}
        return c.circumstances(tmp_path, {"data": str(tmp_path / "data")}, [arrays, arrays])

    return look


def test_unchanged_circumstances_pass(stage: Callable[[], dict[str, Any]]) -> None:
    planned = stage()
    c.verify(planned, stage(), same_result=True)
    assert c.check_resumable(planned, stage(), same_result=True) == ""


def test_a_plan_without_circumstances_is_compared_with_nothing(stage: Callable[[], dict[str, Any]]) -> None:
    c.verify({}, stage(), same_result=True)
    c.Inputs({}).check()


@pytest.mark.parametrize("name", ["program.py", "neighbour.py"])
def test_a_changed_program_is_refused_within_a_generation_and_told_by_the_next(
    stage: Callable[[], dict[str, Any]], tmp_path: Path, name: str
) -> None:
    planned = stage()
    (tmp_path / name).write_text((tmp_path / name).read_text() + "# another\n")
    with pytest.raises(JobFailed, match=rf"program changed while it trains: {name} has SHA-256"):
        c.verify(planned, stage(), same_result=False)
    assert "another program" in c.check_resumable(planned, stage(), same_result=True)


def test_data_that_were_written_are_named_with_what_differs(stage: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    planned, path = stage(), tmp_path / "data" / "x.npy"
    inputs = c.Inputs(planned)
    inputs.check()
    np.save(path, np.zeros((90, 10)))
    with pytest.raises(JobFailed, match=r"x\.npy has 7328 bytes, it had 8128"):
        c.Inputs(planned).check()
    with pytest.raises(JobFailed, match=r"x\.npy has 7328 bytes"):
        c.verify(planned, stage(), same_result=True)
    path.unlink()
    with pytest.raises(JobFailed, match=r"x\.npy is gone"):
        c.Inputs(planned).check()


def test_a_file_written_in_place_is_found_by_its_time(stage: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    planned, path = stage(), tmp_path / "data" / "x.npy"
    os.utime(path, ns=(0, planned["data"]["files"][str(path)]["mtime_ns"] + 2_000_000_000))
    with pytest.raises(JobFailed, match=r"x\.npy was written 2 s after"):
        c.Inputs(planned).check()


def test_a_file_put_back_from_a_copy_is_the_same_file(stage: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    planned, path = stage(), tmp_path / "data" / "x.npy"
    content, status = path.read_bytes(), path.stat()
    for changed, same in ((content[:-1] + b"\1", False), (content, True)):
        (tmp_path / "copy").write_bytes(changed)
        os.replace(tmp_path / "copy", path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if same:
            c.Inputs(planned).check()
        else:
            with pytest.raises(JobFailed, match="other content"):
                c.Inputs(planned).check()


def test_looking_again_takes_a_hundredth_of_the_time(stage: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    now_s = iter([0.0, 1.0, 50.0, 101.5, 101.5])
    inputs = c.Inputs(stage(), monotonic=lambda: next(now_s))
    inputs.check()  # took a second
    (tmp_path / "data" / "x.npy").unlink()
    inputs.check()
    with pytest.raises(JobFailed, match="gone"):
        inputs.check()


def test_data_that_come_out_differently_are_named(stage: Callable[[], dict[str, Any]]) -> None:
    planned, rng = stage(), np.random.default_rng()
    shuffled = {"x": rng.permutation(np.arange(1000.0)).reshape(100, 10)}
    found = {**planned, "data": c.data_fingerprint({}, [shuffled, shuffled])}
    with pytest.raises(JobFailed, match=r"training array 'x' has other values.*seed what is random"):
        c.verify(planned, found, same_result=False)
    found = {**planned, "data": c.data_fingerprint({}, [{"y": shuffled["x"]}, shuffled])}
    with pytest.raises(JobFailed, match="training array 'x' is missing"):
        c.verify(planned, found, same_result=False)


def test_another_kind_of_machine_is_refused_only_where_the_result_must_be_the_same(
    stage: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = stage()
    features = [feature for feature in planned["machine"]["cpu_features"] if not feature.startswith("avx")]
    monkeypatch.setattr(c, "_cpu", lambda: (planned["machine"]["cpu_model"], tuple(features)))
    found = stage()
    c.verify(planned, found, same_result=False)
    with pytest.raises(JobFailed, match=r"CPU lacks avx.*same_result = false"):
        c.verify(planned, found, same_result=True)
    with pytest.raises(SpecError, match=r"trained on another kind of machine: the CPU lacks avx"):
        c.check_resumable(planned, found, same_result=True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cpu_model", "i486", "the CPU is .*, the plan was made on 'i486'"),
        ("versions", {"numpy": "1.0"}, r"numpy is \d.*made with 1.0"),
        ("versions", {"absent": "1.0"}, ""),
        ("choices", {"OPENBLAS_CORETYPE": "Prescott"}, "chooses kernels by nothing, the plan's by .*Prescott"),
    ],
)
def test_each_difference_of_machines_is_told(key: str, value: Any, said: str) -> None:
    here = c.machine()
    text = c.machine_changed({**here, key: value}, here)
    assert bool(text) == bool(said)
    assert not said or re.search(said, text)
