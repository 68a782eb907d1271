"""Clients and load tools of others, unchanged, against our server: what a user of Triton would bring along.

They live in an environment of their own (`make peers`), since they pin an older protobuf. All checks of `tritonclient_checks`
run in one process there and each is a test here.
"""

import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.peers import homes, perf_analyzer
from tests.serve.conftest import Digits, Server, make_identity

pytestmark = pytest.mark.real

HOME = homes.default_root() / "tritonclient"
if not homes.made(HOME.parent, HOME.name):
    pytest.skip(f"tritonclient and perf_analyzer are not below {HOME.parent}: make peers", allow_module_level=True)

PROGRAM = Path(__file__).with_name("tritonclient_checks.py")
DOORS = ("http", "grpc")
TYPES = ("INT64", "STRING", "BOOL", "FLOAT16", "UINT8")
LIMIT_BYTES = 1_000_000
PATIENCE_S = 100
CHECKED = (
    *("health", "metadata", "config", "statistics", "infer_all_outputs", "infer_with_outputs_named", "infer_with_other_types"),
    *("request_compression", "priority_and_timeout", "many_at_once", "system_shared_memory", "repository", "mistakes_are_told"),
    *("a_request_too_large_is_refused", "asyncio_clients"),
)
CHECKED_ONCE = (
    *("an_absent_model_is_not_ready_over_http", "infer_with_json_tensors_over_http", "infer_with_typed_contents_over_grpc"),
    *("streaming_over_grpc", "streaming_over_grpc_aio", "a_cancelled_call_harms_nobody"),
)
NAMES = (*(f"{name} over {door}" for name in CHECKED for door in DOORS), *CHECKED_ONCE)


@pytest.fixture(scope="module")
def served(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: models are unloaded here."""
    models = tmp_path_factory.mktemp("peer-models")
    (models / "digits.onnx").write_bytes(digits.path.read_bytes())
    for kind in TYPES:
        make_identity(models / f"same_{kind.lower()}.onnx", kind)
    started = Server(models, tmp_path_factory.mktemp("peer-server"), "--max-request-bytes", str(LIMIT_BYTES))
    yield started
    assert started.end() == 0


@pytest.fixture(scope="module")
def told(served: Server) -> dict[str, str]:
    """What each check found, all run at once; also what there is when one of them hangs."""
    models = [f"same_{kind.lower()}" for kind in TYPES]
    where = {"http": served.http, "grpc": served.grpc, "limit_bytes": LIMIT_BYTES, "models": models}
    try:
        done = subprocess.run(
            [str(homes.python(HOME)), str(PROGRAM), json.dumps(where)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        out, said = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out, said = (late.stdout or b"").decode(), "it did not end"
    found = dict(json.loads(line) for line in out.splitlines())
    return {name: found.get(name, f"not run: {said[-400:]}") for name in {*NAMES, *found}}


@pytest.mark.parametrize("name", NAMES)
def test_tritonclient_works_unchanged(told: dict[str, str], name: str) -> None:
    assert told[name] == "ok"


def test_no_check_is_left_out(told: dict[str, str]) -> None:
    assert set(told) == set(NAMES)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("options", "levels"),
    [
        pytest.param(("--concurrency-range", "1:3:2"), 2, id="concurrency range"),
        pytest.param(
            ("--concurrency-range", "2", "--shared-memory", "system", "--output-shared-memory-size", "64"), 1, id="shm"
        ),
        pytest.param(("--request-rate-range", "200", "--async"), 1, id="request rate, asynchronous"),
    ],
)
def test_perf_analyzer_works_unchanged(
    served: Server, tmp_path: Path, door: str, options: tuple[str, ...], levels: int
) -> None:
    run_perf_analyzer(served, tmp_path, door, options, levels)


def test_perf_analyzer_streams_over_grpc(served: Server, tmp_path: Path) -> None:
    run_perf_analyzer(served, tmp_path, "grpc", ("--concurrency-range", "4", "--streaming", "--async"), 1)


def run_perf_analyzer(served: Server, folder: Path, door: str, options: tuple[str, ...], levels: int) -> None:
    argv, env = perf_analyzer.command(HOME)
    table = folder / "table.csv"
    address = {"http": served.http, "grpc": served.grpc}[door]
    # three windows of 0.1 s whatever their spread: this looks at whether it works, not at how quick it is
    asked = ("-m", "digits", "-i", door, "-u", address, "-p", "100", "-r", "8", "-s", "999", "-f", str(table), *options)
    done = subprocess.run([*argv, *asked], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == levels
    for row in rows:
        assert float(row["Inferences/Second"]) > 0
        assert float(row["Server Compute Infer"]) > 0, "no statistics of the server"
