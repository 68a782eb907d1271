"""A command in an image's root: what it sees, what it may write, what joins it, and what is refused."""

import ctypes
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import Bench

from tenure.errors import SpecError, Unsupported
from tenure.protocols import ExitKind
from tenure.runtimes.process import ProcessRuntime
from tenure.runtimes.rooted import Root, enter_root, why_no_root

pytestmark = pytest.mark.real

NOBODY = 65534


def make_root(folder: Path, *programs: str) -> Path:
    """Make a root directory with a shell, programs of this machine, and what these need."""
    wanted = [shutil.which(name) for name in ("sh", "cat", "ls", "sleep", "touch", "id", *programs)]
    said = subprocess.run(["ldd", *wanted], capture_output=True, text=True, check=True).stdout
    for path in {*re.findall(r"(/\S+) \(0x", said)}:
        place = folder / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(path), place)
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for path in wanted:
        shutil.copy2(path, folder / "bin" / Path(path).name)
    (folder / "srv").mkdir()
    (folder / "srv" / "word").write_text("hello from inside\n")
    (folder / "link").symlink_to("srv/word")
    return folder


def make_image(folder: Path, **fields) -> Path:
    """Make the folder of an image with a root form only."""
    make_root(folder / "root")
    manifest = {
        "name": "small",
        "id": "0" * 64,
        "closure_hash": "0" * 64,
        "entry": ["/bin/sh"],
        "workdir": "/srv",
        "forms": {"root": {"path": "root", "size_bytes": 1, "sha256": "0" * 64}},
    } | fields
    (folder / "image.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture
def bench(tmp_path):
    if why := why_no_root():
        pytest.skip(why)
    runtime = ProcessRuntime(tmp_path / "state", confine="rlimit")
    yield Bench(runtime, tmp_path / "work")
    runtime.close()


def sh(bench, image, text, **fields):
    return bench.start("/bin/sh", "-c", text, image=str(image), env={"PATH": "/bin"}, **fields)


def test_a_command_sees_the_image_and_starts_in_its_workdir(bench, image):
    handle = sh(bench, image, "cat word /link; ls -d /home /work /usr/share 2>&1; echo cwd $PWD")
    assert bench.end(handle).kind is ExitKind.COMPLETED
    said = bench.log(handle)
    assert said.count("hello from inside") == 2
    assert "cwd /srv" in said
    assert said.count("No such file") == 3, f"something of this machine can be seen: {said}"


def test_only_its_own_folder_and_memory_can_be_written(bench, image):
    own = 'touch "$TENURE_WORKER_DIR/endpoints.json" /tmp/a /run/b /dev/shm/c && echo ok'
    handle = sh(bench, image, f"{own}; touch /srv/no; touch /new; touch /bin/no")
    bench.end(handle)
    said = bench.log(handle)
    assert "ok" in said
    assert said.count("Read-only file system") == 3
    assert (bench.folder / "lease-1" / "1" / "endpoints.json").exists()
    assert not (image / "root" / "tmp" / "a").exists()


def test_mounts_are_found_at_their_places(bench, image, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("given\n")
    handle = sh(bench, image, "cat /srv/data/x; touch /srv/data/y", mounts={str(tmp_path / "data"): "/srv/data:ro"})
    bench.end(handle)
    assert "given" in bench.log(handle)
    assert "Read-only" in bench.log(handle)


def test_a_command_of_exec_is_inside_too(bench, image):
    handle = sh(bench, image, "touch /tmp/there; echo up; sleep 60")
    bench.said(handle, "up")
    assert bench.runtime.exec(handle, ("/bin/cat", "word"), timeout_s=20.0) == (0, b"hello from inside\n")
    assert bench.runtime.exec(handle, ("/bin/ls", "/tmp"), timeout_s=20.0)[1].split()[-1] == b"there"
    bench.runtime.stop(handle, grace_s=0.0, fence=1)
    bench.end(handle)


def test_nothing_is_left_mounted(bench, image):
    bench.end(sh(bench, image, "true"))
    assert str(image) not in Path("/proc/self/mountinfo").read_text()


def test_what_is_no_image_is_refused(bench, image, tmp_path):
    with pytest.raises(Unsupported, match="folder"):
        bench.start("/bin/sh", image="debian:12")
    with pytest.raises(SpecError, match=r"no image\.json"):
        bench.start("/bin/sh", image=str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "image.json").write_text('{"name": "other", "entry": ["x"], "forms": {"oci": {"path": "image.oci.tar"}}}')
    with pytest.raises(SpecError, match="no form 'root', only: oci"):
        bench.start("/bin/sh", image=str(other))
    (other / "image.json").write_text("{")
    with pytest.raises(SpecError, match="not the manifest"):
        bench.start("/bin/sh", image=str(other))
    shutil.rmtree(other)


def test_a_program_that_the_image_lacks_is_named(bench, image):
    with pytest.raises(SpecError, match="/bin/absent"):
        bench.start("/bin/absent", image=str(image))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")
def test_an_ordinary_user_gets_a_root_through_a_user_namespace(image, tmp_path):
    reader, writer = os.pipe()
    os.chmod(image, 0o755)
    for folder in (image, *image.parents[: len(image.parents) - 2]):
        os.chmod(folder, os.stat(folder).st_mode | 0o055)
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", NOBODY, NOBODY)
    for folder in tmp_path.parents[: len(tmp_path.parents) - 2]:
        os.chmod(folder, os.stat(folder).st_mode | 0o055)
    os.chmod(tmp_path, 0o755)
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # whoever was root before would not own its /proc/self
            own = str(tmp_path / "own")
            enter_root(Root(path=str(image / "root"), workdir="/srv", binds={own: "/srv/own"}))
            os.execve("/bin/sh", ["sh", "-c", "cat word; id -u; touch own/made; touch no"], {"PATH": "/bin"})
        except BaseException as error:
            os.write(2, f"could not: {error!r}".encode())
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    if "could not: PermissionError" in said and why_no_root():
        pytest.skip(said)
    assert "hello from inside" in said
    assert str(NOBODY) in said
    assert "Read-only" in said
    assert (tmp_path / "own" / "made").exists()
