"""A real server that stands still for a while cannot hide it from the generator, whatever else this machine does."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from tests.serve.conftest import Server

from tenure.serve.load import LoadPlan, Outcome, Target

pytestmark = pytest.mark.real
FREEZE_AFTER_S, FROZEN_S = 0.4, 0.5


@pytest.fixture
def own_server(digits, tmp_path):
    started = Server(digits.path, tmp_path / "server")
    yield started
    assert started.end() == 0


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_no_request_due_while_the_server_stood_still_is_told_quicker_than_it_was(own_server, door):
    plan = LoadPlan(url=f"{door}://{own_server.endpoints[door]}", model="digits", rate_per_s=200.0, seconds=1.5, timeout_s=20.0)
    target = Target(plan)
    target.warm_up()
    frozen: list[float] = []

    def freeze():
        for number, pause_s in ((signal.SIGSTOP, FROZEN_S), (signal.SIGCONT, 0.0)):
            os.kill(own_server.process.pid, number)
            frozen.append(time.perf_counter())
            time.sleep(pause_s)

    timer = threading.Timer(FREEZE_AFTER_S, freeze)
    timer.start()
    try:
        run = target.run(plan)
    finally:
        timer.join()
    record = run.record
    began_s, ended_s = (at_s - run.zero_s for at_s in frozen)
    inside = (record.due_s > began_s) & (record.due_s < ended_s - 0.02)
    latency_s = record.latency_s(plan.timeout_s)
    assert (record.outcome == Outcome.OK).all()
    assert np.count_nonzero(inside) > 30
    assert (latency_s[inside] >= ended_s - 0.02 - record.due_s[inside]).all()  # SIGCONT was sent at most so long before
    assert np.median(record.issue_delay_s) < 0.02
