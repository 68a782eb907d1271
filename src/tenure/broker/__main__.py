"""``python -m tenure.broker --home DIR``: be the broker of a home. Started by `client.connect`, or by `tenure up`."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from pathlib import Path

from tenure.broker.client import EXIT_HELD, EXIT_REASONS
from tenure.broker.daemon import HomeHeld, home_lock, serve
from tenure.errors import CorruptData, SpecError, TenureError
from tenure.fleet.local import LocalFleet, Part
from tenure.resources import parse_bytes


def _part(text: str) -> Part:
    """Return a node from ``name`` or ``name:cpus:memory``, e.g. ``a:1:512MiB``."""
    name, *rest = text.split(":")
    if len(rest) not in (0, 2):
        raise SpecError(f"a node is written name or name:cpus:memory, e.g. a:1:512MiB; found {text!r}")
    try:
        return Part(name=name, cpus=float(rest[0]), memory_bytes=parse_bytes(rest[1])) if rest else Part(name=name)
    except ValueError as error:
        raise SpecError(f"the cpus of node {text!r} must be a number") from error


def _remembered(home: Path, options: argparse.Namespace) -> argparse.Namespace:
    """Return the options, or those of a broker that died here without leave: its agents and leases are still about.

    Options given by hand go first. Raises CorruptData when the note cannot be read.
    """
    note = home / "broker.json"
    if not options.node and not options.persistent and note.exists():
        try:
            kept = json.loads(note.read_text())
            options.node, options.persistent, options.confine = (
                list(kept["nodes"]),
                bool(kept["persistent"]),
                str(kept["confine"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(
                f"{note} should hold nodes, persistent and confine: {error!r}. Remove it and try again."
            ) from error
    draft = home / ".broker.json"
    draft.write_text(json.dumps({"nodes": options.node, "persistent": options.persistent, "confine": options.confine}))
    draft.replace(note)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run until nobody is left. Returns the exit code: 0, EXIT_HELD, or, the reason on stderr, one of EXIT_REASONS or 1."""
    parser = argparse.ArgumentParser(prog="python -m tenure.broker", description="Be the broker of a home.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--persistent", action="store_true", help="stay when no client and no lease is left")
    parser.add_argument("--node", action="append", default=[], metavar="NAME[:CPUS:MEMORY]", help="an agent to grant on")
    parser.add_argument("--confine", default="auto", choices=("auto", "cgroup", "rlimit"))
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        home = options.home.resolve()
        with home_lock(home):
            options = _remembered(home, options)
            parts = [_part(text) for text in options.node] or [Part()]
            fleet = LocalFleet(home, parts, confine=options.confine)
            if asyncio.run(serve(home, fleet, persistent=options.persistent)) == 0:
                (home / "broker.json").unlink(missing_ok=True)
    except HomeHeld as error:
        logging.info("%s", error)
        return EXIT_HELD
    except TenureError as error:
        logging.error("%s: %s", type(error).__name__, error)
        return next((code for code, kind in EXIT_REASONS.items() if isinstance(error, kind)), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
