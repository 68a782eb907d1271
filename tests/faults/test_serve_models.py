"""A model that crashes, hangs, is swapped or cannot be loaded, under load over both doors: others do not notice."""

import contextlib
import json
import signal
import time

import numpy as np
import pytest
from tests.serve.conftest import Server

from tenure.errors import TenureError, Unavailable
from tenure.serve.client import Model
from tenure.serve.faults import InputRefused

from .serving import WIDTH, ask_http, instances, loads, until, write_picky, write_scaled, write_slow

pytestmark = pytest.mark.real
X = np.ones((1, WIDTH), np.float32)
LATENCY_MAX_S = 2.0
"""Of others' requests: far above what they take, far below what a hang takes."""


@contextlib.contextmanager
def serving(tmp_path, *options, **factors):
    """Serve models that multiply."""
    models = tmp_path / "models"
    models.mkdir()
    for name, factor in factors.items():
        write_scaled(models / f"{name}.onnx", factor)
    server = Server(models, tmp_path / "w", "--threads", "1", *options)
    try:
        yield server, models
    finally:
        server.end()


def test_an_instance_killed_under_load_is_started_again_and_only_its_own_calls_may_fail(tmp_path):
    with serving(tmp_path, doomed=2.0, other=3.0) as (server, _), loads(server, "other") as others:
        with loads(server, "doomed") as its_own:
            for _ in range(3):
                for load in its_own:
                    load.more()
                (instance,) = until(lambda: instances(server, "doomed"), "an instance lives")
                instance.kill()
                until(lambda pid=instance.pid: all(i.pid != pid for i in instances(server, "doomed")), "it is gone")
            for load in its_own:
                load.more()
        assert server.process.poll() is None
        for load in its_own:
            assert load.right(2.0)
            assert all(isinstance(error, Unavailable) for error in load.errors), load.errors
        for load in others:
            load.more()
    for load in others:
        assert load.errors == []
        assert load.right(3.0)
        assert load.slowest_s < LATENCY_MAX_S


def test_a_model_that_raises_fails_that_call_alone_though_it_had_company(tmp_path):
    with serving(tmp_path, "--max-delay-ms", "2", other=3.0) as (server, models):
        write_picky(models / "picky.onnx")
        assert ask_http(server, "POST", "/v2/repository/models/picky/load")[0] == 200
        with loads(server, "picky", positive=True) as both:
            for door, address in server.endpoints.items():
                with Model(f"{door}://{address}", "picky", shm=False) as model:
                    for _ in range(20):
                        with pytest.raises(InputRefused, match=r"(?i)indices|index|bounds"):
                            model.predict(-X)
            for load in both:
                load.more()
            before = [instance.pid for instance in instances(server, "picky")]
        for load in both:
            assert load.errors == []
            assert load.right(1.0)
        assert len(before) == 1
        _, stats, _ = ask_http(server, "GET", "/v2/models/picky/stats")
        assert stats["model_stats"][0]["inference_stats"]["fail"]["count"] == 40


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_model_that_stops_is_ended_after_its_time_and_works_again(door, tmp_path):
    with serving(tmp_path, "--timeout-s", "0.7", stuck=2.0, other=3.0) as (server, _), loads(server, "other") as others:
        (instance,) = instances(server, "stuck")
        instance.send_signal(signal.SIGSTOP)
        with Model(f"{door}://{server.endpoints[door]}", "stuck", shm=False) as model:
            with pytest.raises(Unavailable):
                model.predict(X)
            until(lambda: not instance.is_running(), "the stopped process is ended")

            def answered():
                with contextlib.suppress(Unavailable):
                    return model.predict(X)[0, 0] == 2.0

            until(answered, "the model answers again")
        for load in others:
            load.more()
    for load in others:
        assert load.errors == []
        assert load.right(3.0)
        assert load.slowest_s < LATENCY_MAX_S


def test_no_request_fails_while_a_model_is_swapped_and_a_bad_file_changes_nothing(tmp_path):
    with serving(tmp_path, model=2.0) as (server, models), loads(server, "model") as both:
        for factor in (4.0, 8.0):
            for load in both:
                load.more()
            write_scaled(models / "model.onnx", factor)
            assert ask_http(server, "POST", "/v2/repository/models/model/load")[0] == 200
            with Model(f"http://{server.http}", "model") as model:  # from the load's answer on, nobody gets the old one
                assert model.predict(X)[0, 0] == factor
        (models / "model.onnx").write_bytes(b"no model")
        status, told, _ = ask_http(server, "POST", "/v2/repository/models/model/load")
        assert status == 400
        assert "model.onnx" in told["error"]
        for load in both:
            load.more()
    for load in both:
        assert load.errors == []
        assert load.right(2.0, 4.0, 8.0)
        assert load.factors() == {2.0, 4.0, 8.0}


def test_a_model_that_cannot_be_started_again_is_refused_at_once_and_mended_by_a_load(tmp_path):
    with serving(tmp_path, rotten=2.0, other=3.0) as (server, models), loads(server, "other") as others:
        (models / "rotten.onnx").write_bytes(b"no model any more")
        for instance in instances(server, "rotten"):
            instance.kill()
        with Model(f"http://{server.http}", "rotten", timeout_s=10, shm=False) as model:

            def refused():
                began_s = time.monotonic()
                with contextlib.suppress(TenureError):
                    model.predict(X)
                    return False
                return time.monotonic() - began_s < 1

            until(refused, "it is refused, and quickly")
            until(lambda: ask_http(server, "GET", "/v2/models/rotten/ready")[0] == 503, "it is not ready")
            _, index, _ = ask_http(server, "POST", "/v2/repository/index")
            assert {entry["name"]: entry["state"] for entry in index} == {"other": "READY", "rotten": "UNAVAILABLE"}
            write_scaled(models / "rotten.onnx", 5.0)
            assert ask_http(server, "POST", "/v2/repository/models/rotten/load")[0] == 200
            assert model.predict(X)[0, 0] == 5.0
        for load in others:
            load.more()
    for load in others:
        assert load.errors == []
        assert load.right(3.0)
        assert load.slowest_s < LATENCY_MAX_S


def test_unloading_answers_what_was_accepted_and_refuses_the_rest_in_words(tmp_path):
    with serving(tmp_path, gone=2.0, other=3.0) as (server, _), loads(server, "other") as others:
        with loads(server, "gone") as both:
            for load in both:
                load.more()
            assert ask_http(server, "POST", "/v2/repository/models/gone/unload")[0] == 200
            until(lambda: all(load.errors for load in both), "both doors refuse")
        for load in both:
            assert load.right(2.0)
            assert "gone" in str(load.errors[0])
        assert not instances(server, "gone")
        assert ask_http(server, "POST", "/v2/repository/models/gone/load")[0] == 200
        with Model(f"grpc://{server.grpc}", "gone") as model:
            assert model.predict(X)[0, 0] == 2.0
    for load in others:
        assert load.errors == []
        assert load.right(3.0)


def test_sigterm_under_load_answers_all_that_was_accepted_over_both_doors(tmp_path):
    with serving(tmp_path, model=2.0) as (server, models):
        write_slow(models / "slow.onnx")
        assert ask_http(server, "POST", "/v2/repository/models/slow/load")[0] == 200
        with loads(server, "slow") as both:
            for load in both:
                load.more(3)
            server.process.terminate()
            until(lambda: server.process.poll() is not None, "the server leaves")
            until(lambda: all(load.errors for load in both), "both doors are closed")
        assert server.process.returncode == 0
        assert json.loads((tmp_path / "w" / "result.json").read_text()) == {"state": "done", "drained": True}
        for load in both:
            assert load.right(1.0)
            assert all(isinstance(error, Unavailable) for error in load.errors), load.errors


def test_a_server_killed_under_load_leaves_a_clear_error_and_no_process(tmp_path):
    with serving(tmp_path, model=2.0) as (server, _), loads(server, "model") as both:
        for load in both:
            load.more()
        left = instances(server, "model")
        server.process.kill()
        until(lambda: not any(process.is_running() and process.status() != "zombie" for process in left), "instances leave")
        until(lambda: all(load.errors for load in both), "clients are told")
    for load in both:
        assert load.right(2.0)
        assert all(isinstance(error, Unavailable) for error in load.errors), load.errors
