"""`tenure replay`: policies tried on a trace before one is switched on. Not here: what a replay does (`tenure.verbs`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tenure.cli import output
from tenure.cli.display import make_display

TraceArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRACE",
        help="`ledger`: this home's own finished leases; or a CSV file: id,submit_s,duration_s and, where they matter, "
        "tenant,gang,gpus,cpus,memory_bytes,estimate_s; an openb pod list; Philly's jobs in Gavel's form.",
    ),
]


def replay(
    trace: TraceArgument,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            metavar="NAME[,NAME...]",
            help="What to try: an order of the queue, a placement, or both as ORDER+PLACEMENT; a wrong name lists them all.",
        ),
    ] = "fifo",
    nodes: Annotated[
        str,
        typer.Option(
            "--nodes",
            metavar="FILE",
            help="The nodes: CSV name,cpus,memory_bytes,gpus[,gpu_model,count], TOML with [[nodes]], an openb node list; "
            "or `fleet`: this home's own.",
        ),
    ] = "fleet",
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Runs per policy; docs/placement.md says what a seed changes.")
    ] = 1,
    fill: Annotated[
        float | None,
        typer.Option(
            "--fill",
            metavar="PERCENT",
            min=1.0,
            max=1000.0,
            help="Compare placements alone: jobs drawn from the trace come until this much of the fleet is asked for; "
            "none ends.",
        ),
    ] = None,
    slot: Annotated[
        str, typer.Option("--slot", metavar="TIME", help="How long a lease lives before it renews or gives way.")
    ] = "1h",
    restart: Annotated[
        str, typer.Option("--restart", metavar="TIME", help="What each start of a job after its first costs.")
    ] = "60s",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=0, help="Only the first N jobs; 0: all.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the report and what it rests on.")] = Path(
        "replay"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on in this folder: finished runs are not made again.")] = False,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home", metavar="DIR", help="Of `ledger` and `fleet` [default: $TENURE_HOME, else the user's data folder]."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")] = False,
) -> None:
    """Try policies on a trace with the broker's own deciders under a virtual clock, and report them side by side.

    The same trace, nodes, policies and seeds give the same report, byte for byte. Nothing is leased.
    """
    from tenure import verbs
    from tenure.resources import parse_duration

    with make_display(sys.stdout, sys.stderr, json=json) as display:
        done = verbs.replay(
            trace,
            policy.split(","),
            nodes=nodes,
            seeds=seeds,
            fill_percent=fill,
            slot_s=parse_duration(slot),
            restart_s=parse_duration(restart),
            limit=limit,
            out=out,
            resume=resume,
            home=home,
            display=display,
        )
    if json:
        output.say(output.as_json(done), sys.stdout)
    else:
        output.say("\n".join([output.clean(done.answer), f"report   {done.html}", f"figures  {done.json}"]), sys.stdout)
