"""The contract of every runtime over guests in QEMU, and what microVMs promise beyond it. Emulated."""

import json
import os
import shutil
import socket
import tempfile
import urllib.request
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import MIB, SLOWNESS, Bench, RuntimeContract, until
from tests.microvm_image import PYTHON, make_image, missing, python_tree

from tenure.errors import Conflict, CorruptData, SpecError, Unavailable, Unsupported
from tenure.protocols import ExitKind
from tenure.resources import DeviceShare, Envelope
from tenure.runtimes import procfs
from tenure.runtimes.microvm import MicrovmRuntime
from tenure.runtimes.state import read_json

pytestmark = pytest.mark.real
WHOLE = os.environ.get("TENURE_TEST_GUESTS") == "all"
"""Each test of the contract boots a machine, for a minute and more in all: those that only look at what runtimes share, and
that every other runtime is asked too, wait for this word."""
_SHARED = (
    "each_attempt_of_a_lease",
    "starts_go_on_when_the_fork_server",
    "sixteen_leases",
    "renewal_moves",
    "a_new_runtime_finds",
    "values_of_the_environment",
    "a_kill_from_outside",
    "orders_with_an_older_fence",
    "a_command_that_exits_with_0",
    "a_double_forked",
    "usage_counts",
    "a_command_inside_left_running",
)
GUEST_MAX_S = 100.0 * SLOWNESS
"""Bound of what a guest needs two seconds for where nothing else runs."""


class GuestBench(Bench):
    """As for processes; jobs run in the test's image and see no folder of this machine."""

    image = ""

    def spec(self, *argv, **fields):
        """A contract's job of 64 MiB gets a machine that this kernel comes up in."""
        fields = {"image": str(self.image), "memory": 128 * MIB, "slot_s": 3 * GUEST_MAX_S} | fields
        if fields["memory"] in (64 * MIB, 100 * MIB):
            fields["memory"] = 112 * MIB
        return super().spec(*argv, **fields)

    def python(self, code, **fields):
        return self.start(PYTHON, "-S", "-c", code, **fields)

    def end(self, handle):
        ended = self.runtime.wait(handle, GUEST_MAX_S)
        assert ended is not None, "the guest did not end"
        print(ended)
        return ended

    def said(self, handle, word):
        until(lambda: word in self.log(handle), f"the job says {word!r}; it said {self.log(handle)!r}", GUEST_MAX_S)

    def gone(self, _pid):
        """Return whether no machine of ours runs: stronger than asked, in a test with one lease."""
        notes = [read_json(path) for path in self.runtime.state_dir.rglob("machine.json")]
        return not any(procfs.is_alive(note["pid"], note["start_ticks"]) for note in notes)


@pytest.fixture(scope="session")
def guest_tree(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    tree = tmp_path_factory.mktemp("tree")
    python_tree(tree)
    return tree


@pytest.fixture(scope="session")
def guest_image(guest_tree, tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("images") / "guest" / "000000000000", guest_tree)


@pytest.fixture(scope="class")
def state_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runtime") / "state"


@pytest.fixture(scope="class")
def shared(state_dir, guest_image):
    runtime = MicrovmRuntime(state_dir, accel="tcg")
    yield runtime
    runtime.close()


@pytest.fixture
def make_runtime(shared, state_dir):
    made = []

    def make():
        made.append(MicrovmRuntime(state_dir, accel="tcg"))
        return made[-1]

    yield make
    for handle in shared.list():
        shared.stop(handle, grace_s=0, fence=1 << 30)
        assert shared.wait(handle, GUEST_MAX_S) is not None
    for lease_id in shared.known():
        shared.forget(lease_id)
    for runtime in made:
        runtime.close()


@pytest.fixture
def bench(shared, make_runtime, tmp_path, guest_image):
    found = GuestBench(shared, tmp_path / "leases")
    found.image = guest_image
    return found


@pytest.fixture(autouse=True)
def _whole_contract(request):
    if not WHOLE and any(name in request.node.name for name in _SHARED):
        pytest.skip("what all runtimes share is asked of the others; TENURE_TEST_GUESTS=all asks it of microVMs too")


class TestMicrovm(RuntimeContract):
    """What a guest does otherwise than a process is said here in the words of the contract's own tests."""

    def test_a_double_forked_process_dies_with_the_lease(self, bench):
        code = (
            "import os, time\n"
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        print('daemon', flush=True); time.sleep(600)\n    os._exit(0)\nos.wait(); time.sleep(0.2)"
        )
        handle = bench.python(code)
        assert bench.end(handle).kind is ExitKind.COMPLETED
        assert bench.gone(0)

    def test_memory_grows_and_shrinks_while_the_job_runs(self, bench):
        """A machine keeps its size."""
        handle = bench.start("sleep", "60")
        with pytest.raises(Unsupported, match="size"):
            bench.runtime.resize(handle, Envelope(memory_bytes=256 * MIB), fence=1)
        assert bench.runtime.wait(handle, 0) is None

    def test_too_much_disk_ends_the_lease(self, bench):
        """What a guest writes is its own memory; only its output lies here."""
        handle = bench.start("sh", "-c", "while :; do cat /bin/sh; done", disk=1 * MIB)
        assert bench.end(handle).kind is ExitKind.OUT_OF_DISK

    def test_a_command_runs_inside_the_lease(self, bench):
        """It does not."""
        handle = bench.start("sleep", "60")
        with pytest.raises(Unsupported, match="exec"):
            bench.runtime.exec(handle, ["true"], timeout_s=1)
        with pytest.raises(Unsupported, match="exec"):
            bench.runtime.session(handle, ["sh"], window=None)
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)
        with pytest.raises(Conflict):
            bench.runtime.exec(handle, ["true"], timeout_s=1)

    # Nor is anybody talked to: one machine less to boot for each.
    test_a_command_in_a_terminal_knows_its_window_and_ctrl_c_goes_inside = None
    test_what_goes_into_a_pipe_comes_out_of_it_and_the_code_is_kept = None
    test_a_session_that_is_ended_ends_its_command = None

    def test_what_a_command_inside_left_running_ends_with_the_lease(self, bench):
        """The machine does."""
        handle = bench.start("sleep", "60")
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)
        assert bench.gone(0)

    def test_sixteen_leases_run_at_once_and_end_each_for_itself(self, bench):
        """Four: each is a machine."""
        handles = [bench.start("sh", "-c", f"exit {i}", lease=f"many-{i}") for i in range(4)]
        assert [bench.end(handle).code for handle in handles] == list(range(4))

    @pytest.mark.parametrize(
        "more",
        [
            {"image": ""},
            {"mounts": {"/a": "/b"}},
            {"devices": (DeviceShare(index=0, fraction=1.0),)},
            {"capabilities": ("x",)},
            {"seccomp": "/etc/profile.json"},
            {"network": "own"},
            {"memory": 16 * MIB},
        ],
    )
    def test_what_a_process_cannot_honour_is_refused_with_the_reason(self, bench, more):
        with pytest.raises(Unsupported, match=next(iter(more))):
            bench.start("true", **more)

    # --- beyond the contract ---

    def test_a_server_inside_is_reached_at_its_port_of_the_loopback_and_reaches_nothing(self, bench):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        code = (
            "import http.server, json, os, socket\n"
            "class H(http.server.BaseHTTPRequestHandler):\n"
            "    def do_GET(self):\n"
            "        try: socket.create_connection(('10.0.2.2', PORT), 2); found = 'reached'\n"
            "        except OSError as error: found = 'closed'\n"
            "        self.send_response(200); self.end_headers(); self.wfile.write(found.encode())\n"
            "    log_message = lambda *a: None\n"
            "s = http.server.HTTPServer(('0.0.0.0', PORT), H)\n"
            "path = os.environ['TENURE_WORKER_DIR'] + '/endpoints.json'\n"
            "json.dump({'http': '0.0.0.0:PORT'}, open(path + '.part', 'w')); os.rename(path + '.part', path)\n"
            "s.serve_forever()\n"
        ).replace("PORT", str(port))
        handle = bench.python(code, ports={"http": port}, network="tenant:alice")
        path = bench.folder / "lease-1/1/endpoints.json"
        until(path.exists, f"the server listens; it said {bench.log(handle)!r}", GUEST_MAX_S)
        address = json.loads(path.read_text())["http"]
        assert address == f"127.0.0.1:{port}"
        with urllib.request.urlopen(f"http://{address}/", timeout=GUEST_MAX_S) as answer:
            assert answer.read() == b"closed"
        with pytest.raises(SpecError, match=f"http {port}"):
            bench.start("true", lease="second", ports={"http": port})
        bench.runtime.stop(handle, grace_s=0, fence=1)
        bench.end(handle)

    def test_the_root_cannot_be_written_but_tmp_can_and_who_carries_the_guest_is_said(self, bench):
        handle = bench.start("sh", "-c", "echo a > /tmp/a && cat /tmp/a; echo b > /usr/b || exit 9")
        ended = bench.end(handle)
        assert (ended.kind, ended.code) == (ExitKind.FAILED, 9)
        assert bench.log(handle).startswith("a\n")
        assert "software emulation" in ended.witness
        assert bench.runtime.accel_of(handle) == "tcg"

    def test_a_program_that_cannot_be_executed_is_told_by_the_guest(self, bench):
        ended = bench.end(bench.start("/usr/lib"))
        assert (ended.kind, ended.code) == (ExitKind.FAILED, 127)
        assert "/usr/lib" in ended.witness
        assert "executed" in ended.witness


def test_an_image_that_was_changed_is_refused_by_name(guest_image, tmp_path, state_dir):
    copy = tmp_path / "images/changed/000000000000"
    shutil.copytree(guest_image, copy)
    with open(copy / "microvm/root.squashfs", "r+b") as stream:
        stream.seek(4096)
        stream.write(b"damaged")
    runtime = MicrovmRuntime(state_dir, accel="tcg", images_dir=tmp_path / "images")
    bench = GuestBench(runtime, tmp_path / "leases")
    with pytest.raises(CorruptData, match=r"root\.squashfs is not what was built"):
        bench.start("true", image="changed")
    with pytest.raises(SpecError, match="there are changed"):
        bench.start("true", image="other")
    (copy / "image.json").write_text("{")
    with pytest.raises(CorruptData, match=r"image\.json"):
        bench.start("true", image="changed")
    runtime.close()


@pytest.fixture
def open_folder():
    """A folder that every user of this machine may enter: machines run as nobody."""
    with tempfile.TemporaryDirectory(prefix="tg-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_without_qemu_or_where_it_dies_at_once_the_start_says_so(guest_image, tmp_path, open_folder, monkeypatch):
    runtime = MicrovmRuntime(tmp_path / "state", accel="tcg")
    bench = GuestBench(runtime, tmp_path / "leases")
    bench.image = guest_image
    monkeypatch.setenv("PATH", str(open_folder))
    with pytest.raises(Unsupported, match="qemu-system-x86"):
        bench.start("true")
    fake = open_folder / "qemu-system-x86_64"
    fake.write_text("#!/bin/sh\necho 'this machine is broken' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(Unavailable, match="this machine is broken"):
        bench.start("true")
    runtime.close()
