import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tenure.errors import SpecError, Unavailable
from tenure.experiments import links, netns
from tenure.links import DeclaredLink, parse_link

needs_netns = pytest.mark.skipif(bool(netns.available()), reason=netns.available() or "available")
needs_tun = pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="there is no /dev/net/tun")


def carried(**found):
    zero = dict.fromkeys(links.Carried.__dataclass_fields__, 0)
    return links.Carried(**{**zero, **found})


@pytest.mark.parametrize(
    ("text", "netem", "how"),
    [
        ("", False, "veth"),
        ("mtu=9000", True, "veth"),
        ("rate=1Gbit", False, "tbf"),
        ("rate=1Gbit", True, "netem"),
        ("delay=1ms", False, "forwarder"),
        ("loss=1%", False, "forwarder"),
        ("rate=1Gbit,delay=1ms,loss=1%", True, "netem"),
    ],
)
def test_a_link_is_made_by_what_the_kernel_has(text, netem, how):
    assert links.way(parse_link(text), netem=netem) == how


def test_a_forwarder_can_be_insisted_on():
    assert links.way(DeclaredLink(), netem=True, forwarder=True) == "forwarder"
    assert links.disciplines(DeclaredLink(), "forwarder") == []


def test_netem_is_told_rate_delay_and_loss_and_holds_what_is_under_way():
    ((name, _, limit, *words),) = links.disciplines(parse_link("rate=1Gbit,delay=20ms,loss=0.1%"), "netem")
    assert name == "netem"
    assert words == ["delay", "20000us", "loss", "0.100000%", "rate", "1000000000bit"]
    assert int(limit) * 1500 > 2 * 125e6 * 0.02


def test_the_rate_of_a_forwarders_link_is_the_kernels():
    ((*words,),) = links.disciplines(parse_link("rate=1Gbit,delay=20ms"), "forwarder")
    assert words[:3] == ["tbf", "rate", "1000000000bit"]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"cpu_s": 9.0}, "0.90 cores"),
        ({"overflowed": 3}, "dropped 3 packets"),
        ({"left": 100, "late_s": 0.2}, "2.00 ms after their delay"),
    ],
)
def test_a_forwarder_that_fell_behind_makes_it_invalid(after, said):
    before = carried(at_s=100.0, cpu_s=0.0, overflowed=0)
    (reason,) = links.judged(before, replace(before, at_s=110.0, **after), 0.02)
    assert said in reason


def test_a_forwarder_that_kept_up_is_not_blamed_for_what_came_before():
    before = carried(at_s=100.0, cpu_s=50.0, overflowed=9, left=10, late_s=5.0)
    after = replace(before, at_s=110.0, cpu_s=52.0, left=1010, late_s=5.4)
    assert links.judged(before, after, 0.02) == ()


def test_tcp_is_asked_of_this_machine_and_of_the_client():
    assert links.tcp("http", 1).count == 1
    assert links.tcp("grpc", 64).count == 4
    assert links.tcp("http", 64).congestion in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text()
    assert links.tcp("http", 64).window_bytes > 1 << 16
    with pytest.raises(SpecError, match="http and grpc"):
        links.tcp("shm", 1)


def echo(address, size):
    """Answer each `size` bytes on one connection with a byte. Returns the port and the thread."""
    door = socket.create_server((address, 0))
    door.settimeout(20)

    def answer():
        with door, door.accept()[0] as connection, connection.makefile("rb") as stream:
            connection.settimeout(20)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while len(stream.read(size)) == size:
                connection.sendall(b"y")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return door.getsockname()[1], thread


_ASK = """
import json, socket, sys, time
address, port, size, times = sys.argv[1], *map(int, sys.argv[2:])
took = []
with socket.create_connection((address, port), timeout=20) as asked:
    asked.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(times):
        began_s = time.perf_counter()
        asked.sendall(b"x" * size)
        asked.recv(1)
        took.append(time.perf_counter() - began_s)
print(json.dumps(took))
"""


def exchanges(link, size, times):
    port, thread = echo(link.near, size)
    argv = ["ip", "netns", "exec", link.namespace, sys.executable, "-c", _ASK, link.near, str(port), str(size), str(times)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    thread.join(20)
    return json.loads(done.stdout)


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@needs_tun
def test_an_exchange_takes_both_delays_and_the_forwarder_is_accounted_for():
    with links.joined(parse_link("delay=20ms,rate=1Gbit")) as link:
        before = link.carried()
        took_s = exchanges(link, 1, 5)
        assert min(took_s) >= 0.04
        assert min(took_s) < 0.06
        if link.how == "forwarder":
            after, usage = link.carried(), link.usage()
            assert after.left > before.left
            assert usage.cpu_s > 0
            assert usage.memory_bytes > 1 << 20
            assert link.priority in ("real-time", "none")
            assert after.overflowed == before.overflowed
        else:
            assert (before, link.usage(), link.judge(None)) == (None, None, ())


_SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as sent:
    ends_s = time.monotonic() + 1.0
    while time.monotonic() < ends_s:
        sent.sendall(bytes(1 << 16))
"""


def received_bit_s(link):
    """Return at which rate one connection of a second arrived, the first fifth left out."""
    door = socket.create_server((link.near, 0))
    argv = ["ip", "netns", "exec", link.namespace, sys.executable, "-c", _SEND, link.near, str(door.getsockname()[1])]
    sender = subprocess.Popen(argv)
    door.settimeout(20)
    with door, door.accept()[0] as connection:
        connection.settimeout(20)
        room, count, seen = bytearray(1 << 20), 0, []
        while size := connection.recv_into(room):
            count += size
            seen.append((time.monotonic(), count))
    assert sender.wait(20) == 0
    (from_s, first), (to_s, last) = seen[len(seen) // 5], seen[-1]
    return (last - first) * 8 / (to_s - from_s)


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@pytest.mark.parametrize("text", ["rate=50Mbit", "rate=50Mbit,delay=2ms,mtu=1500"])
def test_a_declared_rate_is_held(text):
    with links.joined(parse_link(text)) as link:
        rate_bit_s = received_bit_s(link)
    assert 0.8 * 50e6 < rate_bit_s < 1.05 * 50e6


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@needs_tun
def test_lost_packets_are_counted_and_the_stream_arrives_all_the_same():
    with links.joined(parse_link("loss=2%"), forwarder=True) as link:
        took_s = exchanges(link, 500_000, 3)
        assert len(took_s) == 3
        assert link.carried().lost > 0


def flood(link, count):
    """Send so many small packets through the link to a port where nobody listens."""
    sends = "import socket, sys\nsent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    sends += "for _ in range(int(sys.argv[2])):\n    sent.sendto(b'x', (sys.argv[1], 9))\n"
    argv = ["ip", "netns", "exec", link.namespace, sys.executable, "-c", sends, link.near, str(count)]
    subprocess.run(argv, stderr=subprocess.DEVNULL, timeout=30, check=False)  # what is refused in between is no matter


def wait_until(condition):
    ends_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@needs_tun
def test_packets_that_a_forwarder_let_go_late_make_it_invalid():
    with links.joined(parse_link("delay=1s"), forwarder=True) as link:
        (forwarder,) = forwarders_of(os.getpid())
        before = link.carried()
        flood(link, 50)
        wait_until(lambda: link.carried().packets >= before.packets + 50)
        os.kill(forwarder, signal.SIGSTOP)
        time.sleep(1.5)  # longer than the packets' delay: all of them are late when it goes on
        os.kill(forwarder, signal.SIGCONT)
        wait_until(lambda: link.carried().left >= before.left + 50)
        assert "after their delay" in " ".join(link.judge(before))


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@needs_tun
def test_packets_for_which_a_forwarder_came_too_late_make_it_invalid():
    with links.joined(parse_link("delay=1ms"), forwarder=True) as link:
        (forwarder,) = forwarders_of(os.getpid())
        before = link.carried()
        os.kill(forwarder, signal.SIGSTOP)
        flood(link, 2 * links.RING_PACKETS)
        os.kill(forwarder, signal.SIGCONT)
        assert "dropped" in " ".join(link.judge(before))


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@needs_tun
def test_nothing_stays_after_an_error_and_a_dead_forwarder_is_told():
    seen = []

    def fail_inside():
        with links.joined(parse_link("delay=1ms"), forwarder=True) as link:
            seen.append(link)
            (forwarder,) = forwarders_of(os.getpid())
            os.kill(forwarder, signal.SIGKILL)
            link.usage()

    with pytest.raises(Unavailable, match="forwarder has ended"):
        fail_inside()
    assert not forwarders_of(os.getpid())
    assert not Path(f"/run/netns/{seen[0].namespace}").exists()
    assert seen[0].near not in subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout


def forwarders_of(maker):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        if netns.maker_of(path) == str(maker):
            found.append(int(path.name))
    return found


_MAKER = """
import sys, time
from tenure.experiments import links
from tenure.links import parse_link
with links.joined(parse_link("delay=1ms"), forwarder=True):
    print("made", flush=True)
    time.sleep(60)
"""


@pytest.mark.real
@pytest.mark.netns
@needs_netns
@needs_tun
@pytest.mark.parametrize("stopped", [False, True])
def test_a_dead_makers_forwarder_ends_by_itself_and_a_stopped_one_is_removed(stopped):
    maker = subprocess.Popen([sys.executable, "-c", _MAKER], stdout=subprocess.PIPE)
    try:
        assert maker.stdout.readline() == b"made\n"
        (forwarder,) = forwarders_of(maker.pid)
        if stopped:
            os.kill(forwarder, signal.SIGSTOP)
    finally:
        maker.kill()
        maker.wait()
        maker.stdout.close()
    if not stopped:
        assert gone(forwarder)
    removed = netns.remove_stale()
    assert f"tenure-{maker.pid}-0" in removed
    assert (f"forwarder {forwarder}" in removed) == stopped
    assert gone(forwarder)
    assert f"tn{maker.pid}-0a" not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout


def gone(pid):
    """Return whether a process has ended, or does within ten seconds."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], 10)[0])
    finally:
        os.close(watched)
