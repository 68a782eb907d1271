"""``python -m tenure.broker --home DIR``: be the broker of a home. Started by `client.connect`, or by `tenure up`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from tenure.agent.start import is_agent_alive
from tenure.broker.client import EXIT_HELD, EXIT_REASONS
from tenure.broker.daemon import HomeHeld, home_lock, serve
from tenure.broker.note import Note, read_note, remove_note, write_note
from tenure.errors import TenureError
from tenure.fleet.contract import Part
from tenure.fleet.local import LocalFleet
from tenure.homes import check_owner, is_shared


def _told(home: Path, options: argparse.Namespace) -> Note:
    """Return what the options say, and otherwise what a broker was told that died here: its agents and leases are about.

    Without either, the whole machine is one node; only a broker that is to stay may begin without a node. Raises CorruptData
    when the note of the dead one cannot be read.
    """
    told = Note(parts=tuple(Part.parse(text) for text in options.node), persistent=options.persistent, confine=options.confine)
    if told.parts:
        return told
    before = read_note(home)
    if before is not None and told.persistent and not before.persistent:
        # Of a run's own node, which takes all it can get, only one that still lives stands in the way of what is to come.
        before = replace(before, parts=tuple(part for part in before.parts if is_agent_alive(home, part.name)))
    if before is not None and before.parts:
        return replace(before, persistent=before.persistent or told.persistent)
    return told if told.persistent else replace(told, parts=(Part(),))


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
        check_owner(home)
        if is_shared(home):
            os.umask(0o077)  # of what lies beside the tenants' own folders, nobody reads a name
        with home_lock(home):
            told = _told(home, options)
            fleet = LocalFleet(home, told.parts, confine=told.confine)

            def remember(persistent: bool, order: str, metrics_port: int) -> None:
                said = replace(told, parts=fleet.parts(), persistent=persistent, order=order, metrics_port=metrics_port)
                write_note(home, said)

            remember(told.persistent, told.order, told.metrics_port)
            serving = serve(
                home,
                fleet,
                persistent=told.persistent,
                order=told.order,
                metrics_port=told.metrics_port,
                remember=remember,
            )
            if asyncio.run(serving) == 0:
                remove_note(home)
    except HomeHeld as error:
        logging.info("%s", error)
        return EXIT_HELD
    except TenureError as error:
        logging.error("%s: %s", type(error).__name__, error)
        return next((code for code, kind in EXIT_REASONS.items() if isinstance(error, kind)), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
