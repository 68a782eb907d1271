"""Makes load runs one after the other in one process of its own: one JSON line in (a plan's fields), one out (its verdict).

A process of its own, so that what else the benchmark does (freezing a server) does not hold the generator up.
"""

from __future__ import annotations

import json
import sys

from tenure.serve.load.plan import LoadPlan
from tenure.serve.load.report import measure


def main() -> None:
    """Answer until nothing more is asked."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        verdict = measure(LoadPlan(**json.loads(line))).verdict
        print(json.dumps({"valid": verdict.valid, "reasons": verdict.reasons}), flush=True)


if __name__ == "__main__":
    main()
