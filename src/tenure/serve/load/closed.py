"""A load application: prepares the model and the data, runs the closed loops, checks every answer, writes what it saw.

Closed loop: a request starts when the one before has ended (sync), or `concurrency` such loops at once (async). The
clock of a cell runs from its first request to its last answer; requests already in flight at the end are waited for.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from tenure.errors import SpecError, TenureError
from tenure.serve.client import Model
from tenure.serve.load.application import MAX_LATENCIES, LoadCell, LoadResult, LoadSpec, read_load_spec
from tenure.serve.load.examples import Data
from tenure.serve.processes import worker_dir, write_json
from tenure.serve.tensors import Array
from tenure.serve.transports import Stages

MAX_WAIT_FOR_START_S = 600.0
_POLL_S = 0.02


def main(argv: Sequence[str]) -> int:
    """Run the application that a spec file describes; exit code 0 done, 1 failed, 2 wrong use."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m tenure.serve.load SPEC.json\n")
        return 2
    folder = worker_dir(os.environ)
    try:
        result = asdict(run_load(read_load_spec(argv[0])))
    except TenureError as error:
        sys.stderr.write(f"tenure.serve.load: {error}\n")
        if folder is not None:
            write_json(folder / "result.json", {"state": "failed", "error": f"{type(error).__name__}: {error}"})
        return 1
    if folder is None:
        summary = {key: value for key, value in result.items() if key != "cells"}
        cells = [{k: v for k, v in cell.items() if k != "latencies_s"} for cell in result["cells"]]
        sys.stdout.write(f"{summary}\n" + "".join(f"{cell}\n" for cell in cells))
    else:
        write_json(folder / "result.json", {"state": "done", "load": result})
    return 0


def run_load(spec: LoadSpec) -> LoadResult:
    """Run one application in this process. Raises Unavailable, NotFound, SpecError, MissingExtra."""
    began_s = time.perf_counter()
    # What is measured as HTTP shall be HTTP: left alone, the client takes shared memory where it is quicker.
    shm = False if spec.target.startswith("http://") else None
    target = spec.target.removeprefix("simple:")
    model = Model(target, spec.model, timeout_s=spec.timeout_s, threads=spec.threads, instances=spec.instances, shm=shm)
    try:
        model.wait_ready(spec.timeout_s)
        model.metadata()
        prepared_s = time.perf_counter()
        data = Data(model.metadata(), spec.inputs, spec.expected, output=spec.output)
        loaded_s = time.perf_counter()
        _wait_for(spec.start_at_s)
        started_at_s = time.time()
        if spec.interaction == "sync":
            cells = [_sync_cell(spec, model, data, *key) for key in _order(spec)]
            model.close()
        else:
            cells = asyncio.run(_async_cells(spec, model, data))
    finally:
        model.close()
    return LoadResult(
        cells=tuple(cells),
        prepare_model_s=prepared_s - began_s,
        load_data_s=loaded_s - prepared_s,
        peak_memory_bytes=max(cell.memory_bytes for cell in cells),
        started_at_s=started_at_s,
        ended_at_s=time.time(),
        versions=versions(),
    )


def _order(spec: LoadSpec) -> list[tuple[int, int]]:
    """Return every (batch, repeat), shuffled within each repeat round: batches interleave, drift hits all alike."""
    chance = random.Random(spec.seed)
    order = []
    for repeat in range(spec.repeats):
        batches = list(spec.batches)
        chance.shuffle(batches)
        order += [(batch, repeat) for batch in batches]
    return order


def _sync_cell(spec: LoadSpec, model: Model, data: Data, batch: int, repeat: int) -> LoadCell:
    for start in data.starts(spec.seed * 1_000_003 + repeat, spec.warmup_requests):
        model.predict_timed(data.cut(start, batch))
    tally = _Tally(spec, data, batch, repeat)
    for start in data.starts(spec.seed * 1_000_003 + repeat, spec.max_requests):
        if tally.over():
            break
        x = tally.cut(start)
        began_s = time.perf_counter()
        try:
            found, stages = model.predict_timed(x)
        except TenureError as error:
            tally.fail(error)
            continue
        tally.add(found, stages, start, time.perf_counter() - began_s)
    return tally.cell()


async def _async_cells(spec: LoadSpec, model: Model, data: Data) -> list[LoadCell]:
    try:
        return [await _async_cell(spec, model, data, *key) for key in _order(spec)]
    finally:
        await model.close_async()


async def _async_cell(spec: LoadSpec, model: Model, data: Data, batch: int, repeat: int) -> LoadCell:
    for start in data.starts(spec.seed * 1_000_003 + repeat, spec.warmup_requests):
        await model.predict_timed_async(data.cut(start, batch))
    tally = _Tally(spec, data, batch, repeat)
    starts = data.starts(spec.seed * 1_000_003 + repeat, spec.max_requests)

    async def loop() -> None:
        for start in starts:  # one iterator for all loops: each request is drawn once
            if tally.over():
                return
            x = tally.cut(start)
            began_s = time.perf_counter()
            try:
                found, stages = await model.predict_timed_async(x)
            except TenureError as error:
                tally.fail(error)
                continue
            tally.add(found, stages, start, time.perf_counter() - began_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(spec.concurrency):
            group.create_task(loop())
    return tally.cell()


class _Tally:
    """What one cell has seen so far. Checking answers is inside the wall time, outside of the latencies."""

    def __init__(self, spec: LoadSpec, data: Data, batch: int, repeat: int) -> None:
        self._data, self._batch, self._repeat = data, batch, repeat
        self._latencies: list[float] = []
        self._right = self._wrong = self._failed = self._dropped = 0
        self._first_error = ""
        self._prepare_s = self._send_s = self._recognise_s = self._fetch_s = 0.0
        self._memory_bytes, self._poll_at_s = _memory_bytes(), 0.0
        self._cpu_at_start_s = time.process_time()
        self._began_s = time.perf_counter()
        self._ends_s = self._began_s + spec.seconds

    def over(self) -> bool:
        """Return whether the cell's time is spent."""
        return time.perf_counter() >= self._ends_s

    def cut(self, start: int) -> dict[str, Array]:
        """Prepare one request, timed."""
        began_s = time.perf_counter()
        x = self._data.cut(start, self._batch)
        self._prepare_s += time.perf_counter() - began_s
        return x

    def add(self, found: dict[str, Array], stages: Stages, start: int, latency_s: float) -> None:
        """Record and check one answer."""
        if len(self._latencies) < MAX_LATENCIES:
            self._latencies.append(latency_s)
        else:
            self._dropped += 1
        self._send_s += stages.send_s
        self._recognise_s += stages.recognise_s
        self._fetch_s += stages.fetch_s
        if self._data.right(found, start, self._batch):
            self._right += 1
        else:
            self._wrong += 1
        now_s = time.perf_counter()
        if now_s >= self._poll_at_s:
            self._memory_bytes, self._poll_at_s = max(self._memory_bytes, _memory_bytes()), now_s + _POLL_S

    def fail(self, error: TenureError) -> None:
        """Record a request without an answer."""
        self._failed += 1
        self._first_error = self._first_error or f"{type(error).__name__}: {error}"

    def cell(self) -> LoadCell:
        """Return the finished cell."""
        wall_s = time.perf_counter() - self._began_s
        cpu_s = time.process_time() - self._cpu_at_start_s
        answered = max(1, self._right + self._wrong)
        images = self._right * self._batch
        return LoadCell(
            batch=self._batch,
            repeat=self._repeat,
            requests=self._right,
            images=images,
            wall_s=wall_s,
            images_per_s=images / wall_s,
            latencies_s=tuple(self._latencies),
            latencies_dropped=self._dropped,
            prepare_data_s=self._prepare_s / max(1, answered + self._failed),
            send_s=self._send_s / answered,
            recognise_s=self._recognise_s / answered,
            fetch_s=self._fetch_s / answered,
            cpu_s=cpu_s,
            wrong=self._wrong,
            failed=self._failed,
            first_error=self._first_error,
            memory_bytes=max(self._memory_bytes, _memory_bytes()),
        )


def _wait_for(start_at_s: float) -> None:
    remaining_s = start_at_s - time.time() if start_at_s else 0.0
    if remaining_s > MAX_WAIT_FOR_START_S:
        raise SpecError(f"load.start_at_s lies {remaining_s:.0f} s ahead; at most {MAX_WAIT_FOR_START_S:.0f} s are waited")
    if remaining_s > 0:
        time.sleep(remaining_s)


def _memory_bytes() -> int:
    """Return anonymous + shared memory of this process (RssAnon + RssShmem of /proc/self/status)."""
    with open("/proc/self/status", "rb") as status:
        return sum(int(line.split()[1]) << 10 for line in status if line.startswith((b"RssAnon:", b"RssShmem:")))


def versions() -> dict[str, str]:
    """Return the versions of what an application has loaded."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    for package, module in (("onnxruntime", "onnxruntime"), ("grpcio", "grpc"), ("aiohttp", "aiohttp")):
        if module in sys.modules:
            found[package] = importlib.metadata.version(package)
    return found
