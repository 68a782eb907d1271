"""GPUs the whole way: `tenure up`, leases of parts, what their programs may, who is ended; on made-up devices."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree

import pytest
from tests.gpu.machine import GIB, ROOT, MadeUp

pytestmark = pytest.mark.real
WAIT_MAX_S = 60.0


class Tenure:
    """The command line with a home of its own, on a machine of the test's."""

    def __init__(self, environment):
        self.home = Path(tempfile.mkdtemp(prefix="tg-h-"))
        self.environment = environment | {
            "TENURE_HOME": str(self.home),
            "TENURE_SHARES_FILE": str(self.home / "shares.json"),
            "XDG_RUNTIME_DIR": str(self.home),
        }

    def __call__(self, *words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "tenure.cli", *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *words):
        return json.loads(self(*words, "--json"))

    def lease(self, *words, work):
        """Lease a part for one of the checks' CUDA programs; return the lease's id."""
        inside = [f"{name}={value}" for name, value in self.environment.items() if name.startswith("TENURE_FAKE_")]
        program = ["env", *inside, f"PYTHONPATH={ROOT}", *map(str, work)]
        small = ("--cpus", 0.2, "--memory", "128MiB")
        return re.search(r"lease +(\S+)", self("lease", *words, *small, "--", *program))[1]

    def find(self, lease_id):
        return next(lease for lease in self.json("leases") if lease["id"] == lease_id)

    def until(self, look):
        """Return what a look finds once it finds something."""
        end_s = time.monotonic() + WAIT_MAX_S
        while not (found := look()):
            assert time.monotonic() < end_s, "nothing came of it"
            time.sleep(0.1)
        return found

    def close(self):
        self("down")
        rmtree(self.home, ignore_errors=True)


@pytest.fixture
def tenure(made_up: MadeUp):
    made = Tenure(made_up.environment())
    yield made
    made.close()


WORK = (sys.executable, "-m", "tests.gpu.work", "alloc")


def test_a_part_is_bounded_metered_and_says_how_it_is_held_and_outlives_its_agent(tenure, made_up):
    tenure("up")
    (gpu,) = tenure.json("nodes")[0]["capacity"]["gpus"]
    assert (gpu["parts"], gpu["model"]) == ("mps", "NVIDIA Fake")
    part = tenure.lease("--gpu", 0.5, "--gpu-memory", "2GiB", work=(*WORK, GIB, 2 * GIB, "--stay"))
    stranger = tenure.lease(work=("env", f"CUDA_VISIBLE_DEVICES={gpu['uuid']}", *WORK, 1 << 20, "--stay"))
    said = tenure.until(lambda: tenure("logs", part))
    assert json.loads(said)["got"] == [True, False]
    look = lambda: [each for each in tenure.json("top", "--once") if (each["usage"] or {}).get("gpu_memory_bytes")]  # noqa: E731
    assert tenure.until(look)[0]["usage"]["gpu_memory_bytes"] >= GIB

    # One without devices that uses one is ended; what is said of the other is true.
    ended = tenure.until(lambda: (found := tenure.find(stranger))["state"] == "ended" and found)
    assert ended["end_reason"] == "failed"
    assert "is not its own" in ended["end_detail"]
    assert "0.5 on gpu 0, 2.0 GiB (share advisory, memory upper)" in tenure("leases")

    # Its agent dies: lease and daemon live on, and end when they are told to.
    daemons = {pid for pid, words in _running(made_up).items() if "nvidia-cuda-mps-control" in words}
    assert len(daemons) == 1
    agents = [pid for pid, words in _running(made_up).items() if "tenure.agent" in words]
    os.kill(agents[0], 9)
    tenure.until(lambda: [pid for pid, words in _running(made_up).items() if "tenure.agent" in words and pid != agents[0]])
    tenure.until(lambda: tenure.json("nodes")[0]["state"] == "up")
    assert tenure.find(part)["state"] == "active"
    assert {pid for pid, words in _running(made_up).items() if "nvidia-cuda-mps-control" in words} == daemons
    tenure("down")
    tenure.until(lambda: not daemons & set(_running(made_up)))


def _running(made_up):
    """Return pid -> words of all processes of the test's machine."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            if f"TENURE_FAKE_GPU={made_up.folder}".encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    return found


def test_declared_devices_are_counted_and_said_to_be_declared_only(tmp_path):
    tenure = Tenure({name: value for name, value in os.environ.items() if not name.startswith(("TENURE_NVML", "TENURE_FAKE"))})
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has devices of its own")
    try:
        tenure("up", "--gpus", 2, "--gpu-model", "NVIDIA H100", "--gpu-memory", "80GiB")
        sleep = (sys.executable, "-c", "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)")
        first = tenure.lease("--gpu", 1, work=sleep)
        assert tenure.until(lambda: tenure("logs", first)).strip() == "0"
        second = tenure.lease("--gpu", 0.5, "--gpu-memory", "60GiB", work=sleep)
        assert tenure.until(lambda: tenure("logs", second)).strip() == "1"
        listed = tenure("leases")
        assert "1 on gpu 0 (share advisory, memory advisory)" in listed
        assert "0.5 on gpu 1, 60.0 GiB (share advisory, memory advisory)" in listed
        refused = tenure("lease", "--gpu", 0.5, "--gpu-memory", "60GiB", "--wait", "0s", "--", "true", code=3)
        assert "needs 0.5 of one gpu with 60.0 GiB" in refused
    finally:
        tenure.close()


def test_a_model_cannot_be_declared_for_devices_that_are_there(tenure):
    assert "this one has 1 (NVIDIA Fake)" in tenure("up", "--gpus", 1, "--gpu-model", "NVIDIA H100", code=3)
