import os

import pytest

from tenure.errors import Refused
from tenure.resources import Envelope
from tenure.runtimes.confine import Confinement
from tenure.runtimes.groups import own_groups

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
39 31 0:36 /docker/abc /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
"""


def test_own_groups_follow_mounts_their_roots_and_the_membership():
    found = own_groups(V1_MOUNTS, "9:name=systemd:/\n8:pids:/docker/abc/x\n4:memory:/part/one\n2:cpu,cpuacct:/\n0::/\n")
    assert found == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory/part/one",
        "pids": "/sys/fs/cgroup/pids/x",
    }


def test_the_unified_hierarchy_is_found_under_the_empty_name():
    assert own_groups("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/user.slice/a.scope\n") == {
        "": "/sys/fs/cgroup/user.slice/a.scope"
    }


def _group(folder):
    folder.mkdir()
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cgroup.procs"):
        (folder / name).write_text("")
    return Confinement("v2", dict.fromkeys(("memory", "cpu", "pids"), str(folder)))


def test_v2_limits_are_written_in_the_units_of_the_kernel(tmp_path):
    group = _group(tmp_path / "lease")
    group.make(Envelope(cpus=1.5, memory_bytes=64 << 20), 100)
    texts = {name: (tmp_path / "lease" / name).read_text() for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max")}
    assert texts == {"memory.max": "67108864", "memory.swap.max": "0", "cpu.max": "150000 100000", "pids.max": "100"}


def test_v2_counters_are_read(tmp_path):
    group = _group(tmp_path / "lease")
    (tmp_path / "lease/memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    (tmp_path / "lease/memory.stat").write_text("anon 1000\nfile 5000\nshmem 24\n")
    (tmp_path / "lease/cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    (tmp_path / "lease/memory.max").write_text("67108864")
    assert (group.oom_kills(), group.memory_bytes(0), group.cpu_s(0)) == (1, 1024, 2.5)
    assert "oom_kill 1; limit 64MiB" in group.oom_witness()


def test_a_kill_in_a_group_below_is_not_the_leases_own(tmp_path):
    group = _group(tmp_path / "lease")
    (tmp_path / "lease/memory.events").write_text("oom 1\noom_kill 1\n")
    (tmp_path / "lease/memory.events.local").write_text("oom 0\noom_kill 0\n")
    assert group.oom_kills() == 0
    (tmp_path / "lease/memory.events.local").write_text("oom 1\noom_kill 0\n")
    assert group.oom_kills() == 1


def test_a_kernel_that_keeps_no_height_is_taken_at_its_limit_after_a_kill(tmp_path):
    group = _group(tmp_path / "lease")
    (tmp_path / "lease/memory.max").write_text("67108864")
    assert group.highest_charge_bytes() == 0
    (tmp_path / "lease/memory.events").write_text("oom_kill 1\n")
    assert group.highest_charge_bytes() == 64 << 20
    assert "highest charge 64" in group.oom_witness()


def test_a_v2_bound_below_what_cannot_be_taken_back_is_refused_and_changes_nothing(tmp_path):
    group = _group(tmp_path / "lease")
    for name, text in (("memory.max", "200000000"), ("memory.current", "150000000"), ("memory.high", "max")):
        (tmp_path / "lease" / name).write_text(text)
    with pytest.raises(Refused, match="cannot be taken back"):
        group.resize(Envelope(memory_bytes=100_000_000), os.getpid())
    assert (tmp_path / "lease/memory.max").read_text() == "200000000"
    assert (tmp_path / "lease/memory.high").read_text().startswith("max")  # a plain file keeps the rest of a longer text


def test_a_confinement_survives_being_written_down():
    plan = Confinement("v1", {"memory": "/a", "cpu": "/b"}).to_plan()
    assert Confinement.from_plan(plan).to_plan() == plan
