"""What a container made from the closure costs at start, against the bare process.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models` in our server, one thread; files in the page cache.
Contenders, interleaved, 15 rounds after 2 of warm-up (--quick: 5 after 1), each a start of its own:
- process: `python -m tenure.serve` from the full environment;
- container: the `oci` form loaded into an engine of the benchmark's own, host network, the same cpus and no memory bound;
- hardened: the same container as the product runs it in a lease (own network, seccomp, read-only root, no capabilities).
Time: from just before the start is asked for (the program's exec; the engine's create + start through its socket) to the end of
the first right answer, asked by HTTP every 5 ms from then on. Removing what was started is not timed.
Bar: median of container / median of process at most 1.1 (`value`); hardened is told beside, no bar.
Checked: the answer is the engine's own, in every round.
Control: the container from the same closure without its byte code, so that every module is compiled anew, must miss the bar.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests import docker_engine

from benchmarks import image_answers as asking
from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks.harness import ROOT, Control, Options, Result, Skip, interleaved, judge, median, spread
from benchmarks.image_player import Player, Said
from tenure.images.build import Made, make_oci_form
from tenure.images.store import read_image
from tenure.images.tree import make_tree
from tenure.protocols import StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes.container import ContainerRuntime
from tenure.runtimes.container_engine import Engine
from tenure.runtimes.container_images import ensure_loaded

NAME = "image_cold_start"
BAR = "container from the closure to its first answer within 1.1 times the bare process"
MAX_RATIO = 1.1
KIND = "perceptron"
ANSWER_MAX_S, EVERY_S = 60.0, 0.005
Ended = Callable[[], None]
Start = Callable[[int], Ended]
"""Start the service on a port; return how it is ended and removed."""


def run(options: Options) -> Result:
    """Start each contender in turn, until its first answer, and see the control miss the bar."""
    builds.need_tools()
    for why in (builds.cannot_run("root"), builds.cannot_run("oci"), builds.available("onnxruntime")):
        if why:
            raise Skip(why)
    rounds, warm_up = (5, 1) if options.quick else (15, 2)
    with ExitStack() as stack:
        folder = stack.enter_context(builds.workshop())
        engine = stack.enter_context(_engine())
        image = builds.build("onnxruntime", KIND, folder, forms=("root", "oci"), seed=options.seed)
        plain = _without_code(image, folder / "plain")
        expected = asking.answers(image, "process", options.seed)[:1]
        starts: dict[str, Start] = {
            "process": lambda port: _process(image, port),
            "container": lambda port: _container(engine, image.folder, port),
            "hardened": _hardened(stack, engine, image.folder, folder),
            "control": lambda port: _container(engine, plain, port),
        }
        contenders = {name: partial(_first_answer, start, image, expected, options.seed) for name, start in starts.items()}
        found = interleaved(contenders, rounds, seed=options.seed, warm_up=warm_up)
    took = {name: median(values) for name, values in found.items()}
    ratio = took["container"] / took["process"]
    slow = took["control"] / took["process"]
    how = f"{slow:.2f} times the process"
    control = Control(name="no byte code in the image", value=slow, failed=slow > MAX_RATIO, how=how)
    holds, why = judge(ratio <= MAX_RATIO, control)
    return Result(
        value=ratio,
        spread=spread([one / two for one, two in zip(found["container"], found["process"], strict=True)]),
        unit="container by process",
        holds=holds,
        why=why,
        reference={"process_s": took["process"]},
        control=control,
        details={f"{name}_s": value for name, value in took.items()}
        | {f"{name}_iqr_s": spread(values) for name, values in found.items()},
    )


def _first_answer(start: Start, image: builds.Built, expected: list[Said], seed: int) -> float:
    """Return the seconds from before the start to the end of the first right answer."""
    (port,) = builds.free_ports(1)
    begun_s = time.perf_counter()
    ended = start(port)
    try:
        ready = f"http://127.0.0.1:{port}/v2/models/{KIND}/ready"
        while True:
            try:
                with urlopen(ready, timeout=5.0) as answer:
                    assert answer.status == 200
                    break
            except (URLError, OSError):
                assert time.perf_counter() - begun_s < ANSWER_MAX_S, "no answer in time"
                time.sleep(EVERY_S)
        with Player({"http": f"127.0.0.1:{port}"}, image.served) as player:
            said = [player.infer(asking.requests(models.service("onnxruntime"), seed)[0])]
        took_s = time.perf_counter() - begun_s
        cell = asking.compare("first answer", expected, said, emulated=False)
        assert not cell.wrong, cell.wrong
        return took_s
    finally:
        ended()


def _options(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--http-port", str(port), "--grpc-port", "off", "--threads", "1"]


def _process(image: builds.Built, port: int) -> Ended:
    argv = [sys.executable, "-m", "tenure.serve", "--model", str(image.model), *_options(port)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        process.wait(30.0)

    return end


def _container(engine: Engine, folder: Path, port: int) -> Ended:
    """Start a container on the machine's own network."""
    manifest = json.loads((folder / "image.json").read_text())
    image_id = ensure_loaded(engine, str(folder))
    body = {
        "Image": image_id,
        "Cmd": _options(port),
        "Env": [f"{name}={value}" for name, value in manifest["env"].items()],
        "HostConfig": {"NetworkMode": "host", "NanoCpus": (os.cpu_count() or 1) * 10**9},
    }
    made = engine.call("POST", "/containers/create", body)["Id"]
    engine.call("POST", f"/containers/{made}/start")
    return lambda: engine.call("DELETE", f"/containers/{made}", force=True, v=True)


def _hardened(stack: ExitStack, engine: Engine, folder: Path, work: Path) -> Start:
    """Return how a container is started as in a lease: by the container runtime itself."""
    runtime = ContainerRuntime(work / "state", socket=engine.path)
    stack.callback(runtime.close)
    clock, manifest = SystemClock(), json.loads((folder / "image.json").read_text())
    count = iter(range(1, 1000))

    def start(port: int) -> Ended:
        lease = f"lease-{next(count)}"
        place = work / "leases" / lease
        spec = StartSpec(
            lease_id=lease,
            fence=1,
            attempt=1,
            argv=(*manifest["entry"], *_options(port), "--host", "0.0.0.0"),
            env=manifest["env"],
            workdir=str(place),
            worker_dir=str(place),
            log_path=f"{place}.log",
            envelope=Envelope(cpus=float(os.cpu_count() or 1), memory_bytes=1 << 30),
            deadline_boot_s=clock.boot_s() + 120.0,
            boot_id=clock.boot_id(),
            network="tenant:bench",
            image=str(folder),
            ports={"http": port},
        )
        handle = runtime.start(spec)

        def end() -> None:
            runtime.stop(handle, grace_s=0.0, fence=1)
            runtime.wait(handle, 30.0)
            runtime.forget(lease)

        return end

    return start


def _without_code(image: builds.Built, place: Path) -> Path:
    """Make an image of the same closure, sources alone: every module is compiled at every start."""
    from tenure.images.lock import read_lock
    from tenure.images.repair import sources_of

    stored = read_image(image.folder)
    closure = read_lock(image.folder / builds.LOCK)
    place.mkdir()
    make_tree(closure, place / "root", sources={inside: Path(here) for inside, here in sources_of(closure).items()})
    manifest = replace(stored.manifest, name="plain", id="f" * 64, forms={})
    record = make_oci_form(Made(tree=place / "root", folder=place, manifest=manifest, machine=closure.machine))
    found = json.loads((image.folder / "image.json").read_text())
    details = dict(record.details)
    found["forms"] = {
        "oci": {"path": record.path, "size_bytes": record.size_bytes, "sha256": record.sha256, "details": details}
    }
    (place / "image.json").write_text(json.dumps(found))
    shutil.rmtree(place / "root")
    return place


@contextmanager
def _engine() -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="tb-"))
    made = docker_engine.Engine(folder, live_restore=False)
    try:
        made.start()
    except docker_engine.CannotStart as error:
        raise Skip(f"no Docker Engine comes up here: {error}") from error
    try:
        yield Engine(str(made.socket))
    finally:
        assert made.process is not None
        made.process.terminate()
        made.process.wait(60.0)
        shutil.rmtree(folder, ignore_errors=True)
