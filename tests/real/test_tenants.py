"""A home that root shares with real users of this machine, and what one of them tries against the others and against root.

Two users are made for it, without a password, and removed afterwards. It needs root, useradd, and a Python of this version that
these users can read; else it says what is missing.
"""

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import until

from tenure.broker import client
from tenure.errors import Unavailable

pytestmark = pytest.mark.real

SOURCE = Path(__file__).parents[2] / "src"
NAMES = ("tntest-a", "tntest-b")
LEASE = ("lease", "--cpus", "0.1", "--memory", "64MiB", "--for", "10min", "--grace", "1s", "--right-size", "off")


def _user_python():
    """Return a command that every user can run this package with, and its PYTHONPATH; None when there is none."""
    packages = f"{SOURCE}:{sysconfig.get_path('purelib')}"
    for program in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [program, "-c", "import tenure.verbs"], env={"PYTHONPATH": packages, "PATH": os.defpath}, cwd="/",
                capture_output=True, timeout=60, check=False, user=65534, group=65534, extra_groups=(),
            )  # fmt: skip
            if done.returncode == 0:
                return program, packages
    return None


class Machine:
    """A shared home, its broker, and the users who come to it."""

    def __init__(self, home, program, packages, shares):
        self.home, self.program, self.packages, self.shares = home, program, packages, shares
        self._env = {"PYTHONPATH": packages, "PATH": os.defpath, "TENURE_HOME": str(home), "TENURE_SHARES_FILE": shares}

    def run(self, who, *words, check=True, program="tenure", env=(), timeout=60):
        """Run a command as a user, ``root`` for ourselves; return its output."""
        argv = [self.program, "-m", "tenure.cli", *words] if program == "tenure" else list(words)
        became = {}
        if who != "root":
            entry = pwd.getpwnam(who)
            became = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": ()}
        done = subprocess.run(
            argv,
            env={**self._env, **dict(env)},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **became,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done if not check else done.stdout

    def lease(self, who, *command, env=()):
        return json.loads(self.run(who, *LEASE, "--json", "--", *command, env=env))

    def python(self, who, code, *words, check=True):
        return self.run(who, self.program, "-c", code, *words, program="", check=check)

    def close(self):
        """End the home, and remove it with its sockets."""
        note = self.home / "socket-dir"
        sockets = Path(note.read_text()) if note.exists() else None
        self.run("root", "down", check=False)
        for folder in filter(None, (self.home, sockets)):
            shutil.rmtree(folder, ignore_errors=True)

    def folder(self, lease):
        return self.home / "runs" / lease["run_id"]


@pytest.fixture(scope="module")
def users():
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("users can be made by root alone, with useradd")
    made = []
    try:
        for name in NAMES:
            done = subprocess.run(["useradd", "-M", "-s", "/bin/sh", name], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no user could be made: {done.stderr.strip()}")
            made.append(name)
        yield made
    finally:
        for name in made:
            subprocess.run(["userdel", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def machine(users):
    if (found := _user_python()) is None:
        pytest.skip("no Python of this version, with its packages, can be read by every user")
    home = Path(tempfile.mkdtemp(prefix="tenure-shared-", dir="/var/lib"))
    made = Machine(home, *found, str(home / "shares.json"))
    try:
        made.run("root", "up", "--shared", "--cpus", "1", "--memory", "1GiB", env={"SECRET_OF_ROOT": "s3cret"}.items())
        yield made
    finally:
        made.close()


@pytest.fixture
def held(machine):
    """A lease of the first user that says who it is, and what is its own."""
    lease = machine.lease(NAMES[0], "sh", "-c", "id -u; echo private-output; exec sleep 300", env={"OWN": "x"}.items())
    yield lease
    machine.run("root", "release", lease["id"], check=False)


def uid(name):
    return pwd.getpwnam(name).pw_uid


def test_a_lease_runs_as_its_tenant_and_its_files_are_that_users(machine, held):
    assert held["tenant"] == NAMES[0]
    until(lambda: "private-output" in machine.run(NAMES[0], "logs", held["id"]), "it says who it is")
    assert machine.run(NAMES[0], "logs", held["id"]).split()[0] == str(uid(NAMES[0]))
    assert machine.run(NAMES[0], "exec", held["id"], "--", "id", "-u").strip() == str(uid(NAMES[0]))
    owners = {path.lstat().st_uid for path in (machine.folder(held), *machine.folder(held).rglob("*"))}
    assert owners == {uid(NAMES[0])}
    assert machine.folder(held).stat().st_mode & 0o777 == 0o700
    said = machine.run(NAMES[0], "exec", held["id"], "--", "sh", "-c", "echo $HOME; echo $USER; umask; cat /proc/self/status")
    assert said.split()[0] == str(machine.home / "homes" / NAMES[0])
    assert said.split()[1] == NAMES[0]
    assert "CapEff:\t0000000000000000" in said


def test_another_user_neither_sees_nor_touches_a_lease(machine, held):
    lease, eve = held["id"], NAMES[1]
    for answer in _speak(machine, eve, *[[op, {}] for op in ("leases", "live", "events", "runs", "trials", "tenants")]):
        assert answer["result"] == [], answer
    aimed = [
        ["lease", {"lease_id": lease}],
        ["release", {"lease_ids": [lease]}],
        ["renew", {"lease_id": lease, "for_s": 60.0}],
        ["resize", {"lease_id": lease, "envelope": {"cpus": 0.01}}],
        ["usage", {"lease_id": lease}],
    ]
    for answer in _speak(machine, eve, *aimed):
        assert "does not exist" in answer["error"]["message"], answer
    for words in (["logs", lease], ["exec", lease, "--", "id"]):
        done = machine.run(eve, *words, check=False)
        assert f"lease '{lease}' does not exist" in done.stderr, words
    concern_all = [
        ["shutdown", {}],
        ["collect_garbage", {}],
        ["backup", {"path": "/tmp/eve.backup"}],
        ["set_policy", {"tenant": "*"}],
        ["set_role", {"tenant": eve, "role": "admin"}],
        ["add_node", {"name": "eve"}],
        ["remove_node", {"name": "local"}],
    ]
    for answer in _speak(machine, eve, *concern_all):
        assert answer["error"]["kind"] == "Refused", answer
    assert machine.run(eve, "lease", "--tenant", NAMES[0], "--", "id", check=False).returncode != 0
    assert json.loads(machine.run(NAMES[0], "leases", "--live", "--json"))[0]["id"] == lease


def test_the_files_of_others_and_of_the_broker_are_closed(machine, held):
    code = """
import os, sys
found = []
home, run = sys.argv[1:]
for top in (home, os.path.join(home, "runs"), os.path.join(home, "homes"), run):
    try:
        found.append(("listed", top, os.listdir(top)))
    except OSError:
        pass
names = ["ledger.sqlite", "ledger.sqlite-wal", "broker.log", "broker.json", "broker.lock", "nodes/local/agent.log",
         "nodes/local/term.json", "shares.json"]
for path in [os.path.join(home, name) for name in names] + [run + "/workspace/logs/0.1.log",
             run + "/workspace/workers/0/1/lease.json"]:
    for flags in (os.O_RDONLY, os.O_WRONLY):
        try:
            os.close(os.open(path, flags))
            found.append((flags, path))
        except OSError:
            pass
for path in (home + "/made", home + "/runs/made", home + "/homes/made", home + "/trash/made"):
    try:
        os.mkdir(path)
        found.append(("made", path))
    except OSError:
        pass
print(found)
"""
    said = machine.python(NAMES[1], code, str(machine.home), str(machine.folder(held)))
    assert [one for one in eval(said) if not one[1].endswith("shares.json")] == []


def test_what_root_and_others_have_in_their_environment_is_not_to_be_had(machine, held):
    code = """
import os, sys
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "mem", "fd/3", "cwd", "root"):
        path = f"/proc/{pid}/{name}"
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                continue
            os.close(os.open(path, os.O_RDONLY))
            found.append(path)
        except OSError:
            pass
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            if b"s3" + b"cret" in stream.read():
                found.append(pid)
    except OSError:
        pass
print(found)
"""
    assert machine.python(NAMES[1], code).strip() == "[]"
    done = machine.run(NAMES[1], *LEASE, "--json", "--", "sh", "-c", "env; sleep 20")
    lease = json.loads(done)
    until(lambda: "TENURE_LEASE_ID" in machine.run(NAMES[1], "logs", lease["id"]), "it tells its environment")
    said = machine.run(NAMES[1], "logs", lease["id"])
    assert "s3cret" not in said
    assert "OWN=" not in said
    machine.run(NAMES[1], "release", lease["id"])


WIRE = """
import json, socket, sys
line = socket.socket(socket.AF_UNIX)
line.settimeout(20)
line.connect(sys.argv[1])
stream = line.makefile("rb")
for op, args in json.loads(sys.argv[2]):
    line.sendall(json.dumps({"id": 1, "op": op, "args": args}).encode() + b"\\n")
    print(stream.readline().decode().strip())
"""


def _speak(machine, who, *calls):
    """Speak the wire as a user, without any client of ours; return the answers."""
    sock = Path((machine.home / "socket-dir").read_text()) / "broker.sock"
    said = machine.python(who, WIRE, str(sock), json.dumps([["hello", {"version": 1, "who": "root"}], *calls]))
    return [json.loads(line) for line in said.splitlines()][1:]


def test_another_tenants_name_run_or_gang_cannot_be_claimed_over_the_wire(machine, held):
    run = {"id": held["run_id"], "name": "x", "tenant": NAMES[0], "job_file": "", "source": ""}
    member = {"worker": 0, "envelope": {"cpus": 0.1, "memory_bytes": 1 << 26}, "command": {"argv": ["id"]}}
    gang = {"gang_id": "g-eve", "run_id": held["run_id"], "stage": "workspace", "members": [member]}
    answers = _speak(
        machine,
        NAMES[1],
        ["submit_run", {"run": run}],
        ["submit_run", {"run": run | {"tenant": "default"}}],
        ["submit_run", {"run": run | {"id": "../../etc", "tenant": "default"}}],
        ["request_gang", gang],
        ["request_gang", gang | {"tenant": "root"}],
        ["request_gang", gang | {"gang_id": held["gang_id"]}],
        ["set_run", {"run_id": held["run_id"], "state": "failed"}],
        ["no_such_operation", {}],
    )
    assert all("error" in answer for answer in answers), answers
    assert not any(NAMES[0] in json.dumps(answer) for answer in answers[1:]), answers


def test_a_users_own_command_cannot_have_what_is_roots(machine):
    run = {"id": "r-eve-own", "name": "x", "tenant": "default", "job_file": "", "source": ""}
    member = {"worker": 0, "envelope": {"cpus": 0.1, "memory_bytes": 1 << 26}}
    gang = {"gang_id": "g-eve-own", "run_id": "r-eve-own", "stage": "s"}
    wrong = [
        {"argv": ["id"], "network": "netns:any"},
        {"argv": ["id"], "ports": {"a": 22}, "runtime": "container"},
        {"argv": ["id"], "secrets": ["SECRET_OF_ROOT"]},
        {"argv": ["id"], "runtime": "microvm"},
    ]
    calls = [["request_gang", gang | {"members": [member | {"command": command}]}] for command in wrong]
    (submitted, *refused) = _speak(machine, NAMES[1], ["submit_run", {"run": run}], *calls)
    assert submitted["result"]["tenant"] == NAMES[1]
    assert all(answer["error"]["kind"] == "Refused" for answer in refused), refused
    assert (machine.home / "runs" / "r-eve-own").stat().st_uid == uid(NAMES[1])


def test_links_in_a_users_own_folders_lead_root_nowhere(machine):
    secret = machine.home / "secret-of-root"
    secret.write_text("of root")
    secret.chmod(0o600)
    target = machine.home / "target"
    target.mkdir(mode=0o700)
    (target / "logs").mkdir()
    (target / "logs" / "kept").write_text("kept")
    lease = machine.lease(NAMES[1], "sleep", "300")
    stage = machine.folder(lease) / "workspace"
    attack = f"""
import os, shutil
stage = {str(stage)!r}
worker = stage + "/workers/0/1"
for name in ("lease.json", "result.json", "notice.json", "lease.json.1.tmp"):
    try:
        os.unlink(f"{{worker}}/{{name}}")
    except OSError:
        pass
    os.symlink({str(secret)!r}, f"{{worker}}/{{name}}")
os.rename(stage + "/logs", stage + "/logs.mine")
os.symlink({str(target)!r}, stage + "/logs")
os.mkfifo(worker + "/fifo")
"""
    machine.python(NAMES[1], attack)
    machine.run(NAMES[1], "renew", lease["id"], "--for", "30min")
    machine.run(NAMES[1], "resize", lease["id"], "--cpus", "0.05")
    ended = json.loads(machine.run(NAMES[1], "release", lease["id"], "--json"))
    assert ended["state"] == "ended"
    assert (
        "of root"
        not in machine.run(NAMES[1], "events", "--json") + machine.run(NAMES[1], "logs", lease["id"], check=False).stdout
    )
    machine.run("root", "gc", "--older-than", "0s", "--forget-after", "0s", "--keep-runs", "0")
    assert secret.read_text() == "of root"
    assert (target / "logs" / "kept").read_text() == "kept"
    assert sorted(path.name for path in target.iterdir()) == ["logs"]


def test_a_fifo_in_the_place_of_a_log_holds_nobody_up(machine):
    lease = machine.lease(NAMES[1], "sleep", "300")
    log = machine.folder(lease) / "workspace" / "logs" / "0.1.log"
    machine.python(NAMES[1], f"import os; os.unlink({str(log)!r}); os.mkfifo({str(log)!r})")
    assert machine.run("root", "logs", lease["id"], check=False, timeout=30).stdout.strip() == ""
    ended = json.loads(machine.run(NAMES[1], "release", lease["id"], "--json"))
    assert ended["end_reason"] == "released"
    other = machine.lease(NAMES[0], "true")
    assert other["tenant"] == NAMES[0]


def test_root_writes_nothing_into_a_run_of_a_tenants(machine, held):
    for words in (["report", held["run_id"]], ["run", "--resume", held["run_id"]]):
        done = machine.run("root", *words, check=False)
        assert done.returncode != 0
        assert "sudo -u" in done.stderr


def test_a_user_who_answers_in_the_brokers_place_is_not_spoken_to(machine):
    folder = Path(tempfile.mkdtemp(prefix="tn-fake-", dir="/tmp"))
    entry = pwd.getpwnam(NAMES[1])
    code = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listening", flush=True)
line, _ = server.accept()
line.settimeout(20)
print(line.recv(100))
"""
    try:
        (folder / "socket-dir").write_text(str(folder))  # even in root's own folder: who listens counts
        os.chmod(folder, 0o777)
        fake = subprocess.Popen(
            [machine.program, "-c", code, str(folder / "broker.sock")], stdout=subprocess.PIPE, text=True, cwd="/",
            user=entry.pw_uid, group=entry.pw_gid, extra_groups=(),
        )  # fmt: skip
        with fake:
            try:
                assert fake.stdout.readline().strip() == "listening"
                with pytest.raises(Unavailable, match=NAMES[1]):
                    client._open(folder, "root")
                assert fake.stdout.read().strip() == "b''"
            finally:
                fake.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_an_admin_sees_and_ends_what_is_others_and_runs_nothing_in_it(machine, held):
    machine.run("root", "tenants", "role", NAMES[1], "admin")
    try:
        assert held["id"] in [lease["id"] for lease in json.loads(machine.run(NAMES[1], "leases", "--json"))]
        assert "only that one, or root" in machine.run(NAMES[1], "exec", held["id"], "--", "id", check=False).stderr
        assert "its tenant's own" in machine.run(NAMES[1], "logs", held["id"], check=False).stderr
        assert json.loads(machine.run(NAMES[1], "release", held["id"], "--json"))["state"] == "ended"
        by = [event["who"] for event in json.loads(machine.run("root", "events", "--json")) if event["lease_id"] == held["id"]]
        assert f"admin:{NAMES[1]}" in by
    finally:
        machine.run("root", "tenants", "role", NAMES[1], "tenant")


def test_a_user_who_opens_many_connections_is_told_to_stop_and_others_are_answered(machine):
    sock = Path((machine.home / "socket-dir").read_text()) / "broker.sock"
    code = f"""
import socket
lines = []
for _ in range(80):
    line = socket.socket(socket.AF_UNIX)
    line.connect({str(sock)!r})
    lines.append(line)
told = 0
for line in lines[64:]:
    line.settimeout(20)
    told += b"connections" in line.recv(1000)
print(told)
"""
    begun_s = time.monotonic()
    assert int(machine.python(NAMES[1], code)) == 16
    machine.run(NAMES[0], "leases")
    assert time.monotonic() - begun_s < 60


@pytest.mark.docker
def test_a_container_runs_as_its_tenant_and_shows_it_nothing_that_the_tenant_cannot_reach(docker, machine):
    # Its node is another one, whose agent finds the engine of these tests.
    closed = machine.home / "closed"
    (closed / "open").mkdir(parents=True)
    (closed / "open" / "file").write_text("behind a closed door")
    closed.chmod(0o700)
    own = Machine(machine.home.with_name(machine.home.name + "-boxes"), machine.program, machine.packages, machine.shares)
    own.home.mkdir(mode=0o711)
    try:
        own.run(
            "root", "up", "--shared", "--cpus", "1", "--memory", "1GiB", env={"DOCKER_HOST": f"unix://{docker.socket}"}.items()
        )
        words = [
            "lease",
            "--runtime",
            "container",
            "--memory",
            "128MiB",
            "--cpus",
            "0.5",
            "--right-size",
            "off",
            "--json",
            "--",
        ]
        look = "id -u; id -g; touch $HOME/made; grep CapEff /proc/self/status; sleep 300"
        lease = json.loads(own.run(NAMES[0], *words, "sh", "-c", look, timeout=100))
        until(lambda: "CapEff" in own.run(NAMES[0], "logs", lease["id"]), "it tells who it is")
        entry = pwd.getpwnam(NAMES[0])
        assert own.run(NAMES[0], "logs", lease["id"]).split()[:2] == [str(entry.pw_uid), str(entry.pw_gid)]
        assert (own.home / "homes" / NAMES[0] / "made").stat().st_uid == entry.pw_uid
        own.run(NAMES[0], "release", lease["id"])
        run = {"id": "r-mounts", "name": "x", "tenant": "default", "job_file": "", "source": ""}
        envelope = {"cpus": 0.1, "memory_bytes": 1 << 26}
        command = {"argv": ["cat", "/data/file"], "runtime": "container", "mounts": {str(closed / "open"): "/data:ro"}}
        gang = {"gang_id": "g-mounts", "run_id": "r-mounts", "stage": "s"}
        gang |= {"members": [{"worker": 0, "envelope": envelope, "command": command}]}
        (_, asked) = _speak(own, NAMES[0], ["submit_run", {"run": run}], ["request_gang", gang])
        named = {"lease_ids": [asked["result"][0]["id"]], "timeout_s": 60.0}
        ((view,),) = [answer["result"] for answer in _speak(own, NAMES[0], ["wait_leases", named])]
        assert "could not be started" in view["lease"]["end_detail"]
        assert "does not exist" in view["lease"]["end_detail"] or "cannot be looked at" in view["lease"]["end_detail"]
        assert "behind a closed door" not in json.dumps(view)
    finally:
        own.close()
