"""The benchmark `serve_fuzz` in small: each kind of mutated request and hostile client, and a witness, for some seconds."""

from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="onnx (extra demo) makes the models")
pytest.importorskip("hpack", reason="hpack (extra dev) reads the answers' headers")

from benchmarks import serve_fuzz
from benchmarks.fuzz import grpc as fuzz_grpc
from benchmarks.fuzz import http1 as fuzz_http

pytestmark = pytest.mark.real


def test_mutated_requests_and_hostile_clients_are_noticed_by_nobody_else(tmp_path: Path) -> None:
    x, y = serve_fuzz._write_models(tmp_path)
    details, report = serve_fuzz._fuzz(tmp_path, x, y, wanted=4000, max_s=60, seed=5)
    assert report.failures == []
    assert report.mutated >= 4000
    assert details["witness"]["answers"] > 0
    assert {kind.partition("-")[0] for kind in report.table()} == {"http", "grpc", "http2"}
    assert report.table()["http-json"]["200"]  # some come all the way through
    assert report.table()["grpc-fields"]["0"]


@pytest.mark.parametrize("module", [fuzz_http, fuzz_grpc])
def test_the_same_seed_sends_the_same_requests(module) -> None:
    def drawn(seed: int) -> list:
        cases = module.Cases(seed, ["r0", "/key"])
        usual = cases.pipelined if module is fuzz_http else cases.call
        return [made() for _ in range(300) for made in (usual, cases.alone)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_server_that_trusts_what_it_reads_fails() -> None:
    assert serve_fuzz._control(seed=0).failed
