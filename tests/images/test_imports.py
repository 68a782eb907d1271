"""What sources import is found where Python would find it, and no further than it must be."""

import sys
from importlib.machinery import all_suffixes

import pytest

from tenure.errors import Unavailable
from tenure.images.imports import Interpreter, ask_interpreter, imported_files, module_files


@pytest.fixture
def site(tmp_path):
    """Return a folder with an own program and a function that finds what it imports."""

    def find(known=(), **sources):
        for name, text in sources.items():
            path = tmp_path / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        python = Interpreter((str(tmp_path),), tuple(all_suffixes()), "/nowhere", "3.11", "", "", frozenset({"sys"}))
        found = imported_files([f"{tmp_path}/main.py"], python, known=frozenset(f"{tmp_path}/{name}" for name in known))
        return {
            path.removeprefix(f"{tmp_path}/"): item.by.removeprefix(f"{tmp_path}/") for item in found for path in item.files
        }

    return find


def test_an_import_inside_a_function_of_the_programs_own_source_is_found(site):
    assert site(main="def f():\n    import lazy\n", lazy="") == {"lazy.py": "main.py"}


def test_of_a_library_what_loading_it_imports_is_followed_and_no_more(site):
    found = site(
        main="import lib",
        lib__in____init__="from . import a\nfrom .b import c\ndef f():\n    import optional\n",
        lib__in__a="import deep",
        lib__in__b="",
        deep="",
        optional="",
    )
    assert set(found) == {"lib/__init__.py", "lib/a.py", "lib/b.py", "deep.py"}


def test_what_was_loaded_under_an_exercise_is_not_walked_again(site):
    assert set(site(known=["lib.py"], main="import lib", lib="import never")) == {"lib.py"}


def test_imports_for_type_checkers_alone_are_none(site):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import heavy\nelse:\n    import light\n"
    assert set(site(main=text, heavy="", light="")) == {"light.py"}


@pytest.mark.parametrize(
    "text",
    ["import importlib\nimportlib.import_module('lazy')", "__import__('lazy')", "try:\n import lazy\nexcept ImportError: pass"],
)
def test_imports_by_name_and_in_branches_are_found(site, text):
    assert set(site(main=text, lazy="")) == {"lazy.py"}


def test_relative_imports_of_the_packages_above_are_resolved(site):
    found = site(
        main="import p.q.r",
        p__in____init__="",
        p__in__q__in____init__="",
        p__in__q__in__r="from ... import p\nfrom ..s import x",
        p__in__s="",
    )
    assert "p/s.py" in found


def test_a_namespace_package_needs_no_file(site):
    assert set(site(main="import space.mod", space__in__mod="")) == {"space/mod.py"}


@pytest.mark.parametrize("text", ["import nowhere", "this is no python", "import sys", ""])
def test_what_is_not_there_or_not_python_adds_nothing(site, text):
    assert site(main=text) == {}


def test_extension_modules_are_found(tmp_path):
    (tmp_path / "fast.abi3.so").touch()
    python = Interpreter((str(tmp_path),), tuple(all_suffixes()), "/nowhere", "3.11", "", "", frozenset())
    assert module_files("fast", python) == (f"{tmp_path}/fast.abi3.so",)


def test_the_running_python_says_where_it_looks(tmp_path):
    found = ask_interpreter(sys.executable, env={}, workdir=str(tmp_path), script="main.py")
    assert found.version == "{}.{}.{}".format(*sys.version_info)
    assert found.path[0] == str(tmp_path)
    assert module_files("json.decoder", found)[-1].endswith("json/decoder.py")
    assert not found.is_own_source(module_files("json", found)[0])
    assert found.is_own_source(f"{tmp_path}/main.py")


def test_a_program_that_is_no_python_is_told(tmp_path):
    with pytest.raises(Unavailable, match="where it looks"):
        ask_interpreter("/bin/true", env={}, workdir=str(tmp_path))
