"""How large the root of a small service is, against what cannot be left out.

Service: the multi-layer perceptron 64-32-10 on digits of `benchmarks.image_models`, in our server (NumPy: its program), with
each of the 5 engines, built by `tenure image build` as anybody would, shrinking steps as the product keeps them.
Size: bytes of all regular files of the root form, a file with several names once, no rounding to blocks, symbolic links 0;
interpreter, model and our server included. 1 MB is 10^6 bytes.
Indivisible: the sum, at their size in the image, of those files that a process of the service has mapped (its /proc/PID/maps,
after the exercise) and that are: shared objects of the engine's own packages (ONNX Runtime: onnxruntime; LiteRT:
ai_edge_litert; scikit-learn: sklearn, scipy and the OpenMP library they bring; PyTorch: torch and what its wheel brings; NumPy:
none), libpython (or the interpreter where it is linked into it), libc with its loader, libm, libstdc++ and libgcc_s, NumPy's
core (numpy/_core/*.so), and NumPy's OpenBLAS with its Fortran libraries for NumPy and scikit-learn only: the others never call
it. scipy's own OpenBLAS counts for scikit-learn.
Checked first: the service answers in the root form what the bare process answers (12 requests of `image_answers`).
Bar: size by indivisible at most 1.25 for NumPy, scikit-learn, ONNX Runtime and LiteRT, and PyTorch at most 450 MB; `value`: the
worst of the four ratios.
Reference, in the same run: the closure before shrinking, and the interpreter with the whole environment. By hand, single runs:
ONNX Runtime 110 MB (indivisible about 53), LiteRT 105 (48), scikit-learn 207, PyTorch 545; Debian with the environment 361,
355, 488, 1074.
Control: the closure of LiteRT without shrinking must miss the bar. NumPy's would not, since most of it is OpenBLAS.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from benchmarks import image_answers as asking
from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import Control, Options, Result, Skip, judge
from benchmarks.image_grammar import Run, Start
from benchmarks.image_player import Life, Player, Said
from tenure.images.tree import tree_bytes

NAME = "image_size"
BAR = "root of a digits service at most 1.25 times what cannot be left out; with PyTorch at most 450 MB"
MAX_RATIO, MAX_TORCH_BYTES = 1.25, 450_000_000
KIND = "perceptron"
_BASE = (
    r"/libpython[^/]*\.so[^/]*$",
    r"/(?:libc|libm)\.so\.6$",
    r"/ld-linux[^/]*\.so[^/]*$",
    r"/lib(?:stdc\+\+|gcc_s)\.so[^/]*$",
    r"/numpy/_core/[^/]*\.so$",
)
_OPENBLAS = r"/numpy\.libs/"
_OWN: Mapping[str, tuple[str, ...]] = {
    "numpy": (_OPENBLAS,),
    "sklearn": (r"/(?:sklearn|scipy)/.*\.so$", r"/(?:scikit_learn|scipy)\.libs/", _OPENBLAS),
    "onnxruntime": (r"/onnxruntime/.*\.so[^/]*$",),
    "litert": (r"/ai_edge_litert/.*\.so[^/]*$",),
    "torch": (r"/torch/.*\.so[^/]*$", r"/torch[^/]*\.libs/"),
}


def run(options: Options) -> Result:
    """Build the service of every engine, ask it, and weigh its root."""
    builds.need_tools()
    if why := builds.cannot_run("root"):
        raise Skip(why)
    details: dict[str, float | str] = {}
    ratios: dict[str, float] = {}
    control = None
    for engine in models.LIGHT if options.quick else models.ENGINES:
        if why := builds.available(engine):
            details[engine] = why
            continue
        with builds.workshop() as folder:
            image = builds.build(engine, KIND, folder)
            mapped = _mapped(image, options.seed)
            size_bytes = tree_bytes(image.root)
            needed = [path for path in mapped if _is_indivisible(path, engine, mapped)]
            indivisible = sum((image.root / path.lstrip("/")).stat().st_size for path in needed)
            before = {file["path"]: int(file.get("size_bytes", 0)) for file in image.lock["files"]}
            details |= {f"{engine}_mb": size_bytes / 1e6, f"{engine}_indivisible_mb": indivisible / 1e6}
            details[f"{engine}_closure_mb"] = sum(before.values()) / 1e6
            ratios[engine] = size_bytes / indivisible
            if engine == "litert":
                control = _control(sum(before.values()) / sum(before.get(path, 0) for path in needed))
            print(
                engine, f"{size_bytes / 1e6:.1f} MB, indivisible {indivisible / 1e6:.1f} MB, {ratios[engine]:.3f}", flush=True
            )
            shutil.rmtree(image.folder)
    details |= {f"{engine}_ratio": ratio for engine, ratio in ratios.items()}
    details["environment_mb"] = _environment_bytes() / 1e6
    over = [f"{engine}: {ratio:.3f}" for engine, ratio in ratios.items() if engine != "torch" and ratio > MAX_RATIO]
    torch_bytes = float(details.get("torch_mb", 0.0)) * 1e6
    if torch_bytes > MAX_TORCH_BYTES:
        over.append(f"torch: {torch_bytes / 1e6:.0f} MB")
    holds, why = judge(not over, control)
    return Result(
        value=max((ratio for engine, ratio in ratios.items() if engine != "torch"), default=None),
        spread=None,
        unit="size by indivisible",
        holds=holds,
        why=", ".join(over) or why,
        reference={name: value for name, value in details.items() if name.endswith(("_closure_mb", "environment_mb"))},
        control=control,
        details=details,
    )


def _mapped(image: builds.Built, seed: int) -> set[str]:
    """Return the files that the service has mapped in its root, after it answered there as the bare process does."""
    start = Run(service=image.engine, number=0, start=Start(model=KIND), exchanges=(), end="SIGTERM")
    expected, _ = _asked(builds.in_process(image.engine, image.model, start), image, seed)
    found, mapped = _asked(builds.in_root(image, start), image, seed)
    cell = asking.compare(f"{image.engine} root", expected, found, emulated=False)
    assert not cell.wrong, cell.wrong
    return {path for path in mapped if (image.root / path.lstrip("/")).is_file()}


def _asked(life: Life, image: builds.Built, seed: int) -> tuple[list[Said], set[str]]:
    try:
        assert life.wait_listening(), life.output()
        with Player({"http": next(iter(life.addresses.values())), **life.addresses}, image.served) as player:
            said = [player.infer(asked) for asked in asking.requests(models.service(image.engine), seed)]
        process = psutil.Process(life.process.pid)
        mapped = _maps(each.pid for each in (process, *process.children(recursive=True)))
        life.signal(signal.SIGTERM)
        life.wait()
        return said, mapped
    finally:
        life.close()


def _maps(pids: Iterable[int]) -> set[str]:
    found = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                found.add(_inside(fields[5]))
    return found


def _inside(path: str) -> str:
    """Return a mapped path as the process sees it: the kernel may show it as it lies here, below the image's root."""
    return re.sub(r"^.*/images/[^/]+/[0-9a-f]+/root(?=/)", "", path)


def _is_indivisible(path: str, engine: str, mapped: set[str]) -> bool:
    if any(re.search(pattern, path) for pattern in (*_BASE, *_OWN[engine])):
        return True
    linked_in = not any(re.search(_BASE[0], other) for other in mapped)
    return linked_in and re.search(r"/bin/python[\d.]*$", path) is not None


def _control(ratio: float) -> Control:
    how = f"{ratio:.3f} times what cannot be left out"
    return Control(name="the closure of LiteRT, nothing left out", value=ratio, failed=ratio > MAX_RATIO, how=how)


def _environment_bytes() -> int:
    """Return the size of the interpreter and of all packages beside it."""
    places = {sys.base_prefix, sysconfig.get_path("purelib")}
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for place in places
        for folder, _, names in os.walk(place)
        for name in names
    )
