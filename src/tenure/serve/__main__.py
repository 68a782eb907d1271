"""`python -m tenure.serve --model PATH`: one serving process. Prints its addresses as one JSON line once it listens.

Inside a lease it also writes endpoints.json and, at the end, result.json. Exit: 0 served and drained, 1 some accepted
requests were not answered within the grace, 2 it could not start (the reason is on standard error).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tenure.errors import SpecError, TenureError
from tenure.resources import parse_bytes
from tenure.serve.dataplane import DEFAULT_BUDGET_BYTES, Limits
from tenure.serve.limits import DoorLimits
from tenure.serve.plane import ModelOptions
from tenure.serve.processes import leased_memory_bytes, leased_threads, worker_dir, write_json
from tenure.serve.server import Address, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit code."""
    options = _parser().parse_args(argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a descriptor, and so is a region
    folder = worker_dir(os.environ)

    def listening(endpoints: Mapping[str, str]) -> None:
        if folder is not None:
            write_json(folder / "endpoints.json", endpoints)
        sys.stdout.write(json.dumps({"listening": endpoints}) + "\n")
        sys.stdout.flush()

    threads = options.threads or leased_threads(os.environ)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            drained = runner.run(
                serve(
                    options.model,
                    name=options.name,
                    address=Address(host=options.host, http_port=options.http_port, grpc_port=options.grpc_port),
                    limits=_limits(options, threads),
                    door_limits=DoorLimits(max_request_bytes=options.max_request_bytes),
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


def _limits(options: argparse.Namespace, threads: int) -> Limits:
    leased_bytes = leased_memory_bytes(os.environ)
    budget_bytes = min(DEFAULT_BUDGET_BYTES, leased_bytes // 4) if leased_bytes else DEFAULT_BUDGET_BYTES
    return Limits(
        max_request_bytes=options.max_request_bytes,
        memory_budget_bytes=options.memory_budget or budget_bytes,
        max_answer_bytes=options.max_answer_bytes,
        shared_memory=options.shared_memory == "on" or (options.shared_memory == "auto" and _is_loopback(options.host)),
        threads=threads,
        options=ModelOptions(
            max_batch_rows=options.max_batch_rows,
            max_delay_s=options.max_delay_ms / 1000,
            instances=options.instances,
            max_queue=options.max_queue,
            timeout_s=options.timeout_s,
            warmup=not options.no_warmup,
        ),
    )


def _port(text: str) -> int | None:
    if text in ("off", "none"):
        return None
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 (any free one) to 65535, or off; found {text!r}")
    return int(text)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except SpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"a whole number of 0 or more is needed; found {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tenure.serve", description="Serve models by Open Inference Protocol v2.")
    parser.add_argument("--model", type=Path, required=True, help="a model file, or a folder of models")
    parser.add_argument("--name", default="", help="name of a single model (default: its file's stem)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=_port, default=0, help="0: any free one; off: no HTTP")
    parser.add_argument("--grpc-port", type=_port, default=0, help="0: any free one; off: no gRPC")
    parser.add_argument(
        "--threads", type=_count, default=0, help="per model, shared by its instances (default: the lease's CPU share)"
    )
    parser.add_argument("--instances", type=_count, default=0, help="processes per model (default: 1)")
    parser.add_argument("--max-batch-rows", type=_count, default=0, help="rows run together (default: chosen by their size)")
    parser.add_argument("--max-delay-ms", type=float, default=0.0, help="how long a request may wait for company")
    parser.add_argument("--max-queue", type=_count, default=ModelOptions().max_queue, help="requests waiting per model")
    parser.add_argument(
        "--memory-budget",
        type=_bytes,
        default=0,
        help="for requests in memory (default: 256MiB, at most a quarter of the lease)",
    )
    parser.add_argument(
        "--shared-memory",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether clients may name shared memory of this machine (auto: where only this machine can reach the server)",
    )
    parser.add_argument("--max-request-bytes", type=_bytes, default=Limits().max_request_bytes)
    parser.add_argument("--max-answer-bytes", type=_bytes, default=Limits().max_answer_bytes)
    parser.add_argument(
        "--timeout-s", type=float, default=ModelOptions().timeout_s, help="from acceptance to answer, and of one run"
    )
    parser.add_argument("--no-warmup", action="store_true", help="do not run zeros through a model before it is ready")
    parser.add_argument("--grace-s", type=float, default=5.0, help="to answer what was accepted, after SIGTERM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
