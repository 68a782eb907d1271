"""What the command line makes of words a holder types, and says of a lease."""

import time
from datetime import datetime

import pytest

from tenure.cli.leasing import top_table, workspace_text
from tenure.cli.output import leases_table
from tenure.errors import SpecError
from tenure.jobs import Command
from tenure.leases import Lease, LeaseState
from tenure.leasing import Watched, parse_moment
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, DeviceShare, Envelope, Gpu
from tenure.usage import Usage

NOON_S = datetime(2025, 6, 1, 12, 0).timestamp()


def a_lease(**fields):
    envelope = Envelope(cpus=2, memory_bytes=4 << 30, slot_s=3600.0, total_s=7200.0)
    state = {"state": LeaseState.ACTIVE, "node": "local", **fields}
    return Lease(id="l-1", run_id="w-1", stage="workspace", envelope=envelope, command=Command(argv=("sleep",)), **state)


@pytest.mark.parametrize(
    ("text", "hours"),
    [("20:00", 8), ("12:01", 1 / 60), ("12:00", 24), ("9:30", 21.5), ("2025-06-02T12:00", 24), ("2025-06-01 13:00", 1)],
)
def test_a_moment_is_the_next_one_of_that_name(text, hours):
    assert parse_moment(text, now_s=NOON_S) - NOON_S == pytest.approx(hours * 3600)


@pytest.mark.parametrize("text", ["", "25:00", "20:60", "tonight", "2025-06-01T11:59", "1e9", "2025-13-01"])
def test_what_is_no_moment_to_come_is_refused(text):
    with pytest.raises(SpecError, match="moment"):
        parse_moment(text, now_s=NOON_S)


def test_a_moment_with_a_zone_is_taken_as_it_says():
    assert parse_moment("2025-06-02T12:00+00:00", now_s=NOON_S) == 1748865600.0


def test_a_new_workspace_says_how_to_get_in_and_until_when():
    text = workspace_text(a_lease(ends_at_s=NOON_S, total_ends_at_s=NOON_S + 3600))
    for word in (
        "tenure exec -it l-1 -- bash",
        "tenure logs l-1 -f",
        "tenure renew l-1",
        "tenure release l-1",
        "renewable until",
    ):
        assert word in text


def test_a_lease_with_a_device_says_how_far_it_is_held():
    gpu = Gpu(index=0, model="H100", memory_bytes=80 << 30, uuid="GPU-0", parts="mps")
    node = Node(
        name="local", capacity=Capacity(cpus=2, memory_bytes=4 << 30, gpus=(gpu,)), machine=Machine(cpu_model="a", cores=2)
    )
    held = a_lease(devices=(DeviceShare(index=0, fraction=0.5, memory_bytes=10 << 30),))
    assert "share advisory, memory upper: CUDA MPS: 0.5 of the multiprocessors" in workspace_text(held, nodes=(node,))
    assert "(share advisory, memory upper)" in leases_table([held], [node])
    assert "declared only" in workspace_text(held)
    assert "GPU" not in leases_table([a_lease()])


def test_top_shows_what_is_used_of_what_may_be():
    used = Usage(at_s=time.time(), memory_bytes=1 << 30, processes=3)
    table = top_table([Watched(lease=a_lease(), cpus=1.234, usage=used, left_s=3725.0)])
    for word in ("1.23 of 2", "1.0 GiB of 4.0 GiB", "1h02min", " 3 "):
        assert word in table
    assert "- of 2" in top_table([Watched(lease=a_lease())])
    assert top_table([]) == "no live leases"
