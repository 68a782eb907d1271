"""Model files that are cut, mutated or no models at all, loaded under load: at worst the process that loads them dies."""

import random

import numpy as np
import pytest
from benchmarks.fuzz.values import mutated_bytes
from tests.serve import make_tflite
from tests.serve.conftest import Server

from tenure.serve.client import Model

from .serving import WIDTH, ask_http, loads, write_scaled

pytestmark = pytest.mark.real
FILES = {".onnx": 12, ".tflite": 12, ".skops": 4}
"""Bad files of each kind: loading one takes a process, half a second of a core; of scikit-learn, several seconds."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "models").mkdir()
    write_scaled(folder / "models" / "other.onnx", 3.0)
    started = Server(folder / "models", folder / "w", "--threads", "1", "--timeout-s", "3")
    yield started, folder / "models"
    assert started.end() == 0


def whole(folder, ending):
    """Write a good model of this kind somewhere; return its bytes."""
    path = folder / f"whole{ending}"
    if ending == ".onnx":
        write_scaled(path, 2.0)
    elif ending == ".tflite":
        pytest.importorskip("ai_edge_litert", reason="LiteRT (extra litert) is not installed")
        make_tflite.dense(path, np.eye(WIDTH, dtype=np.float32))
    else:
        io = pytest.importorskip("skops.io", reason="skops (extra demo) is not installed")
        from sklearn.linear_model import LinearRegression

        io.dump(LinearRegression().fit(np.eye(WIDTH), np.arange(WIDTH)), path)
    return path.read_bytes()


@pytest.mark.parametrize("ending", FILES)
def test_a_mutated_file_is_loaded_or_refused_in_words_and_nobody_else_notices(ending, server, tmp_path):
    started, models = server
    rng, good = random.Random(1), whole(tmp_path, ending)
    cases = [b"", good[: len(good) // 2], *(mutated_bytes(rng, good, most=20) for _ in range(FILES[ending] - 2))]
    name = f"bad{ending.replace('.', '_')}"
    path = models / f"{name}{ending}"
    ends = set()
    with loads(started, "other", threads=1) as others:
        for content in cases:
            path.write_bytes(content)
            status, told, _ = ask_http(started, "POST", f"/v2/repository/models/{name}/load")
            assert status in (200, 400, 503), told
            assert status == 200 or told["error"]
            ends.add(status)
            if status == 200:
                ask_one(started, name)
        path.write_bytes(good)
        assert ask_http(started, "POST", f"/v2/repository/models/{name}/load")[0] == 200
        ask_one(started, name)
        path.unlink()
        assert ask_http(started, "POST", f"/v2/repository/models/{name}/unload")[0] == 200
        for load in others:
            load.more()
    assert ends - {200}  # some were refused: the mutations did change something
    for load in others:
        assert load.errors == []
        assert load.right(3.0)


def ask_one(server, name):
    """Ask a model whatever it takes: it may answer anything, or refuse, or die of it."""
    from tenure.errors import TenureError

    try:
        with Model(f"http://{server.http}", name, timeout_s=10, shm=False) as model:
            kinds = {"FP32": np.float32, "FP64": np.float64}
            found = {
                meta.name: np.ones([abs(n) for n in meta.shape], kinds.get(meta.datatype, np.int64))
                for meta in model.metadata().inputs
                if np.prod([abs(n) for n in meta.shape]) < 1e6
            }
            model.predict(found)
    except TenureError:
        pass
