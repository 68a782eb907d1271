"""The lock file gives back what was written, line by line, and says so when it is not what was written."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.closures import Closure, ClosureFile, Exercise, FileKind, Reason, SystemCall, Why
from tenure.errors import CorruptData, NotFound
from tenure.images.lock import lock_text, parse_lock, read_lock, write_lock

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
REASONS = st.lists(st.builds(Reason, kind=st.sampled_from(Why), detail=st.text(max_size=5)), max_size=3).map(tuple)


@st.composite
def files(draw):
    path, mode, reasons = draw(PATHS), draw(st.integers(0, 0o7777)), draw(REASONS)
    kind = draw(st.sampled_from(FileKind))
    if kind is FileKind.FILE:
        sha = draw(st.binary(min_size=32, max_size=32)).hex()
        return ClosureFile(path=path, kind=kind, mode=mode, size_bytes=draw(st.integers(0, 2**40)), sha256=sha, reasons=reasons)
    return ClosureFile(path=path, kind=kind, mode=mode, target="x/y" if kind is FileKind.SYMLINK else "", reasons=reasons)


CLOSURES = st.builds(
    Closure,
    program=st.lists(st.text(max_size=6), min_size=1, max_size=3).map(tuple),
    workdir=PATHS,
    env=st.dictionaries(NAMES, st.text(max_size=5), max_size=2),
    machine=st.just("x86_64"),
    python=st.just("3.11.7"),
    exercises=st.lists(st.builds(Exercise, argv=st.just(("a", "b")), exit_code=st.integers(-9, 9)), max_size=2).map(tuple),
    files=st.lists(files(), max_size=6, unique_by=lambda f: f.path).map(
        lambda found: tuple(sorted(found, key=lambda f: f.path))
    ),
    system_calls=st.lists(st.builds(SystemCall, name=NAMES, count=st.integers(1, 9), flags=st.just(("A",))), max_size=2).map(
        tuple
    ),
    made_at_s=st.floats(0, 1e10),
)


@given(CLOSURES)
def test_what_is_written_reads_back(closure):
    assert parse_lock(lock_text(closure)) == closure


def a_closure():
    names = ("/a", "/b", "/ü")
    kept = tuple(ClosureFile(path=name, kind=FileKind.FILE, mode=0o644, size_bytes=1, sha256="0" * 64) for name in names)
    return Closure(program=("a",), workdir="/", files=kept)


def test_one_changed_file_is_one_changed_line_beside_the_hash():
    closure = a_closure()
    other = replace(closure, files=(*closure.files[:2], replace(closure.files[2], sha256="1" * 64)))
    pairs = zip(lock_text(closure).splitlines(), lock_text(other).splitlines(), strict=True)
    changed = [before for before, after in pairs if before != after]
    assert len(changed) == 2
    assert changed[0].startswith('"hash"')
    assert '"/ü"' in changed[1]


def test_a_file_of_the_system_with_an_odd_name_survives(tmp_path):
    odd = b"/caf\xe9".decode("utf-8", "surrogateescape")
    closure = Closure(program=("a",), workdir="/", files=(replace(a_closure().files[0], path=odd),))
    write_lock(closure, tmp_path / "lock")
    assert read_lock(tmp_path / "lock") == closure


@pytest.mark.parametrize(
    "damage", [("0" * 64, "1" * 64), ('"/b"', '"/c"'), ('"files"', '"flies"'), ('"format": 1', '"format": 2'), ("}\n", "")]
)
def test_an_edited_lock_file_is_told(tmp_path, damage):
    path = tmp_path / "closure.lock.json"
    path.write_text(lock_text(a_closure()).replace(*damage))
    with pytest.raises(CorruptData, match=r"closure\.lock\.json"):
        read_lock(path)


def test_a_missing_lock_file_is_told(tmp_path):
    with pytest.raises(NotFound):
        read_lock(tmp_path / "closure.lock.json")
