"""Paths become entries of a closure: links stay links, parents come along, rules hold, reasons are kept."""

import os

import pytest

from tenure.closures import FileKind, Reason, Why
from tenure.images.closure_check import differences
from tenure.images.closure_rules import BYTECODE, SECRET, Rules, own_folders
from tenure.images.closure_tree import MAX_REASONS, Tree

OPENED = Reason(kind=Why.OPENED, detail="python")


@pytest.fixture
def tree(tmp_path):
    return Tree(Rules(own=(str(tmp_path),)))


def kinds(tree, top):
    return {file.path.removeprefix(str(top)): file.kind for file in tree.files() if file.path.startswith(str(top) + "/")}


def test_every_link_on_the_way_is_kept_as_a_link(tree, tmp_path):
    (tmp_path / "real/lib").mkdir(parents=True)
    (tmp_path / "real/lib/a.so.1").write_text("a")
    (tmp_path / "lib").symlink_to("real/lib")
    (tmp_path / "real/lib/a.so").symlink_to("a.so.1")
    assert tree.add(f"{tmp_path}/lib/a.so", OPENED) == f"{tmp_path}/real/lib/a.so.1"
    assert kinds(tree, tmp_path) == {
        "/lib": FileKind.SYMLINK,
        "/real": FileKind.DIRECTORY,
        "/real/lib": FileKind.DIRECTORY,
        "/real/lib/a.so": FileKind.SYMLINK,
        "/real/lib/a.so.1": FileKind.FILE,
    }


def test_two_dots_mean_the_parent_of_where_a_link_leads(tree, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/x").write_text("right")
    (tmp_path / "x").write_text("wrong")
    (tmp_path / "l").symlink_to("a/b")
    assert tree.add(f"{tmp_path}/l/../x", OPENED) == f"{tmp_path}/a/x"


def test_a_link_that_is_looked_at_itself_does_not_bring_its_target(tree, tmp_path):
    (tmp_path / "target").write_text("big")
    (tmp_path / "link").symlink_to("target")
    tree.add(f"{tmp_path}/link", OPENED, follows=False)
    assert kinds(tree, tmp_path) == {"/link": FileKind.SYMLINK}


@pytest.mark.parametrize("name", ["missing", "file/below", "loop", "dangling"])
def test_what_is_not_there_is_not_added(tree, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert tree.add(f"{tmp_path}/{name}", OPENED) is None
    assert not tree.files()


def test_sockets_and_pipes_are_left_out_with_the_reason(tree, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    tree.add(f"{tmp_path}/pipe", OPENED)
    assert "/pipe" not in kinds(tree, tmp_path)
    assert tree.left_out[f"{tmp_path}/pipe"]


def test_a_file_gone_since_is_left_out(tree, tmp_path):
    (tmp_path / "gone").write_text("")
    tree.add(f"{tmp_path}/gone", OPENED)
    (tmp_path / "gone").unlink()
    assert kinds(tree, tmp_path) == {}


def test_a_look_says_nothing_where_a_better_reason_is(tree, tmp_path):
    path = tmp_path / "a"
    path.write_text("")
    looked = Reason(kind=Why.STATTED, detail="python")
    for reason in (looked, OPENED, looked):
        tree.add(str(path), reason)
    assert tree.files()[-1].reasons == (OPENED,)


def test_reasons_are_bounded_but_a_new_kind_is_always_kept(tree, tmp_path):
    path = tmp_path / "a"
    path.write_text("")
    for number in range(20):
        tree.add(str(path), Reason(kind=Why.OPENED, detail=str(number)))
    tree.add(str(path), Reason(kind=Why.REPAIRED))
    reasons = tree.files()[-1].reasons
    assert len(reasons) == MAX_REASONS + 1
    assert reasons[-1].kind is Why.REPAIRED


@pytest.mark.parametrize(
    "path",
    [
        "/proc/cpuinfo",
        "/sys/devices",
        "/dev/null",
        "/tmp/x",
        "/run/x",
        "/etc/ld.so.cache",
        "/home/me/.cache/pip/x",
        "/root/.ssh/id_rsa",
    ],
)
def test_what_is_the_machines_is_left_out_with_a_reason(path):
    assert Rules(home="/home/me").left_out(path)


@pytest.mark.parametrize(
    "path", ["/tmp/app/main.py", "/usr/lib/libc.so.6", "/dev", "/tmp", "/home/me/.cachet", "/etc/ssl/certs/ca.pem"]
)
def test_what_is_the_programs_stays(path):
    assert not Rules(own=("/tmp/app",), home="/home/me").left_out(path)


def test_bytecode_and_secrets_are_left_out_even_of_the_programs_own_folder():
    rules = Rules(own=("/srv/app", "/srv/app/tls.key"))
    assert rules.left_out("/srv/app/__pycache__/main.cpython-311.pyc") == BYTECODE
    assert rules.left_out("/srv/app/.env") == SECRET
    assert not rules.left_out("/srv/app/tls.key")  # named by the user


def test_a_whole_temporary_folder_never_counts_as_the_programs():
    assert own_folders(["/tmp", "/", "/usr", "", "/tmp/app"]) == ("/tmp/app",)


def test_what_differs_on_disk_is_named_with_how(tree, tmp_path):
    for name in ("same", "other", "longer", "gone", "mode"):
        (tmp_path / name).write_text("aa")
        tree.add(f"{tmp_path}/{name}", OPENED)
    (tmp_path / "link").symlink_to("same")
    tree.add(f"{tmp_path}/link", OPENED, follows=False)
    files = tree.files()
    assert list(differences(files)) == []
    (tmp_path / "other").write_text("ab")
    (tmp_path / "longer").write_text("aaa")
    (tmp_path / "gone").unlink()
    (tmp_path / "mode").chmod(0o600)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("other")
    found = {path.removeprefix(f"{tmp_path}/"): why for path, why in differences(files)}
    assert found == {
        "other": "has other content of the same length",
        "longer": "has 3 bytes, had 2",
        "gone": "missing",
        "mode": "has mode 0600, had 0644",
        "link": "leads to other, led to same",
    }
