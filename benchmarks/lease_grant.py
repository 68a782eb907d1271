"""How long a container lease takes from the request until its command runs, beside a bare `docker run` of the same.

World: an engine of the benchmark's own; the base image is there and the tenant's network too. A broker and an agent of the
benchmark's own with two cores, their ledger on disk. The command is `sleep 60` under 1 cpu and 256 MiB.
Measured: from `request_gang` to the answer that the lease is active, which the broker writes once the agent has seen the
command itself run (the engine's init has executed it): ledger, fsync, placement, shim and hardening included. Ending and
forgetting are not counted.
Reference: `docker run -d` (the engine's own client) of the same image and command on the same network with the same memory
and cpus; it returns when the container is started. Interleaved rounds: 25 (--quick: 6) after 2 to warm up.
Value: the median of the rounds' ratios, lease over bare. Bar: at most 1.15.
Checked in every round: the engine says that both run, with the same memory bound, on the same network.
Control: a runtime that works out the base image's name for every start anew (it reads all its files): its ratio must miss the
bar.
Details: both medians; the runtime's own part (`ContainerRuntime.start`), without broker and ledger.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator

from benchmarks.containers import MIB, World, world
from benchmarks.harness import Control, Options, Result, Skip, interleaved, judge, median, spread
from tenure.app import new_id
from tenure.broker.client import BrokerClient, connect, start_broker
from tenure.jobs import Command
from tenure.leases import LeaseState
from tenure.resources import Envelope
from tenure.wire import GangMember, RequestGang

NAME = "lease_grant"
BAR = "a container lease runs within 1.15 x a bare docker run of the same on the same network (median of interleaved ratios)"
LIMIT = 1.15
ENVELOPE = Envelope(cpus=1.0, memory_bytes=256 * MIB, disk_bytes=64 * MIB, slot_s=120.0, total_s=120.0)
ARGV = ("sleep", "60")
_numbers = itertools.count()


def run(options: Options) -> Result:
    """Measure lease, bare container, the runtime alone and the naive one in interleaved rounds."""
    client_program = shutil.which("docker")
    if client_program is None:
        raise Skip("no docker client here (Debian: apt-get install docker.io)")
    rounds = 6 if options.quick else 25
    with world() as here, _own_broker(here) as client:
        first = Granted(client, here)
        first()
        network = first.network
        contenders = {
            "lease": Granted(client, here),
            "bare": lambda: bare(client_program, here, network, first.image),
            "runtime": lambda: started(here),
            "naive": lambda: started(here, anew=True),
        }
        found = interleaved(contenders, rounds, seed=options.seed, warm_up=2)
    ratios = [lease / plain for lease, plain in zip(found["lease"], found["bare"], strict=True)]
    naive = median([slow / plain for slow, plain in zip(found["naive"], found["bare"], strict=True)])
    value = median(ratios)
    control = Control(name="the image's name worked out anew", value=naive, failed=naive > LIMIT, how=f"bar {LIMIT}")
    holds, why = judge(value <= LIMIT, control)
    return Result(
        value=value,
        spread=spread(ratios),
        unit="x docker run",
        holds=holds,
        why=why,
        reference={"name": "docker run -d", "value": median(found["bare"]), "spread": spread(found["bare"]), "unit": "s"},
        control=control,
        details={
            "lease_s": median(found["lease"]),
            "lease_spread_s": spread(found["lease"]),
            "runtime_s": median(found["runtime"]),
            "rounds": rounds,
            "load_1min": os.getloadavg()[0],
        },
    )


@contextlib.contextmanager
def _own_broker(here: World) -> Iterator[BrokerClient]:
    """A broker and an agent on the world's engine, with sockets and shares of their own; all ended afterwards."""
    before = dict(os.environ)
    folder = here.folder
    os.environ.update(
        TENURE_SHARES_FILE=str(folder / "shares.json"), XDG_RUNTIME_DIR=str(folder), DOCKER_HOST=f"unix://{here.engine.socket}"
    )
    try:
        start_broker(folder / "home", persistent=True, nodes=("boxes:2:2GiB",))
        with connect(folder / "home") as client:
            try:
                yield client
            finally:
                client.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Granted:
    """Takes one lease each time it is called; remembers the last one's network and image."""

    def __init__(self, client: BrokerClient, here: World) -> None:
        self._client, self._here = client, here
        self.network = self.image = ""

    def __call__(self) -> float:
        """Return the seconds from the request to the active lease."""
        name = f"grant-{next(_numbers)}"
        member = GangMember(worker=0, envelope=ENVELOPE, command=Command(argv=ARGV, runtime="container"))
        asked = RequestGang(gang_id=name, run_id=new_id("r"), stage="task", members=(member,))
        begun_s = time.perf_counter()
        (lease,) = self._client.request_gang(asked)
        (view,) = self._client.wait_leases([lease.id], until="active", timeout_s=60.0)
        took_s = time.perf_counter() - begun_s
        assert view.lease.state is LeaseState.ACTIVE, f"{view.lease.state}: {view.lease.end_detail}"
        said = self._here.engine.inspect(self._here.name(lease.id))
        self.network, self.image = said["HostConfig"]["NetworkMode"], said["Config"]["Image"]
        assert said["State"]["Running"], said["State"]
        assert said["HostConfig"]["Memory"] == ENVELOPE.memory_bytes, said["HostConfig"]
        self._client.release([lease.id], why="measured")
        (view,) = self._client.wait_leases([lease.id], until="ended", timeout_s=60.0)
        assert view.lease.state is LeaseState.ENDED, view.lease.state
        return took_s


def bare(program: str, here: World, network: str, image: str) -> float:
    """Return the seconds of `docker run -d` of the same."""
    options = ["--network", network, "--memory", str(ENVELOPE.memory_bytes), "--cpus", f"{ENVELOPE.cpus:g}"]
    command = [program, "--host", f"unix://{here.engine.socket}", "run", "-d", *options, image, *ARGV]
    begun_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    took_s = time.perf_counter() - begun_s
    assert done.returncode == 0, done.stderr
    container = done.stdout.strip()
    said = here.engine.inspect(container)
    assert said["State"]["Running"], said["State"]
    assert said["HostConfig"]["Memory"] == ENVELOPE.memory_bytes, said["HostConfig"]
    assert here.engine.ask("DELETE", f"/containers/{container}?force=1&v=1")[0] == 204
    return took_s


def started(here: World, *, anew: bool = False) -> float:
    """Return the seconds of the runtime's start alone. anew: with the base image's name to be worked out first."""
    spec = here.spec(*ARGV, envelope=ENVELOPE)
    if anew:
        here.runtime.forget_base_image()
    begun_s = time.perf_counter()
    handle = here.runtime.start(spec)
    took_s = time.perf_counter() - begun_s
    here.end(handle)
    return took_s
