"""Files touched with another user's rights lead only where that user could go; needs root, who alone can take them."""

import os
import threading

import pytest

from tenure.runtimes.acting import Actor, acting_as, actor_from, open_regular

NOBODY = Actor(uid=65534, gid=65534, groups=(65534,))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's rights for files")


@pytest.fixture
def shared(tmp_path):
    """A folder of nobody's below one that others may enter, beside a secret of ours."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and str(folder) != "/":
            folder.chmod(folder.stat().st_mode | 0o011)
    secret = tmp_path / "secret"
    secret.write_text("of root")
    secret.chmod(0o600)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY.uid, NOBODY.gid)
    return theirs


@needs_root
def test_a_link_to_what_its_owner_may_not_read_or_write_is_refused(shared):
    (shared / "log").symlink_to(shared.parent / "secret")
    with acting_as(NOBODY):
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_APPEND):
            with pytest.raises(PermissionError):
                os.open(shared / "log", flags)
    assert (shared.parent / "secret").read_text() == "of root"


@needs_root
def test_what_is_made_belongs_to_the_actor_and_rights_come_back_afterwards(shared):
    with acting_as(NOBODY):
        (shared / "made").write_text("x")
        assert os.getgroups() == [65534]
    made = (shared / "made").stat()
    assert (made.st_uid, made.st_gid) == (65534, 65534)
    assert os.getgroups() != [65534]
    assert (shared.parent / "secret").read_text() == "of root"
    with pytest.raises(ZeroDivisionError), acting_as(NOBODY):
        raise ZeroDivisionError
    assert (shared.parent / "secret").read_text() == "of root"


@needs_root
def test_other_threads_keep_their_rights(shared):
    entered, over, found = threading.Event(), threading.Event(), []

    def act():
        with acting_as(NOBODY):
            entered.set()
            over.wait(10)

    thread = threading.Thread(target=act)
    thread.start()
    assert entered.wait(10)
    found.append((shared.parent / "secret").read_text())
    over.set()
    thread.join(10)
    assert found == ["of root"]


def test_nobody_to_act_as_changes_nothing(tmp_path):
    with acting_as(None):
        (tmp_path / "made").write_text("x")
    assert (tmp_path / "made").stat().st_uid == os.geteuid()


def test_an_actor_survives_a_plan():
    assert actor_from(NOBODY.to_plan()) == NOBODY
    assert actor_from(None) is None


def test_a_fifo_a_link_and_a_folder_are_no_regular_files_and_nobody_waits_for_them(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("link", "fifo", "folder"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name, os.O_RDONLY)
    with pytest.raises(OSError):
        open_regular(tmp_path / "fifo", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    descriptor = open_regular(tmp_path / "file", os.O_RDONLY)
    assert os.read(descriptor, 10) == b"x"
    os.close(descriptor)
