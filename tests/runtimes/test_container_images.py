"""The base image: its archive follows from content alone, and what is in it runs in a container."""

import hashlib
import io
import marshal
import os
import py_compile
import tarfile

import pytest

from tenure.runtimes import images
from tenure.runtimes.container_engine import Engine


def _archive(entries):
    stream = io.BytesIO()
    images.write_archive(stream, entries)
    return stream.getvalue()


def test_the_same_files_make_the_same_archive_whatever_their_times(tmp_path):
    digests = []
    for number in range(2):
        source = tmp_path / str(number)
        source.write_text("print('hello')")
        module = images.Entry(0o644, source=source, module="/lib/x.py")
        entries = {"a": images.Entry(0o755), "a/x.py": images.Entry(0o644, source=source), "a/x.pyc": module}
        digests.append(hashlib.sha256(_archive(entries)).hexdigest())
    assert digests[0] == digests[1]


def test_everything_in_it_is_roots_and_of_no_time():
    text = images.Entry(0o644, text=b"x")
    with tarfile.open(fileobj=io.BytesIO(_archive({"a": images.Entry(0o1777), "a/b": text}))) as archive:
        assert {(m.uid, m.gid, m.mtime) for m in archive} == {(0, 0, 0)}
        assert [m.mode for m in archive] == [0o1777, 0o644]


def test_a_changed_file_gives_the_image_another_name():
    names = {images.digest({"a": images.Entry(0o644, text=text)}) for text in (b"x", b"y")}
    assert len(names) == 2


def test_what_it_holds_of_this_machine_are_programs_libraries_and_the_standard_library():
    found = images.gather()
    assert {"usr/bin/sh", "usr/bin/python3", "lib", "etc/passwd"} <= set(found)
    assert not [name for name in found if "site-packages" in name or (name.startswith(("home/", "root/.ssh", "etc/shadow"))
                and name != "home/tenure")]  # fmt: skip
    assert all(not entry.mode & 0o6000 for entry in found.values()), "nothing changes its user"


@pytest.mark.real
@pytest.mark.docker
def test_an_engine_that_has_it_is_not_given_it_again(docker):
    engine = Engine(str(docker.socket))
    name = images.ensure_base_image(engine)
    made = docker.ask("GET", f"/images/{name}/json")[1]
    assert images.ensure_base_image(engine) == name
    assert docker.ask("GET", f"/images/{name}/json")[1] == made


def test_code_is_taken_as_it_was_compiled_here_when_its_source_is_unchanged(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("answer = 42\n")
    fresh = images.Entry(0o644, source=source, module=str(source)).content()
    py_compile.compile(str(source), doraise=True)
    taken = images.Entry(0o644, source=source, module=str(source)).content()
    assert taken[:16] == fresh[:16]
    for code in (fresh, taken):
        found = {}
        exec(marshal.loads(code[16:]), found)
        assert found["answer"] == 42
    source.write_text("answer = 43\n")
    os.utime(source, (1, 1))
    assert images.Entry(0o644, source=source, module=str(source)).content() != taken


def test_a_file_that_is_no_python_stays_what_it_is(tmp_path):
    source = tmp_path / "template.py"
    source.write_text("{{ not python }} =")
    assert images.Entry(0o644, source=source, module="x").content() == source.read_bytes()
