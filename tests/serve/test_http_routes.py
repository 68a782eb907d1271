"""What the HTTP door answers besides inference."""

import json

import pytest

from tenure.serve.plane import Durations, ModelStatistics

from .fakes import FakePlane
from .http_door import X, get, head, raw_request, run


def post(path, body=None):
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(content), path=path) + content


def test_health_metadata_and_configuration_answer():
    async def go(bench):
        wire = await bench.wire()
        about = (await wire.ask(get("/v2"))).json
        assert (about["name"], "system_shared_memory" in about["extensions"]) == ("tenure", True)
        assert (await wire.ask(get("/v2/health/live"))).status == 200
        assert (await wire.ask(get("/v2/health/ready"))).json == {"ready": True}
        assert (await wire.ask(get("/v2/models/double/ready"))).json == {"name": "double", "ready": True}
        for path in ("/v2/models/double", "/v2/models/double/versions/1", "/v2/models/doubl%65/"):
            assert (await wire.ask(get(path))).json["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        assert (await wire.ask(get("/v2/models/double/versions/1/config"))).json["name"] == "double"
        bench.plane.draining = True
        assert (await wire.ask(get("/v2/health/ready"))).status == 503
        assert (await wire.ask(get("/v2/models/double/ready"))).status == 503
        assert (await wire.ask(get("/v2/health/live"))).status == 200

    run(go)


def test_a_head_has_no_body_but_its_length():
    async def go(bench):
        wire = await bench.wire()
        full = await wire.ask(get("/v2"))
        bare = await wire.ask(get("/v2", method="HEAD"), method="HEAD")
        assert (bare.headers, bare.body) == (full.headers, b"")
        assert (await wire.ask(get("/v2"))).body == full.body

    run(go)


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (get("/elsewhere"), 404, "nothing at '/elsewhere'"),
        (get("/"), 404, "nothing at"),
        (get("/v2/models/double/elsewhere"), 404, "nothing at"),
        (get("/v2/models/absent"), 404, "absent"),
        (get("/v2/models/double/versions/9"), 404, "9"),
        (get("/v2/models/absent/stats"), 404, "absent"),
        (get("/v2/trace/setting"), 404, "nothing at"),
        (get("/v2/logging"), 404, "nothing at"),
        (post("/v2/repository/elsewhere"), 404, "nothing at"),
        (post("/v2/repository/models/absent/load"), 404, "absent"),
        (get("/v2/systemsharedmemory/region/r/status"), 404, "region"),
        (post("/v2/repository/index", b"[]"), 400, "not what this address takes"),
        (post("/v2/repository/models/double/load", {"parameters": {"config": "{}"}}), 400, "not taken: config"),
        (post("/v2/systemsharedmemory/register", {"key": "/k", "byte_size": 1}), 400, "by name"),
        (post("/v2/systemsharedmemory/region/r/register", {"key": "/k"}), 400, "byte_size"),
        (post("/v2/systemsharedmemory/region/r/register", {"key": "/absent-key", "byte_size": 1}), 400, "absent-key"),
        (post("/v2/cudasharedmemory/region/r/register", {}), 400, "not offered"),
        (post("/v2/models/double/infer"), 400, "not v2 JSON"),
        (post("/v2/models/absent/infer", {"inputs": []}), 404, "absent"),
        (raw_request(X, path="/v2/models/absent/infer"), 404, "absent"),
        (raw_request(X, path="/v2/models/double/versions/9/infer"), 404, "9"),
        (raw_request(X, name="z"), 400, "inputs x"),
        (raw_request(X[0]), 400, "shape"),
        (raw_request(X, outputs=[{"name": "colour"}]), 400, "colour"),
    ],
)
def test_what_is_not_there_is_named(request_, status, reason):
    async def go(bench):
        wire = await bench.wire()
        reply = await wire.ask(request_)
        assert (reply.status, reason in reply.json["error"]) == (status, True), reply
        assert (await wire.ask(get("/v2"))).status == 200

    run(go)


@pytest.mark.parametrize(
    ("request_", "allow"),
    [
        (get("/v2/models/double/infer"), "POST"),
        (get("/v2/repository/index"), "POST"),
        (get("/v2/systemsharedmemory/region/r/register"), "POST"),
        (get("/v2", method="DELETE"), "GET, HEAD"),
        (post("/v2/models/double"), "GET, HEAD"),
        (post("/metrics"), "GET, HEAD"),
    ],
)
def test_another_method_is_named(request_, allow):
    async def go(bench):
        reply = await bench.ask(request_)
        assert (reply.status, reply.headers["allow"]) == (405, allow)

    run(go)


def test_models_are_listed_unloaded_and_loaded():
    async def go(bench):
        wire = await bench.wire()
        assert (
            await wire.ask(post("/v2/repository/models/double/unload", {"parameters": {"unload_dependents": False}}))
        ).body == b""
        entries = (await wire.ask(post("/v2/repository/index"))).json
        assert {"name": "double", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"} in entries
        ready = (await wire.ask(post("/v2/repository/index", {"ready": True}))).json
        assert "double" not in [entry["name"] for entry in ready]
        assert (await wire.ask(raw_request())).status == 503
        assert (await wire.ask(post("/v2/repository/models/double/load"))).status == 200
        assert (await wire.ask(raw_request())).status == 200

    run(go)


def test_regions_are_registered_told_and_forgotten():
    from multiprocessing.shared_memory import SharedMemory

    async def go(bench):
        wire = await bench.wire()
        region = SharedMemory(create=True, size=4096)
        try:
            asked = {"key": "/" + region.name, "byte_size": 64, "offset": 128}
            told = {"name": "r", **asked}
            assert (await wire.ask(post("/v2/systemsharedmemory/region/r/register", asked))).body == b""
            assert (await wire.ask(post("/v2/systemsharedmemory/region/r/register", asked))).status == 400
            assert (await wire.ask(get("/v2/systemsharedmemory/status"))).json == [told]
            assert (await wire.ask(get("/v2/systemsharedmemory/region/r/status"))).json == [told]
            for path in ("/v2/systemsharedmemory/region/r/unregister", "/v2/systemsharedmemory/unregister"):
                assert (await wire.ask(post(path))).status == 200
            assert (await wire.ask(get("/v2/systemsharedmemory/status"))).json == []
            assert (await wire.ask(get("/v2/cudasharedmemory/status"))).json == []
            assert (await wire.ask(post("/v2/cudasharedmemory/unregister"))).status == 200
        finally:
            region.close()
            region.unlink()

    run(go)


class Counted(FakePlane):
    """A plane with known counters."""

    def statistics(self, name="", version=""):
        found = ModelStatistics(inference_count=8, execution_count=2, last_inference_at_s=3.5, restarts=1)
        found.success = Durations(4, 0.5)
        found.queue = Durations(4, 0.25)
        found.compute_infer = Durations(2, 0.125)
        found.batches = {4: (Durations(2, 0.01), Durations(2, 0.125), Durations(2, 0.02))}
        found.outcomes = {"ok": 4, "overloaded": 7}
        return {("double", "1"): found}


def test_statistics_are_the_extensions_in_nanoseconds():
    async def go(bench):
        wire = await bench.wire()
        for path in ("/v2/models/stats", "/v2/models/double/stats", "/v2/models/double/versions/1/stats"):
            (found,) = (await wire.ask(get(path))).json["model_stats"]
            assert (found["name"], found["version"], found["last_inference"]) == ("double", "1", 3500)
            assert (found["inference_count"], found["execution_count"]) == (8, 2)
            assert found["inference_stats"]["success"] == {"count": 4, "ns": 500_000_000}
            assert found["inference_stats"]["queue"]["ns"] == 250_000_000
            assert found["batch_stats"] == [
                {
                    "batch_size": 4,
                    "compute_input": {"count": 2, "ns": 10_000_000},
                    "compute_infer": {"count": 2, "ns": 125_000_000},
                    "compute_output": {"count": 2, "ns": 20_000_000},
                }
            ]

    run(go, plane=Counted("double"))


def test_metrics_are_prometheus_text():
    async def go(bench):
        reply = await bench.ask(get("/metrics"))
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = reply.body.decode().splitlines()
        labels = '{model="double",version="1"'
        for line in (
            'tenure_infer_requests_total{model="double",outcome="overloaded",version="1"} 7.0',
            f"tenure_infer_rows_total{labels}}} 8.0",
            f"tenure_infer_runs_total{labels}}} 2.0",
            f"tenure_infer_queue_seconds_total{labels}}} 0.25",
            f"tenure_infer_compute_seconds_total{labels}}} 0.125",
            f"tenure_infer_duration_seconds_count{labels}}} 4.0",
            f"tenure_infer_duration_seconds_sum{labels}}} 0.5",
            f"tenure_instance_restarts_total{labels}}} 1.0",
            "tenure_infer_held_bytes 0.0",
        ):
            assert line in lines

    run(go, plane=Counted("double"))
