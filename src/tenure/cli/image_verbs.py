"""`tenure image build run list rm`: images made, run and cleared away. Not here: what a program needs (`imaging`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tenure.cli import exits, output
from tenure.cli.display import make_display
from tenure.cli.imaging import Add, Env, Exercises, Home, Json, Runs, Workdir, the_program
from tenure.cli.imaging import image as image
from tenure.errors import NotFound, SpecError

if TYPE_CHECKING:  # the nouns cost time, which `tenure --help` need not pay
    from tenure.cli.display import SilentDisplay
    from tenure.cli.image_builds import Finished
    from tenure.decide.forms import FormGoal
    from tenure.experiments.foreground import Listening
    from tenure.images.store import StoredImage

SAY_EVERY_S = 600.0
AUTO = "auto"
Goal = Annotated[
    str,
    typer.Option(
        "--goal",
        metavar="BOUND,...",
        help="With --form auto: what the form must meet, e.g. 'cold_start<2s' or 'memory<256MiB', with commas between them.",
    ),
]
Isolated = Annotated[
    str,
    typer.Option(
        "--isolation",
        metavar="LEVEL",
        help="With --form auto: how far apart at least: process, container, or microvm (a kernel of its own) "
        "[default: process].",
    ),
]
Kernel = Annotated[
    Path | None,
    typer.Option(
        "--kernel",
        metavar="DIR",
        help="Of the form microvm: a folder into which a kernel package was unpacked, or a kernel file with its modules beside "
        "it or in /lib/modules [default: the newest in $TENURE_HOME/kernels, else this machine's own for clouds].",
    ),
]
ImageArgument = Annotated[
    str, typer.Argument(metavar="IMAGE", help="A name (its newest image), NAME:ID, an id's first digits, or an image's folder.")
]


@image.command(name="build")
def build(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME -- COMMAND... | serve MODEL",
            help="What to call the image, and its program after --; or a model, served by Tenure's own server.",
        ),
    ],
    form: Annotated[
        str, typer.Option("--form", metavar="FORM,...", help="What to make: root, oci, microvm, with commas between them.")
    ] = "root,oci",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What to call the image of a model [default: as the model].")
    ] = "",
    exercise: Exercises = None,
    also: Runs = None,
    env: Env = None,
    add: Add = None,
    workdir: Workdir = None,
    port: Annotated[
        list[int] | None,
        typer.Option(
            "--port",
            metavar="N",
            min=1,
            max=65535,
            help="TCP port on which it listens [default: looked for]. Repeatable.",
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="WHAT,...",
            help="What not to leave out, though the answers would stay the same: packages, symbols, docs, sources, zip, tls, "
            "blas, folders, or all.",
        ),
    ] = "",
    kernel: Kernel = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Make an image of just what a program needs: watch it, copy that, leave out what its answers do not need, write the forms.

    Each step that leaves something out is kept only if the program then answers the same, byte for byte; the report lists them.
    No Docker takes part. The same program gives the same bytes again.
    """
    from tenure import app
    from tenure.cli import image_builds
    from tenure.images.store import ImageStore

    forms = image_builds.parse_forms(form)
    image_builds.check_kernel(kernel, forms)
    kept = tuple(word.strip() for word in keep.split(",") if word.strip())
    store = ImageStore(app.find_home(home))
    with make_display(sys.stdout, sys.stderr, json=json) as display:
        told = Telling(display)
        if words[0] == "serve":
            _only_a_model(words, exercise=exercise, also=also, workdir=workdir, port=port)
            program = the_program(words, [], [], env or [], add or [], None)
            finished = image_builds.build_serving(
                Path(words[1]), store, forms=forms, name=name, keep=kept, kernel=kernel, program=program, told=told
            )
        else:
            if name or len(words) < 2:
                raise SpecError(
                    "an image needs its name first and then, after --, its program: tenure image build NAME -- COMMAND...; "
                    "--name is for serve MODEL"
                )
            program = the_program(words[1:], exercise or [], also or [], env or [], add or [], workdir)
            finished = image_builds.build_program(
                program,
                store,
                name=words[0],
                forms=forms,
                exercises=exercise or (),
                ports=port or (),
                keep=kept,
                kernel=kernel,
                told=told,
            )
        told.done()
    output.say(output.as_json(_facts(finished)) if json else _report(finished), sys.stdout)


@image.command(name="run")
def run(
    name: ImageArgument,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            metavar="FORM",
            help="root, oci or microvm; auto: the cheapest that meets --goal and --isolation in the lease's memory, by what "
            "was measured [default: the first of these that it has].",
        ),
    ] = "",
    goal: Goal = "",
    isolation: Isolated = "",
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Of the lease, e.g. 256MiB [default: half of what no lease holds]."),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option("--cpus", metavar="N", help="Cores of the lease [default: all that no lease holds].")
    ] = None,
    time_: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="End after this long, e.g. 8h [default: Ctrl-C ends it].")
    ] = None,
    http_port: Annotated[
        int, typer.Option("--http-port", metavar="N", help="Port of HTTP of a served model; 0: any free one.", min=0, max=65535)
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option("--grpc-port", metavar="N", help="Port of gRPC of a served model; 0: any free one.", min=0, max=65535)
    ] = 8001,
    home: Home = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON once it listens, and one at the end, instead of text.")
    ] = False,
) -> None:
    """Run an image under a lease until Ctrl-C, or to its program's end; a served model has the same door in every form.

    root runs as a process with the image for its root directory, oci in a container, microvm in a virtual machine.
    """
    from tenure import app
    from tenure.experiments.foreground_image import ImageRun
    from tenure.forms import Form
    from tenure.images.store import ImageStore
    from tenure.resources import parse_bytes, parse_duration

    found = ImageStore(app.find_home(home)).find(name)
    if form and form not in (*Form, AUTO):
        raise SpecError(f"forms are {', '.join(Form)}, {AUTO}; found {form!r}")
    asked = ImageRun(
        image=found,
        form=Form(form) if form and form != AUTO else None,
        goal=form_goal(form, goal, isolation),
        cpus=cpus or 0.0,
        memory_bytes=parse_bytes(memory) if memory else 0,
        time_s=parse_duration(time_) if time_ else 0.0,
        http_port=http_port,
        grpc_port=grpc_port,
    )
    run_image(asked, home=home, json=json)


def form_goal(form: str, goal: str, isolation: str) -> FormGoal | None:
    """Return what a form that is to be chosen must meet; None for one that was named. Raises SpecError."""
    from dataclasses import replace

    from tenure.decide.forms import Isolation, parse_form_goal

    if form != AUTO:
        if goal or isolation:
            raise SpecError(f"{'--goal' if goal else '--isolation'} is for --form auto; found --form {form or 'left out'}")
        return None
    levels: tuple[Isolation, ...] = get_args(Isolation)
    level = next((level for level in levels if level == (isolation or levels[0])), None)
    if level is None:
        raise SpecError(f"--isolation takes {', '.join(levels)}; found {isolation!r}")
    return replace(parse_form_goal(goal), isolation=level)


def run_image(asked: Any, *, home: Path | None, json: bool) -> None:
    """Run an `ImageRun` in the foreground, say where it listens and how it ended, and leave with its exit code."""
    from tenure import verbs

    def listening(found: Listening) -> None:
        if json:
            output.say(output.as_json({"listening": found}), sys.stdout)

    with make_display(sys.stdout, sys.stderr, json=json, say_every_s=SAY_EVERY_S) as display:
        outcome = verbs.run_image(asked, home=home, display=display, listening=listening)
    code = (exits.exit_code(outcome.error) if outcome.error else exits.JOB_FAILED) if outcome.failed else exits.OK
    output.tell_outcome(outcome, code, sys.stdout, sys.stderr, json=json)
    raise typer.Exit(code)


@image.command(name="list")
def list_(home: Home = None, json: Json = False) -> None:
    """List images, newest first, with their forms and sizes, and what was measured of each: memory floor, cold start."""
    from tenure import app
    from tenure.images.store import ImageStore

    found = ImageStore(app.find_home(home)).images()
    if json:
        output.say(output.as_json([_listed(each) for each in found]), sys.stdout)
    else:
        heads = ("image", "id", "forms", "engine", "built", "floor", "cold start")
        empty = 'no images; "tenure image build serve MODEL" makes one'
        output.say(output.table(heads, [_row(each) for each in found], empty=empty), sys.stdout)


@image.command(name="rm")
def rm(
    names: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Names, NAME:ID, ids, or folders of images.")],
    every: Annotated[bool, typer.Option("--all", help="All images of a name, not only its newest.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Remove images with all their forms. What runs of one goes on; an engine that has loaded one keeps its own copy."""
    from tenure import app
    from tenure.images.store import ImageStore

    store = ImageStore(app.find_home(home))
    chosen: dict[Path, StoredImage] = {}
    for name in names:
        one = store.find(name)
        if not one.folder.is_relative_to(store.folder):
            raise NotFound(f"{one.folder} is not in {store.folder}: remove that folder yourself")
        for each in store.images(one.manifest.name) if every else (one,):
            chosen[each.folder] = each
    for each in chosen.values():
        store.remove(each)
    if json:
        output.say(output.as_json({"removed": [_listed(each) for each in chosen.values()]}), sys.stdout)
    else:
        for each in chosen.values():
            output.say(f"removed {each.manifest.name}:{each.manifest.short_id}", sys.stdout)


# --- helpers ---


class Telling:
    """Shows what a build is doing, a step with its time after the other."""

    def __init__(self, display: SilentDisplay) -> None:
        self._display, self._text, self._begun_s = display, "", 0.0

    def __call__(self, text: str) -> None:
        """Show the next step."""
        self.done()
        self._text, self._begun_s = text, time.monotonic()
        self._display.stage_started("image", "build", output.clean(text))

    def done(self) -> None:
        """Close the step that is shown."""
        if self._text:
            self._display.step_done("image", "build", f"{output.clean(self._text)}: {time.monotonic() - self._begun_s:.1f} s")
            self._text = ""


def _only_a_model(words: Sequence[str], **given: Any) -> None:
    if len(words) != 2:
        raise SpecError(f"serve takes one model; found {' '.join(words[1:]) or 'nothing'}")
    if wrong := [f"--{key}" for key, value in given.items() if value]:
        raise SpecError(f"{wrong[0]} is for a program of your own: a served model is driven by Tenure, and starts in /")


def _facts(finished: Finished) -> dict[str, Any]:
    built = finished.built
    return {
        "image": _listed(built.image),
        "closure_bytes": built.closure_bytes,
        "tree_bytes": built.tree_bytes,
        "steps": built.steps,
        "unchecked": built.unchecked,
        "unfiltered": built.unfiltered,
        "not_made": built.left_out,
        "findings": finished.analysis.findings,
    }


def _report(finished: Finished) -> str:
    built, manifest = finished.built, finished.built.image.manifest
    lines = [f"image    {manifest.name}:{manifest.short_id} in {built.image.folder}"]
    lines += [f"{form:<8} {_mb(record.size_bytes)} {record.path}" for form, record in manifest.forms.items()]
    lines += [f"{form:<8} not made: {why}" for form, why in built.left_out.items()]
    lines.append(f"closure  {_mb(built.closure_bytes)}, {_mb(built.tree_bytes)} of it in the image")
    if built.unfiltered:
        lines.append(f"seccomp  no profile: behind what was watched the program does not run ({built.unfiltered})")
    if built.unchecked:
        lines.append(f"         nothing was left out: {built.unchecked}")
    for step in built.steps:
        what = f"- {_mb(step.saved_bytes)}" if step.kept else ("kept: " if step.saved_bytes else "nothing: ") + step.why
        lines.append(f"         {step.step}: {what}")
    lines += [f"note     {finding.found}: {finding.means}" for finding in finished.analysis.findings]
    lines.append(f"run it   tenure image run {manifest.name}")
    return "\n".join(output.clean_lines(line) for line in lines)


def _listed(each: StoredImage) -> dict[str, Any]:
    return {"folder": each.folder, "built_at_s": each.built_at_s, "manifest": each.manifest}


def _row(each: StoredImage) -> tuple[str, ...]:
    from tenure.resources import format_bytes

    records = each.manifest.forms.values()
    floors = [record.memory_floor_bytes for record in records if record.memory_floor_bytes]
    starts = [record.cold_start_s for record in records if record.cold_start_s]
    return (
        each.manifest.name,
        each.manifest.short_id,
        ", ".join(f"{form} {_mb(record.size_bytes)}" for form, record in each.manifest.forms.items()),
        each.manifest.engine or "-",
        output.when(each.built_at_s),
        format_bytes(min(floors)) if floors else "-",
        f"{min(starts):.2f} s" if starts else "-",
    )


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
