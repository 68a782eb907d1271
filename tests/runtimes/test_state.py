import errno
import os

import pytest

from tenure.runtimes.state import read_json, write_json, write_record


@pytest.fixture
def narrow(monkeypatch):
    """Have each write take 7 bytes at most, as a disk does that is filling up; `room` is how many it takes in all."""
    write, room = os.write, [1 << 20]

    def part(fd, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(fd, bytes(data)[: min(7, room[0])])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", part)
    return room


def test_a_file_is_written_whole_though_the_disk_takes_it_in_parts(tmp_path, narrow):
    write_json(tmp_path / "a.json", {"text": "x" * 100})
    assert read_json(tmp_path / "a.json") == {"text": "x" * 100}


def test_a_full_disk_leaves_the_former_content_and_no_draft(tmp_path, narrow):
    write_json(tmp_path / "a.json", {"n": 1})
    narrow[0] = 20
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"text": "x" * 100})
    assert read_json(tmp_path / "a.json") == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_waits_for_room_on_a_full_disk_and_is_given_up_after_its_bound(tmp_path, narrow):
    narrow[0] = 10
    waits = []

    def freed_at_the_third(pause_s):
        waits.append(pause_s)
        narrow[0] = 1 << 20 if len(waits) == 3 else 10

    write_record(tmp_path / "exit.json", {"kind": "completed"}, pause=freed_at_the_third)
    assert read_json(tmp_path / "exit.json") == {"kind": "completed"}
    assert len(waits) == 3
    narrow[0] = 10
    with pytest.raises(OSError, match="No space left"):
        write_record(tmp_path / "other.json", {"kind": "completed"}, max_s=0.0)
