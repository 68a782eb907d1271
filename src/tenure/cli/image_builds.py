"""From what people name to an image: a served model, or any command, analysed, built and stored.

Here since a served model is driven through its doors by the public client, and run in trees by a runtime: rooms that images
know nothing of. Not here: what is printed (`image_verbs`).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tenure.errors import JobFailed, NotFound, SpecError, TenureError, Unsupported
from tenure.forms import LOCK_FILE, Form, check_image_name

if TYPE_CHECKING:
    from tenure.closures import Closure
    from tenure.decide.forms import Isolation
    from tenure.images.answers import Enter
    from tenure.images.build import BuildSpec, Built, Maker
    from tenure.images.closure import Analysis, Program
    from tenure.images.store import ImageStore, StoredImage

MODEL_FOLDER = "/srv/models"
"""Where a served model lies in its image, wherever it was."""
HTTP_PORT, GRPC_PORT = 8000, 8001
_ENGINES: Mapping[str, tuple[str, str, str]] = {
    ".onnx": ("onnxruntime", "onnxruntime", "onnxruntime"),
    ".skops": ("scikit-learn", "scikit-learn", "sklearn"),
    ".pt2": ("torch", "torch", "torch"),
    ".tflite": ("ai-edge-litert", "ai-edge-litert", "ai_edge_litert"),
}
"""Ending of a model's file -> name of its engine, of its distribution, and of its package."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """An image, and the analysis that it came of."""

    built: Built
    analysis: Analysis


def makers(home: Path, kernel: Path | None = None) -> dict[Form, Maker]:
    """Return what makes each form. kernel: of microVMs, a file or a folder with its modules; None: looked for in `home`."""
    from tenure.images.build import make_oci_form, make_root_form
    from tenure.images.microvm import microvm_form

    return {Form.ROOT: make_root_form, Form.OCI: make_oci_form, Form.MICROVM: microvm_form(home, kernel)}


def check_kernel(kernel: Path | None, forms: Sequence[Form]) -> None:
    """Raise, before anything is watched, when a kernel was given that no microVM can be made with, or is asked for.

    SpecError, NotFound, CorruptData: as `find_kernel` and `read_modules`.
    """
    from tenure.images.microvm_kernel import find_kernel, read_modules

    if kernel is None:
        return
    if Form.MICROVM not in forms:
        raise SpecError(f"--kernel is for the form microvm; found --form {','.join(forms)}. Add microvm, or leave it out")
    read_modules(find_kernel(kernel))


def enter() -> Enter | None:
    """Return how a program is run in a tree here, outside of any lease; None when it cannot be."""
    from tenure.runtimes.rooted import root_prefix, why_no_root

    return None if why_no_root() else root_prefix


def serving_name(model: Path) -> str:
    """Return what the image of a served model is called unless somebody says."""
    return re.sub(r"[^a-z0-9._-]+", "-", model.absolute().stem.lower()).lstrip("._-")[:63] or "model"


def build_serving(
    model: Path,
    store: ImageStore,
    *,
    forms: Sequence[Form],
    name: str = "",
    keep: Sequence[str] = (),
    kernel: Path | None = None,
    program: Program | None = None,
    told: Say = lambda _: None,
) -> Finished:
    """Analyse our server with a model, and build it. program: as `imaging_serve.serving_program` gives it, changed.

    Raises NotFound, SpecError, MissingExtra; what `images.closure.analyse` and `images.build.build` raise.
    """
    from tenure.cli.imaging_serve import serving_program
    from tenure.experiments.foreground import check_models
    from tenure.images.build import BuildSpec, build
    from tenure.images.relocate import relocate

    check_models(model)
    check_image_name(name or serving_name(model))
    program = program or serving_program(model, http_port=HTTP_PORT, grpc_port=GRPC_PORT)
    analysis = _analysed_under_a_lease(program, told)
    _refuse_failed(analysis)
    closure, sources = relocate(analysis.closure, {str(model.absolute()): f"{MODEL_FOLDER}/{model.name}"})
    spec = BuildSpec(
        name=name or serving_name(model),
        closure=closure,
        sources=sources,
        forms=tuple(forms),
        ports=(HTTP_PORT, GRPC_PORT),
        door="v2",
        engine=_engine(model),
        own_packages=_own_packages(model),
        keep=tuple(keep),
    )
    spec = _asked_by_v2(spec, analysis.closure.program)
    built = build(spec, store, makers(store.folder.parent, kernel), enter=enter(), told=told)
    return Finished(built=built, analysis=analysis)


def ready_serving(model: Path, store: ImageStore, *, form: Form, told: Say = lambda _: None) -> StoredImage:
    """Return an image that serves the model in this form: one whose files are still as they are here, else one built now.

    Raises as `build_serving`; Unsupported when the form cannot be made here.
    """
    for image in store.images(serving_name(model)):
        if image.manifest.door == "v2" and form in image.manifest.forms and _is_of(image, model, told):
            return image
    built = build_serving(model, store, forms=(form,), told=told).built
    if form in built.left_out:
        raise Unsupported("form", built.left_out[form])
    return built.image


def ready_for_choice(model: Path, store: ImageStore, *, isolation: Isolation, told: Say = lambda _: None) -> StoredImage:
    """Return an image that serves the model, whose form is to be chosen: one that has all forms worth choosing from and whose
    files are still as they are here, else one built now.

    A virtual machine, which always adds a kernel, is one of them only where a process would not do. Raises as `build_serving`;
    Unsupported, NotFound when only the form microvm would do, and cannot be made here.
    """
    wanted = {"process": (Form.ROOT, Form.OCI), "container": (Form.OCI, Form.MICROVM), "microvm": (Form.MICROVM,)}[isolation]
    if Form.MICROVM in wanted:
        try:
            _check_microvm(store.folder.parent)
        except (Unsupported, NotFound):
            wanted = tuple(form for form in wanted if form is not Form.MICROVM)
            if not wanted:
                raise
    for image in store.images(serving_name(model)):
        if image.manifest.door == "v2" and set(wanted) <= set(image.manifest.forms) and _is_of(image, model, told):
            return image
    return build_serving(model, store, forms=wanted, told=told).built.image


def _check_microvm(home: Path) -> None:
    from tenure.images.microvm import check_tools
    from tenure.images.microvm_kernel import find_kernel

    check_tools()
    find_kernel(home=home)


def _is_of(image: StoredImage, model: Path, told: Say) -> bool:
    """Return whether an image was made of this very model and of files that are on this machine as they were."""
    from tenure.images.lock import read_lock
    from tenure.images.repair import sources_of
    from tenure.images.tree import file_sha256

    told(f"looking whether {image.manifest.name}:{image.manifest.short_id} is still what is here")
    try:
        closure = read_lock(image.folder / LOCK_FILE)
    except TenureError:
        return False
    sources, place = sources_of(closure), str(model.absolute())
    moved = [path for path in sources.values() if path == place or path.startswith(f"{place}/")]
    for file in closure.files:
        path = Path(sources.get(file.path, file.path))
        if file.kind == "file" and not (
            path.is_file() and path.stat().st_size == file.size_bytes and file_sha256(path) == file.sha256
        ):
            return False
    return bool(moved) and (not model.is_dir() or len(moved) == sum(each.is_file() for each in model.rglob("*")))


def build_again(
    image: StoredImage, closure: Closure, store: ImageStore, *, kernel: Path | None = None, told: Say = lambda _: None
) -> Built:
    """Build an image anew from its closure, as it is or repaired: the same name, door, ports and forms, and the same kept.

    Raises CorruptData when a file of the closure is no longer on this machine as it was; what `images.build.build` raises.
    """
    from tenure.images.build import BuildSpec, build
    from tenure.images.repair import here, sources_of

    manifest, sources = image.manifest, sources_of(closure)
    spec = BuildSpec(
        name=manifest.name,
        closure=closure,
        sources={inside: Path(outside) for inside, outside in sources.items()},
        forms=tuple(manifest.forms),
        ports=manifest.ports,
        door=manifest.door,
        engine=manifest.engine,
        keep=manifest.keep,
    )
    program = here(closure.program, sources)
    if manifest.door == "v2":
        spec = _asked_by_v2(spec, program)
    else:
        commands = tuple(exercise.argv[2] for exercise in closure.exercises if exercise.argv[:2] == ("sh", "-c"))
        spec = _asked_by_commands(spec, program, commands)
    return build(spec, store, makers(store.folder.parent, kernel), enter=enter(), told=told)


def _asked_by_v2(spec: BuildSpec, program: Sequence[str]) -> BuildSpec:
    """Return the spec of a served model with how it is asked. program: its command as it is on this machine."""
    from tenure.images.answers import Asked
    from tenure.images.ask_v2 import ask_v2
    from tenure.sockets import free_port

    port = free_port()
    # One thread, so that sums are added up in one order.
    options = ("--host", "127.0.0.1", "--http-port", str(port), "--grpc-port", "0", "--threads", "1")
    bare = Asked(argv=(*program, *options), env=_run_env(spec.closure), port=port, asks=(ask_v2,))
    return replace(spec, bare=bare, inside=replace(bare, argv=(*spec.closure.program, *options)))


def _asked_by_commands(spec: BuildSpec, program: Sequence[str], commands: Sequence[str]) -> BuildSpec:
    """Return the spec of any program with how it is asked: by its exercises where it listens, else by running it."""
    from tenure.images.answers import Asked

    port = spec.ports[0] if spec.ports else 0
    bare = Asked(
        argv=tuple(program),
        env=_run_env(spec.closure),
        workdir=spec.closure.workdir,
        port=port,
        commands=tuple(commands) if port else (),
    )
    return replace(spec, bare=bare, inside=replace(bare, argv=spec.closure.program))


def build_program(
    program: Program,
    store: ImageStore,
    *,
    name: str,
    forms: Sequence[Form],
    exercises: Sequence[str] = (),
    ports: Sequence[int] = (),
    keep: Sequence[str] = (),
    kernel: Path | None = None,
    told: Say = lambda _: None,
) -> Finished:
    """Analyse any program, and build it. exercises: those of its lives, which are asked again of what is built.

    ports: those on which it listens; left out, they are looked for where there are exercises. Raises as `build_serving`.
    """
    from tenure.images.build import BuildSpec, build
    from tenure.images.closure import analyse

    check_image_name(name)
    _refuse_tmp(program)
    analysis = analyse(program, say=told)
    _refuse_failed(analysis)
    closure = analysis.closure
    found = tuple(ports) or (_listening(closure, told) if exercises else ())
    spec = BuildSpec(name=name, closure=closure, forms=tuple(forms), ports=found, keep=tuple(keep))
    spec = _asked_by_commands(spec, closure.program, exercises)
    built = build(spec, store, makers(store.folder.parent, kernel), enter=enter(), told=told)
    return Finished(built=built, analysis=analysis)


def _run_env(closure: Closure) -> dict[str, str]:
    return {**closure.env, "PYTHONDONTWRITEBYTECODE": "1"}


def _refuse_tmp(program: Program) -> None:
    """Raise SpecError, before anything is watched, for a program that lies where every form has something of its own."""
    from tenure.images.tree import OWN

    places = [program.workdir, *(os.path.join(program.workdir, word) for word in (*program.argv, *program.add))]
    for place in filter(os.path.exists, places):
        first = os.path.realpath(place).strip("/").partition("/")[0]
        if first in OWN:
            raise SpecError(
                f"{place} cannot be in an image: /{first} is the running program's own, empty at its start. "
                "Move the program, or what it reads, somewhere else, such as below your home, and build it again"
            )


def _refuse_failed(analysis: Analysis) -> None:
    """Raise JobFailed when an exercise failed: an image of half a program is none."""
    failed = [exercise for exercise in analysis.closure.exercises if exercise.exit_code]
    if failed:
        said = next((finding.found for finding in analysis.findings if finding.matter == "exercise"), "")
        one = failed[0]
        raise JobFailed(
            f"exercise {one.description or ' '.join(one.argv) or 'of the program alone'!r} ended with {one.exit_code}, so the "
            f"image would lack what it needs. {said}".rstrip()
        )


def _listening(closure: Closure, told: Say) -> tuple[int, ...]:
    """Run the program once more to see on which ports it listens."""
    from tenure.images.trace import Drive, Life, live

    told("looking for the ports on which it listens")
    nothing = Drive(call=lambda _: None, description="nothing")
    life = Life(argv=closure.program, drives=(nothing,))
    return live(life, env=_run_env(closure), workdir=closure.workdir, trace=None).ports


def _endings(model: Path) -> list[str]:
    """Return the endings of the model files of a path, those that have an engine, sorted."""
    from tenure.serve.repository import ModelFiles

    return sorted({file.suffix for versions in ModelFiles(model).scan().values() for file in versions.values()} & set(_ENGINES))


def _analysed_under_a_lease(program: Program, told: Say) -> Analysis:
    """Analyse our server as it runs under a lease: there it writes its addresses and result, which its profile must let by."""
    from tenure.images.closure import analyse

    with tempfile.TemporaryDirectory(prefix="tenure-lease-") as folder:
        Path(folder, "lease.json").write_text(json.dumps({"envelope": {"cpus": 1.0, "memory_bytes": 1 << 30}, "threads": 1}))
        lease = {"TENURE_WORKER_DIR": folder, "TENURE_LEASE_FILE": f"{folder}/lease.json"}
        analysis = analyse(replace(program, env={**program.env, **lease}), say=told)
    closure = analysis.closure
    env = {name: value for name, value in closure.env.items() if name not in lease or name in program.env}
    return replace(analysis, closure=replace(closure, env=env))


def _own_packages(model: Path) -> tuple[str, ...]:
    """Return the packages that a served model cannot do without."""
    return ("numpy", *(_ENGINES[ending][2] for ending in _endings(model)))


def _engine(model: Path) -> str:
    from importlib import metadata

    found = []
    for ending in _endings(model):
        name, distribution, _ = _ENGINES[ending]
        try:
            found.append(f"{name} {metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            found.append(name)
    return ", ".join(found)


def parse_forms(text: str) -> tuple[Form, ...]:
    """Return the forms that a list such as ``root,oci`` names. Raises SpecError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or (unknown := [word for word in words if word not in tuple(Form)]):
        raise SpecError(f"forms are {', '.join(Form)}, with commas between them; found {unknown[0] if words else text!r}")
    return tuple(dict.fromkeys(Form(word) for word in words))
