"""What closures and images refuse, and what their identity rests on."""

from dataclasses import replace

import pytest

from tenure.closures import Closure, ClosureFile, FileKind, Reason, SystemCall, Why, files_hash
from tenure.errors import SpecError
from tenure.forms import Form, FormRecord, ImageManifest

SHA = "a" * 64


def a_file(path="/app/main.py", **fields):
    return ClosureFile(**{"path": path, "kind": FileKind.FILE, "mode": 0o644, "size_bytes": 3, "sha256": SHA, **fields})


def a_closure(**fields):
    files = (ClosureFile(path="/app", kind=FileKind.DIRECTORY, mode=0o755), a_file())
    return Closure(**{"program": ("python", "main.py"), "workdir": "/app", "files": files, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "app"},
        {"path": "/app/../etc"},
        {"path": "/app/"},
        {"mode": 0o10000},
        {"sha256": ""},
        {"sha256": "A" * 64},
        {"target": "x"},
        {"kind": FileKind.DIRECTORY},
        {"kind": FileKind.SYMLINK, "sha256": "", "target": ""},
    ],
    ids=str,
)
def test_a_file_that_cannot_be_is_refused(fields):
    with pytest.raises(SpecError):
        a_file(**fields)


def test_files_out_of_order_or_twice_are_refused():
    with pytest.raises(SpecError, match="sorted"):
        a_closure(files=(a_file("/b"), a_file("/a")))
    with pytest.raises(SpecError, match="once"):
        a_closure(files=(a_file("/a"), a_file("/a")))


def test_a_closure_without_a_program_is_refused():
    with pytest.raises(SpecError, match="command"):
        a_closure(program=())


def test_the_hash_leaves_out_times_reasons_and_how_it_was_found():
    reasoned = (a_closure().files[0], replace(a_file(), reasons=(Reason(kind=Why.OPENED, detail="python"),)))
    other = a_closure(files=reasoned, made_at_s=9.0, system_calls=(SystemCall(name="read", count=2),), machine="x86_64")
    assert other.hash == a_closure().hash


@pytest.mark.parametrize(
    "changed",
    [
        {"program": ("python", "other.py")},
        {"program": ("python main.py",)},
        {"workdir": "/"},
        {"env": {"A": "1"}},
        {"files": (a_file("/app/other.py"),)},
        {"files": (a_closure().files[0], a_file(mode=0o755))},
        {"files": (a_closure().files[0], a_file(sha256="b" * 64))},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_hash_tells_every_difference_that_running_could_see(changed):
    assert a_closure(**changed).hash != a_closure().hash


def test_the_hash_of_files_does_not_depend_on_their_order():
    files = a_closure().files
    assert files_hash(files) == files_hash(reversed(files))


def test_the_size_is_that_of_all_content():
    assert a_closure(files=(a_file("/a"), a_file("/b", size_bytes=4))).size_bytes == 7


def an_image(**fields):
    return ImageManifest(**{"name": "digits", "id": SHA, "closure_hash": SHA, "entry": ("python",), **fields})


@pytest.mark.parametrize(
    "fields",
    [{"name": "Digits"}, {"name": "../x"}, {"name": ""}, {"id": "12"}, {"entry": ()}, {"door": "grpc"}, {"door": "v2"}],
    ids=str,
)
def test_an_image_that_cannot_be_is_refused(fields):
    with pytest.raises(SpecError):
        an_image(**fields)


def test_an_image_is_known_by_the_first_digits_of_its_id():
    record = FormRecord(path="root", size_bytes=1, sha256=SHA)
    assert an_image(forms={Form.ROOT: record}, door="v2", ports=(8080,)).short_id == "a" * 12
