"""Turns a stage's result into ``artefacts/model.onnx`` and checks it: ``python -m tenure.train.export``.

Runs as a task under its own lease (needs ONNX, so more memory than a worker). Its ``result.json`` tells the share of
held-out examples on which ONNX Runtime's label equals the program's, and both accuracies.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tenure.errors import NotFound, SpecError, TenureError
from tenure.train.files import Files
from tenure.train.programs import Arrays, load_program
from tenure.train.records import read_arrays
from tenure.train.spec import read_spec


def export(stage_dir: Path, *, min_equal: float = 0.999) -> dict[str, Any]:
    """Write the model of a stage's result and compare it with the program on the held-out examples.

    min_equal: least share of equal labels. Returns path, equal, accuracy, examples, note.
    Raises NotFound without a result, SpecError when the program can't export or the labels differ too often, CorruptData.
    """
    spec = read_spec(stage_dir)
    if not (stage_dir / "store" / "result").exists():
        raise NotFound(f"{stage_dir / 'store'} has no result yet; export after the training stage is done")
    header, weights = read_arrays(stage_dir / "store" / "result")
    program: Any = load_program(spec.program, Path(spec.folder), spec.options)
    if not callable(getattr(program, "export", None)) or not callable(getattr(program, "predict", None)):
        raise SpecError(f'program "{spec.program}" has no export(weights, path) and predict(weights, x); give it both')
    _, held_out = program.data(spec.inputs)
    path = stage_dir / "artefacts" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".tmp")
    program.export(weights, temp)
    equal = _compare(program, weights, held_out, temp)
    if equal < min_equal:
        raise SpecError(
            f'program "{spec.program}": ONNX labels equal its own on {equal:.2%} of held-out; needs {min_equal:.2%}'
        )
    temp.replace(path)
    examples = len(held_out["x"])
    note = f"labels equal the program's on {equal:.2%} of {examples} held-out examples"
    return {"path": str(path), "equal": equal, "examples": examples, "accuracy": header.meta["accuracy"], "note": note}


def export_command() -> tuple[str, ...]:
    """Return the argv of the task that exports the stage of TENURE_RUN_DIR."""
    return (sys.executable, "-m", "tenure.train.export")


def _compare(program: Any, weights: Arrays, held_out: Arrays, path: Path) -> float:
    import onnxruntime  # heavy

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.ascontiguousarray(held_out["x"], dtype=np.float32)
    label = session.get_outputs()[0].name
    answers = session.run([label], {session.get_inputs()[0].name: x})[0]
    return float(np.mean(np.asarray(answers).reshape(-1) == np.asarray(program.predict(weights, x)).reshape(-1)))


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
