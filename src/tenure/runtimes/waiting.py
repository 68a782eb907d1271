"""What a shim makes ready before its order comes: signals that wake it, and the process that becomes the job.

Not here: what is done with them (`shim`), how that process becomes the job (`job`).
"""

from __future__ import annotations

import json
import os
import resource
import signal

from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.job import wait_and_become
from tenure.runtimes.outcome import read_result, read_tail

_HANDLED = (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


class Waiting:
    """What is made ready before the order comes: signals that wake the shim, and the process that becomes the job."""

    def __init__(self) -> None:
        self.hangup = False
        self.terminate = False
        self.wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, self._note)
        orders, self.orders = os.pipe2(os.O_CLOEXEC)
        self.failure, failure = os.pipe2(os.O_CLOEXEC)
        shim_pid = os.getpid()
        self.start_ticks = procfs.start_ticks(shim_pid)
        self.job = os.fork()
        if self.job == 0:
            wait_and_become(orders, failure, shim_pid)
        os.close(orders)
        os.close(failure)

    def _note(self, number: int, _frame: object) -> None:
        self.hangup |= number == signal.SIGHUP
        self.terminate |= number in (signal.SIGTERM, signal.SIGINT)


def rehearse() -> None:
    """Use what the order will need once, so that caches are filled before it comes."""
    json.loads(json.dumps({"spec": {"envelope": 1.0}}))
    Envelope(cpus=1.0)
    for pid in (os.getpid(), *procfs.descendants(os.getpid())):
        procfs.start_ticks(pid)
    procfs.tree_use([os.getpid()])
    resource.getrusage(resource.RUSAGE_CHILDREN)
    read_tail(os.devnull)
    read_result(os.devnull)
