"""The server's end of one instance: starts its process, talks to it, sees it end. All on the event loop's thread.

Not here: which batch goes to it, and what becomes of its calls when it dies (`lane`); when it is started again (`crew`).
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tenure.errors import MissingExtra, NotFound, SpecError, TenureError, Unavailable
from tenure.serve import batchwire as wire
from tenure.serve.arena import shared_memory
from tenure.serve.instance import Start
from tenure.serve.regions import Region

if TYPE_CHECKING:
    from tenure.serve.tickets import Batch

_MAX_OUTBOX = 8192
LOADER = "tenure.serve.engines:load_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """How to start an instance of one model."""

    path: Path
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    max_batch_rows: int = 0
    """The largest batch it will get; 0: as the engine and the model's shapes say."""
    warmup_rows: int = 0
    max_answer_bytes: int = 64 << 20
    """Of all outputs of a call, and of a batch."""
    loader: str = LOADER


class Instance:
    """One process of one model, from its start to its end.

    `on_done(instance, report)` is called for each batch, `on_end(instance, why)` once, when the process is gone and no
    more of its reports will come.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        arena_fd: int,
        *,
        on_done: Callable[[Instance, wire.Done], None],
        on_end: Callable[[Instance, str], None],
    ) -> None:
        self.batches: deque[Batch] = deque()
        """Sent and not yet answered, oldest first; the first one runs."""
        self.slot = 0
        self.ready = False
        self.loaded: asyncio.Future[wire.Loaded] = asyncio.get_running_loop().create_future()
        """Raises SpecError, MissingExtra, NotFound; Unavailable when the process ends before it has said why."""
        self.ended = asyncio.Event()
        self._on_done = on_done
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._space = bytearray(wire.MAX_MESSAGE_BYTES)
        self._seen = memoryview(self._space)
        self._killed_for = ""
        self._distrusted = False
        self._outbox: deque[tuple[bytes, Region | None]] = deque()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._link = ours
        fds = [shared_memory("tenure-answers", spec.max_answer_bytes) for _ in range(wire.SLOTS)]
        try:
            self.answers = [memoryview(mmap.mmap(fd, spec.max_answer_bytes, prot=mmap.PROT_READ)) for fd in fds]
            self._process = _start(spec, theirs.fileno(), arena_fd, fds)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in fds:
                os.close(fd)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(ours.fileno(), self._readable)
        self._loop.add_reader(self._pidfd, self._gone)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def send(self, message: bytes, region: Region | None = None) -> None:
        """Send one order, with a region's descriptor if it is about one.

        A process that is just dying takes none: its end is told soon.
        """
        if not self._outbox and self._sent(message, region):
            return
        if len(self._outbox) >= _MAX_OUTBOX:
            self.kill(f"it left {_MAX_OUTBOX} orders unread")
            return
        if not self._outbox:
            self._loop.add_writer(self._link.fileno(), self._writable)
        self._outbox.append((message, region))

    def _sent(self, message: bytes, region: Region | None) -> bool:
        try:
            if region is None:
                self._link.send(message)
            elif region.fd >= 0:  # else it has been unregistered since
                socket.send_fds(self._link, [message], [region.fd])
        except BlockingIOError:
            return False  # the system queues a few orders only
        except OSError as error:
            self.kill(f"it could not be sent an order: {error.strerror}")
        return True

    def _writable(self) -> None:
        while self._outbox:
            if not self._sent(*self._outbox[0]):
                return
            self._outbox.popleft()
        self._loop.remove_writer(self._link.fileno())

    def map_region(self, region: Region) -> None:
        """Hand a shared-memory object to the process."""
        status = region.status
        order = wire.MapRegion(region.number, status.offset, status.nbytes, region.writable)
        self.send(wire.encode(order), region)

    def drop_region(self, region: Region) -> None:
        """Have the process forget a shared-memory object."""
        self.send(wire.encode(wire.DropRegion(region.number)))

    def kill(self, why: str) -> None:
        """End the process at once; `on_end` follows."""
        if not self._killed_for:
            self._killed_for = why
            self._process.kill()

    def close(self) -> None:
        """Tell the process to leave, as it does at the end of its socket; it is killed when it does not within 2 s."""
        if not self.ended.is_set():
            self._killed_for = self._killed_for or "it was told to leave"
            self._link.shutdown(socket.SHUT_RDWR)
            self._loop.call_later(2, self._insist)

    def _insist(self) -> None:
        if not self.ended.is_set():
            self._process.kill()

    def _readable(self) -> None:
        while True:
            try:
                size = self._link.recv_into(self._space)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if not size:
                self._loop.remove_reader(self._link.fileno())
                if not self._killed_for:
                    self.kill("")
                return
            if self._distrusted:
                continue
            try:
                report = wire.decode_report(self._seen[:size])
            except msgspec.MsgspecError as error:
                self._distrust(f"it said what cannot be read: {error}")
                continue
            if type(report) is wire.Done:
                if self.batches and self.batches[0].number == report.number:
                    self._on_done(self, report)
                else:
                    self._distrust(f"it answered batch {report.number}, which it was not running")
            elif type(report) is wire.Loaded:
                self.ready = True
                if not self.loaded.done():
                    self.loaded.set_result(report)
            elif type(report) is wire.NotLoaded and not self.loaded.done():
                self.loaded.set_exception(_reason(report))

    def _distrust(self, why: str) -> None:
        """Take nothing any more that the process says, and end it."""
        self._distrusted = True
        self.kill(why)

    def _gone(self) -> None:
        """The process has ended: take what it still said, then tell."""
        if self._process.poll() is None:
            return
        self._readable()
        self.ready = False
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._link.fileno())
        self._loop.remove_writer(self._link.fileno())
        os.close(self._pidfd)
        self._link.close()
        self.ended.set()
        why = self._killed_for or _ending(self._process.returncode)
        if not self.loaded.done():
            self.loaded.set_exception(Unavailable(f"the model's process ended while it loaded: {why}"))
            self.loaded.exception()  # seen: nobody may wait for it any more
        self._on_end(self, why)


def _start(spec: InstanceSpec, link: int, arena_fd: int, answers: Sequence[int]) -> subprocess.Popen[bytes]:
    start = Start(
        path=str(spec.path),
        loader=spec.loader,
        threads=spec.threads,
        device=spec.device,
        precision=spec.precision,
        max_batch_rows=spec.max_batch_rows,
        parent=os.getpid(),
        socket=link,
        arena=arena_fd,
        answers=tuple(answers),
        warmup_rows=spec.warmup_rows,
    )
    argv = [sys.executable, "-m", "tenure.serve.instance", msgspec.json.encode(start).decode()]
    # What a model prints belongs with the errors: the server's own output is for its one line of addresses.
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[link, arena_fd, *answers])


def _reason(report: wire.NotLoaded) -> TenureError:
    if report.kind == "MissingExtra" and len(report.details) == 3:
        return MissingExtra(*report.details)
    kinds: dict[str, type[TenureError]] = {"NotFound": NotFound}
    return kinds.get(report.kind, SpecError)(report.text)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
