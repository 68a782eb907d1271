"""The checks for a real device, made on a made-up one; and on a real one where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gpu.machine import ROOT

from tenure.meter.nvml import gpus

SCRIPT = ROOT / "tests" / "gpu" / "check_on_device.sh"
QUICK = ("inventory", "polled", "mps_starts", "memory_refused", "memory_counted", "around_mps", "whole_lease")
"""Those that measure no rate: a made-up device has none."""


def checked(environment: dict[str, str], results: Path, *only: str) -> dict[str, dict[str, object]]:
    words = ["bash", str(SCRIPT), str(results), *(["--only", *only] if only else [])]
    done = subprocess.run(words, env=environment | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=118)
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["name"] == "gpu_on_device", done.stderr
    assert json.loads(results.read_text()) == last["checks"]
    assert done.returncode == (last["holds"] is False)
    found: dict[str, dict[str, object]] = last["checks"]
    return found


@pytest.mark.real
def test_every_check_that_measures_no_rate_holds_on_a_made_up_device(made_up, tmp_path):
    found = checked(made_up.environment(), tmp_path / "results.json", *QUICK)
    assert list(found) == list(QUICK)
    assert {name: check for name, check in found.items() if check["holds"] is not True} == {}


@pytest.mark.real
def test_without_the_control_program_the_checks_of_mps_say_why_they_are_not_made(made_up, tmp_path):
    environment = made_up.environment() | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    found = checked(environment, tmp_path / "results.json", "polled", "memory_refused")
    assert found["polled"]["holds"] is True
    assert found["memory_refused"]["holds"] is None
    assert "nvidia-cuda-mps-control" in str(found["memory_refused"]["why"])


@pytest.mark.real
def test_a_device_that_holds_no_bound_fails_the_check(made_up, tmp_path):
    environment = made_up.environment(TENURE_FAKE_CUDA="unbounded")
    assert checked(environment, tmp_path / "results.json", "memory_refused")["memory_refused"]["holds"] is False


@pytest.mark.gpu
def test_every_check_that_can_be_made_holds_on_this_device(tmp_path):
    if not gpus():
        pytest.skip("no NVIDIA device on this machine")
    found = checked(dict(os.environ), tmp_path / "results.json")
    assert {name: check for name, check in found.items() if check["holds"] is False} == {}
