"""Write docs/cli.md from what the commands say of themselves.

python tools/cli_reference.py            write the page
python tools/cli_reference.py --check    end with 1 when the page is not what it would write
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100


def help_of(*argv: str) -> str:
    """Return the help text of one command, 100 columns wide."""
    from tenure.cli.main import run

    os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = str(WIDTH)
    text = StringIO()
    with redirect_stdout(text):
        code = run([*argv, "--help"])
    if code != 0:
        raise SystemExit(f"tenure {' '.join(argv)} --help ended with {code}")
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def page() -> str:
    """Return the whole reference page."""
    from tenure.cli.commands import app
    from tenure.cli.exits import MEANINGS

    names = [[command.name or command.callback.__name__] for command in app.registered_commands if command.callback]
    for group in app.registered_groups:
        inside = group.typer_instance
        assert inside is not None
        names += [[str(inside.info.name), str(command.name)] for command in inside.registered_commands]
    parts = [
        "# Command line",
        "Made by `make docs` from the commands' own help; do not edit by hand.",
        "Every command takes `--json` (one line of JSON on stdout, errors included) and `--home`. Progress bars appear on a "
        "terminal only; elsewhere each step prints one plain line. Messages about errors go to stderr.",
        "## Exit codes",
        "\n".join(["| code | meaning |", "| --- | --- |", *(f"| {code} | {text} |" for code, text in MEANINGS.items())]),
        "## tenure",
        f"```text\n{help_of()}\n```",
    ]
    for name in names:
        parts += [f"## tenure {' '.join(name)}", f"```text\n{help_of(*name)}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write or check the page; return the exit code."""
    wanted = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted)
        return 0
    found = PAGE.read_text() if PAGE.exists() else ""
    if found != wanted:
        sys.stderr.write(f"{PAGE} is not what the commands say; write it anew with: make docs\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
