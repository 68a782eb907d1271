"""Images as users make and run them: by the command line, real models, real programs; and what goes wrong, each a clear end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from benchmarks import image_answers as answers
from benchmarks import image_builds as builds
from benchmarks import image_models as models
from tests import microvm_image
from tests.image_place import why_no_image

from tenure.runtimes.rooted import why_no_root

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(300),  # whoever comes first builds
    pytest.mark.skipif(not shutil.which("strace"), reason="closures are made by watching with strace, which is not installed"),
    pytest.mark.skipif(bool(why_no_root()), reason=why_no_root() or "-"),
    pytest.mark.skipif(bool(why_no_image()), reason=why_no_image() or "-"),
]
SEED = 3
SMALL = ("--form", "root", "--cpus", "1", "--memory", "256MiB")
PROGRAMS = {
    "forks": """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("/tmp/orphan", "w").write(str(os.getpid()))
        while len(sys.argv) > 1:
            time.sleep(0.1)
        os._exit(0)
    os._exit(0)
os.wait()
while len(sys.argv) > 1:
    time.sleep(0.1)
""",
    "writes": """
try:
    open("/var/lib/tenure-was-here", "w").write("x")
    import os
    os.unlink("/var/lib/tenure-was-here")
    print("written")
except OSError as error:
    print("refused:", error)
    raise SystemExit(3)
""",
    "downloads": """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=0.2)
except OSError as error:
    print("not reached:", error)
""",
}


@pytest.fixture(scope="module")
def folder():
    with builds.workshop() as made:
        yield made


@pytest.fixture(scope="module")
def image(folder):
    """Return a service's image, built once for all tests of this module."""
    made = {}

    def build(engine):
        if why := builds.available(engine):
            pytest.skip(why)
        if engine not in made:
            keep = "" if engine == "numpy" else "all"  # one that is made smaller is enough here: each step starts it anew
            guest = ("microvm",) if engine == "onnxruntime" and not microvm_image.missing() else ()
            made[engine] = builds.build(engine, "convolution", folder, forms=("root", "oci", *guest), keep=keep)
        return made[engine]

    return build


@pytest.fixture(scope="module")
def expected(image):
    """Return what the bare process answers, asked once."""
    said = {}

    def ask(engine):
        if engine not in said:
            said[engine] = answers.answers(image(engine), "process", SEED)
        return said[engine]

    return ask


@pytest.fixture
def own(folder):
    """A folder of the test's own that may be in an image."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield Path(made)


def another_home(built, own):
    """Return a home with the same image, for whoever changes it or its world; files are the very same on disk."""
    shutil.copytree(built.home / "images", own / "home/images", symlinks=True, copy_function=os.link)
    return own / "home"


def program(own, name, codes=(0,)):
    """Build an image of one of PROGRAMS; return its home and what the command said."""
    path = own / f"{name}.py"
    path.write_text(PROGRAMS[name])
    home = own / "home"
    argv = ["image", "build", name, "--form", "root", "--keep", "all", "--json", "--", sys.executable, str(path)]
    return home, builds.tenure(argv, home, codes=codes)


@pytest.mark.parametrize("engine", models.LIGHT)
def test_a_service_answers_in_its_root_as_the_bare_process_does(image, expected, engine):
    built = image(engine)
    cell = answers.compare(engine, expected(engine), answers.answers(built, "root", SEED), emulated=False)
    assert (cell.wrong, cell.exact) == ("", True)
    if engine == "numpy":
        assert answers.control(built, expected(engine), SEED).failed


@pytest.mark.docker
@pytest.mark.parametrize("engine", models.LIGHT)
def test_a_service_answers_in_a_container_as_the_bare_process_does(image, expected, engine, docker, own, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{docker.socket}")
    built = image(engine)  # in a home of its own: a broker that found no engine may still be there
    built = replace(built, home=another_home(built, own))
    cell = answers.compare(engine, expected(engine), answers.answers(built, "oci", SEED), emulated=False)
    assert (cell.wrong, cell.exact) == ("", True)


@pytest.mark.guest
@pytest.mark.skipif(bool(microvm_image.missing()), reason=microvm_image.missing() or "-")
def test_a_service_answers_in_a_virtual_machine_as_the_bare_process_does(image, expected):
    found = answers.answers(image("onnxruntime"), "microvm", SEED)
    assert answers.compare("microvm", expected("onnxruntime"), found, emulated=True).wrong == ""


def test_without_an_engine_a_container_is_refused_with_what_to_do(image, own, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    built = image("numpy")  # in a home of its own: a broker that found an engine may still be there
    said = builds.tenure(["image", "run", built.name, "--form", "oci"], another_home(built, own), codes=range(1, 128))
    assert "container" in said
    assert "doctor" in said or "/nowhere/docker.sock" in said
    assert "Traceback" not in said


def test_a_form_that_was_not_built_is_refused_with_those_there_are(image):
    built = image("numpy")
    said = builds.tenure(["image", "run", built.name, "--form", "microvm"], built.home, codes=range(1, 128))
    assert "microvm" in said
    assert "root, oci" in said or "oci, root" in said


def test_a_corrupted_image_is_named_file_by_file(image, own):
    built = image("numpy")
    home = another_home(built, own)
    folder = builds.find(home, built.name)
    assert "Traceback" not in builds.tenure(["image", "verify", built.name], home)
    victim = next(path for path in sorted((folder / "root").rglob("libm.so*")) if path.is_file() and not path.is_symlink())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.unlink()
    victim.write_bytes(content)
    said = builds.tenure(["image", "verify", built.name], home, codes=range(1, 128))
    assert str(victim.relative_to(folder / "root")) in said


def test_an_image_without_its_manifest_or_tree_ends_with_what_to_do(image, own):
    built = image("numpy")
    home = another_home(built, own)
    shutil.rmtree(builds.find(home, built.name) / "root")
    said = builds.tenure(["image", "run", built.name, "--form", "root"], home, codes=range(1, 128))
    assert "build" in said
    assert "Traceback" not in said
    manifest = builds.find(home, built.name) / "image.json"
    manifest.write_text(manifest.read_text()[:100])
    said = builds.tenure(["image", "run", str(manifest.parent), "--form", "root"], home, codes=range(1, 128))
    assert "image.json" in said


def test_what_a_program_forks_off_ends_with_its_lease(own):
    home, _ = program(own, "forks")
    entry = json.loads((builds.find(home, "forks") / "image.json").read_text())["entry"]
    folder = builds.find(home, "forks")
    manifest = json.loads((folder / "image.json").read_text())
    (folder / "image.json").write_text(json.dumps({**manifest, "entry": [*entry, "stay"]}))
    argv = [sys.executable, "-m", "tenure.cli", "image", "run", str(folder), *SMALL]

    def alive():
        return [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == [entry[-1], "stay"]]

    with subprocess.Popen(argv, env=builds.environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        try:
            until(lambda: len(alive()) == 2)  # the program, and the grandchild in a session of its own
        finally:
            running.send_signal(signal.SIGINT)
            told = running.communicate(timeout=60)[0].decode()
    assert "Traceback" not in told
    until(lambda: not alive())


def test_a_program_that_writes_outside_is_told_so_and_no_image_is_made_that_can_not(own):
    if os.geteuid() != 0:
        pytest.skip("only root may write to /var/lib, where nobody should")
    home, said = program(own, "writes", codes=range(1, 128))
    assert "/var/lib/tenure-was-here" in said
    told = builds.tenure(["image", "analyse", "--", sys.executable, str(own / "writes.py")], home)
    assert "writes outside" in told
    assert not Path("/var/lib/tenure-was-here").exists()
    assert builds.tenure(["image", "list", "--json"], home) == "[]"


def test_a_program_that_asks_other_machines_is_told_when_it_is_built(own):
    _, said = program(own, "downloads")
    assert "192.0.2.1" in said


def until(condition, timeout_s=60.0):
    """Wait until something holds."""
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s, "it did not come to hold"
        time.sleep(0.1)
