"""Requests per second of a server whose model costs nothing, beside Triton's core and the best Python gRPC server.

World: `vision.same` (1,024 float32 in, the same out: 4 KB each way, batch 1) served at once by ours (`python -m tenure.serve`,
defaults), Triton's core with a python-backend model over ONNX Runtime (dynamic batching on: 20 % quicker than off), KServe's
Python server and a plain FastAPI server that takes raw bytes. One server process or worker each, two threads per model,
spinning off; one is loaded at a time while the others idle. Clients: 16 and 64, closed loop.
- HTTP binary: wrk, one thread, a fixed body; ours, Triton, FastAPI (16 clients).
- gRPC: perf_analyzer, synchronous calls, three windows; ours, Triton, KServe, which was the best Python gRPC server measured
  (1.4 k/s; MLServer 1.3 k/s). Its defaults count, as everybody's; the ratio to a KServe without its three lines of log per
  request, about 1.4 x as quick, is told in the details of the full form.
Rounds: 7 of 3 s each (--quick: 2 of 1 s, windows of 0.4 s), order shuffled by the seed, after one short run of each.
Value: the smaller of the two median ratios ours / Triton over HTTP (16, 64 clients), each by rounds.
Bars, all must hold: HTTP >= 1.0 x Triton at 16 and 64; p99 over HTTP <= 1.0 x Triton's (median of the rounds' ratios) at both;
gRPC >= 3 x KServe at both. Triton's ratio over gRPC is told in the details (1.0 is the wish).
Checked before a figure counts: each server gives back the 1,024 numbers sent, over each door used; no request of wrk failed or
had a status other than 200, its answers were 4 KB at least on average; perf_analyzer ended well.
Control: FastAPI with raw bytes, what one writes in an afternoon, must miss the HTTP bar at 16 clients.
Details: rates, p50 and p99 of everyone, CPU time of the server's processes per request (client not counted).
Not counted: more cores than two, networks, connections that come and go.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import vision
from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from benchmarks.peers.processes import Served, together
from benchmarks.serving import OURS, Load, Request, check_tensor, perf_analyzer, ratios, serve, told, v2_binary, wrk
from tenure.serve.client import Model

NAME = "serve_requests"
BAR = "4 KB: HTTP >= 1.0 x Triton with p99 no worse, gRPC >= 3 x the best Python gRPC server, at 16 and 64 clients"
CLIENTS = (16, 64)
GRPC_BAR = 3.0


def run(options: Options) -> Result:
    """Measure all servers in interleaved rounds."""
    repeats, seconds, window_s = (2, 1.0, 0.4) if options.quick else (7, 3.0, 1.0)
    x = np.random.default_rng(options.seed).normal(size=(1, *vision.SAME)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = {"same": vision.same(scratch / "same.onnx")}
        starts = [partial(serve, name, models, scratch) for name in (OURS, "triton", "kserve", "fastapi")]
        starts += [] if options.quick else [partial(serve, "kserve", models, scratch, quiet=True)]
        with together(*starts) as servers:
            contenders = check_and_name(servers, x, seconds, window_s)
            for contender in contenders.values():
                contender(True)
            calls = {name: partial(contender, False) for name, contender in contenders.items()}
            found = interleaved(calls, repeats, seed=options.seed)
    return judged(found, repeats)


def check_and_name(
    servers: tuple[Served, ...], x: np.ndarray, seconds: float, window_s: float
) -> dict[str, Callable[[bool], Load]]:
    """Check each server's answers, and return one contender per server, door and number of clients (True: a short run)."""
    contenders: dict[str, Callable[[bool], Load]] = {}
    for place, served in enumerate(servers):
        label = served.name if place < 4 else f"{served.name}_quiet"
        raw = Request(path="/same", headers={"Content-Type": "application/octet-stream"}, body=x.tobytes())
        request = raw if served.name == "fastapi" else v2_binary("same", x)
        if served.name != "kserve":
            check_tensor(served, request, x)
        if "grpc" in served.addresses:
            with Model(f"grpc://{served.addresses['grpc']}", "same") as model:
                assert np.array_equal(model.predict(x), x), f"{served.name} answered wrongly over gRPC"
        for clients in CLIENTS if served.name != "fastapi" else CLIENTS[:1]:
            if served.name != "kserve":
                contenders[f"{label}_http_{clients}"] = partial(_http, served, request, clients, seconds)
            if "grpc" in served.addresses:
                contenders[f"{label}_grpc_{clients}"] = partial(_grpc, served, clients, window_s)
    return contenders


def _http(served: Served, request: Request, clients: int, seconds: float, short: bool) -> Load:
    return wrk(served, request, clients, 1.0 if short else seconds, answer_bytes=vision.SAME_BYTES)


def _grpc(served: Served, clients: int, window_s: float, short: bool) -> Load:
    return perf_analyzer(served, "grpc", "same", vision.SAME, clients, 0.2 if short else window_s)


def judged(found: dict[str, list[Load]], repeats: int) -> Result:
    """Turn the rounds into ratios and a verdict."""
    http = {n: ratios(found[f"{OURS}_http_{n}"], found[f"triton_http_{n}"]) for n in CLIENTS}
    late = {n: ratios(found[f"{OURS}_http_{n}"], found[f"triton_http_{n}"], "p99_ms") for n in CLIENTS}
    grpc = {n: ratios(found[f"{OURS}_grpc_{n}"], found[f"kserve_grpc_{n}"]) for n in CLIENTS}
    triton = {n: ratios(found[f"{OURS}_grpc_{n}"], found[f"triton_grpc_{n}"]) for n in CLIENTS}
    naive = median(ratios(found["fastapi_http_16"], found["triton_http_16"]))
    control = Control(
        name="FastAPI with raw bytes", value=naive, failed=naive < 1.0, how=f"{naive:.2f} x Triton over HTTP at 16 clients"
    )
    missed = [f"HTTP at {n} clients: {median(http[n]):.2f} x Triton" for n in CLIENTS if median(http[n]) < 1.0]
    missed += [f"p99 over HTTP at {n} clients: {median(late[n]):.2f} x Triton's" for n in CLIENTS if median(late[n]) > 1.0]
    missed += [f"gRPC at {n} clients: {median(grpc[n]):.2f} x KServe" for n in CLIENTS if median(grpc[n]) < GRPC_BAR]
    holds, why = judge(not missed, control)
    worst = min(CLIENTS, key=lambda n: median(http[n]))
    figures = {"http_over_triton": http, "http_p99_over_triton": late, "grpc_over_kserve": grpc, "grpc_over_triton": triton}
    details = {f"{name}_{n}": round(median(values[n]), 3) for name, values in figures.items() for n in CLIENTS}
    if "kserve_quiet_grpc_16" in found:
        quiet = {n: ratios(found[f"{OURS}_grpc_{n}"], found[f"kserve_quiet_grpc_{n}"]) for n in CLIENTS}
        details |= {f"grpc_over_kserve_quiet_{n}": round(median(quiet[n]), 3) for n in CLIENTS}
    details |= {f"{name}_{n}_spread": round(spread(values[n]), 3) for name, values in figures.items() for n in CLIENTS}
    for name, loads in found.items():
        details |= told(name, loads)
    return Result(
        value=median(http[worst]),
        spread=spread(http[worst]),
        unit="x Triton's requests/s over HTTP",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": "Triton core over HTTP", "value": details[f"triton_http_{worst}_per_s"], "unit": "requests/s"},
        control=control,
        details={**details, "rounds": repeats, "load_1min": os.getloadavg()[0], "cores": os.cpu_count()},
    )
