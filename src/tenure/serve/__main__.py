"""`python -m tenure.serve --model PATH`: one serving process. Prints its addresses as one JSON line once it listens.

Inside a lease it also writes endpoints.json and, at the end, result.json. Exit: 0 served and drained, 1 some accepted
requests were not answered within the grace, 2 it could not start (the reason is on standard error).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tenure.errors import TenureError
from tenure.serve.dataplane import Limits
from tenure.serve.plane import ModelOptions
from tenure.serve.processes import leased_threads, worker_dir, write_json
from tenure.serve.server import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit code."""
    options = _parser().parse_args(argv)
    folder = worker_dir(os.environ)

    def listening(endpoints: Mapping[str, str]) -> None:
        if folder is not None:
            write_json(folder / "endpoints.json", endpoints)
        sys.stdout.write(json.dumps({"listening": endpoints}) + "\n")
        sys.stdout.flush()

    limits = Limits(
        max_request_bytes=options.max_request_bytes,
        threads=options.threads or leased_threads(os.environ),
        options=ModelOptions(max_queue=options.max_queue, timeout_s=options.timeout_s),
    )
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            drained = runner.run(
                serve(
                    options.model,
                    name=options.name,
                    host=options.host,
                    http_port=options.http_port,
                    grpc_port=options.grpc_port,
                    limits=limits,
                    grace_s=options.grace_s,
                    on_listening=listening,
                )
            )
    except TenureError as error:
        sys.stderr.write(f"tenure.serve: {error}\n")
        return 2
    if folder is not None:
        write_json(folder / "result.json", {"state": "done", "drained": drained})
    if not drained:
        sys.stderr.write("tenure.serve: some accepted requests were not answered within the grace\n")
        return 1
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def _port(text: str) -> int | None:
    if text in ("off", "none"):
        return None
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 (any free one) to 65535, or off; found {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenure.serve", description="Serve models by Open Inference Protocol v2.")
    parser.add_argument("--model", type=Path, required=True, help="a model file, or a folder of models")
    parser.add_argument("--name", default="", help="name of a single model (default: its file's stem)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=_port, default=0, help="0: any free one; off: no HTTP")
    parser.add_argument("--grpc-port", type=_port, default=0, help="0: any free one; off: no gRPC")
    parser.add_argument("--threads", type=int, default=0, help="threads per model (default: the lease's CPU share)")
    parser.add_argument("--max-queue", type=int, default=ModelOptions().max_queue, help="requests waiting per model")
    parser.add_argument("--max-request-bytes", type=int, default=Limits().max_request_bytes)
    parser.add_argument("--timeout-s", type=float, default=ModelOptions().timeout_s, help="from acceptance to answer")
    parser.add_argument("--grace-s", type=float, default=5.0, help="to answer what was accepted, after SIGTERM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
