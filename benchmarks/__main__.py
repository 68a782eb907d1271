"""Runs one benchmark: `python -m benchmarks NAME [--data DIR] [--seed N] [--quick]`. Its last line is the result as JSON.

Exit: 0 the bar holds or could not be judged here, 1 it does not hold, 2 wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmarks
from benchmarks.harness import ROOT, Options, Result, Skip, data_folder
from tenure.meter.machine import machine, versions

RESULTS = Path(__file__).resolve().parent / "results"
_VERSIONED = (
    *("tenure", "numpy", "scipy", "scikit-learn", "onnx", "onnxruntime", "skl2onnx", "psutil", "grpcio", "sqlalchemy"),
    *("torch", "keras"),
)


def main(argv: list[str]) -> int:
    """Parse, run, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure one bar of Tenure.")
    parser.add_argument("name", nargs="?", help="the benchmark to run")
    parser.add_argument("--list", action="store_true", help="name all benchmarks and their bars")
    parser.add_argument("--data", metavar="DIR", help="data folder (default: $TENURE_DATA, then ../shared/data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smaller sample, within a minute")
    chosen = parser.parse_args(argv)
    found, broken = discover()
    if chosen.list or not chosen.name:
        for name, module in sorted(found.items()):
            print(f"{name:20} {module.BAR}")
        for name, error in sorted(broken.items()):
            print(f"{name:20} can't be loaded: {error}")
        return 0 if chosen.list else 2
    if chosen.name not in found:
        why = f"can't be loaded: {broken[chosen.name]}" if chosen.name in broken else "is not a benchmark"
        parser.error(f"{chosen.name!r} {why}; there are: {', '.join(sorted(found))}")
    module = found[chosen.name]
    try:
        options = Options(quick=chosen.quick, seed=chosen.seed, data=data_folder(chosen.data))
        result = module.run(options)
    except Skip as reason:
        result = Result(value=None, spread=None, unit="", holds=None, why=str(reason))
    except AssertionError as failed:
        result = Result(value=None, spread=None, unit="", holds=False, why=f"a check failed: {failed}")
    record = as_record(module, result, chosen.seed)
    keep(record, argv)
    print(json.dumps(record))
    return 1 if result.holds is False else 0


def discover() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Return NAME -> module for each module that has NAME, BAR and run; and module -> error for those that can't be loaded."""
    found: dict[str, ModuleType] = {}
    broken: dict[str, str] = {}
    for info in pkgutil.iter_modules(benchmarks.__path__):
        if info.name.startswith("_"):
            continue
        try:
            module = importlib.import_module(f"benchmarks.{info.name}")
        except Exception as error:  # one broken benchmark must not hide the others; it is listed with its error
            broken[info.name] = f"{type(error).__name__}: {error}"
            continue
        if all(hasattr(module, name) for name in ("NAME", "BAR", "run")):
            found[module.NAME] = module
    return found, broken


def as_record(module: ModuleType, result: Result, seed: int) -> dict[str, Any]:
    """Return the result in the fields that CONTRACTS name."""
    record: dict[str, Any] = {
        "name": module.NAME,
        "value": result.value,
        "spread": result.spread,
        "unit": result.unit,
        "bar": module.BAR,
        "holds": result.holds,
        "reference": dict(result.reference),
        "control": asdict(result.control) if result.control else None,
        "machine": machine().machine_class,
        "versions": versions(*_VERSIONED),
        "seed": seed,
        "details": dict(result.details),
    }
    if result.why:
        record["why"] = result.why
    return record


def keep(record: dict[str, Any], argv: list[str]) -> None:
    """Write results/<name>.json with command, commit and date."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    context = {
        "command": " ".join(["python -m benchmarks", *argv]),
        "commit": head.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine_facts": asdict(machine()),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{record['name']}.json").write_text(json.dumps(record | context, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
