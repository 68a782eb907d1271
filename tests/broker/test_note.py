"""What a broker is told: by its options, or by the note of one that died in this home."""

from __future__ import annotations

import argparse
import fcntl
from pathlib import Path

import pytest

from tenure.broker.__main__ import _told
from tenure.broker.note import Note, read_note, remove_note, write_note
from tenure.errors import CorruptData
from tenure.fleet.contract import Part

A, B, LOCAL = Part(name="a", cpus=1.0), Part(name="b", memory_bytes=1 << 30), Part()


def told(home: Path, *nodes: str, persistent: bool = False) -> Note:
    return _told(home, argparse.Namespace(node=list(nodes), persistent=persistent, confine="auto"))


def test_a_note_reads_back_as_it_was_written_until_it_is_removed(tmp_path) -> None:
    note = Note(parts=(A, B), persistent=True, confine="rlimit", order="fair")
    assert read_note(tmp_path) is None
    write_note(tmp_path, note)
    assert read_note(tmp_path) == note
    remove_note(tmp_path)
    remove_note(tmp_path)
    assert read_note(tmp_path) is None


def test_a_note_that_cannot_be_read_is_told_with_what_to_do(tmp_path) -> None:
    (tmp_path / "broker.json").write_text('{"nodes": 7}')
    with pytest.raises(CorruptData, match=r"broker\.json should hold nodes, persistent and confine.*Remove it"):
        read_note(tmp_path)


def test_without_a_note_a_run_has_the_whole_machine_and_up_begins_with_nothing(tmp_path) -> None:
    assert told(tmp_path) == Note(parts=(LOCAL,))
    assert told(tmp_path, persistent=True) == Note(parts=(), persistent=True)


@pytest.mark.parametrize("persistent", [True, False])
def test_all_nodes_of_a_dead_broker_that_was_to_stay_come_back(tmp_path, persistent) -> None:
    write_note(tmp_path, Note(parts=(A, B), persistent=True, confine="rlimit"))
    assert told(tmp_path, persistent=persistent) == Note(parts=(A, B), persistent=True, confine="rlimit")
    assert told(tmp_path, "c") == Note(parts=(Part(name="c"),))


def test_up_takes_over_a_dead_runs_own_node_only_while_its_agent_lives(tmp_path) -> None:
    write_note(tmp_path, Note(parts=(LOCAL,)))
    assert told(tmp_path) == Note(parts=(LOCAL,))
    assert told(tmp_path, persistent=True) == Note(parts=(), persistent=True)
    lock = tmp_path / "nodes" / "local" / "agent.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert told(tmp_path, persistent=True) == Note(parts=(LOCAL,), persistent=True)
