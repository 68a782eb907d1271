"""`tenure image repair`: what an image lacks is named and put in by one command, whatever told of it."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tenure.cli import exits
from tenure.cli.main import run
from tenure.forms import LOCK_FILE
from tenure.images.lock import read_lock, write_lock
from tenure.images.store import ImageStore, write_manifest
from tenure.images.trace import find_strace
from tenure.runtimes.rooted import why_no_root

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_strace() is None, reason="needs strace, and the right to trace"),
    pytest.mark.skipif(bool(why_no_root()), reason=f"no process can have another root directory: {why_no_root()}"),
]
PROGRAM = """
import sys
print(open("data.txt").read())
if len(sys.argv) > 1:
    print(open("more.txt").read())
"""


@pytest.fixture(scope="module")
def built():
    """Return the home with an image of a small program, and the program's folder. Not in /tmp, which no image can hold."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tenure-test-") as folder, pytest.MonkeyPatch.context() as patch:
        home, program = Path(folder, "home"), Path(folder, "program")
        program.mkdir()
        for name in ("data.txt", "more.txt"):
            (program / name).write_text(name)
        (program / "main.py").write_text(PROGRAM)
        patch.setenv("TENURE_HOME", str(home))
        patch.chdir(program)
        assert run(["image", "build", "small", "--form", "root", "--keep", "sources", "--", sys.executable, "main.py"]) == 0
        yield home, program


@pytest.fixture
def repair(built, capsys, monkeypatch):
    """Return a function that repairs the image and gives what was missing, the new image, the code and stderr."""
    home, program = built
    monkeypatch.setenv("TENURE_HOME", str(home))
    monkeypatch.chdir(program)
    capsys.readouterr()

    def call(*argv):
        code = run(["image", "repair", "small", "--json", *argv])
        said = capsys.readouterr()
        answer = json.loads(said.out)
        names = [Path(item["path"]).name for item in answer.get("missing", [])]
        return names, answer.get("image"), code, said.err

    return call


def take(home, name):
    """Take a file out of the newest image's closure, as if no exercise had needed it."""
    image = ImageStore(home).find("small")
    closure = read_lock(image.folder / LOCK_FILE)
    without = replace(closure, files=tuple(file for file in closure.files if not file.path.endswith(f"/{name}")))
    assert without != closure
    write_lock(without, image.folder / LOCK_FILE)
    write_manifest(image.folder, replace(image.manifest, closure_hash=without.hash))


def test_of_a_whole_image_nothing_is_missing_and_nothing_is_built(repair):
    assert repair()[:3] == ([], None, 0)


def test_what_was_taken_is_named_by_its_own_exercise_and_the_closure_is_whole_again(repair, built):
    whole = ImageStore(built[0]).find("small").manifest.closure_hash
    for name in ("data.txt", "codecs.py", "libc.so.6"):
        take(built[0], name)
    assert repair("--dry-run")[:3] == (["codecs.py", "libc.so.6", "data.txt"], None, 0)
    names, image, code, _ = repair()
    assert (sorted(names), code) == (["codecs.py", "data.txt", "libc.so.6"], 0)
    closure = read_lock(ImageStore(built[0]).find(f"small:{image[:12]}").folder / LOCK_FILE)
    assert closure.hash == whole
    assert closure.file(f"{built[1]}/data.txt").reasons[0].kind == "repaired"


def test_an_errors_text_is_enough(repair, built, tmp_path):
    _, program = built
    log = tmp_path / "log"
    log.write_text(f"FileNotFoundError: [Errno 2] No such file or directory: '{program}/more.txt'\n")
    names, image, code, _ = repair("--log", str(log), "--dry-run")
    assert (names, image, code) == (["more.txt"], None, 0)
    log.write_text("FileNotFoundError: '/nowhere'")
    assert repair("--log", str(log))[:3] == ([], None, 0)  # it names nothing: the program is watched, and lacks nothing


def test_a_log_that_names_nothing_has_the_program_watched_though_something_else_is_gone(repair, built, tmp_path):
    image = ImageStore(built[0]).find("small")
    take(built[0], "codecs.py")
    (image.folder / f"root{built[1]}/data.txt").unlink()
    log = tmp_path / "log"
    log.write_text("AttributeError: something about a codec")
    names, _, code, _ = repair("--log", str(log))
    assert (sorted(names), code) == (["codecs.py", "data.txt"], 0)


def test_what_is_gone_from_a_built_image_is_named_and_comes_back(repair, built):
    image = ImageStore(built[0]).find("small")
    (image.folder / f"root{built[1]}/data.txt").unlink()
    names, again, code, _ = repair("--log", "/dev/null")
    assert (names, code) == (["data.txt"], 0)
    repaired = ImageStore(built[0]).find(f"small:{again[:12]}")
    assert (repaired.folder / f"root{built[1]}/data.txt").read_text() == "data.txt"
    assert repaired.manifest.keep == ("sources",), "as it was built"
    assert next(repaired.folder.glob("root/**/os.py"), None), "and so it has them"


def test_a_log_that_is_not_there_is_told(built, capsys):
    assert run(["image", "repair", "small", "--home", str(built[0]), "--log", "/nowhere"]) == exits.NOT_FOUND
    assert "/nowhere" in capsys.readouterr().err


def test_a_run_with_other_options_names_what_it_needs(repair):
    assert repair("--dry-run", "--also", f"{sys.executable} main.py more")[0] == ["more.txt"]
