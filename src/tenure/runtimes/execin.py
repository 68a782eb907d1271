"""One more command inside a lease: join its groups, network and user, then exec.

The process runtime starts it as a program of its own (`python -I -c "… main()" DESCRIPTOR`), because the runtime may have
threads and must not fork Python code itself. Not for: starting attempts (`shim`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenure.errors import Conflict, Unavailable
from tenure.protocols import RuntimeHandle
from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.become import become_user, die_with_parent, enter_network, filter_calls, limit_self
from tenure.runtimes.confine import Confinement
from tenure.runtimes.rooted import join_root

CANNOT_RUN = 127
"""Exit code when the command could not be started, as in a shell."""
MAX_OUTPUT_BYTES = 1 << 20
_LOOK_EVERY_S = 0.1
_EXEC_MAX_S = 0.5
_PACKAGES = str(Path(__file__).parents[2])
_PROGRAM = f"import sys; sys.path.insert(0, {_PACKAGES!r}); from tenure.runtimes.execin import main; main()"


def run_inside(plan: dict[str, Any], handle: RuntimeHandle, *, job_pid: int, timeout_s: float) -> tuple[int, bytes]:
    """Run the plan's command with the job's environment; return exit code (negative: signal) and output (its first MiB).

    Raises Unavailable when it did not end within `timeout_s`, Conflict when the lease ended before it. It is ended then.
    """
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start_inside(plan, handle, job_pid=job_pid, streams=streams)
    with process:
        assert process.stdout is not None
        try:
            output = _collect(process, process.stdout.fileno(), handle, time.monotonic() + timeout_s)
            if output is None:
                raise Unavailable(f"{plan['argv'][0]!r} in lease {handle.lease_id} did not end within {timeout_s:g} s: stopped")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
    return process.returncode, output


def start_inside(
    plan: dict[str, Any], handle: RuntimeHandle, *, job_pid: int, streams: Mapping[str, int]
) -> subprocess.Popen[bytes]:
    """Start the plan's command with the job's environment and, over it, the plan's own. streams: stdin, stdout, stderr."""
    names = {"TENURE_LEASE_ID": handle.lease_id, "TENURE_WORKER_DIR": plan["worker_dir"]}  # by these its processes are found
    plan = plan | {"env": (_environment(job_pid) or os.environ | names) | plan.get("environment", {})}
    # The program starts with our own environment: the job's is in the job's hands, and this one may still be root. The plan
    # goes by descriptor: arguments can be read by every user of the machine.
    with open(os.memfd_create("exec"), "w+b") as stream:
        stream.write(json.dumps(plan).encode())
        stream.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, str(stream.fileno())],
            stdin=streams["stdin"],
            stdout=streams["stdout"],
            stderr=streams["stderr"],
            start_new_session=True,
            env=os.environ | names,
            pass_fds=(stream.fileno(),),
        )


def _environment(job_pid: int) -> dict[str, str]:
    """Return the job's environment; one whose program has just begun shows none for a moment (execve(2) is not through)."""
    end_s = time.monotonic() + _EXEC_MAX_S
    while not (found := procfs.environment(job_pid)) and time.monotonic() < end_s and procfs.start_ticks(job_pid):
        time.sleep(0.005)
    return found


def _collect(process: subprocess.Popen[bytes], fd: int, handle: RuntimeHandle, deadline_s: float) -> bytes | None:
    """Return the output once the command has ended, whoever still holds its pipe; None at the deadline."""
    os.set_blocking(fd, False)
    output = bytearray()
    at_end = False
    while True:
        ended = process.poll() is not None
        while not at_end:
            try:
                part = os.read(fd, 65536)
            except BlockingIOError:
                break
            at_end = not part
            output += part[: MAX_OUTPUT_BYTES - len(output)]
        if ended:
            return bytes(output)
        if time.monotonic() >= deadline_s:
            return None
        if not procfs.is_alive(handle.pid, handle.start_ticks):
            raise Conflict(f"lease {handle.lease_id} ended before the command inside it did")
        wait_s = min(0.005 if at_end else _LOOK_EVERY_S, max(0.0, deadline_s - time.monotonic()))
        select.select([] if at_end else [fd], [], [], wait_s)


def _have_terminal() -> None:
    """Make standard input the terminal of this session: who closes it hangs up, and Ctrl-C goes to its foreground."""
    import fcntl  # nobody but these few needs them
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def main() -> None:
    """Become the command that the plan on the descriptor in the first argument describes. Never returns."""
    with open(int(sys.argv[1]), "rb") as stream:
        plan = json.loads(stream.read())
    try:
        confinement = Confinement.from_plan(plan["confinement"])
        confinement.join()
        limit_self(confinement, Envelope(**plan["envelope"]))
        if plan["netns"]:
            enter_network(plan["netns"])
        if plan.get("root_of"):
            join_root(plan["root_of"])
        become_user(plan["user"], plan["uid"], plan["gid"])
        die_with_parent()
        os.chdir(plan["workdir"])
        if plan.get("terminal"):
            _have_terminal()
        filter_calls(bytes.fromhex(plan["filter"]))
        os.execvpe(plan["argv"][0], plan["argv"], plan["env"])
    except OSError as error:
        os.write(2, f"cannot run {plan['argv'][0]!r} inside the lease: {error}\n".encode())
    os._exit(CANNOT_RUN)
