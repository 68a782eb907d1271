"""Held-out lives of a served model, drawn from a grammar: what image_soundness and image_seccomp live through.

    run       = start exchange{2..8} end
    start     = model, threads (1 | 2), instances (1 | 2), batching delay (0 | 2 ms), warm-up or not
    exchange  = infer | refused | asked | crowd
    infer     = door, rows, values, outputs, id, compression, a fresh connection or the kept one
    refused   = a request that must be refused, in one of REFUSALS' ways
    asked     = one of QUESTIONS: metadata, readiness, metrics, what is not there
    crowd     = 2 to 6 infer at once
    end       = SIGTERM | SIGTERM with a request on its way | SIGTERM twice | SIGINT

Pure: no clock, no I/O. Run `number` of a service is drawn from (HELD_OUT_SEED, service, number) alone, so that any one can be
lived again by itself. The grammar and its seed were committed before the code that makes closures, which never sees a run of
it: `tests/images/test_grammar.py` holds the digest of the first thousand. How a run is played: `benchmarks.image_player`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np

HELD_OUT_SEED = 20261127
Door = Literal["http-json", "http-binary", "grpc"]
DOORS: tuple[Door, ...] = ("http-json", "http-binary", "grpc")
REFUSALS = (
    *("wrong shape", "wrong width", "wrong datatype", "unknown model", "unknown version", "unknown input", "unknown output"),
    *("no inputs", "input twice", "short data", "long data", "negative length", "huge shape", "text for numbers"),
    *("not JSON", "not UTF-8", "JSON too deep", "empty body", "lying binary size", "lying header length", "wrong compression"),
    *("unknown path", "wrong method", "unknown region"),
)
"""Ways in which a request can be refused."""
GRPC_REFUSALS = frozenset(
    (
        *(
            "wrong shape",
            "wrong width",
            "wrong datatype",
            "unknown model",
            "unknown version",
            "unknown input",
            "unknown output",
        ),
        *("no inputs", "input twice", "short data", "long data", "negative length", "huge shape"),
        *("empty body", "unknown path", "unknown region"),
    )
)
QUESTIONS = (
    *("live", "ready", "server", "model", "model ready", "model at version", "config", "statistics", "index", "metrics"),
    *("no such model", "no such page", "head", "options"),
)
GRPC_QUESTIONS = frozenset(("live", "ready", "server", "model", "model ready", "no such model", "no such page"))
VALUES = ("normal", "zeros", "ones", "large", "small", "subnormal", "negative zero", "nan", "infinity")
FLOATS_ONLY = frozenset(("subnormal", "negative zero", "nan", "infinity"))
COMPRESSIONS = ("", "gzip", "deflate")
ENDS = ("SIGTERM", "SIGTERM in flight", "SIGTERM twice", "SIGINT")
_COMMON_ROWS = (1, 2, 3, 4, 7, 8, 16, 31, 32, 33)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a model; a length of -1 is open."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A model as a run sees it."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Service:
    """What runs are drawn for."""

    name: str
    models: tuple[Served, ...]
    doors: tuple[Door, ...] = DOORS
    settings: bool = True
    """False: a program that has no options for threads, instances, batching and warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How the service is started."""

    model: str
    threads: int = 1
    instances: int = 1
    delay_ms: int = 0
    warm_up: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Infer:
    """One request for an answer."""

    door: Door
    rows: int
    values: str
    values_seed: int
    outputs: tuple[str, ...]
    """Names asked for; empty: all."""
    id: str
    compression: str
    fresh: bool
    """On a connection of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One request that must be refused."""

    door: Door
    way: str
    values_seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question that no model answers."""

    door: Door
    question: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Requests at once, each on a connection of its own."""

    members: tuple[Infer, ...]


Exchange = Infer | Refused | Asked | Crowd


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One life of a service."""

    service: str
    number: int
    start: Start
    exchanges: tuple[Exchange, ...]
    end: str


def draw(service: Service, number: int, *, seed: int = HELD_OUT_SEED) -> Run:
    """Return run `number` of a service, always the same one."""
    rng = Random(f"{seed}/{service.name}/{number}")
    model = rng.choice(service.models)
    start = _start(rng, service, model)
    exchanges = tuple(_exchange(rng, service, model) for _ in range(rng.randint(2, 8)))
    return Run(service=service.name, number=number, start=start, exchanges=exchanges, end=rng.choice(ENDS))


def runs(service: Service, count: int, *, seed: int = HELD_OUT_SEED) -> list[Run]:
    """Return the first `count` runs of a service."""
    return [draw(service, number, seed=seed) for number in range(count)]


def digest(drawn: Sequence[Run]) -> str:
    """Return a hash over all that is in runs: two grammars with the same digest draw the same."""
    return hashlib.sha256("\n".join(map(repr, drawn)).encode()).hexdigest()


def values(tensor: Tensor, rows: int, kind: str, seed: int) -> np.ndarray[Any, Any]:
    """Return an array of `rows` rows for an input. kind: of VALUES; a kind that the datatype lacks gives "normal"."""
    shape = (rows if tensor.shape[0] == -1 else tensor.shape[0], *tensor.shape[1:])
    rng, dtype = np.random.default_rng(seed), np.dtype(_DTYPES[tensor.datatype])
    if dtype.kind != "f":
        top = min(int(np.iinfo(dtype).max), 1 << 20)
        whole = {"zeros": np.zeros(shape), "ones": np.ones(shape), "large": np.full(shape, top), "small": np.ones(shape)}
        return whole.get(kind, rng.integers(0, min(top, 17), shape)).astype(dtype)
    tiny = np.finfo(dtype).tiny
    special = {
        "zeros": 0.0, "ones": 1.0, "large": float(np.finfo(dtype).max) / 8, "small": float(tiny), "subnormal": float(tiny) / 4,
        "negative zero": -0.0, "nan": float("nan"), "infinity": float("inf"),
    }  # fmt: skip
    x: np.ndarray[Any, Any] = rng.standard_normal(shape).astype(dtype)
    if kind == "normal":
        return x
    if kind in ("nan", "infinity"):  # one element in a row of others
        x.reshape(-1)[int(rng.integers(x.size))] = special[kind]
        return x
    return np.full(shape, special[kind], dtype)


_DTYPES = {
    "FP32": "f4", "FP64": "f8", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8",
    "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8",
}  # fmt: skip


def _start(rng: Random, service: Service, model: Served) -> Start:
    threads, instances = rng.choice((1, 1, 2)), rng.choice((1, 1, 1, 2))
    delay_ms, warm_up = rng.choice((0, 0, 0, 2)), rng.random() < 0.8
    if not service.settings:
        return Start(model=model.name)
    return Start(model=model.name, threads=threads, instances=instances, delay_ms=delay_ms, warm_up=warm_up)


def _exchange(rng: Random, service: Service, model: Served) -> Exchange:
    draw = rng.random()
    if draw < 0.45:
        return _infer(rng, service, model)
    if draw < 0.75:
        way = rng.choice(REFUSALS)
        door = rng.choice(service.doors)
        if door == "grpc" and way not in GRPC_REFUSALS:
            door = "http-json"
        return Refused(door=door, way=way, values_seed=rng.getrandbits(32))
    if draw < 0.9:
        question = rng.choice(QUESTIONS)
        grpc = "grpc" in service.doors and question in GRPC_QUESTIONS and rng.random() < 0.4
        return Asked(door="grpc" if grpc else "http-json", question=question)
    return Crowd(members=tuple(_infer(rng, service, model) for _ in range(rng.randint(2, 6))))


def _infer(rng: Random, service: Service, model: Served) -> Infer:
    floats = all(_DTYPES[tensor.datatype].startswith("f") for tensor in model.inputs)
    kinds = [kind for kind in VALUES if floats or kind not in FLOATS_ONLY]
    names = [tensor.name for tensor in model.outputs]
    asked = tuple(rng.sample(names, rng.randint(1, len(names)))) if rng.random() < 0.4 else ()
    door = rng.choice(service.doors)
    return Infer(
        door=door,
        rows=rng.choice(_COMMON_ROWS) if rng.random() < 0.8 else rng.randint(1, 128),
        values="normal" if rng.random() < 0.6 else rng.choice(kinds),
        values_seed=rng.getrandbits(32),
        outputs=asked,
        id=rng.choice(("", "", "a", "7f3e", "\u00fcber")),
        compression=rng.choice(COMPRESSIONS) if door != "grpc" and rng.random() < 0.3 else "",
        fresh=rng.random() < 0.3,
    )
