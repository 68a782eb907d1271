"""The guest's first program: makes the machine usable, runs pytest once in each world, says what came out, powers off.

Answers are lines on the console that start with `MARK` and hold one JSON object: {"up": …}, {"world": …, "tests": …, …} for
each world, {"end": …}.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
import traceback

MARK = "TENURE-GUEST "
_POWER_OFF = 0x4321FEDC
_MOUNTS = (
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("devtmpfs", "/dev", "devtmpfs", ""),
    ("devpts", "/dev/pts", "devpts", "mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
    ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
    ("tmpfs", "/run", "tmpfs", "mode=755"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", "nsdelegate"),
)
AT_ONCE = 2
"""Worlds at a time: the suite waits about as long as it works, and the guest has two processors."""
CONTROL_WAIT_S = 20.0
"""How long the control's job, which nothing ends, is waited for."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Do all of it; power off in any case."""
    try:
        _mount()
        _loopback_up()
        os.environ.update(PATH="/bin", HOME="/root", LANG="C.UTF-8", PYTHONDONTWRITEBYTECODE="1", NO_COLOR="1")
        with open("/proc/cmdline") as stream:
            orders = dict(word.split("=", 1) for word in stream.read().split() if word.startswith("tenure."))
        _say(up=os.uname().release, boot_s=time.clock_gettime(time.CLOCK_BOOTTIME))
        _run(orders)
    except BaseException:
        traceback.print_exc()
    finally:
        os.sync()
        _LIBC.reboot(_POWER_OFF)
        signal.pause()


def _say(**fact: object) -> None:
    os.write(1, f"\n{MARK}{json.dumps(fact)}\n".encode())


def _mount() -> None:
    for source, target, kind, options in _MOUNTS:
        os.makedirs(target, exist_ok=True)
        if _LIBC.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"mount {target}")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0x41)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS (netdevice(7))


def _run(orders: dict[str, str]) -> None:
    """Run the worlds, each a forked process that finds pytest imported already, and say what each found."""
    sys.path[:0] = ["/opt/tenure/src", "/opt/packages"]
    os.environ["PYTHONPATH"] = ":".join(["/opt/tenure/src", "/opt/packages", "/opt/tenure"])
    os.environ["TENURE_TEST_SLOWNESS"] = orders["tenure.slowness"]
    import pytest  # noqa: F401 (forked worlds share it)
    from tests.contracts import runtime_contract  # noqa: F401
    from tests.guest.worlds import CONTROL, WORLDS, lay_out

    from tenure.runtimes import process  # noqa: F401

    _say(ready_s=time.clock_gettime(time.CLOCK_BOOTTIME))
    worlds = WORLDS | {CONTROL.name: CONTROL}
    running, waiting = {}, orders["tenure.worlds"].split(",")
    while running or waiting:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            lay_out(worlds[name])
            running[_fork(worlds[name], orders["tenure.only"])] = name
        pid, status = os.wait()  # orphans of all worlds come here too
        if (name := running.pop(pid, None)) is not None:
            with open(f"/tmp/{name}.log", errors="replace") as stream:
                print(f"--- world {name}\n{stream.read()}", flush=True)
            found = {}
            try:
                with open(f"/tmp/{name}.json") as stream:
                    found = json.load(stream)
            except (OSError, ValueError) as error:
                found = {"error": f"no report: {error}"}
            _say(world=name, status=os.waitstatus_to_exitcode(status), **found)
    _say(end=time.clock_gettime(time.CLOCK_BOOTTIME))


def _fork(world, only: str) -> int:
    """Start a world: its shell, and its pytest. Return the latter's pid."""
    if not world.alone:
        shell = os.fork()
        if shell == 0:
            os.execv("/bin/sleep", ["sleep", "1000000"])
        (world.group / "cgroup.procs").write_text(str(shell))
    pid = os.fork()
    if pid:
        return pid
    try:
        (world.group / "cgroup.procs").write_text("0")
        log = os.open(f"/tmp/{world.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        console = os.dup(1)
        os.dup2(log, 1)
        os.dup2(log, 2)
        report = os.open(f"/tmp/{world.name}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        os.makedirs(f"/tmp/{world.name}", exist_ok=True)
        os.chown(f"/tmp/{world.name}", world.uid, world.uid)
        if world.uid:
            os.setgroups([])
            os.setgid(world.uid)
            os.setuid(world.uid)
        _test(world, only, console, report)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(70)


def _test(world, only: str, console: int, report: int) -> None:
    import pytest
    from tests.contracts import runtime_contract
    from tests.guest.report import Report

    os.chdir("/opt/tenure")
    if world.broken:
        os.environ["PYTHONPATH"] = f"/opt/tenure/tests/contracts/broken:{os.environ['PYTHONPATH']}"
        runtime_contract.LONG_S = CONTROL_WAIT_S
    os.environ.update(TMPDIR=f"/tmp/{world.name}", HOME=f"/tmp/{world.name}")
    sys.executable = os.path.realpath("/opt/python/bin/python")
    found = Report(lambda text: os.write(console, f"{world.name}: {text}\n".encode()))
    begun_s = time.monotonic()
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=240"]
    options += ["--strict-markers", "-ra", "-q", "--durations=8", "--tb=short"]
    words = " or ".join(word for word in only.split(",") if word)
    options += ["-k", " and ".join(f"({part})" for part in (words, world.only) if part)]
    try:
        code = int(pytest.main([*options, *world.tests], plugins=[found]))
    finally:
        whole = json.dumps(found.facts | {"wall_s": time.monotonic() - begun_s, "tests": found.tests})
        with os.fdopen(report, "w") as stream:
            stream.write(whole)
    sys.stdout.flush()
    os._exit(code)
