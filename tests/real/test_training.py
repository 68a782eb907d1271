"""Training under real leases as its user sees it: killed and resumed, and what is told of each thing that goes wrong."""

from __future__ import annotations

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
