"""`tenure bench serve`: a model in every architecture, transport, interaction and batch. Not here: what it means (`verbs`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tenure.cli import exits, output
from tenure.cli.display import make_display
from tenure.errors import SpecError

SAY_EVERY_S = 30.0


def bench_serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of pictures, or an .npy file of examples.")],
    goal: Annotated[
        str, typer.Option("--goal", metavar="GOAL", help="What must be met: p99<50ms, images/s>100, memory<2GiB, by commas.")
    ] = "",
    repeats: Annotated[int | None, typer.Option("--repeats", metavar="N", help="Of each setting [default: 20].", min=1)] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="TIME", help="Fewer repeats where they would take longer than this, e.g. 10min."),
    ] = None,
    batches: Annotated[
        str | None, typer.Option("--batches", metavar="N,N,…", help="Images of one request [default: 1,8,32].")
    ] = None,
    architectures: Annotated[
        str | None,
        typer.Option("--architectures", metavar="NAME,…", help="Of simple, microservice, distributed [default: all three]."),
    ] = None,
    interactions: Annotated[
        str | None, typer.Option("--interactions", metavar="NAME,…", help="Of sync, async [default: both].")
    ] = None,
    transports: Annotated[
        str | None, typer.Option("--transports", metavar="NAME,…", help="Of http, grpc, shm [default: all three].")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="NAME,…", help="Where pictures come from: memory, files [default: both]."),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option("--cell", metavar="TIME", help="How long one setting of one repeat takes at least [default: 500ms]."),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option("--in-flight", metavar="N", help="Requests that an async application has under way [default: 8].", min=1),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="URL",
            help="A server of others that runs already (Triton, MLServer, KServe), in the same table and order: http:// or "
            "grpc://HOST:PORT, with ?model=NAME if it goes by another name there, ?pid=N to measure its CPU and memory where "
            "that isn't found out. More than once for several.",
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", metavar="LINK", help="Between the two nodes, such as rate=1Gbit,delay=20ms [default: none]."),
    ] = None,
    client_cpus: Annotated[
        float | None,
        typer.Option("--client-cpus", metavar="N", help="Cores of the distributed application's node [default: half of all]."),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--images", metavar="N", help="Pictures used, the first by name [default: 64].", min=1)
    ] = None,
    normalise: Annotated[
        str | None,
        typer.Option("--normalise", metavar="NAME", help="Of a model that takes floats: none, unit, signed or imagenet."),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", metavar="N", help="Height and width, for a model that takes any.", min=1)
    ] = None,
    undisturbed: Annotated[
        bool, typer.Option("--undisturbed", help="Go before everything else on this machine; others get what is left.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: 3 repeats of 200 ms; memory not apart. Other options still count.")
    ] = False,
    instances: Annotated[
        int | None, typer.Option("--instances", metavar="N", help="Of the server's model [default: the server chooses].", min=1)
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Of the server's model [default: the node's cores].", min=1)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the order in which settings are measured.")] = 0,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home", metavar="DIR", help="Where Tenure keeps its state [default: $TENURE_HOME, else the user's data folder]."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")] = False,
) -> None:
    """Measure a model in every architecture, transport, interaction and batch, again and again in one random order.

    A run in the ledger, with a trial per setting: images/s, latency, where the time went, CPU and memory of each party, each
    with its standard error. docs/bench-serve.md defines every figure.
    """
    from tenure import verbs
    from tenure.jobs import ServerOptions
    from tenure.resources import parse_duration

    given = {
        "repeats": repeats,
        "max_s": None if time is None else parse_duration(time),
        "batches": None if batches is None else _numbers("--batches", batches),
        "architectures": _names(architectures),
        "interactions": _names(interactions),
        "transports": _names(transports),
        "data": _names(data),
        "cell_s": None if cell is None else parse_duration(cell),
        "in_flight": in_flight,
        "against": tuple(against) if against else None,
        "link": link,
        "client_cpus": client_cpus,
        "images": number,
        "normalise": normalise,
        "size": size,
        "undisturbed": undisturbed or None,
    }
    options: dict[str, Any] = {"repeats": 3, "cell_s": 0.2, "fresh": False} if quick else {}
    options |= {name: value for name, value in given.items() if value is not None}
    server = ServerOptions(instances=instances or 0, threads=threads or 0)
    with make_display(sys.stdout, sys.stderr, json=json, say_every_s=SAY_EVERY_S) as display:
        outcome = verbs.bench_serve(model, images, home=home, display=display, goal=goal, options=server, seed=seed, **options)
    code = (exits.exit_code(outcome.error) if outcome.error else exits.JOB_FAILED) if outcome.failed else exits.OK
    output.tell_outcome(outcome, code, sys.stdout, sys.stderr, json=json)
    raise typer.Exit(code)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(f"{option} takes whole numbers by commas, such as 1,8,32; found {text!r}") from error
