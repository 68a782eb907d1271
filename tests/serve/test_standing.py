"""Standing applications and their node, end to end: orders in, cells out, in any order, for every architecture."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tenure.errors import CorruptData, SpecError
from tenure.serve.load.node import go_first
from tenure.serve.load.orders import (
    STAGES,
    Cell,
    Examples,
    NodeReady,
    NodeSpec,
    Order,
    StandingSpec,
    node_command,
    read,
    write,
)

pytestmark = pytest.mark.real


class Told:
    """A node in a process of its own, and its two FIFOs."""

    def __init__(self, folder, spec):
        self.folder = folder
        folder.mkdir()
        (folder / "spec.json").write_bytes(write(spec))
        env = {**os.environ, "TENURE_WORKER_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(node_command(folder / "spec.json"), env=env, stderr=log)
        end_s = time.monotonic() + 60
        while not (folder / "node.json").exists():
            assert time.monotonic() < end_s, "the node was not ready in time"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        self._held = b""
        if self.process.poll() is None:
            self._orders = os.open(folder / "orders", os.O_WRONLY)
            self._answers = os.open(folder / "answers", os.O_RDONLY)

    @property
    def ready(self):
        return read((self.folder / "node.json").read_bytes(), NodeReady)

    def ask(self, order):
        os.write(self._orders, order if isinstance(order, bytes) else write(order))
        while b"\n" not in self._held:
            assert select.select([self._answers], [], [], 60)[0], "no answer"
            self._held += os.read(self._answers, 1 << 16)
        line, _, self._held = self._held.partition(b"\n")
        return read(line, Cell)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        for fd in (self._orders, self._answers):
            os.close(fd)
        return code


@pytest.fixture
def start(tmp_path):
    """Starts a node; whatever the test did to it, nothing of it is left."""
    with contextlib.ExitStack() as stack:

        def started(spec):
            told = Told(tmp_path / "node", spec)
            stack.callback(told.process.wait, 10)
            stack.callback(told.process.terminate)
            return told

        yield started


@pytest.fixture
def examples(digits, tmp_path):
    np.save(tmp_path / "x.npy", digits.x)
    np.save(tmp_path / "label.npy", digits.label)
    return Examples(inputs=str(tmp_path / "x.npy"), expected=str(tmp_path / "label.npy"))


def server(digits):
    return (sys.executable, "-m", "tenure.serve", f"--model={digits.path}", "--name=digits")


def specs(digits, examples):
    targets = {
        "simple": f"simple:{digits.path}",
        "http": "http://{http}",
        "shm": "shm://{http}",
        "grpc": "grpc://{grpc}",
    }
    return tuple(
        StandingSpec(
            name=f"{name}-{interaction}",
            target=target,
            model="" if name == "simple" else "digits",
            interaction=interaction,
            examples=examples,
        )
        for name, target in targets.items()
        for interaction in ("sync", "async")
    )


def test_every_application_of_a_node_runs_cells_in_any_order_and_its_stages_fill_its_places(digits, examples, start):
    told = start(NodeSpec(server=server(digits), applications=specs(digits, examples)))
    ready = told.ready
    assert set(ready.endpoints) == {"http", "grpc"}
    assert [len(each.prepare_model_s) for each in ready.applications] == [3] * 8
    for batch in (7, 1):
        for each in reversed(ready.applications):
            order = Order(application=each.name, batch=batch, seconds=0.1, in_flight=3, seed=batch)
            assert told.ask(replace(order, do="warm")) == Cell()
            cell = told.ask(order)
            assert (cell.wrong, cell.failed, cell.first_error) == (0, 0, "")
            assert cell.images == batch * cell.requests > 0
            assert cell.places == (3 if each.name.endswith("async") else 1)
            assert set(cell.stages) == set(STAGES)
            assert min(cell.stages.values()) >= 0
            assert sum(cell.stages.values()) == pytest.approx(cell.places * cell.wall_s, rel=0.02)
            assert cell.stages["recognise_s"] > 0
            assert (cell.stages["send_s"] > 0) == (not each.name.startswith("simple"))
            assert 0 < cell.own_cpu_s < cell.cpu_s
            assert sum(cell.latencies_s) == pytest.approx(
                sum(cell.stages[name] for name in ("send_s", "recognise_s", "fetch_s"))
            )
    assert told.stop() == 0
    for pid in (ready.server_pid, *(each.pid for each in ready.applications)):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_cannot_be_done_is_answered_with_a_reason_and_the_next_order_is_done(digits, examples, start):
    told = start(NodeSpec(applications=specs(digits, examples)[:1]))
    for order, says in (
        (b"{}\n", "is no order"),
        (Order(application="nobody"), "no application 'nobody' here; there are simple-sync"),
        (Order(application="simple-sync", batch=0), "batch and in_flight must be at least 1"),
        (Order(application="simple-sync", data="files"), "no files to read"),
    ):
        with pytest.raises(CorruptData, match=says):
            told.ask(order)
    assert told.ask(Order(application="simple-sync", seconds=0.05)).requests > 0
    os.kill(told.ready.applications[0].pid, signal.SIGKILL)
    with pytest.raises(CorruptData, match="simple-sync ended"):
        told.ask(Order(application="simple-sync", seconds=0.05))
    assert told.stop() == 0


def test_a_cell_that_takes_too_long_ends_its_application_and_not_the_node(digits, examples, start):
    told = start(NodeSpec(applications=specs(digits, examples)[:2]))
    with pytest.raises(CorruptData, match=r"no answer within 0.2 s"):
        told.ask(Order(application="simple-sync", seconds=60, bound_s=0.2))
    assert told.ask(Order(application="simple-async", seconds=0.05)).requests > 0
    assert told.stop() == 0


def test_a_node_that_cannot_be_started_says_why(examples, start, tmp_path):
    application = StandingSpec(name="lost", target="http://127.0.0.1:9", model="digits", examples=examples, timeout_s=0.3)
    told = start(NodeSpec(applications=(application,)))
    assert told.process.wait(20) == 1
    said = json.loads((tmp_path / "node" / "node.json").read_text())["error"]
    assert "lost could not be prepared" in said
    assert "127.0.0.1:9" in said


def test_bare_cells_do_the_same_work_without_timers(digits, examples, start):
    told = start(NodeSpec(applications=specs(digits, examples)[:1]))
    cell = told.ask(Order(application="simple-sync", seconds=0.05, probes=False))
    assert cell.requests > 0
    assert cell.stages == {}
    assert told.stop() == 0


@pytest.mark.parametrize(("controller", "file", "weight"), [("cpu", "cpu.shares", 262144), ("unified", "cpu.weight", 10000)])
def test_an_undisturbed_node_has_the_highest_weight_of_its_lease_and_of_nothing_else(controller, file, weight, tmp_path):
    group = tmp_path / "tenure.l-7.1"
    group.mkdir()
    (group / file).write_text("1024")
    assert go_first("l-7", {controller: group}) == ""
    assert (group / file).read_text() == str(weight)
    for lease_id, paths in (
        ("l-8", {controller: group}),
        ("", {controller: group}),
        ("l-7", {}),
        ("l-7", {controller: tmp_path}),
    ):
        assert go_first(lease_id, paths) == "the lease has no control group of its own"
    (group / file).unlink()
    group.chmod(0o500)
    assert os.geteuid() == 0 or "cannot be written" in go_first("l-7", {controller: group})


def test_a_target_names_a_scheme():
    with pytest.raises(SpecError, match="simple:PATH"):
        StandingSpec(name="x", target="ftp://x", examples=Examples(inputs="", expected=""))


def test_pictures_are_read_and_decoded_by_the_application(start, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the test model is made with the package onnx (extra demo)")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)],
        "colours",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", 3, 32, 32])],
        [tensor("y", onnx.TensorProto.FLOAT, ["n", 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "colours.onnx")
    chance = np.random.default_rng(1)
    files, rows = [], []
    for index in range(5):
        pixels = np.full((40, 40, 3), chance.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        files.append(str(tmp_path / f"{index}.png"))
        rows.append(pixels[0, 0])
    x = np.repeat(np.repeat(np.array(rows, np.float32)[:, :, None, None], 32, 2), 32, 3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.array(rows, np.float32))
    examples = Examples(inputs=str(tmp_path / "x.npy"), expected=str(tmp_path / "y.npy"), files=tuple(files), normalise="none")
    applications = tuple(
        StandingSpec(name=each, target=f"simple:{tmp_path / 'colours.onnx'}", interaction=each, examples=examples)
        for each in ("sync", "async")
    )
    told = start(NodeSpec(applications=applications))
    for each in ("sync", "async"):
        from_files = told.ask(Order(application=each, batch=3, data="files", seconds=0.1, in_flight=2))
        from_memory = told.ask(Order(application=each, batch=3, seconds=0.1, in_flight=2))
        assert (from_files.wrong, from_files.failed, from_files.first_error) == (0, 0, "")
        assert from_files.stages["load_data_s"] > 0 == from_memory.stages["load_data_s"]
        assert sum(from_files.stages.values()) == pytest.approx(from_files.places * from_files.wall_s, rel=0.02)
    assert told.stop() == 0


def test_applications_that_run_a_cell_at_the_same_time_give_one_together(digits, examples, start):
    (alike,) = [one for one in specs(digits, examples) if one.name == "simple-async"]
    named = tuple(replace(alike, name=name, instances=2, threads=1) for name in ("simple-async-1", "simple-async-2"))
    told = start(NodeSpec(applications=named))
    order = Order(application="simple-async", copies=2, batch=2, seconds=0.1, in_flight=3)
    assert told.ask(replace(order, do="warm")).requests == 0
    cell = told.ask(order)
    assert (cell.wrong, cell.failed, cell.places) == (0, 0, 6)
    assert cell.images == 2 * cell.requests == 2 * len(cell.latencies_s) > 0
    assert sum(cell.stages.values()) <= cell.places * cell.wall_s * 1.02
    with pytest.raises(CorruptData, match="no application 'simple-async-3' here"):
        told.ask(replace(order, copies=3))
    assert told.stop() == 0
