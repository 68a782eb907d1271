"""What the serving benchmarks share: starting ours and others' servers on the same models, and the load tools read alike.

Not here: what is measured (the benchmarks), what a peer is made of (`benchmarks.peers`).
"""

from __future__ import annotations

import csv
import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import peers
from benchmarks.harness import ROOT, Skip, median, spread
from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, Order, Served, free_ports, start
from benchmarks.peers.programs.procs import cpu_s, tree

OURS = "tenure"
PATIENCE_S = 120.0
"""Bound of one run of a load tool beyond the time it was asked to measure."""
_WRK = """
local file = io.open("@BODY@", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
@HEADERS@
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\n{"count":%d,"duration_us":%d,"bytes":%d,"errors":%d,"p50_us":%d,"p99_us":%d}\\n', summary.requests,
    summary.duration, summary.bytes, e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50),
    latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one run of a load tool saw."""

    per_s: float
    """Requests answered per second."""
    p50_ms: float
    p99_ms: float
    server_us: float
    """CPU time of the server's processes per request, microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request, as raw bytes."""

    path: str
    headers: Mapping[str, str]
    body: bytes


def environment() -> dict[str, str]:
    """Return the environment in which this checkout's package is the one imported."""
    folders = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


class Dialogue:
    """A program of `peers/programs` that answers one JSON line with another. Started at once, awaited by `with`."""

    def __init__(
        self, label: str, python: Path | str, program: Path, told: Mapping[str, Any], *, within: Sequence[str] = ()
    ) -> None:
        """within: a command that runs another, such as in a network namespace."""
        self.label = label
        pipe = subprocess.PIPE
        argv = [*within, str(python), str(program), json.dumps(told)]
        self._process = subprocess.Popen(argv, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self) -> Self:
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        try:
            self._process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, ValueError, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Send one order and return the answer. Asserts that the program goes on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            said = self._process.communicate()[1].strip().splitlines() or [f"no answer within {PATIENCE_S:g} s"]
            raise AssertionError(f"the {self.label} ended: {' | '.join(said[-4:])[-600:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def serve(
    name: str, models: Mapping[str, Path], scratch: Path, *options: str, threads: int = 2, rows: int = 32, quiet: bool = False
) -> Served:
    """Start ours (`tenure`) or a peer with these models; a peer that is not installed is installed first.

    options: further ones of our command line. rows, quiet: see `Order`, for peers.
    Raises Skip when the peer can't be had here or does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
    if name == OURS:
        return start(name, _ours(models, folder / "models", threads, options), folder)
    module = peers.peer(name)
    assert isinstance(module, peers.ServerPeer), f"{name} is no server"
    order = Order(models=models, folder=folder, threads=threads, max_batch_rows=rows, quiet=quiet)
    return start(name, module.launch(module.install(homes.default_root()), order), folder)


def tool(name: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return command and environment of a load tool or interpreter, installed where it was not. Raises Skip."""
    module = peers.peer(name)
    assert isinstance(module, peers.ToolPeer), f"{name} is no tool"
    argv, extra = module.command(module.install(homes.default_root()))
    return argv, {**os.environ, **extra}


def v2_binary(model: str, x: Any) -> Request:
    """Return a request for output y of one float32 tensor x, in the protocol's binary form."""
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Request(path=f"/v2/models/{model}/infer", headers=headers, body=head + x.tobytes())


def v2_json(model: str, x: Any) -> Request:
    """Return the same request with its numbers written out in JSON."""
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    return Request(path=f"/v2/models/{model}/infer", headers={"Content-Type": "application/json"}, body=body)


def ask(served: Served, request: Request) -> bytes:
    """Send one request and return the answer's body without its protocol header. Asserts status 200."""
    connection = http.client.HTTPConnection(served.addresses["http"], timeout=PATIENCE_S)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, f"{served.name} answered {answer.status}: {body[:200]!r}"
        return body[int(answer.headers.get("Inference-Header-Content-Length", 0)) :]
    finally:
        connection.close()


def check_tensor(served: Served, request: Request, expected: Any) -> None:
    """Assert that a request is answered with these float32 numbers."""
    found = np.frombuffer(ask(served, request), np.float32)
    assert np.allclose(found, np.asarray(expected).reshape(-1), rtol=1e-3, atol=1e-4), f"{served.name} answered wrongly"


def wrk(served: Served, request: Request, clients: int, seconds: float, *, answer_bytes: int = 0) -> Load:
    """Run wrk with one thread and so many connections, each with one request at a time.

    Asserts that nothing failed, and that an answer has `answer_bytes` on average at least.
    """
    argv, env = tool("wrk")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(request.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in request.headers.items())
        script = _WRK.replace("@BODY@", f"{folder}/body").replace("@HEADERS@", headers)
        (Path(folder) / "post.lua").write_text(script)
        url = f"http://{served.addresses['http']}{request.path}"
        # wrk takes whole seconds only; it is ended by its own clock, and no part of a second is lost by rounding up
        options = ["-t", "1", "-c", str(clients), "-d", f"{max(1, round(seconds))}s", "--timeout", "30s"]
        before_s = cpu_s(tree(served.pid))
        out = _run([*argv, *options, "-s", f"{folder}/post.lua", url], env, seconds)
        used_s = cpu_s(tree(served.pid)) - before_s
    told = json.loads(out.strip().splitlines()[-1])
    assert told["count"], f"{served.name} answered nothing over HTTP"
    assert not told["errors"], f"{served.name}: {told['errors']} of {told['count']} requests failed"
    assert told["bytes"] >= told["count"] * answer_bytes, f"{served.name} gave answers that are too short"
    return Load(
        per_s=told["count"] / (told["duration_us"] / 1e6),
        p50_ms=told["p50_us"] / 1e3,
        p99_ms=told["p99_us"] / 1e3,
        server_us=used_s / told["count"] * 1e6,
    )


def perf_analyzer(
    served: Served, door: str, model: str, shape: Sequence[int], clients: int, window_s: float, *, options: Sequence[str] = ()
) -> Load:
    """Run perf_analyzer over `door` (http, grpc) with so many requests in flight, batch 1, for three windows.

    More windows, up to eight, only when one of them saw too few requests to count.

    shape: of x without the batch. Asserts that it told a rate; it ends with an error when a request failed.
    """
    argv, env = tool("perf_analyzer")
    batched = _max_batch_rows(served, door, model) > 0
    dims = ",".join(map(str, shape if batched else (1, *shape)))
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        told = [
            "-m",
            model,
            "-i",
            door,
            "-u",
            served.addresses[door],
            "--concurrency-range",
            str(clients),
            "--shape",
            f"x:{dims}",
        ]
        told += ["-p", str(round(window_s * 1000)), "-s", "999", "-r", "8", "-f", str(table), *options]
        before_s = cpu_s(tree(served.pid))
        out = _run([*argv, *told], env, 3 * window_s)
        used_s = cpu_s(tree(served.pid)) - before_s
        assert table.exists(), f"perf_analyzer told nothing of {served.name} over {door}: {out[-400:]}"
        (row,) = csv.DictReader(table.read_text().splitlines())
    per_s = float(row["Inferences/Second"])
    counted = [int(word.split(":")[1]) for word in out.splitlines() if word.strip().startswith("Request count:")]
    assert sum(counted), f"{served.name} answered nothing over {door}"
    return Load(
        per_s=per_s,
        p50_ms=float(row["p50 latency"]) / 1e3,
        p99_ms=float(row["p99 latency"]) / 1e3,
        server_us=used_s / sum(counted) * 1e6,
    )


def ratios(mine: Iterable[Load], others: Iterable[Load], figure: str = "per_s") -> list[float]:
    """Return one figure of mine over theirs, round by round."""
    return [getattr(a, figure) / getattr(b, figure) for a, b in zip(mine, others, strict=True)]


def told(name: str, loads: Sequence[Load]) -> dict[str, float]:
    """Return the medians of one contender under its name, with the rate's spread."""
    rates = [load.per_s for load in loads]
    return {
        f"{name}_per_s": round(median(rates), 1),
        f"{name}_per_s_spread": round(spread(rates), 1),
        f"{name}_p50_ms": round(median([load.p50_ms for load in loads]), 3),
        f"{name}_p99_ms": round(median([load.p99_ms for load in loads]), 3),
        f"{name}_server_cpu_us": round(median([load.server_us for load in loads]), 1),
    }


def _ours(models: Mapping[str, Path], folder: Path, threads: int, options: Sequence[str]) -> Launch:
    folder.mkdir()
    for name, file in models.items():
        (folder / f"{name}.onnx").symlink_to(file.resolve())
    http_port, grpc_port = free_ports(2)
    argv = (sys.executable, "-m", "tenure.serve", "--model", str(folder), "--threads", str(threads), *options)
    return Launch(
        argv=(*argv, "--http-port", str(http_port), "--grpc-port", str(grpc_port)),
        env=environment(),
        addresses={"http": f"127.0.0.1:{http_port}", "grpc": f"127.0.0.1:{grpc_port}"},
    )


def _max_batch_rows(served: Served, door: str, model: str) -> int:
    """Return what the configuration says, which perf_analyzer goes by: with 0 it takes shapes as they are."""
    if served.name == "kserve":
        return 0
    connection = http.client.HTTPConnection(served.addresses["http"], timeout=PATIENCE_S)
    try:
        connection.request("GET", f"/v2/models/{model}/config")
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise Skip(f"{served.name} tells no configuration of {model}, which perf_analyzer asks for: {body[:200]!r}")
    return int(json.loads(body).get("max_batch_size", 0))


def _run(argv: Sequence[str], env: Mapping[str, str], seconds: float) -> str:
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{Path(argv[0]).name} did not end within {seconds + PATIENCE_S:g} s") from None
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"{Path(argv[0]).name} ended with {done.returncode}: {said.strip()[-600:]}"
    return done.stdout
