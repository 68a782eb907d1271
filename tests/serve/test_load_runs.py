"""A plan becomes a run, a report and files: what is said of a run is what its record holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pytest
from tests.serve.fakes import FakePlane
from tests.serve.grpc_peers import OpenDoor
from tests.serve.load_fakes import VirtualTarget
from tests.serve.wire_server import WireServer

from tenure.cli.main import run as tenure
from tenure.decide.verdicts import parse_goal
from tenure.errors import Conflict, CorruptData, NotFound, SpecError, Unavailable
from tenure.serve import load
from tenure.serve.faults import ModelFailed
from tenure.serve.load.columns import Columns, read_record, write_record
from tenure.serve.load.plan import LoadPlan
from tenure.serve.load.records import Outcome, Record
from tenure.serve.load.report import measure, read_report
from tenure.serve.load.runner import Target
from tenure.serve.load.search import search
from tenure.serve.load.summary import figures, histogram, merged


def answering(request):
    request.answer_same()


@pytest.fixture
def server():
    with WireServer(answering) as opened:
        yield opened


def plan(server, **options):
    given = {"url": server.url, "model": "same", "seconds": 0.5, **options}
    if not {"rate_per_s", "clients", "schedule"} & set(given):
        given["rate_per_s"] = 200.0
    return LoadPlan(**given)


def test_a_run_keeps_every_due_request_and_judges_those_after_the_warm_up(server, tmp_path):
    found = measure(plan(server, arrivals="constant", warmup_s=0.1), folder=tmp_path / "run")
    record = read_record(tmp_path / "run" / "record")
    assert len(record) == 100
    assert found.summary.due == 80
    assert found.summary.counts == {"ok": 80, "wrong": 0, "failed": 0, "timed_out": 0, "dropped": 0}
    kept = record.where(record.due_s >= 0.1)
    assert found.summary.latency.max_s == kept.latency_s(10.0).max()
    assert found.kind == "open"
    assert found.warmth.requests >= 16
    assert server.infers == 100 + found.warmth.requests
    assert found.ended_s >= 0.495
    assert abs(time.perf_counter() - found.zero_s) < 60
    assert msgspec.to_builtins(read_report(tmp_path / "run")) == msgspec.to_builtins(found)


def test_the_same_plan_is_the_same_schedule_and_the_same_requests(server):
    one, other = (Target(plan(server, seed=7)) for _ in range(2))
    assert one.requests == other.requests
    assert np.array_equal(plan(server, seed=7).due_s(), plan(server, seed=7).due_s())
    assert plan(server, seed=7).choice(16) == plan(server, seed=7).choice(16)
    assert plan(server, seed=7).choice(16) != plan(server, seed=8).choice(16)


def test_a_closed_loop_is_told_as_one(server):
    found = measure(plan(server, clients=3, seconds=0.3))
    assert found.kind == "closed"
    assert found.peak_in_flight == 3
    assert found.summary.counts["ok"] == found.summary.due > 30
    assert found.summary.issue_delay.percentiles_s["p50"] < 0.001


def test_a_recorded_schedule_is_kept_to_from_its_first_request(server, tmp_path):
    (tmp_path / "due.txt").write_text("0\n0.05\n0.05\n0.2\n")
    run = Target(plan(server)).run(plan(server, schedule=str(tmp_path / "due.txt")))
    assert run.record.due_s.tolist() == [0.0, 0.05, 0.05, 0.2]
    assert len(run.measured) == 4
    assert (run.record.issued_s >= run.record.due_s).all()


def test_failures_and_their_reasons_are_in_the_report():
    asked = [0]

    def some(request):
        asked[0] += 1
        if asked[0] > 16 and asked[0] % 2:
            request.answer(503, {"error": "busy"})
        else:
            request.answer_same()

    with WireServer(some) as server:
        found = measure(plan(server, arrivals="constant", warmup_s=0.0, timeout_s=2.0))
    assert found.summary.counts["failed"] == found.reasons["HTTP 503: busy"] == 50
    assert found.summary.latency.percentiles_s["p90"] >= 2.0  # a refusal never looks quick


def test_grpc_is_run_the_same_way():
    door = OpenDoor(FakePlane("double"))
    try:
        found = measure(LoadPlan(url=f"grpc://{door.address}", model="double", rate_per_s=200, seconds=0.3, batch=3))
        assert found.summary.counts["ok"] == found.summary.due > 20
        assert door.plane.calls[-1].inputs[0].shape == (3, 4)
    finally:
        door.close()


def test_a_model_that_answers_nothing_is_said_before_the_run():
    broken = WireServer(lambda request: request.answer(500, {"error": "it broke"}))
    with broken as server, pytest.raises(ModelFailed, match=r"answers no request for same: HTTP 500: it broke"):
        measure(plan(server))
    with pytest.raises(Unavailable):
        measure(LoadPlan(url=server.url, model="same", rate_per_s=1.0))


def test_a_folder_with_something_in_it_is_not_written_to(server, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(Conflict, match="name another folder"):
        measure(plan(server), folder=tmp_path)
    assert server.infers == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate_per_s": 0.0}, "found none"),
        ({"rate_per_s": 1.0, "clients": 2}, "found rate_per_s and clients"),
        ({"url": "ftp://h:1"}, "http://host:port or grpc://host:port"),
        ({"url": "http://h"}, "http://host:port"),
        ({"model": ""}, "name of a model"),
        ({"arrivals": "bursty"}, "poisson or constant"),
        ({"seconds": 0.0}, "seconds lies between"),
        ({"rate_per_s": float("nan")}, "rate_per_s lies between"),
        ({"timeout_s": float("inf")}, "timeout_s lies between"),
        ({"warmup_s": 10.0}, "part of the run's 10 s"),
        ({"clients": 10, "rate_per_s": 0.0, "max_in_flight": 5}, "10 clients need"),
        ({"rate_per_s": 1e6, "seconds": 100.0}, "100000000 requests"),
        ({"url": "grpc://h:1", "json": True}, "always go raw"),
    ],
)
def test_plans_without_sense_are_refused_in_words(options, message):
    with pytest.raises(SpecError, match=message):
        LoadPlan(**{"url": "http://h:1", "model": "m", "rate_per_s": 1.0, **options})


def test_connections_are_opened_for_a_second_of_the_load():
    def opened(**options):
        given = LoadPlan(**{"url": "http://h:1", "model": "m", "arrivals": "constant", **options})
        return given.opened_connections(None if given.clients else given.due_s())

    assert opened(rate_per_s=100.0) == 100
    assert opened(rate_per_s=2.0) == 8
    assert opened(rate_per_s=5000.0) == 256
    assert opened(clients=5) == 5
    assert opened(rate_per_s=100.0, connections=3) == 3
    assert opened(url="grpc://h:1", rate_per_s=100.0) == 2


def test_histograms_merge_and_keep_three_digits():
    chance = np.random.default_rng(0)
    one, two = chance.lognormal(-5, 1, 4000), chance.lognormal(-4, 1, 6000)
    from tenure.serve.load.summary import encode

    both = merged([encode(histogram(one)), encode(histogram(two))])
    assert both.get_total_count() == 10_000
    for percent in (50, 99):
        true_s = figures(np.concatenate([one, two])).percentiles_s[f"p{percent}"]
        assert both.get_value_at_percentile(percent) / 1e6 == pytest.approx(true_s, rel=2e-3)


def test_figures_of_nothing_are_no_numbers():
    found = figures(np.array([np.nan]))
    assert found.count == 0
    assert found.max_s is found.percentiles_s["p99"] is None


def test_a_record_written_is_the_record_read_and_one_cut_off_has_what_had_ended(tmp_path):
    record = Record([0.0, 1.0], [0.0, 1.0], [0.5, 1.5], [Outcome.OK, Outcome.FAILED])
    write_record(tmp_path / "a", record)
    assert read_record(tmp_path / "a").outcome.tolist() == [0, 2]
    columns = Columns(3, tmp_path / "b")
    columns.begin(3)
    columns.due[0], columns.issued[0], columns.ended[0], columns.outcome[0] = 0.0, 0.0, 0.1, Outcome.OK
    assert len(read_record(tmp_path / "b")) == 1
    with pytest.raises(NotFound):
        read_record(tmp_path / "c")
    (tmp_path / "a" / "due_s.npy").write_text("broken")
    with pytest.raises(CorruptData):
        read_record(tmp_path / "a")


def slow_above(per_s):
    """A server with one place that takes 1 / per_s: past that rate its queue grows."""
    lock = threading.Lock()

    def answer(request):
        with lock:
            time.sleep(1 / per_s)
        request.answer_same()

    return answer


def test_a_goal_is_answered_beside_the_verdict(server):
    met = measure(plan(server, rate_per_s=300.0, seconds=1.0), goal=parse_goal("p90<500ms"))
    assert met.verdict.answer.answer == "met"
    missed = measure(plan(server, rate_per_s=300.0, seconds=1.0), goal=parse_goal("p90<1us"))
    assert missed.verdict.answer.answer == "missed"


def test_a_run_that_its_own_bound_held_back_is_invalid():
    with WireServer(slow_above(100.0)) as slow:
        found = measure(plan(slow, arrivals="constant", rate_per_s=200.0, max_in_flight=2, connections=2, timeout_s=20.0))
    assert not found.verdict.valid
    assert any("2 were in flight" in reason for reason in found.verdict.reasons)


def test_a_search_ends_at_a_rate_that_is_proven_and_keeps_every_run(tmp_path):
    told, target = [], VirtualTarget(per_s=400.0)
    asked = LoadPlan(url="http://h:1", model="m", rate_per_s=1.0, timeout_s=3.0)
    found = search(asked, parse_goal("p90<50ms"), folder=tmp_path / "s", told=told.append, target=target)
    assert 250 < found.met_per_s < 400  # M/D/1: p90 of 50 ms is reached some way below 400/s
    assert found.why.startswith(f"{found.met_per_s:g}/s meets")
    assert len(found.probes) == len(told) == len(list((tmp_path / "s").glob("probe-*/load.json")))
    assert len({each.plan.seed for each in found.probes}) == len(found.probes)
    assert found.report.plan.rate_per_s == found.met_per_s
    assert json.loads((tmp_path / "s" / "search.json").read_text())["met_per_s"] == found.met_per_s
    assert all(each.plan.warmup_s > 0 for each in found.probes)


def test_a_search_that_is_out_of_time_says_what_it_knows():
    asked = LoadPlan(url="http://h:1", model="m", rate_per_s=1.0, timeout_s=3.0)
    found = search(asked, parse_goal("p90<50ms"), max_s=0.0, target=VirtualTarget(per_s=400.0))
    assert found.why == "the search was given 0 s"
    assert found.met_per_s == 0.0
    assert found.report is None


def test_an_application_does_not_load_what_only_the_generator_needs():
    code = "import sys, tenure.serve.load, tenure.serve.load.closed; print('scipy' in sys.modules, 'hdrh' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert load.LoadPlan is LoadPlan
    assert set(load.__all__) >= {"measure", "read_report", "read_record"}
    with pytest.raises(AttributeError, match="it has: "):
        _ = load.nothing


# The command line


def test_the_command_tells_what_was_measured(server, tmp_path, capsys):
    code = tenure(
        ["bench", "load", server.url, "--model", "same", "--rate", "100", "--time", "300ms", "--out", str(tmp_path / "o")]
    )
    assert code == 0
    said = capsys.readouterr().out
    assert "open loop, 100/s poisson for 0.3 s of same" in said
    assert "0 failed, 0 timed out, 0 dropped" in said
    assert "from the due time" in said
    assert (tmp_path / "o" / "load.json").exists()


@pytest.mark.real
def test_ctrl_c_ends_a_run_with_what_it_saw(server, tmp_path):
    argv = [
        sys.executable,
        "-m",
        "tenure.cli",
        "bench",
        "load",
        server.url,
        "--model",
        "same",
        "--rate",
        "100",
        "--time",
        "60s",
    ]
    process = subprocess.Popen([*argv, "--out", str(tmp_path / "o")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ends_s = time.monotonic() + 60
    while server.infers < 60 and process.poll() is None and time.monotonic() < ends_s:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "ended    early: it was interrupted" in said
    assert "VALID" in said
    assert read_report(tmp_path / "o").stopped.startswith("it was interrupted")
    assert 20 < len(read_record(tmp_path / "o" / "record")) < 6000


def test_the_command_prints_the_whole_report_as_json(server, capsys):
    argv = ["bench", "load", server.url, "--model", "same", "--clients", "2", "--time", "200ms", "--json"]
    assert tenure(argv) in (0, 1)  # INVALID where this machine is too busy
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "closed"
    assert found["summary"]["counts"]["ok"] > 10
    assert found["verdict"]["percentiles"]["p99"]["value_s"] > 0


def test_the_command_ends_with_1_when_a_goal_is_not_proven(server, capsys):
    argv = ["bench", "load", server.url, "--model", "same", "--rate", "1000", "--time", "600ms"]
    assert tenure([*argv, "--goal", "p90<1us"]) == 1
    said = capsys.readouterr().out
    assert "goal     p90<0.001ms: missed" in said
    assert "VALID " in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "1", "--clients", "2"], "found rate_per_s and clients"),
        (["--rate", "1", "--shape", "x"], "--shape is NAME:N,N"),
        (["--rate", "1", "--time", "soon"], "found 'soon'"),
        ([], "found none"),
    ],
)
def test_the_command_refuses_what_makes_no_sense_before_it_sends_anything(server, capsys, argv, message):
    assert tenure(["bench", "load", server.url, "--model", "same", *argv]) == 2
    assert message in capsys.readouterr().err
    assert server.infers == 0
