"""ResNet-50 in half precision on a GPU, behind the service and in the client's own process; then from JPEG files.

World: `programs/resnet_torch` (float32 weights, run in fp16), an exported program, in a server on the same machine
(`device = "cuda"`, `precision = "fp16"`, batches of at most 128 rows) and by the same engine in the client's process.
- batches of 32, 64 and 128 images in memory (602,112 bytes each): in-process one call after the other; the service asked over
  shm by two threads of one client, so that a batch is on its way while another is run. Both copy to the device and back.
- from files, where the data folder has vision/images: `Model.classify` of the service, batches of 32, the 199 JPEG files read
  round and round until 2,000 are done; against the slower of what decoding alone does with all cores (images/s of the same
  preparation, as many threads as cores) and the in-process rate at batch 32.
Rounds: 5 of 3 s for each batch (--quick: 2 of 1 s and 400 files), order shuffled by the seed, after one call to warm up.
Value: the smallest over the batches of the median ratio service / in-process.
Bars: value >= 0.9; files >= 0.9 x the slower of the two (where there are files).
Checked: answers agree with the in-process ones to 2 % of their spread; every file has labels, in order.
Control: 8 images over HTTP with the numbers written out in JSON, against in-process at batch 32, must miss 0.9.
Skipped without a GPU that torch finds. Published for comparison: Triton 3,558 images/s on a V100, 6,127 on an A100 (TensorRT).
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import vision
from benchmarks.harness import Control, Options, Result, Skip, interleaved, judge, median, spread
from benchmarks.peers.processes import Launch, Served, free_ports, start
from benchmarks.serving import ask, environment, v2_json

NAME = "serve_gpu"
BAR = "on a GPU: ResNet-50 fp16 at batch 32-128 >= 0.9 x in-process; from JPEG >= 0.9 x the slower of decoding and GPU"
BATCHES = (32, 64, 128)
BAR_RATIO = 0.9
JSON_ROWS = 8
"""Of the control: 32 images written out as numbers are above what the JSON of a request may have (32 MiB)."""
DEVICE, PRECISION = "cuda", "fp16"


def run(options: Options) -> Result:
    """Measure the service beside the engine. Raises Skip without a GPU."""
    try:
        import torch  # heavy
    except ImportError:
        raise Skip("torch is not installed here") from None
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise Skip("torch finds no GPU here: not run")
    from benchmarks.programs.resnet_torch import export
    from tenure.serve.client import Model
    from tenure.serve.engines import load_engine

    repeats, seconds, reads = (2, 1.0, 400) if options.quick else (5, 3.0, 2000)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        file = export(scratch / "models" / "resnet50" / "1" / "model.pt2", seed=options.seed, max_rows=max(BATCHES))
        settings = f'device = "{DEVICE}"\nprecision = "{PRECISION}"\nmax_batch_rows = {max(BATCHES)}\n'
        (file.parent.parent / "model.toml").write_text(settings)
        engine = load_engine(file, device=DEVICE, precision=PRECISION, max_batch_rows=max(BATCHES))
        with (
            start("tenure", _launch(scratch / "models"), scratch) as served,
            Model(f"shm://{served.addresses['http']}", "resnet50", timeout_s=120) as model,
        ):
            name = engine.inputs[0].name
            images = {rows: vision.images(rows, seed=options.seed) for rows in BATCHES}
            contenders: dict[str, Callable[[], float]] = {}
            for rows, x in images.items():
                check(np.asarray(model.predict(x)), engine.infer({name: x})["y"])
                contenders[f"here_{rows}"] = partial(rate, lambda x=x: engine.infer({name: x}), rows, seconds, 1)
                contenders[f"service_{rows}"] = partial(rate, lambda x=x: model.predict(x), rows, seconds, 2)
            found = interleaved(contenders, repeats, seed=options.seed)
            print({name: round(median(rates), 1) for name, rates in found.items()}, flush=True)
            naive = json_rate(served, images[BATCHES[0]][:JSON_ROWS]) / median(found[f"here_{BATCHES[0]}"])
            files = from_files(model, options, reads, median(found[f"here_{BATCHES[0]}"]))
        engine.close()
    return judged(found, naive, files, repeats)


def _launch(models: Path) -> Launch:
    (port,) = free_ports(1)
    argv = (sys.executable, "-m", "tenure.serve", "--model", str(models), "--http-port", str(port), "--grpc-port", "off")
    return Launch(argv=(*argv, "--memory-budget", "1GiB"), env=environment(), addresses={"http": f"127.0.0.1:{port}"})


def check(found: Any, expected: Any) -> None:
    """Assert that answers agree."""
    assert found.shape == expected.shape, f"the service gave {found.shape}"
    assert np.abs(found - expected).max() <= 0.02 * expected.std() + 1e-6, "the service answered wrongly"


def rate(call: Callable[[], object], rows: int, seconds: float, threads: int) -> float:
    """Return images/s of so many threads that call one after the other; each makes one call before the time begins."""
    call()
    begun_s = time.perf_counter()

    def work() -> int:
        for count in itertools.count(1):
            call()
            if time.perf_counter() - begun_s >= seconds:
                return count
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        counts = [pool.submit(work) for _ in range(threads)]
        return sum(count.result() for count in counts) * rows / (time.perf_counter() - begun_s)


def json_rate(served: Served, x: Any) -> float:
    """Return images/s of one request with the numbers written out, writing included."""
    begun_s = time.perf_counter()
    ask(served, v2_json("resnet50", x))
    return len(x) / (time.perf_counter() - begun_s)


def from_files(model: Any, options: Options, reads: int, gpu_per_s: float) -> dict[str, float]:
    """Return what the pipeline does and what decoding alone does, images/s; nothing without the files."""
    from tenure.serve.pixels import preparation_for, read_into

    if options.data is None or not (options.data / "vision" / "images").is_dir():
        return {}
    paths = sorted(map(str, (options.data / "vision" / "images").glob("*")))
    how = preparation_for(model.metadata(), normalise="signed")
    asked = list(itertools.islice(itertools.cycle(paths), reads))

    def decode(some: Sequence[str]) -> None:
        row = np.zeros(how.shape, how.dtype)
        for path in some:
            read_into(row, path, how)

    cores = len(os.sched_getaffinity(0))
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        for done in [pool.submit(decode, asked[place::cores]) for place in range(cores)]:
            done.result()
    decode_per_s = reads / (time.perf_counter() - begun_s)
    begun_s = time.perf_counter()
    found = list(model.classify(asked, preparation=how, batch=BATCHES[0]))
    took_s = time.perf_counter() - begun_s
    assert [each.path for each in found] == asked, "the order of the files was lost"
    assert not any(each.error for each in found), "a file has no labels"
    slower = min(decode_per_s, gpu_per_s)
    per_s = reads / took_s
    return {"files_per_s": per_s, "decoding_alone_per_s": decode_per_s, "files_over_slower": per_s / slower}


def judged(found: dict[str, list[float]], naive: float, files: dict[str, float], repeats: int) -> Result:
    """Turn the rates into a verdict."""
    ratios = {rows: [a / b for a, b in zip(found[f"service_{rows}"], found[f"here_{rows}"], strict=True)] for rows in BATCHES}
    worst = min(BATCHES, key=lambda rows: median(ratios[rows]))
    missed = [f"batch {rows}: {median(ratios[rows]):.2f}" for rows in BATCHES if median(ratios[rows]) < BAR_RATIO]
    missed += [f"files: {files['files_over_slower']:.2f}"] if files.get("files_over_slower", 1) < BAR_RATIO else []
    control = Control(
        name="numbers written out in JSON", value=naive, failed=naive < BAR_RATIO, how=f"{naive:.3f} of in-process"
    )
    holds, why = judge(not missed, control)
    details: dict[str, Any] = {f"{name}_per_s": round(median(rates), 1) for name, rates in found.items()}
    details |= {f"over_in_process_{rows}": round(median(ratios[rows]), 4) for rows in BATCHES}
    if not files:
        details["files"] = "not measured: the data folder has no vision/images"
    return Result(
        value=median(ratios[worst]),
        spread=spread(ratios[worst]),
        unit="x in-process on the same GPU",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": "in-process at the same batch", "value": median(found[f"here_{worst}"]), "unit": "images/s"},
        control=control,
        details={**details, **files, "rounds": repeats, "load_1min": os.getloadavg()[0], "cores": os.cpu_count()},
    )
