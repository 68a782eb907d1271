"""Steps that make a tree smaller: what each changes, what it must not, and when it is dropped."""

import ctypes
import importlib.util
import marshal
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.images import tree
from tenure.images.elf_file import ElfFile
from tenure.images.shrink import shrink
from tenure.images.shrink_blas import SAID, UnusedBlas, stand_in
from tenure.images.shrink_elf import Symbols, cut_off
from tenure.images.shrink_folders import Folders
from tenure.images.shrink_packages import LEAST_BYTES, Package, large_packages
from tenure.images.shrink_python import DocStrings, Sources, add_bytecode, compiled, packages
from tenure.images.shrink_tls import SAID as NO_TLS
from tenure.images.shrink_tls import Tls
from tenure.images.shrink_zip import ZippedLibrary

VERSION = platform.python_version()
SOURCE = '''"""Of the module."""
import dataclasses

def answer():
    """Of the function."""
    return {"one": (1, 2.0, "text", frozenset({3, 4})), "doc": answer.__doc__}

@dataclasses.dataclass
class Noun:
    """Of the class."""
    value: int = 3
'''


class Cut:
    """Remove a file."""

    def __init__(self, name):
        self.name = name

    def apply(self, folder):
        (folder / self.name).unlink()
        return ""


def test_a_step_is_kept_only_while_the_answers_stay(tmp_path):
    place = tmp_path / "t"
    place.mkdir()
    (place / "needed").write_bytes(bytes(100))
    (place / "needless").write_bytes(bytes(50))
    report = shrink(
        place, [Cut("needed"), Cut("needless"), Cut("absent")], lambda t: "" if (t / "needed").exists() else "wrong"
    )
    assert [(one.kept, one.saved_bytes) for one in report] == [(False, 100), (True, 50), (False, 0)]
    assert report[0].why == "wrong"
    assert "absent" in report[2].why
    assert os.listdir(place) == ["needed"]
    assert os.listdir(tmp_path) == ["t"]


def module(folder, text=SOURCE, name="/app/site-packages/mod/part.py"):
    path = folder / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(folder, code):
    return subprocess.run(
        [sys.executable, "-S", "-B", "-c", code], cwd=folder / "app/site-packages", capture_output=True, text=True, check=True
    ).stdout


def test_modules_run_from_code_alone(tmp_path):
    path = module(tmp_path)
    module(tmp_path, "not python at all (", "/app/site-packages/mod/broken.py")
    assert add_bytecode(tmp_path, VERSION) == 1
    before = run(tmp_path, "import mod.part as m; print(m.answer(), m.Noun())")
    assert Sources().apply(tmp_path) == ""
    assert not path.exists()
    assert path.with_suffix(".pyc").exists()
    assert (tmp_path / "app/site-packages/mod/broken.py").exists()
    assert not (tmp_path / "app/site-packages/mod/__pycache__").exists()
    assert run(tmp_path, "import mod.part as m; print(m.answer(), m.Noun())") == before
    assert Sources().apply(tmp_path) == "no module has byte code here"


def test_documentation_goes_from_modules_and_functions(tmp_path):
    module(tmp_path)
    add_bytecode(tmp_path, VERSION)
    assert DocStrings().apply(tmp_path) == ""
    said = run(tmp_path, "import mod.part as m; print(m.__doc__, m.answer()['doc'], m.Noun.__doc__, m.Noun())")
    assert said == "None None Of the class. Noun(value=3)\n"


def test_a_module_of_numpy_that_holds_documentation_alone_does_nothing_then(tmp_path):
    path = tmp_path / "app/site-packages/numpy/_core/_add_newdocs.py"
    path.parent.mkdir(parents=True)
    path.write_text("print('documentation')")
    add_bytecode(tmp_path, VERSION)
    assert DocStrings().apply(tmp_path) == ""
    Sources().apply(tmp_path)
    said = run(tmp_path, "import numpy._core._add_newdocs as m; print('loaded', m.__name__)")
    assert said == "loaded numpy._core._add_newdocs\n"


def test_another_interpreters_modules_are_left_alone(tmp_path):
    module(tmp_path)
    assert add_bytecode(tmp_path, "3.8.1") == 0


def test_programs_keep_their_source(tmp_path):
    path = module(tmp_path)
    assert add_bytecode(tmp_path, VERSION, leave={"/app/site-packages/mod/part.py"}) == 0
    assert path.exists()
    assert packages(tmp_path, least_bytes=1) == ("/site-packages/mod/",)


def test_code_has_the_same_bytes_whatever_the_interpreter_did_before():
    program = (
        "import sys; from tenure.images.shrink_python import compiled;"
        "kept = [sys.intern(w) for w in sys.argv[2:]];"
        "sys.stdout.buffer.write(compiled(open(sys.argv[1], 'rb').read(), '/m.py'))"
    )
    file = importlib.util.find_spec("tenure.images.shrink_python").origin
    found = [
        subprocess.run([sys.executable, "-c", program, file, *words], capture_output=True, check=True, env=env).stdout
        for words, env in (
            ((), {**os.environ, "PYTHONHASHSEED": "1"}),
            (("held", "inside", "path", "documented", "source"), {**os.environ, "PYTHONHASHSEED": "2"}),
        )
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 1000
    assert compiled(b"(", "/x.py") is None


def test_code_has_the_same_bytes_twice_in_one_interpreter():
    source = b"""
def first(answer):
    return answer in {'a1', 'b1', 'c1'}
def second(answer):
    return answer in {'a1', 'b1', 'c1'}, '?', 1 in {1, True}, answer in {1.0, 2}
"""
    program = (
        "import sys; from tenure.images.shrink_python import compiled; source = sys.stdin.buffer.read();"
        "before = compiled(source, '/m.py'); kept = [sys.intern(word) for word in ('a1', 'b1', 'c1', '?')];"
        "sys.exit(before != compiled(source, '/m.py'))"
    )
    subprocess.run([sys.executable, "-c", program], input=source, check=True)
    inside = {}
    exec(marshal.loads(compiled(source, "/m.py")[16:]), inside)
    assert inside["first"]("b1")
    assert inside["second"](2) == (False, "?", True, True)


def test_a_program_cut_off_behind_what_is_loaded_runs(tmp_path):
    shell = Path(shutil.which("sh")).resolve()
    padded = shell.read_bytes() + bytes(100_000)  # as a symbol table lies there
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").write_bytes(padded)
    os.chmod(tmp_path / "bin" / "sh", 0o755)
    (tmp_path / "text").write_text("no ELF")
    assert Symbols().apply(tmp_path) == ""
    assert (tmp_path / "bin" / "sh").stat().st_size <= len(padded) - 100_000
    assert subprocess.run([tmp_path / "bin" / "sh", "-c", "echo works"], capture_output=True, check=True).stdout == b"works\n"
    assert cut_off((tmp_path / "bin" / "sh").read_bytes()) is None, "nothing more is to be had"


@given(data=st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_what_is_no_whole_elf_file_is_left_alone(data):
    assert cut_off(data) is None
    assert cut_off(b"\x7fELF\x02\x01\x01" + data) is None or len(data) > 57


@given(names=st.sets(st.from_regex(r"[a-z][a-z0-9_]{0,30}", fullmatch=True), max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_stand_in_gives_the_names_it_was_asked_for(names):
    elf = ElfFile(stand_in("libstand.so.0", names))
    assert elf.symbols(defined=True) == names
    assert elf.symbols(defined=False) == set()
    assert elf.soname == "libstand.so.0"
    assert elf.needed == ()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="stand-ins are machine code of x86-64")
def test_a_stand_in_adds_products_and_refuses_everything_else(tmp_path):
    path = tmp_path / "stand.so"
    path.write_bytes(stand_in("libstand.so.0", {"scipy_cblas_sdot64_", "cblas_ddot", "cblas_sgemm", "dgesv_"}))
    library = ctypes.CDLL(str(path))
    number = ctypes.c_int64
    for name, kind, restype in (
        ("scipy_cblas_sdot64_", ctypes.c_float, ctypes.c_float),
        ("cblas_ddot", ctypes.c_double, ctypes.c_double),
    ):
        function = library[name]
        function.restype = restype
        values = (kind * 6)(1, 2, 3, 4, 5, 6)
        assert function(number(6), values, number(1), values, number(1)) == 91.0
        assert function(number(3), values, number(2), values, number(1)) == 1 + 6 + 15
        assert function(number(0), values, number(1), values, number(1)) == 0.0
    for name in ("cblas_sgemm", "dgesv_"):
        code = f"import ctypes; ctypes.CDLL({str(path)!r}).{name}()"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert ended.returncode == -6
        assert ended.stderr == SAID


@pytest.mark.skipif(platform.machine() != "x86_64", reason="stand-ins are machine code of x86-64")
def test_numpy_imports_with_a_stand_in_and_ends_at_a_product_of_matrices(tmp_path):
    numpy = Path(importlib.util.find_spec("numpy").origin).parent
    if not (numpy.parent / "numpy.libs").is_dir():
        pytest.skip("this NumPy has no BLAS of its own")
    for name in ("numpy", "numpy.libs"):
        shutil.copytree(
            numpy.parent / name, tmp_path / "app/site-packages" / name, ignore=shutil.ignore_patterns("tests", "f2py", "*.lib")
        )
    assert UnusedBlas("numpy").apply(tmp_path) == ""
    assert UnusedBlas("scipy").apply(tmp_path) == "it has none of its own"
    left = os.listdir(tmp_path / "app/site-packages/numpy.libs")
    assert len(left) == 1, f"what only OpenBLAS needed is gone with it; left: {left}"
    code = (
        "import sys; sys.path.insert(0, '.'); import numpy as np; a = np.ones((3, 3)); print((a + a).sum(), flush=True); a @ a"
    )
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path / "app/site-packages", capture_output=True, check=False
    )
    assert ended.stdout == b"18.0\n"
    assert SAID in ended.stderr
    assert ended.returncode == -6


def test_a_package_goes_as_a_whole_and_only_large_ones_are_tried(tmp_path):
    place = tmp_path / "app/site-packages"
    for name in (
        "big/__init__.py",
        "big/data.bin",
        "big.libs/x.so",
        "big-1.0.dist-info/METADATA",
        "bigger/x",
        "small/__init__.py",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"#" * (LEAST_BYTES if name in ("big/data.bin", "bigger/x") else 10))
    assert set(large_packages(tmp_path)) == {"big", "bigger"}
    assert Package("big").apply(tmp_path) == ""
    assert sorted(os.listdir(place)) == ["bigger", "small"]
    assert Package("big").apply(tmp_path) == "it is not there"


def test_tests_and_headers_of_packages_go(tmp_path):
    kept = [module(tmp_path), module(tmp_path, "x", "/app/tests/data.txt")]
    gone = [module(tmp_path, "x", f"/app/site-packages/mod/{name}") for name in ("tests/test_x.py", "include/x.h", "part.pyi")]
    assert Folders().apply(tmp_path) == ""
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert Folders().apply(tmp_path) == "there are none"


def test_a_dropped_step_leaves_the_very_same_tree(tmp_path):
    place = tmp_path / "t"
    module(place)
    add_bytecode(place, VERSION)
    before = tree.scan(place)
    (report,) = shrink(place, [Sources()], lambda _: "answers differ")
    assert not report.kept
    assert report.saved_bytes > 0
    assert tree.scan(place) == before


@pytest.fixture
def library(tmp_path):
    """The standard library in a tree, at its own place, as code alone; and how a program is run from it."""
    here = Path(sysconfig.get_path("stdlib")).resolve()
    place = tmp_path / "lib" / here.name
    kept = ("asyncio", "collections", "concurrent", "encodings", "importlib", "json", "lib-dynload", "logging", "re")

    def others(folder, names):
        return {name for name in names if name == "__pycache__" or (Path(folder) == here and (here / name).is_dir())} - {*kept}

    shutil.copytree(here, place, ignore=others)
    if not list(place.glob("lib-dynload/_ssl.*.so")):
        pytest.skip("this interpreter's _ssl is no library of its own")
    add_bytecode(tmp_path, VERSION)
    Sources().apply(tmp_path)

    def run(code):
        archive = tmp_path / "lib" / f"{here.name.replace('.', '')}.zip"
        before = f"import sys; sys.path[:] = [{str(archive)!r}, {str(place)!r}, {str(place / 'lib-dynload')!r}];"
        forget = "[sys.modules.pop(n) for n in list(sys.modules) if n.partition('.')[0] in ('ssl', '_ssl', 'hashlib', 'json')];"
        return subprocess.run([sys.executable, "-S", "-c", before + forget + code], capture_output=True, text=True, check=False)

    return tmp_path, place, run


def test_a_program_without_tls_imports_it_hashes_and_is_told_when_it_needs_it(library):
    folder, place, run = library
    names = ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b")
    hashes = f"import hashlib; print(*(hashlib.new(name, b'x').hexdigest() for name in {names}))"
    before = run(hashes).stdout
    assert Tls().apply(folder) == ""
    assert not [path for path in place.rglob("*") if "_hashlib" in path.name or path.name.startswith("_ssl.cpython")]
    assert run(hashes).stdout == before
    done = run("import ssl, asyncio; print(ssl.__file__, len(ssl.RAND_bytes(8))); ssl.create_default_context()")
    assert done.stdout == f"{place / 'ssl.pyc'} 8\n"
    assert f"OSError: {NO_TLS}" in done.stderr
    assert Tls().apply(folder) == "it is not there"


def test_the_standard_library_runs_from_an_archive_that_is_the_same_each_time(library, tmp_path_factory):
    folder, place, run = library
    other = tmp_path_factory.mktemp("other") / "tree"
    shutil.copytree(folder, other)
    assert ZippedLibrary().apply(folder) == ""
    assert not (place / "json").exists()
    assert (place / "encodings" / "__init__.pyc").exists()
    done = run("import json; print(json.__file__, json.dumps({'a': 1}))")
    assert done.stdout.endswith('/json/__init__.pyc {"a": 1}\n'), done.stderr
    assert ".zip/" in done.stdout
    assert ZippedLibrary().apply(folder) == "there is an archive already"
    assert ZippedLibrary().apply(other) == ""
    first, second = (next((each / "lib").glob("python*.zip")).read_bytes() for each in (folder, other))
    assert first == second
