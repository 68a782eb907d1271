"""Runs inside the guest only (its name keeps it out of the ordinary collection): the contract suite where a world stands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contracts.process_contract import AsRoot, UnderCgroup, UnderRlimits
from tests.guest.worlds import TOP, USER, switch_on

from tenure.protocols import ExitKind
from tenure.resources import Envelope

FIND = """
import json, os
from tenure.runtimes.confiner import find_confiner
found = find_confiner("auto")
print(json.dumps({"text": found.describe(), "bounds": found.bounds(), "groups": found.for_attempt("x").groups,
                  "own": open("/proc/self/cgroup").read().split(":", 2)[2].strip()}))
"""
ENTER_CONTAINER = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x02020000) == 0  # CLONE_NEWCGROUP | CLONE_NEWNS
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
assert libc.umount2(b"/sys/fs/cgroup", 2) == 0
assert libc.mount(b"cgroup2", b"/sys/fs/cgroup", b"cgroup2", 0, None) == 0
"""


class TestUnderCgroup(UnderCgroup):
    confine = "auto"

    def test_the_unified_hierarchy_is_what_holds_the_bounds(self, bench):
        assert bench.runtime.confinement().startswith("cgroup v2: memory, cpu, pids;")


class TestUnderRlimits(UnderRlimits):
    confine = "auto"

    def test_what_keeps_it_from_control_groups_is_said(self, bench):
        assert "Permission denied" in bench.runtime.confinement()


class TestAsRoot(AsRoot):
    confine = "auto"


class TestWithoutCpu(UnderCgroup):
    """Memory and pids are delegated, cpu is not: as under systemd before 252."""

    confine = "auto"

    def test_memory_and_cpus_are_exact(self):
        pytest.skip("Unsupported here: exact cpus")

    test_the_cpu_quota_is_held = test_a_resize_changes_the_cpu_share_of_what_runs = test_memory_and_cpus_are_exact

    def test_memory_is_exact_cpus_are_advisory_and_it_is_said(self, bench, record_property):
        record_property("confinement", bench.runtime.confinement())
        assert (bench.runtime.bounds()["memory_bytes"], bench.runtime.bounds()["cpus"]) == ("exact", "advisory")
        assert "cpus by affinity, advisory" in bench.runtime.confinement()

    def test_cpus_are_held_by_affinity_and_a_resize_moves_it(self, bench):
        handle = bench.python("import os, time\nprint(len(os.sched_getaffinity(0)), flush=True)\ntime.sleep(600)", cpus=1.0)
        bench.said(handle, "1")
        bench.runtime.resize(handle, Envelope(cpus=2.0, memory_bytes=256 << 20), fence=1)
        status, output = bench.runtime.exec(handle, ["cat", f"/proc/{_job(handle)}/status"], timeout_s=60)
        assert status == 0
        assert b"Cpus_allowed_list:\t0-1" in output


def _job(handle):
    return Path(f"/proc/{handle.pid}/task/{handle.pid}/children").read_text().split()[0]


def _group(name, *, only=("cpu", "memory", "pids"), owner=0, delegated=False):
    """Make a group below one of its own that hands on these controllers; return its folder."""
    folder = TOP / "places" / name / "own"
    folder.mkdir(parents=True)
    for above in (TOP, TOP / "places"):
        switch_on(above)
    switch_on(folder.parent, only)
    for path in (folder, *(folder / file for file in ("cgroup.procs", "cgroup.subtree_control"))):
        os.chown(path, owner, owner)
    if delegated:
        os.setxattr(folder, "user.delegate", b"1")
    return folder


def _find(folder, *, before="", uid=0):
    """Return what a process that starts in the group finds there."""
    code = f"open('{folder}/cgroup.procs', 'w').write('0')\n{before}\nimport os\nos.setgid({uid}); os.setuid({uid})\n{FIND}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def neighbour():
    """Give a function that starts a process in a group."""
    started = []

    def start(folder):
        started.append(subprocess.Popen(["sleep", "600"]))
        (folder / "cgroup.procs").write_text(str(started[-1].pid))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def _where(process):
    return Path(f"/proc/{process.pid}/cgroup").read_text().split(":", 2)[2].strip()


class TestPlaces:
    """Where the groups of leases come to lie, in the layouts that users have."""

    def test_a_process_alone_in_its_group_moves_into_a_leaf_of_it(self):
        folder = _group("alone")
        found = _find(folder)
        assert found["groups"]["memory"] == f"{folder}/tenure.leases/x"
        assert found["own"] == "/places/alone/own/tenure.agent"

    def test_everybody_in_a_delegated_scope_moves_into_the_leaf(self, neighbour):
        folder = _group("scope", delegated=True)
        other = neighbour(folder)
        found = _find(folder)
        assert found["groups"]["memory"] == f"{folder}/tenure.leases/x"
        assert _where(other) == "/places/scope/own/tenure.agent"
        assert _find(folder / "tenure.agent")["groups"] == found["groups"], "a second agent finds the same home"

    def test_others_in_a_group_that_is_not_delegated_stay_where_they_are(self, neighbour):
        folder = _group("session")
        other = neighbour(folder)
        found = _find(folder)
        assert found["groups"]["memory"] == f"{folder.parent}/tenure.leases/x"
        assert _where(other) == found["own"] == "/places/session/own"

    def test_a_user_owns_the_top_of_what_was_delegated_and_arranges_it(self, neighbour):
        folder = _group("users", owner=USER)
        other = neighbour(folder)
        found = _find(folder, uid=USER)
        # Others' processes of another user are not this user's to move: the reason is said, and rlimits hold.
        assert found["bounds"]["memory_bytes"] == "exact", found["text"]
        assert found["groups"]["memory"] == f"{folder}/tenure.leases/x"
        assert _where(other) == "/places/users/own/tenure.agent"

    def test_without_the_cpu_controller_memory_is_still_exact(self):
        found = _find(_group("no-cpu", only=("memory", "pids"), owner=USER), uid=USER)
        assert (found["bounds"]["memory_bytes"], found["bounds"]["cpus"]) == ("exact", "advisory")
        assert "cpus by affinity" in found["text"]

    def test_without_the_memory_controller_the_reason_is_said(self):
        found = _find(_group("no-memory", only=("cpu", "pids"), owner=USER), uid=USER)
        assert "lacks memory (it has cpu pids)" in found["text"].replace(", pids)", " pids)")
        assert found["bounds"]["memory_bytes"] == "advisory"

    def test_a_container_arranges_its_own_root(self, neighbour):
        folder = _group("container")
        other = neighbour(folder)
        found = _find(folder, before=ENTER_CONTAINER)
        assert found["groups"]["memory"] == "/sys/fs/cgroup/tenure.leases/x"
        assert _where(other) == "/places/container/own/tenure.agent"

    def test_whoever_manages_the_place_cannot_take_the_controllers_back(self):
        folder = _group("kept")
        _find(folder)
        with pytest.raises(OSError, match="busy"):
            (folder / "cgroup.subtree_control").write_text("-memory")


class TestInsideALease:
    """Tenure run by a job of Tenure."""

    confine = "auto"

    def test_it_stays_within_the_lease_and_commands_still_join_it(self, bench):
        handle = bench.start(sys.executable, "-u", "-c", FIND + "\nimport time; time.sleep(600)")
        bench.said(handle, "}")
        found = json.loads(bench.log(handle))
        assert "/tenure.leases/tenure.lease-1.1/tenure.leases/x" in found["groups"]["memory"]
        code, output = bench.runtime.exec(handle, ["cat", "/proc/self/cgroup"], timeout_s=60)
        assert code == 0, output
        assert b"/tenure.lease-1.1/" in output
        bench.runtime.stop(handle, grace_s=0, fence=1)
        assert bench.end(handle).kind is ExitKind.STOPPED
        assert not Path(found["groups"]["memory"]).parents[1].exists()
