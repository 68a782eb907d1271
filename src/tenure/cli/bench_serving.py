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
_INSTEAD = {
    "data": ": pictures are decoded beforehand",
    "runtimes": ": its trials run in processes",
    "link": ": a link is between two nodes, and what is recommended is leased on one",
    "client_cpus": ": the server and its applications share one node",
    "against": ": servers of others run as they do",
}


def bench_serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of pictures, or an .npy file of examples.")],
    goal: Annotated[
        str, typer.Option("--goal", metavar="GOAL", help="What must be met: p99<50ms, images/s>100, memory<2GiB, by commas.")
    ] = "",
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Find the best setting for the goal from few trials, over instances, threads and delays of the server too, "
            "instead of measuring every setting.",
        ),
    ] = False,
    trials: Annotated[
        int | None, typer.Option("--trials", metavar="N", help="With --search: settings measured at most [default: 10].", min=1)
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option("--clients", metavar="N", help="With --search: applications that ask at once [default: 1].", min=1),
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(
            "--best",
            metavar="rate|cost",
            help="With --search: of settings that meet the goal, the fastest or the cheapest "
            "[default: cost where the goal says images/s, else rate].",
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", metavar="N", help="Of each setting [default: 20; with --search 3].", min=1)
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            "--time", metavar="TIME", help="Fewer repeats, or trials, where they would take longer than this, e.g. 10min."
        ),
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
    runtimes: Annotated[
        str | None,
        typer.Option(
            "--runtimes",
            metavar="NAME,…",
            help="What confines the server: process, container, or both; each then has a lease of its own [default: process].",
        ),
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
        str | None,
        typer.Option("--instances", metavar="N[,N,…]", help="Of the server's model [default: the server chooses]."),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            "--threads",
            metavar="N[,N,…]",
            help="Of the server's model [default: the node's cores]; with --search of each instance. Several only there.",
        ),
    ] = None,
    max_delays: Annotated[
        str | None,
        typer.Option(
            "--max-delays",
            metavar="TIME,TIME,…",
            help="With --search: how long a request may wait for others to share its run [default: 0ms,3ms].",
        ),
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
    with its standard error. With --search a few settings are measured, and the best for the goal is recommended.
    docs/bench-serve.md defines every figure.
    """
    from tenure import verbs
    from tenure.jobs import ServerOptions
    from tenure.resources import parse_duration
    from tenure.sweeps import Search

    both: dict[str, Any] = {
        "repeats": repeats,
        "max_s": None if time is None else parse_duration(time),
        "batches": None if batches is None else _numbers("--batches", batches),
        "architectures": _names(architectures),
        "interactions": _names(interactions),
        "transports": _names(transports),
        "cell_s": None if cell is None else parse_duration(cell),
        "in_flight": in_flight,
        "images": number,
        "normalise": normalise,
        "size": size,
    }
    of_sweep: dict[str, Any] = {
        "data": _names(data),
        "runtimes": _names(runtimes),
        "against": tuple(against) if against else None,
        "link": link,
        "client_cpus": client_cpus,
        "undisturbed": undisturbed or None,
    }
    of_search: dict[str, Any] = {
        "trials": trials,
        "best": best,
        "max_delays_s": None if max_delays is None else tuple(parse_duration(part.strip()) for part in max_delays.split(",")),
    }
    refused = of_sweep if search else {**of_search, "clients": clients}
    if wrong := next((name for name, value in refused.items() if value is not None), ""):
        option = f"--{wrong.removesuffix('_s').replace('_', '-')}"
        raise SpecError(f"{option} is {'not for' if search else 'only for'} --search{_INSTEAD.get(wrong, '')}")
    held = {"instances": instances, "threads": threads}
    counts = {name: _numbers(f"--{name}", text) for name, text in held.items() if text is not None}
    options: dict[str, Any] = {"cell_s": 0.2, **({} if search else {"repeats": 3, "fresh": False})} if quick else {}
    given = {**both, **(of_search | counts if search else of_sweep)}
    options |= {name: value for name, value in given.items() if value is not None}
    told: dict[str, Any] = {"goal": goal, "seed": seed}
    if search:
        told |= {"search": Search(**options), "clients": clients or 1}
    else:
        if several := next((name for name, found in counts.items() if len(found) != 1), ""):
            raise SpecError(f"--{several} takes one number; several are for --search")
        one = {name: counts[name][0] if name in counts else 0 for name in held}
        told |= options | {"options": ServerOptions(instances=one["instances"], threads=one["threads"])}
    with make_display(sys.stdout, sys.stderr, json=json, say_every_s=SAY_EVERY_S) as display:
        outcome = verbs.bench_serve(model, images, home=home, display=display, **told)
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
