"""What runs in a container tries to get out of it, to others, to this machine and past its bounds."""

import json
import socket
import subprocess
import sys

import pytest
from tests import attacks
from tests.contracts.runtime_contract import LONG_S, MIB, until
from tests.runtimes.test_container import bench, make_runtime, shared, state_dir  # noqa: F401
from tests.targets import SERVER, address_of_this_machine, services_of_this_machine, targets_of

from tenure.errors import SpecError, Unsupported
from tenure.protocols import ExitKind

pytestmark = [pytest.mark.real, pytest.mark.docker]


@pytest.fixture
def outcomes(docker, bench, state_dir, tmp_path):  # noqa: F811
    """What became of all attempts of one container, with another tenant's beside it."""
    victim = bench.python(SERVER, lease="victim", network="tenant:bob", mounts={}, ports={"http": 7000})
    bench.said(victim, "listening")
    name = bench.runtime._container("victim", 1)
    with services_of_this_machine() as services:
        network = bench.runtime._tenant_networks(bench.runtime._engine()).ensure("alice")
        targets = targets_of(docker, network, tmp_path, name) | services
        targets |= {"other_folder": str(bench.folder / "victim/1"), "other_published": 7000, "state": str(state_dir)}
        targets |= {"pids": 64, "memory": 256 * MIB}
        attacker = bench.start(
            sys.executable, "-S", "-c", attacks.program(),
            lease="attacker", mounts={}, env={"TARGETS": json.dumps(targets)}, pids_max=64, memory=256 * MIB, disk=64 * MIB,
        )  # fmt: skip
        ended = bench.runtime.wait(attacker, 90)
    assert ended is not None
    found = attacks.outcomes(bench.runtime.logs(attacker, max_bytes=1 << 20).decode())
    assert ended.kind is ExitKind.COMPLETED, (ended, bench.log(attacker))
    return found


def test_no_attempt_to_get_out_succeeds(outcomes):
    assert len(outcomes) >= 40
    assert not {name: entry for name, entry in outcomes.items() if entry["escaped"]}


def test_a_neighbour_of_the_same_tenant_can_be_reached(docker, bench):  # noqa: F811
    first = bench.python(SERVER, lease="first")
    bench.said(first, "listening")
    name = bench.runtime._container("first", 1)
    code = f"import urllib.request; print(urllib.request.urlopen('http://{name}:7000/lease.json', timeout=5).status)"
    second = bench.python(code, lease="second")
    assert bench.end(second).kind is ExitKind.COMPLETED
    assert bench.log(second).strip() == "200"


def test_a_published_port_is_reached_from_this_machines_loopback_alone(docker, bench):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    handle = bench.python(SERVER.replace("7000", str(port)), ports={"http": port})
    bench.said(handle, "listening")
    with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
        line.sendall(b"GET /lease.json HTTP/1.0\r\n\r\n")
        assert b"200" in line.recv(100)
    address = address_of_this_machine()
    if not address.startswith("127."):
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)


def test_a_bomb_of_memory_or_of_output_ends_its_own_lease_alone(bench):  # noqa: F811
    quiet = bench.start("sleep", "60", lease="quiet")
    memory = bench.python("x = []\nwhile True: x.append(bytearray(1 << 24))", lease="memory", memory=64 * MIB)
    output = bench.start("sh", "-c", "while :; do echo $PATH$PATH$PATH$PATH; done", lease="output", disk=8 * MIB)
    for handle, kind in ((memory, ExitKind.OUT_OF_MEMORY), (output, ExitKind.OUT_OF_DISK)):
        ended = bench.runtime.wait(handle, 3 * LONG_S)
        assert ended is not None and ended.kind is kind, ended  # noqa: PT018
    assert bench.runtime.wait(quiet, 0) is None


def test_a_result_that_is_a_link_to_a_file_of_this_machine_is_not_read(bench, tmp_path):  # noqa: F811
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    ended = bench.end(bench.start("sh", "-c", f'ln -s {secret} "$TENURE_WORKER_DIR/result.json"'))
    assert ended.result is None


def test_a_path_that_leads_to_the_engine_or_to_this_machines_own_files_is_not_mounted(docker, bench, tmp_path):  # noqa: F811
    link = tmp_path / "innocent"
    link.symlink_to("/var/run")
    for source in (docker.socket, docker.folder, docker.folder.parent, "/", "/etc", "/proc", "/dev", "/var/lib", link):
        with pytest.raises(Unsupported, match="mounts"):
            bench.start("true", mounts={str(source): "/data"})
    for inside in ("/usr", "/etc", "/", "relative", "/proc/x"):
        with pytest.raises(SpecError):
            bench.start("true", mounts={str(tmp_path): inside})


def test_what_is_mounted_to_be_read_cannot_be_written(bench, tmp_path):  # noqa: F811
    tmp_path.chmod(0o777)
    (tmp_path / "data").write_text("x")
    handle = bench.start("sh", "-c", "cat /data/data; touch /data/more", mounts={str(tmp_path): "/data:ro"})
    assert bench.end(handle).kind is ExitKind.FAILED
    assert "Read-only" in bench.log(handle)


def test_rules_that_somebody_threw_out_stand_again_at_the_next_start(docker, bench, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tenure.runtimes.container_network._LOOK_EVERY_S", 0.0)
    bench.end(bench.start("true", lease="first"))
    rule = ["-i", "tn-+", "-m", "conntrack", "!", "--ctstate", "ESTABLISHED,RELATED", "-j", "DROP"]
    subprocess.run(["/usr/sbin/iptables", "-D", "INPUT", *rule], check=True)
    bench.runtime._tenant_networks(bench.runtime._engine())._next_look_s = 0.0
    bench.end(bench.start("true", lease="second"))
    until(lambda: subprocess.run(["/usr/sbin/iptables", "-C", "INPUT", *rule], capture_output=True).returncode == 0, "the rule")
