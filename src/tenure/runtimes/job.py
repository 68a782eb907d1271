"""The process that becomes a lease's command: forked ahead of its order, it waits, joins its groups, drops rights, execs.

Waiting first takes the cost of the fork off the way from order to running. Not for: watching it (`shim`).
"""

from __future__ import annotations

import json
import os
import resource
import signal
from typing import Any

from tenure.resources import Envelope
from tenure.runtimes.acting import acting_as, actor_from, open_regular
from tenure.runtimes.become import become_user, die_with_parent, enter_network, filter_calls, limit_self
from tenure.runtimes.confine import Confinement
from tenure.runtimes.container_job import attend
from tenure.runtimes.microvm_job import attend as attend_guest
from tenure.runtimes.rooted import Root, enter_root

_RESET = (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)
CANNOT_RUN = 127
_MAX_REPORT_BYTES = 4096


def wait_and_become(orders: int, failure: int, shim_pid: int) -> None:
    """Read the plan from `orders` up to its end and become its command; tell on `failure` why not. Never returns."""
    step = "prepare"
    try:
        _settle_in(orders, failure)
        die_with_parent()
        if os.getppid() != shim_pid:
            os._exit(CANNOT_RUN)
        _rehearse()
        text = _read_all(orders)
        if not text:
            os._exit(CANNOT_RUN)  # the shim is not needed
        plan: dict[str, Any] = json.loads(text)
        spec = plan["spec"]
        if "container" in plan:
            attend(plan, failure)
        if "microvm" in plan:
            attend_guest(plan, failure)
        with acting_as(actor_from(plan.get("acting"))):
            log = open_regular(spec["log_path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        step = "confine"
        confinement = Confinement.from_plan(plan["confinement"])
        confinement.join()
        limit_self(confinement, Envelope(**spec["envelope"]))
        step = "network"
        if plan["netns"]:
            enter_network(plan["netns"])
        if root := plan.get("root"):
            step = "root"
            enter_root(Root(**root))
        step = "user"
        become_user(spec["user"], plan["uid"], plan["gid"])
        step = "prepare"
        die_with_parent()  # a change of user took it back
        if os.getppid() != shim_pid:
            os._exit(CANNOT_RUN)
        if not root:
            os.chdir(spec["workdir"])
        step = "filter"
        filter_calls(bytes.fromhex(plan["filter"]))
        step = "exec"
        os.execvpe(spec["argv"][0], spec["argv"], plan["env"])
    except BaseException as error:
        report = {"error": str(error)[:_MAX_REPORT_BYTES], "errno": getattr(error, "errno", None), "step": step}
        os.write(failure, json.dumps(report).encode())
    os._exit(CANNOT_RUN)


def _rehearse() -> None:
    """Use what the order will need once, so that the memory shared with the shim is copied before it comes.

    Not `own_memory`: exec would have to give all of it back.
    """
    plan = json.loads(json.dumps({"env": {f"NAME_{number}": "value" * 8 for number in range(40)}}))
    [os.fsencode(name) + os.fsencode(value) for name, value in plan["env"].items()]
    Envelope(cpus=1.0)
    Confinement.from_plan({"kind": "rlimit", "groups": {}}).join()
    resource.getrlimit(resource.RLIMIT_CORE)
    os.close(os.open(os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
    os.chdir(os.curdir)


def _settle_in(orders: int, failure: int) -> None:
    """Keep nothing of the shim's: signals, session, open files."""
    signal.set_wakeup_fd(-1)
    for number in _RESET:
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    first, second = sorted((orders, failure))
    os.closerange(3, first)
    os.closerange(first + 1, second)
    os.closerange(second + 1, 4096)


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    os.close(fd)
    return b"".join(parts)
