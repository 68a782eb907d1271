"""Building an image: a closure becomes a tree, the tree is made smaller, and each form is made of it.

    closure ─► tree, byte code added ─► same answers as the bare program? ─► shrink ─► forms ─► store

Everything is built in a folder of the store's own and then renamed into place: an image is there whole, or not at all.
Not for: finding the closure (`closure`), running an image.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from tenure.closures import Closure, files_hash
from tenure.errors import JobFailed, SpecError, TenureError, Unsupported
from tenure.forms import LOCK_FILE, ROOT_LOCK_FILE, SECCOMP_FILE, Form, FormRecord, ImageManifest
from tenure.images.answers import Answers, Asked, Enter, ask, checker
from tenure.images.lock import write_lock
from tenure.images.oci import OciSpec, write_oci
from tenure.images.seccomp import allowed, profile_json
from tenure.images.shrink import Check, Shrunk, Step, shrink
from tenure.images.shrink_blas import UnusedBlas
from tenure.images.shrink_elf import Symbols
from tenure.images.shrink_folders import Folders
from tenure.images.shrink_packages import Package, large_packages
from tenure.images.shrink_python import DocStrings, Sources, add_bytecode, packages
from tenure.images.shrink_tls import Tls
from tenure.images.shrink_zip import ZippedLibrary
from tenure.images.store import ImageStore, StoredImage
from tenure.images.tree import make_tree, remove_tree, scan, tree_bytes

STEPS = ("packages", "symbols", "docs", "sources", "zip", "blas", "tls", "folders")
"""Kinds of steps, as `keep` names them."""
_STARTS = 3
_MAX_PACKAGES = 6
"""Packages whose sources are tried one by one, when some need theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a form is made of."""

    tree: Path
    folder: Path
    """Of the image: the form's files go there."""
    manifest: ImageManifest
    """Its forms are those made so far."""
    machine: str


class Maker(Protocol):
    """Makes one form of a tree. Raises Unsupported with what is missing for it here."""

    def __call__(self, made: Made) -> FormRecord:
        """Return what was made; the tree stays as it is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSpec:
    """What to build of which closure."""

    name: str
    closure: Closure
    forms: tuple[Form, ...]
    sources: Mapping[str, Path] = field(default_factory=dict)
    """Where a path's content lies here, for those that lie elsewhere in the image (`relocate`)."""
    ports: tuple[int, ...] = ()
    door: str = ""
    engine: str = ""
    bare: Asked | None = None
    """How the program is driven here; None: nothing is compared, and nothing is left out."""
    inside: Asked | None = None
    """How it is driven in a tree."""
    own_packages: tuple[str, ...] = ()
    """Packages that it is made for, such as its engine's: no need to try without."""
    keep: tuple[str, ...] = ()
    """Kinds of steps that are not tried: of `STEPS`, or ``all``."""

    def __post_init__(self) -> None:
        if not self.forms:
            raise SpecError(f"an image needs a form; there are: {', '.join(Form)}")
        if unknown := set(self.keep) - {*STEPS, "all"}:
            raise SpecError(f"{sorted(unknown)[0]!r} is nothing that can be kept; there are: {', '.join(STEPS)}, all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An image, and how it became as small as it is."""

    image: StoredImage
    closure_bytes: int
    """Of the closure's files."""
    tree_bytes: int
    """Of the tree that the forms were made of."""
    steps: tuple[Shrunk, ...]
    unchecked: str = ""
    """Why no answers were compared, and so nothing was left out; empty when they were."""
    unfiltered: str = ""
    """Why it has no profile of system calls although these were watched; empty otherwise."""
    left_out: Mapping[Form, str] = field(default_factory=dict)
    """Forms that were asked for and cannot be made here, with why."""


def build(
    spec: BuildSpec,
    store: ImageStore,
    makers: Mapping[Form, Maker],
    *,
    enter: Enter | None,
    told: Callable[[str], None] = lambda _: None,
) -> Built:
    """Build an image and put it into the store; the same closure gives the same image again.

    enter: how a program is run in a tree here; None: it cannot be, nothing is compared and nothing left out.
    told: hears what is being done.
    Raises JobFailed when the program does not answer from its closure as it does here; Unsupported when no form can be made;
    SpecError, CorruptData of what cannot be in an image; OSError.
    """
    with store.building() as folder:
        tree = folder / "root"
        told(f"copying {len(spec.closure.files)} files")
        make_tree(spec.closure, tree, sources=spec.sources)
        programs = {word for word in spec.closure.program if word.endswith(".py")}
        told("compiling modules")
        add_bytecode(tree, spec.closure.python, leave=programs)
        profile = folder / SECCOMP_FILE if spec.closure.system_calls else None
        if profile is not None:
            profile.write_text(profile_json(spec.closure.system_calls, machine=spec.closure.machine))
        check, unchecked, unfiltered = _check(spec, tree, profile, enter, told)
        if profile is not None and unfiltered:
            profile.unlink()
        steps = _shrink(tree, spec, check, programs, told) if check else ()
        whole = replace(spec.closure, files=scan(tree), exercises=(), system_calls=(), made_at_s=0.0)
        manifest = _manifest(spec, whole, filtered=profile is not None and not unfiltered)
        write_lock(spec.closure, folder / LOCK_FILE)
        write_lock(whole, folder / ROOT_LOCK_FILE)
        size_bytes = tree_bytes(tree)
        manifest, left_out = _make_forms(
            spec, makers, Made(tree=tree, folder=folder, manifest=manifest, machine=whole.machine), told
        )
        if Form.ROOT in manifest.forms:
            if check is not None and enter is not None and spec.inside is not None:
                told("timing its start")
                behind = profile if manifest.seccomp else None
                root = replace(manifest.forms[Form.ROOT], cold_start_s=_start_s(spec.inside, tree, behind, enter))
                manifest = replace(manifest, forms={**manifest.forms, Form.ROOT: root})
        else:
            remove_tree(tree)
        return Built(
            image=store.adopt(folder, manifest),
            closure_bytes=spec.closure.size_bytes,
            tree_bytes=size_bytes,
            steps=steps,
            unchecked=unchecked,
            unfiltered=unfiltered,
            left_out=left_out,
        )


def make_root_form(made: Made) -> FormRecord:
    """See Maker: the tree itself."""
    return FormRecord(path=made.tree.name, size_bytes=tree_bytes(made.tree), sha256=files_hash(scan(made.tree)))


def make_oci_form(made: Made) -> FormRecord:
    """See Maker: an archive for Docker and Podman."""
    manifest, path = made.manifest, made.folder / "image.oci.tar"
    tag = f"tenure/{manifest.name}:{manifest.short_id}"
    image_id = write_oci(
        made.tree,
        path,
        OciSpec(
            tag=tag,
            entry=manifest.entry,
            env=manifest.env,
            workdir=manifest.workdir,
            ports=manifest.ports,
            machine=made.machine,
            labels={"io.tenure.image": manifest.id, "io.tenure.door": manifest.door or "none"},
        ),
    )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    details = {"tag": tag, "image_id": image_id}
    return FormRecord(path=path.name, size_bytes=path.stat().st_size, sha256=digest, details=details)


# --- helpers ---


def _manifest(spec: BuildSpec, whole: Closure, *, filtered: bool) -> ImageManifest:
    calls = spec.closure.system_calls if filtered else ()
    return ImageManifest(
        name=spec.name,
        id=whole.hash,
        closure_hash=spec.closure.hash,
        entry=whole.program,
        env=whole.env,
        workdir=whole.workdir,
        ports=spec.ports,
        door=spec.door,
        engine=spec.engine,
        system_calls=allowed(calls) if calls else (),
        seccomp=SECCOMP_FILE if calls else "",
        keep=tuple(sorted(set(spec.keep))),
    )


def _make_forms(
    spec: BuildSpec, makers: Mapping[Form, Maker], made: Made, told: Callable[[str], None]
) -> tuple[ImageManifest, dict[Form, str]]:
    manifest, left_out = made.manifest, dict[Form, str]()
    for form in dict.fromkeys(spec.forms):
        told(f"making form {form}")
        if form not in makers:
            left_out[form] = "this version cannot make it"
            continue
        try:
            record = makers[form](replace(made, manifest=manifest))
        except Unsupported as error:
            left_out[form] = str(error)
            continue
        manifest = replace(manifest, forms={**manifest.forms, form: record})
    if not manifest.forms:
        raise Unsupported("form", "; ".join(f"{form}: {why}" for form, why in left_out.items()))
    return manifest, left_out


def _check(
    spec: BuildSpec, tree: Path, profile: Path | None, enter: Enter | None, told: Callable[[str], None]
) -> tuple[Check | None, str, str]:
    """Return how a tree is checked against the bare program, or why it cannot be; and why it cannot run behind its profile.

    Raises JobFailed when the program does not answer the same from this tree.
    """
    if spec.bare is None or spec.inside is None:
        return None, "nothing drives the program: give exercises", ""
    if enter is None:
        return None, "this machine gives no process another root directory", ""
    told("asking the program as it runs here")
    wanted = ask(spec.bare)
    told("asking it from the closure")
    found, unfiltered = _in_tree(spec.inside, wanted, tree, profile, enter)
    if different := wanted.differ(found):
        if not wanted.differ(ask(spec.bare)):
            raise JobFailed(
                f"image {spec.name}: from its closure the program answers otherwise than here: {different}. "
                "What it reads there was not seen: add an exercise that needs it, or --add PATH"
            )
        return None, f"the program's answers differ from run to run: {different}", unfiltered
    # Behind the profile, too: what is smaller may call the system otherwise.
    behind = None if unfiltered else profile
    return checker(spec.inside, wanted, enter, profile=behind, took_s=found.took_s), "", unfiltered


def _in_tree(inside: Asked, wanted: Answers, tree: Path, profile: Path | None, enter: Enter) -> tuple[Answers, str]:
    """Return what the program answers in a tree, behind its profile where it can, else why it cannot. Raises JobFailed."""
    why = ""
    if profile is not None:
        try:
            found = ask(inside, prefix=enter(tree, inside.workdir, profile))
            if not (why := wanted.differ(found)):
                return found, ""
        except TenureError as error:
            why = str(error).splitlines()[0]
    try:
        return ask(inside, prefix=enter(tree, inside.workdir, None)), why
    except TenureError as error:
        raise JobFailed(
            f"from its closure the program does not run: {error}. Add an exercise that needs what is missing, or --add PATH"
        ) from error


def _start_s(inside: Asked, tree: Path, profile: Path | None, enter: Enter) -> float:
    """Return the median time of three starts, until it listens, or has ended if it ends by itself."""
    alone = replace(inside, asks=(), commands=())
    return statistics.median(ask(alone, prefix=enter(tree, inside.workdir, profile)).took_s for _ in range(_STARTS))


def _shrink(tree: Path, spec: BuildSpec, check: Check, programs: set[str], told: Callable[[str], None]) -> tuple[Shrunk, ...]:
    if "all" in spec.keep:
        return ()
    steps: list[tuple[str, Step]] = [
        ("symbols", Symbols()),
        ("docs", DocStrings(leave=programs)),
        ("sources", Sources(leave=programs)),
        ("zip", ZippedLibrary()),
        ("tls", Tls()),
        ("blas", UnusedBlas("numpy")),
        ("blas", UnusedBlas("scipy")),
        ("folders", Folders()),
    ]
    report: list[Shrunk] = []
    if "symbols" not in spec.keep:  # first: what is only a large symbol table is no large package
        report += shrink(tree, [steps.pop(0)[1]], check, told=told)
    steps = [("packages", Package(name)) for name in large_packages(tree, but=spec.own_packages)] + steps
    for kind, step in steps:
        if kind in spec.keep:
            report.append(Shrunk(step=step.name, kept=False, why=f"not tried: --keep {kind}"))
            continue
        report += shrink(tree, [step], check, told=told)
        if kind == "sources" and not report[-1].kept and report[-1].saved_bytes:
            report += shrink(tree, _sources_apart(tree, programs), check, told=told)
    return tuple(report)


def _sources_apart(tree: Path, programs: set[str]) -> Sequence[Step]:
    """Return steps for the sources of large packages one by one, and for all others: some packages read their own."""
    large = packages(tree)[:_MAX_PACKAGES]
    return [Sources(but=large, leave=programs), *(Sources(below=package, leave=programs) for package in large)]
