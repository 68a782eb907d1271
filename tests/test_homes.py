"""Whose a home is: what makes one shared, and where its sockets may lie."""

import os
import stat

import pytest

from tenure import app, homes
from tenure.errors import Conflict, Refused, SpecError, Unavailable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can share a home")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that nobody but root could replace, as far as this test's folder goes."""
    monkeypatch.setattr(homes, "_SOCKETS_BELOW", tmp_path / "run")
    (tmp_path / "run").mkdir()
    return tmp_path / "home"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@needs_root
def test_a_shared_home_is_closed_but_for_its_door(home):
    (home / "runs" / "old").mkdir(parents=True)
    (home / "ledger.sqlite").write_text("x")
    (home / "socket-dir").write_text("/tmp/tenure-old")
    homes.share(home)
    assert homes.is_shared(home)
    assert (mode(home), mode(home / "runs"), mode(home / "homes"), mode(home / "trash")) == (0o711,) * 4
    assert (mode(home / "runs" / "old"), mode(home / "ledger.sqlite")) == (0o700, 0o600)
    folder = homes.socket_dir(home)
    assert folder != "/tmp/tenure-old"
    assert (mode(folder), mode(home / "socket-dir")) == (0o711, 0o644)
    folder.rmdir()  # a reboot
    before = os.umask(0o077)
    try:
        assert homes.socket_dir(home) == folder
    finally:
        os.umask(before)
    assert mode(folder) == 0o711
    homes.share(home)
    assert homes.socket_dir(home) == folder


@needs_root
def test_a_mark_that_others_could_have_made_means_nothing(home):
    homes.share(home)
    home.chmod(0o777)
    assert not homes.is_shared(home)
    home.chmod(0o711)
    assert homes.is_shared(home)
    os.chown(home / homes.MARK, 65534, -1)
    assert not homes.is_shared(home)
    (home / homes.MARK).unlink()
    (home / homes.MARK).symlink_to("/etc/hostname")
    assert not homes.is_shared(home)


@needs_root
def test_a_home_that_others_could_put_another_folder_in_the_place_of_is_not_shared(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(Conflict, match="could put another folder"):
        homes.share(tmp_path / "open" / "home")
    assert not homes.is_shared(tmp_path / "open" / "home")


@needs_root
def test_a_socket_folder_of_anybody_else_is_not_used(home):
    homes.share(home)
    folder = homes.socket_dir(home)
    folder.rmdir()
    folder.mkdir()
    os.chown(folder, 65534, -1)
    with pytest.raises(Unavailable, match="another user"):
        homes.socket_dir(home)
    folder.rmdir()
    folder.symlink_to(home)
    with pytest.raises(Unavailable):
        homes.socket_dir(home)


def test_only_root_can_share(home, monkeypatch):
    monkeypatch.setattr(homes.os, "geteuid", lambda: 4242)
    with pytest.raises(Refused, match="only root"):
        homes.share(home)


@needs_root
def test_who_names_no_home_finds_the_shared_one(home, monkeypatch):
    monkeypatch.delenv("TENURE_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(home.parent / "data"))
    monkeypatch.setattr(app, "SYSTEM_HOME", home)
    assert app.find_home() != home
    homes.share(home)
    assert app.find_home() == home
    monkeypatch.setenv("TENURE_HOME", str(home.parent / "own"))
    assert app.find_home() == home.parent / "own"


@needs_root
def test_a_run_of_another_user_is_not_written_into(home):
    (home / "runs" / "theirs").mkdir(parents=True)
    homes.check_own_run(home / "runs" / "theirs")
    homes.check_own_run(home / "runs" / "none")
    os.chown(home / "runs" / "theirs", 65534, -1)
    with pytest.raises(Refused, match="sudo -u"):
        homes.check_own_run(home / "runs" / "theirs")
    os.chown(home, 65534, -1)
    with pytest.raises(SpecError, match="belongs to user"):
        homes.check_user(home)
