"""What a user can do, as functions: the command line and `import tenure` are both made of these."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tenure import app
from tenure.broker.client import connect, start_broker
from tenure.errors import Conflict, NotFound, SpecError, Unavailable
from tenure.events import Event
from tenure.leases import EndReason, Lease
from tenure.meter.doctor import Finding, diagnose
from tenure.nodes import Node
from tenure.protocols import SystemClock
from tenure.runs import Run, RunFiles
from tenure.tenants import check_name
from tenure.trials import Recommendation, Trial
from tenure.wire import Backup

if TYPE_CHECKING:
    from tenure.broker.ledgers import Restored
    from tenure.experiments.context import Display
    from tenure.experiments.flow import Outcome

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
    display: Display | None = None,
) -> Outcome:
    """Run a job file: measure, recommend, lease, enforce, observe, report.

    resume: id of an interrupted run to go on with, instead of a job file. only: restrict to a stage's name or kind.
    Returns the outcome, also of a run that failed (`outcome.failed`). Raises SpecError for a wrong job file.
    """
    path = Path(job_file) if job_file is not None else None
    return app.run_job_file(path, home=app.find_home(home), display=display or SilentDisplay(), resume=resume, only=only)


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


def events(*, home: Home = None, run: str = "", after: int = 0) -> tuple[Event, ...]:
    """Return events after a sequence number, oldest first."""
    with app.broker(app.find_home(home)) as client:
        return tuple(client.events(run_id=run, after_seq=after))


def trials(*, home: Home = None, fingerprint: str = "", run: str = "") -> tuple[Trial, ...]:
    """Return what was measured, oldest first."""
    with app.broker(app.find_home(home)) as client:
        return tuple(client.trials(fingerprint=fingerprint, run_id=run))


def nodes(*, home: Home = None) -> tuple[Node, ...]:
    """Return the nodes the broker knows."""
    with app.broker(app.find_home(home)) as client:
        return tuple(client.status().nodes)


def report(run_id: str, *, home: Home = None, folder: str | Path | None = None) -> tuple[Path, Path]:
    """Write a run's report again from the ledger; return the paths of its HTML and JSON. Raises NotFound."""
    from tenure.experiments.flow import report_run  # plots come with it

    found_home = app.find_home(home)
    with app.broker(found_home) as client:
        files = RunFiles(found_home, run_id)
        return report_run(client, files, run_id, now_s=SystemClock().utc_s(), folder=Path(folder) if folder else None)


def logs(lease_id: str, *, home: Home = None, max_bytes: int = 65536) -> str:
    """Return the end of a lease's output, its last attempt. Raises NotFound."""
    found_home = app.find_home(home)
    with app.broker(found_home) as client:
        lease = client.lease(lease_id).lease
    folder = RunFiles(found_home, lease.run_id).logs(lease.stage)
    found = sorted(folder.glob(f"{lease.worker}.*.log"), key=lambda path: path.stat().st_mtime)
    path = next((p for p in found if p.name == f"{lease.worker}.{lease.attempt}.log"), None)
    if path is None:
        raise NotFound(f"lease {lease_id} has written no log yet (looked in {folder})")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max_bytes))
        return file.read().decode(errors="replace")


def up(
    *, home: Home = None, node: str = "local", cpus: float | None = None, memory: int | None = None, ledger: str = ""
) -> Node:
    """Start a broker and this machine's agent that stay until `down`; return the node. An answering broker is kept as it is.

    cpus, memory (bytes): offer only this part of the machine; both or neither. ledger: URL of the PostgreSQL database that is
    the home's ledger from now on; default $TENURE_LEDGER, else as before. Raises SpecError, Conflict, Unavailable.
    """
    if (cpus is None) != (memory is None):
        raise SpecError("a part of a machine needs both cpus and memory, e.g. --cpus 2 --memory 8GiB")
    found_home = app.find_home(home)
    part = check_name("node", node) if cpus is None else f"{check_name('node', node)}:{cpus:g}:{memory}B"
    if ledger := ledger or os.environ.get("TENURE_LEDGER", ""):
        from tenure.broker import ledgers  # SQL comes with it

        ledgers.choose(found_home, ledger)
    start_broker(found_home, persistent=True, nodes=(part,))
    with app.broker(found_home) as client:
        status = client.status()
    if not status.persistent:
        raise Conflict("a broker that a run started for itself answers in this home; try again when that run has ended")
    return next((known for known in status.nodes if known.name == node), status.nodes[0])


def down(*, home: Home = None) -> bool:
    """End every lease of the home, its agents and its broker. Returns False when no broker answered."""
    try:
        client = connect(app.find_home(home), start=False, who="cli:down")
    except Unavailable:
        return False
    try:
        client.shutdown()
    finally:
        client.close()
    return True


def backup(file: str | Path, *, home: Home = None, force: bool = False) -> Backup:
    """Write what the home's ledger holds to one checked file, while leases and broker go on; return what was written.

    force: replace the file when it is there. Raises Conflict, NotFound, Refused.
    """
    from tenure.broker import ledgers  # SQL comes with it

    return ledgers.backup(app.find_home(home), Path(file).expanduser().absolute(), force=force)


def restore(file: str | Path, *, home: Home = None, ledger: str = "", force: bool = False) -> Restored:
    """Have the home's ledger hold what a backup holds. Only while no broker of the home lives.

    ledger: URL of the PostgreSQL database, or ``ledger.sqlite`` for the home's own file, that is its ledger from now on;
    default $TENURE_LEDGER, else where it is. force: move a ledger with runs or leases aside. Raises CorruptData, Conflict.
    """
    from tenure.broker import ledgers  # SQL comes with it

    to = ledger or os.environ.get("TENURE_LEDGER", "")
    return ledgers.restore(app.find_home(home), Path(file).expanduser().absolute(), to=to, force=force)


def doctor(home: Home = None) -> tuple[Finding, ...]:
    """Return what this machine can do, and what each missing thing would take."""
    return tuple(diagnose(app.find_home(home)))
