"""A disk that is full, really full: the broker's ledger, the agent's state, the run's folders on a small file system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tenure.errors import Refused
from tenure.leases import EndReason, LeaseState
from tenure.ledger import queries
from tenure.runs import Run

from .conftest import Real, until

pytestmark = pytest.mark.real


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, by default for all of the home."""
    folder = tmp_path / getattr(request, "param", "home")
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all there is, to the last byte, and return the file that has it."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue
    return path


def test_a_full_disk_loses_nothing_tears_nothing_and_all_goes_on_once_there_is_room(small: Path, play) -> None:
    async def scene(real: Real) -> None:
        short = await real.job("short", script="while [ ! -e go ]; do sleep 0.05; done; exit 3")
        filler = fill(small)

        async def ask_on() -> None:
            for number in range(400):
                await real.ask("submit_run", run=_run(f"run-{number}"))

        with pytest.raises(Refused, match="disk is full"):
            await ask_on()
        (real.worker_dir(short.id) / "go").touch()  # an empty file takes no room
        shim = real.state(short.id, "shim.json")["pid"]
        await until(lambda: not _job_runs(real, short.id), "the job ends")
        os.kill(shim, 0)  # its shim stays: it has the record still to write
        await until(lambda: real.broker.book.unwritable_since_s < float("inf"), "the broker notices")
        filler.unlink()
        await until(lambda: real.lease(short.id).state is LeaseState.ENDED, "the end is recorded")
        ended = real.lease(short.id)
        assert (ended.end_reason, "code 3" in ended.end_detail) == (EndReason.FAILED, True)
        after = await real.job("after")
        await until(lambda: len(real.beats(after.id)) > 1, "new work runs")
        with real.ledger.reading() as connection:
            assert connection.execute(sa.text("PRAGMA integrity_check")).scalar() == "ok"
            kinds = [event.kind for event in queries.events_after(connection, 0, run_id="r", max_events=1000)]
        assert kinds.count("lease.exited") == 1
        drafts = [path for path in small.rglob("*.tmp") if path.is_file()]
        assert drafts == []

    play(scene)


@pytest.mark.parametrize("small", ["home/nodes"], indirect=True)
def test_a_start_waits_while_the_agents_disk_is_full_and_runs_once_there_is_room(small: Path, play) -> None:
    async def scene(real: Real) -> None:
        filler = fill(small)
        asked = await real.asked("one")
        await until(lambda: real.lease(asked.id).attempt > 1, "the start was tried again")
        assert real.lease(asked.id).state is LeaseState.GRANTING
        filler.unlink()
        await until(lambda: real.lease(asked.id).state is LeaseState.ACTIVE, "it runs")
        await until(lambda: real.beats(asked.id), "it beats")
        assert real.state(asked.id, "spec.json")["attempt"] == real.lease(asked.id).attempt

    play(scene)


def _job_runs(real: Real, lease_id: str) -> bool:
    pid = real.state(lease_id, "shim.json")["job_pid"]
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def _run(name: str) -> Run:
    return Run(id=name, name=name, tenant="default", job_file="#" * 10_000, source="", created_at_s=1.0)
