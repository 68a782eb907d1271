"""Turns a stage's result into artefacts, and checks them: ``python -m tenure.train.export``.

    weights.npz        what was trained, always
    predictions.npz    what the program says of held-out examples (`predictions`), if it has predict(weights, x)
    model.onnx         if it has export(weights, path) too; its labels are compared with the program's

Runs as a task under its own lease (ONNX needs more memory than a worker). Its ``result.json`` tells what was made, and the
share of held-out examples on which ONNX Runtime's label equals the program's.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tenure.errors import CorruptData, MissingExtra, NotFound, SpecError, TenureError, Unsupported
from tenure.train.files import Files
from tenure.train.predictions import held_out_examples, predictions
from tenure.train.programs import Arrays, load_program
from tenure.train.records import Header, read_arrays
from tenure.train.spec import read_spec

T = TypeVar("T")
COMPARED_THROUGH_FROZEN = 512
"""Held-out examples, evenly spread, that a model with a frozen part is compared on."""
COMPARED_AT_ONCE = 512


def export(stage_dir: Path, *, min_equal: float = 0.999) -> dict[str, Any]:
    """Write the artefacts of a stage's result; compare the ONNX model with the program on the held-out examples.

    min_equal: least share of equal labels. Returns path (of the ONNX model, else of the weights), equal (None without ONNX),
    accuracy, examples, note. Raises NotFound without a result, SpecError when the labels differ too often, CorruptData.
    """
    spec = read_spec(stage_dir)
    if not (stage_dir / "store" / "result").exists():
        raise NotFound(f"{stage_dir / 'store'} has no result yet; export after the training stage is done")
    header, weights = _result(stage_dir / "store")
    program: Any = load_program(spec.program, Path(spec.folder), spec.options)
    _, held_out = program.data(spec.inputs)
    folder = stage_dir / "artefacts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "weights.npz"
    _write(path, lambda temp: _save(temp, weights))
    made = {"examples": len(held_out["x"]), "accuracy": header.meta["accuracy"], "equal": None}
    if not callable(getattr(program, "predict", None)):
        return {**made, "path": str(path), "note": "the program has no predict(weights, x): its weights only"}
    if (found := predictions(program, weights, held_out, spec.inputs)) is not None:
        _write(folder / "predictions.npz", lambda temp: _save(temp, found))
    if not callable(getattr(program, "export", None)):
        return {**made, "path": str(path), "note": "the program has no export(weights, path): no ONNX model"}
    onnx = folder / "model.onnx"
    try:
        equal, compared = _write(onnx, lambda temp: _onnx(program, weights, held_out, temp, spec.program, min_equal))
    except (Unsupported, MissingExtra, ImportError) as error:  # what was trained is there; a library may be added later
        return {**made, "path": str(path), "note": f"no ONNX model: {error}"}
    note = f"labels equal the program's on {equal:.2%} of {compared} held-out examples"
    return {**made, "path": str(onnx), "equal": equal, "examples": compared, "note": note}


def _result(store: Path) -> tuple[Header, Arrays]:
    """Return the stage's result. A torn or rotten one is put into quarantine, so that a resumed stage makes it again."""
    try:
        return read_arrays(store / "result")
    except CorruptData as error:
        files = Files()
        files.move(store / "result", store / "quarantine" / f"result.{len(files.names(store / 'quarantine'))}")
        raise CorruptData(f"{error}. It was put into quarantine: resume the run, which makes the result again") from error


def export_command() -> tuple[str, ...]:
    """Return the argv of the task that exports the stage of TENURE_RUN_DIR."""
    return (sys.executable, "-m", "tenure.train.export")


def _write(path: Path, make: Callable[[Path], T]) -> T:
    """Have `path` made at once or not at all; return what making gave."""
    temp = path.with_suffix(".tmp")
    try:
        made = make(temp)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    return made


def _save(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _onnx(program: Any, weights: Arrays, held_out: Arrays, path: Path, name: str, min_equal: float) -> tuple[float, int]:
    """Write the model; return the share of equal labels, and of how many examples."""
    program.export(weights, path)
    equal, compared = _compare(program, weights, held_out, path)
    if equal < min_equal:
        raise SpecError(f'program "{name}": ONNX labels equal its own on {equal:.2%} of held-out; needs {min_equal:.2%}')
    return equal, compared


def _compare(program: Any, weights: Arrays, held_out: Arrays, path: Path) -> tuple[float, int]:
    import onnxruntime  # heavy

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given, label = session.get_inputs()[0].name, session.get_outputs()[0].name
    images = held_out_examples(program, held_out)
    # A frozen part makes each example dear, and was compared by whoever cut it.
    count = len(images) if images is held_out["x"] else min(len(images), COMPARED_THROUGH_FROZEN)
    rows = np.linspace(0, len(images) - 1, num=count, dtype=np.int64)
    equal = 0
    for at in range(0, count, COMPARED_AT_ONCE):
        part = rows[at : at + COMPARED_AT_ONCE]
        answers = session.run([label], {given: np.ascontiguousarray(images[part], dtype=np.float32)})[0]
        own = np.asarray(program.predict(weights, held_out["x"][part]))
        equal += int(np.sum(np.asarray(answers).reshape(-1) == own.reshape(-1)))
    return equal / count, count


def main() -> int:
    """Export the stage that TENURE_RUN_DIR names (or the first argument). Returns the exit status."""
    stage_dir = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TENURE_RUN_DIR", ""))
    worker_dir = os.environ.get("TENURE_WORKER_DIR")
    try:
        result: dict[str, Any] = {"state": "done", **export(stage_dir)}
    except TenureError as error:
        result = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a program's own error
        traceback.print_exc()
        result = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
    if worker_dir:
        Files().replace(Path(worker_dir) / "result.json", json.dumps(result).encode())
    sys.stderr.write(json.dumps(result) + "\n")
    return 1 if result["state"] == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())
