"""What the process runtime promises beyond the contract of every runtime: once for control groups, once for rlimits.

A folder's conftest takes the fixtures over; a class says by `confine` how its runtime is to hold bounds.
"""

import os
import pwd
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import LONG_S, SLOWNESS, Bench, RuntimeContract, gone, until

from tenure.errors import SpecError, Unavailable, Unsupported
from tenure.protocols import ExitKind, SystemClock
from tenure.resources import Envelope
from tenure.runtimes.process import ProcessRuntime
from tenure.runtimes.state import term_file, write_json


def _runtime(state_dir, confine):
    try:
        return ProcessRuntime(state_dir, confine=confine)
    except Unsupported as error:
        pytest.skip(f"no cgroup here: {error}")


@pytest.fixture(scope="class")
def state_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runtime") / "state"


@pytest.fixture(scope="class")
def shared(request, state_dir):
    """One runtime for all tests of a class: its fork server's start would be most of what a test takes."""
    runtime = _runtime(state_dir, request.cls.confine)
    yield runtime
    runtime.close()


@pytest.fixture
def make_runtime(request, shared, state_dir):
    """Make a further runtime over the same state; afterwards nothing runs and nothing is remembered."""
    made = []

    def make():
        made.append(_runtime(state_dir, request.cls.confine))
        return made[-1]

    yield make
    for handle in shared.list():
        shared.stop(handle, grace_s=0, fence=1 << 30)
        assert shared.wait(handle, LONG_S) is not None
    for lease_id in shared.known():
        shared.forget(lease_id)
    term_file(state_dir).unlink(missing_ok=True)
    for runtime in made:
        runtime.close()


@pytest.fixture
def bench(shared, make_runtime, tmp_path):
    return Bench(shared, tmp_path / "leases")


class UnderCgroup(RuntimeContract):
    """The kernel holds memory, CPU and the number of processes."""

    def test_memory_and_cpus_are_exact(self, bench, record_property):
        record_property("confinement", bench.runtime.confinement())
        assert bench.runtime.bounds()["memory_bytes"] == bench.runtime.bounds()["cpus"] == "exact"
        assert bench.runtime.confinement().startswith("cgroup v")

    def test_the_cpu_quota_is_held(self, bench):
        handle = bench.python("import os\nos.fork(); os.fork()\nwhile True: pass", cpus=0.5)
        before = bench.runtime.usage(handle)
        assert bench.runtime.wait(handle, 1.5) is None
        after = bench.runtime.usage(handle)
        assert (after.cpu_s - before.cpu_s) / (after.at_s - before.at_s) < 0.7

    def test_a_bomb_of_processes_stays_within_its_number_and_dies(self, bench):
        code = "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: print('full', flush=True); time.sleep(9)"
        handle = bench.python(code, pids_max=24, memory=512 << 20)
        bench.said(handle, "full")
        assert bench.runtime.usage(handle).processes <= 24
        bench.runtime.stop(handle, grace_s=0, fence=1)
        assert bench.end(handle).kind is ExitKind.STOPPED
        assert not bench.runtime.list()

    def test_nothing_is_left_of_the_groups_when_the_lease_has_ended(self, bench, state_dir):
        handle = bench.start("true", lease="groups-gone")
        bench.end(handle)
        found = subprocess.run(["find", "/sys/fs/cgroup", "-name", "tenure.groups-gone*"], capture_output=True, check=False)
        assert found.stdout == b""

    def test_a_resize_changes_the_cpu_share_of_what_runs(self, bench):
        handle = bench.python("import os\nos.fork(); os.fork()\nwhile True: pass", cpus=2.0)
        until(lambda: bench.runtime.usage(handle).cpu_s > 0.5, "it spins")
        bench.runtime.resize(handle, Envelope(cpus=0.2, memory_bytes=256 << 20), fence=1)
        before = bench.runtime.usage(handle)
        assert bench.runtime.wait(handle, 1.5) is None
        after = bench.runtime.usage(handle)
        assert (after.cpu_s - before.cpu_s) / (after.at_s - before.at_s) < 0.35

    def test_the_witness_of_too_much_memory_is_the_groups_own_counter(self, bench):
        ended = bench.end(bench.python("x = b'x' * (200 << 20)", memory=64 << 20))
        assert ended.kind is ExitKind.OUT_OF_MEMORY
        assert ended.witness.startswith("cgroup v")
        assert "oom_kill 0" not in ended.witness
        assert "limit 64MiB" in ended.witness
        assert ended.usage.peak_memory_bytes <= 64 << 20

    def test_what_hides_in_a_group_of_its_own_making_dies_with_the_lease_and_so_does_the_group(self, bench):
        code = (
            "import os, time\n"
            "lines = [line.split(':', 2) for line in open('/proc/self/cgroup').read().splitlines()]\n"
            "path = next((p for _, c, p in lines if c == 'memory'), None)\n"
            "top = '/sys/fs/cgroup/memory' if path else '/sys/fs/cgroup'\n"
            "path = path or next(p for _, c, p in lines if not c)\n"
            "inner = f'{top}{path}/inner'\n"
            "os.mkdir(inner)\n"
            "if os.fork() == 0:\n    os.setsid(); open(f'{inner}/cgroup.procs', 'w').write('0')\n"
            "    print(inner, os.getpid(), flush=True); time.sleep(600)\n"
            "while 'inner' not in open(os.environ['LOG']).read(): time.sleep(0.01)"
        )
        handle = bench.python(code, env={"LOG": str(bench.folder / "lease-1.log")})
        assert bench.end(handle).kind is ExitKind.COMPLETED, bench.log(handle)
        folder, pid = bench.log(handle).split()
        assert gone(int(pid))
        assert not os.path.exists(folder)
        assert not os.path.exists(os.path.dirname(folder))


class UnderRlimits(RuntimeContract):
    """Only polling and limits of each process hold memory, and affinity the CPUs; it is said so."""

    def test_memory_and_cpus_are_advisory_and_it_is_said(self, bench, record_property):
        record_property("confinement", bench.runtime.confinement())
        assert bench.runtime.bounds()["memory_bytes"] == bench.runtime.bounds()["cpus"] == "advisory"
        assert "advisory" in bench.runtime.confinement()


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
class AsRoot:
    """What only root can give a job."""

    @pytest.mark.netns
    def test_a_job_runs_in_the_network_namespace_it_names(self, bench):
        name = f"tenure-test-{os.getpid()}"
        try:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespace can be made: {error}")
        try:
            handle = bench.start("sh", "-c", "readlink /proc/self/ns/net", network=f"netns:{name}")
            assert bench.end(handle).kind is ExitKind.COMPLETED
            inside = subprocess.run(
                ["ip", "netns", "exec", name, "readlink", "/proc/self/ns/net"], check=True, capture_output=True, text=True
            )
            assert bench.log(handle) == inside.stdout
        finally:
            subprocess.run(["ip", "netns", "del", name], check=True)

    def test_a_network_namespace_that_does_not_exist_is_refused(self, bench):
        with pytest.raises(SpecError, match="no-such-space"):
            bench.start("true", network="netns:no-such-space")

    def test_a_job_of_a_user_runs_with_that_users_rights_only(self, make_runtime):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o777)
            bench = Bench(make_runtime(), folder)
            handle = bench.start("sh", "-c", "id -un; touch mine && ls -n mine | cut -d' ' -f3", user="nobody")
            assert bench.end(handle).kind is ExitKind.COMPLETED
            assert bench.log(handle).split() == ["nobody", str(pwd.getpwnam("nobody").pw_uid)]

    def test_a_users_links_lead_the_root_that_writes_for_it_nowhere(self, make_runtime):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o777)
            secret = Path(folder, "secret")
            secret.write_text("of root")
            secret.chmod(0o600)
            bench = Bench(make_runtime(), folder)
            spec = bench.spec("sh", "-c", "rm -f lease.json; ln -s $SECRET result.json; ln -s $SECRET lease.json; sleep 60",
                              user="nobody", env={"SECRET": str(secret)})  # fmt: skip
            handle = bench.runtime.start(spec)
            until(lambda: os.path.islink(f"{spec.worker_dir}/lease.json"), "the links are there")
            bench.runtime.renew(handle, deadline_boot_s=spec.deadline_boot_s + 5, fence=spec.fence)
            bench.runtime.stop(handle, grace_s=0.1, fence=spec.fence)
            ended = bench.end(handle)
            assert ended.result is None
            assert "of root" not in ended.log_tail
            assert secret.read_text() == "of root"
            os.unlink(spec.log_path)
            os.symlink(secret, spec.log_path)
            with pytest.raises((SpecError, Unavailable)):
                bench.runtime.start(replace(spec, attempt=2, argv=("echo", "overwritten")))
            assert secret.read_text() == "of root"

    def test_a_command_inside_takes_nothing_of_the_jobs_environment_before_it_is_the_jobs_user(self, make_runtime):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o777)
            mark = Path(folder, "mark")
            Path(folder, "sitecustomize.py").write_text(f"import os; open({str(mark)!r}, 'a').write(str(os.getuid()) + ' ')")
            Path(folder, "json.py").write_text("raise SystemExit('taken')")
            bench = Bench(make_runtime(), folder)
            handle = bench.start("sleep", "60", user="nobody", env={"PYTHONPATH": folder, "PYTHONSTARTUP": f"{folder}/json.py"})
            code, output = bench.runtime.exec(handle, ["sh", "-c", "id -un; echo $PYTHONPATH"], timeout_s=30)
            assert (code, output.decode().split()) == (0, ["nobody", folder])
            assert not mark.exists()
            bench.runtime.stop(handle, grace_s=0.1, fence=1)
            bench.end(handle)

    def test_the_nodes_term_ends_a_lease_although_nobody_watches(self, bench, state_dir):
        clock = SystemClock()
        write_json(term_file(state_dir), {"ends_boot_s": clock.boot_s() + 0.5 * SLOWNESS, "boot_id": clock.boot_id()})
        handle = bench.start("sleep", "60")
        ended = bench.end(handle)
        assert ended.kind is ExitKind.STOPPED
        assert "term" in ended.witness
        until(lambda: not bench.runtime.list(), "nothing is left")
