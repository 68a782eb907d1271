"""`tenure image repair`: what an image lacks is named, put in, and it is built anew. Not here: how it is found (`images`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tenure.cli import output
from tenure.cli.image_verbs import Kernel
from tenure.cli.image_verbs import image as image
from tenure.cli.imaging import Exercises, Home, Json, Timeout, words_of
from tenure.errors import JobFailed, NotFound

if TYPE_CHECKING:  # what is needed to analyse costs time, which `tenure --help` need not pay
    from tenure.closures import Closure
    from tenure.images.closure import Program
    from tenure.images.repair import Missing, Repaired
    from tenure.images.store import StoredImage


@image.command("repair")
def repair(
    name: Annotated[str, typer.Argument(metavar="IMAGE", help="An image's name, NAME:ID, or its folder.")],
    exercise: Exercises = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="COMMAND",
            help="A further run; of a served model only its options, e.g. '--instances 2'. Repeatable.",
        ),
    ] = None,
    log: Annotated[
        str, typer.Option("--log", metavar="FILE", help="What the image said when it failed; - reads it from standard input.")
    ] = "",
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="PATH", help="A file or folder that is to be in it. Repeatable.")
    ] = None,
    kernel: Kernel = None,
    timeout: Timeout = "15min",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only name what is missing.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Name the files that an image lacks, put them in, and build it anew in all its forms.

    The program is watched here under the exercises that failed there: what it uses here and the image has not was missing. What
    --log names, --add says, or is gone from the image since it was built needs no watching. What its build was
    told to --keep is kept. The image as it was stays until it is removed.
    """
    from tenure import app
    from tenure.cli import image_builds
    from tenure.images.lock import read_lock
    from tenure.images.store import ImageStore

    store = ImageStore(app.find_home(home))
    stored = store.find(name)
    image_builds.check_kernel(kernel, tuple(stored.manifest.forms))
    closure = read_lock(stored.folder / "closure.lock.json")
    told = _silent if json else _told
    found = _named(closure, log, add or [])
    gone = _gone(stored)
    unexplained = bool(log) and not found.missing  # what is gone may not be what the log is about
    if exercise or also or unexplained or not (found.missing or gone):
        found = _with_watched(found, stored, exercise or [], also or [], timeout, told)
    missing, built = (*gone, *found.missing), None
    if missing and not dry_run:
        made = image_builds.build_again(stored, found.closure, store, kernel=kernel, told=told)
        built = made.image
        for form, why in made.left_out.items():
            _told(f"form {form} was not made anew: {why}")
    if json:
        _say(output.as_json({"missing": missing, "image": built.manifest.id if built else None}))
        return
    _say(_missing_text(missing))
    if built is not None:
        _say(f"built     {built.manifest.name}:{built.manifest.short_id} ({', '.join(built.manifest.forms)})")


def _gone(stored: StoredImage) -> tuple[Missing, ...]:
    """Return the files that an image had when it was built and has no more, or no more whole."""
    from tenure.images.closure_check import verify_image
    from tenure.images.repair import Missing

    damage = verify_image(stored.folder, stored.manifest)
    return tuple(
        Missing(path=each.path, how=f"the image had it when it was built: {each.how}")
        for each in damage
        if each.what != "lock file" and each.how != "was not there"
    )


def _named(closure: Closure, log: str, add: list[str]) -> Repaired:
    """Return the closure with what a log and the user name. Raises NotFound."""
    import os

    from tenure.images import closure_python
    from tenure.images.repair import Missing, here, named_in, sources_of, with_paths

    missing: list[Missing] = []
    if log:
        try:
            text = sys.stdin.read() if log == "-" else Path(log).read_text(errors="replace")
        except OSError as failed:
            raise NotFound(f"{log} can't be read: {failed.strerror}") from failed
        program = here(closure.program, sources_of(closure))
        interpreter, _ = closure_python.interpreter_of(program[:1], program, closure.env, closure.workdir)
        missing += named_in(text, closure, interpreter)
    for path in add:
        if not os.path.lexists(path):
            raise NotFound(f"there is nothing at {path} to add")
        below = [os.path.join(top, file) for top, _, files in os.walk(path) for file in files] or [path]
        missing += [Missing(path=os.path.abspath(each), how="added by name") for each in below]
    return with_paths(closure, missing)


def _with_watched(
    found: Repaired, stored: StoredImage, exercises: list[str], also: list[str], timeout: str, told: Callable[[str], None]
) -> Repaired:
    """Return what was found, and what watching the program here finds besides. Raises JobFailed when no exercise succeeds."""
    from dataclasses import replace

    from tenure.images.closure import analyse
    from tenure.images.repair import with_seen
    from tenure.images.trace import Bounds
    from tenure.resources import parse_duration

    program = _program(found.closure, stored, exercises, also)
    seen = analyse(program, bounds=Bounds(total_s=parse_duration(timeout)), say=told)
    for finding in seen.findings:
        if finding.matter == "exercise":
            told(f"{finding.found}: {finding.means}")
    if all(each.exit_code for each in seen.closure.exercises):
        raise JobFailed("no exercise succeeded here either, where nothing is missing: the image is not what is broken")
    more = with_seen(found.closure, seen.closure)
    return replace(more, missing=(*found.missing, *more.missing))


def _program(closure: Closure, stored: StoredImage, exercises: list[str], also: list[str]) -> Program:
    """Return an image's program as it is on this machine, with what drives it."""
    from dataclasses import replace

    from tenure.cli.imaging_serve import serving_program
    from tenure.images.closure import Program
    from tenure.images.repair import here, sources_of
    from tenure.images.trace import Drive, Life

    argv = here(closure.program, sources_of(closure))
    drives = tuple(Drive(command=text, description=text) for text in exercises)
    if stored.manifest.door == "v2" and "--model" in argv:
        model = Path(argv[argv.index("--model") + 1])
        served = serving_program(model, python=argv[0], further=[words_of(text) for text in also])
        driven = tuple(replace(life, drives=(*life.drives, *drives)) for life in served.lives)
        return replace(served, env=closure.env, workdir=closure.workdir, lives=driven)
    old = tuple(
        Drive(command=each.argv[2], description=each.description)
        for each in closure.exercises
        if each.argv[:2] == ("sh", "-c") and each.argv[2] not in exercises
    )
    lives = [Life(argv=argv, drives=(*old, *drives)), *(Life(argv=tuple(words_of(text))) for text in also)]
    return Program(argv=argv, workdir=closure.workdir, env=closure.env, lives=tuple(lives))


def _missing_text(missing: tuple[Missing, ...]) -> str:
    if not missing:
        return (
            "nothing is missing: all that the program used here is in the image. If it fails there, say how: "
            "--exercise, --also, --log"
        )
    return "\n".join(f"missing   {output.clean(each.path)} ({output.clean(each.how)})" for each in missing)


def _told(text: str) -> None:
    output.say(f"image: {output.clean(text)}", sys.stderr)


def _silent(text: str) -> None:
    """Say nothing: with --json one line is all."""


def _say(text: Any) -> None:
    output.say(text, sys.stdout)
