"""Guests of one service for the benchmarks of microVMs: the product's form, and the same files all in memory, asked over HTTP.

Not here: what is judged (`image_microvm_start`, `image_memory_floor`).
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
import shutil
import stat
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import image_builds as builds
from benchmarks.harness import ROOT, Skip
from benchmarks.image_grammar import Run, Start
from benchmarks.peers.processes import free_ports
from tenure.cpio import Archive
from tenure.errors import TenureError
from tenure.images.microvm import check_tools
from tenure.images.microvm_kernel import find_kernel
from tenure.protocols import Exit, StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes.microvm import MicrovmRuntime
from tenure.runtimes.microvm_machine import QEMU
from tenure.serve.client import Model

MIB = 1 << 20
KERNEL = ROOT / ".cache/guest"
"""Where tools/guest.sh puts a kernel."""
ASK_S = 0.02
"""Between two tries to get a first answer."""
TOLERANCE = 1e-5
"""Emulated arithmetic may round a fused multiplication and addition otherwise."""
Rows = list[list[float]]


@contextmanager
def service(kind: str = "perceptron") -> Iterator[builds.Built]:
    """Yield ONNX Runtime's service as an image of forms root and microvm. Raises Skip where guests can't be made."""
    builds.need_tools()
    if shutil.which(QEMU) is None:
        raise Skip(f"no {QEMU} here")
    try:
        check_tools()
        find_kernel(KERNEL)
    except TenureError as error:
        raise Skip(f"{error}; tools/guest.sh gets what is missing") from error
    if why := builds.available("onnxruntime"):
        raise Skip(why)
    if kept := os.environ.get("TENURE_BENCH_IMAGE"):  # of an earlier run: analysing takes longer than measuring
        home = Path(kept)
        name = f"onnxruntime-{kind}"
        yield builds.Built(engine="onnxruntime", kind=kind, model=Path(), home=home, name=name, folder=builds.find(home, name))
        return
    with builds.workshop() as folder:
        (folder / "home/kernels").mkdir(parents=True)
        (folder / "home/kernels/guest").symlink_to(KERNEL)
        yield builds.build("onnxruntime", kind, folder, forms=("root", "microvm"))


def in_memory(image: builds.Built, place: Path) -> Path:
    """Write the image once more with all its files in the initial memory disk, packed by gzip -1; return its folder."""
    manifest = image.manifest
    record = manifest["forms"]["microvm"]
    folder = place / "microvm"
    folder.mkdir(parents=True)
    source = image.folder / record["path"]
    os.link(source / "kernel", folder / "kernel")
    archive = Archive()
    for name in ("dev", "proc", "run", "sys", "tmp"):
        archive.folder(name)
    for path in sorted(image.root.rglob("*")):
        inside, info = str(path.relative_to(image.root)), path.lstat()
        if stat.S_ISLNK(info.st_mode):
            archive.link(inside, os.readlink(path))
        elif stat.S_ISDIR(info.st_mode):
            archive.folder(inside)
        else:
            archive.file(inside, path.read_bytes(), stat.S_IMODE(info.st_mode))
    packed = gzip.compress(archive.to_bytes(), 1, mtime=0)
    initrd = (source / "initrd").read_bytes()
    (folder / "initrd").write_bytes(initrd + packed + bytes(-(len(initrd) + len(packed)) % 4))
    (folder / "none").write_bytes(bytes(512))
    hashes = {
        f"{name}_sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("kernel", "initrd", "none")
    }
    record["details"] |= {"root": "none", "root_type": ""} | hashes
    (place / "image.json").write_text(json.dumps(manifest))
    return place


class Guest:
    """One start of an image as a microVM."""

    def __init__(self, runtime: MicrovmRuntime, folder: Path, image: Path, *, memory_bytes: int, number: int) -> None:
        manifest = json.loads((image / "image.json").read_text())
        self.http, self.grpc = free_ports(2)
        self._runtime = runtime
        clock, lease = SystemClock(), f"guest-{number}"
        argv = [*manifest["entry"], "--http-port", str(self.http), "--grpc-port", str(self.grpc), "--threads", "1"]
        spec = StartSpec(
            lease_id=lease,
            fence=1,
            attempt=1,
            argv=tuple(argv),
            env={**manifest["env"], "OMP_NUM_THREADS": "1"},
            workdir=str(folder / lease),
            worker_dir=str(folder / lease),
            log_path=str(folder / f"{lease}.log"),
            envelope=Envelope(cpus=1.0, memory_bytes=memory_bytes, disk_bytes=64 * MIB),
            deadline_boot_s=clock.boot_s() + 600.0,
            boot_id=clock.boot_id(),
            network="none",
            image=str(image),
            ports={"http": self.http, "grpc": self.grpc},
        )
        self.begun_s = time.monotonic()
        self._handle = runtime.start(spec)

    def first_answer_s(self, rows: Sequence[Sequence[float]], expected: dict[str, Rows], *, max_s: float) -> float | None:
        """Return the time from the start to a first right answer; None when none came in time. Asserts that it is right."""
        while time.monotonic() - self.begun_s < max_s and self._runtime.wait(self._handle, 0.0) is None:
            try:
                found = ask(self.http, rows, timeout_s=max(0.1, max_s - (time.monotonic() - self.begun_s)))
            except (OSError, http.client.HTTPException):
                time.sleep(ASK_S)
                continue
            took_s = time.monotonic() - self.begun_s
            assert alike(found, expected), f"a guest answered {found}, not {expected}"
            return took_s
        return None

    def end(self, grace_s: float = 20.0) -> Exit:
        """Have it leave; return how it ended. Asserts that it has."""
        self._runtime.stop(self._handle, grace_s=grace_s, fence=1)
        ended = self._runtime.wait(self._handle, grace_s + 30.0)
        assert ended is not None, "a guest did not end"
        self._runtime.forget(self._handle.lease_id)
        return ended

    def ended(self) -> Exit | None:
        """Return how it has ended by itself; None while it runs."""
        return self._runtime.wait(self._handle, 0.0)

    def accel(self) -> str:
        """Return what carries it."""
        return self._runtime.accel_of(self._handle)


def rows_of(count: int, seed: int) -> Rows:
    """Return rows of the models' input."""
    found: Rows = np.random.default_rng(seed).random((count, 64), dtype=np.float32).tolist()
    return found


def ask(port: int, rows: Sequence[Sequence[float]], *, timeout_s: float, model: str = "perceptron") -> dict[str, Rows]:
    """Return a model's outputs for rows, by JSON. Raises OSError."""
    flat = [value for row in rows for value in row]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), 64], "data": flat}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/{model}/infer", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        found: dict[str, Any] = json.load(answer)
    return {output["name"]: np.reshape(output["data"], output["shape"]).tolist() for output in found["outputs"]}


def ask_client(target: str, rows: Sequence[Sequence[float]], *, timeout_s: float, model: str = "perceptron") -> dict[str, Rows]:
    """As `ask`, by the public client: binary tensors over HTTP, or gRPC. target: ``http://`` or ``grpc://HOST:PORT``."""
    shm = False if target.startswith("http") else None
    with Model(target, model, timeout_s=timeout_s, shm=shm) as client:
        answer, _ = client.predict_timed(np.asarray(rows, dtype=np.float32))
    return {name: value.tolist() for name, value in answer.items()}


def alike(found: dict[str, Rows], expected: dict[str, Rows]) -> bool:
    """Return whether two answers are the same within the tolerance."""
    return found.keys() == expected.keys() and all(
        np.allclose(found[name], expected[name], rtol=TOLERANCE, atol=TOLERANCE) for name in expected
    )


def bare_answer(image: builds.Built, rows: Sequence[Sequence[float]]) -> dict[str, Rows]:
    """Return what the bare process answers: the service of the image, out of its own tree's model."""
    run = Run(service=image.engine, number=0, start=Start(model=image.kind), exchanges=(), end="SIGTERM")
    model = image.root / builds.model_inside(image).lstrip("/")
    life = builds.in_process(image.engine, model, run)
    try:
        assert life.wait_listening(), f"the bare process does not listen: {life.output()}"
        port = int(str(life.addresses["http"]).rstrip("/").rpartition(":")[2])
        return ask(port, rows, timeout_s=30.0)
    finally:
        life.close()
