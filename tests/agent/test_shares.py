import fcntl
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tenure.agent import shares
from tenure.errors import Refused, SpecError, Unavailable
from tenure.resources import Capacity, Gpu
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


def test_a_device_is_offered_by_one_agent_only_and_the_disk_by_shares(path, other, monkeypatch):
    whole = replace(WHOLE, disk_bytes=100 * GIB, gpus=(Gpu(index=0, memory_bytes=GIB), Gpu(index=1, memory_bytes=GIB)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: other.pid)
        first = shares.reserve("/home/a", "first", whole, boot_id="b", cpus=1, path=path)
    second = shares.reserve("/home/b", "second", whole, boot_id="b", path=path)
    assert (first.gpus, second.gpus) == (whole.gpus, ())
    assert (first.disk_bytes, second.disk_bytes) == (25 * GIB, 75 * GIB)
    other.kill()
    other.wait()
    assert shares.reserve("/home/b", "second", whole, boot_id="b", path=path).gpus == whole.gpus


def test_so_many_devices_are_offered_as_were_asked_for_and_no_more_than_are_left(path, other, monkeypatch):
    whole = replace(WHOLE, gpus=tuple(Gpu(index=index, memory_bytes=GIB) for index in range(3)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: other.pid)
        first = shares.reserve("/home/a", "first", whole, boot_id="b", cpus=1, gpus=2, path=path)
    assert [gpu.index for gpu in first.gpus] == [0, 1]
    with pytest.raises(Refused, match=r"has 3, of which nobody offers 1. node first of /home/a offers 2"):
        shares.reserve("/home/b", "second", whole, boot_id="b", cpus=1, gpus=2, path=path)
    assert shares.reserve("/home/b", "second", whole, boot_id="b", cpus=1, gpus=0, path=path).gpus == ()
    assert [gpu.index for gpu in shares.reserve("/home/b", "second", whole, boot_id="b", cpus=1, path=path).gpus] == [2]


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


ENTRY = {"home": "/h", "node": "n", "user": "u", "pid": 1, "start_ticks": 1, "boot_id": "b", "cpus": 1, "memory_bytes": 1}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": 1}',
        '[{"home": 1}]',
        *(json.dumps([ENTRY | wrong]) for wrong in ({"cpus": "4"}, {"cpus": math.nan}, {"cpus": -9}, {"pid": None})),
    ],
)
def test_what_is_no_entry_holds_nothing(path, text, monkeypatch):
    monkeypatch.setattr(shares.procfs, "is_alive", lambda *_: True)
    path.write_text(text)
    assert shares.reserve("/home/b", "n", WHOLE, boot_id="b", path=path).cpus == 4


def _as_fifo(path):
    os.mkfifo(path)


def _as_folder(path):
    path.mkdir()


def _as_link(path):
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("spoil", [_as_fifo, _as_folder, _as_link])
def test_what_is_no_regular_file_is_named_with_its_owner_and_the_remedy(path, spoil):
    spoil(path)
    with pytest.raises(Unavailable, match=r"shares.json.*cannot be used.*belongs to user .*Remove it"):
        shares.reserve("/home/b", "n", WHOLE, boot_id="b", path=path)


def test_a_program_that_sits_on_the_lock_is_not_waited_for_for_ever(path, monkeypatch):
    monkeypatch.setattr(shares, "_LOCK_MAX_S", 0.05)
    path.write_text("[]")
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="kept it locked"):
            shares.reserve("/home/b", "n", WHOLE, boot_id="b", path=path)


def test_the_file_is_for_everybody_whatever_the_umask(path):
    before = os.umask(0o077)
    try:
        shares.reserve("/home/b", "n", WHOLE, boot_id="b", path=path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666


AS_NOBODY = """
import os, sys
from pathlib import Path
from tenure.agent import shares
from tenure.resources import Capacity, Gpu
os.setgroups([]); os.setgid(65534); os.setuid(65534)
whole = Capacity(cpus=4, memory_bytes=8 << 30)
print(shares.reserve("/home/n", "n", whole, boot_id="b", path=Path(sys.argv[1])).cpus)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_users_take_turns_in_a_sticky_folder_whoever_made_the_file():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        for maker in ("root", "nobody"):
            path = Path(folder) / f"{maker}.json"
            takers = [
                lambda path=path: shares.reserve("/home/r", "r", WHOLE, boot_id="b", cpus=1, memory_bytes=GIB, path=path).cpus,
                lambda path=path: float(
                    subprocess.run(
                        [sys.executable, "-c", AS_NOBODY, path], capture_output=True, text=True, check=True, timeout=60
                    ).stdout
                ),
            ]
            taken = [take() for take in (takers if maker == "root" else reversed(takers))]
            assert sorted(taken) == ([1, 3] if maker == "root" else [1, 4])
