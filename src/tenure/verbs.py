"""What a user can do, as functions: the command line and `import tenure` are both made of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenure import app
from tenure.errors import NotFound, SpecError
from tenure.events import Event
from tenure.homes import check_own_run
from tenure.keeping import backup as backup
from tenure.keeping import down as down
from tenure.keeping import gc as gc
from tenure.keeping import policies as policies
from tenure.keeping import remove_tenant as remove_tenant
from tenure.keeping import restore as restore
from tenure.keeping import set_policy as set_policy
from tenure.keeping import set_role as set_role
from tenure.keeping import tenants as tenants
from tenure.keeping import up as up
from tenure.leases import EndReason, Lease
from tenure.leasing import execute as execute
from tenure.leasing import follow as follow
from tenure.leasing import lease as lease
from tenure.leasing import logs as logs
from tenure.leasing import renew as renew
from tenure.leasing import resize as resize
from tenure.leasing import top as top
from tenure.leasing import workspace_url as workspace_url
from tenure.meter.doctor import Finding, diagnose
from tenure.nodes import Node, NodeState
from tenure.protocols import SystemClock
from tenure.runs import Run, RunFiles
from tenure.trials import Recommendation, Trial
from tenure.wire import Status

if TYPE_CHECKING:
    from tenure.decide.verdicts import LatencyGoal
    from tenure.experiments.context import Display
    from tenure.experiments.flow import Outcome
    from tenure.experiments.foreground import Listening
    from tenure.experiments.foreground_image import ImageRun
    from tenure.experiments.replaying import Replayed
    from tenure.jobs import ServerOptions
    from tenure.serve.load.plan import LoadPlan
    from tenure.serve.load.report import LoadReport
    from tenure.serve.load.search import SearchReport
    from tenure.serve.triton_repository import TritonRepository
    from tenure.train.dataset import Dataset

Home = str | Path | None


class SilentDisplay:
    """Shows nothing."""

    def stage_started(self, stage: str, step: str, text: str) -> None:
        """See Display."""

    def progress(self, text: str, done: float | None = None) -> None:
        """See Display."""

    def step_done(self, stage: str, step: str, closing_line: str) -> None:
        """See Display."""

    def warn(self, text: str) -> None:
        """See Display."""


def run(
    job_file: str | Path | None = None,
    *,
    home: Home = None,
    resume: str = "",
    only: str = "",
    workers: int = 0,
    display: Display | None = None,
) -> Outcome:
    """Run a job file: measure, recommend, lease, enforce, observe, report.

    resume: id of an interrupted run to go on with; a job file beside it may differ from the run's own in envelope, workers,
    probe and retry. only: restrict to a stage's name or kind. workers: size of each training gang, whatever the job file
    says or is recommended; 0: as it says.
    Returns the outcome, also of a run that failed (`outcome.failed`). Raises SpecError for a wrong job file.
    """
    path = Path(job_file) if job_file is not None else None
    shown = display or SilentDisplay()
    return app.run_job_file(path, home=app.find_home(home), display=shown, resume=resume, only=only, workers=workers)


def serve(
    model: str | Path,
    *,
    home: Home = None,
    display: Display | None = None,
    listening: Callable[[Listening], None] = lambda _: None,
    **options: Any,
) -> Outcome:
    """Serve a model file, a folder of models or a repository under a lease of its own, until Ctrl-C. It blocks.

    listening: told once what is served where. options: fields of `ForegroundSpec`.
    Returns the outcome, also of a server that ended by itself (`outcome.failed`). Raises NotFound, SpecError, MissingExtra,
    Refused.
    """
    from tenure.experiments.foreground import ForegroundSpec  # SciPy and the client come with it

    spec = ForegroundSpec(model=Path(model), **options)
    return app.serve_model(spec, home=app.find_home(home), display=display or SilentDisplay(), listening=listening)


def run_image(
    asked: ImageRun,
    *,
    home: Home = None,
    display: Display | None = None,
    listening: Callable[[Listening], None] = lambda _: None,
) -> Outcome:
    """Run an image under a lease of its own, until Ctrl-C or its program's end. It blocks.

    listening: told once what is served where, of an image that serves a model. Returns the outcome, also of a program that
    ended by itself (`outcome.failed`). Raises NotFound, SpecError, Refused.
    """
    return app.run_image(asked, home=app.find_home(home), display=display or SilentDisplay(), listening=listening)


def triton_repository(
    model: str | Path,
    out: str | Path,
    *,
    python: bool = False,
    python_path: str = "",
    http_port: int = 8000,
    grpc_port: int = 8001,
    options: ServerOptions | None = None,
) -> TritonRepository:
    """Write a model file, or a folder of models, as a Triton repository, with the command that serves it; nothing is started.

    out: folder, made when missing. python: Triton's python backend for ONNX, too; python_path: what it imports from.
    options: rows of a batch, delay, instances and threads of every model. Raises NotFound, SpecError, MissingExtra, Conflict.
    """
    from tenure.jobs import ServerOptions
    from tenure.serve.plane import ModelOptions
    from tenure.serve.triton_repository import write_repository

    given = options or ServerOptions()
    names = ("max_batch_rows", "max_delay_s", "instances", "threads")
    return write_repository(
        Path(model),
        Path(out),
        options=ModelOptions(**{name: getattr(given, name) for name in names}),
        http_port=http_port,
        grpc_port=grpc_port,
        python=python,
        python_path=python_path,
    )


def bench_serve(
    model: str | Path, examples: str | Path, *, home: Home = None, display: Display | None = None, **options: Any
) -> Outcome:
    """Measure a model in every architecture, transport, interaction and batch, again and again in one random order.

    examples: a folder of pictures, or an .npy file. options: fields of `Sweep`, and `goal`, `options`, `seed`, `clients` and
    `search` of `BenchSpec`; with a `search`, settings of it are searched instead, and only some measured. Returns the
    outcome, also of a run that failed (`outcome.failed`). Raises NotFound, SpecError.
    """
    from tenure.experiments.bench import BenchSpec  # SciPy and the client come with it
    from tenure.sweeps import Sweep

    own = {name: options.pop(name) for name in ("goal", "options", "seed", "search", "clients") if name in options}
    if unknown := set(options) - set(Sweep.__dataclass_fields__):
        raise SpecError(f"a sweep has no {sorted(unknown)[0]!r}; it has: {', '.join(Sweep.__dataclass_fields__)}")
    spec = BenchSpec(model=Path(model), examples=Path(examples), sweep=Sweep(**options), **own)
    return app.bench_model(spec, home=app.find_home(home), display=display or SilentDisplay())


def bench_load(plan: LoadPlan, *, goal: LatencyGoal | None = None, folder: str | Path | None = None) -> LoadReport:
    """Send a model of any v2 server requests by a schedule laid down beforehand, and judge the run; nothing is leased.

    goal: what the latencies are held against. folder: a new one, for the report and the record of every request.
    Raises Unavailable, NotFound, SpecError, ModelFailed before the run; what happens during it is in the report.
    """
    from tenure.serve.load.report import measure

    return measure(plan, folder=Path(folder) if folder is not None else None, goal=goal)


def bench_rate(
    plan: LoadPlan,
    goal: LatencyGoal,
    *,
    max_s: float = 300.0,
    folder: str | Path | None = None,
    told: Callable[[LoadReport], None] = lambda _: None,
) -> SearchReport:
    """Search the highest rate at which a model of any v2 server meets a goal, by runs as `bench_load` makes them.

    plan: its rate and length are the search's own. max_s: no run begins after so long. told: each run's report as it comes.
    """
    from tenure.serve.load.search import search

    return search(plan, goal, max_s=max_s, folder=Path(folder) if folder is not None else None, told=told)


def recommend(job_file: str | Path, *, home: Home = None, display: Display | None = None) -> tuple[Recommendation, ...]:
    """Measure and recommend, as `run` does, but train and serve nothing past the probes."""
    found_home = app.find_home(home)
    outcome = app.run_job_file(Path(job_file), home=found_home, display=display or SilentDisplay(), until="recommend")
    if outcome.error is not None:
        raise outcome.error
    with app.broker(found_home) as client:
        return tuple(client.recommendations(run_id=outcome.run.id))


def leases(*, home: Home = None, run: str = "", live: bool = False) -> tuple[Lease, ...]:
    """Return leases, of one run or of all. live: only those that have not ended."""
    with app.broker(app.find_home(home)) as client:
        return tuple(client.leases(run_id=run, live=live))


def release(lease_id: str, *, home: Home = None) -> Lease:
    """End a lease: SIGTERM, the grace, SIGKILL. Returns it once it has ended. Raises NotFound."""
    with app.broker(app.find_home(home)) as client:
        client.release((lease_id,), reason=EndReason.RELEASED, why="released by its tenant")
        return client.wait_leases((lease_id,), until="ended", timeout_s=30.0)[0].lease


def runs(*, home: Home = None) -> tuple[Run, ...]:
    """Return runs, newest first."""
    with app.broker(app.find_home(home)) as client:
        return tuple(client.runs())


def events(*, home: Home = None, run: str = "", lease: str = "", after: int = 0) -> tuple[Event, ...]:
    """Return events after a sequence number, of all runs, one run or one lease; oldest first. Raises NotFound."""
    with app.broker(app.find_home(home)) as client:
        if not lease:
            return tuple(client.events(run_id=run, after_seq=after))
        run = client.lease(lease).lease.run_id
        return tuple(event for event in client.events(run_id=run, after_seq=after) if event.lease_id == lease)


def trials(*, home: Home = None, fingerprint: str = "", run: str = "") -> tuple[Trial, ...]:
    """Return what was measured, oldest first."""
    with app.broker(app.find_home(home)) as client:
        return tuple(client.trials(fingerprint=fingerprint, run_id=run))


def nodes(*, home: Home = None) -> tuple[Node, ...]:
    """Return the nodes the broker knows, with their state and what leases hold of them."""
    return tuple(status(home=home).nodes)


def status(*, home: Home = None) -> Status:
    """Return the broker in one answer: its nodes, those it cannot reach and why, how many leases and clients it has."""
    with app.broker(app.find_home(home)) as client:
        return client.status()


def report(run_id: str, *, home: Home = None, folder: str | Path | None = None) -> tuple[Path, Path]:
    """Write a run's report again from the ledger; return the paths of its HTML and JSON. Raises NotFound."""
    from tenure.experiments.flow import report_run  # plots come with it

    found_home = app.find_home(home)
    with app.broker(found_home) as client:
        files = RunFiles(found_home, run_id)
        check_own_run(files.root)
        return report_run(client, files, run_id, now_s=SystemClock().utc_s(), folder=Path(folder) if folder else None)


def dataset(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    size: str = "32",
    split: float | None = None,
    one_hot: bool = False,
    seed: int = 0,
    limit_bad: float = 0.05,
    display: Display | None = None,
) -> Dataset:
    """Make arrays of folders, zips or arrays of pictures, ready to train on. See docs/datasets.md; needs no home.

    size: pixels, "32" or width x height, "32x48". The rest is as in `DatasetSpec`.

    Raises SpecError, Conflict, or OSError, e.g. for a full disk; then nothing is at `out`.
    """
    from tenure.train.dataset import DatasetSpec, make_dataset, parse_size  # Pillow comes with it

    shown = display or SilentDisplay()
    spec = DatasetSpec(size=parse_size(size), split=split, one_hot=one_hot, seed=seed, limit_bad=limit_bad)

    def progress(seen: int, count: int, skipped: int) -> None:
        if seen % 100 == 0 or seen == count:
            shown.progress(f"{seen:,} of {count:,} pictures, {skipped:,} skipped", seen / count)

    shown.stage_started("dataset", "decode", "listing pictures")
    made = make_dataset([Path(path) for path in sources], Path(out), spec, progress=progress)
    many = f"{made.train:,} to train with, {made.test:,} held out, {len(made.classes)} classes, in {made.path}"
    shown.step_done("dataset", "decode", f"{many}; {made.skipped:,} skipped" if made.skipped else many)
    if made.skipped:
        shown.warn(f"{made.skipped:,} pictures were skipped; {Path(made.path) / 'skipped.tsv'} says which and why")
    return made


def replay(
    trace: str | Path,
    policies: Sequence[str],
    *,
    nodes: str | Path = "fleet",
    seeds: int = 1,
    fill_percent: float | None = None,
    slot_s: float = 3600.0,
    restart_s: float = 60.0,
    limit: int = 0,
    out: str | Path = "replay",
    resume: bool = False,
    home: Home = None,
    display: Display | None = None,
) -> Replayed:
    """Try policies on a trace under a virtual clock and write the report; see docs/placement.md. Nothing is leased.

    trace: a file, or "ledger" for the home's own history. nodes: a file, or "fleet" for the home's own. fill_percent: compare
    placements alone. limit: only the first so many jobs, 0: all. resume: go on in the folder `out`.
    Raises SpecError, NotFound, Conflict.
    """
    from tenure.experiments import replaying  # NumPy and plots come with it

    shown = display or SilentDisplay()
    tried = replaying.parse_policies(policies, fill=fill_percent is not None)
    for file in (str(trace), str(nodes)):  # before a broker is started for the rest
        if file not in ("ledger", "fleet") and not Path(file).exists():
            raise NotFound(f"{file} does not exist")
    history, fleet = None, None
    if str(trace) == "ledger" or str(nodes) == "fleet":
        with app.broker(app.find_home(home)) as client:
            history = client.leases(max_leases=replaying.MAX_LEASES) if str(trace) == "ledger" else None
            up = [node for node in client.status().nodes if node.state is NodeState.UP]
            fleet = tuple(up) if str(nodes) == "fleet" else None
    asked = replaying.prepare(
        history if history is not None else Path(trace),
        fleet if fleet is not None else Path(nodes),
        tried,
        seeds=seeds,
        fill_percent=fill_percent,
        slot_s=slot_s,
        restart_s=restart_s,
        limit=limit,
    )
    return replaying.replay(asked, Path(out), resume=resume, display=shown)


def doctor(home: Home = None) -> tuple[Finding, ...]:
    """Return what this machine can do, and what each missing thing would take."""
    return tuple(diagnose(app.find_home(home)))
