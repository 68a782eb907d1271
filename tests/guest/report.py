"""What a run of pytest found, as plain data: by test, `passed`, `failed`, `skipped` with why, and facts that tests note.

`python -m tests.guest.report FILE ARGUMENTS…` runs pytest and writes that to the file as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


class Report:
    """A plugin of pytest. `tests`: name -> {"outcome", "wall_s", "why"}; `facts`: what tests noted with `record_property`.

    say: told each test's outcome as it comes.
    """

    def __init__(self, say: Callable[[str], object] = lambda text: None) -> None:
        self._say = say
        self.tests: dict[str, dict[str, object]] = {}
        self.facts: dict[str, object] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's worst phase."""
        name = report.nodeid.split("::", 1)[1]
        self.facts.update(report.user_properties)
        known = self.tests.setdefault(name, {"outcome": "passed", "wall_s": 0.0, "why": ""})
        known["wall_s"] = round(float(str(known["wall_s"])) + report.duration, 2)
        if report.outcome != "passed" and known["outcome"] != "failed":
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)[-2000:]
            known.update(outcome=report.outcome, why=why)
        if report.when == "teardown":
            self._say(f"{known['outcome']} {name} {known['wall_s']} s")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep a module that cannot be loaded as a failed test."""
        if report.failed:
            self.tests[f"loading {report.nodeid}"] = {"outcome": "failed", "wall_s": 0.0, "why": str(report.longrepr)[-2000:]}


if __name__ == "__main__":
    found = Report()
    code = pytest.main(sys.argv[2:], plugins=[found])
    Path(sys.argv[1]).write_text(json.dumps(found.facts | {"tests": found.tests}))
    sys.exit(code)
