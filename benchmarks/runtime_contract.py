"""Whether the process runtime keeps its contract in every world that users have: both cgroup generations, and none.

Worlds: this machine's own control groups and rlimits on this machine (`tests/runtimes/test_process.py`); and, in one boot of
Debian's cloud kernel with unified control groups under QEMU, software emulation (`tests/guest`): root in a session with a shell
beside it; a user in a delegated scope with a shell beside it; a user with no rights, who falls back to rlimits; a user to whom
memory and pids are delegated but not cpu (there the tests that a missing controller can touch). The generation that each world
had is checked by its own sentence on how it confines, in the details.
Value: failing tests over all worlds. Bar: 0, and every skip is a typed Unsupported that docs/runtimes.md lists.
Checked: every world gave results and its pytest came to its own end, the guest too; each world has at least `LEAST` tests.
Control: the same tests over a runtime that writes no memory limits (`tests/contracts/broken`), in the guest as root: the one
on a tree that is too large only together must fail; so that nothing else may be why, it must have passed with limits.
Details: by world passed, failed, unsupported, wall seconds and the sentence; seconds until the guest's first program ran.
Not counted: fetching the kernel (`tools/guest.sh`). `--quick` takes in each world the tests on bounds only (`QUICK`): within a
minute on two idle cores with the guest's root in the cache; the details say when it had to be built. Times inside are emulated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.guest import image, machine
from tests.guest.worlds import CONTROL, WORLDS

from benchmarks.harness import ROOT, Control, Options, Result, Skip, judge

NAME = "runtime_contract"
BAR = "on cgroup v1, v2 as root, v2 delegated and rlimits every test passes or is a typed Unsupported that the docs list"
QUICK = ("too_large", "too_much_memory", "grows", "double", "exact", "advisory", "holds", "is_said", "quota")
LEAST = 5
"""Tests in each world, or it is no world."""
HOST = {"host-cgroup": "TestProcessUnderCgroup", "host-rlimit": "TestProcessUnderRlimits"}
HOST_MAX_S = 300.0
EXPECTED = {
    "v2-root": "cgroup v2",
    "v2-delegated": "cgroup v2",
    "v2-no-cpu": "cgroup v2",
    "v2-no-rights": "rlimits and polling",
}
"""World -> how its sentence begins."""


def run(options: Options) -> Result:
    """Run the suite in all worlds."""
    only = QUICK if options.quick else ()
    begun_s = time.monotonic()
    built = not image.is_built(machine.CACHE)
    try:
        boot = machine.boot([*WORLDS, CONTROL.name], only=only)
    except machine.Missing as missing:
        raise Skip(str(missing)) from missing
    broken = boot.worlds.pop(CONTROL.name, {})
    worlds = boot.worlds | {name: on_this_machine(name, only) for name in HOST}
    assert boot.ended, f"the guest did not come to its own end; look into {machine.LOG}"
    page = (ROOT / "docs/runtimes.md").read_text()
    failed = sum(check(name, worlds.get(name, {}), page) for name in (*WORLDS, *HOST))
    holds, why = judge(failed == 0, control(broken, worlds["v2-root"]))
    return Result(
        value=failed,
        spread=0.0,
        unit="failing tests",
        holds=holds,
        why=why if holds or not failed else f"{failed} tests fail: {failures(worlds)}",
        control=control(broken, worlds["v2-root"]),
        details={
            "worlds": {name: row(world) for name, world in worlds.items()},
            "guest_kernel": boot.kernel,
            "guest_up_s": boot.up_s,
            "guest_wall_s": boot.wall_s,
            "guest_root_built": built,
            "guest_log": str(machine.LOG.relative_to(ROOT)),
            "wall_s": time.monotonic() - begun_s,
            "slowness": machine.SLOWNESS,
            "load_1min": os.getloadavg()[0],
            "tests_of_each_world": "those on bounds" if only else "all",
        },
    )


def on_this_machine(name: str, only: tuple[str, ...]) -> dict[str, Any]:
    """Return what pytest found here, as a world of the guest reports it."""
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tests.guest.report", str(report), "-q", "-p", "no:cacheprovider"]
        command += [f"tests/runtimes/test_process.py::{HOST[name]}", "-k", " or ".join(only)]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HOST_MAX_S, check=False
        )
        assert report.exists(), f"{name}: pytest ended with {done.returncode} and no report: {done.stdout[-500:]}"
        found: dict[str, Any] = json.loads(report.read_text())
    return found | {"status": done.returncode, "wall_s": time.monotonic() - begun_s}


def check(name: str, world: dict[str, Any], page: str) -> int:
    """Return the number of failed tests. Raises AssertionError for a world without results or with a skip nobody listed."""
    tests = world.get("tests", {})
    assert len(tests) >= LEAST, f"{name} gave {len(tests)} results"
    assert world["status"] in (0, 1), f"{name}: pytest ended with {world['status']}"
    sentence = str(world.get("confinement", ""))
    assert sentence.startswith(EXPECTED.get(name, "")), f"{name} was confined by: {sentence}"
    for test, found in tests.items():
        assert found["outcome"] != "skipped" or machine.is_listed(found["why"], page), (
            f"{name}, {test}: skipped, {found['why']}"
        )
    return machine.counts(world).get("failed", 0)


def control(broken: dict[str, Any], whole: dict[str, Any]) -> Control:
    """Return whether the test that must fail without limits did, and passed with them."""
    name = "test_a_tree_that_is_too_large_only_together_is_ended"
    outcomes = [
        next((f["outcome"] for t, f in world.get("tests", {}).items() if name in t), "missing") for world in (broken, whole)
    ]
    return Control(
        name="a runtime that writes no memory limits",
        value=float(machine.counts(broken).get("failed", 0)),
        failed=outcomes == ["failed", "passed"],
        how=f"{name}: {outcomes[0]} without limits, {outcomes[1]} with them",
    )


def row(world: dict[str, Any]) -> dict[str, Any]:
    """Return a world's line of the details."""
    counts = machine.counts(world)
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0),
        "unsupported": counts.get("skipped", 0),
        "wall_s": round(float(world["wall_s"]), 1),
        "confinement": world.get("confinement", ""),
    }


def failures(worlds: dict[str, dict[str, Any]]) -> str:
    """Return the failed tests with their worlds, in words."""
    names = [
        f"{test} ({name})" for name, world in worlds.items() for test, f in world["tests"].items() if f["outcome"] == "failed"
    ]
    return ", ".join(names)
