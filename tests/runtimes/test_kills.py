"""What a runtime makes of an attempt whose agent or shim was killed between two of its steps."""

import json
import os
import signal

import pytest
from tests.contracts.runtime_contract import Bench, until

from tenure.errors import Conflict, NotFound
from tenure.protocols import ExitKind
from tenure.runtimes.confine import Confinement
from tenure.runtimes.forkserver import ForkServer
from tenure.runtimes.process import ProcessRuntime
from tenure.runtimes.state import LeaseFiles

pytestmark = pytest.mark.real


class Killed(BaseException):
    """Stands for the agent's death at this very place."""


@pytest.fixture
def runtime(tmp_path):
    made = ProcessRuntime(tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def noted(runtime, tmp_path, monkeypatch):
    """A lease whose agent was killed after its notes and before its order."""

    def die(_plan):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runtime._fork_server, "start", die)
        with pytest.raises(Killed):
            Bench(runtime, tmp_path).start("true")
    return LeaseFiles(tmp_path / "state", "lease-1")


def test_an_attempt_whose_shim_never_came_up_has_run_nothing_and_can_be_ordered_again(runtime, noted, tmp_path):
    handle = runtime.attach("lease-1")
    with pytest.raises(NotFound):
        runtime.wait(handle, 0)
    assert not runtime.known()
    bench = Bench(runtime, tmp_path)
    assert bench.end(bench.start("true", attempt=2)).kind is ExitKind.COMPLETED


def test_a_shim_that_comes_up_after_its_attempt_was_given_up_runs_nothing(runtime, noted, tmp_path):
    plan = dict(json.loads(noted.spec.read_text()), folder=str(noted.root), env={}, term_file="")
    with pytest.raises(NotFound):
        runtime.wait(runtime.attach("lease-1"), 0)
    noted.root.mkdir()  # it may have been in the middle of its note
    report = runtime._fork_server.start(plan)
    assert "no longer wanted" in report["error"]
    assert not noted.shim.exists()


def test_what_a_shim_had_begun_whose_report_got_lost_is_known_by_its_note_and_not_begun_twice(tmp_path, monkeypatch):
    asked = []

    def die_after_the_note(_server, channel, _order):
        channel.close()
        asked.append(1)
        (tmp_path / "shim.json").write_text('{"pid": 7}')
        return b""

    server = ForkServer()
    try:
        monkeypatch.setattr(ForkServer, "_ask", die_after_the_note)
        assert server.start({"folder": str(tmp_path)}) == {"pid": 7}
    finally:
        server.close()
    assert len(asked) == 1


def test_a_shim_killed_right_after_its_record_leaves_no_group(runtime, noted):
    spec = json.loads(noted.spec.read_text())
    noted.exit.write_text(json.dumps({"kind": "completed"}))
    groups = Confinement.from_plan(spec["confinement"])
    if not groups.groups:
        pytest.skip(f"no groups here: {runtime.confinement()}")
    for folder in groups.groups.values():
        os.makedirs(folder, exist_ok=True)
    runtime.forget("lease-1")
    assert not [folder for folder in groups.groups.values() if os.path.exists(folder)]


def test_a_group_that_an_agent_died_over_while_it_tried_is_removed_by_the_next(runtime, tmp_path):
    groups = runtime._confiner.for_attempt(
        "tenure.probe.4194305"
    ).groups.values()  # no process has this pid: it is past the most
    if not groups:
        pytest.skip(f"no groups here: {runtime.confinement()}")
    for folder in groups:
        os.makedirs(folder, exist_ok=True)
    ProcessRuntime(tmp_path / "other").close()
    assert not [folder for folder in groups if os.path.exists(folder)]


def test_an_attempt_that_began_after_all_is_no_room_for_another(runtime, tmp_path):
    bench = Bench(runtime, tmp_path)
    handle = bench.start("sleep", "60")
    with pytest.raises(Conflict):
        bench.start("true", attempt=2)
    os.kill(handle.pid, signal.SIGKILL)
    until(lambda: not runtime.list(), "the shim is gone")
    assert bench.end(bench.start("true", attempt=2)).kind is ExitKind.COMPLETED


def test_a_lease_that_was_half_forgotten_is_forgotten_by_the_next_runtime(runtime, noted, tmp_path):
    noted.spec.unlink()
    ProcessRuntime(tmp_path / "state").close()
    assert not noted.root.exists()


def test_a_lease_of_another_home_with_the_same_id_is_left_alone(tmp_path):
    homes = [ProcessRuntime(tmp_path / name / "state", confine="rlimit") for name in ("mine", "yours")]
    try:
        mine, yours = (Bench(home, tmp_path / name) for home, name in zip(homes, ("mine", "yours"), strict=True))
        killed, other = mine.start("sleep", "60"), yours.start("sleep", "60")
        os.kill(killed.pid, signal.SIGKILL)
        assert "shim lost" in mine.end(killed).witness
        assert yours.runtime.wait(other, 0.2) is None
        yours.runtime.stop(other, grace_s=0, fence=1)
        assert yours.end(other).kind is ExitKind.STOPPED
    finally:
        for home in homes:
            home.close()
