"""The verbs of the command line, each over one function of `tenure.verbs`. Every one takes --json, and --home if it needs one.

`tenure.verbs` is imported inside the commands: it pulls in what the system needs to run, and --help needs none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tenure import __version__
from tenure.cli import exits, leasing, output, starting, tenants
from tenure.cli.bench_loading import bench_load
from tenure.cli.bench_serving import bench_serve
from tenure.cli.display import make_display
from tenure.cli.imaging_repair import image
from tenure.cli.replaying import replay
from tenure.cli.serving import serve
from tenure.cli.starting import LedgerOption, ledger_url
from tenure.errors import SpecError

app = typer.Typer(
    name="tenure",
    help="Leases on exactly the resources that machine-learning jobs need: measured, recommended, granted, enforced.",
    epilog="Exit codes: "
    + " ".join(f"{code} {meaning};" for code, meaning in ((0, "done"), (1, "job failed"), (2, "wrong input"), (3, "refused")))
    + " docs/cli.md lists them all.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double the time of --help, and the reference page is made of it
    pretty_exceptions_enable=False,
)

JobFileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Job file (TOML), or a folder that has one.")]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", help="Where Tenure keeps its state [default: $TENURE_HOME, else the user's data folder]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]
RunOption = Annotated[str, typer.Option("--run", metavar="RUN", help="Only those of this run.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tenure {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Leases on exactly the resources that machine-learning jobs need: measured, recommended, granted, enforced."""


def _print(text: str) -> None:
    output.say(text, sys.stdout)


def _show(value: Any, as_text: Callable[[Any], str], json: bool) -> None:
    _print(output.as_json(value) if json else as_text(value))


JobFileOrResume = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="Job file (TOML), or a folder that has one; not needed with --resume.")
]
ResumeOption = Annotated[str, typer.Option("--resume", metavar="RUN", help="Go on with a run that was interrupted or failed.")]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=0,
        help="Train with so many workers, whatever the job file says or is recommended; at most its shards.",
    ),
]


def _run(file: Path | None, home: Path | None, json: bool, *, resume: str = "", only: str = "", workers: int = 0) -> None:
    """Run a job file with a live display, print where the report is, and end with the failure's code when a stage failed."""
    from tenure import verbs

    if file is None and not resume:
        raise SpecError("nothing to run: name a job file, or a run to go on with (--resume RUN)")
    with make_display(sys.stdout, sys.stderr, json=json) as display:
        outcome = verbs.run(file, home=home, resume=resume, only=only, workers=workers, display=display)
    code = (exits.exit_code(outcome.error) if outcome.error else exits.JOB_FAILED) if outcome.failed else exits.OK
    output.tell_outcome(outcome, code, sys.stdout, sys.stderr, json=json)
    raise typer.Exit(code)


@app.command("run")
def run_command(
    file: JobFileOrResume = None,
    resume: ResumeOption = "",
    workers: WorkersOption = 0,
    home: Home = None,
    json: Json = False,
) -> None:
    """Take a job file all the way: measure, recommend, lease, enforce, report."""
    _run(file, home, json, resume=resume, workers=workers)


@app.command()
def train(
    file: JobFileOrResume = None,
    resume: ResumeOption = "",
    workers: WorkersOption = 0,
    home: Home = None,
    json: Json = False,
) -> None:
    """Run a job file's training stage, and what it needs; or go on with a run of it, with other workers if asked."""
    _run(file, home, json, resume=resume, only="train", workers=workers)


app.command()(serve)
bench = typer.Typer(name="bench", help="Measure how models are served.", no_args_is_help=True, rich_markup_mode=None)
bench.command("serve")(bench_serve)
bench.command("load")(bench_load)
app.add_typer(bench)
app.add_typer(image)


@app.command()
def recommend(file: JobFileArgument, home: Home = None, json: Json = False) -> None:
    """Measure and recommend for each goal of a job file; lease nothing for it."""
    from tenure import verbs

    with make_display(sys.stdout, sys.stderr, json=json) as display:
        recommendations = verbs.recommend(file, home=home, display=display)
    _show(recommendations, output.recommendations_text, json)


@app.command()
def doctor(home: Home = None, json: Json = False) -> None:
    """Say what this machine can do, and what each missing thing would take. Ends with 1 if something needed is missing."""
    from tenure import verbs

    findings = verbs.doctor(home)
    _show(findings, output.findings_text, json)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(exits.JOB_FAILED)


app.command()(leasing.lease)


@app.command()
def leases(
    run: RunOption = "",
    live: Annotated[bool, typer.Option("--live", help="Only those that have not ended.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """List leases: who holds what, where, until when; of GPUs also how far they are held."""
    from tenure import verbs

    found = verbs.leases(home=home, run=run, live=live)
    nodes = verbs.nodes(home=home) if not json and any(lease.devices for lease in found) else ()
    _show(found, lambda leases: output.leases_table(leases, nodes), json)


app.command()(leasing.renew)
app.command()(leasing.resize)


@app.command()
def release(
    lease: Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease; `tenure leases --live` lists them.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """End a lease: its processes are asked to leave, then ended; its resources are free."""
    from tenure import verbs

    _show(
        verbs.release(lease, home=home),
        lambda ended: f"lease {output.clean(ended.id)} {ended.state} ({ended.end_reason})",
        json,
    )


app.command()(leasing.quota)
app.add_typer(tenants.app)
app.command("exec")(leasing.execute)
app.command()(leasing.top)


@app.command()
def runs(home: Home = None, json: Json = False) -> None:
    """List runs, newest first."""
    from tenure import verbs

    _show(verbs.runs(home=home), output.runs_table, json)


@app.command()
def events(
    lease: Annotated[str, typer.Argument(metavar="[LEASE]", show_default=False, help="Only those of this lease.")] = "",
    run: RunOption = "",
    after: Annotated[int, typer.Option("--after", min=0, metavar="SEQ", help="Only those after this number.")] = 0,
    home: Home = None,
    json: Json = False,
) -> None:
    """List what happened, who did it, why and when; oldest first."""
    from tenure import verbs

    _show(verbs.events(home=home, run=run, lease=lease, after=after), output.events_table, json)


@app.command()
def trials(
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", metavar="HEX", help="Only those of this job on this kind of machine.")
    ] = "",
    run: RunOption = "",
    home: Home = None,
    json: Json = False,
) -> None:
    """List what was measured; oldest first."""
    from tenure import verbs

    _show(verbs.trials(home=home, fingerprint=fingerprint, run=run), output.trials_table, json)


@app.command()
def nodes(home: Home = None, json: Json = False) -> None:
    """List nodes: state, what each can lease out, what leases hold of it, how it confines."""
    from tenure import verbs

    found = verbs.status(home=home)
    _show(found.nodes, output.nodes_table, json)
    for name, why in found.unreached.items():
        output.say(output.clean(f"node {name} cannot be used now: {why or 'it does not answer'}"), sys.stderr)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run; `tenure runs` lists them.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Where to write it. Default: the run's own folder.")
    ] = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Write a run's report again from what the ledger holds: one HTML file and its JSON."""
    from tenure import verbs

    html, figures = verbs.report(run, home=home, folder=folder)
    if json:
        _print(output.as_json({"report_html": html, "report_json": figures}))
    else:
        _print(f"report   {html}\nfigures  {figures}")


app.command()(starting.up)
app.command()(starting.down)


@app.command()
def gc(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Remove stores, worker folders and logs of runs this old.")
    ] = "30d",
    forget_after: Annotated[
        str, typer.Option("--forget-after", metavar="TIME", help="Remove runs this old wholly, with report and artefacts.")
    ] = "365d",
    keep_runs: Annotated[int, typer.Option("--keep-runs", metavar="N", min=0, help="Leave the newest N runs alone.")] = 20,
    events_older_than: Annotated[
        str, typer.Option("--events-older-than", metavar="TIME", help="Remove events and usage points this old.")
    ] = "90d",
    trials_older_than: Annotated[
        str, typer.Option("--trials-older-than", metavar="TIME", help="Remove trials this old. Default: none ever goes.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and how many bytes.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Remove what is old; say what went and how many bytes. The broker does the same by itself, with these defaults.

    Nothing of a live run or lease goes, nothing of a run that a command is at, and no trial unless asked.
    """
    from tenure import verbs
    from tenure.resources import parse_duration

    freed = verbs.gc(
        home=home,
        older_than_s=parse_duration(older_than),
        forget_after_s=max(parse_duration(forget_after), parse_duration(older_than)),
        keep_runs=keep_runs,
        events_older_than_s=parse_duration(events_older_than),
        trials_older_than_s=parse_duration(trials_older_than) if trials_older_than else None,
        dry_run=dry_run,
    )
    _show(freed, lambda parts: output.freed_table(parts, dry_run=dry_run), json)


@app.command()
def logs(
    lease: Annotated[str, typer.Argument(metavar="LEASE", help="Id of the lease; `tenure leases` lists them.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written, until the lease has ended or Ctrl-C.")
    ] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Print what a lease's processes wrote."""
    from tenure import verbs

    if follow:
        if json:
            raise SpecError("--follow prints text as it comes; leave --json out")
        try:
            for part in verbs.follow(lease, home=home):
                sys.stdout.write(part)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return
        return
    text = verbs.logs(lease, home=home)
    _print(output.as_json({"lease": lease, "log": text}) if json else text.rstrip("\n"))


@app.command()
def dataset(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Folders or zips with a folder per class, or arrays (.npy, .npz)."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; it must not be there yet.")],
    size: Annotated[
        str,
        typer.Option(
            "--size", metavar="N | WxH", help="Pixels, width x height; what does not fit is cut off around the middle."
        ),
    ] = "32",
    split: Annotated[
        float | None,
        typer.Option("--split", metavar="SHARE", help="Hold out this share of each class. Default: folders train and test."),
    ] = None,
    one_hot: Annotated[bool, typer.Option("--one-hot", help="Labels as rows of 0 and 1, not as numbers.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the split.")] = 0,
    limit_bad: Annotated[
        float, typer.Option("--limit-bad", metavar="SHARE", help="Fail when more of the pictures are bad.")
    ] = 0.05,
    json: Json = False,
) -> None:
    """Make arrays to train on of folders, zips or arrays of pictures. Bad pictures are skipped, and listed.

    It needs no home: it makes one folder, whole or not at all, and touches nothing else.
    """
    from tenure import verbs

    with make_display(sys.stdout, sys.stderr, json=json) as display:
        made = verbs.dataset(
            sources,
            out,
            size=size,
            split=split,
            one_hot=one_hot,
            seed=seed,
            limit_bad=limit_bad,
            display=display,
        )
    if json:
        _print(output.as_json(made))


app.command()(replay)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it, e.g. ledger.backup.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file when it is there.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Write the ledger to one checked file, whatever database it lies in; leases and broker go on meanwhile."""
    from tenure import verbs

    _show(verbs.backup(file, home=home, force=force), output.backup_text, json)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `tenure backup` wrote.")],
    ledger: LedgerOption = "",
    force: Annotated[bool, typer.Option("--force", help="Move a ledger that holds runs or leases aside.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Have the ledger hold what a backup holds; with --ledger, in another place. Only after `tenure down`."""
    from tenure import verbs

    _show(verbs.restore(file, home=home, ledger=ledger_url(ledger), force=force), output.restored_text, json)
