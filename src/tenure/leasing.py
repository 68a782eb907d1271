"""What the holder of a lease does with it, as functions: take, reserve, renew, resize, run something inside, look, follow.

The verbs of `tenure.verbs` that belong to leases for people. Not here: who gets what and when (`tenure.broker`), a run's own
leases (`tenure.experiments`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from tenure import app
from tenure.broker.client import BrokerClient, connect
from tenure.broker.workspace_setup import URL_MAX_S, Setup, has_jupyter, jupyter_url, set_up
from tenure.errors import JobFailed, NotFound, Refused, SpecError, Unavailable
from tenure.frames import OpenSession, SessionAt
from tenure.homes import is_guest
from tenure.jobfile import JobFile, format_job_file
from tenure.jobs import Command, Job
from tenure.leases import EndReason, Lease, LeaseState, RightSize
from tenure.protocols import SystemClock, Window
from tenure.resources import Envelope, format_duration
from tenure.runs import Run, RunFiles, RunState, Stage
from tenure.runtimes.acting import open_regular
from tenure.tenants import check_name
from tenure.usage import Usage
from tenure.wire import ExecResult, GangMember, RequestGang

Home = str | Path | None
STAGE = "workspace"
RENEWABLE_S = 7 * 86400.0
"""How long a workspace can be renewed for, all in all, unless its holder says otherwise."""
MAX_EXEC_S = 86400.0
FOLLOW_EVERY_S = 0.3
_CLOCK_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One live lease as it is now, against what it may use."""

    lease: Lease
    cpus: float = 0.0
    """Cores in use between the last two samples; 0 until there are two."""
    usage: Usage | None = None
    left_s: float = 0.0
    """Until the slot ends; 0 for one that does not hold yet."""


def lease(
    command: Sequence[str] = (),
    *,
    home: Home = None,
    cpus: float = 1.0,
    memory_bytes: int = 1 << 30,
    gpus: float = 0.0,
    gpu_memory_bytes: int = 0,
    disk_bytes: int = 10 << 30,
    for_s: float = 3600.0,
    at_s: float = 0.0,
    renewable_s: float | None = None,
    name: str = STAGE,
    tenant: str = "default",
    grace_s: float = 10.0,
    wait_s: float = 3600.0,
    setup: Setup | None = None,
    told: Callable[[str], None] = lambda _: None,
    right_size: str = RightSize.PROPOSE,
) -> Lease:
    """Lease a workspace, which outlives the caller; return the lease once its command runs.

    command: what runs inside; by default JupyterLab when the environment has it (`workspace_url`), else something that only
    holds the workspace open, for `exec`. for_s: its first slot. setup: its environment, image and runtime; told: how the
    environment comes along. It starts in its tenant's home volume, which outlives it.
    at_s: UTC seconds from which on its room is kept; it then comes back reserved, at once. 0: now.
    renewable_s: how long it may be renewed for, all in all (at least for_s); default 7 days. grace_s: between SIGTERM, at the
    end of the lease, and SIGKILL. wait_s: how long it may queue.
    right_size: what comes of its use when another envelope would fit better: ``off``, ``propose`` (an event), ``apply``.
    Raises Refused when no broker is there to stay (`tenure up`), when there is no room in time; NoPlacement; JobFailed when
    its command ended at once; SpecError.
    """
    check_name("workspace", name)
    if right_size not in tuple(RightSize):
        raise SpecError(f"right_size must be one of {', '.join(RightSize)}; found {right_size!r}")
    chosen = RightSize(right_size)
    envelope = Envelope(
        cpus=cpus,
        memory_bytes=memory_bytes,
        gpus=gpus,
        gpu_memory_bytes=gpu_memory_bytes,
        disk_bytes=disk_bytes,
        slot_s=for_s,
        total_s=max(for_s, RENEWABLE_S if renewable_s is None else renewable_s),
    )
    found_home = app.find_home(home)
    with _staying_broker(found_home) as client:
        made = set_up(
            setup or Setup(),
            command,
            home=found_home,
            tenant=tenant,
            live=client.leases(live=True),
            grace_s=grace_s,
            volume=Path(client.home_volume()) if is_guest(found_home) else None,
            told=told,
        )
        run = _submit(client, name, tenant, made, envelope)
        asked = RequestGang(
            gang_id=run.id,
            run_id=run.id,
            stage=STAGE,
            tenant=tenant,
            members=(GangMember(worker=0, envelope=envelope, command=made),),
            queue_s=wait_s,
            starts_at_s=at_s,
            right_size=chosen,
        )
        try:
            (got,) = client.request_gang(asked)
        except BaseException:
            client.set_run(run.id, RunState.FAILED, "its lease was refused")
            raise
        try:
            return _granted(client, got, wait_s, told)
        except KeyboardInterrupt:
            client.release((got.id,), reason=EndReason.CANCELLED, why="the command that asked for it was interrupted")
            raise


def workspace_url(held: Lease, *, home: Home = None, wait_s: float = URL_MAX_S) -> str:
    """Return where a workspace's JupyterLab answers, its token included, once it does; empty for a workspace without one.

    Raises JobFailed with the end of its output when the lease ended first, Unavailable when it does not answer within `wait_s`.
    """
    found_home = app.find_home(home)
    if not has_jupyter(held) or held.state is LeaseState.RESERVED:
        return ""
    end_s = time.monotonic() + wait_s
    with app.broker(found_home) as client:
        while True:
            if url := jupyter_url(found_home, held):
                return url
            (view,) = client.wait_leases((held.id,), until="ended", timeout_s=0.2)
            held = view.lease
            if held.state is LeaseState.ENDED:
                raise JobFailed(f"JupyterLab of lease {held.id} ended: {held.end_detail}", reason=str(held.end_reason))
            if time.monotonic() > end_s:
                raise Unavailable(
                    f"JupyterLab of lease {held.id} does not answer within {wait_s:g} s; the lease goes on. "
                    f'"tenure logs {held.id}" has what it says, and its URL once it answers.'
                )


def renew(lease_id: str, *, for_s: float, home: Home = None) -> Lease:
    """Have a lease end `for_s` from now, never earlier than it would have, never past its total; return it.

    Raises NotFound, IllegalChange when it has ended or its total is spent, Refused by its tenant's policy.
    """
    with app.broker(app.find_home(home)) as client:
        return client.renew(lease_id, for_s)


def resize(
    lease_id: str,
    *,
    cpus: float | None = None,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    home: Home = None,
) -> Lease:
    """Change what a lease may use while it runs; what is not named stays. Returns it with its new envelope.

    Raises Refused when its node lacks room, or it holds more memory than asked for; NotFound, IllegalChange, SpecError.
    """
    if cpus is None and memory_bytes is None and disk_bytes is None:
        raise SpecError("nothing to resize: name cpus, memory or disk")
    with app.broker(app.find_home(home)) as client:
        old = client.lease(lease_id).lease.envelope
        new = replace(
            old,
            cpus=old.cpus if cpus is None else cpus,
            memory_bytes=old.memory_bytes if memory_bytes is None else memory_bytes,
            disk_bytes=old.disk_bytes if disk_bytes is None else disk_bytes,
        )
        return client.resize(lease_id, new)


def execute(lease_id: str, argv: Sequence[str], *, timeout_s: float = 600.0, home: Home = None) -> ExecResult:
    """Run one command inside a lease's bounds, without a terminal; return its exit code and output (its first MiB).

    It is ended when it takes longer than `timeout_s` (at most a day): Unavailable. Raises NotFound, Conflict when nothing
    runs in the lease.
    """
    if not argv or not argv[0]:
        raise SpecError("nothing to run inside the lease: name a command")
    if not 0 < timeout_s <= MAX_EXEC_S:
        raise SpecError(f"a command inside a lease may take up to {format_duration(MAX_EXEC_S)}; found {timeout_s!r} s")
    with app.broker(app.find_home(home)) as client:
        return client.exec(lease_id, argv, timeout_s=timeout_s)


def open_session(
    lease_id: str, argv: Sequence[str], *, window: Window | None = None, timeout_s: float = 0.0, home: Home = None
) -> SessionAt:
    """Begin a command inside a lease for somebody to talk to, and return where; see `frames.OpenSession` and `cli.terminal`.

    timeout_s: it is ended when it takes longer; 0: with the lease. Raises NotFound, Conflict, Unsupported, Refused.
    """
    if not argv or not argv[0]:
        raise SpecError("nothing to run inside the lease: name a command, such as sh")
    if not 0 <= timeout_s <= MAX_EXEC_S:
        raise SpecError(f"a command inside a lease may take up to {format_duration(MAX_EXEC_S)}; found {timeout_s!r} s")
    with app.broker(app.find_home(home)) as client:
        return client.open_session(OpenSession(lease_id=lease_id, argv=tuple(argv), window=window, timeout_s=timeout_s))


def top(*, home: Home = None, every_s: float = 1.0) -> Iterator[tuple[Watched, ...]]:
    """Yield the live leases with what they use now, every `every_s`, for as long as the caller asks."""
    samples: dict[str, tuple[Usage, float]] = {}
    with app.broker(app.find_home(home)) as client:
        while True:
            views, now_s = client.live(), SystemClock().utc_s()
            samples = {view.lease.id: _sampled(view.usage, samples.get(view.lease.id)) for view in views if view.usage}
            yield tuple(
                Watched(
                    lease=view.lease,
                    cpus=samples[view.lease.id][1] if view.usage else 0.0,
                    usage=view.usage,
                    left_s=max(0.0, view.lease.ends_at_s - now_s) if view.lease.holds else 0.0,
                )
                for view in views
            )
            time.sleep(every_s)


def _sampled(used: Usage, before: tuple[Usage, float] | None) -> tuple[Usage, float]:
    """Return a sample with the cores in use since the one before, or what was known when nothing new was heard."""
    if before is None:
        return used, 0.0
    known = before[0]
    if used.at_s <= known.at_s:
        return before
    return used, max(0.0, used.cpu_s - known.cpu_s) / (used.at_s - known.at_s)


def follow(lease_id: str, *, home: Home = None, from_end_bytes: int = 65536) -> Iterator[str]:
    """Yield what a lease's processes write, from the end of what they wrote before on, until the lease has ended.

    A next attempt's output follows the last one's. Raises NotFound.
    """
    found_home = app.find_home(home)
    with app.broker(found_home) as client:
        view = client.lease(lease_id)
        place, seen_bytes = None, 0
        while True:
            path = log_path(found_home, view.lease)
            if path != place:
                size_bytes = _size(path)
                seen_bytes = max(0, size_bytes - from_end_bytes) if place is None else 0
                place = path
            over = view.lease.state is LeaseState.ENDED  # looked at before the last read: nothing is written after it
            for part in _output(path, seen_bytes):
                seen_bytes += len(part)
                yield part.decode(errors="replace")
            if over:
                return
            (view,) = client.wait_leases((lease_id,), until="ended", timeout_s=FOLLOW_EVERY_S)


def log_path(home: Path, held: Lease) -> Path:
    """Return where the output of a lease's present attempt lies; the file may not be there yet."""
    return RunFiles(home, held.run_id).logs(held.stage) / f"{held.worker}.{held.attempt}.log"


def logs(lease_id: str, *, home: Home = None, max_bytes: int = 65536) -> str:
    """Return the end of a lease's output, its last attempt. Raises NotFound."""
    found_home = app.find_home(home)
    with app.broker(found_home) as client:
        path = log_path(found_home, client.lease(lease_id).lease)
    from_bytes = max(0, _size(path) - max_bytes)
    if not path.exists():
        raise NotFound(f"lease {lease_id} has no log in {path.parent}: it wrote none yet, or it was removed for its age")
    return b"".join(_output(path, from_bytes)).decode(errors="replace")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except PermissionError as error:
        raise Refused(f"the output in {path.parent} is its tenant's own: that one can read it, and root") from error


def _output(path: Path, from_bytes: int) -> Iterator[bytes]:
    """Yield what a log holds from there on; nothing while there is none, or for what a job put in its place."""
    with suppress(OSError), os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        file.seek(from_bytes)
        while part := file.read(1 << 20):
            yield part


def parse_moment(text: str, *, now_s: float) -> float:
    """Return UTC seconds of ``20:00`` (the next one, local time) or ``2025-01-31T20:00`` (local unless it names a zone).

    Raises SpecError for anything else, and for a moment that is past.
    """
    match = _CLOCK_TIME.fullmatch(text.strip())
    if match is not None:
        now = datetime.fromtimestamp(now_s)
        moment = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
        # By the calendar, not by 24 h: the clocks may be changed in between.
        return (moment if moment > now else moment + timedelta(days=1)).timestamp()
    try:
        found_s = datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError) as error:
        raise SpecError(f"a moment was expected, such as 20:00 or 2025-01-31T20:00; found {text!r}") from error
    if found_s <= now_s:
        raise SpecError(f"{text} is past; name a moment to come")
    return found_s


def _staying_broker(home: Path) -> BrokerClient:
    remedy = 'A lease of your own outlives this command, so somebody has to stay and keep it: "tenure up" once, then again'
    try:
        client = connect(home, start=False, who="cli:lease")
    except Unavailable as error:
        raise Refused(f"no broker is up for home {home}. {remedy}") from error
    if not client.status().persistent:
        client.close()
        raise Refused(f"the broker of home {home} is there for a run only and leaves with it. {remedy}")
    return client


def _submit(client: BrokerClient, name: str, tenant: str, command: Command, envelope: Envelope) -> Run:
    """Record the run that the lease belongs to; the broker ends it with the lease."""
    job = Job(
        kind="workspace",
        name=STAGE,
        command=command.argv,
        envelope=envelope,
        runtime=command.runtime,
        image=command.image,
        ports=command.ports,
    )
    run = Run(
        id=app.new_id("w"),
        name=name,
        tenant=tenant,
        job_file=format_job_file(JobFile(name=name, tenant=tenant, stages=(job,))),
        source="",
        state=RunState.RUNNING,
        stages=(Stage(name=STAGE, kind="workspace", state=RunState.RUNNING, attempts=1),),
        created_at_s=SystemClock().utc_s(),
    )
    return client.submit_run(run)


def _granted(client: BrokerClient, got: Lease, wait_s: float, told: Callable[[str], None]) -> Lease:
    """Return the lease once it runs; told: why its start takes long.

    Raises Refused when it was not granted in time, JobFailed when it ended at once.
    """
    end_s, said = time.monotonic() + wait_s + 60.0, ""
    while True:
        reserved = got.state is LeaseState.RESERVED
        (view,) = client.wait_leases((got.id,), until="active", timeout_s=0.0 if reserved else 5.0)
        held = view.lease
        if held.state is LeaseState.ENDED and not view.exits:
            raise Refused(f"lease {held.id} was not granted: {held.end_detail or held.end_reason}")
        if held.state is LeaseState.ENDED and held.end_reason is not EndReason.COMPLETED:
            raise JobFailed(f"lease {held.id} ended at once: {held.end_detail}", reason=str(held.end_reason))
        if held.state not in (LeaseState.REQUESTED, LeaseState.QUEUED, LeaseState.GRANTING):
            return held  # a reservation among them: its time is to come
        if held.state is LeaseState.GRANTING and (late := _why_late(client, held)) != said:
            said = late
            told(late)
        if time.monotonic() > end_s:
            client.release((held.id,), why="it did not start in time")
            raise Unavailable(f"lease {held.id} is {held.state} since {wait_s + 60.0:g} s and was given back")


def _why_late(client: BrokerClient, held: Lease) -> str:
    """Return what its node last said of why it does not start yet."""
    mine = [event.why for event in client.events(run_id=held.run_id) if event.lease_id == held.id]
    return next((why for why in reversed(mine) if why.startswith("started again: ")), "")
