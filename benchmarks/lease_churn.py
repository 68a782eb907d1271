"""Whether every workspace of a morning ends as it should, by the engine's own view, with the engine restarted in the middle.

World: an engine of the benchmark's own with live-restore, `tenure up` with 2 cpus and 1 GiB in a home of its own, container
leases through the public functions (`tenure.leasing`), of 3 tenants in turn. All have 0.2 cpus and 32 MiB, so that at most 10
live at a time and the others queue.
The morning: 50 workspaces (--quick: 12), asked for by 4 holders at once, each of whom takes the next of the script. The script
is shuffled by the seed and has these fates in turn:

- completes: a command that writes a file into its home volume and ends. End: `completed`.
- fails: a command that ends with code 3. End: `failed`.
- too large: a command that takes 64 MiB. End: `out_of_memory`.
- forgotten: a slot of 6 s that nobody renews. End: `expired`.
- kept: a slot of 6 s, renewed for 10 min, resized to 48 MiB, a command run inside, released. End: `released`.
- held: lives until its half of the script is through, and in the first half while the engine is restarted; then a command is
  run inside, and it is given back. End: `released`.

After the first half the engine is ended with SIGTERM and started again, while those that are held live; nobody asks meanwhile.
Measured: the share of workspaces whose end is right: the lease's end reason is that of its fate, and the engine's own event of
the container's death has the exit code of that fate (0; 3; 137 and an `oom` event or `out_of_memory` told by the kernel's
group; 137 or 143 for the last three), one death for each.
Bar: all (1.0), within 5 minutes, and at the end the engine has no container of a lease, the broker no live lease, the node
nothing held. `value` is the share; the length of the morning is in the details.
Control: each workspace judged by the fate of the next one in the script: it must miss the bar.
Left out: environments (their build has nothing to do with the engine), JupyterLab, GPUs, asking while the engine is away.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests import docker_engine

from benchmarks.harness import Control, Options, Result, Skip, judge
from tenure import leasing, verbs
from tenure.broker.workspace_setup import Setup
from tenure.errors import JobFailed
from tenure.leases import EndReason, Lease

NAME = "lease_churn"
BAR = "50 container workspaces of a morning, the engine restarted in it: every end right by the engine's own view, in 5 minutes"
LIMIT_S = 300.0
MIB = 1 << 20
SLOT_S = 6.0
HOLDERS = 4
TENANTS = ("alice", "bob", "carol")
SIGNALLED = frozenset((137, 143))
_LARGE = "import time\nx = bytearray(64 << 20)\nx[::4096] = b'x' * len(x[::4096])\ntime.sleep(60)"


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a workspace, and what must be said of its end."""

    name: str
    reason: EndReason
    codes: frozenset[int]
    command: tuple[str, ...] = ()


FATES = (
    Fate("completes", EndReason.COMPLETED, frozenset((0,)), ("sh", "-c", 'echo x > "$HOME/$TENURE_LEASE_ID"; sleep 1')),
    Fate("fails", EndReason.FAILED, frozenset((3,)), ("sh", "-c", "sleep 1; exit 3")),
    Fate("too large", EndReason.OUT_OF_MEMORY, frozenset((137,)), ("python3", "-S", "-c", _LARGE)),
    Fate("forgotten", EndReason.EXPIRED, SIGNALLED),
    Fate("kept", EndReason.RELEASED, SIGNALLED),
    Fate("held", EndReason.RELEASED, SIGNALLED),
)


@dataclass(slots=True)
class Deaths:
    """What the engine tells of containers that ended; it keeps its last 256 events, and none over a restart."""

    engine: docker_engine.Engine
    codes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Lease -> container -> exit code."""
    over: threading.Event = field(default_factory=threading.Event)
    begun_s: float = field(default_factory=time.time)

    def look(self) -> None:
        """Take in what it says by now."""
        filters = quote(json.dumps({"type": ["container"], "event": ["die"]}))
        status, said = self.engine.ask("GET", f"/events?since={self.begun_s:.0f}&until={time.time():.3f}&filters={filters}")
        assert status == 200, said
        for line in said.decode().splitlines():
            actor = json.loads(line)["Actor"]
            lease = actor["Attributes"].get("tenure.lease")
            if lease:
                self.codes.setdefault(lease, {})[actor["ID"]] = int(actor["Attributes"]["exitCode"])

    def watch(self) -> None:
        """Look until it is over; an engine that is away is asked again."""
        while not self.over.wait(0.5):
            with contextlib.suppress(OSError, AssertionError):
                self.look()


def run(options: Options) -> Result:
    """Live one morning, then judge every end."""
    fates = [FATES[number % len(FATES)] for number in range(12 if options.quick else 50)]
    random.Random(options.seed).shuffle(fates)
    half = len(fates) // 2
    with _world() as (engine, deaths):
        begun_s = time.monotonic()
        lived = _half(fates, range(half), engine)
        lived += _half(fates, range(half, len(fates)), None)
        took_s = time.monotonic() - begun_s
        names = {run.id: run.name for run in verbs.runs()}
        leases = {names[lease.run_id]: lease for lease in verbs.leases()}
        deaths.look()
        assert not verbs.leases(live=True), "leases are live after the morning"
        assert not [found for found in engine.containers() if found["Labels"].get("tenure.lease")], "containers are left"
        assert all(not node.held_cpus for node in verbs.nodes()), "the node holds something"
    assert len(leases) == len(fates), f"{len(leases)} leases for {len(fates)} workspaces"
    wrong = [_wrong(leases[_name(n)], fate, deaths) for n, fate in enumerate(fates)]
    right = sum(not each for each in wrong) / len(fates)
    shifted = [*fates[1:], fates[0]]
    naive = sum(not _wrong(leases[_name(n)], fate, deaths) for n, fate in enumerate(shifted)) / len(fates)
    control = Control(name="judged by the next one's fate", value=naive, failed=naive < 1.0, how="all must be right")
    holds, why = judge(right == 1.0 and took_s <= LIMIT_S, control)
    return Result(
        value=right,
        spread=None,
        unit="share",
        holds=holds,
        why=why,
        control=control,
        details={
            "workspaces": len(fates),
            "morning_s": took_s,
            "lived_through_restart": lived,
            "wrong": [each for each in wrong if each],
            "load_1min": os.getloadavg()[0],
        },
    )


@contextlib.contextmanager
def _world() -> Iterator[tuple[docker_engine.Engine, Deaths]]:
    """Give an engine whose deaths are watched, and a home that is up on it, until the end."""
    if why := docker_engine.why_absent():
        raise Skip(why)
    before = dict(os.environ)
    try:
        with docker_engine.running() as engine, tempfile.TemporaryDirectory(prefix="tenure-bench-") as folder:
            os.environ |= {"DOCKER_HOST": f"unix://{engine.socket}", "TENURE_HOME": f"{folder}/home"}
            os.environ["TENURE_SHARES_FILE"] = str(Path(folder) / "shares.json")
            deaths = Deaths(engine)
            watcher = threading.Thread(target=deaths.watch, daemon=True)
            watcher.start()
            try:
                verbs.up(cpus=2.0, memory=1 << 30)
                yield engine, deaths
            finally:
                deaths.over.set()
                watcher.join(60)
                verbs.down()
    except docker_engine.CannotStart as error:
        raise Skip(f"a Docker Engine does not start here: {error}") from error
    finally:
        os.environ.clear()
        os.environ.update(before)


def _name(number: int) -> str:
    return f"w{number}"


def _half(fates: Sequence[Fate], numbers: Sequence[int], engine: docker_engine.Engine | None) -> int:
    """Live one half of the script, restart the engine if one is given, give back what is held; return how many were."""
    with ThreadPoolExecutor(HOLDERS) as holders:
        held = [each for each in holders.map(lambda n: _live(n, fates[n]), numbers) if each is not None]
        if engine is not None:
            engine.restart()
        for _ in holders.map(_give_back, held):
            pass
    return len(held) if engine is not None else 0


def _live(number: int, fate: Fate) -> Lease | None:
    """Ask for one workspace and see it to its end; return one that is held."""
    brief = fate.name in ("forgotten", "kept")
    try:
        lease = leasing.lease(
            fate.command,
            cpus=0.2,
            memory_bytes=32 * MIB,
            for_s=SLOT_S if brief else 600.0,
            name=_name(number),
            tenant=TENANTS[number % len(TENANTS)],
            grace_s=2.0,
            wait_s=LIMIT_S,
            setup=Setup(runtime="container"),
        )
    except JobFailed:
        return None  # it ended before it was seen to run; how, is judged with the others
    if fate.name == "held":
        return lease
    if fate.name == "kept":
        leasing.renew(lease.id, for_s=600.0)
        leasing.resize(lease.id, memory_bytes=48 * MIB)
        _give_back(lease)
    for _ in leasing.follow(lease.id):
        pass  # until it has ended
    return None


def _give_back(lease: Lease) -> None:
    done = leasing.execute(lease.id, ("sh", "-c", "echo here"), timeout_s=60.0)
    assert (done.code, done.output) == (0, "here\n"), f"a command in lease {lease.id} ended {done.code}: {done.output}"
    verbs.release(lease.id)


def _wrong(lease: Lease, fate: Fate, deaths: Deaths) -> str:
    """Return what is not as the fate has it; empty when all is."""
    died = list(deaths.codes.get(lease.id, {}).values())
    if lease.end_reason is not fate.reason:
        return f"{fate.name}: {lease.id} ended {lease.end_reason} ({lease.end_detail}), not {fate.reason}"
    if len(died) != 1 or died[0] not in fate.codes:
        return f"{fate.name}: the engine says of {lease.id} that it ended with {died or 'nothing'}, not {sorted(fate.codes)}"
    return ""
