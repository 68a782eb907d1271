"""A ledger that cannot be used ends a real command with its exit code and what to do, and is left as it is, to the byte."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenure.broker.client import connect
from tenure.cli import exits
from tenure.errors import Unavailable
from tenure.ledger.store import Ledger
from tenure.runs import Run

pytestmark = pytest.mark.real


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "home"
    folder.mkdir()
    yield folder
    try:
        with connect(folder, start=False) as client:
            client.shutdown()
    except Unavailable:
        pass


def tenure(home: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tenure.cli", *argv, "--home", str(home)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environ},
    )  # fmt: skip


def a_used_ledger(home: Path) -> Path:
    ledger = Ledger.open(home / "ledger.sqlite", now_s=time.time)
    with ledger.transaction() as tx:
        for number in range(20):
            name = f"r{number}"
            tx.put_run(Run(id=name, name=name, tenant="t", job_file="x" * 500, source="", stages=(), created_at_s=1.0), who="t")
        tx.next_fence()
    ledger.close()
    return home / "ledger.sqlite"


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    for place in range(4096, len(whole), 512):
        whole[place] ^= 0xFF
    path.write_bytes(whole)


def foreign(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def of_a_newer_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (truncated, exits.CORRUPT_DATA, "restore a backup"),
        (flipped, exits.CORRUPT_DATA, "restore a backup"),
        (foreign, exits.CORRUPT_DATA, "restore a backup"),
        (of_a_newer_version, exits.CONFLICT, "a newer version wrote it"),
    ],
)
def test_a_spoilt_ledger_ends_the_command_and_stays_as_it_is(
    home: Path, spoil: Callable[[Path], None], code: int, said: str
) -> None:
    path = a_used_ledger(home)
    spoil(path)
    before = path.read_bytes()
    ended = tenure(home, "runs")
    assert (ended.returncode, ended.stdout) == (code, "")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert path.read_bytes() == before


def test_an_emptied_ledger_is_noticed_by_what_its_agents_remember(home: Path) -> None:
    path = a_used_ledger(home)
    path.write_bytes(b"")
    (home / "nodes" / "a").mkdir(parents=True)
    (home / "nodes" / "a" / "broker.json").write_text('{"fence": 3}')
    ended = tenure(home, "runs")
    assert ended.returncode == exits.CORRUPT_DATA
    assert "tenure restore FILE" in ended.stderr


def test_a_locked_ledger_is_told_and_works_once_it_is_free(home: Path) -> None:
    path = a_used_ledger(home)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ended = tenure(home, "runs")
    assert ended.returncode == exits.UNAVAILABLE
    assert "locked by another process" in ended.stderr
    other.close()
    ended = tenure(home, "runs", "--json")
    assert ended.returncode == 0
    assert len(json.loads(ended.stdout)) == 20


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system needs root")
def test_a_full_disk_refuses_what_is_new_and_keeps_what_was(home: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(home)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        path = a_used_ledger(home)
        with (home / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"x" * 4096)
            except OSError:
                pass
        before = path.read_bytes()
        ended = tenure(home, "runs")
        assert ended.returncode in (exits.REFUSED, exits.UNAVAILABLE)
        assert "full" in ended.stderr or "No space left" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert path.read_bytes() == before
        (home / "filler").unlink()
        assert tenure(home, "runs").returncode == 0
        with connect(home, start=False) as client:
            client.shutdown()
        end_s = time.monotonic() + 20
        while subprocess.run(["umount", str(home)], capture_output=True).returncode and time.monotonic() < end_s:
            time.sleep(0.1)
    finally:
        subprocess.run(["umount", "-l", str(home)], capture_output=True)


def test_backup_and_restore_by_command(home: Path, tmp_path: Path) -> None:
    a_used_ledger(home)
    made = tenure(home, "backup", str(tmp_path / "b"))
    assert made.returncode == 0, made.stderr
    assert "20 runs" in made.stdout
    assert tenure(home, "backup", str(tmp_path / "b")).returncode == exits.CONFLICT
    assert tenure(home, "restore", str(tmp_path / "b")).returncode == exits.CONFLICT
    done = tenure(home, "restore", str(tmp_path / "b"), "--force", "--json")
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["aside"]).exists()
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-9])
    assert tenure(home, "restore", str(tmp_path / "b"), "--force").returncode == exits.CORRUPT_DATA
    assert tenure(home, "restore", str(tmp_path / "none")).returncode == exits.NOT_FOUND


def test_a_password_on_the_command_line_is_refused(home: Path) -> None:
    ended = tenure(home, "up", "--ledger", "postgresql://u:hush@127.0.0.1:1/db")
    assert ended.returncode == exits.WRONG_INPUT
    assert "TENURE_LEDGER" in ended.stderr
    assert "hush" not in ended.stderr


def test_a_server_that_is_down_is_told_without_the_password(home: Path) -> None:
    ended = tenure(home, "up", TENURE_LEDGER="postgresql://u:hush@127.0.0.1:1/db")
    if "psycopg" in ended.stderr:
        pytest.skip('no psycopg here (pip install "tenure[postgres]")')
    assert ended.returncode == exits.UNAVAILABLE
    assert "does not answer" in ended.stderr
    assert "hush" not in ended.stderr
    assert not (home / "ledger-url").exists()
