"""An image of a small program, from its files to its forms; what answers otherwise is refused, what is not needed goes."""

import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
from tests.runtimes.test_rooted import make_root

from tenure.closures import Closure, ClosureFile, FileKind, SystemCall
from tenure.errors import JobFailed, SpecError, Unsupported
from tenure.forms import Form
from tenure.images import tree
from tenure.images.answers import Asked
from tenure.images.build import BuildSpec, build, make_oci_form, make_root_form
from tenure.images.lock import read_lock
from tenure.images.relocate import relocate
from tenure.images.store import ImageStore
from tenure.runtimes.rooted import root_prefix, why_no_root

pytestmark = pytest.mark.real

CALLS = (
    *("access", "arch_prctl", "clone", "dup2", "faccessat2", "fadvise64", "fcntl", "getegid", "geteuid", "getgid", "getppid"),
    *("getrandom", "getuid", "ioctl", "newfstatat", "openat", "pipe2", "pread64", "prlimit64", "rseq", "set_robust_list"),
    *("set_tid_address", "sigaltstack", "vfork", "wait4", "pipe", "lseek", "fstat", "stat", "uname", "getcwd", "chdir"),
)
"""What a shell and cat may call."""
MAKERS = {Form.ROOT: make_root_form, Form.OCI: make_oci_form}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder that stands for a machine: a shell, what it needs, a word to say, and a file that nobody reads."""
    if why := why_no_root():
        pytest.skip(why)
    folder = make_root(tmp_path_factory.mktemp("machine"))
    needless = folder / "usr/lib/python3/dist-packages/mod/tests/big.txt"
    needless.parent.mkdir(parents=True)
    needless.write_text("x" * 10_000)
    return folder


def spec(made, command="cat word", **fields):
    files = tree.scan(made)
    program = ("/bin/sh", "-c", command)
    closure = Closure(
        program=program,
        workdir="/srv",
        env={"PATH": "/bin"},
        files=files,
        machine=platform.machine(),
        python=platform.python_version(),
        system_calls=tuple(SystemCall(name=name, count=1) for name in CALLS),
    )
    env = {"PATH": os.environ["PATH"]}
    return BuildSpec(
        **{
            "name": "small",
            "closure": closure,
            "forms": (Form.ROOT, Form.OCI),
            "sources": {file.path: Path(made, file.path.lstrip("/")) for file in files if file.kind is FileKind.FILE},
            "bare": Asked(argv=program, env=env, workdir=str(made / "srv")),
            "inside": Asked(argv=program, env={"PATH": "/bin"}, workdir="/srv"),
        }
        | fields
    )


def test_an_image_has_its_forms_and_what_nobody_needs_is_gone(made, tmp_path):
    heard = []
    built = build(spec(made), ImageStore(tmp_path), MAKERS, enter=root_prefix, told=heard.append)
    image, manifest = built.image, built.image.manifest
    assert set(manifest.forms) == {Form.ROOT, Form.OCI}
    assert sorted(os.listdir(image.folder)) == [
        "closure.lock.json",
        "image.json",
        "image.oci.tar",
        "root",
        "root.lock.json",
        "seccomp.json",
    ]
    kept = {step.step: step for step in built.steps if step.kept}
    assert kept["tests, headers and type stubs"].saved_bytes == 10_000
    assert manifest.keep == ()
    assert not (image.folder / "root/usr/lib/python3/dist-packages/mod/tests").exists()
    assert built.tree_bytes < built.closure_bytes
    whole = read_lock(image.folder / "root.lock.json")
    assert whole.hash == manifest.id
    assert read_lock(image.folder / "closure.lock.json").hash == manifest.closure_hash
    assert whole.files == tree.scan(image.folder / "root")
    assert "making form oci" in heard


def test_the_same_closure_gives_the_same_image_with_the_same_bytes(made, tmp_path):
    first, second = (build(spec(made), ImageStore(tmp_path / name), MAKERS, enter=root_prefix).image for name in ("one", "two"))
    assert first.manifest.id == second.manifest.id
    for form, record in first.manifest.forms.items():
        assert record.sha256 == second.manifest.forms[form].sha256
        assert (record.cold_start_s is not None) == (form is Form.ROOT)
    for name in ("image.oci.tar", "root.lock.json", "seccomp.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_a_program_that_lacks_a_file_in_its_closure_is_refused_with_what_it_said(made, tmp_path):
    whole = spec(made)
    files = tuple(file for file in whole.closure.files if file.path != "/srv/word")
    lacking = Closure(program=whole.closure.program, workdir="/srv", env={"PATH": "/bin"}, files=files)
    store = ImageStore(tmp_path)
    with pytest.raises(JobFailed, match=r"answers otherwise than here: .*cat: word: No such file.*--add PATH"):
        build(spec(made, closure=lacking), store, MAKERS, enter=root_prefix)
    assert os.listdir(store.folder) == []


def test_answers_that_differ_from_run_to_run_leave_everything_in(made, tmp_path):
    built = build(spec(made, "cat word; echo $$"), ImageStore(tmp_path), MAKERS, enter=root_prefix)
    assert "differ from run to run" in built.unchecked
    assert built.steps == ()
    assert (built.image.folder / "root/usr/lib/python3/dist-packages/mod/tests/big.txt").exists()


def test_a_profile_behind_which_the_program_does_not_run_is_dropped_and_told(made, tmp_path):
    whole = spec(made)
    built = build(whole, ImageStore(tmp_path / "one"), MAKERS, enter=root_prefix)
    assert built.unfiltered == ""
    assert built.image.manifest.seccomp == "seccomp.json"
    narrow = replace(whole.closure, system_calls=(SystemCall(name="read", count=1),))
    built = build(spec(made, closure=narrow), ImageStore(tmp_path / "two"), MAKERS, enter=root_prefix)
    assert built.unfiltered
    assert built.image.manifest.seccomp == ""
    assert not (built.image.folder / "seccomp.json").exists()


def test_what_is_to_be_kept_is_not_tried(made, tmp_path):
    built = build(spec(made, keep=("folders",)), ImageStore(tmp_path), MAKERS, enter=root_prefix)
    assert next(step for step in built.steps if step.step.startswith("tests")).why == "not tried: --keep folders"
    built = build(spec(made, keep=("all",)), ImageStore(tmp_path), MAKERS, enter=root_prefix)
    assert built.steps == ()
    with pytest.raises(SpecError, match="symbols"):
        spec(made, keep=("everything",))


def test_a_form_that_cannot_be_made_here_is_told_and_the_others_are_there(made, tmp_path):
    def cannot(_made):
        raise Unsupported("microvm", "there is no kernel", "Get one.")

    built = build(
        spec(made, forms=(Form.OCI, Form.MICROVM)), ImageStore(tmp_path), {**MAKERS, Form.MICROVM: cannot}, enter=root_prefix
    )
    assert set(built.image.manifest.forms) == {Form.OCI}
    assert "there is no kernel" in built.left_out[Form.MICROVM]
    assert not (built.image.folder / "root").exists(), "the tree was only the way to the form that was asked for"
    with pytest.raises(Unsupported, match="there is no kernel"):
        build(spec(made, forms=(Form.MICROVM,)), ImageStore(tmp_path), {Form.MICROVM: cannot}, enter=root_prefix)


def test_files_are_moved_with_the_words_that_name_them():
    def entry(path, kind=FileKind.DIRECTORY, **fields):
        return ClosureFile(path=path, kind=kind, mode=0o755, **fields)

    closure = Closure(
        program=("/bin/serve", "--model", "/home/me/m/digits.onnx", "--also=/home/me/m/digits.onnx", "/home/me/m/digits.onnx2"),
        workdir="/",
        files=(
            entry("/bin"),
            entry("/bin/serve", FileKind.FILE, sha256="1" * 64, size_bytes=3),
            entry("/home"),
            entry("/home/me"),
            entry("/home/me/m"),
            entry("/home/me/m/digits.onnx", FileKind.FILE, sha256="2" * 64, size_bytes=5),
        ),
    )
    moved, sources = relocate(closure, {"/home/me/m/digits.onnx": "/srv/models/digits.onnx"})
    assert [file.path for file in moved.files] == ["/bin", "/bin/serve", "/srv", "/srv/models", "/srv/models/digits.onnx"]
    assert moved.program[2:] == ("/srv/models/digits.onnx", "--also=/srv/models/digits.onnx", "/home/me/m/digits.onnx2")
    assert sources == {"/srv/models/digits.onnx": Path("/home/me/m/digits.onnx")}
