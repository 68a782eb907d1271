"""What every runtime promises, written once: a test module gives the `runtime` fixture and inherits `RuntimeContract`."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tenure.data.system_calls import numbers
from tenure.errors import Conflict, NotFound, Refused, SpecError, StaleFence, Unsupported
from tenure.protocols import ExitKind, StartSpec, SystemClock, Window
from tenure.resources import Envelope
from tenure.runtimes import procfs, seccomp

CLOCK = SystemClock()
MIB = 1 << 20
SLOWNESS = float(os.environ.get("TENURE_TEST_SLOWNESS", "1"))
"""How many times slower than real hardware this machine is; an emulated one sets it. All bounds in seconds follow it."""
LONG_S = 20.0 * SLOWNESS


def until(condition, what, timeout_s=LONG_S):
    """Poll until the condition holds; fail the test when it does not within the bound."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


class Bench:
    """A runtime and a folder for its leases' files, with short words for what tests do."""

    def __init__(self, runtime, folder):
        self.runtime, self.folder = runtime, Path(folder)

    def spec(
        self, *argv, lease="lease-1", attempt=1, fence=1, slot_s=3 * LONG_S, memory=256 * MIB, disk=256 * MIB, cpus=1.0, **more
    ):
        envelope = Envelope(cpus=cpus, memory_bytes=memory, disk_bytes=disk)
        worker = self.folder / lease / str(attempt)
        return StartSpec(
            lease_id=lease,
            fence=fence,
            attempt=attempt,
            argv=argv,
            workdir=str(worker),
            worker_dir=str(worker),
            log_path=str(self.folder / f"{lease}.log"),
            envelope=envelope,
            deadline_boot_s=CLOCK.boot_s() + slot_s,
            boot_id=CLOCK.boot_id(),
            **more,
        )

    def start(self, *argv, **fields):
        return self.runtime.start(self.spec(*argv, **fields))

    def python(self, code, **fields):
        return self.start(sys.executable, "-S", "-c", code, **fields)

    def end(self, handle):
        ended = self.runtime.wait(handle, LONG_S)
        assert ended is not None, "the attempt did not end"
        return ended

    def gone(self, pid):
        """Return whether a process that a job named by its own number has ended."""
        return gone(pid)

    def session(self, handle, *argv, window=None):
        try:
            return self.runtime.session(handle, argv, window=window)
        except Unsupported as error:
            pytest.skip(f"Unsupported here: {error}")

    def heard(self, session, word=None):
        """Return what a session says up to a word, or to its end."""
        said = bytearray()

        def enough():
            data = session.read()
            said.extend(data or b"")
            return data == b"" if word is None else word in said

        until(enough, f"the session says {word!r}; it said {bytes(said)[-500:]!r}")
        return bytes(said)

    def log(self, handle):
        return self.runtime.logs(handle).decode()

    def said(self, handle, word):
        until(lambda: word in self.log(handle), f"the job says {word!r}; it said {self.log(handle)!r}")


def gone(pid):
    """Return whether a process has ended; whether its parent has collected it is that one's affair."""
    return not procfs.is_alive(pid, procfs.start_ticks(pid))


@pytest.mark.real
class RuntimeContract:
    """Inherit, and give a `bench` fixture: a `Bench` over the runtime under test."""

    def test_a_command_that_exits_with_0_is_completed(self, bench):
        ended = bench.end(bench.start("/bin/true"))
        assert ended.kind is ExitKind.COMPLETED
        assert ended.ended_at_s >= ended.started_at_s > 0

    def test_a_failed_command_keeps_its_code_and_the_end_of_its_output(self, bench):
        ended = bench.end(bench.start("sh", "-c", "for i in $(seq 100); do echo line $i; done; exit 7"))
        assert (ended.kind, ended.code) == (ExitKind.FAILED, 7)
        assert ended.log_tail.splitlines()[-1] == "line 100"
        assert len(ended.log_tail.splitlines()) == 20

    def test_a_kill_from_outside_is_signalled_and_never_out_of_memory(self, bench):
        ended = bench.end(bench.start("sh", "-c", "kill -9 $$"))
        assert (ended.kind, ended.signal) == (ExitKind.SIGNALLED, signal.SIGKILL)

    def test_a_program_that_does_not_exist_is_refused_at_the_start(self, bench):
        with pytest.raises(SpecError, match="/no/such/program"):
            bench.start("/no/such/program")
        assert not bench.runtime.list()

    def test_the_job_finds_its_lease_in_its_environment_and_in_a_file(self, bench):
        handle = bench.start("sh", "-c", 'cat "$TENURE_LEASE_FILE"; echo; echo "$TENURE_ATTEMPT $OMP_NUM_THREADS $GREETING"',
                             cpus=2.5, env={"GREETING": "hello"})  # fmt: skip
        bench.end(handle)
        lease, words = bench.log(handle).splitlines()
        assert json.loads(lease)["lease_id"] == "lease-1"
        assert json.loads(lease)["threads"] == 2
        assert words == "1 2 hello"

    def test_values_of_the_environment_are_not_written_to_the_state_folder(self, bench, state_dir):
        handle = bench.start("sleep", "60", env={"TOKEN": "very-secret"})
        for path in state_dir.rglob("*"):
            assert not path.is_file() or b"very-secret" not in path.read_bytes()
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)

    def test_the_result_file_comes_with_the_exit(self, bench):
        handle = bench.start("sh", "-c", """echo '{"state": "done", "n": 3}' > "$TENURE_WORKER_DIR/result.json" """)
        assert bench.end(handle).result == {"state": "done", "n": 3}

    def test_too_much_memory_ends_the_lease_with_a_witness(self, bench):
        code = (
            "import json, os, time\n"
            "try:\n    x = bytearray(SIZE << 20)\n    x[::4096] = b'x' * len(x[::4096])\n    time.sleep(60)\n"
            "except MemoryError as e:\n"
            "    out = open(os.environ['TENURE_WORKER_DIR'] + '/result.json', 'w')\n"
            "    json.dump({'state': 'failed', 'error': f'MemoryError: {e}'}, out)\n"
            "    raise SystemExit(1)\n"
        )
        for number, size_mib in enumerate((200, 2000)):
            handle = bench.python(code.replace("SIZE", str(size_mib)), memory=64 * MIB, lease=f"large-{number}")
            ended = bench.end(handle)
            assert ended.kind is ExitKind.OUT_OF_MEMORY, size_mib
            assert ended.witness

    def test_memory_that_is_reserved_and_never_touched_is_not_held_against_the_job(self, bench):
        code = "import mmap\nx = mmap.mmap(-1, 200 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nx[0] = 1"
        assert bench.end(bench.python(code, memory=64 * MIB)).kind is ExitKind.COMPLETED

    def test_a_tree_that_is_too_large_only_together_is_ended(self, bench):
        code = (
            "import os, time\n"
            "for i in range(3):\n    if os.fork() == 0: break\n"
            "x = bytearray(40 << 20); x[::4096] = b'x' * len(x[::4096])\ntime.sleep(60)"
        )
        ended = bench.end(bench.python(code, memory=100 * MIB))
        assert ended.kind is ExitKind.OUT_OF_MEMORY
        assert ended.witness
        assert ended.usage.peak_memory_bytes > 60 * MIB

    def test_a_double_forked_process_dies_with_the_lease(self, bench):
        code = (
            "import os, time\n"
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        print('daemon', os.getpid(), flush=True); time.sleep(600)\n    os._exit(0)\n"
            "os.wait()\nwhile 'daemon' not in open(os.environ['LOG']).read(): time.sleep(0.01)"
        )
        handle = bench.python(code, env={"LOG": str(bench.folder / "lease-1.log")})
        assert bench.end(handle).kind is ExitKind.COMPLETED
        assert bench.gone(int(bench.log(handle).split()[1]))

    def test_the_deadline_given_at_the_start_ends_the_job(self, bench):
        assert bench.end(bench.start("sleep", "60", slot_s=0.7 * SLOWNESS, grace_s=0.1)).kind is ExitKind.OUT_OF_TIME

    def test_the_deadline_ends_a_job_that_ignores_sigterm(self, bench):
        handle = bench.start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done", grace_s=0.3 * SLOWNESS)
        bench.said(handle, "ready")  # before that it would obey
        bench.runtime.renew(handle, deadline_boot_s=CLOCK.boot_s(), fence=1)
        ended = bench.end(handle)
        assert (ended.kind, ended.signal) == (ExitKind.OUT_OF_TIME, signal.SIGKILL)

    def test_renewal_moves_the_deadline_and_tells_the_job(self, bench):
        handle = bench.start("sleep", "60", slot_s=1.5 * SLOWNESS, grace_s=0.1)
        later = CLOCK.boot_s() + 300
        bench.runtime.renew(handle, deadline_boot_s=later, fence=1)
        assert json.loads((bench.folder / "lease-1/1/lease.json").read_text())["deadline_boot_s"] == later
        assert bench.runtime.wait(handle, 1.6 * SLOWNESS) is None
        bench.runtime.renew(handle, deadline_boot_s=CLOCK.boot_s(), fence=1)
        assert bench.end(handle).kind is ExitKind.OUT_OF_TIME

    def test_a_job_that_is_stopped_may_save_within_the_grace(self, bench):
        handle = bench.start("sh", "-c", "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done")
        bench.said(handle, "ready")
        bench.runtime.stop(handle, grace_s=10, fence=1)
        ended = bench.end(handle)
        assert (ended.kind, ended.log_tail.splitlines()[-1]) == (ExitKind.STOPPED, "saved")
        bench.runtime.stop(handle, grace_s=0, fence=1)  # once more changes nothing

    def test_memory_grows_and_shrinks_while_the_job_runs(self, bench):
        code = (
            "import os, time\nprint('ready', flush=True)\n"
            "while not os.path.exists('go'): time.sleep(0.01)\n"
            "x = bytearray(120 << 20); x[::4096] = b'x' * len(x[::4096]); print('grown', flush=True); time.sleep(60)"
        )
        handle = bench.python(code, memory=64 * MIB)
        bench.said(handle, "ready")
        bench.runtime.resize(handle, Envelope(memory_bytes=256 * MIB), fence=1)
        (bench.folder / "lease-1/1/go").touch()
        bench.said(handle, "grown")
        with pytest.raises(Refused, match="uses"):
            bench.runtime.resize(handle, Envelope(memory_bytes=64 * MIB), fence=1)
        bench.runtime.resize(handle, Envelope(memory_bytes=200 * MIB), fence=1)
        assert json.loads((bench.folder / "lease-1/1/lease.json").read_text())["envelope"]["memory_bytes"] == 200 * MIB
        assert bench.runtime.wait(handle, 0.2) is None
        assert bench.runtime.usage(handle).memory_bytes > 100 * MIB
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)

    def test_too_much_disk_ends_the_lease(self, bench):
        code = "import time; f = open('large', 'wb'); f.write(b'x' * (8 << 20)); f.flush(); time.sleep(60)"
        assert bench.end(bench.python(code, disk=4 * MIB)).kind is ExitKind.OUT_OF_DISK

    def test_orders_with_an_older_fence_are_refused(self, bench):
        handle = bench.start("sleep", "60", fence=5)
        with pytest.raises(StaleFence):
            bench.runtime.stop(handle, grace_s=0, fence=4)
        with pytest.raises(StaleFence):
            bench.runtime.renew(handle, deadline_boot_s=0, fence=4)
        with pytest.raises(StaleFence):
            bench.runtime.resize(handle, Envelope(), fence=4)
        with pytest.raises(StaleFence):
            bench.start("true", fence=4, attempt=2)
        with pytest.raises(Conflict):
            bench.start("true", fence=6, attempt=2)
        assert bench.runtime.wait(handle, 0) is None
        bench.runtime.stop(handle, grace_s=0, fence=6)
        assert bench.end(handle).kind is ExitKind.STOPPED

    def test_each_attempt_of_a_lease_keeps_its_own_record(self, bench):
        first = bench.start("sh", "-c", "exit 3")
        assert bench.end(first).code == 3
        second = bench.start("/bin/true", attempt=2, fence=2)
        assert bench.end(second).kind is ExitKind.COMPLETED
        assert bench.end(first).code == 3
        bench.runtime.forget("lease-1")
        with pytest.raises(NotFound):
            bench.runtime.attach("lease-1")

    def test_a_new_runtime_finds_what_an_older_one_started(self, bench, make_runtime):
        handle = bench.start("sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done")
        bench.said(handle, "ready")
        os.kill(bench.runtime.fork_server_pid, signal.SIGKILL)
        bench.runtime.close()
        later = make_runtime()
        assert later.attach("lease-1") == handle
        assert list(later.list()) == [handle]
        later.stop(handle, grace_s=5, fence=1)
        assert later.wait(handle, LONG_S).kind is ExitKind.STOPPED

    def test_starts_go_on_when_the_fork_server_was_killed(self, bench):
        bench.end(bench.start("/bin/true"))
        os.kill(bench.runtime.fork_server_pid, signal.SIGKILL)
        assert bench.end(bench.start("/bin/true", attempt=2)).kind is ExitKind.COMPLETED

    def test_a_killed_shim_leaves_nothing_running_and_a_record_that_says_so(self, bench):
        code = "import os, time\nif os.fork() == 0:\n    os.setsid()\nprint('pid', os.getpid(), flush=True); time.sleep(600)"
        handle = bench.python(code)
        until(lambda: bench.log(handle).count("pid") == 2, "both processes run")
        os.kill(handle.pid, signal.SIGKILL)
        ended = bench.end(handle)
        assert ended.kind is ExitKind.FAILED
        assert "shim lost" in ended.witness
        pids = [int(line.split()[1]) for line in bench.log(handle).splitlines()]
        until(lambda: all(map(bench.gone, pids)), f"{pids} are gone")

    def test_a_command_runs_inside_the_lease(self, bench):
        handle = bench.start("sleep", "60", env={"WORD": "inner"})
        found = bench.runtime.exec(handle, ["sh", "-c", "echo $WORD; exit 4"], timeout_s=LONG_S)
        assert found == (4, b"inner\n"), found
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)
        with pytest.raises(Conflict):
            bench.runtime.exec(handle, ["true"], timeout_s=1)

    def test_what_a_command_inside_left_running_ends_with_the_lease(self, bench):
        handle = bench.start("sleep", "60")
        _, output = bench.runtime.exec(handle, ["sh", "-c", "setsid sleep 600 & echo $!"], timeout_s=LONG_S)
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)
        until(lambda: bench.gone(int(output)), "the inner process is gone")

    def test_a_command_in_a_terminal_knows_its_window_and_ctrl_c_goes_inside(self, bench):
        code = (
            "import os, signal, sys, time\n"
            "signal.signal(signal.SIGWINCH, lambda *_: print('now', *os.get_terminal_size(), flush=True))\n"
            "try:\n"
            "    print(*os.get_terminal_size(), os.environ['TERM'], os.environ['WORD'], flush=True)\n"
            "    while True: time.sleep(0.05)\n"
            "except KeyboardInterrupt: sys.exit(3)\n"
        )
        handle = bench.start("sleep", "60", env={"WORD": "inner"})
        window = Window(rows=31, columns=97, term="dumb")
        session = bench.session(handle, sys.executable, "-S", "-c", code, window=window)
        bench.heard(session, b"97 31 dumb inner")
        session.resize(20, 50)
        bench.heard(session, b"now 50 20")
        session.write(b"\x03")
        assert until(session.code, "the command ends on Ctrl-C") == 3
        session.end()
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)
        with pytest.raises(Conflict):
            bench.session(handle, "true")

    def test_what_goes_into_a_pipe_comes_out_of_it_and_the_code_is_kept(self, bench):
        handle = bench.start("sleep", "60")
        session = bench.session(handle, "sh", "-c", "cat; exit 5")
        data, sent, came = os.urandom(300_000), 0, bytearray()
        end_s = time.monotonic() + LONG_S
        while len(came) < len(data) and time.monotonic() < end_s:
            sent += session.write(data[sent : sent + 65536]) if sent < len(data) else 0
            came += session.read() or b""
        session.close_input()
        came += bench.heard(session)
        assert came == data
        assert until(session.code, "the command ends with its input") == 5
        session.end()

    def test_a_session_that_is_ended_ends_its_command(self, bench):
        handle = bench.start("sleep", "60")
        for window in (Window(), None):
            session = bench.session(handle, "sh", "-c", "trap '' HUP; echo up; while :; do sleep 0.1; done", window=window)
            bench.heard(session, b"up")
            session.end()
            until(lambda: bench.runtime.usage(handle).processes == 1, "only the job is left")

    def test_a_profile_of_system_calls_holds_for_the_job_and_for_commands_inside(self, bench, tmp_path):
        profile = tmp_path / "seccomp.json"
        let_through = sorted(set(numbers(os.uname().machine)) - seccomp._NEVER - {"mkdir", "mkdirat"})
        rules = [
            {"names": let_through, "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ]
        profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
        refusal = ""
        try:
            handle = bench.start("sh", "-c", "mkdir made || echo refused; sleep 60", seccomp=str(profile))
        except Unsupported as error:
            refusal = str(error)
        if refusal:
            assert "seccomp" in refusal
            return
        bench.said(handle, "refused")
        code, output = bench.runtime.exec(handle, ["sh", "-c", "mkdir made || exit 9"], timeout_s=LONG_S)
        assert code == 9, output
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)
        failed = bench.end(bench.start("sh", "-c", "mkdir made", seccomp=str(profile), lease="lease-2"))
        assert failed.kind is ExitKind.FAILED
        assert str(profile) in failed.witness

    def test_a_profile_that_is_none_is_refused_at_the_start(self, bench, tmp_path):
        (tmp_path / "seccomp.json").write_text("{}")
        with pytest.raises((SpecError, Unsupported), match="seccomp"):
            bench.start("true", seccomp=str(tmp_path / "seccomp.json"))

    def test_sixteen_leases_run_at_once_and_end_each_for_itself(self, bench):
        handles = [bench.start("sh", "-c", f"exit {i}", lease=f"many-{i}") for i in range(16)]
        assert [bench.end(handle).code for handle in handles] == list(range(16))

    def test_usage_counts_processor_time_and_processes(self, bench):
        handle = bench.python("while True: pass")
        until(lambda: bench.runtime.usage(handle).cpu_s > 0.1, "processor time is counted")
        assert bench.runtime.usage(handle).processes == 1
        bench.runtime.stop(handle, grace_s=0, fence=1)
        assert bench.end(handle).usage.cpu_s > 0.1

    @pytest.mark.parametrize(
        "more",
        [
            {"image": "x"},
            {"mounts": {"/a": "/b"}},
            {"read_only_root": True},
            {"capabilities": ("x",)},
            {"network": "own"},
        ],
    )
    def test_what_a_process_cannot_honour_is_refused_with_the_reason(self, bench, more):
        with pytest.raises(Unsupported, match=next(iter(more))):
            bench.start("true", **more)

    def test_a_deadline_of_another_boot_is_refused(self, bench):
        spec = bench.spec("true")
        with pytest.raises(SpecError, match="boot"), contextlib.ExitStack():
            bench.runtime.start(StartSpec(**{name: getattr(spec, name) for name in spec.__slots__} | {"boot_id": "other"}))
