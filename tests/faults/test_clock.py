"""The wall clock is set by a day, either way, under a real broker, agent and shim."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.errors import Unavailable
from tenure.jobs import Command
from tenure.leases import LeaseState
from tenure.resources import Envelope
from tenure.runtimes.state import read_json
from tenure.wire import GangMember, RequestGang

pytestmark = pytest.mark.real
MIB = 1 << 20
DAY_S = 86400.0
# What the interpreter of each of them runs first: time.time() goes by as many seconds as the file says, whenever it says so.
SITE = """
import os, time
_time, _jump = time.time, os.environ["FAULTS_JUMP"]
def _jumped():
    with open(_jump) as file:
        return _time() + float(file.read() or 0)
time.time = _jumped
"""


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says by how many seconds the wall clock is set away, for every process started from here."""
    folder, path = tmp_path / "site", tmp_path / "jump"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    path.write_text("0")
    source = Path(__file__).parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{source}")
    monkeypatch.setenv("FAULTS_JUMP", str(path))
    monkeypatch.setenv("TENURE_SHARES_FILE", str(tmp_path / "shares.json"))
    return path


def set_clock(jump: Path, by_s: float) -> None:
    draft = jump.with_name("draft")
    draft.write_text(str(by_s))
    draft.replace(jump)


@pytest.mark.parametrize("by_s", [DAY_S, -DAY_S])
def test_a_clock_set_by_a_day_leaves_a_running_lease_its_slot_and_its_total(tmp_path: Path, jump: Path, by_s: float) -> None:
    home = tmp_path / "home"
    start_broker(home, nodes=("a:0.2:100MiB",))
    with connect(home) as client:
        try:
            lease_id = request(client)
            lease = client.wait_leases([lease_id], until="active")[0].lease
            assert lease.state is LeaseState.ACTIVE, lease
            began_s = deadline(home, lease_id) - 40.0
            set_clock(jump, by_s)
            assert abs(wall_clock_of_a_process() - by_s) < DAY_S / 2, "the clock was not set"
            seen = client.wait_leases([lease_id], until="ended", timeout_s=1.5)[0].lease
            assert (seen.state, seen.ends_at_s) == (LeaseState.ACTIVE, lease.ends_at_s)
            assert deadline(home, lease_id) == began_s + 40.0
            client.renew(lease_id, 20.0)
            assert deadline(home, lease_id) == pytest.approx(began_s + 40.0, abs=1e-3)
            client.renew(lease_id, 10_000.0)
            assert deadline(home, lease_id) == pytest.approx(began_s + 100.0, abs=1e-3)
            os.kill(int((home / "broker.lock").read_text()), 9)
            client.renew(lease_id, 10_000.0)
            assert deadline(home, lease_id) == pytest.approx(began_s + 100.0, abs=1e-3)
            assert client.lease(lease_id).lease.state is LeaseState.ACTIVE
        finally:
            with contextlib.suppress(Unavailable):
                client.shutdown()


def request(client: BrokerClient) -> str:
    envelope = Envelope(cpus=0.1, memory_bytes=48 * MIB, slot_s=40.0, total_s=100.0)
    member = GangMember(worker=0, envelope=envelope, command=Command(argv=("sleep", "300"), grace_s=1.0))
    (lease,) = client.request_gang(RequestGang(gang_id="g", run_id="r", stage="s", members=(member,)))
    return lease.id


def deadline(home: Path, lease_id: str) -> float:
    """Return the deadline that the shim goes by, CLOCK_BOOTTIME."""
    control = read_json(home / "nodes" / "a" / "leases" / lease_id / "control.json")
    assert control is not None
    return float(control["deadline_boot_s"])


def wall_clock_of_a_process() -> float:
    """Return by how much a process started now has its wall clock set away."""
    said = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True, text=True, check=True)
    return float(said.stdout) - time.time()
