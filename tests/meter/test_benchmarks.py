import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.harness")


def bench(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.real
def test_the_list_names_each_benchmark_with_its_bar():
    done = bench("--list")
    assert done.returncode == 0
    assert "meter_overhead" in done.stdout
    assert "0.01 of one core" in done.stdout


@pytest.mark.real
def test_an_unknown_benchmark_is_refused_with_those_there_are():
    done = bench("no-such")
    assert done.returncode == 2
    assert "meter_overhead" in done.stderr


def test_rounds_are_interleaved_the_same_way_for_the_same_seed(harness):
    def order(seed):
        calls = []
        found = harness.interleaved({n: lambda n=n: calls.append(n) or n for n in "ab"}, 4, seed=seed, warm_up=1)
        assert found == {"a": ["a"] * 4, "b": ["b"] * 4}
        assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 10, 2))
        return calls

    assert order(3) == order(3)


def test_spread_is_the_interquartile_range(harness):
    assert harness.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert harness.spread([7.0]) == 0.0


def test_a_control_that_passes_voids_the_result(harness):
    holds, why = harness.judge(True, harness.Control(name="naive", value=1.0, failed=False))
    assert not holds
    assert "naive" in why


def test_missing_data_and_failed_checks_still_end_in_one_json_line(harness, monkeypatch, capsys, tmp_path):
    main = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(main, "RESULTS", tmp_path)

    def run(options):
        if options.quick:
            raise AssertionError("3 of 4 answers were wrong")
        options.need_data("nothing-there")

    module = type("Fake", (), {"NAME": "fake", "BAR": "it is quick", "run": staticmethod(run)})
    monkeypatch.setattr(main, "discover", lambda: ({"fake": module}, {}))
    assert main.main(["fake", "--data", str(tmp_path)]) == 0
    skipped = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert skipped["holds"] is None
    assert "nothing-there" in skipped["why"]
    assert main.main(["fake", "--quick"]) == 1
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert failed["holds"] is False
    assert "3 of 4" in failed["why"]
    kept = json.loads((tmp_path / "fake.json").read_text())
    assert kept["command"] == "python -m benchmarks fake --quick"
    assert kept["date"]
