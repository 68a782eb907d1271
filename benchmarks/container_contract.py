"""Whether the container runtime keeps the contract of every runtime on a real Docker Engine.

World: Docker as the system packages it, an engine of the benchmark's own (tests/docker_engine.py, live-restore on), the base
image made from this machine. Suite: tests/contracts/runtime_contract.py through tests/runtimes/test_container.py; with it the
tests of an engine that is restarted, killed or gone (test_container_engine.py) and of what is refused
(test_container_attacks.py).
Value: failing tests. Bar: 0; a skip counts as a failure once an engine could be started.
Checked: at least `LEAST` tests gave results.
Control: the same tests on bounds over a runtime that asks the engine for no limits at all (tests/contracts/unbounded.py): a
tree that is too large only together must not be ended, and with limits it must be.
Podman and gVisor: run where their programs are; none is installed here, which the details say.
`--quick`: the tests on bounds only (`QUICK`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import docker_engine

from benchmarks.harness import ROOT, Control, Options, Result, Skip, judge

NAME = "container_contract"
BAR = "the contract of every runtime holds over containers of a real Docker Engine: 0 tests fail or skip"
SUITE = (
    "tests/runtimes/test_container.py",
    "tests/runtimes/test_container_engine.py",
    "tests/runtimes/test_container_attacks.py",
)
QUICK = ("too_large", "too_much", "grows", "double_forked", "deadline_given", "exits_with_0")
CONTROL_TEST = "test_a_tree_that_is_too_large_only_together_is_ended"
LEAST = 6
MAX_S = 900.0


def run(options: Options) -> Result:
    """Run the suite, and one test of it without limits."""
    if why := docker_engine.why_absent():
        raise Skip(why)
    begun_s = time.monotonic()
    suite = SUITE[:1] if options.quick else SUITE
    found = _pytest(*suite, "-k", " or ".join(QUICK) if options.quick else "")
    whole_s = time.monotonic() - begun_s
    unbounded = _pytest("-p", "tests.contracts.unbounded", SUITE[0], "-k", CONTROL_TEST)
    assert len(found) >= LEAST, f"only {len(found)} tests gave results"
    failed = {name: entry for name, entry in found.items() if entry["outcome"] != "passed"}
    outcomes = [next((e["outcome"] for n, e in world.items() if CONTROL_TEST in n), "missing") for world in (unbounded, found)]
    control = Control(
        name="a runtime that asks for no limits",
        value=float(sum(entry["outcome"] == "failed" for entry in unbounded.values())),
        failed=outcomes == ["failed", "passed"],
        how=f"{CONTROL_TEST}: {outcomes[0]} without limits, {outcomes[1]} with them",
    )
    holds, why = judge(not failed, control)
    return Result(
        value=len(failed),
        spread=0.0,
        unit="failing tests",
        holds=holds,
        why=why if holds or not failed else "; ".join(f"{name}: {entry['why'][-300:]}" for name, entry in failed.items()),
        control=control,
        details={
            "tests": len(found),
            "passed": len(found) - len(failed),
            "wall_s": round(whole_s, 1),
            "tests_of_the_suite": "those on bounds" if options.quick else "all",
            "engine": _engine(),
            "podman": "not here" if shutil.which("podman") is None else "here, not run by this benchmark",
            "runsc": "not here" if shutil.which("runsc") is None else "here, not run by this benchmark",
            "load_1min": os.getloadavg()[0],
        },
    )


def _engine() -> str:
    done = subprocess.run(["/usr/sbin/dockerd", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _pytest(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tests.guest.report", str(report), "-q", "-p", "no:cacheprovider", *arguments]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MAX_S,
            check=False,
            start_new_session=True,
        )
        assert report.exists(), f"pytest ended with {done.returncode} and no report: {(done.stdout + done.stderr)[-500:]}"
        tests: dict[str, Any] = json.loads(report.read_text())["tests"]
    return tests
