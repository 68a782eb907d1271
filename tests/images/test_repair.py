"""What a closure lacks is named, by watching or by an error's text, and put in; what it has is never called missing."""

import os
from dataclasses import replace
from importlib.machinery import all_suffixes

import pytest

from tenure.closures import Closure, ClosureFile, Exercise, FileKind, Reason, SystemCall, Why
from tenure.images.closure_rules import Rules
from tenure.images.closure_tree import Tree
from tenure.images.imports import Interpreter
from tenure.images.repair import Missing, here, named_in, sources_of, with_paths, with_seen


@pytest.fixture
def world(tmp_path):
    """Return a folder with a program, and closures of it by the names of the files that they have."""
    for name in ("main.py", "late.py", "data.bin", "libx.so.1"):
        (tmp_path / name).write_text(name)

    def closure(*names, **fields):
        tree = Tree(Rules(own=(str(tmp_path),)))
        for name in names:
            tree.add(f"{tmp_path}/{name}", Reason(kind=Why.OPENED, detail="python"))
        return Closure(program=("python", f"{tmp_path}/main.py"), workdir="/", files=tree.files(), **fields)

    return tmp_path, closure


def names(repaired):
    return [os.path.basename(item.path) for item in repaired.missing]


def test_what_was_seen_and_is_not_there_is_named_and_put_in(world):
    _, closure = world
    seen = closure("main.py", "late.py", exercises=(Exercise(argv=("x",)),), system_calls=(SystemCall(name="read", count=1),))
    found = with_seen(closure("main.py"), seen)
    assert names(found) == ["late.py"]
    assert found.missing[0].how == "opened by python"
    late = next(file for file in found.closure.files if file.path.endswith("late.py"))
    assert [reason.kind for reason in late.reasons] == [Why.REPAIRED, Why.OPENED]
    assert found.closure.exercises == seen.exercises
    assert found.closure.system_calls == seen.system_calls
    assert found.closure.hash == closure("main.py", "late.py").hash


def test_nothing_is_missing_of_a_closure_that_has_it_all(world):
    _, closure = world
    assert with_seen(closure("main.py", "late.py"), closure("late.py")).missing == ()
    assert with_paths(closure("late.py"), [Missing(path=str(world[0] / "late.py"), how="")]).missing == ()


def test_named_files_are_put_in_with_the_links_on_the_way(world):
    folder, closure = world
    (folder / "link").symlink_to("late.py")
    found = with_paths(closure("main.py"), [Missing(path=f"{folder}/link", how="said so"), Missing(path="/nowhere", how="")])
    assert names(found) == ["late.py"]
    assert {os.path.basename(file.path) for file in found.closure.files} >= {"link", "late.py", "main.py"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FileNotFoundError: [Errno 2] No such file or directory: '{}/data.bin'", "data.bin"),
        ("python: can't open file '{}/late.py': [Errno 2]", "late.py"),
        ("sh: {}/data.bin: not found", "data.bin"),
        ("Traceback ...\n  File \"x\"\nModuleNotFoundError: No module named 'late'\n", "late.py"),
        ("ImportError: cannot import name 'late' from 'pack' (/x)", "late.py"),
        (
            "error while loading shared libraries: libx.so.1: cannot open shared object file: No such file or directory",
            "libx.so.1",
        ),
        ("OSError: libx.so.1: cannot open shared object file: No such file", "libx.so.1"),
    ],
    ids=["open", "script", "shell", "module", "submodule", "linker", "ctypes"],
)
def test_an_error_names_what_is_missing(world, text, name):
    folder, closure = world
    (folder / "pack").mkdir()
    (folder / "pack/__init__.py").write_text("")
    (folder / "pack/late.py").write_text("")
    (folder / "libz.so").write_text("")
    python = Interpreter((str(folder),), tuple(all_suffixes()), "/nowhere", "3.11", "", "", frozenset())
    found = named_in(text.format(folder), closure("main.py", "libz.so"), python)
    assert name in [os.path.basename(item.path) for item in found]
    assert all(item.how.startswith("named by: ") for item in found)


@pytest.mark.parametrize(
    "text", ["", "FileNotFoundError: No such file or directory: '/nowhere'", "No module named 'nowhere'", "main.py: not found"]
)
def test_what_is_not_on_this_machine_is_not_named(world, text):
    folder, closure = world
    python = Interpreter((str(folder),), tuple(all_suffixes()), "/nowhere", "3.11", "", "", frozenset())
    assert named_in(text, closure("main.py"), python) == []


def test_a_moved_file_is_known_by_where_it_was(world):
    folder, closure = world
    reason = Reason(kind=Why.ADDED, detail=f"{folder}/data.bin")
    moved = ClosureFile(path="/srv/models/data.bin", kind=FileKind.FILE, mode=0o644, sha256="0" * 64, reasons=(reason,))
    image = replace(closure("main.py"), files=tuple(sorted((*closure("main.py").files, moved), key=lambda file: file.path)))
    sources = sources_of(image)
    assert sources == {"/srv/models/data.bin": f"{folder}/data.bin"}
    assert here(("x", "/srv/models/data.bin", "/srv"), sources) == ("x", f"{folder}/data.bin", "/srv")
    assert with_seen(image, closure("main.py", "data.bin")).missing == ()


def test_a_moved_folder_is_put_back_too():
    sources = {"/srv/models/zoo/a/1/m.onnx": "/home/me/zoo/a/1/m.onnx", "/srv/models/zoo/b.onnx": "/home/me/zoo/b.onnx"}
    assert here(("--model", "/srv/models/zoo"), sources) == ("--model", "/home/me/zoo")
