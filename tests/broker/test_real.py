"""Client, broker, agent and shim as real processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.broker.launch import BrokerLaunch
from tenure.errors import CorruptData, JobFailed, NoPlacement, Refused, Unavailable
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.protocols import ExitKind, LaunchRequest
from tenure.resources import Envelope
from tenure.wire import GangMember, RequestGang

pytestmark = pytest.mark.real
MIB = 1 << 20
# Two nodes with fixed small parts: what the machine has left for other tests does not matter.
NODES = ("a:0.6:200MiB", "b:0.6:200MiB")


def until(true: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


def shut_down(home: Path) -> None:
    with contextlib.suppress(Unavailable), connect(home, start=False) as client:
        client.shutdown()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    shut_down(tmp_path / "home")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerClient]:
    home = tmp_path_factory.mktemp("broker") / "home"
    start_broker(home, nodes=NODES)
    with connect(home) as client:
        if len(client.status().nodes) < 2:
            shut_down(home)
            pytest.skip(f"this machine has no room left for two small agents: {(home / 'broker.log').read_text()[-600:]}")
        yield client
    shut_down(home)


@pytest.fixture
def client(shared: BrokerClient) -> Iterator[BrokerClient]:
    """One broker for all, with nothing live before and after."""
    yield shared
    live = [lease.id for lease in shared.leases(live=True)]
    shared.release(live)
    shared.wait_leases(live)


def envelope(**fields) -> Envelope:
    return Envelope(**{"cpus": 0.25, "memory_bytes": 48 * MIB, "slot_s": 60.0, "total_s": 120.0} | fields)


def request(argv: tuple[str, ...], *, name: str = "job", bounds: Envelope | None = None, **fields) -> LaunchRequest:
    return LaunchRequest(name=name, command=Command(argv=argv, **fields), envelope=bounds or envelope())


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def launch(client: BrokerClient, stage: str = "s", **fields) -> BrokerLaunch:
    return BrokerLaunch(client, home=client.home, run_id="r1", stage=stage, **fields)


def sleeping(client: BrokerClient, stage: str) -> Lease:
    """Have a lease run that only waits; nobody follows it."""
    wanted = GangMember(worker=0, envelope=envelope(), command=Command(argv=("sleep", "60")))
    (lease,) = client.request_gang(RequestGang(gang_id=stage, run_id="r1", stage=stage, members=(wanted,)))
    (view,) = client.wait_leases((lease.id,), until="active")
    assert view.lease.state is LeaseState.ACTIVE
    return view.lease


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that was ended and not yet reaped does not."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_task_completes_and_leaves_its_log_and_result(client: BrokerClient) -> None:
    code = "import os,json;print('hello');json.dump({'state':'done'},open(os.environ['TENURE_WORKER_DIR']+'/result.json','w'))"
    launched = launch(client)(request(python(code), expects_result=True))
    ended = launched.wait(30.0)
    assert ended is not None
    assert (ended.kind, ended.result) == (ExitKind.COMPLETED, {"state": "done"})
    assert launched.log_path.read_text() == "hello\n"
    assert client.lease(launched.lease_id).lease.end_reason is EndReason.COMPLETED


def test_a_task_that_fails_ends_with_its_code_and_last_words(client: BrokerClient) -> None:
    launched = launch(client)(request(("sh", "-c", "echo no luck; exit 7")))
    ended = launched.wait(30.0)
    assert ended is not None
    assert (ended.kind, ended.code) == (ExitKind.FAILED, 7)
    assert "no luck" in client.lease(launched.lease_id).lease.end_detail


def test_a_task_over_its_memory_ends_out_of_memory_with_a_witness(client: BrokerClient) -> None:
    launched = launch(client)(request(python("x = b'x' * (120 << 20); import time; time.sleep(60)")))
    ended = launched.wait(60.0)
    assert ended is not None
    assert ended.kind is ExitKind.OUT_OF_MEMORY
    assert ended.witness
    assert client.lease(launched.lease_id).lease.end_reason is EndReason.OUT_OF_MEMORY


def test_a_program_that_does_not_exist_is_said_so(client: BrokerClient) -> None:
    launched = launch(client)(request(("/no/such/program",)))
    assert launched.wait(10.0) is not None
    lease = client.lease(launched.lease_id).lease
    assert lease.end_reason is EndReason.FAILED
    assert "/no/such/program" in lease.end_detail


def test_a_server_is_launched_once_it_listens_and_stops_on_request(client: BrokerClient) -> None:
    code = (
        "import os,json,time,socket;s=socket.socket();s.bind(('127.0.0.1',0));s.listen();"
        "d=os.environ['TENURE_WORKER_DIR'];json.dump({'http':'127.0.0.1:%d'%s.getsockname()[1]},open(d+'/e','w'));"
        "os.rename(d+'/e',d+'/endpoints.json');time.sleep(60)"
    )
    launched = launch(client)(request(python(code), ports={"http": 0}))
    assert launched.endpoints["http"].startswith("127.0.0.1:")
    assert launched.stop().kind in (ExitKind.STOPPED, ExitKind.SIGNALLED)
    assert client.lease(launched.lease_id).lease.end_reason is EndReason.RELEASED


def test_a_server_that_dies_before_it_listens_is_a_failed_job_with_its_log(client: BrokerClient) -> None:
    with pytest.raises(JobFailed, match="port taken"):
        launch(client)(request(("sh", "-c", "echo port taken; exit 1"), ports={"http": 0}))


def test_what_does_not_fit_is_refused_with_reasons_and_what_only_must_wait_is_refused_when_it_waited(
    client: BrokerClient,
) -> None:
    with pytest.raises(NoPlacement) as caught:
        launch(client)(request(("true",), bounds=envelope(memory_bytes=300 * MIB)))
    assert set(caught.value.reasons) == {"a", "b"}
    for stage in ("x", "y"):
        launch(client, stage)(request(("sleep", "60"), bounds=envelope(memory_bytes=150 * MIB)))
    with pytest.raises(Refused, match="memory"):
        launch(client, queue_s=0.5)(request(("true",), bounds=envelope(memory_bytes=150 * MIB)))


def test_a_gang_spans_nodes_or_is_not_granted_at_all(client: BrokerClient) -> None:
    def gang(name: str, members: int) -> tuple[str, ...]:
        command = Command(argv=("sleep", "60"))
        wanted = tuple(GangMember(worker=w, envelope=envelope(memory_bytes=120 * MIB), command=command) for w in range(members))
        leases = client.request_gang(RequestGang(gang_id=name, run_id="r1", stage=name, members=wanted))
        return tuple(lease.id for lease in leases)

    with pytest.raises(NoPlacement):
        gang("three", 3)
    views = client.wait_leases(gang("two", 2), until="active")
    assert {view.lease.node for view in views} == {"a", "b"}
    (waits,) = (client.lease(lease_id).lease for lease_id in gang("one", 1))
    assert waits.state is LeaseState.QUEUED
    client.release([view.lease.id for view in views])
    (view,) = client.wait_leases([waits.id], until="active")
    assert view.lease.state is LeaseState.ACTIVE


def test_two_clients_at_once_start_one_broker_and_both_are_served(home: Path) -> None:
    made: list[int] = []

    def come() -> None:
        with connect(home) as client:
            made.append(client.status().fence)

    threads = [threading.Thread(target=come) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert len(made) == 3
    assert len(set(made)) == 1


def test_after_the_broker_is_killed_the_next_call_finds_the_lease_still_running(client: BrokerClient) -> None:
    launched = launch(client)(request(("sh", "-c", "sleep 60")))
    until(lambda: launched.usage().processes > 0)
    before = client.lease(launched.lease_id).lease
    fence = client.status().fence
    os.kill(int((client.home / "broker.lock").read_text()), signal.SIGKILL)
    after = client.lease(launched.lease_id).lease
    assert client.status().fence > fence
    assert (after.state, after.attempt, after.fence) == (LeaseState.ACTIVE, before.attempt, before.fence)
    assert launched.stop().kind in (ExitKind.STOPPED, ExitKind.SIGNALLED)


WORKER = """
import json, os, time
folder, event = os.environ["TENURE_WORKER_DIR"], json.load(open(os.environ["TENURE_EVENT_FILE"]))
store = os.environ["TENURE_RUN_DIR"] + "/store/events/"
def publish(name, **fields):
    with open(store + "." + name, "w") as file:
        json.dump(fields, file)
    os.link(store + "." + name, store + name + ".json")
if event.get("start"):
    publish("w1-0", worker=1, left=2)
    state = "done"
elif event["left"]:
    publish("w1-%d" % (3 - event["left"]), worker=1, left=event["left"] - 1)
    state = "continue"
else:
    state = "done"
json.dump({"state": state}, open(folder + "/r", "w"))
os.rename(folder + "/r", folder + "/result.json")
"""


def test_a_gang_of_two_is_driven_by_events_to_its_end(client: BrokerClient) -> None:
    events = client.home / "runs/r1/train/store/events"
    events.mkdir(parents=True)
    (events / "start.json").write_text(json.dumps({"start": True, "worker": 0}))
    command = Command(argv=python(WORKER), on_event=True, expects_result=True)
    wanted = tuple(GangMember(worker=worker, envelope=envelope(), command=command) for worker in range(2))
    leases = client.request_gang(RequestGang(gang_id="g", run_id="r1", stage="train", members=wanted))
    client.nudge("r1", "train")
    views = client.wait_leases([lease.id for lease in leases], timeout_s=60.0)
    assert [(view.lease.end_reason, len(view.exits)) for view in views] == [
        (EndReason.COMPLETED, 1),
        (EndReason.COMPLETED, 3),
    ], client.events(run_id="r1")
    assert [event.data["event"] for event in client.events(run_id="r1") if event.kind == "invoked"] == [
        "start", "w1-0", "w1-1", "w1-2",
    ]  # fmt: skip


def test_a_broker_and_its_agent_leave_by_themselves_when_nobody_is_left(home: Path) -> None:
    connect(home).close()
    agents = list((home / "nodes").iterdir())
    assert [agent.name for agent in agents] == ["local"] or "no node" in (home / "broker.log").read_text()
    until(lambda: "leaving" in (home / "broker.log").read_text())
    until(lambda: not (home / "broker.json").exists())
    with pytest.raises(Unavailable, match="no broker answers"):
        connect(home, start=False)


def test_a_ledger_that_cannot_be_read_is_said_by_the_client_and_left_as_it_is(home: Path) -> None:
    home.mkdir()
    (home / "ledger.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(CorruptData, match="restore a backup"):
        connect(home)
    assert (home / "ledger.sqlite").read_bytes().startswith(b"this is no database")
