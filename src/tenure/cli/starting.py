"""`tenure up`, `tenure down`: the broker and nodes that stay. Not here: what they do (`tenure.verbs`)."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tenure.cli import output
from tenure.cli.leasing import Home, Json
from tenure.errors import SpecError

LedgerOption = Annotated[
    str,
    typer.Option(
        "--ledger",
        metavar="URL",
        help="Keep the ledger in PostgreSQL, postgresql://USER@HOST/DATABASE [default: $TENURE_LEDGER, else where it is; "
        "at first ledger.sqlite in the home].",
    ),
]


def ledger_url(text: str) -> str:
    """Return the URL unless it says a password, which everybody on this machine could read there."""
    user, _, _ = text.rpartition("@")
    if ":" in user.partition("://")[2] or "password=" in text:
        raise SpecError(
            "a password in --ledger can be read by every user of this machine. Keep it in ~/.pgpass, "
            "or name the whole URL in the environment variable TENURE_LEDGER."
        )
    return text


def up(
    node: Annotated[str, typer.Option("--node", metavar="NAME", help="What to call this node.")] = "local",
    cpus: Annotated[
        float | None,
        typer.Option("--cpus", metavar="N", help="Offer only so many cores; alone, with that share of the memory."),
    ] = None,
    memory: Annotated[
        str,
        typer.Option("--memory", metavar="SIZE", help="Offer only so much, e.g. 8GiB; alone, with that share of the cores."),
    ] = "",
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            metavar="N",
            min=0,
            help="Offer only so many GPUs. On a machine without any, declare so many: leases count them, nothing holds them.",
        ),
    ] = None,
    gpu_memory: Annotated[str, typer.Option("--gpu-memory", metavar="SIZE", help="Of each declared GPU.")] = "",
    gpu_model: Annotated[str, typer.Option("--gpu-model", metavar="NAME", help="Of declared GPUs.")] = "",
    ledger: LedgerOption = "",
    order: Annotated[
        str,
        typer.Option(
            "--order", metavar="NAME", help="Whose turn it is from now on: fifo, backfill, las or fair. At first: fifo."
        ),
    ] = "",
    metrics: Annotated[
        int | None,
        typer.Option(
            "--metrics",
            metavar="PORT",
            min=1,
            max=65535,
            help="Have Prometheus read metrics at http://127.0.0.1:PORT/metrics from now on. At first: nowhere.",
        ),
    ] = None,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared",
            help="As root: serve all users of this machine, each as a tenant that sees and touches only its own "
            "[home: $TENURE_HOME, else /var/lib/tenure].",
        ),
    ] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Start the broker and a node on this machine, and leave them running for leases that outlive a command.

    Again with another --node, it adds that node: several nodes, each with a part of this machine, stand for several machines.
    Without --cpus and --memory a node offers all that other agents, of this home or others, have left.
    """
    from tenure import verbs
    from tenure.resources import parse_bytes

    started = verbs.up(
        home=home,
        node=node,
        cpus=cpus,
        memory=parse_bytes(memory) if memory else None,
        gpus=gpus,
        gpu_memory=parse_bytes(gpu_memory) if gpu_memory else 0,
        gpu_model=gpu_model,
        ledger=ledger_url(ledger),
        order=order,
        metrics_port=metrics or 0,
        shared=shared,
    )
    output.say(output.as_json((started,)) if json else output.nodes_table((started,)), sys.stdout)


def down(
    node: Annotated[
        str, typer.Option("--node", metavar="NAME", help="Only this node; its leases are released, its part is free again.")
    ] = "",
    home: Home = None,
    json: Json = False,
) -> None:
    """End every lease, the agents and the broker; or take out one node."""
    from tenure import verbs

    was_up = verbs.down(home=home, node=node)
    done = f"node {output.clean(node)} down" if node else "down"
    said = done if was_up else "nothing was up in this home"
    output.say(output.as_json({"was_up": was_up}) if json else said, sys.stdout)
