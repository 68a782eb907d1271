"""Images of the services of `benchmarks.image_models`, built by the command line as anybody would, and lives from their roots.

Not here: what is asked of a service (`image_player`), what is judged (the benchmarks).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests import docker_engine, microvm_image

from benchmarks import image_models as models
from benchmarks.harness import ROOT, Skip
from benchmarks.image_grammar import Run, Served, Start
from benchmarks.image_player import Life, Outcome
from benchmarks.peers.processes import free_ports
from tenure.closures import Why
from tenure.images.lock import read_lock, write_lock
from tenure.images.tree import make_tree
from tenure.runtimes.rooted import why_no_root

BUILD_MAX_S = 1200.0
PROGRAMS = ROOT / "benchmarks" / "programs"
LOCK, ROOT_LOCK = "closure.lock.json", "root.lock.json"
STOP_MAX_S = 60.0
_PACKAGES = {
    "numpy": ("numpy",),
    "sklearn": ("sklearn", "skops"),
    "onnxruntime": ("onnxruntime", "onnx", "sklearn", "skl2onnx"),
    "litert": ("ai_edge_litert", "sklearn"),
    "torch": ("torch", "sklearn"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One image, and the service it was made of."""

    engine: str
    kind: str
    model: Path
    """The model's file on this machine."""
    home: Path
    """$TENURE_HOME of the build."""
    name: str
    folder: Path
    """Of the image."""

    @property
    def served(self) -> Served:
        """The model as held-out runs see it."""
        return next(model for model in models.service(self.engine).models if model.name == self.kind)

    @property
    def manifest(self) -> dict[str, Any]:
        """What image.json says."""
        found: dict[str, Any] = json.loads((self.folder / "image.json").read_text())
        return found

    @property
    def lock(self) -> dict[str, Any]:
        """What the closure's lock file says."""
        found: dict[str, Any] = json.loads((self.folder / LOCK).read_text())
        return found

    @property
    def root(self) -> Path:
        """The tree of form `root`."""
        return self.folder / "root"


def available(engine: str) -> str:
    """Return why an engine's models can't be made or run here; empty when they can."""
    missing = [name for name in _PACKAGES[engine] if not _importable(name)]
    return f"{engine}: {', '.join(missing)} is not installed" if missing else ""


def cannot_run(form: str) -> str:
    """Return why a form cannot be run here; empty when nothing speaks against trying."""
    if form == "root":
        return why_no_root()
    if form == "oci":
        return docker_engine.why_absent()
    return microvm_image.missing()


def need_tools() -> None:
    """Raise Skip when closures can't be made here."""
    if shutil.which("strace") is None:
        raise Skip("strace is not installed, and closures are made by watching with it")


@contextmanager
def workshop() -> Iterator[Path]:
    """Yield a folder for models and images. Not below /tmp: what lies there can be in no image."""
    with tempfile.TemporaryDirectory(prefix="tenure-images-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def container_engine(forms: Sequence[str]) -> Iterator[None]:
    """Have an engine of one's own be the one that containers run on, when there are to be any. Raises CannotStart."""
    if "oci" not in forms:
        yield
        return
    before = os.environ.get("DOCKER_HOST")
    with docker_engine.running(live_restore=False) as engine:
        os.environ["DOCKER_HOST"] = f"unix://{engine.socket}"
        try:
            yield
        finally:
            os.environ.pop("DOCKER_HOST")
            if before is not None:
                os.environ["DOCKER_HOST"] = before


def build(engine: str, kind: str, folder: Path, *, forms: Sequence[str] = ("root",), seed: int = 0, keep: str = "") -> Built:
    """Write a model, analyse its service and build the forms. keep: what is not to be left out, as the command line has it.

    Asserts that the command says it was done.
    """
    model = models.write(folder / "models" / engine, engine, kind, seed=seed)
    home, name = folder / "home", f"{engine}-{kind}"
    if "microvm" in forms and not (home / "kernels").exists():
        (home / "kernels").mkdir(parents=True)
        (home / "kernels" / "guest").symlink_to(microvm_image.KERNEL)
    argv = ["image", "build", "--form", ",".join(forms), *(["--keep", keep] if keep else [])]
    if engine == "numpy":
        exercise = f"{sys.executable} {PROGRAMS / 'numpy_exercise.py'} --at 127.0.0.1:$TENURE_PORT --model {kind}"
        (port,) = free_ports(1)
        program = [sys.executable, str(PROGRAMS / "numpy_door.py"), str(model), "--host", "0.0.0.0", "--port", str(port)]
        argv += ["--exercise", exercise, name, "--", *program]
    else:
        argv += ["--name", name, "serve", str(model)]
    tenure(argv, home)
    return Built(engine=engine, kind=kind, model=model, home=home, name=name, folder=find(home, name))


def find(home: Path, name: str) -> Path:
    """Return the folder of the newest image of a name. Asserts that there is one."""
    found = sorted((home / "images" / name).glob("*/image.json"), key=lambda path: path.stat().st_mtime)
    assert found, f"no image {name} in {home}"
    return found[-1].parent


def tenure(argv: Sequence[str], home: Path, *, codes: Sequence[int] = (0,), env: Mapping[str, str] | None = None) -> str:
    """Run the command line in a home of one's own and return what it printed. Asserts its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "tenure.cli", *argv],
        env={**environment(home), **(env or {})},
        capture_output=True,
        text=True,
        timeout=BUILD_MAX_S,
        check=False,
    )
    said = (done.stdout + done.stderr).strip()
    assert done.returncode in codes, f"tenure {' '.join(argv)} ended with {done.returncode}: {said[-1500:]}"
    return said


def environment(home: Path) -> dict[str, str]:
    """Return the environment in which this checkout's command line works in a home of its own."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "TENURE_HOME": str(home),
        "TENURE_SHARES_FILE": str(home.parent / "shares.json"),
    }


def in_process(engine: str, model: Path, run: Run, prefix: Sequence[str] = ()) -> Life:
    """Start the bare process of a run. prefix: a command that runs another, such as a tracer."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    argv = _argv(engine, [sys.executable], str(model), run)
    return Life([*prefix, *argv], {**kept, "PYTHONPATH": str(ROOT / "src"), "LANG": "C.UTF-8"}, watched=bool(prefix))


def in_root(built: Built, run: Run, root: Path | None = None, *, profile: Path | None = None) -> Life:
    """Start a run in a root: the image's, or another tree of the same closure. profile: of system calls, to run behind."""
    manifest = built.manifest
    entry = list(manifest["entry"])
    python = (
        entry[: entry.index("-m")]
        if "-m" in entry
        else entry[: next(n for n, word in enumerate(entry) if word.endswith(".py"))]
    )
    argv = _argv(built.engine, python, model_inside(built), run, manifest)
    within = [sys.executable, "-I", str(PROGRAMS / "in_root.py"), str(root or built.root), manifest.get("workdir", "/")]
    return Life([*within, *argv], dict(manifest["env"]) | ({"BENCH_PROFILE": str(profile)} if profile else {}))


def model_inside(built: Built) -> str:
    """Return where the model lies in the image."""
    return next(str(word) for word in built.manifest["entry"] if word.endswith(models.ENDINGS[built.engine]))


def _argv(engine: str, python: Sequence[str], model: str, run: Run, manifest: Mapping[str, Any] | None = None) -> list[str]:
    if engine == "numpy":
        program = str(PROGRAMS / "numpy_door.py")
        if manifest is not None:
            program = next(word for word in manifest["entry"] if word.endswith(".py"))
        return [*python, program, model]
    start = run.start
    options = ["--threads", str(start.threads), "--instances", str(start.instances), "--max-delay-ms", str(start.delay_ms)]
    return [*python, "-m", "tenure.serve", "--model", model, *options, *([] if start.warm_up else ["--no-warmup"])]


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def repair(built: Built, missed: Outcome) -> tuple[list[str], Built]:
    """Have the product name what a life missed and repair the image; return the names, and the image as it is then."""
    log = built.home.parent / "missed.log"
    log.write_text(missed.output)
    said = tenure(["image", "repair", str(built.folder), "--log", str(log), "--json"], built.home, codes=range(128))
    try:
        named = [str(entry["path"]) for entry in json.loads(said.splitlines()[-1])["missing"]]
    except (ValueError, KeyError, IndexError):
        named = []
    return named, replace(built, folder=find(built.home, built.name))


def copy(built: Built) -> Built:
    """Return the same image once more, in a folder beside it; files are the very same on disk."""
    folder = built.folder.with_name(f"{built.folder.name}-copy")
    shutil.copytree(built.folder, folder, symlinks=True, copy_function=os.link)
    return replace(built, folder=folder)


def forget(built: Built, path: str) -> None:
    """Make an image one whose analysis never saw a file: it is neither in the tree nor in what the locks say of it."""
    (built.root / path.lstrip("/")).unlink()
    for name in (LOCK, ROOT_LOCK):
        closure = read_lock(built.folder / name)
        gone = {path, path.removesuffix("c")}
        write_lock(replace(closure, files=tuple(f for f in closure.files if f.path not in gone)), built.folder / name)


def opened_only(built: Built, place: Path) -> Path:
    """Write the root of an image's closure without what was only stat-ed, as tools that trace `open` make it."""
    closure = read_lock(built.folder / LOCK)
    opened = [file for file in closure.files if {reason.kind for reason in file.reasons} != {Why.STATTED}]
    moved = {file.path: built.root / file.path.lstrip("/") for file in opened if not os.path.lexists(file.path)}
    make_tree(replace(closure, files=tuple(opened)), place, sources=moved)
    return place


@contextmanager
def running(image: Built, form: str, *, env: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Run a service in a form by the command line, one core, and yield its addresses by protocol; "process": the bare one.

    Asserts that it starts, and ends when it is interrupted.
    """
    if form == "process":
        run = Run(service=image.engine, number=0, start=Start(model=image.kind), exchanges=(), end="SIGTERM")
        life = in_process(image.engine, image.model, run)
    else:
        argv = ["image", "run", image.name, "--form", form, "--cpus", "1", "--memory", "1GiB", "--json"]
        ports = ["--http-port", "0", "--grpc-port", "0"]
        life = Life([sys.executable, "-m", "tenure.cli", *argv, *ports], {**environment(image.home), **(env or {})})
    try:
        assert life.wait_listening(), f"{image.name} as {form} does not listen ({life.wait()}): {life.output()}"
        found = {kind: address.rpartition("/")[2] for kind, address in life.addresses.items()}
        yield {"http": next(iter(found.values())), **found}
        life.signal(signal.SIGINT)
        ended = life.wait()
        assert ended == "0", f"{image.name} as {form} ended with {ended}: {life.output()}"
    finally:
        life.close()


@contextmanager
def changed(image: Built, path: str, change: Callable[[Path], None]) -> Iterator[None]:
    """Change a file of an image's root for a while; nothing else that may share it on disk is touched."""
    place, kept = image.root / path.lstrip("/"), image.folder / "kept"
    os.rename(place, kept)
    shutil.copy(kept, place)
    try:
        change(place)
        yield
    finally:
        os.replace(kept, place)
