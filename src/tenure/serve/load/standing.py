"""A standing application: prepares its model, then runs one cell each time it is told, until its standard input ends.

    place 1  |load|prepare|send|-- recognise --|fetch|log|other|load|prepare|send|-- recog …
    place 2       |load|prepare|send|---- recognise ----|fetch|log|other|load| …

Closed loop: a place takes up its next request when the one before is over; one place when sync, `in_flight` when async. At
every moment of a cell each place is in exactly one stage, so the stages of all requests sum up to places x wall time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from tenure.errors import SpecError, TenureError
from tenure.serve.client import Model
from tenure.serve.load.application import MAX_LATENCIES
from tenure.serve.load.closed import versions
from tenure.serve.load.examples import BadImage, Data, Files
from tenure.serve.load.orders import STAGES, Cell, Order, Standing, StandingSpec, write
from tenure.serve.pixels import preparation_for
from tenure.serve.processes import leased_threads
from tenure.serve.tensors import Array
from tenure.serve.transports import Stages

MAX_REQUESTS = 1_000_000
"""Of one cell."""
_LOG_BYTES = 16 << 20
"""After which the log of answers begins anew."""
_WARM_IMAGES = 16
"""Of an asynchronous cell's warm-up, two requests at least: of a slow model with large batches all places would take long."""
_now = time.perf_counter
_thread_cpu = time.thread_time


def main() -> int:
    """Run one application; exit code 0 when its orders end, 1 when it can't be prepared."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints belongs with the errors
    orders = sys.stdin.buffer
    answers.write(write({}))  # its code is loaded
    try:
        spec = msgspec.json.decode(orders.readline(), type=StandingSpec)
        application = Application(spec)
    except (TenureError, msgspec.MsgspecError) as error:
        answers.write(write({"error": f"{type(error).__name__}: {error}"}))
        return 1
    answers.write(write(application.standing))
    try:
        for line in orders:
            answers.write(write(_answered(application, line)))
    finally:
        application.close()
    return 0


def _answered(application: Application, line: bytes) -> Cell | dict[str, str]:
    try:
        return application.run(msgspec.json.decode(line, type=Order))
    except (TenureError, BadImage, msgspec.MsgspecError) as error:
        return {"error": f"{application.spec.name}: {type(error).__name__}: {error}"}


class Application:
    """One model, one way to ask it, and what it is asked."""

    def __init__(self, spec: StandingSpec) -> None:
        """Raises Unavailable, NotFound, SpecError, MissingExtra."""
        self.spec = spec
        self.model, took_s = _prepared(spec)
        examples = spec.examples
        told = self.model.metadata()
        if not told.inputs and examples.metadata is not None:
            told = examples.metadata
        self.data = Data(told, examples.inputs, examples.expected, mapped=True)
        self.files: Files | None = None
        if examples.files:
            normalise = examples.normalise or None
            how = preparation_for(told, normalise=normalise, crop=examples.crop, size=examples.size)
            self.files = Files(self.data, examples.files, how)
        self.standing = Standing(name=spec.name, pid=os.getpid(), prepare_model_s=took_s, versions=versions())
        self.log = _Log()
        self._loop = asyncio.Runner() if spec.interaction == "async" else None
        self.decoders = ThreadPoolExecutor(leased_threads(os.environ), thread_name_prefix="decode")

    def run(self, order: Order) -> Cell:
        """Run one cell, or warm up for it. Raises what a request raises while warming up, SpecError for a wrong order."""
        if order.data == "files" and self.files is None:
            raise SpecError("there are no files to read; the examples are an array")
        if order.batch < 1 or order.in_flight < 1:
            raise SpecError(f"batch and in_flight must be at least 1; found {order.batch} and {order.in_flight}")
        if order.do == "warm":
            trim_heap()
        if self._loop is None:
            return self._warm(order) if order.do == "warm" else _sync_cell(self, order)
        return self._loop.run(self._warm_async(order) if order.do == "warm" else _async_cell(self, order))

    def request(self, order: Order, start: int) -> dict[str, Array]:
        """Return one request's input, untimed."""
        if order.data == "files" and self.files is not None:
            return self.files.prepare(self.files.load(start, order.batch))
        return self.data.cut(start, order.batch)

    def _warm(self, order: Order) -> Cell:
        for start in self.data.starts(~order.seed, 1):
            self.model.predict_timed(self.request(order, start))
        return Cell()

    async def _warm_async(self, order: Order) -> Cell:
        starts = self.data.starts(~order.seed, min(order.in_flight, max(2, _WARM_IMAGES // order.batch)))
        inputs = [self.request(order, start) for start in starts]
        await asyncio.gather(*(self.model.predict_timed_async(x) for x in inputs))
        return Cell()

    def close(self) -> None:
        """Free the model, close connections, end threads."""
        if self._loop is not None:
            self._loop.run(self.model.close_async())
            self._loop.close()
        self.model.close()
        self.decoders.shutdown(wait=True)


def _prepared(spec: StandingSpec) -> tuple[Model, tuple[float, ...]]:
    """Return the model, ready, and how long each time of preparing it took."""
    shm = False if spec.target.startswith("http://") else None  # what is measured as HTTP shall be HTTP
    took_s: list[float] = []
    model: Model | None = None
    for _ in range(spec.prepares):
        if model is not None:
            model.close()
        began_s = _now()
        model = Model(
            spec.target.removeprefix("simple:"),
            spec.model,
            timeout_s=spec.timeout_s,
            threads=spec.threads,
            instances=spec.instances,
            shm=shm,
        )
        model.wait_ready(spec.timeout_s)
        model.metadata()
        took_s.append(_now() - began_s)
    assert model is not None
    return model, tuple(took_s)


@dataclass(slots=True)
class _Account:
    """Where the time of all places went, and what became of the requests."""

    application: Application
    order: Order
    load_s: float = 0.0
    prepare_s: float = 0.0
    send_s: float = 0.0
    recognise_s: float = 0.0
    fetch_s: float = 0.0
    log_s: float = 0.0
    other_s: float = 0.0
    own_cpu_s: float = 0.0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    first_error: str = ""
    latencies_s: list[float] = field(default_factory=list)
    dropped: int = 0
    begun: int = 0
    began_s: float = field(default_factory=_now)
    began_monotonic_s: float = field(default_factory=time.monotonic)
    began_cpu_s: float = field(default_factory=time.process_time)

    def starts(self) -> Iterator[int]:
        """Yield the first row of each request until the time is over. Every place gets at least one."""
        ends_s = self.began_s + self.order.seconds
        least = self.places
        for start in self.application.data.starts(self.order.seed, MAX_REQUESTS):
            if _now() >= ends_s and self.begun >= least:
                return
            self.begun += 1
            yield start

    @property
    def places(self) -> int:
        return self.order.in_flight if self.application.spec.interaction == "async" else 1

    def asked(self, asked_s: float, stages: Stages | None) -> float:
        """Count the time of a call that began at `asked_s`; return when it ended."""
        ended_s = _now()
        sent_s, fetched_s = (stages.send_s, stages.fetch_s) if stages else (0.0, 0.0)
        self.send_s += sent_s
        self.fetch_s += fetched_s
        self.recognise_s += ended_s - asked_s - sent_s - fetched_s
        return ended_s

    def answered(self, found: dict[str, Array], start: int, asked_s: float, ended_s: float) -> float:
        """Write the log and check the answer of a call; return the time when that was done."""
        cpu_s = _thread_cpu()
        data, batch = self.application.data, self.order.batch
        self.application.log.write(data, found, start)
        logged_s = _now()
        self.log_s += logged_s - ended_s
        if len(self.latencies_s) < MAX_LATENCIES:
            self.latencies_s.append(ended_s - asked_s)
        else:
            self.dropped += 1
        if data.right(found, start, batch):
            self.right += 1
        else:
            self.wrong += 1
        self.own_cpu_s += _thread_cpu() - cpu_s
        done_s = _now()
        self.other_s += done_s - logged_s
        return done_s

    def fail(self, error: Exception) -> None:
        """Count a request without an answer."""
        self.failed += 1
        self.first_error = self.first_error or f"{type(error).__name__}: {error}"

    def cell(self, places_ended_s: list[float]) -> Cell:
        """Return the finished cell. places_ended_s: when each place had nothing more to do."""
        ended_s = _now()
        wall_s = time.monotonic() - self.began_monotonic_s
        self.other_s += sum(ended_s - each for each in places_ended_s)
        spent = (self.load_s, self.prepare_s, self.send_s, self.recognise_s, self.fetch_s, self.log_s, self.other_s)
        return Cell(
            requests=self.right,
            images=self.right * self.order.batch,
            wall_s=wall_s,
            places=self.places,
            stages=dict(zip(STAGES, spent, strict=True)) if self.order.probes else {},
            latencies_s=tuple(self.latencies_s),
            latencies_dropped=self.dropped,
            cpu_s=time.process_time() - self.began_cpu_s,
            own_cpu_s=self.own_cpu_s,
            wrong=self.wrong,
            failed=self.failed,
            first_error=self.first_error,
        )


def _sync_cell(application: Application, order: Order) -> Cell:
    """One place: each stage begins at the moment at which the one before ended."""
    account = _Account(application, order)
    if not order.probes:
        return _bare_cell(application, order, account)
    model, data, files = application.model, application.data, application.files if order.data == "files" else None
    at_s = account.began_s
    for start in account.starts():
        cpu_s = _thread_cpu()
        begun_s = _now()
        account.other_s += begun_s - at_s
        try:
            if files:
                contents = files.load(start, order.batch)
                loaded_s = _now()
                x = files.prepare(contents)
            else:
                loaded_s, x = begun_s, data.cut(start, order.batch)
        except BadImage as error:
            account.fail(error)
            at_s = begun_s
            continue
        asked_s = _now()
        account.load_s += loaded_s - begun_s
        account.prepare_s += asked_s - loaded_s
        account.own_cpu_s += _thread_cpu() - cpu_s
        try:
            found, stages = model.predict_timed(x)
        except TenureError as error:
            at_s = account.asked(asked_s, None)
            account.fail(error)
            continue
        at_s = account.answered(found, start, asked_s, account.asked(asked_s, stages))
    return account.cell([at_s])


def _bare_cell(application: Application, order: Order, account: _Account) -> Cell:
    """The same work without a timer in it."""
    for start in account.starts():
        try:
            found, _ = application.model.predict_timed(application.request(order, start))
        except (TenureError, BadImage) as error:
            account.fail(error)
            continue
        application.log.write(application.data, found, start)
        if application.data.right(found, start, order.batch):
            account.right += 1
        else:
            account.wrong += 1
    return account.cell([])


async def _async_cell(application: Application, order: Order) -> Cell:
    """As many places as requests may be in flight, on one event loop; files are read and decoded by threads beside it."""
    account = _Account(application, order)
    starts = account.starts()  # one iterator for all places: each request is drawn once
    async with asyncio.TaskGroup() as group:
        places = [group.create_task(_place(application, order, account, starts)) for _ in range(order.in_flight)]
    return account.cell([place.result() for place in places])


async def _place(application: Application, order: Order, account: _Account, starts: Iterator[int]) -> float:
    """One place of an asynchronous cell; returns when it had nothing more to do."""
    model, data, files = application.model, application.data, application.files if order.data == "files" else None
    loop = asyncio.get_running_loop()
    at_s = account.began_s
    for start in starts:
        begun_s = _now()
        account.other_s += begun_s - at_s
        try:
            if files:
                x, load_s, cpu_s = await loop.run_in_executor(application.decoders, _read, files, start, order.batch)
            else:
                began_cpu_s = _thread_cpu()
                x, load_s = data.cut(start, order.batch), 0.0
                cpu_s = _thread_cpu() - began_cpu_s
        except BadImage as error:
            account.fail(error)
            at_s = begun_s
            continue
        asked_s = _now()
        account.load_s += load_s
        account.prepare_s += asked_s - begun_s - load_s
        account.own_cpu_s += cpu_s
        try:
            found, stages = await model.predict_timed_async(x)
        except TenureError as error:
            at_s = account.asked(asked_s, None)
            account.fail(error)
            continue
        at_s = account.answered(found, start, asked_s, account.asked(asked_s, stages))
    return at_s


def _read(files: Files, start: int, batch: int) -> tuple[dict[str, Array], float, float]:
    """Read and decode one request's files; return it, the seconds of reading, and this thread's CPU time of both."""
    began_cpu_s, began_s = _thread_cpu(), _now()
    contents = files.load(start, batch)
    loaded_s = _now()
    x = files.prepare(contents)
    return x, loaded_s - began_s, _thread_cpu() - began_cpu_s


class _Log:
    """The protocol of answers that an application prints: a line per row, in its working folder, of bounded size."""

    def __init__(self) -> None:
        self._file: IO[str] = (Path.cwd() / f"answers-{os.getpid()}.log").open("w")
        self._written = 0

    def write(self, data: Data, found: dict[str, Array], start: int) -> None:
        """Write one answer and hand it to the system."""
        answer = data.answer(found)
        rows = len(data.rows)
        if data.labels or answer.ndim < 2:
            lines = [f"{(start + place) % rows} {value}\n" for place, value in enumerate(answer.tolist())]
        else:
            best = answer.reshape(len(answer), -1).argmax(axis=1).tolist()
            lines = [f"{(start + place) % rows} {value}\n" for place, value in enumerate(best)]
        text = "".join(lines)
        self._file.write(text)
        self._file.flush()
        self._written += len(text)
        if self._written > _LOG_BYTES:
            self._file.seek(0)
            self._file.truncate()
            self._written = 0


def trim_heap() -> None:
    """Give free memory back to the system, so that a cell does not pay for the larger one before it."""
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    sys.exit(main())
