"""The load application, end to end in its own process, for every architecture and interaction."""

import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from tenure.errors import CorruptData, SpecError
from tenure.serve.load import LoadSpec, load_command, read_load_result, read_load_spec, write_load_spec
from tenure.serve.load.closed import _order
from tenure.serve.load.examples import Data
from tenure.serve.tensors import ModelMetadata, TensorMetadata

pytestmark = pytest.mark.real


@pytest.fixture
def spec(digits, tmp_path):
    np.save(tmp_path / "x.npy", digits.x)
    np.save(tmp_path / "label.npy", digits.label)
    return LoadSpec(
        target=f"simple:{digits.path}",
        batches=(1, 7),
        repeats=2,
        seconds=0.15,
        inputs=str(tmp_path / "x.npy"),
        expected=str(tmp_path / "label.npy"),
        seed=3,
    )


def run(spec, tmp_path):
    write_load_spec(tmp_path / "spec.json", spec)
    env = {**os.environ, "TENURE_WORKER_DIR": str(tmp_path)}
    return subprocess.run(load_command(tmp_path / "spec.json"), env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("interaction", ["sync", "async"])
@pytest.mark.parametrize("kind", ["simple", "http", "shm", "grpc"])
def test_an_application_measures_every_cell_and_finds_every_answer_right(kind, interaction, spec, server, tmp_path):
    if kind != "simple":
        door = "http" if kind == "shm" else kind
        spec = replace(spec, target=f"{kind}://{server.endpoints[door]}", model="digits")
    done = run(replace(spec, interaction=interaction, concurrency=3), tmp_path)
    assert done.returncode == 0, done.stderr
    result = read_load_result(tmp_path)
    assert sorted((cell.batch, cell.repeat) for cell in result.cells) == [(1, 0), (1, 1), (7, 0), (7, 1)]
    assert (result.wrong, result.failed) == (0, 0)
    for cell in result.cells:
        assert cell.images == cell.requests * cell.batch > 0
        assert cell.images_per_s == pytest.approx(cell.images / cell.wall_s)
        assert len(cell.latencies_s) + cell.latencies_dropped == cell.requests
        assert 0 < cell.percentile_s(50) <= cell.percentile_s(99) <= max(cell.latencies_s)
        assert cell.cpu_s > 0
        assert cell.recognise_s > 0
        assert (cell.send_s > 0) == (cell.fetch_s > 0) == (kind != "simple")
    assert result.peak_memory_bytes > 1 << 20
    assert result.prepare_model_s > 0
    assert "numpy" in result.versions


def test_wrong_answers_are_counted_not_averaged_away(spec, digits, tmp_path):
    wrong = digits.label.copy()
    wrong[::2] += 1
    np.save(tmp_path / "label.npy", wrong)
    assert run(replace(spec, batches=(1,), repeats=1), tmp_path).returncode == 0
    (cell,) = read_load_result(tmp_path).cells
    assert cell.wrong > 0
    assert cell.images == cell.requests == len(cell.latencies_s) - cell.wrong


def test_probabilities_are_compared_when_probabilities_are_expected(spec, digits, tmp_path):
    np.save(tmp_path / "label.npy", digits.probability)
    assert run(replace(spec, batches=(3,), repeats=1), tmp_path).returncode == 0
    assert read_load_result(tmp_path).wrong == 0


def test_a_server_that_is_not_there_fails_with_its_address(spec, tmp_path):
    done = run(replace(spec, target="http://127.0.0.1:9", model="digits", timeout_s=0.3), tmp_path)
    assert done.returncode == 1
    with pytest.raises(CorruptData, match=r"127\.0\.0\.1:9"):
        read_load_result(tmp_path)


def test_the_order_is_seeded_and_interleaves_the_batches(spec):
    wide = replace(spec, batches=(1, 2, 4, 8, 16), repeats=3)
    assert _order(wide) == _order(wide)
    assert _order(wide) != _order(replace(wide, seed=4))
    assert [repeat for _, repeat in _order(wide)] == [0] * 5 + [1] * 5 + [2] * 5


def test_a_spec_reads_back_and_refuses_what_is_wrong(spec, tmp_path):
    write_load_spec(tmp_path / "s.json", spec)
    assert read_load_spec(tmp_path / "s.json") == spec
    for change in ({"batches": ()}, {"target": "ftp://x"}, {"repeats": 0}, {"seconds": 0.0}, {"interaction": "both"}):
        with pytest.raises(SpecError):
            replace(spec, **change)
    (tmp_path / "s.json").write_text('{"colour": 1}')
    with pytest.raises(SpecError, match="colour"):
        read_load_spec(tmp_path / "s.json")


def test_a_row_that_is_one_value_is_right_with_and_without_a_dimension_of_its_own(tmp_path):
    """Triton answers [n, 1] where the model gives [n]."""
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "label.npy", np.array([4, 5, 6]))
    metadata = ModelMetadata(
        name="m", inputs=(TensorMetadata("x", "FP32", (-1, 2)),), outputs=(TensorMetadata("label", "INT64", (-1, 1)),)
    )
    data = Data(metadata, str(tmp_path / "x.npy"), str(tmp_path / "label.npy"))
    assert data.right({"label": np.array([[5], [6], [4]])}, 1, 3)
    assert data.right({"label": np.array([5, 6, 4])}, 1, 3)
    assert not data.right({"label": np.array([[5], [6], [5]])}, 1, 3)
    assert not data.right({"label": np.array([[5, 5], [6, 6], [4, 4]])}, 1, 3)
