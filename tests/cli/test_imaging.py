"""`tenure image analyse | explain | verify` as a user meets them: what is printed, what is refused, what the exit code says."""

import json
import sys

import pytest

from tenure.cli import exits
from tenure.cli.main import run
from tenure.closures import Closure, ClosureFile, FileKind, Reason, Why, files_hash
from tenure.forms import LOCK_FILE, Form, FormRecord, ImageManifest
from tenure.images.closure_check import ROOT_LOCK_FILE
from tenure.images.lock import write_lock
from tenure.images.store import write_manifest
from tenure.images.trace import find_strace
from tenure.images.tree import scan

NEEDS_STRACE = pytest.mark.skipif(find_strace() is None, reason="needs strace, and the right to trace")


@pytest.fixture
def tenure(capsys, tmp_path, monkeypatch):
    """Return a function that runs a command line and gives code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENURE_HOME", str(tmp_path / "home"))

    def call(*argv):
        code = run(["image", *argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.mark.real
@NEEDS_STRACE
def test_a_program_is_analysed_written_explained_and_verified(tenure, tmp_path):
    (tmp_path / "main.py").write_text("import json\nprint(open('data.txt').read())\n")
    (tmp_path / "data.txt").write_text("x")
    code, out, err = tenure("analyse", "--out", "out", "--", sys.executable, "main.py")
    assert code == 0
    assert "watching" in err
    for word in ("closure", "shared objects", "Python sources", "system calls", "microvm", "nanos", "left out"):
        assert word in out, word
    assert json.loads((tmp_path / "out/analysis.json").read_text())["report"]["files"] > 10

    code, out, _ = tenure("explain", f"out/{LOCK_FILE}", "data.txt")
    assert code == 0
    assert "opened by python" in out
    code, out, _ = tenure("explain", "out", "json/__init__.py")
    assert "looked at" in out or "opened" in out
    code, _, err = tenure("explain", "out", "dota.txt")
    assert code == exits.NOT_FOUND
    assert "not in the closure" in err

    assert "Nothing that was watched" in err
    assert "A rule leaves it out: the kernel's own" in tenure("explain", "out", "/proc/cpuinfo")[2]

    assert tenure("verify", f"out/{LOCK_FILE}")[:2] == (0, "whole\n")
    (tmp_path / "data.txt").write_text("y")
    code, out, _ = tenure("verify", f"out/{LOCK_FILE}")
    assert code == exits.CORRUPT_DATA
    assert "data.txt" in out


@pytest.mark.real
@NEEDS_STRACE
def test_json_has_the_report_the_findings_and_the_forms(tenure, tmp_path):
    (tmp_path / "main.py").write_text("import subprocess\nsubprocess.run(['/bin/true'])")
    code, out, _ = tenure("analyse", "--json", "--env", "MODE=fast", "--", sys.executable, "main.py")
    facts = json.loads(out)
    assert code == 0
    assert facts["env"]["MODE"] == "fast"
    assert {form["form"] for form in facts["forms"]} >= {"root", "oci", "microvm", "nanos", "unikraft"}
    assert facts["findings"][0]["matter"] == "starts"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["analyse"], "COMMAND"),
        (["analyse", "serve"], "one model"),
        (["analyse", "serve", "no-such.onnx"], "no model"),
        (["analyse", "--exercise", "true", "serve", "m.onnx"], "by itself"),
        (["analyse", "--env", "x", "--", "true"], "NAME=VALUE"),
        (["analyse", "--also", "'", "--", "true"], "no command line"),
        (["analyse", "--timeout", "soon", "--", "true"], "soon"),
        (["analyse", "--", "no-such-program"], "no-such-program"),
        (["explain", "no-such-image", "x"], "no-such-image"),
        (["verify", "no-such-image"], "no-such-image"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said_and_nothing_is_started(tenure, argv, word):
    code, _, err = tenure(*argv)
    assert code not in (0, 1)
    assert word in err


@pytest.fixture
def image(tmp_path):
    """Return the folder of a small image with a root form."""
    folder = tmp_path / "home/images/small/0123"
    (folder / "root/app").mkdir(parents=True)
    (folder / "root/app/a").write_text("a")
    (folder / "root/app/b").write_text("b")
    (folder / "image.oci.tar").write_text("tar")
    root = Closure(program=("/app/a",), workdir="/", files=scan(folder / "root"))
    reasons = (Reason(kind=Why.NEEDED, detail="/app/b"),)
    file = ClosureFile(path="/app/a", kind=FileKind.FILE, mode=0o644, sha256="0" * 64, reasons=reasons)
    above = ClosureFile(path="/app/b", kind=FileKind.FILE, mode=0o644, sha256="0" * 64, reasons=(Reason(kind=Why.EXECUTED),))
    closure = Closure(program=("/app/a",), workdir="/", files=(file, above))
    write_lock(closure, folder / LOCK_FILE)
    write_lock(root, folder / ROOT_LOCK_FILE)
    forms = {
        Form.ROOT: FormRecord(path="root", size_bytes=2, sha256=files_hash(root.files)),
        Form.OCI: FormRecord(path="image.oci.tar", size_bytes=3, sha256="2" * 64),
    }
    manifest = ImageManifest(name="small", id=root.hash, closure_hash=closure.hash, entry=("/app/a",), forms=forms)
    write_manifest(folder, manifest)
    return folder


def test_of_a_damaged_image_every_damage_is_named(tenure, image):
    code, out, _ = tenure("verify", "small", "--json")
    assert code == exits.CORRUPT_DATA
    assert [(item["what"], item["how"]) for item in json.loads(out)["damage"]] == [("oci", "its content is not what was built")]
    (image / "root/app/a").write_text("A")
    (image / "root/app/b").unlink()
    (image / "root/app/c").write_text("c")
    (image / LOCK_FILE).write_text("{}")
    _, out, _ = tenure("verify", "small")
    for word in ("/app/a", "other content", "/app/b", "missing", "/app/c", "was not there", "lock file"):
        assert word in out, word


def test_a_reason_leads_on_to_the_reason_of_what_needs_it(tenure, image):
    code, out, _ = tenure("explain", "small", "/app/a")
    assert code == 0
    assert out.splitlines()[1:] == ["  needed by /app/b", "    executed by the program"]
