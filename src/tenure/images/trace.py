"""A program run under watch while exercises drive it. Not here: what the trace says (`trace_read`).

Watched by ``strace -f``: every process, every call. The program does not notice, but it is slower, by 2 to 20 times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenure.closures import Exercise
from tenure.errors import MissingExtra, Refused, SpecError, TenureError
from tenure.images.findings import Finding, Matter, some
from tenure.images.trace_processes import all_of, end_all, first_pid, listening, lives, name_of

PORT_VARIABLE = "TENURE_PORT"
"""Environment of an exercise command: the first TCP port on which the program listens."""
_PROBE_S = 20.0
_TICK_S = 0.05
_TAIL_BYTES = 2000
_SPARE_BYTES = 1 << 20
"""A disk with less is full: the end of a trace may be missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long and how much; each is an end with a message, never a hang."""

    ready_s: float = 60.0
    """Until the program listens."""
    total_s: float = 900.0
    """Of one life of the program."""
    exercise_s: float = 300.0
    grace_s: float = 30.0
    """From the stop signal to the end."""
    trace_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The program as an exercise finds it."""

    pid: int
    ports: tuple[int, ...]
    """TCP ports on which it listens, lowest first."""
    env: Mapping[str, str]
    workdir: str
    output: Path
    """What it has printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """One exercise. Exactly one of `command` and `call` is given."""

    command: str = ""
    """For the shell; it finds TENURE_PORT."""
    call: Callable[[Running], None] | None = None
    """Raises TenureError when the program did not do what it should."""
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One run of the program, from start to end, and what drives it meanwhile."""

    argv: tuple[str, ...]
    drives: tuple[Drive, ...] = ()
    stop_signal: int = signal.SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Lived:
    """How a life went."""

    exercises: tuple[Exercise, ...]
    exit_code: int
    """Negative: the signal that ended it."""
    stopped: bool
    """By us, since it would not end by itself."""
    ports: tuple[int, ...]
    output: str
    """The end of what it printed."""
    findings: tuple[Finding, ...]


def find_strace() -> str | None:
    """Return where strace is; None when it is not installed, or this machine lets nobody trace."""
    found = shutil.which("strace")
    if found is None:
        return None
    probe = [found, "-f", "-qq", "-y", "-o", os.devnull, "--", found, "--version"]
    try:
        done = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found if done.returncode == 0 else None


class MissingStrace(MissingExtra):
    """strace is not installed."""

    def __init__(self, why: str = "") -> None:
        TenureError.__init__(
            self,
            f"{why}watching a program needs strace, which is not installed (apt-get install strace; or dnf, apk, pacman), "
            "or may not trace here (in a container: --cap-add SYS_PTRACE)",
        )
        self.package = "strace"


def live(
    life: Life,
    *,
    env: Mapping[str, str],
    workdir: str,
    trace: Path | None,
    prefix: Sequence[str] = (),
    bounds: Bounds | None = None,
) -> Lived:
    """Run the program once and drive it; every process is gone when this returns.

    trace: file for what strace writes; None: it is not watched. prefix: what goes before the program, such as chroot.
    Raises MissingStrace; Refused: it took longer than its bounds, or strace may not watch here; SpecError: it can't be started;
    OSError: the disk is full.
    """
    bounds = bounds or Bounds()
    argv = [*prefix, *life.argv]
    if trace is not None:
        strace = find_strace()
        if strace is None:
            raise MissingStrace
        argv = [strace, "-f", "-qq", "-y", "-o", str(trace), "--", *argv]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.NamedTemporaryFile(prefix="tenure-output-"))
        try:
            outer = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=workdir,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise SpecError(f"{argv[0]} can't be started in {workdir}: {error.strerror}") from error
        stack.callback(end_all, outer)
        return _Driver(life, outer, trace, Path(out.name), bounds, env, workdir).run()


class _Driver:
    """Holds what one life needs while it lasts."""

    def __init__(
        self,
        life: Life,
        outer: subprocess.Popen[bytes],
        trace: Path | None,
        output: Path,
        bounds: Bounds,
        env: Mapping[str, str],
        workdir: str,
    ) -> None:
        self.life, self.outer, self.trace, self.output = life, outer, trace, output
        self.bounds, self.env, self.workdir = bounds, env, workdir
        self.ends_at_s = time.monotonic() + bounds.total_s
        self.findings: list[Finding] = []
        self.exercises: list[Exercise] = []
        self.ports: tuple[int, ...] = ()
        self._left_behind = False
        self._pid = 0
        """Of the program under strace, once it is known."""

    def run(self) -> Lived:
        listens = self._wait_listening() if self.life.drives else self._wait_end_or_listening()
        for drive in self.life.drives:
            if self.outer.poll() is not None:
                self.findings.append(self._ended_early(drive))
                break
            self.exercises.append(self._drive(drive))
        stopped = False
        if self.outer.poll() is None and (self.life.drives or listens):
            stopped = True
            self._stop()
        self._wait_end()
        if not self.life.drives:
            self._note_undriven(stopped)
        text = self._tail()
        self._check_strace(text)
        return Lived(
            exercises=tuple(self.exercises),
            exit_code=self.outer.returncode,
            stopped=stopped,
            ports=self.ports,
            output=text,
            findings=tuple(self.findings),
        )

    def _note_undriven(self, stopped: bool) -> None:
        code = 0 if stopped or self._left_behind else self.outer.returncode
        how = "started, then stopped" if stopped else "run to its end"
        self.exercises.append(Exercise(argv=(), description=how, exit_code=code))
        if code:
            means = f"what it does when it succeeds was not watched. It printed last: {_last_line(self._tail()) or 'nothing'}"
            self.findings.append(Finding(matter=Matter.EXERCISE, found=f"the program ended with {code}", means=means))

    def _wait_listening(self) -> bool:
        ready_at_s = time.monotonic() + self.bounds.ready_s
        for _ in self._ticks():
            self.ports = listening(self.outer.pid)
            if self.ports:
                return True
            if time.monotonic() > ready_at_s:
                means = "the exercises were begun all the same; if they failed, give them a way to wait for the program"
                self.findings.append(
                    Finding(
                        matter=Matter.EXERCISE,
                        found=f"it listened on no TCP port within {self.bounds.ready_s:g} s",
                        means=means,
                    )
                )
                return False
        return False

    def _wait_end_or_listening(self) -> bool:
        """Wait for the end of a program that nothing drives; of a server, a moment after it listens."""
        for _ in self._ticks():
            if self._has_ended():
                return False
            self.ports = listening(self.outer.pid)
            if self.ports:
                time.sleep(1.0)  # what it does right after, such as loading a model
                means = "only its start and its end were watched. Say what drives it: --exercise 'curl ...'"
                self.findings.append(
                    Finding(
                        matter=Matter.EXERCISE, found=f"it listens on port {self.ports[0]}, and nothing drove it", means=means
                    )
                )
                return True
        return False

    def _drive(self, drive: Drive) -> Exercise:
        running = Running(
            pid=self._inner_pid() or 0,
            ports=self.ports,
            env=self.env,
            workdir=self.workdir,
            output=self.output,
        )
        argv = ("sh", "-c", drive.command) if drive.command else ()
        code, said = self._command(drive.command, running) if drive.command else _called(drive, running)
        if code:
            means = f"what it should have driven is not in the closure. It said: {said or 'nothing'}"
            name = drive.description or drive.command
            self.findings.append(Finding(matter=Matter.EXERCISE, found=f'exercise "{name}" ended with {code}', means=means))
        return Exercise(argv=argv, description=drive.description, exit_code=code)

    def _command(self, command: str, running: Running) -> tuple[int, str]:
        env = {**os.environ, PORT_VARIABLE: str(running.ports[0]) if running.ports else ""}
        with subprocess.Popen(
            ["sh", "-c", command],
            env=env,
            cwd=self.workdir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=min(self.bounds.exercise_s, max(1.0, self.ends_at_s - time.monotonic())))
            except subprocess.TimeoutExpired:
                return -signal.SIGKILL, f"it took longer than {self.bounds.exercise_s:g} s"
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, _last_line(said.decode(errors="replace"))

    def _stop(self) -> None:
        pid = self._inner_pid()
        for each in [pid] if pid is not None else [process.pid for process in all_of(self.outer.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, self.life.stop_signal)
        ends_at_s = time.monotonic() + self.bounds.grace_s
        for _ in self._ticks():
            if time.monotonic() > ends_at_s:
                name = signal.Signals(self.life.stop_signal).name
                means = "it was killed, so what it does at its end was not watched"
                self.findings.append(
                    Finding(
                        matter=Matter.EXERCISE, found=f"it did not end within {self.bounds.grace_s:g} s of {name}", means=means
                    )
                )
                end_all(self.outer)
                return

    def _wait_end(self) -> None:
        """Wait until all that the program started has ended; what outlives the program itself is killed after the grace."""
        alone_at_s = 0.0
        for _ in self._ticks():
            if not self._has_ended():
                continue
            alone_at_s = alone_at_s or time.monotonic()
            if (left := all_of(self.outer.pid)) and time.monotonic() > alone_at_s + self.bounds.grace_s:
                means = "they were killed, so what they do at their end was not watched. An image ends with its first process"
                names = some(sorted({name_of(process) for process in left}))
                self.findings.append(Finding(matter=Matter.STARTS, found=f"it left processes behind: {names}", means=means))
                self._left_behind = True
                end_all(self.outer)

    def _ticks(self) -> Iterator[None]:
        """Yield now and then while the program lives. Raises Refused past a bound."""
        while self.outer.poll() is None:
            yield
            if time.monotonic() > self.ends_at_s:
                raise Refused(
                    f"{self.life.argv[0]} ran longer than {self.bounds.total_s:g} s under watch, which slows it down. "
                    "Exercise it with less, or give it more time (--timeout)"
                )
            if self.trace is not None and self.trace.exists() and self.trace.stat().st_size > self.bounds.trace_bytes:
                raise Refused(
                    f"the trace of {self.life.argv[0]} has outgrown {self.bounds.trace_bytes >> 20} MiB. Exercise it with less"
                )
            time.sleep(_TICK_S)

    def _inner_pid(self) -> int | None:
        """Return the program's own process, or, unwatched, the one started; None before it and after."""
        if self.trace is None:
            return self.outer.pid if self.outer.poll() is None else None
        self._pid = self._pid or first_pid(self.trace)
        return self._pid if self._pid and lives(self._pid) else None

    def _has_ended(self) -> bool:
        """Whether the program's own process was there and is gone, whatever it has left behind."""
        return self._inner_pid() is None and (self.trace is None or self._pid != 0)

    def _ended_early(self, drive: Drive) -> Finding:
        name = drive.description or drive.command
        means = f"it was not driven as it should. It printed last: {_last_line(self._tail()) or 'nothing'}"
        found = f'the program ended with {self.outer.returncode} before exercise "{name}"'
        return Finding(matter=Matter.EXERCISE, found=found, means=means)

    def _tail(self) -> str:
        with open(self.output, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")

    def _check_strace(self, text: str) -> None:
        if self.trace is not None and _free_bytes(self.trace.parent) < _SPARE_BYTES:
            raise OSError(errno.ENOSPC, "no room for the trace", str(self.trace.parent))  # strace goes on without a word
        if self.trace is not None and (not self.trace.exists() or not self.trace.stat().st_size):
            raise Refused(
                f"strace may not watch here: {_last_line(text) or 'it wrote nothing'}. "
                "In a container it needs --cap-add SYS_PTRACE"
            )


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _called(drive: Drive, running: Running) -> tuple[int, str]:
    if drive.call is None:
        raise SpecError("an exercise needs a command or a call; found neither")
    try:
        drive.call(running)
    except (TenureError, OSError) as error:
        return 1, str(error)
    return 0, ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
