"""kill -9 of the agents, the broker and a waiting client, in every order, while a gang of two runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenure import orders, wire
from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.errors import Unavailable
from tenure.jobs import Command
from tenure.leases import EndReason, LeaseState
from tenure.resources import Envelope
from tenure.runtimes.state import read_json
from tenure.sockets import LineClient, socket_dir

from .conftest import LONG_S, MIB, alive

pytestmark = pytest.mark.real
NODES = ("a:0.2:100MiB", "b:0.2:100MiB")
WAITER = """
import sys
from pathlib import Path
from tenure.broker.client import connect
with connect(Path(sys.argv[1])) as client:
    print("waits", flush=True)
    client.wait_leases(sys.argv[2:], until="ended", timeout_s=600.0)
"""
ORDERS = list(itertools.permutations(("agents", "broker", "client")))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENURE_SHARES_FILE", str(folder / "shares.json"))
        start_broker(folder / "home", nodes=NODES)
        yield folder / "home"
        with contextlib.suppress(Unavailable), connect(folder / "home") as client:
            client.shutdown()


@pytest.fixture
def client(home: Path) -> Iterator[BrokerClient]:
    """A client, with nothing live before and after."""
    with connect(home) as made:
        yield made
        live = [lease.id for lease in made.leases(live=True)]
        made.release(live)
        made.wait_leases(live)


def gang(client: BrokerClient, name: str, go: Path) -> list[str]:
    envelope = Envelope(cpus=0.15, memory_bytes=64 * MIB, slot_s=90.0, total_s=90.0)
    members = tuple(
        wire.GangMember(
            worker=worker,
            envelope=envelope,
            command=Command(argv=("sh", "-c", f"until [ -e {go} ]; do sleep 0.05; done; exit {7 + worker}")),
        )
        for worker in range(2)
    )
    asked = client.request_gang(wire.RequestGang(gang_id=name, run_id="r", stage=name, members=members))
    return [lease.id for lease in asked]


def agent_pid(home: Path, node: str) -> int:
    client = LineClient(socket_dir(home) / f"agent-{node}.sock", orders.AGENT_OPS, who="test")
    client.close()
    return client.welcome.pid


def kept(home: Path, node: str, lease_id: str) -> tuple[tuple[int, int], float]:
    """Return the shim, and the deadline that it goes by, of what runs."""
    folder = home / "nodes" / node / "leases" / lease_id
    shim, control = read_json(folder / "shim.json"), read_json(folder / "control.json")
    assert shim is not None
    assert control is not None
    return (shim["pid"], shim["start_ticks"]), control["deadline_boot_s"]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_kills_lose_no_exit_code_no_deadline_and_no_lease(
    client: BrokerClient, home: Path, tmp_path: Path, order: tuple[str, ...]
) -> None:
    go = tmp_path / "go"
    ids = gang(client, "-".join(order), go)
    before = [view.lease for view in client.wait_leases(ids, until="active")]
    assert {lease.node for lease in before} == {"a", "b"}, before
    runs = [kept(home, lease.node, lease.id) for lease in before]
    waiter = subprocess.Popen([sys.executable, "-c", WAITER, str(home), *ids], stdout=subprocess.PIPE)
    assert waiter.stdout is not None
    assert waiter.stdout.readline() == b"waits\n"
    pids = {
        "agents": [agent_pid(home, "a"), agent_pid(home, "b")],
        "broker": [int((home / "broker.lock").read_text())],
        "client": [waiter.pid],
    }
    for who in order:
        for pid in pids[who]:
            os.kill(pid, signal.SIGKILL)
    waiter.wait()
    waiter.stdout.close()
    after = [view.lease for view in client.wait_leases(ids, until="active")]
    assert [(lease.state, lease.fence, lease.attempt, lease.ends_at_s) for lease in after] == [
        (LeaseState.ACTIVE, lease.fence, 1, lease.ends_at_s) for lease in before
    ]
    now = [kept(home, lease.node, lease.id) for lease in before]
    assert [shim for shim, _ in now] == [shim for shim, _ in runs]
    # Told again by the new broker: the same but for the moment between its looks at two clocks.
    assert [deadline for _, deadline in now] == pytest.approx([deadline for _, deadline in runs], abs=0.1)
    go.touch()
    views = client.wait_leases(ids, until="ended", timeout_s=LONG_S)
    assert [(view.lease.end_reason, [end.code for end in view.exits]) for view in views] == [
        (EndReason.FAILED, [7]),
        (EndReason.FAILED, [8]),
    ]
    end_s = time.monotonic() + LONG_S
    while any(alive(pid) for (pid, _), _ in runs):
        assert time.monotonic() < end_s, "a shim outlived its record"
        time.sleep(0.02)
