import os
import subprocess
from pathlib import Path

import pytest

from tenure.experiments import netns

needs_netns = pytest.mark.skipif(bool(netns.available()), reason=netns.available() or "available")


def names():
    return {path.name for path in Path("/run/netns").glob("tenure-*")}


@pytest.mark.real
@pytest.mark.netns
@needs_netns
def test_both_ends_reach_each_other_and_nothing_stays_after_an_error():
    seen = []

    def fail_inside():
        with netns.namespace() as link:
            seen.append(link)
            argv = ["ip", "netns", "exec", link.namespace, "python3", "-c", _PING, link.near]
            assert subprocess.run(argv, timeout=20, check=False).returncode == 0
            assert link.namespace in names()
            raise LookupError

    with pytest.raises(LookupError):
        fail_inside()
    (link,) = seen
    assert link.namespace not in names()
    assert link.near not in subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout


_PING = """
import socket, sys
door = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
door.settimeout(5)
try:
    door.connect((sys.argv[1], 9))
except ConnectionRefusedError:  # the other stack answered: nobody listens there, but it is reached
    sys.exit(0)
sys.exit(1)
"""


@pytest.mark.real
@pytest.mark.netns
@needs_netns
def test_two_namespaces_of_one_process_have_their_own_addresses():
    with netns.namespace(1) as one, netns.namespace(2) as two:
        assert len({one.near, one.far, two.near, two.far}) == 4
        assert one.namespace != two.namespace


@pytest.mark.real
@pytest.mark.netns
@needs_netns
def test_what_a_dead_process_left_is_removed_and_a_living_ones_is_kept():
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale, living = f"tenure-{dead.pid}-0", f"tenure-{os.getpid()}-9"
    for name in (stale, living):
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        assert stale in netns.remove_stale()
        assert stale not in names()
        assert living in names()
    finally:
        subprocess.run(["ip", "netns", "del", living], check=True)


def test_without_the_ip_program_the_reason_names_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "iproute2" in netns.available()
