"""`tenure serve`: a model in the foreground, or a job file's serving stage. Not here: what serving means (`tenure.verbs`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenure.cli import exits, output
from tenure.cli.display import make_display
from tenure.cli.image_verbs import Goal, Isolated, form_goal
from tenure.errors import SpecError

if TYPE_CHECKING:  # the nouns cost 60 ms, which `tenure --help` need not pay
    from tenure.decide.forms import FormGoal
    from tenure.experiments.foreground import Listening

MODEL_ENDINGS = frozenset({".onnx", ".skops", ".pt2", ".tflite"})
"""Files that make a folder one of models, though a .toml lies beside them (a model's own options)."""

SAY_EVERY_S = 600.0
"""A log of a server that runs for weeks shall not grow much by it."""

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL | FILE",
        help="A model file, a folder of models, a repository with folders NAME/VERSION; or a job file (.toml).",
    ),
]


def serve(
    model: ModelArgument,
    http_port: Annotated[
        int | None,
        typer.Option("--http-port", metavar="N", help="Port of HTTP; 0: any free one [default: 8000].", min=0, max=65535),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option("--grpc-port", metavar="N", help="Port of gRPC; 0: any free one [default: 8001].", min=0, max=65535),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="ADDRESS", help="Who can reach it; 0.0.0.0 is everybody [default: 127.0.0.1]."),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option("--cpus", metavar="N", help="Cores of the lease [default: all that no lease holds].")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Memory of the lease, e.g. 4GiB [default: half of what no lease holds]."),
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="End after this long, e.g. 8h [default: Ctrl-C ends it].")
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="For requests held at once; past it they are refused with when to try again [default: 256MiB, or a quarter "
            "of the lease's memory if that is less].",
        ),
    ] = None,
    instances: Annotated[
        int | None,
        typer.Option(
            "--instances",
            metavar="N",
            min=1,
            help="Loaded copies of each model, each a process [default: from cores and model].",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, help="Of each model, shared by its instances [default: the lease's cores]."
        ),
    ] = None,
    max_batch_rows: Annotated[
        int | None,
        typer.Option("--max-batch-rows", metavar="N", min=1, help="Rows of one run of a model, over all requests in it."),
    ] = None,
    max_delay: Annotated[
        str | None,
        typer.Option(
            "--max-delay", metavar="TIME", help="How long a request may wait for others to share its run [default: 0]."
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home", metavar="DIR", help="Where Tenure keeps its state [default: $TENURE_HOME, else the user's data folder]."
        ),
    ] = None,
    with_server: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="SERVER",
            help="triton: serve nothing here, but write a repository for Triton Inference Server into --out, with the command; "
            "triton-python: by its python backend, also for ONNX models.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for --with; made when missing.")] = None,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            metavar="FORM",
            help="Serve it from an image of just what it needs: root, oci (a container) or microvm; auto: the cheapest of them "
            "that meets --goal and --isolation. The image is built first unless it is there, and kept: `tenure image list`.",
        ),
    ] = "",
    goal: Goal = "",
    isolation: Isolated = "",
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON once it listens, and one at the end, instead of text.")
    ] = False,
) -> None:
    """Serve a model under a lease, by HTTP and gRPC, until Ctrl-C: it then answers what it accepted, and the lease ends.

    Of a job file: run its serving stage, and what it needs; the other options are for a model, a job file says its own.
    """
    from tenure import verbs

    given = {
        "--http-port": http_port,
        "--grpc-port": grpc_port,
        "--host": host,
        "--cpus": cpus,
        "--memory": memory,
        "--time": time,
        "--memory-budget": memory_budget,
        "--instances": instances,
        "--threads": threads,
        "--max-batch-rows": max_batch_rows,
        "--max-delay": max_delay,
    }
    if form:
        if with_server is not None or out is not None or is_job_file(model):
            raise SpecError("--form is for a model that is served here; leave out --with and --out, and name no job file")
        wanted = form_goal(form, goal, isolation)
        _serve_form(model, form, wanted, _options(given), home=home, json=json)
        return
    form_goal(form, goal, isolation)
    if with_server is not None or out is not None:
        _write_for(with_server, model, out, given, json=json)
        return
    with make_display(sys.stdout, sys.stderr, json=json, say_every_s=SAY_EVERY_S) as display:
        if is_job_file(model):
            if named := [option for option, value in given.items() if value is not None]:
                raise SpecError(f"{named[0]} is for a model; the job file {model} says how its own is served ([serve.server])")
            outcome = verbs.run(model, home=home, only="serve", display=display)
        else:

            def listening(found: Listening) -> None:
                if json:
                    output.say(output.as_json({"listening": found}), sys.stdout)

            outcome = verbs.serve(model, home=home, display=display, listening=listening, **_options(given))
    code = (exits.exit_code(outcome.error) if outcome.error else exits.JOB_FAILED) if outcome.failed else exits.OK
    output.tell_outcome(outcome, code, sys.stdout, sys.stderr, json=json)
    raise typer.Exit(code)


def _serve_form(
    model: Path, form: str, goal: FormGoal | None, options: dict[str, Any], *, home: Path | None, json: bool
) -> None:
    """Have an image of the model, and run it in the form, or in the one that meets the goal."""
    from tenure import app
    from tenure.cli import image_builds, image_verbs
    from tenure.experiments.foreground_image import ImageRun
    from tenure.images.store import ImageStore

    chosen = None if goal is not None else image_builds.parse_forms(form)[0]
    with make_display(sys.stdout, sys.stderr, json=json) as display:
        told = image_verbs.Telling(display)
        store = ImageStore(app.find_home(home))
        if chosen is not None:
            image = image_builds.ready_serving(model, store, form=chosen, told=told)
        else:
            image = image_builds.ready_for_choice(model, store, isolation=goal.isolation if goal else "process", told=told)
        told.done()
    image_verbs.run_image(ImageRun(image=image, form=chosen, goal=goal, **options), home=home, json=json)


_FOR_OTHERS = ("--http-port", "--grpc-port", "--instances", "--threads", "--max-batch-rows", "--max-delay")
"""Options that a repository for another server can hold, or its command."""


def _write_for(server: str | None, model: Path, out: Path | None, given: dict[str, Any], *, json: bool) -> None:
    """Write the models for another server, and say how it is started."""
    from tenure import verbs

    if server not in ("triton", "triton-python") or out is None:
        found = "nothing" if server is None else f"{server!r}"
        raise SpecError(f"--with takes triton or triton-python, and needs --out DIR; found {found}, --out {out or 'missing'}")
    if held := [option for option, value in given.items() if value is not None and option not in _FOR_OTHERS]:
        raise SpecError(f"{held[0]} is for a server of ours; with --with there are {', '.join(_FOR_OTHERS)}")
    if is_job_file(model):
        raise SpecError(f"--with takes a model, or a folder of models; {model} is a job file")
    options = _options(given)
    ports = {name: options[name] for name in ("http_port", "grpc_port") if name in options}
    made = verbs.triton_repository(model, out, python=server == "triton-python", options=options["options"], **ports)
    if json:
        output.say(output.as_json({"triton": made}), sys.stdout)
        return
    for one in made.models:
        rows = (
            f"batches up to {one.max_batch_rows}"
            if one.max_batch_rows
            else "one request at a time, as its shape takes no batch"
        )
        output.say(f"{made.folder / one.name}: backend {one.backend}, {rows}", sys.stdout)
    if made.needs:
        output.say(f"needs: {made.needs}", sys.stdout)
    port = ports.get("grpc_port", 8001)
    output.say(
        f"there, with Triton's image in $TRITON_IMAGE or tritonserver on the PATH: {made.folder / 'run.sh'}\n"
        f"  {made.container}\n  {made.plain}\n"
        f"then: tenure bench serve {model} IMAGES/ --against grpc://HOST:{port}",
        sys.stdout,
    )


def is_job_file(path: Path) -> bool:
    """Whether a path means a job file: a .toml, or a folder that has one and no model."""
    if path.is_dir():
        inside = {entry.suffix for entry in path.iterdir()}
        below = {entry.suffix for deep in ("*/*", "*/*/*") for entry in path.glob(deep)}
        return ".toml" in inside and not (inside | below) & MODEL_ENDINGS
    return path.suffix == ".toml"


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the command line's options as fields of the spec, those left out left out."""
    from tenure.jobs import ServerOptions
    from tenure.resources import parse_bytes, parse_duration

    def of(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value if parse is None else parse(value)
            for name, (option, parse) in fields.items()
            if (value := given[option]) is not None
        }

    server = of(
        {
            "host": ("--host", None),
            "memory_budget_bytes": ("--memory-budget", parse_bytes),
            "instances": ("--instances", None),
            "threads": ("--threads", None),
            "max_batch_rows": ("--max-batch-rows", None),
            "max_delay_s": ("--max-delay", parse_duration),
        }
    )
    lease = of(
        {
            "http_port": ("--http-port", None),
            "grpc_port": ("--grpc-port", None),
            "cpus": ("--cpus", None),
            "memory_bytes": ("--memory", parse_bytes),
            "time_s": ("--time", parse_duration),
        }
    )
    return {**lease, "options": ServerOptions(**server)}
