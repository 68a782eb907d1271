"""From JPEG files to labels, as fast as the processor allows: nothing else than decoding and inference may take time.

Input: the 199 JPEG files of the data folder's vision/images, read round and round until 1,500 reads are done (--quick:
199). Each read opens the file, decodes it and answers it anew; nothing of a picture is kept from one read to the next.
Models: MobileNetV2 1.0 224, the same weights as a TFLite file (uint8) and as an ONNX file (fp32 with QDQ pairs).
Ways: in this process (as many instances of one thread as there are cores), and through a server on this machine that
has the same instances; both by `Model.classify`. All four contenders take turns, in rounds shuffled by the seed.

Reference, measured in the same rounds on one thread while nothing else of ours runs: CPU-seconds per image of making
the model's input out of a file (read, decode, resize, crop, convert) plus CPU-seconds per image of one inference. Cores
divided by their sum is what the machine can do at best if nothing is shared, copied or waited for.

Counts: 1,500 / wall seconds from the first read to the last label, models loaded and warm. Value: the smallest, over the
four contenders, of the median over rounds of rate / reference rate of that round. Details have every contender's rates,
the CPU of decoding alone beside that of the whole preparation, and the ratio against decoding alone (stricter).

Checked before a figure counts: of the first 60 rows of labels.csv 52 have their label on top and 59 among the first five,
for each contender; every read gave an answer, in order; a broken file put among them is reported by its path and skipped.
Control: one picture after the other, no overlap (read, decode, infer in one thread): must stay below the bar.
Left out: loading the models; reading from a cold disk (the files are in the page cache after the first round).
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import Control, Options, Result, Skip, interleaved, judge, median, spread
from tenure.errors import MissingExtra, SpecError
from tenure.serve.client import Model
from tenure.serve.pixels import Preparation, preparation_for, read_into

NAME = "serve_files_to_labels"
BAR = "JPEG files to labels at 0.95 or more of cores / (decode + inference CPU-seconds per image), labels right"
_BAR = 0.95
_CHECKED, _TOP_1, _TOP_5 = 60, 52, 59
_MODELS = {"tflite": "mobilenet_v2_1.0_224_quant.tflite", "onnx": "mobilenet_v2_1.0_224_qdq.onnx"}
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Contender:
    """One model reached one way."""

    model: Model
    alone: Model
    """The same model in this process with one thread, for the reference."""
    how: Preparation
    processes: tuple[int, ...]
    """Of the server, so that their CPU counts too."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one turn of one contender gave."""

    rate: float
    reference: float
    strict: float
    """Reference rate when decoding alone counts, without resizing and converting."""
    prepare_s: float
    decode_s: float
    infer_s: float
    cpu_s: float
    """Of all processes, per image."""


def run(options: Options) -> Result:
    """Measure the bar. Raises Skip without the data or an engine."""
    folder = options.need_data("vision")
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    files = [str(folder / "images" / row["file"]) for row in rows]
    reads, repeats = (len(files), 1) if options.quick else (1500, 5)
    with ExitStack() as opened:
        contenders = _contenders(folder / "models", opened)
        for name, contender in contenders.items():
            _check(name, contender, files, [int(row["class_index"]) + 1 for row in rows])

        def turn(contender: Contender) -> Callable[[], Round]:
            return lambda: _round(contender, files, reads)

        rounds = interleaved({name: turn(each) for name, each in contenders.items()}, repeats, seed=options.seed)
        one_by_one = _one_by_one(contenders["onnx here"], files)
    ratios = {name: [each.rate / each.reference for each in found] for name, found in rounds.items()}
    worst = min(ratios, key=lambda name: median(ratios[name]))
    value = median(ratios[worst])
    control = Control(
        name="one picture after the other",
        value=one_by_one,
        failed=one_by_one < _BAR,
        how=f"{one_by_one:.2f} of the reference: no overlap",
    )
    holds, why = judge(value >= _BAR, control)
    return Result(
        value=value,
        spread=spread(ratios[worst]),
        unit="of the reference rate",
        holds=holds,
        why=why,
        control=control,
        reference={name: median([each.reference for each in found]) for name, found in rounds.items()},
        details={"cores": _CORES, "reads": reads, "worst": worst, **{name: _told(found) for name, found in rounds.items()}},
    )


def _contenders(models: Path, opened: ExitStack) -> dict[str, Contender]:
    found = {}
    for kind, file in _MODELS.items():
        path = models / file
        try:
            here = opened.enter_context(Model(path, instances=_CORES, threads=1))
            alone = opened.enter_context(Model(path, threads=1))
        except (MissingExtra, SpecError) as error:
            raise Skip(f"no engine for {file}: {error}") from error
        how = preparation_for(here.metadata(), normalise="signed" if kind == "onnx" else None)
        url, processes = opened.enter_context(_server(path))
        served = opened.enter_context(Model(url, path.stem))
        found[f"{kind} here"] = Contender(here, alone, how, ())
        found[f"{kind} served"] = Contender(served, alone, how, processes)
    return found


@contextmanager
def _server(model: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tenure.serve", "--model", str(model), "--grpc-port", "off"),
                *("--instances", str(_CORES), "--threads", str(_CORES)),
            ],
            stdout=subprocess.PIPE,
            env={**os.environ, "TENURE_WORKER_DIR": folder},
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the server did not start"
            url = f"http://{json.loads(line)['listening']['http']}"
            with Model(url, model.stem) as asked:
                asked.wait_ready(60)
            children = psutil.Process(process.pid).children(recursive=True)
            yield url, (process.pid, *(child.pid for child in children))
        finally:
            process.terminate()
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _check(name: str, contender: Contender, files: Sequence[str], classes: Sequence[int]) -> None:
    """Assert that labels are right and a broken file is told; this warms the contender up, too."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as broken:
        broken.write(Path(files[0]).read_bytes()[:5000])
        broken.flush()
        asked = [*files[:10], broken.name, *files[10:_CHECKED]]
        found = list(contender.model.classify(asked, preparation=contender.how))
    assert [each.path for each in found] == asked, f"{name}: the order of the files was lost"
    assert found[10].error, f"{name}: a broken file was not reported"
    good = [each for each in found if not each.error]
    assert len(good) == _CHECKED, f"{name}: {_CHECKED - len(good)} good files were skipped"
    top_1 = sum(each.classes[0] == wanted for each, wanted in zip(good, classes, strict=False))
    top_5 = sum(wanted in each.classes for each, wanted in zip(good, classes, strict=False))
    assert (top_1, top_5) == (_TOP_1, _TOP_5), f"{name}: {top_1}/{_CHECKED} top-1 and {top_5}/{_CHECKED} top-5"


def _round(contender: Contender, files: Sequence[str], reads: int) -> Round:
    prepare_s, decode_s, infer_s = _alone(contender, files)
    asked = list(itertools.islice(itertools.cycle(files), reads))
    began_s, cpu_s = time.perf_counter(), _cpu_s(contender)
    found = list(contender.model.classify(asked, preparation=contender.how))
    took_s, cpu_s = time.perf_counter() - began_s, _cpu_s(contender) - cpu_s
    assert [each.path for each in found] == asked, "the order of the files was lost"
    assert not any(each.error for each in found), f"skipped: {next(each for each in found if each.error)}"
    return Round(
        rate=reads / took_s,
        reference=_CORES / (prepare_s + infer_s),
        strict=_CORES / (decode_s + infer_s),
        prepare_s=prepare_s,
        decode_s=decode_s,
        infer_s=infer_s,
        cpu_s=cpu_s / reads,
    )


def _alone(contender: Contender, files: Sequence[str]) -> tuple[float, float, float]:
    """Return CPU-seconds per image of preparing, of decoding alone, and of inference, each on one thread, nothing beside."""
    import simplejpeg  # what the pipeline decodes with

    row = np.zeros((1, *contender.how.shape), contender.how.dtype)
    x = {contender.alone.metadata().inputs[0].name: row}
    contents = [Path(file).read_bytes() for file in files]

    def cpu(step: Callable[[Any], object], over: Sequence[Any]) -> float:
        began_s = time.process_time()
        for each in over:
            step(each)
        return (time.process_time() - began_s) / len(over)

    prepare_s = cpu(lambda file: read_into(row[0], file, contender.how), files)
    decode_s = cpu(lambda content: simplejpeg.decode_jpeg(content, "RGB"), contents)
    contender.alone.predict(x)
    return prepare_s, decode_s, cpu(lambda _: contender.alone.predict(x), range(100))


def _one_by_one(contender: Contender, files: Sequence[str]) -> float:
    """Return the rate of one thread without overlap, as a share of the reference."""
    prepare_s, _, infer_s = _alone(contender, files)
    row = np.zeros((1, *contender.how.shape), contender.how.dtype)
    x = {contender.alone.metadata().inputs[0].name: row}
    began_s = time.perf_counter()
    for file in files:
        read_into(row[0], file, contender.how)
        contender.alone.predict(x)
    return len(files) / (time.perf_counter() - began_s) / (_CORES / (prepare_s + infer_s))


def _cpu_s(contender: Contender) -> float:
    spent = time.process_time()
    for pid in contender.processes:
        times = psutil.Process(pid).cpu_times()
        spent += times.user + times.system
    return spent


def _told(found: Sequence[Round]) -> dict[str, float]:
    return {
        "images_per_s": median([each.rate for each in found]),
        "of_reference": median([each.rate / each.reference for each in found]),
        "of_reference_spread": spread([each.rate / each.reference for each in found]),
        "of_decoding_alone_reference": median([each.rate / each.strict for each in found]),
        "prepare_cpu_ms": median([each.prepare_s for each in found]) * 1e3,
        "decode_cpu_ms": median([each.decode_s for each in found]) * 1e3,
        "infer_cpu_ms": median([each.infer_s for each in found]) * 1e3,
        "pipeline_cpu_ms": median([each.cpu_s for each in found]) * 1e3,
    }
