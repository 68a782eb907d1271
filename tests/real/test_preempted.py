"""A training run that has to give way goes on by itself, from its newest round; broker, agent and workers are real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import until

from tenure.broker.client import connect
from tenure.errors import Unavailable
from tenure.leases import EndReason, LeaseState

pytestmark = pytest.mark.real

TINY = Path(__file__).parents[1] / "experiments" / "jobs" / "tiny.py"
ROUNDS = 80
JOB = """
[run]
name = "gives-way"

[train]
program = "tiny.py:Tiny"
options = {{ pause_s = 0.005, rounds_log = "{log}" }}
shards = 2
max_rounds = {rounds}
workers = 2
envelope = {{ cpus = 0.4, memory = "160MiB", slot = "60s", total = "5min" }}
"""


def test_training_that_gives_way_goes_on_from_its_newest_round(tmp_path):
    home, log = tmp_path / "home", tmp_path / "rounds"
    shutil.copy(TINY, tmp_path)
    (tmp_path / "job.toml").write_text(JOB.format(log=log, rounds=ROUNDS))
    env = {**os.environ, "TENURE_HOME": str(home), "TENURE_SHARES_FILE": str(tmp_path / "shares.json")}
    command = [sys.executable, "-m", "tenure.cli", "train", str(tmp_path / "job.toml")]
    clients = []

    def reached():
        try:
            clients.append(connect(home, start=False))
        except Unavailable:
            assert run.poll() is None, run.stdout.read()
        return bool(clients)

    def running():
        found = [lease for lease in clients[0].leases(live=True) if lease.command.on_event and lease.attempt]
        return found if len(found) == 2 and all(lease.state is LeaseState.ACTIVE for lease in found) else []

    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(reached, "the run's broker answers", timeout_s=60)
        until(lambda: log.exists() and len(log.read_text().split()) >= 10, "some rounds are through", timeout_s=60)
        leases = until(running, "both workers run", timeout_s=60)
        clients[0].release([lease.id for lease in leases], reason=EndReason.PREEMPTED, why="gives way to others")
        said, _ = run.communicate(timeout=100)
        assert run.returncode == 0, said
        assert "preempted: gives way to others. It goes on from its newest round" in said
        gangs = {lease.gang_id for lease in clients[0].leases() if lease.command.on_event}
        assert {gang.rpartition("+")[2] for gang in gangs if "+" in gang} == {"1"}
        assert len(gangs) == 2
        resumed = [event for event in clients[0].events() if event.kind == "lease.resumed"]
        assert {event.lease_id for event in resumed} == {lease.id for lease in leases}
        rounds = log.read_text().split()
        assert len(rounds) < 2 * ROUNDS + 20, "each worker combines a round once; only what was under way is done again"
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
        for client in clients:
            client.close()
        subprocess.run([sys.executable, "-m", "tenure.cli", "down"], env=env, capture_output=True, timeout=60, check=False)
