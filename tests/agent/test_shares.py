import os
import subprocess

import pytest

from tenure.agent import shares
from tenure.errors import Refused, SpecError
from tenure.resources import Capacity
from tenure.runtimes import procfs

GIB = 1 << 30
WHOLE = Capacity(cpus=4, memory_bytes=8 * GIB)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shares.json"


@pytest.fixture
def other():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def _held_by(path, process, monkeypatch, **part):
    """Have another, living process hold a part."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        shares.reserve("/home/a", "first", WHOLE, boot_id="b", path=path, **part)
    assert procfs.start_ticks(process.pid)


def test_who_comes_second_gets_what_is_left(path, other, monkeypatch):
    _held_by(path, other, monkeypatch, cpus=1, memory_bytes=2 * GIB)
    mine = shares.reserve("/home/b", "second", WHOLE, boot_id="b", path=path)
    assert (mine.cpus, mine.memory_bytes) == (3, 6 * GIB)


def test_what_is_taken_is_refused_with_who_holds_it(path, other, monkeypatch):
    _held_by(path, other, monkeypatch, cpus=3, memory_bytes=2 * GIB)
    with pytest.raises(Refused, match=f"node first of /home/a .*pid {other.pid}.* holds 3 cpus, 2.0 GiB"):
        shares.reserve("/home/b", "second", WHOLE, boot_id="b", cpus=2, path=path)


def test_nothing_left_is_refused(path, other, monkeypatch):
    _held_by(path, other, monkeypatch)
    with pytest.raises(Refused, match="0 cpus"):
        shares.reserve("/home/b", "second", WHOLE, boot_id="b", path=path)


def test_the_part_of_a_dead_process_or_an_earlier_boot_is_free(path, other, monkeypatch):
    _held_by(path, other, monkeypatch)
    assert shares.reserve("/home/b", "second", WHOLE, boot_id="later", path=path).cpus == 4
    path.unlink()
    _held_by(path, other, monkeypatch)
    other.kill()
    other.wait()
    assert shares.reserve("/home/b", "second", WHOLE, boot_id="b", path=path).cpus == 4


def test_more_than_the_machine_has_is_a_mistake_of_the_asker(path):
    with pytest.raises(SpecError, match="more than its machine"):
        shares.reserve("/home/b", "second", WHOLE, boot_id="b", cpus=5, path=path)


def test_a_spoilt_file_holds_nothing(path):
    path.write_text('[{"half": ')
    assert shares.reserve("/home/b", "n", WHOLE, boot_id="b", path=path).cpus == 4
    shares.release(path)
    assert path.read_text() == "[]"
