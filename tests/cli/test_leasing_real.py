"""A workspace as its holder uses it, against a real broker, agent and processes."""

import json
import os
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from .test_real import command, living, until

pytestmark = pytest.mark.real
SAYS = "import sys,time\nfor n in range(3): print('line', n, flush=True); time.sleep(0.2)\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a broker that stays; afterwards nothing of it may live."""
    folder = tmp_path_factory.mktemp("leasing") / "home"
    done = subprocess.run(
        [*command("up", "--cpus", "2", "--memory", "512MiB"), "--home", str(folder)], timeout=60, capture_output=True
    )
    assert done.returncode == 0
    yield folder
    subprocess.run([*command("down"), "--home", str(folder)], timeout=60, check=True)
    until(lambda: not living(folder), within_s=30)


@pytest.fixture
def tenure(home):
    def call(*argv, code=0):
        env = {**os.environ, "TENURE_HOME": str(home)}
        done = subprocess.run(command(*argv), env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def workspace(tenure):
    held = json.loads(tenure("lease", "--cpus", "1", "--memory", "128MiB", "--for", "10min", "--json").stdout)
    yield held
    tenure("release", held["id"])


def state_of(tenure, lease_id):
    leases = json.loads(tenure("leases", "--json").stdout)
    return next(lease for lease in leases if lease["id"] == lease_id)


def test_a_workspace_needs_a_broker_that_stays(tmp_path):
    env = {**os.environ, "TENURE_HOME": str(tmp_path / "home")}
    done = subprocess.run(command("lease"), env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "tenure up" in done.stderr
    assert not living(tmp_path / "home")


def test_a_holder_gets_in_renews_resizes_watches_and_gives_it_back(tenure):
    said = tenure("lease", "--cpus", "1", "--memory", "128MiB", "--for", "10min").stdout
    lease_id = said.split()[1]
    assert f"tenure exec -it {lease_id} -- bash" in said

    done = tenure(
        "exec", lease_id, "--", sys.executable, "-c", "import os; print(os.environ['TENURE_LEASE_ID']); exit(7)", code=7
    )
    assert done.stdout == f"{lease_id}\n"
    assert tenure("exec", lease_id, "--", "no-such-program", code=127).stdout

    before = state_of(tenure, lease_id)
    assert "ends" in tenure("renew", lease_id, "--for", "2h").stdout
    after = state_of(tenure, lease_id)
    assert 6600 < after["ends_at_s"] - before["ends_at_s"] + 600 < 7800
    assert "total" in tenure("renew", lease_id, "--for", "3000h").stdout

    tenure("resize", lease_id, "--memory", "256MiB", "--cpus", "1.5")
    resized = state_of(tenure, lease_id)
    assert (resized["envelope"]["cpus"], resized["envelope"]["memory_bytes"]) == (1.5, 256 << 20)
    assert resized["attempt"] == before["attempt"], "it was started again"
    assert "node has" in tenure("resize", lease_id, "--memory", "4GiB", code=3).stderr

    (seen,) = json.loads(tenure("top", "--json").stdout)
    assert seen["lease"]["id"] == lease_id
    assert seen["left_s"] > 6000
    assert f"of {resized['envelope']['cpus']:g}" in tenure("top", "--once").stdout

    run = before["run_id"]
    assert next(r for r in json.loads(tenure("runs", "--json").stdout) if r["id"] == run)["state"] == "running"
    tenure("release", lease_id)
    assert state_of(tenure, lease_id)["end_reason"] == "released"
    until(
        lambda: next(r for r in json.loads(tenure("runs", "--json").stdout) if r["id"] == run)["state"] == "done", within_s=20
    )
    assert "nothing runs in it" in tenure("exec", lease_id, "--", "true", code=5).stderr


def test_what_a_command_in_a_workspace_writes_is_followed_to_its_end(tenure):
    held = json.loads(tenure("lease", "--memory", "64MiB", "--for", "1min", "--json", "--", sys.executable, "-c", SAYS).stdout)
    assert tenure("logs", held["id"], "-f").stdout == "line 0\nline 1\nline 2\n"
    assert state_of(tenure, held["id"])["end_reason"] == "completed"


def test_a_command_that_takes_too_long_inside_is_ended(tenure, workspace):
    assert "did not end within" in tenure("exec", workspace["id"], "--timeout", "300ms", "--", "sleep", "60", code=6).stderr


class Screen:
    """A terminal with a program in it, as somebody before it would see it."""

    def __init__(self, argv, home, *, rows, columns):
        self._ours, its = os.openpty()
        self.before = termios.tcgetattr(its)
        termios.tcsetwinsize(its, (rows, columns))
        env = {**os.environ, "TENURE_HOME": str(home), "TERM": "dumb"}
        self.program = subprocess.Popen(argv, env=env, stdin=its, stdout=its, stderr=its, start_new_session=True)
        self._its, self._seen = its, b""

    def shows(self, word, within_s=30.0):
        end_s = time.monotonic() + within_s
        while word not in self._seen:
            assert time.monotonic() < end_s, f"not shown: {word!r}; shown: {self._seen[-2000:]!r}"
            if select.select([self._ours], [], [], 0.2)[0]:
                self._seen += os.read(self._ours, 65536)
        self._seen = self._seen.split(word, 1)[1]

    def type(self, text):
        os.write(self._ours, text)

    def becomes(self, rows, columns):
        termios.tcsetwinsize(self._ours, (rows, columns))
        self.program.send_signal(signal.SIGWINCH)  # the kernel does so where the program has a controlling terminal

    def close(self):
        """Return the program's exit code, and whether the terminal is as it was."""
        code = self.program.wait(30)
        same = termios.tcgetattr(self._its) == self.before
        os.close(self._ours)
        os.close(self._its)
        return code, same


def test_a_shell_inside_knows_the_window_hears_ctrl_c_and_gives_its_code(home, workspace):
    screen = Screen(command("exec", "-it", workspace["id"], "--", "sh"), home, rows=33, columns=101)
    python = f"{sys.executable} -S -c"
    screen.type(f"{python} 'import os; print(\"size\", *os.get_terminal_size())'\n".encode())
    screen.shows(b"size 101 33")
    screen.becomes(20, 50)
    screen.type(f"{python} 'import os; print(\"size\", *os.get_terminal_size())'\n".encode())
    screen.shows(b"size 50 20")
    screen.type(
        f'echo $TENURE_LEASE_ID; {python} \'import time; print("sle" + "eping", flush=True); time.sleep(100)\'\n'.encode()
    )
    screen.shows(workspace["id"].encode())
    screen.shows(b"sleeping")
    screen.type(b"\x03")
    screen.type(b"echo after $?\n")
    screen.shows(b"after 130")
    screen.type(b"exit 7\n")
    assert screen.close() == (7, True)


def test_a_terminal_is_put_back_when_its_program_is_ended(home, workspace):
    screen = Screen(
        command("exec", "-t", workspace["id"], "--", "sh", "-c", "echo be''gun; sleep 60"), home, rows=10, columns=40
    )
    screen.shows(b"begun")
    screen.program.send_signal(signal.SIGTERM)
    assert screen.close() == (128 + signal.SIGTERM, True)


def test_a_pipe_goes_through_a_command_inside(home, tenure, workspace):
    data = os.urandom(1 << 20)
    argv = command("exec", "-i", workspace["id"], "--", "sh", "-c", "cat; exit 5")
    done = subprocess.run(argv, env={**os.environ, "TENURE_HOME": str(home)}, input=data, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout == data, done.stderr) == (5, True, b"")
    assert "input or output here is none" in tenure("exec", "-t", workspace["id"], "--", "sh", code=2).stderr
    assert (
        "did not end within" in tenure("exec", "-i", "--timeout", "300ms", workspace["id"], "--", "sleep", "60", code=6).stderr
    )


def test_what_a_signal_ended_inside_gives_the_code_of_a_shell(tenure, workspace):
    tenure("exec", workspace["id"], "--", "sh", "-c", "kill -9 $$", code=128 + signal.SIGKILL)


def test_a_reservation_is_kept_told_and_given_up(tenure):
    said = tenure("lease", "--cpus", "2", "--memory", "256MiB", "--for", "1h", "--at", "2099-01-01T20:00", code=3).stderr
    assert "past what tenant default may have, 14d" in said
    tenure("quota", "*", "--ahead", "none")
    said = tenure("lease", "--cpus", "2", "--memory", "256MiB", "--for", "1h", "--at", "2099-01-01T20:00").stdout
    lease_id = said.split()[1]
    assert "its room is kept from then on" in said
    assert state_of(tenure, lease_id)["state"] == "reserved"
    tenure("release", lease_id)
    assert state_of(tenure, lease_id)["end_reason"] == "released"


def test_a_tenants_quota_is_set_listed_held_and_taken_away(tenure):
    tenure("quota", "alice", "--cpus", "0.5", "--memory", "none")
    assert "alice   max_cpus   0.5" in tenure("quota", "alice").stdout
    assert "its quota is 0.5" in tenure("lease", "--memory", "64MiB", "--tenant", "alice", code=3).stderr
    tenure("quota", "alice", "--unset")
    assert "alice" not in json.loads(tenure("quota", "--json").stdout)
    assert "whose policy" in tenure("quota", "--cpus", "1", code=2).stderr
    assert "number" in tenure("quota", "alice", "--cpus", "many", code=2).stderr


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
print("working", flush=True)
time.sleep(100)
"""


def test_a_workspace_past_its_guaranteed_time_saves_and_makes_room_for_whose_turn_it_is(tenure):
    tenure("up", "--order", "las")
    tenure("quota", "*", "--guaranteed", "1s")
    try:
        wide = ("lease", "--cpus", "2", "--memory", "64MiB", "--json", "--", sys.executable, "-c", SAVES)
        first = json.loads(tenure(*wide).stdout)
        until(lambda: "working" in tenure("logs", first["id"]).stdout, within_s=20)
        second = json.loads(tenure("lease", "--cpus", "0.5", "--memory", "64MiB", "--json").stdout)
        assert second["state"] == "active"
        ended = state_of(tenure, first["id"])
        assert ended["end_reason"] == "preempted"
        assert "gives way to" in ended["end_detail"]
        assert tenure("logs", first["id"]).stdout.endswith("saved\n")
        tenure("release", second["id"])
    finally:
        tenure("quota", "*", "--unset")
        tenure("up", "--order", "fifo")


def test_an_idle_workspace_is_reclaimed_and_one_that_computes_with_nobody_connected_is_not(tenure):
    tenure("quota", "*", "--idle-reclaim", "3s")
    try:
        small = ("lease", "--cpus", "0.5", "--memory", "64MiB", "--json")
        idle = json.loads(tenure(*small).stdout)
        busy = json.loads(tenure(*small, "--", sys.executable, "-c", "while True: pass").stdout)
        until(lambda: state_of(tenure, idle["id"])["state"] == "ended", within_s=90)
        assert state_of(tenure, idle["id"])["end_reason"] == "reclaimed_idle"
        assert state_of(tenure, busy["id"])["state"] == "active"
        tenure("release", busy["id"])
    finally:
        tenure("quota", "*", "--unset")


def test_a_workspace_that_does_not_fit_is_refused_and_leaves_no_open_run(tenure):
    assert "would not fit" in tenure("lease", "--memory", "1TiB", code=3).stderr
    assert not [run for run in json.loads(tenure("runs", "--json").stdout) if run["state"] == "running"]


def test_a_slot_that_nobody_renews_ends_the_lease_and_frees_its_node(tenure):
    held = json.loads(tenure("lease", "--memory", "64MiB", "--for", "1500ms", "--json").stdout)
    until(lambda: state_of(tenure, held["id"])["state"] == "ended", within_s=20)
    assert state_of(tenure, held["id"])["end_reason"] == "expired"
