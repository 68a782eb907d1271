"""What only a real NVIDIA GPU can show, in under two minutes: `bash tests/gpu/check_on_device.sh [RESULTS.json]`.

Each check is bounded, needs none of the others, and says {"holds": true | false | null, "why", figures…}; null: it could not
be made here, and why. Nothing is set on the device (its mode of computing, its instances). On a made-up machine
(`tests/gpu/fakes`) the same checks run in CI.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tenure.agent.gpus import GpuWatch, Holder
from tenure.errors import TenureError
from tenure.meter.nvml import MPS_PROGRAM, Nvml, find_mps_control
from tenure.protocols import ExitKind, RuntimeHandle
from tenure.resources import DeviceShare, Gpu
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.mps import Mps

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 1 << 20, 1 << 30
TOTAL_MAX_S = 100.0
"""No check begins that might end after it; the script ends everything 10 s later."""
CHILD_MAX_S = 25.0
BURN_S = 1.0
Result = dict[str, Any]


class NotHere(Exception):
    """The check cannot be made on this machine."""


class Child:
    """One of the checks' CUDA programs, a process of its own."""

    def __init__(self, *words: object, environment: Mapping[str, str], uid: int | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.work", *map(str, words)],
            cwd=ROOT,
            env=kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=uid,
        )
        self._timer = threading.Timer(CHILD_MAX_S, self.popen.kill)
        self._timer.start()

    def line(self) -> Result:
        """Return its next line. Raises RuntimeError, with its last words, when it says nothing within its bound."""
        assert self.popen.stdout is not None
        assert self.popen.stderr is not None
        text = self.popen.stdout.readline()
        if not text:
            code = self.popen.wait()
            raise RuntimeError(f"a CUDA program ended with {code}: {self.popen.stderr.read()[-400:] or 'no words'}")
        found: Result = json.loads(text)
        return found

    def go(self) -> None:
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write("\n")
            self.popen.stdin.flush()

    def end(self) -> None:
        self._timer.cancel()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.popen.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(2.0)
        self.popen.kill()
        self.popen.wait()


@contextlib.contextmanager
def child(*words: object, environment: Mapping[str, str], uid: int | None = None) -> Iterator[Child]:
    made = Child(*words, environment=environment, uid=uid)
    try:
        yield made
    finally:
        made.end()


class Bench:
    """What the checks share: the library, the first device, its daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mps: Mps | None = None
        self._nvml: Nvml | None = None
        self.full_rate = 0.0

    @property
    def nvml(self) -> Nvml:
        self._nvml = self._nvml or Nvml()
        return self._nvml

    @property
    def gpu(self) -> Gpu:
        gpus = self.nvml.gpus()
        if not gpus:
            raise NotHere("NVML lists no device")
        return gpus[0]

    @property
    def mps(self) -> Mps:
        if self._mps is None:
            program = find_mps_control() or _look_further()
            if not program:
                raise NotHere(f"{MPS_PROGRAM} is nowhere on this machine")
            if self.gpu.instance:
                raise NotHere("the first device is divided (MIG): its instances are leased whole")
            self._mps = Mps(self.folder / "mps", program=program)
        self._mps.ensure(self.gpu.uuid)
        return self._mps

    def plain(self) -> dict[str, str]:
        # NVIDIA's way of not using a daemon that somebody else may have started.
        return {"CUDA_VISIBLE_DEVICES": self.gpu.uuid, "CUDA_MPS_PIPE_DIRECTORY": "/dev/null"}

    def part(self, fraction: float, memory_bytes: int) -> dict[str, str]:
        """Return what a lease of a part is told: by the code under test."""
        gpus = Gpus((self.gpu,), mps=self.mps)
        share = DeviceShare(index=self.gpu.index, fraction=fraction, memory_bytes=memory_bytes)
        grant = gpus.grant((share,), runtime="process")
        if not grant.mps:
            raise NotHere(f"parts are not held by MPS here: {gpus.describe()}")
        return dict(grant.environment)

    def rate(self, environment: Mapping[str, str]) -> Result:
        with child("burn", BURN_S, environment=environment) as work:
            work.line()
            work.go()
            found = work.line()
            if "blocks_per_s" not in found or not found["right"]:
                raise RuntimeError(f"the kernel's answers are wrong: {found}")
            return found

    def close(self) -> None:
        if self._mps is not None and self._nvml is not None:
            self._mps.quit(self.gpu.uuid)
        if self._nvml is not None:
            self._nvml.close()


def _look_further() -> str:
    for place in ("/usr/local", "/opt", "/usr/lib"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                ["find", place, "-name", MPS_PROGRAM, "-type", "f"],
                capture_output=True,
                text=True,
                timeout=8,
                check=False,
            )
            if done.stdout.strip():
                return done.stdout.split()[0]
    return ""


# --- the checks ---


def surroundings(bench: Bench) -> Result:
    """What machine this is; judges nothing."""
    smi = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        words = ["nvidia-smi", "--query-gpu=name,uuid,driver_version,compute_mode,mig.mode.current,memory.total,pstate"]
        done = subprocess.run([*words, "--format=csv,noheader"], capture_output=True, text=True, timeout=15, check=False)
        smi = (done.stdout or done.stderr).strip()
    missing = [name for name in _WANTED if importlib.util.find_spec(name) is None]
    return {
        "holds": None,
        "why": "for the record",
        "nvidia_smi": smi,
        "driver": bench.nvml.driver(),
        "mps_control": find_mps_control() or _look_further(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "uid": os.geteuid(),
        "packages_missing": missing,
    }


def inventory(bench: Bench) -> Result:
    """The devices are listed with name, uuid and memory."""
    gpus = bench.nvml.gpus()
    good = bool(gpus) and all(gpu.uuid and gpu.model and gpu.memory_bytes > GIB for gpu in gpus)
    shown = [{"index": g.index, "model": g.model, "uuid": g.uuid, "memory_bytes": g.memory_bytes} for g in gpus]
    return {"holds": good, "gpus": shown}


def full_rate(bench: Bench) -> Result:
    """The kernel's answers are right without MPS; NVML sees the process, its memory, and that the device is busy."""
    began_s = time.monotonic()
    with child("burn", 2.5, environment=bench.plain()) as work:
        ready = work.line()
        bench.nvml.busy_by_process(bench.gpu.uuid)
        work.go()
        time.sleep(1.6)
        listed = {each.pid: each for each in bench.nvml.processes(bench.gpu.uuid)}
        busy, by_process = bench.nvml.busy(bench.gpu.uuid), bench.nvml.busy_by_process(bench.gpu.uuid)
        found = work.line()
    mine = listed.get(work.popen.pid)
    bench.full_rate = float(found["blocks_per_s"])
    good = bool(found["right"]) and mine is not None and mine.memory_bytes > 0 and (busy or 0) > 0.5
    return {
        "holds": good,
        "blocks_per_s": found["blocks_per_s"],
        "multiprocessors": ready["multiprocessors"],
        "process_seen": mine is not None,
        "process_memory_bytes": mine.memory_bytes if mine else 0,
        "through_mps": mine.through_mps if mine else None,
        "pids_listed": sorted(listed),
        "pid": work.popen.pid,
        "device_busy": busy,
        "busy_by_process": by_process and {str(pid): share for pid, share in by_process.items()},
        "took_s": time.monotonic() - began_s,
    }


def mps_starts(bench: Bench) -> Result:
    """The daemon starts, answers, is found again by another object, and lists its clients, as NVML does."""
    began_s = time.monotonic()
    mps, uuid = bench.mps, bench.gpu.uuid
    again = Mps(bench.folder / "mps", program=mps.program)
    with child("alloc", 64 * MIB, "--hold", environment=bench.part(1 / 2, 2 * GIB)) as work:
        got = work.line()
        clients, servers = mps.clients(uuid), mps.servers(uuid)
        listed = {str(each.pid): [each.memory_bytes, each.through_mps] for each in bench.nvml.processes(uuid)}
    return {
        "holds": again.answers(uuid) and work.popen.pid in (clients or ()) and got["got"] == [True],
        "many_users": mps.serves_many_users(uuid),
        "pid": work.popen.pid,
        "clients": sorted(clients or ()),
        "servers": sorted(servers),
        "nvml_processes": listed,
        "took_s": time.monotonic() - began_s,
    }


def memory_refused(bench: Bench) -> Result:
    """MPS refuses an allocation past a lease's memory, not one within; the control without a bound gets it."""
    bound = 2 * GIB
    with child("alloc", GIB, GIB + 512 * MIB, "--hold", environment=bench.part(1 / 2, bound)) as work:
        bounded = work.line()
    with child("alloc", GIB, GIB + 512 * MIB, environment=bench.plain()) as work:
        control = work.line()
    return {
        "holds": bounded["got"] == [True, False] and control["got"] == [True, True],
        "bound_bytes": bound,
        "asked_bytes": [GIB, GIB + 512 * MIB],
        "got": bounded["got"],
        "control_got": control["got"],
        "total_seen_inside_bytes": bounded["total_bytes"],
        "free_seen_inside_bytes": bounded["free_bytes"],
    }


def memory_counted(bench: Bench) -> Result:
    """What fits under a bound of 2 GiB in pieces of 64 MiB, and what NVML counts then; judges that the bound is not passed."""
    bound, piece = 2 * GIB, 64 * MIB
    with child("alloc", *[piece] * 40, "--hold", environment=bench.part(1 / 2, bound)) as work:
        got = sum(work.line()["got"]) * piece
        counted = {each.pid: each.memory_bytes for each in bench.nvml.processes(bench.gpu.uuid)}.get(work.popen.pid)
    with child("alloc", MIB, "--hold", environment=bench.plain()) as work:
        work.line()
        alone = {each.pid: each.memory_bytes for each in bench.nvml.processes(bench.gpu.uuid)}.get(work.popen.pid)
    return {
        "holds": 0 < got <= bound,
        "allocated_bytes": got,
        "nvml_counts_bytes": counted,
        "nvml_counts_of_a_bare_context_bytes": alone,
    }


def half_of_the_multiprocessors(bench: Bench) -> Result:
    """Half of the threads give about half of the rate; the control with all of them gives all."""
    whole = bench.rate(bench.part(1.0 - 1e-9, 8 * GIB) | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"})
    half = bench.rate(bench.part(1 / 2, 8 * GIB))
    quarter = bench.rate(bench.part(1 / 4, 8 * GIB))
    ratio = half["blocks_per_s"] / whole["blocks_per_s"]
    return {
        "holds": 0.4 <= ratio <= 0.6,
        "ratio_at_a_half": ratio,
        "ratio_at_a_quarter": quarter["blocks_per_s"] / whole["blocks_per_s"],
        "blocks_per_s": whole["blocks_per_s"],
        "multiprocessors": [whole["multiprocessors"], half["multiprocessors"], quarter["multiprocessors"]],
        "without_mps_blocks_per_s": bench.full_rate or None,
    }


def two_leases(bench: Bench) -> Result:
    """Two leases on one device at the same time, a quarter and three quarters: each gets its part, and neither the other's."""
    shares = (1 / 4, 3 / 4)
    with contextlib.ExitStack() as stack:
        works = [stack.enter_context(child("burn", 2.0, environment=bench.part(share, 8 * GIB))) for share in shares]
        for work in works:
            work.line()
        for work in works:
            work.go()
        time.sleep(1.2)
        listed = {each.pid: each for each in bench.nvml.processes(bench.gpu.uuid)}
        by_process, busy = bench.nvml.busy_by_process(bench.gpu.uuid), bench.nvml.busy(bench.gpu.uuid)
        rates = [work.line() for work in works]
    seen = [listed.get(work.popen.pid) for work in works]
    ratio = rates[1]["blocks_per_s"] / rates[0]["blocks_per_s"]
    return {
        "holds": all(rate["right"] for rate in rates) and 2.0 <= ratio <= 4.5 and all(each is not None for each in seen),
        "ratio": ratio,
        "blocks_per_s": [rate["blocks_per_s"] for rate in rates],
        "multiprocessors": [rate["multiprocessors"] for rate in rates],
        "pids": [work.popen.pid for work in works],
        "memory_bytes": [each.memory_bytes if each else None for each in seen],
        "through_mps": [each.through_mps if each else None for each in seen],
        "device_busy": busy,
        "busy_by_process": by_process and {str(pid): share for pid, share in by_process.items()},
    }


def polled(bench: Bench) -> Result:
    """A lease without MPS that holds more than its own is found by looking, and ended with the figures as witness."""
    bound = GIB
    watch = GpuWatch(bench.nvml, (bench.gpu.uuid,))
    with (
        child("alloc", 3 * GIB, "--hold", environment=bench.plain()) as work,
        child("alloc", 64 * MIB, "--hold", environment=bench.plain()) as neighbour,
    ):
        work.line(), neighbour.line()
        holders = [_holder(bench, "greedy", work, bound), _holder(bench, "modest", neighbour, 2 * GIB)]
        began_s, witness, kind = time.monotonic(), "", None
        while not witness and time.monotonic() < began_s + 10:
            uses, ends = watch.look(holders)
            for over in ends:
                os.kill(work.popen.pid if over.handle.lease_id == "greedy" else neighbour.popen.pid, signal.SIGKILL)
                witness, kind = over.witness, over.kind
            time.sleep(0.2)
        took_s = time.monotonic() - began_s
        code, alive = work.popen.wait(5), neighbour.popen.poll() is None
    return {
        "holds": kind is ExitKind.OUT_OF_MEMORY and code == -signal.SIGKILL and alive,
        "witness": witness,
        "took_s": took_s,
        "neighbour_lives": alive,
        "uses": {lease: [use.busy, use.memory_bytes] for lease, use in uses.items()},
    }


def around_mps(bench: Bench) -> Result:
    """A lease of a part that goes around MPS is found; one that goes through it is left alone."""
    watch = GpuWatch(bench.nvml, (bench.gpu.uuid,), mps=bench.mps)
    with (
        child("alloc", 64 * MIB, "--hold", environment=bench.plain()) as around,
        child("alloc", 64 * MIB, "--hold", environment=bench.part(1 / 2, 2 * GIB)) as through,
    ):
        around.line(), through.line()
        holders = [_holder(bench, "around", around, 2 * GIB, mps=True), _holder(bench, "through", through, 2 * GIB, mps=True)]
        ends: dict[str, str] = {}
        for _ in range(3):
            ends |= {over.handle.lease_id: over.witness for over in watch.look(holders)[1]}
            time.sleep(0.2)
    return {"holds": set(ends) == {"around"}, "ended": ends}


def killed_beside(bench: Bench) -> Result:
    """A client whose work was taken off the device first is killed in the middle of it; its neighbour goes on, right."""
    mps, uuid = bench.mps, bench.gpu.uuid
    with (
        child("burn", 10.0, environment=bench.part(1 / 2, 8 * GIB)) as victim,
        child("burn", 3.0, environment=bench.part(1 / 2, 8 * GIB)) as neighbour,
    ):
        victim.line(), neighbour.line()
        victim.go(), neighbour.go()
        time.sleep(0.8)
        began_s = time.monotonic()
        mps.end_clients(uuid, [victim.popen.pid])
        took_s = time.monotonic() - began_s
        victim.popen.kill()
        found = neighbour.line()
    after = bench.rate(bench.part(1 / 2, 8 * GIB))
    return {
        "holds": bool(found.get("right")) and bool(after["right"]),
        "neighbour": found,
        "terminate_took_s": took_s,
        "a_next_one_blocks_per_s": after["blocks_per_s"],
    }


def killed_beside_at_once(bench: Bench) -> Result:
    """The same without taking its work off first; judges nothing, tells what a bare SIGKILL does to neighbours."""
    with (
        child("burn", 10.0, environment=bench.part(1 / 2, 8 * GIB)) as victim,
        child("burn", 3.0, environment=bench.part(1 / 2, 8 * GIB)) as neighbour,
    ):
        victim.line(), neighbour.line()
        victim.go(), neighbour.go()
        time.sleep(0.8)
        victim.popen.kill()
        try:
            found: Result = neighbour.line()
        except RuntimeError as error:
            found = {"error": str(error)}
    return {"holds": None, "why": "for the record", "neighbour": found}


def two_users(bench: Bench) -> Result:
    """Clients of two users go through one daemon at the same time."""
    if os.geteuid() != 0:
        raise NotHere("only root can start programs of two users")
    if not bench.mps.serves_many_users(bench.gpu.uuid):
        raise NotHere("this driver's daemon does not serve several users at once")
    with (
        child("alloc", 64 * MIB, "--hold", environment=bench.part(1 / 2, 2 * GIB)) as one,
        child("alloc", 64 * MIB, "--hold", environment=bench.part(1 / 2, 2 * GIB), uid=65534) as other,
    ):
        first = one.line()
        try:
            second = other.line()
        except RuntimeError as error:
            if "Permission" in str(error) or "No module" in str(error):
                raise NotHere(f"another user may not run programs from here: {error}") from error
            raise
        clients = bench.mps.clients(bench.gpu.uuid) or frozenset()
    both = {one.popen.pid, other.popen.pid} <= clients
    return {"holds": both and first.get("got") == second.get("got") == [True], "both_clients": both, "second": second}


def whole_lease(bench: Bench) -> Result:
    """The whole way: a real agent's leases of parts are bounded, metered, and ended when they take more than theirs."""
    if missing := [name for name in ("msgspec",) if importlib.util.find_spec(name) is None]:
        raise NotHere(f"not installed: {', '.join(missing)}")
    from tests.gpu.whole_lease import check

    program, gpu = bench.mps.program, bench.gpu
    bench.mps.quit(gpu.uuid)  # the agent has a daemon of its own for the device
    return check(bench.folder / "home", gpu, program, ROOT)


_WANTED = ("msgspec", "sqlalchemy", "alembic", "platformdirs", "typer", "rich", "psutil", "pynvml")


def _holder(bench: Bench, lease_id: str, work: Child, memory_bytes: int, *, mps: bool = False) -> Holder:
    pid = work.popen.pid
    handle = RuntimeHandle(lease_id=lease_id, attempt=1, fence=1, pid=pid, start_ticks=0, started_at_s=0.0)
    return Holder(handle=handle, pids=frozenset({pid}), uuids=(bench.gpu.uuid,), memory_bytes=memory_bytes, mps=mps)


CHECKS: tuple[Callable[[Bench], Result], ...] = (
    surroundings,
    inventory,
    full_rate,
    polled,
    mps_starts,
    memory_refused,
    memory_counted,
    half_of_the_multiprocessors,
    two_leases,
    around_mps,
    whole_lease,
    killed_beside,
    two_users,
    killed_beside_at_once,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="where to write the results, beside printing them")
    parser.add_argument("--only", nargs="+", choices=[check.__name__ for check in CHECKS], help="make these checks alone")
    options = parser.parse_args(argv)
    end_s = time.monotonic() + TOTAL_MAX_S
    signal.signal(signal.SIGTERM, _late)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="tg-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o711)  # clients of another user pass through
        bench = Bench(Path(folder))
        for check in (each for each in CHECKS if not options.only or each.__name__ in options.only):
            began_s = time.monotonic()
            if began_s > end_s - CHILD_MAX_S:
                result: Result = {"holds": None, "why": f"no time left of {TOTAL_MAX_S:g} s"}
            else:
                result = _made(check, bench)
            results[check.__name__] = result | {"seconds": round(time.monotonic() - began_s, 2)}
            print(f"{check.__name__}: {json.dumps(results[check.__name__])}", flush=True)
            if options.results:
                options.results.write_text(json.dumps(results, indent=1) + "\n")
        with contextlib.suppress(Exception):
            bench.close()
    print(json.dumps({"name": "gpu_on_device", "holds": _all(results), "checks": results}), flush=True)
    return 1 if _all(results) is False else 0


def _late(number: int, frame: object) -> None:
    """Have the check under way fail; what follows finds no time left, and the results so far are printed."""
    raise TimeoutError("the whole took too long")


def _made(check: Callable[[Bench], Result], bench: Bench) -> Result:
    try:
        return check(bench)
    except (NotHere, PermissionError) as error:
        return {"holds": None, "why": str(error)}
    except TenureError as error:
        return {"holds": False, "why": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"holds": False, "why": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)[-600:]}


def _all(results: Mapping[str, Result]) -> bool | None:
    said = [result["holds"] for result in results.values() if result["holds"] is not None]
    return all(said) if said else None


if __name__ == "__main__":
    sys.exit(main())
