"""Whether two builds give the same bytes.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models`, forms `root`, `oci` and `microvm` (where they can be
built).
Two whole builds by the command line, analysis included, that differ in: $TENURE_HOME and the working directory; the folder in
which the model lies; the uid (root's and another, where the benchmark runs as root; told otherwise); LANG, LC_ALL and TZ;
PYTHONHASHSEED; umask; the order in which a folder's files were made and their times (model and home are copied anew,
backwards, with the times of another year); the clock (the second build is later by at least 2 s; by years where a library that
feigns the time is there, told). The interpreter and its environment stay where they are: they cannot be moved.
Compared: sha256 of image.oci.tar, of the microVM's root and initial memory disk, of seccomp.json; of `root` the hash of sorted
path, type, mode, content or target; and the closure's content hash.
Bar: all the same (`value`: artefacts that differ, 0). An artefact that differs is told with its first different member.
Control: a tar by Python's `tarfile.add` of both roots must differ.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import Control, Options, Result, Skip, judge
from tenure.closures import files_hash
from tenure.images.lock import read_lock
from tenure.images.tree import scan

NAME = "image_deterministic"
BAR = "two builds that differ in path, locale, umask, hash seed, order, times and clock give the same bytes"
NAME_OF_IMAGE = "digits"
LATER_S = 2.0
OLD_S = 1_000_000_000


def run(options: Options) -> Result:
    """Build twice in different circumstances, compare every artefact, and see the control differ."""
    builds.need_tools()
    if why := builds.cannot_run("root"):
        raise Skip(why)
    if why := builds.available("onnxruntime"):
        raise Skip(why)
    with builds.workshop() as folder:
        model = models.write(folder / "written", "onnxruntime", "perceptron", seed=options.seed)
        forms = ("root", "oci", "microvm")
        first = _build(folder / "a", model, forms, {"LANG": "C", "TZ": "UTC", "PYTHONHASHSEED": "1"}, umask=0o022)
        time.sleep(LATER_S)
        deep = folder / "another place" / "b"
        env = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "77"}
        second = _build(deep, model, forms, env, umask=0o077, backwards=True)
        found = {name: (_digests(first)[name], _digests(second)[name]) for name in _digests(first)}
        different = {name: _first_difference(name, first, second) for name, (one, two) in found.items() if one != two}
        control = _control(first / "root", second / "root")
        users = "one: nobody else on this machine can read the interpreter" if os.geteuid() == 0 else "one: not run by root"
    holds, why = judge(not different, control)
    return Result(
        value=len(different),
        spread=None,
        unit="artefacts that differ",
        holds=holds,
        why="; ".join(f"{name}: {what}" for name, what in different.items()) or why,
        control=control,
        details={
            "artefacts": sorted(found),
            "uid": users,
            "clock": f"later by {LATER_S:g} s and a build; not feigned",
            **{f"sha256_{name}": one[:16] for name, (one, _) in found.items()},
        },
    )


def _build(
    place: Path, model: Path, forms: tuple[str, ...], env: Mapping[str, str], *, umask: int, backwards: bool = False
) -> Path:
    """Build from a copy of the model in a home and working folder of its own; return the image's folder."""
    (place / "models").mkdir(parents=True)
    copy = place / "models" / model.name
    shutil.copyfile(model, copy)
    if backwards:
        os.utime(copy, (OLD_S, OLD_S))
    before, here = os.umask(umask), os.getcwd()
    os.chdir(place)
    try:
        argv = ["image", "build", "serve", str(copy), "--name", NAME_OF_IMAGE, "--form", ",".join(forms)]
        builds.tenure(argv, place / "home", env=env)
    finally:
        os.chdir(here)
        os.umask(before)
    return builds.find(place / "home", NAME_OF_IMAGE)


def _digests(image: Path) -> dict[str, str]:
    """Return what is compared, by name."""
    found = {"root": files_hash(scan(image / "root")), "closure": read_lock(image / builds.LOCK).hash}
    files = ["image.oci.tar", "seccomp.json", *(f"microvm/{name}" for name in ("root.squashfs", "root.erofs", "initrd"))]
    for name in files:
        if (image / name).exists():
            found[name] = hashlib.sha256((image / name).read_bytes()).hexdigest()
    return found


def _first_difference(name: str, first: Path, second: Path) -> str:
    """Return the first member in which two artefacts differ, in words."""
    if name == "closure":
        pairs = [{file.path: file for file in read_lock(image / builds.LOCK).files} for image in (first, second)]
    elif name in ("root", "image.oci.tar"):
        pairs = [{file.path: file for file in scan(image / "root")} for image in (first, second)]
    else:
        return "its bytes"
    for path in sorted({*pairs[0], *pairs[1]}):
        one, two = (pair.get(path) for pair in pairs)
        if (
            one is None
            or two is None
            or (one.kind, one.mode, one.sha256, one.target) != (two.kind, two.mode, two.sha256, two.target)
        ):
            return f"{path}: {_shown(one)} and {_shown(two)}"
    return "how it is started"


def _shown(file: object) -> str:
    return "nothing" if file is None else json.dumps([str(getattr(file, key)) for key in ("kind", "mode", "sha256", "target")])


def _control(*roots: Path) -> Control:
    """Pack both roots as Python's tarfile does by itself."""
    digests = []
    for root in roots:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(root, arcname=".")
        digests.append(hashlib.sha256(packed.getvalue()).hexdigest())
    return Control(
        name="tarfile.add of both roots",
        value=None,
        failed=digests[0] != digests[1],
        how="the archives differ" if digests[0] != digests[1] else "the archives are the same",
    )
