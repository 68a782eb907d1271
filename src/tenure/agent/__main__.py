"""`python -m tenure.agent`: run one node's agent until its term ends or it is told to leave. People use `tenure up`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tenure.agent import shares
from tenure.agent.gpus import GpuGuard, declare, node_gpus
from tenure.agent.node import Agent
from tenure.errors import Refused, SpecError, TenureError, Unavailable
from tenure.meter.machine import capacity
from tenure.protocols import SystemClock
from tenure.resources import parse_bytes, parse_duration
from tenure.runtimes.several import Runtimes
from tenure.sockets import check_owner

REFUSED = 3
"""Exit code: the machine's share that was asked for is taken."""
TAKEN = 4
"""Exit code: this home already has an agent for this node."""


def main(argv: list[str] | None = None) -> int:
    """Run the agent; return an exit code: 0, 1 for an error, REFUSED, TAKEN."""
    options = _options(argv)
    try:
        check_owner(options.home)
    except SpecError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    state_dir = options.home / "nodes" / options.node
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(state_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"node {options.node} of {options.home} already has an agent", file=sys.stderr)  # noqa: T201
        return TAKEN
    try:
        asyncio.run(_run(options, state_dir))
    except TenureError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return REFUSED if isinstance(error, Refused) else 1
    finally:
        os.close(lock)
    return 0


async def _run(options: argparse.Namespace, state_dir: Path) -> None:
    clock = SystemClock()
    whole = capacity(options.home)
    declared = declare(whole.gpus, options.gpus, model=options.gpu_model, memory_bytes=options.gpu_memory)
    offered = shares.reserve(
        str(options.home),
        options.node,
        whole,
        boot_id=clock.boot_id(),
        cpus=options.cpus,
        memory_bytes=options.memory,
        gpus=None if declared else options.gpus,
    )
    try:
        gpus, watch = node_gpus(declared or offered.gpus, state_dir)
        runtimes = Runtimes(state_dir, confine=options.confine, clock=clock, gpus=gpus)
        agent = Agent(
            options.node,
            options.socket,
            runtimes,
            state_dir=state_dir,
            capacity=replace(offered, gpus=gpus.all),
            clock=clock,
            term_s=options.term,
            guard=GpuGuard(runtimes, watch) if watch else None,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, agent.end)
        await agent.run()
        if not agent.holds:
            gpus.close()
    finally:
        with contextlib.suppress(Unavailable):  # the entry is void anyway once this process is gone
            shares.release()


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tenure.agent", description=__doc__)
    parser.add_argument("--home", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--cpus", type=float, help="cores to offer; default: all that is not reserved by other agents")
    parser.add_argument("--memory", type=parse_bytes, help="memory to offer, e.g. 4GiB")
    parser.add_argument("--gpus", type=int, help="devices to offer; on a machine without any, declared ones")
    parser.add_argument("--gpu-model", default="", help="of declared devices")
    parser.add_argument("--gpu-memory", type=parse_bytes, default=0, help="of each declared device")
    parser.add_argument("--term", type=parse_duration, default=60.0, help="how long to act without hearing from the broker")
    parser.add_argument("--confine", choices=("auto", "cgroup", "rlimit"), default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
