"""The wire alone: an image of 602,112 bytes to a model that costs nothing, through shared memory.

World: `vision.mean` (x [n,3,224,224] -> its mean, 4 bytes) behind ours and behind Triton's core (python backend over ONNX
Runtime), two threads, spinning off. Clients are processes of their own, one kind loaded at a time; eight images take turns, so
that each is copied into the shared region anew, and every answer is compared.
- one after the other: our client over shm against ours; tritonclient with system shared memory against Triton, by gRPC and by
  HTTP, of which the quicker counts in each round. All copy the image into the region for each request and read the answer;
- 16 in flight: one client process over shm; `Model.predict_each` (no event loop) counts, 16 tasks of the asynchronous client on
  uvloop are told beside it; against calls in the same client process, each after copying the image into one buffer (`here`),
  no server.
Rounds: 7 of 2 s (--quick: 3 of 0.7 s), order shuffled by the seed, after 0.2 s of each to warm up.
Value: median over rounds of our images/s, one after the other, over Triton's.
Bars, both must hold: value >= 1.5; 16 in flight >= 0.5 x `here` (median of the rounds' ratios).
Told beside them: our client over http and grpc, tritonclient with shared memory against ours; in the full form perf_analyzer
with system shared memory at 1 and 16 in flight against both (it writes the input once, not per request); CPU time per image of
server and client.
Checked: every answer is the image's mean within 1e-5.
Control: the image written out in JSON to the same server must miss the 1.5.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import vision
from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from benchmarks.peers import homes, triton
from benchmarks.peers.processes import Served, together
from benchmarks.serving import OURS, Dialogue, perf_analyzer, serve, told

NAME = "serve_shared_memory"
BAR = "602 KB images: one after the other >= 1.5 x Triton's shared memory; 16 in flight >= 0.5 x in-process with a copy"
SYNC_BAR, IN_FLIGHT_BAR = 1.5, 0.5
IN_FLIGHT = 16
THREADS = 2
_PROGRAM = Path(__file__).parent / "peers" / "programs" / "rates.py"


@dataclass(frozen=True, slots=True)
class Rate:
    """What one contender did in one round."""

    per_s: float
    server_us: float
    """CPU time of the server's processes per image, microseconds."""
    client_us: float


def run(options: Options) -> Result:
    """Measure all ways in interleaved rounds."""
    repeats, seconds = (3, 0.7) if options.quick else (7, 2.0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        file = vision.mean(scratch / "mean.onnx")
        starts = (partial(serve, name, {"mean": file}, scratch, threads=THREADS) for name in (OURS, "triton"))
        with together(*starts) as (ours, other):
            triton_python = homes.python(triton.install(homes.default_root()))
            with (
                client(sys.executable, file, ours, ("shm", "http", "grpc", "json"), options.seed) as mine,
                client(triton_python, file, other, ("triton_shm", "triton_shm_http"), options.seed) as theirs,
                client(triton_python, file, ours, ("triton_shm",), options.seed) as guest,
            ):
                contenders: dict[str, Callable[[], Rate]] = {
                    "shm": partial(rate, mine, "shm", seconds),
                    "triton_shm_grpc": partial(rate, theirs, "triton_shm", seconds),
                    "triton_shm_http": partial(rate, theirs, "triton_shm_http", seconds),
                    "here": partial(rate, mine, "here", seconds),
                    "shm_16": partial(rate, mine, "shm_each", seconds, IN_FLIGHT),
                    "shm_16_async": partial(rate, mine, "shm", seconds, IN_FLIGHT),
                    "http": partial(rate, mine, "http", seconds),
                    "grpc": partial(rate, mine, "grpc", seconds),
                    "tritonclient_shm": partial(rate, guest, "triton_shm", seconds),
                    "json": partial(rate, mine, "json", seconds / 2),
                }
                found = interleaved(contenders, repeats, seed=options.seed)
            others = {} if options.quick else analyzed((ours, other))
    return judged(found, others, repeats)


def client(python: Path | str, file: Path, served: Served, ways: Sequence[str], seed: int) -> Dialogue:
    """Return a client process of one server."""
    where = {"file": str(file), "name": file.stem, "addresses": dict(served.addresses), "pid": served.pid}
    return Dialogue(
        f"client of {served.name}", python, _PROGRAM, {**where, "threads": THREADS, "ways": list(ways), "seed": seed}
    )


def rate(client: Dialogue, way: str, seconds: float, in_flight: int = 0) -> Rate:
    """Return what one round of one way gave."""
    found = client.ask({"way": way, "seconds": seconds, "in_flight": in_flight})
    count = found["count"]
    return Rate(count / found["took_s"], found["server_cpu_s"] / count * 1e6, found["client_cpu_s"] / count * 1e6)


def analyzed(servers: Sequence[Served]) -> dict[str, float]:
    """Return what perf_analyzer says with system shared memory, by server, door and requests in flight."""
    found: dict[str, float] = {}
    shared = ("--shared-memory", "system", "--output-shared-memory-size", "64")
    for served in servers:
        for door in ("http", "grpc"):
            for clients in (1, IN_FLIGHT):
                load = perf_analyzer(served, door, "mean", vision.IMAGE, clients, 1.0, options=shared)
                found |= told(f"perf_analyzer_{served.name}_{door}_{clients}", [load])
    return found


def judged(found: dict[str, list[Rate]], others: dict[str, float], repeats: int) -> Result:
    """Turn the rounds into ratios and a verdict."""
    rates = {name: [one.per_s for one in seen] for name, seen in found.items()}
    best = [max(pair) for pair in zip(rates["triton_shm_grpc"], rates["triton_shm_http"], strict=True)]
    sync = [mine / other for mine, other in zip(rates["shm"], best, strict=True)]
    flying = [mine / here for mine, here in zip(rates["shm_16"], rates["here"], strict=True)]
    naive = median([mine / other for mine, other in zip(rates["json"], best, strict=True)])
    control = Control(
        name="the image in JSON", value=naive, failed=naive < SYNC_BAR, how=f"{naive:.3f} x Triton's shared memory"
    )
    missed = [f"one after the other {median(sync):.2f} x Triton's shared memory"] if median(sync) < SYNC_BAR else []
    missed += [f"16 in flight {median(flying):.2f} x in-process with a copy"] if median(flying) < IN_FLIGHT_BAR else []
    holds, why = judge(not missed, control)
    details: dict[str, Any] = {"in_flight_over_in_process": median(flying), "in_flight_over_in_process_spread": spread(flying)}
    for name, seen in found.items():
        details |= {f"{name}_per_s": round(median(rates[name]), 1), f"{name}_per_s_spread": round(spread(rates[name]), 1)}
        details[f"{name}_server_cpu_us"] = round(median([one.server_us for one in seen]), 1)
        details[f"{name}_client_cpu_us"] = round(median([one.client_us for one in seen]), 1)
    return Result(
        value=median(sync),
        spread=spread(sync),
        unit="x Triton's images/s through shared memory",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": "Triton, its quicker door with system shared memory", "value": median(best), "unit": "images/s"},
        control=control,
        details={**details, **others, "rounds": repeats, "load_1min": os.getloadavg()[0], "cores": os.cpu_count()},
    )
