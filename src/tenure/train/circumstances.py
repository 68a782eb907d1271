"""What a stage's weights depend on beside its spec: the machine, the library versions, the program's files, the data.

The start of a generation notes them in its plan (`circumstances`); each slot compares its own with the plan's (`verify`), and
each round looks whether an input file was written meanwhile (`Inputs.check`, about 1 % of the time at most). What differs is
named: a run that goes on silently with other data or another CPU gives weights that no one can get again. Nothing here reads
a file whole: sizes, times, inodes and a bounded sample. Not for: the fingerprint under which trials are found again
(`experiments.manifest`), torn files of the store (`records`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import JobFailed, SpecError
from tenure.meter.cpu import cpu
from tenure.train.records import Arrays

MAX_FILES = 1000
"""Input files looked at; of a larger folder the first ones by name."""
SAMPLED_FILES = 32
SAMPLE_BYTES = 4096
"""From both ends of each sampled file."""
SAMPLED_ROWS = 64
"""Examples of each array that are looked at, evenly spread."""
LOOK_SHARE = 0.01
"""Of the time, at most, goes into looking at input files again."""
LIBRARIES = ("numpy", "scipy", "sklearn", "torch", "keras", "jax", "tensorflow")
"""Modules that form results; the version of each one that is loaded is noted."""
_CHOICES = re.compile(r"NPY_(DISABLE|ENABLE)_CPU_FEATURES|OPENBLAS_CORETYPE|MKL_(CBWR|ENABLE_INSTRUCTIONS)|ATEN_CPU_CAPABILITY")

Noted = Mapping[str, Any]
"""Plain data, as a plan keeps it."""


def machine() -> dict[str, Any]:
    """Return what the rounding of results depends on here: CPU model and features, libraries, kernels chosen by environment."""
    model, features = _cpu()
    versions = {name: str(getattr(sys.modules[name], "__version__", "")) for name in LIBRARIES if name in sys.modules}
    return {
        "cpu_model": model,
        "cpu_features": list(features),
        "versions": versions,
        "choices": {name: value for name, value in sorted(os.environ.items()) if _CHOICES.fullmatch(name)},
    }


def program_files(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of every module loaded from the folder: the program, and neighbours that it imports."""
    found, inside, libraries = {}, f"{folder}{os.sep}", f"{sys.prefix}{os.sep}"
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(inside) and path.endswith(".py") and not path.startswith(libraries):
            found[path.removeprefix(inside)] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return dict(sorted(found.items()))


def data_fingerprint(inputs: Mapping[str, str], arrays: Iterable[Arrays]) -> dict[str, Any]:
    """Return what tells one state of the data from another.

    inputs: name -> absolute path of a file or folder. arrays: what the program's `data` made of them, in its order.
    Returns files: path -> size, mtime (ns), inode, sample; and arrays: name -> dtype, shape, SHA-256 of some examples.
    """
    files = {path: _file(path, sampled=number < SAMPLED_FILES) for number, path in enumerate(_paths(inputs))}
    sampled = {f"{part}.{name}": _array(values) for part, group in enumerate(arrays) for name, values in group.items()}
    return {"files": {path: found for path, found in files.items() if found}, "arrays": sampled}


def circumstances(folder: Path, inputs: Mapping[str, str], arrays: Iterable[Arrays]) -> dict[str, Any]:
    """Return all that a plan keeps. To be called when the program is loaded and has given its data."""
    return {"machine": machine(), "program": program_files(folder), "data": data_fingerprint(inputs, arrays)}


def verify(planned: Noted, found: Noted, *, same_result: bool) -> None:
    """Compare a slot's circumstances with those of its plan.

    Raises JobFailed when program or data differ, and, in same-result mode, when the machine or a library does. What one side
    does not know (a plan without circumstances, a library not loaded there) is not compared.
    """
    if not planned:
        return
    if text := _program_changed(planned["program"], found["program"]):
        raise JobFailed(
            f"the program changed while it trains: {text}. A round would be made by two programs. Put the old file back, or "
            "resume the run: it then goes on with the new program from the newest round."
        )
    if text := _files_changed(planned["data"]["files"]) or _arrays_changed(planned["data"]["arrays"], found["data"]["arrays"]):
        raise JobFailed(
            f"the data changed while it is trained on: {text}. Put the old data back, or resume the run: it then goes on with "
            "the new data from the newest round."
        )
    if same_result and (text := machine_changed(planned["machine"], found["machine"])):
        raise JobFailed(
            f"this worker would round differently: {text}. With the same result for any workers (same_result), all need one "
            "kind of machine and the same libraries: use such a node, or begin a new run with same_result = false."
        )


def differences(earlier: Noted, now: Noted) -> tuple[str, str, str]:
    """Return in words how program, data and machine differ from those of an earlier generation; empty where they do not."""
    if not earlier:
        return "", "", ""
    data = _arrays_changed(earlier["data"]["arrays"], now["data"]["arrays"]) or _files_changed(earlier["data"]["files"])
    return _program_changed(earlier["program"], now["program"]), data, machine_changed(earlier["machine"], now["machine"])


def check_resumable(earlier: Noted, now: Noted, *, same_result: bool) -> str:
    """Return, for people, what is new since the generation before, empty when nothing is.

    Another program or other data is the user's choice and is told. Another kind of machine raises SpecError in same-result
    mode.
    """
    program, data, machine_ = differences(earlier, now)
    if same_result and machine_:
        raise SpecError(
            f"this run was trained on another kind of machine: {machine_}. Its weights would no longer be those of any one "
            "machine. Resume it there, or begin a new run (with same_result = false the kind of machine does not matter)."
        )
    told = [f"another program ({program})"] if program else []
    told += [f"other data ({data})"] if data else []
    return " and ".join(told)


class Inputs:
    """Looks, round after round, whether an input file is still the one that the plan noted."""

    def __init__(self, planned: Noted, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """planned: a plan's circumstances, perhaps empty."""
        self._files: Noted = planned["data"]["files"] if planned else {}
        self._monotonic = monotonic
        self._next_s = 0.0

    def check(self) -> None:
        """Raise JobFailed when a file was written, replaced or removed since. Often called: looks only now and then."""
        began_s = self._monotonic()
        if not self._files or began_s < self._next_s:
            return
        text = _files_changed(self._files)
        now_s = self._monotonic()
        self._next_s = now_s + (now_s - began_s) / LOOK_SHARE
        if text:
            raise JobFailed(
                f"the data changed between two rounds: {text}. If that was meant, resume the run, which goes on with the new "
                "data from the newest round; else put the old data back and begin a new run, for a round may have read both."
            )


# --- what differs -----------------------------------------------------------------------------------------------------


def machine_changed(planned: Noted, found: Noted) -> str:
    """Return how a machine differs from the planned one, in words; empty when results round alike."""
    if planned["cpu_model"] != found["cpu_model"]:
        return f"the CPU is {found['cpu_model']!r}, the plan was made on {planned['cpu_model']!r}"
    if planned["cpu_features"] != found["cpu_features"]:
        missing = sorted(set(planned["cpu_features"]) - set(found["cpu_features"]))
        more = sorted(set(found["cpu_features"]) - set(planned["cpu_features"]))
        return f"the CPU lacks {', '.join(missing) or 'nothing'} and has {', '.join(more) or 'nothing'} more"
    for name, version in planned["versions"].items():
        if (here := found["versions"].get(name, version)) != version:
            return f"{name} is {here}, the plan was made with {version}"
    if planned["choices"] != found["choices"]:
        chosen = [side["choices"] or "nothing" for side in (found, planned)]
        return f"the environment chooses kernels by {chosen[0]}, the plan's by {chosen[1]}"
    return ""


def _program_changed(planned: Mapping[str, str], found: Mapping[str, str]) -> str:
    for name, digest in planned.items():
        if found.get(name, digest) != digest:
            return f"{name} has SHA-256 {found[name][:12]}…, the plan has {digest[:12]}…"
    return ""


def _files_changed(planned: Mapping[str, Mapping[str, Any]]) -> str:
    for path, then in planned.items():
        now = _stat(path)
        if not now:
            return f"{path} is gone"
        if now["size"] != then["size"]:
            return f"{path} has {now['size']} bytes, it had {then['size']}"
        if now["mtime_ns"] != then["mtime_ns"]:
            return f"{path} was written {_after(now['mtime_ns'], then['mtime_ns'])}"
        if now["inode"] != then["inode"] and _sample(path, now["size"]) != then["sample"]:
            return f"{path} was replaced by a file of other content"
    return ""


def _after(now_ns: int, then_ns: int) -> str:
    apart_s = abs(now_ns - then_ns) / 1e9
    return f"{apart_s:.3g} s {'after' if now_ns > then_ns else 'before'} what was planned with"


def _arrays_changed(planned: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> str:
    for name in sorted(planned.keys() | found.keys()):
        then, now = planned.get(name), found.get(name)
        part, _, key = name.partition(".")
        which = f"the {'held-out' if part == '1' else 'training'} array {key!r}"
        if then is None or now is None:
            return f"{which} is {'new' if then is None else 'missing'}"
        for field in ("dtype", "shape"):
            if then[field] != now[field]:
                return f"{which} has {field} {now[field]}, it had {then[field]}"
        if then["sample"] != now["sample"]:
            return (
                f"{which} has other values, though the same shape. The program's data() must give the same whenever it is "
                "called: sort file lists, seed what is random"
            )
    return ""


@functools.cache
def _cpu() -> tuple[str, tuple[str, ...]]:
    """Of the machine, which does not change while a process lives."""
    return cpu()


# --- looking ----------------------------------------------------------------------------------------------------------


def _paths(inputs: Mapping[str, str]) -> list[str]:
    """Return the input files, sorted, MAX_FILES at most."""
    found: list[str] = []
    for place in sorted(set(inputs.values())):
        if os.path.isfile(place):
            found.append(place)
            continue
        for folder, folders, names in os.walk(place):
            folders.sort()
            found += [os.path.join(folder, name) for name in sorted(names)]
            if len(found) >= MAX_FILES:
                break
    return found[:MAX_FILES]


def _file(path: str, *, sampled: bool) -> dict[str, Any]:
    found = _stat(path)
    if found:
        found["sample"] = _sample(path, found["size"]) if sampled else ""
    return found


def _stat(path: str) -> dict[str, Any]:
    try:
        status = os.stat(path)
    except OSError:
        return {}
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _sample(path: str, size: int) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(SAMPLE_BYTES)
            file.seek(max(0, size - SAMPLE_BYTES))
            return hashlib.sha256(head + file.read(SAMPLE_BYTES)).hexdigest()
    except OSError:
        return ""


def _array(values: Any) -> dict[str, Any]:
    rows = np.linspace(0, len(values) - 1, num=min(SAMPLED_ROWS, len(values)), dtype=np.int64)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.ascontiguousarray(values[int(row)]).tobytes()[:SAMPLE_BYTES])
    return {"dtype": str(values.dtype), "shape": list(values.shape), "sample": digest.hexdigest()}
