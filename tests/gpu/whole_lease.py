"""Leases of parts of a device by a real agent: what their programs may and may not, who is ended, what is metered and left."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenure import orders, wire
from tenure.agent.gpus import mps_folder
from tenure.agent.start import start_agent
from tenure.errors import TenureError
from tenure.protocols import StartSpec
from tenure.resources import DeviceShare, Envelope, Gpu
from tenure.runtimes.mps import Mps
from tenure.sockets import LineClient

GIB = 1 << 30
STARTS_MAX_S = 20.0
ENDS_MAX_S = 15.0


def check(home: Path, gpu: Gpu, program: str, root: Path) -> dict[str, Any]:
    """Return what was seen; `holds` when all of `good` is."""
    os.environ["TENURE_SHARES_FILE"] = str(home / "shares.json")
    os.environ["PATH"] = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])
    home.mkdir()
    start_agent(home, "n1", home / "n1.sock", term_s=90.0, cpus=1.5, memory_bytes=1 << 30)
    client = LineClient(home / "n1.sock", orders.AGENT_OPS, who="check", timeout_s=STARTS_MAX_S)
    daemons = Mps(mps_folder(home / "nodes" / "n1"), program=program)
    try:
        found = _Leases(home, gpu, root, client).check()
        found["good"]["its daemon runs while the agent does"] = daemons.answers(gpu.uuid)
    finally:
        try:
            client.call("shutdown", wire.Nothing())
        except TenureError:
            pass
        client.close()
    found["good"]["its daemon ends with it"] = bool(_until(lambda: not daemons.answers(gpu.uuid), ENDS_MAX_S))
    return {"holds": all(found["good"].values()), **found}


class _Leases:
    """The leases of one agent."""

    def __init__(self, home: Path, gpu: Gpu, root: Path, client: LineClient) -> None:
        self._home, self._gpu, self._root, self._client = home, gpu, root, client
        self._boot: orders.BootTime = client.call("term", orders.NodeTerm(term_s=90.0, broker_fence=1))

    def check(self) -> dict[str, Any]:
        """Start a lease that keeps to its part, one that computes, one that takes too much and one that goes around MPS."""
        node = self._client.call("describe", wire.Nothing())
        self._start("part", "alloc", GIB, 2 * GIB, "--stay", fraction=0.25, memory_bytes=2 * GIB)
        self._start("worker", "churn", 9, fraction=0.5, memory_bytes=8 * GIB)
        outside = ("env", "CUDA_MPS_PIPE_DIRECTORY=/dev/null")
        self._start("around", "alloc", 64 << 20, "--stay", before=outside, fraction=0.1, memory_bytes=GIB)
        self._start("greedy", "alloc", 3 * GIB, "--stay", before=outside, fraction=0.1, memory_bytes=GIB)
        part, worker = self._said("part"), self._said("worker")
        around, greedy = self._end("around"), self._end("greedy")
        uses = _until(self._busy, ENDS_MAX_S) or self._uses()
        stop = orders.AgentStop(lease_id="part", fence=1, grace_s=0.0)
        self._client.call("stop", stop)
        stopped, done = self._end("part"), self._end("worker")
        told = json.loads((self._home / "work" / "part" / "lease.json").read_text())
        answers = self._said("worker", lines=2).splitlines()[-1:]
        return {
            "good": {
                "the node says how parts are held": [each.parts for each in node.capacity.gpus] == ["mps"],
                "memory past the part is refused": '"got": [true, false]' in part,
                "its file says how it is held": told["bounds"]["gpu_memory_bytes"] == "upper",
                "who takes too much is ended": "out_of_memory" in greedy and "NVML" in greedy,
                "who goes around MPS is ended": "failed" in around and "around MPS" in around,
                "memory is metered": uses.get("part", (0, 0))[1] >= GIB,
                "work is metered": uses.get("worker", (0, 0))[0] > 0,
                "who keeps to its part runs until it is stopped": "stopped" in stopped,
                "its neighbour's answers stay right": "completed" in done and '"right": true' in "".join(answers),
            },
            "said": {"part": part[-300:], "worker": worker[-300:], "worker_at_its_end": answers},
            "ends": {"around": around, "greedy": greedy, "part": stopped, "worker": done},
            "uses": uses,
            "bounds": told["bounds"],
            "held_by": told["gpus"]["held_by"],
            "confinement": dict(node.confinement),
        }

    def _start(self, lease_id: str, *words: object, fraction: float, memory_bytes: int, before: tuple[str, ...] = ()) -> None:
        kept = {name: value for name, value in os.environ.items() if name.startswith("TENURE_FAKE_")}
        path = os.pathsep.join(filter(None, (str(self._root), os.environ.get("PYTHONPATH", ""))))
        spec = StartSpec(
            lease_id=lease_id,
            fence=1,
            attempt=1,
            argv=(*before, sys.executable, "-m", "tests.gpu.work", *map(str, words)),
            # The job's own word on its bounds does not count.
            env=kept | {"PYTHONPATH": path, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=64G"},
            workdir=str(self._root),
            worker_dir=str(self._home / "work" / lease_id),
            log_path=str(self._home / f"{lease_id}.log"),
            envelope=Envelope(gpus=fraction, gpu_memory_bytes=memory_bytes, memory_bytes=16 * GIB, cpus=2),
            devices=(DeviceShare(index=self._gpu.index, fraction=fraction, memory_bytes=memory_bytes),),
            deadline_boot_s=self._boot.boot_s + 60,
            boot_id=self._boot.boot_id,
        )
        self._client.call("start", orders.AgentStart(runtime="process", spec=spec))

    def _said(self, lease_id: str, *, lines: int = 1) -> str:
        log = self._home / f"{lease_id}.log"
        read = lambda: text if (text := log.read_text() if log.exists() else "").count("\n") >= lines else ""  # noqa: E731
        return str(_until(read, STARTS_MAX_S) or (log.read_text() if log.exists() else ""))

    def _end(self, lease_id: str) -> str:
        """Return how a lease ended; that it still runs when it does not end in time."""

        def look() -> str:
            view = next(view for view in self._client.call("attempts", wire.Nothing()) if view.handle.lease_id == lease_id)
            return f"{view.exit.kind}: {view.exit.witness}" if view.exit else ""

        return str(_until(look, ENDS_MAX_S) or "still runs")

    def _uses(self) -> dict[str, tuple[float, int]]:
        views = self._client.call("attempts", wire.Nothing())
        return {
            view.handle.lease_id: (view.usage.gpu_busy, view.usage.gpu_memory_bytes)
            for view in views
            if view.exit is None and view.usage
        }

    def _busy(self) -> dict[str, tuple[float, int]] | None:
        uses = self._uses()
        return uses if uses.get("worker", (0, 0))[0] and uses.get("part", (0, 0))[1] else None


def _until(look: Callable[[], Any], most_s: float) -> Any:
    """Return what a look finds once it finds something; the last look's after `most_s`."""
    end_s = time.monotonic() + most_s
    while not (found := look()) and time.monotonic() < end_s:
        time.sleep(0.1)
    return found
