"""A million mutated requests at a real server, hostile clients beside them: nothing of it shows to anybody else.

Definition. One server (`python -m tenure.serve`, as it comes, one thread per model) serves two identities-like models: `same`,
which all the fuzz is aimed at, and `double`, which a witness asks. At the same time:

- one thread sends mutated HTTP requests and one mutated gRPC calls, drawn from the seed: bytes and structure of heads, JSON,
  binary sizes, shared-memory parameters, protobuf, gRPC frames, HTTP/2 frames, HPACK (`benchmarks/fuzz/http1.py` and `grpc.py`
  have the tables). Where the mutation leaves the framing whole, 32 share a write and a connection, and each must be answered:
  what comes before or after a bad request is no business of it. What may break the framing goes alone and must be answered or
  hung up on within 20 s. One request in twelve is valid and must come back right, on the same connections;
- 80 clients are slow (a byte every 0.3 s), half-open, silent, never read their answers, or reset every stream, and come again
  when they are hung up on;
- the witness asks `double` by HTTP and gRPC every 20 ms, and checks each answer.

The bar holds when at least a million (quick: 20,000) mutated requests were sent and
- the server is the same process, and its instances are the same processes, as before;
- the witness saw only right answers (being told to wait, with when to try again, is one), none later than 10 s;
- no valid request among the mutated ones was answered wrong, no framed one went unanswered, nothing was stuck;
- no status says that the server is at fault (500, INTERNAL, UNKNOWN), but for what gRPC's own rules call INTERNAL;
- PSS of the whole tree never passed: after warm-up + the memory budget + 64 MB + 5 %; descriptors of the server are, once all
  have hung up, within 16 of those before.

Control: the same HTTP requests at a server of the standard library that trusts what it reads; it must fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from multiprocessing import shared_memory
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil

from benchmarks.fuzz import grpc as fuzz_grpc
from benchmarks.fuzz import http1 as fuzz_http
from benchmarks.fuzz.crowd import WITNESS_MAX_S, Crowd, Witness
from benchmarks.fuzz.report import Report
from benchmarks.harness import ROOT, Control, Options, Result, Skip, judge

NAME = "serve_fuzz"
BAR = ">= 1,000,000 mutated HTTP and gRPC requests and hostile clients: same processes, memory bounded, others' answers right"
WANTED, WANTED_QUICK = 1_000_000, 20_000
MAX_S, MAX_QUICK_S = 1500.0, 60.0
BUDGET_BYTES = 256 << 20
SLACK_BYTES = 64 * 10**6
ALONE_SHARE = 0.15
"""Of batches that go out request by request; they are smaller ones."""
CONTROL_BATCHES = 40
REGION_BYTES = 1 << 16
SAY_EVERY_S = 15.0


def run(options: Options) -> Result:
    """Fuzz, judge, and see the control fail."""
    try:
        import hpack  # noqa: F401
        import onnx  # noqa: F401
    except ImportError as error:
        raise Skip(f"{error.name} is missing: install the development extra") from error
    wanted, max_s = (WANTED_QUICK, MAX_QUICK_S) if options.quick else (WANTED, MAX_S)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        x, y = _write_models(Path(folder))
        details, report = _fuzz(Path(folder), x, y, wanted=wanted, max_s=max_s, seed=options.seed)
        control = _control(options.seed)
    broken = list(report.failures)
    if report.mutated < wanted:
        broken.append(f"{report.mutated:,} mutated requests in {max_s:g} s are fewer than {wanted:,}")
    holds, why = judge(not broken, control)
    return Result(
        value=float(report.mutated),
        spread=None,
        unit="requests",
        holds=holds,
        why=" | ".join(broken[:5]) or why,
        control=control,
        details={
            **details,
            "failed": report.failed,
            "outcomes": report.table(),
            "reasons": dict(report.reasons.most_common(60)),
            "failures": broken,
        },
    )


def _fuzz(folder: Path, x: np.ndarray, y: np.ndarray, *, wanted: int, max_s: float, seed: int) -> tuple[dict[str, Any], Report]:
    report = Report()
    with _server(folder) as (process, endpoints), _regions() as regions:
        http, grpc = (_address(endpoints[kind]) for kind in ("http", "grpc"))
        tree = psutil.Process(process.pid)
        _register(http, regions)
        witness = Witness(endpoints, x, y, report)
        witness.start()
        _warm_up(http, grpc, seed, regions)
        before = {child.pid for child in tree.children(recursive=True)}
        files = tree.num_fds()
        warm_bytes = _pss(tree)
        crowd = Crowd(http, grpc)
        crowd.start()
        watch = _Watch(tree)
        watch.start()
        began_s = said_s = time.monotonic()
        enough = threading.Event()
        senders = [
            threading.Thread(target=_send, args=(module, address, n + 2 * seed, regions, report, enough), daemon=True)
            for n, (module, address) in enumerate(((fuzz_http, http), (fuzz_grpc, grpc)))
        ]
        for sender in senders:
            sender.start()
        while (
            report.mutated < wanted and time.monotonic() - began_s < max_s and process.poll() is None and report.failed < 1000
        ):
            time.sleep(0.1)
            if time.monotonic() > said_s + SAY_EVERY_S:
                said_s = time.monotonic()
                print(f"{report.mutated:,} mutated requests in {said_s - began_s:.0f} s, {report.failed} failures", flush=True)
        took_s = time.monotonic() - began_s
        enough.set()
        for sender in senders:
            sender.join(2 * fuzz_http.ANSWER_MAX_S + 10)
        crowd.stop()
        witness.stop()
        watch.stop()
        after = {child.pid for child in tree.children(recursive=True)} if process.poll() is None else set()
        details = {
            "mutated_per_s": report.mutated / took_s,
            "took_s": took_s,
            "witness": _latencies(witness),
            "hostile_rounds": dict(crowd.rounds),
            "pss_bytes": {"warm": warm_bytes, "peak": watch.peak_bytes, "end": _pss(tree) if after else 0},
            "descriptors": {"before": files, "end": _settled_files(tree, files) if after else 0},
            "server_cpu_s": watch.cpu_s,
        }
        if process.poll() is not None:
            report.fail(f"the server ended with {process.returncode}")
        elif after != before:
            report.fail(f"instances were started again: {before} before, {after} after")
        allowed = 1.05 * warm_bytes + BUDGET_BYTES + SLACK_BYTES
        if watch.peak_bytes > allowed:
            report.fail(f"memory rose to {watch.peak_bytes / 1e6:.0f} MB, allowed are {allowed / 1e6:.0f}")
        if after and details["descriptors"]["end"] > files + 16:
            report.fail(f"{details['descriptors']['end']} descriptors are open at the end, {files} were before")
        if not witness.latencies_s or max(witness.latencies_s) > WITNESS_MAX_S:
            report.fail(f"the witness waited longer than {WITNESS_MAX_S:g} s, or was never answered")
    return details, report


def _send(
    module: Any, address: tuple[str, int], seed: int, regions: list[str], report: Report, enough: threading.Event
) -> None:
    sender, rng = module.Sender(address, module.Cases(seed, regions), report), Random(seed)
    try:
        while not enough.is_set():
            sender.batch(alone=rng.random() < ALONE_SHARE)
    except Exception as error:
        report.fail(f"the generator itself failed: {error!r}")
        raise
    finally:
        sender.close()


def _warm_up(http: tuple[str, int], grpc: tuple[str, int], seed: int, regions: list[str]) -> None:
    """Send what is sent later, for a moment: every path has run once, every cache is as large as it gets."""
    report = Report()
    for module, address in ((fuzz_http, http), (fuzz_grpc, grpc)):
        sender = module.Sender(address, module.Cases(seed + 1000, regions), report)
        for number in range(40):
            sender.batch(alone=number % 8 == 7)
        sender.close()


class _Watch(threading.Thread):
    """Samples memory of a process tree."""

    def __init__(self, tree: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._tree, self._leave = tree, threading.Event()
        self.peak_bytes = 0
        self.cpu_s = 0.0

    def run(self) -> None:
        while not self._leave.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, _pss(self._tree))

    def stop(self) -> None:
        self._leave.set()
        self.join(10)
        if self._tree.is_running():
            times = self._tree.cpu_times()
            self.cpu_s = times.user + times.system


def _pss(tree: psutil.Process) -> int:
    """Return the proportional memory of a tree, bytes; what just ended counts nothing."""
    total = 0
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            text = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def _settled_files(tree: psutil.Process, before: int) -> int:
    """Return the open descriptors once clients that hung up have been noticed."""
    end_s = time.monotonic() + 15
    while (found := tree.num_fds()) > before and time.monotonic() < end_s:
        time.sleep(0.2)
    return found


def _latencies(witness: Witness) -> dict[str, float]:
    sorted_s = sorted(witness.latencies_s) or [0.0]
    at = {name: sorted_s[min(len(sorted_s) - 1, int(len(sorted_s) * q))] for name, q in (("p50_s", 0.5), ("p99_s", 0.99))}
    return {"answers": len(witness.latencies_s), "overloaded": witness.overloaded, **at, "max_s": sorted_s[-1]}


@contextmanager
def _server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    argv = [sys.executable, "-m", "tenure.serve", "--model", str(folder), "--threads", "1"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server did not start: {(folder / 'server.log').read_text()[-2000:]}"
        yield process, json.loads(line)["listening"]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def _regions() -> Iterator[list[str]]:
    """Make shared memory that requests name; give the name that it is registered by, and its key."""
    memory = shared_memory.SharedMemory(create=True, size=REGION_BYTES)
    try:
        yield ["r0", f"/{memory.name.lstrip('/')}"]
    finally:
        memory.close()
        memory.unlink()


def _register(http: tuple[str, int], regions: list[str]) -> None:
    name, key = regions
    client = HTTPConnection(*http, timeout=10)
    body = json.dumps({"key": key, "offset": 0, "byte_size": REGION_BYTES})
    client.request("POST", f"/v2/systemsharedmemory/region/{name}/register", body)
    answer = client.getresponse()
    assert answer.status == 200, answer.read()
    client.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _write_models(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write both models; return inputs of the witness's and their answers."""
    from onnx import TensorProto, helper, save

    for name, node in (("same", ("Identity", ["x"])), ("double", ("Add", ["x", "x"]))):
        graph = helper.make_graph(
            [helper.make_node(*node, ["y"])],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", fuzz_http.WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", fuzz_http.WIDTH])],
        )
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / f"{name}.onnx")
    x = np.random.default_rng(7).standard_normal((64, fuzz_http.WIDTH)).astype(np.float32)
    return x, x + x


def _control(seed: int) -> Control:
    """Send the HTTP requests to a server that trusts what it reads."""
    report = Report()
    argv = [sys.executable, "-m", "benchmarks.programs.naive_server"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            sender = fuzz_http.Sender(_address(process.stdout.readline().strip()), fuzz_http.Cases(seed, ["r0"]), report)
            for _ in range(CONTROL_BATCHES):
                sender.batch(alone=False)
            sender.close()
        finally:
            process.kill()
    how = report.failures[0][:200] if report.failures else "it failed nothing"
    name = "http.server that trusts what it reads"
    return Control(name=name, value=float(report.failed), failed=report.failed > 0, how=how)
