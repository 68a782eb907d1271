from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.train.files import Files

from .memory_files import Disk, MemoryFiles

NAMES = st.sampled_from(["a/x", "a/y", "b/x", "b/.z.1", "gone/x"])
CONTENT = st.binary(max_size=8)
STEP = st.one_of(
    st.tuples(st.just("publish"), NAMES, CONTENT),
    st.tuples(st.just("replace"), NAMES, CONTENT),
    st.tuples(st.just("read"), NAMES, st.integers(0, 9), st.integers(-1, 9)),
    st.tuples(st.just("link"), NAMES, NAMES),
    st.tuples(st.just("move"), NAMES, NAMES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("names"), st.sampled_from(["a", "b", "gone"]), st.booleans()),
    st.tuples(st.just("exists"), st.sampled_from(["a", "a/x", "gone", "gone/x"])),
    st.tuples(st.just("make_folder"), st.sampled_from(["a", "c/deep/er"])),
)


def perform(files: Files, root: Path, step: tuple[Any, ...]) -> Any:
    """Return the answer, or the kind of the error."""
    name, path, *rest = step
    try:
        if name == "publish":
            return files.publish(root / path, [rest[0][:3], memoryview(rest[0])[3:]], durable=False)
        if name in ("link", "move"):
            return getattr(files, name)(root / path, root / rest[0])
        if name == "names":
            return files.names(root / path, hidden=rest[0])
        return getattr(files, name)(root / path, *rest)
    except OSError as error:
        return type(error)


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_files_in_memory_answer_as_real_ones_do(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        real, memory, root = Files(), MemoryFiles(Disk()), Path(folder)
        for files in (real, memory):
            files.make_folder(root / "a")
            files.make_folder(root / "b")
        for step in steps:
            assert perform(memory, root, step) == perform(real, root, step), step


@pytest.fixture(params=["real", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    made = Files() if request.param == "real" else MemoryFiles(Disk())
    made.make_folder(tmp_path)
    return made


def test_the_second_of_two_publications_changes_nothing_and_says_so(files: Files, tmp_path: Path) -> None:
    assert files.publish(tmp_path / "x", [b"first"], durable=True)
    assert not files.publish(tmp_path / "x", [b"second"], durable=True)
    assert files.read(tmp_path / "x") == b"first"
    assert files.names(tmp_path, hidden=True) == ["x"]


def test_a_writer_whose_unfinished_file_was_removed_learns_it(files: Files, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.link(tmp_path / ".x.1", tmp_path / "x")


def test_a_link_whose_answer_was_lost_still_counts_as_ours(tmp_path: Path) -> None:
    files = MemoryFiles(Disk(), lost_answer=lambda: True)
    files.make_folder(tmp_path)
    assert files.publish(tmp_path / "x", [b"mine"], durable=False)
    assert not files.publish(tmp_path / "x", [b"another's"], durable=False)
    assert files.read(tmp_path / "x") == b"mine"
