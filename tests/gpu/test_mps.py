"""CUDA's Multi-Process Service through its control program, here a made-up one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.gpu.machine import GIB, ROOT, MadeUp, uuid

from tenure.errors import Unavailable, Unsupported
from tenure.resources import DeviceShare, Gpu
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.mps import Mps, client_environment
from tenure.runtimes.shim import Shim

pytestmark = pytest.mark.real


@pytest.fixture
def mps(here: MadeUp) -> Iterator[Mps]:
    made = Mps(here.folder / "mps", program=here.program)
    yield made
    made.quit(uuid(0))


def client(here: MadeUp, environment, *words):
    words = [sys.executable, "-m", "tests.gpu.work", *map(str, words)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=here.environment() | dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_daemon_is_started_once_and_found_again_by_its_folder(here, mps):
    assert not mps.answers(uuid(0))
    pipe = mps.ensure(uuid(0))
    first = (pipe / "nvidia-cuda-mps-control.pid").read_text()
    again = Mps(here.folder / "mps", program=here.program)
    assert again.answers(uuid(0))
    assert again.ensure(uuid(0)) == pipe
    assert (pipe / "nvidia-cuda-mps-control.pid").read_text() == first


def test_each_device_has_a_daemon_of_its_own(mps):
    assert mps.pipe(uuid(0)) != mps.pipe(uuid(1))
    mps.ensure(uuid(0))
    assert not mps.answers(uuid(1))


def test_quitting_ends_the_daemon_and_leaves_nothing(here, mps):
    mps.ensure(uuid(0))
    mps.quit(uuid(0))
    assert not mps.answers(uuid(0))
    assert not (here.folder / "mps").exists()
    mps.quit(uuid(0))  # once more changes nothing


def test_a_daemon_that_cannot_start_says_why(here, mps, monkeypatch):
    monkeypatch.setenv("TENURE_FAKE_MPS", "broken")
    with pytest.raises(Unavailable, match="no supported device"):
        mps.ensure(uuid(0))


def test_an_older_daemon_is_started_for_one_user_at_a_time(mps, monkeypatch):
    monkeypatch.setenv("TENURE_FAKE_MPS", "old")
    mps.ensure(uuid(0))
    assert not mps.serves_many_users(uuid(0))


def test_a_folder_of_somebody_else_is_not_used(here, mps):
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder somebody else's")
    (here.folder / "mps").mkdir()
    os.chown(here.folder / "mps", 12345, 12345)
    with pytest.raises(Unavailable, match="belongs to user 12345"):
        mps.ensure(uuid(0))
    os.chown(here.folder / "mps", 0, 0)


def test_a_clients_share_and_memory_are_bounded_and_it_is_listed(here, mps):
    environment = client_environment(mps.ensure(uuid(0)), fraction=0.25, memory_bytes=2 * GIB)
    work = client(here, environment | {"CUDA_VISIBLE_DEVICES": uuid(0)}, "alloc", GIB, GIB, "--hold")
    try:
        found = json.loads(work.stdout.readline())
        assert found["got"] == [True, False]
        assert found["multiprocessors"] == 33
        assert mps.clients(uuid(0)) == {work.pid}
        mps.end_clients(uuid(0), [work.pid, 999999])
        told = [json.loads(line) for line in (mps.pipe(uuid(0)) / "told").read_text().splitlines()]
        assert [words[0::2] for words in told] == [["terminate_client", str(work.pid)]]
    finally:
        work.communicate()


def test_work_is_taken_off_the_device_before_a_lease_is_killed(here, mps):
    mps.ensure(uuid(0))
    shim = Shim.__new__(Shim)
    shim._plan = {"gpu": {"mps": mps.to_plan(), "uuids": [uuid(0)]}}
    work = client(here, client_environment(mps.pipe(uuid(0)), fraction=0.5, memory_bytes=GIB), "alloc", 1 << 20, "--hold")
    try:
        assert json.loads(work.stdout.readline())["got"] == [True]
        shim._pids = lambda: [work.pid]
        shim._leave_devices()
        assert str(work.pid) in (mps.pipe(uuid(0)) / "told").read_text()
    finally:
        work.communicate()


def test_bounds_below_what_can_be_said_are_refused():
    with pytest.raises(Unavailable, match="MiB"):
        client_environment("/pipe", fraction=0.5, memory_bytes=1000)


# --- what a lease is told ---


def one(**fields):
    return Gpu(index=0, model="NVIDIA Fake", memory_bytes=16 * GIB, uuid=uuid(0), **fields)


PART = (DeviceShare(index=0, fraction=0.5, memory_bytes=4 * GIB),)
WHOLE = (DeviceShare(index=0, fraction=1.0, memory_bytes=16 * GIB),)


def test_a_part_goes_through_mps_and_its_bounds_say_so(mps):
    grant = Gpus((one(),), mps=mps).grant(PART, runtime="process")
    assert grant.environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
    assert grant.environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=4096M"
    assert grant.environment["CUDA_VISIBLE_DEVICES"] == uuid(0)
    assert grant.hold.bounds == {"gpus": "advisory", "gpu_memory_bytes": "upper"}
    assert "CUDA MPS" in grant.hold.means


def test_a_part_without_asked_memory_gets_the_same_part_of_the_devices(mps):
    share = (DeviceShare(index=0, fraction=0.25),)
    assert Gpus((one(),), mps=mps).grant(share, runtime="process").memory_bytes == 4 * GIB


def test_a_device_that_is_not_there_is_refused_with_those_that_are(mps):
    with pytest.raises(Unsupported, match="gpu 3 is not on this node, which has 0"):
        Gpus((one(),), mps=mps).grant((DeviceShare(index=3, fraction=1.0),), runtime="process")


def test_a_whole_device_needs_no_daemon(mps):
    grant = Gpus((one(),), mps=mps).grant(WHOLE, runtime="process")
    assert grant.environment == {"CUDA_VISIBLE_DEVICES": uuid(0)}
    assert grant.mps is None
    assert grant.hold.bounds == {"gpus": "upper", "gpu_memory_bytes": "exact"}


def test_where_no_daemon_can_be_had_a_part_is_polled_and_the_reason_is_said(mps, monkeypatch):
    monkeypatch.setenv("TENURE_FAKE_MPS", "broken")
    gpus = Gpus((one(),), mps=mps)
    grant = gpus.grant(PART, runtime="process")
    assert "CUDA_MPS_PIPE_DIRECTORY" not in grant.environment
    assert "polled" in grant.hold.means
    assert "no supported device" in gpus.describe()


def test_another_users_part_is_polled_when_the_daemon_serves_one_user_only(mps, monkeypatch):
    monkeypatch.setenv("TENURE_FAKE_MPS", "old")
    gpus = Gpus((one(),), mps=mps)
    assert gpus.grant(PART, runtime="process").mps
    grant = gpus.grant(PART, runtime="process", uid=12345)
    assert not grant.mps
    assert "polled" in grant.hold.means


def test_in_a_container_a_part_is_polled_and_a_whole_device_is_all_there_is(mps):
    gpus = Gpus((one(),), mps=mps)
    assert gpus.grant(PART, runtime="container").hold.bounds == {"gpus": "advisory", "gpu_memory_bytes": "upper"}
    assert gpus.grant(PART, runtime="container").mps is None
    assert gpus.grant(WHOLE, runtime="container").hold.bounds == {"gpus": "exact", "gpu_memory_bytes": "exact"}
