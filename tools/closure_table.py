"""Print the table of docs/closures.md from analyses: `tenure image analyse --out DIR ...` for each, then

python tools/closure_table.py "ONNX Runtime=DIR" "LiteRT=DIR" ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1e6
KINDS = {"shared objects": "shared objects", "Python sources": "Python sources", "other files": "other files"}
ENGINES = ("sklearn", "scipy", "onnxruntime", "ai_edge_litert", "torch", "numpy", "Python", "the system", "the program")


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    if not argv or any("=" not in word for word in argv):
        print(__doc__, file=sys.stderr)  # noqa: T201
        return 2
    names = [word.partition("=")[0] for word in argv]
    found = [json.loads((Path(word.partition("=")[2]) / "analysis.json").read_text()) for word in argv]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("files; size (MB)", lambda facts: f"{facts['report']['files']}; {facts['report']['size_bytes'] / MB:.0f}"),
        ("of them opened", lambda facts: str(facts["report"]["opened"])),
        ("looked at, not opened", lambda facts: str(facts["report"]["looked_at"])),
        ("by analysis alone", lambda facts: str(_by_analysis(facts["report"]))),
        *((f"{kind} (count; MB)", lambda facts, kind=kind: _share(facts["report"]["kinds"], kind)) for kind in KINDS),
        *((f"{part} (files; MB)", lambda facts, part=part: _share(facts["report"]["parts"], part)) for part in ENGINES),
        ("everything else (files; MB)", lambda facts: _rest(facts["report"]["parts"])),
        ("largest file (MB)", lambda facts: _largest(facts["report"]["largest"][0])),
        ("system calls", lambda facts: str(len(facts["report"]["system_calls"]))),
        *(
            (f"runs in {form}", lambda facts, form=form: _verdict(facts["forms"], form))
            for form in ("microvm", "nanos", "unikraft")
        ),
    ]
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {head} | {' | '.join(cell(facts) for facts in found)} |" for head, cell in rows]
    print("\n".join(lines))  # noqa: T201
    return 0


def _by_analysis(report: dict[str, Any]) -> int:
    return int(report["files"] - report["opened"] - report["looked_at"])


def _share(shares: list[dict[str, Any]], name: str) -> str:
    found = next((share for share in shares if share["name"] == name), None)
    return f"{found['files']}; {found['size_bytes'] / MB:.1f}" if found else "-"


def _rest(shares: list[dict[str, Any]]) -> str:
    rest = [share for share in shares if share["name"] not in ENGINES]
    return f"{sum(share['files'] for share in rest)}; {sum(share['size_bytes'] for share in rest) / MB:.1f}"


def _largest(file: dict[str, Any]) -> str:
    name = Path(file["path"]).name.partition(".")[0].partition("-")[0].rstrip("_")
    return f"{name} {file['size_bytes'] / MB:.0f}"


def _verdict(forms: list[dict[str, Any]], name: str) -> str:
    return next((str(form["verdict"]) for form in forms if form["form"] == name), "-")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
