"""Training under real leases as its user sees it: killed and resumed, and what is told of each thing that goes wrong."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.real.kill_training import World

pytestmark = pytest.mark.real
ROUNDS = 24
WRONG_CLOCK = """
import os, time
_time = time.time
if os.environ.get("TENURE_WORKER") == "1":
    time.time = lambda: _time() + 86400.0
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the weights of a run with two workers, left in peace."""
    with World(tmp_path_factory.mktemp("peace"), rounds=ROUNDS).cleaned() as world:
        world.train()
        return world.sha256()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path / "world", rounds=ROUNDS).cleaned() as made:
        yield made


def until(condition: Callable[[], object], process: subprocess.Popen[str], world: World) -> None:
    end_s = time.monotonic() + 60.0
    while not condition():
        assert process.poll() is None, world.said()
        assert time.monotonic() < end_s, "did not come about in time"
        time.sleep(0.02)


def test_all_killed_in_the_middle_and_resumed_with_other_workers_gives_the_same_weights(world: World, reference: str) -> None:
    """Worker 1's wall clock is a day ahead all the while, which must not matter either."""
    site = world.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WRONG_CLOCK)
    job = world.folder / "job.toml"
    source = Path(__file__).parents[2] / "src"
    job.write_text(job.read_text() + f'env = {{ PYTHONPATH = "{site}:{source}" }}\n')
    rng = random.Random(0)
    with world.start("--workers", "3") as process:
        until(lambda: world.rounds_done() > 2, process, world)
        world.kill("worker", rng)
        until(lambda: "was killed by signal 9 (SIGKILL), which Tenure did not send" in world.said(), process, world)
        until(lambda: world.rounds_done() > 8, process, world)
        world.kill("all", rng)
        assert process.wait(10) == -9
    assert world.seen == {"worker": 1, "all": 1}
    assert not world.has_result()
    world.train("--resume", world.run_id, "--workers", "2")
    assert world.sha256() == reference
    assert "with 2 leases of 0.3 cpus" in world.said()


def test_a_torn_checkpoint_is_told_and_costs_a_resumed_run_nothing_but_time(world: World, reference: str) -> None:
    with world.start() as process:
        until(lambda: world.rounds_done() > 6, process, world)
        process.terminate()
        assert process.wait(60) == 130, world.said()
    newest = max(world.home.glob("runs/*/train/store/weights/*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    world.train("--resume", world.run_id)
    assert f"weights-{newest.name}.0 in the store was not what was written (torn or rotten)" in world.said()
    assert world.sha256() == reference


def test_a_full_disk_ends_the_run_in_words_and_once_there_is_room_it_goes_on(world: World, reference: str) -> None:
    runs = world.home / "runs"
    runs.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(runs)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with world.start() as process:
            until(lambda: world.rounds_done() > 2, process, world)
            filler = fill(runs)
            assert process.wait(60) == 1, world.said()
        assert "could write nothing: the disk of the run's folder is full" in world.said()
        assert "Free space, then resume the run." in world.said()
        filler.unlink()
        world.train("--resume", world.run_id)
        assert world.sha256() == reference
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


def fill(folder: Path) -> Path:
    """Take all there is, to the last byte, and return the file that has it."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return path
