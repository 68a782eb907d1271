from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.train.export import export, export_command
from tenure.train.progress import read_progress
from tenure.train.records import read_arrays
from tenure.train.spec import TrainSpec, command, publish_event, start_event, write_spec
from tenure.train.worker import THREAD_VARIABLES, remaining_s, thread_environment

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small stand-in for digits: bars at a class's place, so that nothing heavy is imported here."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(2)
    y = rng.integers(0, 10, 300)
    x = rng.random((300, 64)).astype(np.float32) * 0.3
    x.reshape(300, 8, 8)[np.arange(300), 1 + y % 5, :] += 0.4 + 0.3 * (y[:, None] // 5)
    for name, values in (("x_train", x[:220]), ("y_train", y[:220]), ("x_test", x[220:]), ("y_test", y[220:])):
        np.save(folder / f"{name}.npy", values)
    return folder


class Stage:
    """Starts a process for each event, as a broker would."""

    def __init__(self, root: Path, images: Path, **values: Any) -> None:
        self.root, self.live, self.started = root, {}, set()
        self.event_of: dict[int, Path] = {}
        self.attempts = 0
        self.slot_s = 0.0
        spec: dict[str, Any] = {"options": {"hidden": 16, "copies": 1}, "max_rounds": 6, **values}
        write_spec(root, TrainSpec(program="digits_program.py:Digits", folder=str(EXAMPLES), inputs={"d": str(images)}, **spec))

    live: dict[int, subprocess.Popen[bytes]]
    started: set[str]

    def start(self, worker: int, event: Path) -> None:
        self.attempts += 1
        self.event_of[worker] = event
        folder = self.root / "workers" / str(worker) / str(self.attempts)
        folder.mkdir(parents=True)
        env = {**os.environ, "TENURE_RUN_DIR": str(self.root), "TENURE_WORKER_DIR": str(folder)}
        env |= {"TENURE_WORKER": str(worker), "TENURE_EVENT_FILE": str(event), "TENURE_FENCE": str(self.attempts)}
        if self.slot_s:
            # Slots grow, so that a busy machine on which a bare start takes a second ends this test too.
            deadline_s = time.clock_gettime(time.CLOCK_BOOTTIME) + self.slot_s * 1.4**self.attempts
            (folder / "lease.json").write_text(json.dumps({"deadline_boot_s": deadline_s}))
            env["TENURE_LEASE_FILE"] = str(folder / "lease.json")
        self.live[worker] = subprocess.Popen(command().argv, env=env, stderr=subprocess.DEVNULL)

    def run(self, workers: int, *, kill_at_rounds: Sequence[int] = ()) -> str:
        """Train with so many workers, killing one of them each time a round of the list is reached."""
        kills = list(kill_at_rounds)
        publish_event(self.root, start_event(workers))
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if kills and read_progress(self.root / "store").round >= kills[0]:
                self.live[kills.pop(0) % workers].kill()
            for worker, process in list(self.live.items()):
                if process.poll() == -signal.SIGKILL:
                    self.start(worker, self.event_of[worker])
            for path in sorted((self.root / "store" / "events").glob("*.json")):
                worker = json.loads(path.read_bytes())["worker"]
                busy = worker in self.live and self.live[worker].poll() is None
                if path.name not in self.started and not busy:
                    self.started.add(path.name)
                    self.start(worker, path)
            if len(self.live) == workers and all(p.poll() is not None for p in self.live.values()) and self.all_done():
                _, weights = read_arrays(self.root / "store" / "result")
                return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()
            time.sleep(0.01)
        raise AssertionError(f"not done within {PATIENCE_S} s: {self.results()}")

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_bytes()) for path in sorted(self.root.glob("workers/*/*/result.json"))]

    def all_done(self) -> bool:
        return sum(result["state"] == "done" for result in self.results()) == len(self.live)

    def end(self) -> None:
        for process in self.live.values():
            process.kill()
            process.wait()


@pytest.fixture
def stage(tmp_path: Path, images: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "stage", images)
    yield stage
    stage.end()


@pytest.mark.real
def test_real_processes_give_the_weights_of_one_and_export_to_onnx(tmp_path: Path, images: Path, stage: Stage) -> None:
    one = Stage(tmp_path / "one", images)
    try:
        assert one.run(1) == stage.run(3)
    finally:
        one.end()
    assert read_progress(stage.root / "store").round == 6
    pytest.importorskip("onnx", reason="needs the extra demo")
    exported = export(stage.root)
    assert exported["equal"] == 1.0
    assert (stage.root / "artefacts" / "model.onnx").stat().st_size > 1000
    assert export_command()[1:] == ("-m", "tenure.train.export")


@pytest.mark.real
def test_workers_killed_with_sigkill_and_started_again_give_the_same_weights(tmp_path: Path, images: Path) -> None:
    options = {"hidden": 64, "copies": 10}
    undisturbed = Stage(tmp_path / "undisturbed", images, options=options, max_rounds=10, claim_period_s=0.5)
    disturbed = Stage(tmp_path / "disturbed", images, options=options, max_rounds=10, claim_period_s=0.5)
    try:
        assert disturbed.run(3, kill_at_rounds=(1, 3, 5, 8)) == undisturbed.run(1)
    finally:
        undisturbed.end()
        disturbed.end()
    assert disturbed.attempts == 3 + 4


@pytest.mark.real
def test_slots_too_short_for_the_whole_training_are_chained(tmp_path: Path, images: Path) -> None:
    options = {"hidden": 64, "copies": 30}
    stage = Stage(tmp_path / "stage", images, options=options, max_rounds=12)
    stage.slot_s = 0.6
    try:
        stage.run(1)
    finally:
        stage.end()
    states = [result["state"] for result in stage.results()]
    assert states.count("done") == 1
    assert all(process.returncode == 0 for process in stage.live.values())
    assert len(stage.started) == len(states)


@pytest.mark.real
def test_sigterm_makes_a_worker_leave_with_its_next_slot_published(tmp_path: Path, images: Path) -> None:
    stage = Stage(tmp_path / "stage", images, max_rounds=1_000_000)
    publish_event(stage.root, start_event(1))
    try:
        stage.start(0, stage.root / "store" / "events" / "start-0000.json")
        until = time.monotonic() + PATIENCE_S
        while read_progress(stage.root / "store").round < 2 and time.monotonic() < until:
            time.sleep(0.02)
        stage.live[0].send_signal(signal.SIGTERM)
        assert stage.live[0].wait(PATIENCE_S) == 0
    finally:
        stage.end()
    assert stage.results()[0]["state"] == "continue"
    assert (stage.root / "store" / "events" / "worker-0000-0000-000001.json").exists()


@pytest.mark.real
def test_an_error_of_the_program_is_written_as_the_result(tmp_path: Path, images: Path) -> None:
    stage = Stage(tmp_path / "stage", images, options={"depth": 3})
    publish_event(stage.root, start_event(1))
    try:
        stage.start(0, stage.root / "store" / "events" / "start-0000.json")
        assert stage.live[0].wait(PATIENCE_S) == 1
    finally:
        stage.end()
    assert stage.results()[0]["state"] == "failed"
    assert "depth" in stage.results()[0]["error"]


@pytest.mark.real
def test_an_idle_worker_imports_the_standard_library_and_numpy_only() -> None:
    code = (
        "import sys, tenure.train.worker, tenure.train.handler, tenure.train.programs, tenure.train.store\n"
        "third = {m.split('.')[0] for m in sys.modules if not m.startswith('_')} - set(sys.stdlib_module_names)\n"
        "data = [l.split()[1] for l in open('/proc/self/status') if l.startswith('RssAnon')]\n"
        "print(sorted(third), data[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    names, anonymous_kib = out.rsplit(" ", 1)
    assert set(json.loads(names.replace("'", '"'))) <= {"numpy", "tenure"} | _at_start()
    assert int(anonymous_kib) < 30 * 1024


def _at_start() -> set[str]:
    """Return what site-packages' .pth files load into every interpreter here."""
    code = "import sys; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    return set(out.split())


def test_a_renewed_lease_moves_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"deadline_boot_s": 110.0}))
    remaining = remaining_s(path, lambda: 100.0)
    assert remaining() == 10.0
    path.write_text(json.dumps({"deadline_boot_s": 160.0}))
    os.utime(path, ns=(1, 1))
    assert remaining() == 60.0
    path.unlink()
    assert remaining() == 60.0


def test_start_up_counts_from_the_order_to_start_not_from_a_process_that_waited_for_it():
    from tenure.train.worker import _boot_s, _since_start_s

    assert 100 <= _since_start_s({"TENURE_STARTED_BOOT_S": repr(_boot_s() - 100)}) < 160
    assert _since_start_s({}) >= 0


def test_same_result_means_one_thread_whatever_the_lease_says() -> None:
    found = thread_environment(True, {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "ACTIVE"}, 4)
    assert found == dict.fromkeys(THREAD_VARIABLES, "1")


def test_otherwise_threads_follow_the_lease_and_wait_passively_unless_the_job_says_otherwise() -> None:
    found = thread_environment(False, {"MKL_NUM_THREADS": "3"}, 2)
    lease = {name: "2" for name in THREAD_VARIABLES if name != "MKL_NUM_THREADS"}
    assert found == {"OMP_WAIT_POLICY": "PASSIVE", **lease}
    assert thread_environment(False, {"OMP_WAIT_POLICY": "PASSIVE"}, 0) == {}


ENDS = """
import atexit, sys, threading
from tenure.train import worker
atexit.register(print, "at exit")
print("buffered", end=" ")
{more}
worker._end(7)
"""


@pytest.mark.parametrize(
    "more",
    [
        "",
        "held = open(sys.argv[1], 'w'); held.write('kept')",
        "threading.Timer(0.1, lambda: open(sys.argv[1], 'w').write('kept')).start()",
    ],
)
def test_a_process_that_ends_at_once_loses_nothing_that_was_written(tmp_path: Path, more: str) -> None:
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(more=more), str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (7, "buffered at exit\n"), done.stderr
    assert not more or path.read_text() == "kept"
