"""The process that a training lease runs: ``python -m tenure.train.worker``, once per event.

Standard library and NumPy only. Reads TENURE_RUN_DIR/train.json, TENURE_EVENT_FILE and TENURE_LEASE_FILE, and writes
``result.json`` in TENURE_WORKER_DIR: ``done``, ``continue``, or ``failed`` with the reason (exit status 1). SIGTERM: the
step under way is finished, the next slot's event is published, and the process leaves. Nothing is lost by SIGKILL either.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import math
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tenure.errors import SpecError, TenureError
from tenure.train.files import Files
from tenure.train.spec import EXIT_FULL, load_event, publish_event, read_spec

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""What NumPy, scikit-learn and torch read when they are loaded."""


def main(environment: Mapping[str, str] | None = None) -> int:
    """Handle the event that the environment names.

    Returns the exit status: 0 for done and continue, 1 for failed, EXIT_FULL when no result could be written.
    """
    env = os.environ if environment is None else environment
    worker_dir = Path(_need(env, "TENURE_WORKER_DIR"))
    told = _on_sigterm()
    try:
        result = _run(env, told)
    except TenureError as error:
        result = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    except MemoryError:
        result = {"state": "failed", "error": "MemoryError: the worker's memory bound is too low for its program"}
        _say(traceback.format_exc())
    except Exception as error:  # a program's own error: named to the user, with its traceback in the log
        result = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        _say(traceback.format_exc())
    _say(json.dumps(result) + "\n")
    try:
        Files().replace(worker_dir / "result.json", json.dumps(result).encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return EXIT_FULL
    return 1 if result["state"] == "failed" else 0


def _say(text: str) -> None:
    """Write to the log, which may lie on a full disk: that must not hide what is to be said in other ways."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)


def remaining_s(lease_file: Path, boot_s: Callable[[], float]) -> Callable[[], float]:
    """Return a function that tells the seconds left of the slot, by the lease file as it is now (renewals move it)."""
    state: dict[str, float] = {"mtime": -1.0, "deadline": math.inf}

    def remaining() -> float:
        try:
            mtime = lease_file.stat().st_mtime_ns
            if mtime != state["mtime"]:
                state["deadline"] = float(json.loads(lease_file.read_bytes()).get("deadline_boot_s") or math.inf)
                state["mtime"] = mtime
        except (OSError, ValueError):
            pass  # being replaced, or taken away: the deadline known stays
        return state["deadline"] - boot_s()

    return remaining


def _run(env: Mapping[str, str], told: Callable[[], bool]) -> dict[str, Any]:
    stage_dir = Path(_need(env, "TENURE_RUN_DIR"))
    spec = read_spec(stage_dir)
    event = load_event(_need(env, "TENURE_EVENT_FILE"))
    os.environ.update(thread_environment(spec.same_result, os.environ, _leased_threads(env.get("TENURE_LEASE_FILE", ""))))
    # From here on NumPy is loaded: its thread pools are made at import, so the counts must stand before.
    from tenure.train.handler import Context, handle
    from tenure.train.programs import load_program
    from tenure.train.store import Store

    def invoke(following: dict[str, Any]) -> None:
        publish_event(stage_dir, following)

    lease_file = env.get("TENURE_LEASE_FILE", "")
    store = Store(stage_dir / "store", worker=int(env.get("TENURE_WORKER", "0")), fence=int(env.get("TENURE_FENCE", "0")))
    context = Context(
        spec=spec,
        store=store,
        program=lambda: load_program(spec.program, Path(spec.folder), spec.options),
        invoke=invoke,
        stopping=told,
        since_start_s=lambda: _since_start_s(env),
    )
    if lease_file:
        context.remaining_s = remaining_s(Path(lease_file), _boot_s)
    outcome = handle(event, context)
    return {"state": outcome.state, "round": outcome.round, "why": outcome.why, "double_starts": store.double_starts}


def thread_environment(same_result: bool, environ: Mapping[str, str], leased: int) -> dict[str, str]:
    """Return the variables to set so that libraries make the thread pools they should.

    same_result: one thread per shard, whatever the lease's share, so that sums are formed in one order. Otherwise as many
    as the lease says (0: it does not), unless the environment has a number already: the lease put its share there, or
    the job its own. Threads wait without spinning: on a busy core a spinning one takes the time of those it waits for.
    """
    found = {} if "OMP_WAIT_POLICY" in environ else {"OMP_WAIT_POLICY": "PASSIVE"}
    if same_result:
        return found | dict.fromkeys(THREAD_VARIABLES, "1")
    return found | {name: str(leased) for name in THREAD_VARIABLES if leased and not environ.get(name)}


def _leased_threads(lease_file: str) -> int:
    try:
        return int(json.loads(Path(lease_file).read_bytes()).get("threads", 0)) if lease_file else 0
    except (OSError, ValueError, TypeError):
        return 0  # being replaced, or of another form: the environment says the same


def _on_sigterm() -> Callable[[], bool]:
    told = [False]

    def note(number: int, frame: object) -> None:
        told[0] = True

    signal.signal(signal.SIGTERM, note)
    return lambda: told[0]


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _since_start_s(env: Mapping[str, str]) -> float:
    """Seconds since the lease's order to start, else since the process began (proc(5), stat field 22)."""
    if ordered := env.get("TENURE_STARTED_BOOT_S"):
        return _boot_s() - float(ordered)
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return _boot_s() - ticks / os.sysconf("SC_CLK_TCK")


def _need(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise SpecError(f"{name} is not set: a training worker is started by a lease, with an event and a worker folder")
    return env[name]


def _end(code: int) -> None:
    """End the process at once: taking the interpreter down takes longer than all else at the end of a slot.

    A program that has threads or files of its own, which may not be written yet, ends the usual way.
    """
    if threading.active_count() == 1 and not _has_files():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _has_files() -> bool:
    """Whether a file on disk is open for writing, beside the three of every process."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing itself
            writes = fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
            if number > 2 and writes and stat.S_ISREG(os.fstat(number).st_mode):
                return True
    return False


if __name__ == "__main__":
    _end(main())
