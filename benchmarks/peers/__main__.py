"""`python -m benchmarks.peers list | install NAME … | start NAME --model NAME=FILE`.

Exit: 0 done, 1 not to be had here, 2 wrong use. `start` prints one JSON line {"pid": …, "http": …, "grpc": …}, stays until
SIGTERM or SIGINT, and ends the server then.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from benchmarks import peers
from benchmarks.harness import Skip
from benchmarks.peers import homes
from benchmarks.peers.processes import Order, start


def main(argv: list[str]) -> int:
    """Parse and do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Install and start other servers.")
    parser.add_argument("--root", type=Path, default=homes.default_root(), help="where peers live (default: %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="name all peers")
    installing = verbs.add_parser("install", help="make the homes of peers")
    installing.add_argument("names", nargs="+", choices=(*peers.NAMES, "all"), metavar="NAME")
    starting = verbs.add_parser("start", help="start one server, until SIGTERM")
    starting.add_argument("name", choices=peers.NAMES, metavar="NAME")
    starting.add_argument("--model", action="append", required=True, metavar="NAME=FILE")
    starting.add_argument("--threads", type=int, default=2)
    starting.add_argument("--max-batch-rows", type=int, default=32)
    chosen = parser.parse_args(argv)
    root = chosen.root.resolve()
    if chosen.verb == "list":
        for name in peers.NAMES:
            print(f"{name:14} {'made' if homes.made(root, name) else '-':5} {peers.peer(name).ABOUT}")
        return 0
    if chosen.verb == "install":
        return install(root, list(peers.NAMES) if "all" in chosen.names else chosen.names)
    return serve(root, chosen)


def install(root: Path, names: list[str]) -> int:
    """Install each, say what can't be had."""
    failed = 0
    for name in names:
        try:
            print(f"{name}: {peers.peer(name).install(root)}", flush=True)
        except Skip as reason:
            failed = 1
            print(f"{name}: {reason}", flush=True)
    return failed


def serve(root: Path, chosen: argparse.Namespace) -> int:
    """Start one server and stay."""
    module = peers.peer(chosen.name)
    if not isinstance(module, peers.ServerPeer):
        print(f"{chosen.name} is no server")
        return 2
    models = {name: Path(file).resolve() for name, _, file in (one.partition("=") for one in chosen.model)}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    try:
        home = module.install(root)
        with tempfile.TemporaryDirectory() as folder:
            order = Order(models=models, folder=Path(folder), threads=chosen.threads, max_batch_rows=chosen.max_batch_rows)
            with start(chosen.name, module.launch(home, order), Path(folder)) as served:
                print(json.dumps({"pid": served.pid, **served.addresses}), flush=True)
                served.process.wait()
    except Skip as reason:
        print(reason)
        return 1
    return 0


def leave(*unused: object) -> NoReturn:
    """Leave in order; a second signal does not interrupt the ending of the server."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
