"""`tenure image`: what a program needs, why, and whether it is still whole. Building and running images: their own modules."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenure.cli import output
from tenure.errors import NotFound, SpecError

if TYPE_CHECKING:  # what is needed to analyse costs time, which `tenure --help` need not pay
    from tenure.images.closure import Analysis, Program
    from tenure.images.closure_check import Damage
    from tenure.images.closure_report import Share
    from tenure.images.compatibility import FormReport
    from tenure.images.explain import Explained

image = typer.Typer(
    name="image",
    help="Closures and images: what a program really needs, made into a root, a container or a microVM.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]
ProgramArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="-- COMMAND... | serve MODEL", help="The program, after --; or a model, served by Tenure's own server."
    ),
]
Exercises = Annotated[
    list[str] | None,
    typer.Option(
        "--exercise",
        metavar="COMMAND",
        help="Drives the program while it is watched; a shell runs it, $TENURE_PORT is where the program listens. Repeatable.",
    ),
]
Runs = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="COMMAND", help="A further run of the program, e.g. with other options. Repeatable."),
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="Environment of the program, and of its image. Repeatable."),
]
Add = Annotated[
    list[str] | None,
    typer.Option("--add", metavar="PATH", help="A file, or a folder with all in it, that belongs to the program. Repeatable."),
]
Workdir = Annotated[
    Path | None, typer.Option("--workdir", metavar="DIR", help="Where the program starts [default: here; for a model: /].")
]
Timeout = Annotated[
    str, typer.Option("--timeout", metavar="TIME", help="Of one run under watch, which is slower than without.")
]
ImageArgument = Annotated[
    str, typer.Argument(metavar="IMAGE", help="An image's name, NAME:ID, its folder, or a closure's lock file.")
]
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", help="Where Tenure keeps its state [default: $TENURE_HOME, else the user's data folder]."
    ),
]


@image.command("analyse")
def analyse(
    program: ProgramArgument,
    exercise: Exercises = None,
    also: Runs = None,
    env: Env = None,
    add: Add = None,
    workdir: Workdir = None,
    timeout: Timeout = "15min",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write closure.lock.json and analysis.json into this folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a program under watch and say what it needs: files, libraries, modules, system calls; and what each form can't run.

    A program that serves is driven by --exercise and then stopped; one that ends by itself needs none.
    """
    from tenure.images.closure import analyse as analyse_program
    from tenure.images.compatibility import reports
    from tenure.images.trace import Bounds
    from tenure.resources import parse_duration

    wanted = the_program(program, exercise or [], also or [], env or [], add or [], workdir)
    bounds = Bounds(total_s=parse_duration(timeout))
    found = analyse_program(wanted, bounds=bounds, say=(lambda _: None) if json else _told)
    forms = reports(found.closure.system_calls)
    facts = _facts(found, forms)
    if out is not None:
        _write(out, found, facts)
    _say(output.as_json(facts) if json else _text(found, forms, out))


def the_program(
    command: list[str], exercises: list[str], also: list[str], env: list[str], add: list[str], workdir: Path | None
) -> Program:
    """Return what a command line means: our own server with a model, or any program with what drives it. Raises SpecError."""
    from dataclasses import replace

    from tenure.cli.imaging_serve import serving_program
    from tenure.images.closure import Program
    from tenure.images.trace import Drive, Life

    given = dict(_variable(text) for text in env)
    if command[:1] == ["serve"]:
        if len(command) != 2 or exercises or also:
            raise SpecError("serve takes one model, and drives it by itself: leave out what is more, --exercise and --also")
        served = serving_program(Path(command[1]))
        more = tuple(os.path.abspath(path) for path in add)
        return replace(
            served, env=given, add=(*served.add, *more), workdir=str(workdir.absolute()) if workdir else served.workdir
        )
    argv = tuple(command)
    drives = tuple(Drive(command=text, description=text) for text in exercises)
    lives = [Life(argv=argv, drives=drives), *(Life(argv=tuple(words_of(text))) for text in also)]
    folder = str(workdir.absolute() if workdir else Path.cwd())
    return Program(argv=argv, workdir=folder, env=given, add=tuple(add), lives=tuple(lives))


def words_of(text: str) -> list[str]:
    """Return the words of a command line. Raises SpecError."""
    import shlex

    try:
        found = shlex.split(text)
    except ValueError as error:
        raise SpecError(f"--also {text!r} is no command line: {error}") from error
    if not found:
        raise SpecError("--also needs a command; found nothing")
    return found


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SpecError(f"--env takes NAME=VALUE; found {text!r}")
    return name, value


@image.command("explain")
def explain(
    image: ImageArgument,
    path: Annotated[str, typer.Argument(metavar="PATH", help="A path inside, or its last parts, e.g. numpy/__init__.py.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """Say why a file is in an image: who opened, needs or imports it, and why that is there."""
    from tenure.images.explain import explain as explained
    from tenure.images.lock import read_lock

    found = explained(read_lock(lock_of(image, home)), path)
    _say(output.as_json(found) if json else "\n\n".join(_explained(each) for each in found))


@image.command("verify")
def verify(image: ImageArgument, home: Home = None, json: Json = False) -> None:
    """Check an image against its hashes, and name what is damaged; of a lock file, what has changed on this machine since.

    Ends with 8 when something is.
    """
    from tenure.cli import exits

    found = _damage(image, home)
    if json:
        _say(output.as_json({"whole": not found, "damage": found}))
    elif found:
        _say(output.table(("WHAT", "PATH", "HOW"), [(each.what, _short(each.path), each.how) for each in found], empty=""))
    else:
        _say("whole")
    if found:
        raise typer.Exit(exits.CORRUPT_DATA)


def _damage(image: str, home: Path | None) -> list[Damage]:
    from tenure import app
    from tenure.images.closure_check import Damage, differences, verify_image
    from tenure.images.lock import read_lock
    from tenure.images.store import ImageStore

    if Path(image).is_file():
        return [Damage(what="this machine", path=path, how=how) for path, how in differences(read_lock(Path(image)).files)]
    stored = ImageStore(app.find_home(home)).find(image)
    return verify_image(stored.folder, stored.manifest)


def lock_of(image: str, home: Path | None) -> Path:
    """Return where the lock file of an image, of an image's folder, or that very file is. Raises NotFound."""
    from tenure import app
    from tenure.forms import LOCK_FILE, MANIFEST_FILE
    from tenure.images.store import ImageStore

    path = Path(image)
    if path.is_file() and path.name != MANIFEST_FILE:
        return path
    try:
        return ImageStore(app.find_home(home)).find(image).folder / LOCK_FILE
    except NotFound:
        if (path / LOCK_FILE).is_file():  # what `analyse --out` wrote
            return path / LOCK_FILE
        raise


def _explained(found: Explained) -> str:
    from tenure.resources import show_bytes

    file = found.file
    what = f"leads to {file.target}" if file.target else show_bytes(file.size_bytes) if file.sha256 else "a folder"
    return "\n".join(
        [f"{output.clean(file.path)} ({output.clean(what)})", *(f"  {output.clean_lines(line)}" for line in found.lines)]
    )


def _told(text: str) -> None:
    output.say(f"image: {output.clean(text)}", sys.stderr)


def _say(text: str) -> None:
    output.say(text, sys.stdout)


def _facts(found: Analysis, forms: tuple[FormReport, ...]) -> dict[str, Any]:
    """Return an analysis as plain data, the files themselves apart."""
    from tenure.images.closure_report import report

    closure = found.closure
    return {
        "hash": closure.hash,
        "program": closure.program,
        "workdir": closure.workdir,
        "env": closure.env,
        "python": closure.python,
        "machine": closure.machine,
        "exercises": closure.exercises,
        "report": report(closure),
        "system_calls": closure.system_calls,
        "findings": found.findings,
        "forms": forms,
        "left_out": found.left_out,
        "took_s": found.took_s,
    }


def _write(out: Path, found: Analysis, facts: dict[str, Any]) -> None:
    from tenure.forms import LOCK_FILE
    from tenure.images.lock import write_lock

    out.mkdir(parents=True, exist_ok=True)
    write_lock(found.closure, out / LOCK_FILE)
    part = out / ".analysis.json"
    try:
        part.write_text(output.as_json(facts) + "\n")
        os.replace(part, out / "analysis.json")
    finally:
        part.unlink(missing_ok=True)


def _text(found: Analysis, forms: tuple[FormReport, ...], out: Path | None) -> str:
    """Return an analysis as people read it."""
    from tenure.images.closure_report import report
    from tenure.resources import show_bytes

    closure, numbers = found.closure, report(found.closure)
    lines = [
        f"program   {output.clean(' '.join(closure.program))}",
        f"closure   {closure.hash[:12]}: {numbers.files} files, {show_bytes(numbers.size_bytes)}; "
        f"{numbers.links} links, {numbers.folders} folders",
        f"seen      {numbers.opened} files opened, {numbers.looked_at} looked at and not opened, "
        f"{numbers.files - numbers.opened - numbers.looked_at} by analysis",
        "",
        _shares_table("KIND", numbers.kinds),
        "",
        _shares_table("PART", numbers.parts[:12]),
        "",
        output.table(
            ("LARGEST", "SIZE"), [(_short(file.path), show_bytes(file.size_bytes)) for file in numbers.largest], empty=""
        ),
        "",
        f"calls     {len(numbers.system_calls)} system calls: {', '.join(numbers.system_calls)}",
        "",
        *(line for form in forms for line in _form_lines(form)),
    ]
    for finding in found.findings:
        lines += ["", f"{finding.matter}: {output.clean(finding.found)}", f"  -> {output.clean(finding.means)}"]
    lines += ["", _left_out(found.left_out), f"took      {found.took_s:.1f} s"]
    lines += [f"written   {out}/closure.lock.json"] if out else []
    return "\n".join(lines)


def _shares_table(head: str, shares: tuple[Share, ...]) -> str:
    from tenure.resources import show_bytes

    rows = [(share.name, str(share.files), show_bytes(share.size_bytes)) for share in shares]
    return output.table((head, "FILES", "SIZE"), rows, empty="")


def _form_lines(form: FormReport) -> list[str]:
    source = f" ({output.clean(form.source)})" if form.source else ""
    return [f"{form.form:<9} {form.verdict}{source}", *(f"  -> {output.clean(str(reason))}" for reason in form.reasons)]


def _short(path: str) -> str:
    return path if len(path) <= output.MAX_CELL else "…" + path[-(output.MAX_CELL - 1) :]


def _left_out(paths: Any) -> str:
    from collections import Counter

    counts = Counter(paths.values())
    return "left out  " + ("; ".join(f"{count} ({why})" for why, count in counts.most_common()) or "nothing")
