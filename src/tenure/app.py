"""The composition root: finds the home, connects to the broker, and puts a run together. Nothing is decided here."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tenure.broker.client import BrokerClient, connect
from tenure.data import price_table
from tenure.errors import SpecError, Unavailable
from tenure.homes import SYSTEM_HOME, check_own_run, check_user, is_shared
from tenure.meter.machine import versions
from tenure.nodes import Node, NodeState
from tenure.protocols import SystemClock
from tenure.runs import Run, RunFiles

if TYPE_CHECKING:
    from tenure.experiments.bench import BenchSpec
    from tenure.experiments.context import Display, RunContext
    from tenure.experiments.flow import Outcome
    from tenure.experiments.foreground import ForegroundSpec, Listening
    from tenure.experiments.foreground_image import ImageRun

LIBRARIES = ("tenure", "numpy", "scipy", "scikit-learn", "onnxruntime", "onnx")
"""Versions of these belong to every trial."""


def find_home(home: str | Path | None = None) -> Path:
    """Return the absolute folder of all state: the argument, else $TENURE_HOME, else the home that root shares with all users
    of this machine, else the platform's data directory.

    Made when missing. Raises SpecError when it cannot be made or written, or serves another user alone.
    """
    if home is None and not (home := os.environ.get("TENURE_HOME")):
        if is_shared(SYSTEM_HOME):
            return SYSTEM_HOME
        import platformdirs  # a few ms that a given home saves

        home = platformdirs.user_data_path("tenure")
    path = Path(home).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(
            f"the home {path} cannot be made: {error.strerror}. Set TENURE_HOME to a folder you may write."
        ) from error
    check_user(path)
    if not is_shared(path) and not os.access(path, os.W_OK):
        raise SpecError(f"the home {path} cannot be written. Set TENURE_HOME to a folder you may write.")
    return path


@contextmanager
def broker(home: Path) -> Iterator[BrokerClient]:
    """Connect to the home's broker, starting one when none answers, and hang up at the end."""
    client = connect(home, who=f"cli:{os.getpid()}")
    try:
        yield client
    finally:
        client.close()


def new_id(kind: str) -> str:
    """Return a fresh id, e.g. ``r-8f3a01c2``: 40 random bits, enough for one ledger and short enough to type."""
    return f"{kind}-{secrets.token_hex(5)}"


def run_job_file(
    job_file: Path | None,
    *,
    home: Path,
    display: Display,
    resume: str = "",
    only: str = "",
    workers: int = 0,
    until: str = "done",
) -> Outcome:
    """Run a job file, or go on with a run. See `experiments.flow`."""
    # SciPy, ONNX Runtime's client and plots come with these: commands that only look need none of it.
    from tenure.experiments.flow import check_workers, new_run, resumed_run, run_stages

    text, source = _read(job_file)
    if not resume:
        run, jobs = new_run(text, source=source, run_id=new_id("r"), now_s=SystemClock().utc_s(), only=only)
        check_workers(jobs, workers)
    with broker(home) as client:
        if resume:
            check_own_run(RunFiles(home, resume).root)
            run, jobs = resumed_run(client.runs(run_id=resume), resume, text=text, source=source)
            check_workers(jobs, workers)
        context = _context(client, home, run, display=display)
        context.until, context.workers = until, workers
        return run_stages(context, jobs)


def serve_model(spec: ForegroundSpec, *, home: Path, display: Display, listening: Callable[[Listening], None]) -> Outcome:
    """Serve a model file or a folder of models under a lease of its own until it is interrupted. See `experiments.foreground`.

    listening: told once what is served where. Raises NotFound, SpecError, MissingExtra before anything is started.
    """
    from tenure.experiments.flow import new_run, run_stages
    from tenure.experiments.foreground import check_models, check_ports, job_file_of

    check_models(spec.model)
    check_ports(spec)
    with broker(home) as client:
        text, why = job_file_of(spec, _node(client))
        source = spec.model.absolute()
        run, jobs = new_run(text, source=source, run_id=new_id("r"), now_s=SystemClock().utc_s())
        context = _context(client, home, run, display=display)
        context.listening = listening
        context.close_step("serve", "envelope", why)
        return run_stages(context, jobs)


def run_image(asked: ImageRun, *, home: Path, display: Display, listening: Callable[[Listening], None]) -> Outcome:
    """Run an image under a lease of its own until it is interrupted, or its program ends. See `experiments.foreground_image`.

    listening: told once what is served where, of an image whose door is v2. Raises NotFound, SpecError, Refused.
    """
    from tenure.experiments.flow import new_run, run_stages
    from tenure.experiments.foreground import check_ports
    from tenure.experiments.foreground_image import bounded_goal, chosen_form, image_job_file
    from tenure.experiments.image_forms import form_fingerprint, form_recommendation

    if asked.image.manifest.door:
        check_ports(asked.place)
    with broker(home) as client:
        node = _node(client)
        known = client.trials(fingerprint=form_fingerprint(asked.image.manifest, node.machine)) if asked.goal else ()
        choice = chosen_form(asked, node, tuple(known)) if asked.goal else None
        text, why = image_job_file(asked, node, choice)
        run, jobs = new_run(text, source=asked.image.folder, run_id=new_id("r"), now_s=SystemClock().utc_s())
        context = _context(client, home, run, display=display)
        context.listening = listening
        context.close_step("serve", "envelope", why)
        if choice is not None:
            made = form_recommendation(
                context, jobs.stages[0], choice, goal=str(bounded_goal(asked, node)), trials=tuple(known)
            )
            client.record_recommendation(made)
        return run_stages(context, jobs)


def bench_model(spec: BenchSpec, *, home: Path, display: Display) -> Outcome:
    """Run the experiment of a model, a run in the ledger. See `experiments.bench`."""
    from tenure.experiments.bench import bench_job_file
    from tenure.experiments.flow import new_run, run_stages

    text = bench_job_file(spec)
    run, jobs = new_run(text, source=spec.model.absolute(), run_id=new_id("r"), now_s=SystemClock().utc_s())
    with broker(home) as client:
        return run_stages(_context(client, home, run, display=display), jobs)


def _context(client: BrokerClient, home: Path, run: Run, *, display: Display) -> RunContext:
    """Record the run and return what its stages share."""
    from tenure.experiments.context import RunContext

    node = _node(client)
    run = client.submit_run(run)
    # How bounds are held here changes what the figures mean, so it is said first.
    display.step_done("node", node.name, "; ".join(node.confinement.values()))
    return RunContext(
        client=client,
        files=RunFiles(home, run.id),
        run=run,
        folder=Path(run.source).parent,
        display=display,
        node=node,
        prices=price_table(_own_prices(home)).owned,
        clock=SystemClock(),
        new_id=new_id,
        versions=versions(*LIBRARIES),
    )


def _read(job_file: Path | None) -> tuple[str, Path]:
    """Return the job file's text and path. A folder stands for the one job file in it."""
    if job_file is None:
        return "", Path()
    path = job_file.absolute()
    if path.is_dir():
        found = sorted(path.glob("*.toml"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise SpecError(f"{job_file} is a folder; it should hold exactly one job file (*.toml), found: {names}")
        path = found[0]
    try:
        return path.read_text(), path
    except FileNotFoundError as error:
        raise SpecError(f"job file {job_file} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"job file {job_file} cannot be read: {error}") from error


def _own_prices(home: Path) -> Path | None:
    own = home / "prices.toml"
    return own if own.exists() else None


def _node(client: BrokerClient) -> Node:
    """Return the largest node: probes and predictions are made for it."""
    status = client.status()
    nodes = [node for node in status.nodes if node.state is NodeState.UP]
    if not nodes:
        why = "; ".join(status.unreached.values()).rstrip(".")
        raise Unavailable(
            f'no node can be used: {why or "none answers the broker"}. "tenure doctor" tells what this machine can do.'
        )
    return max(nodes, key=lambda node: (node.capacity.cpus, node.capacity.memory_bytes, node.name))
